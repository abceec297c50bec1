//! The walmirror sink: reads the change stream of PostgreSQL and keeps Redis equal to it.
//!
//! Modules in the order in which a row meets them. The binary (`main.rs`) only calls [`cli::main`]; everything else is
//! in this library, so that tests, fuzz targets and benchmarks reach it.

// The edge to Postgres.
pub mod pq;
pub mod replication;

// The pure core: what is to be applied, what may still be applied, and as which commands.
pub mod continuity;
pub mod gate;
pub mod plan;
pub mod progress;
pub mod rejected;
pub mod request;
pub mod resp;
pub mod transaction;

// Transactions in progress, on disk.
pub mod spool;

// The edge to Redis.
pub mod redis;

// The mirror: all of the above in threads.
pub mod backfill;
pub mod run;
pub mod verify;

// What a process needs.
pub mod admin;
pub mod cli;
pub mod config;
pub mod error;
pub mod logging;
pub mod memory;
pub mod shell;
pub mod shown;
pub mod shutdown;
pub mod tail;

pub use error::{Class, Error};
