//! Private Postgres and Redis servers and a running sink, for the end-to-end tests, the demo and the benchmark.
//!
//! A test asks for a [`Mirror`], which is a database of a (shared) server, a Redis of its own and the sink between
//! them, changes the database with [`Mirror::sql`], and ends with [`Mirror::check`]: every key of Redis
//! is compared with what Postgres says it must be. Nothing sleeps: whatever takes time is waited for with a deadline.
//! Dropping a handle ends the processes it started and removes their files.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod cgroup;
mod compare;
mod db;
mod http;
mod load;
mod logs;
mod mirror;
mod pg;
mod process;
mod proxy;
mod redis_server;
mod scenario;
mod seed;
mod sink;
mod skip;
mod tmpfs;
mod wait;
mod watch;

pub use cgroup::{Cgroup, Resource};
pub use compare::{Report, compare};
pub use db::Db;
pub use http::{figure, free_address, get};
pub use load::Load;
pub use logs::{GAP, POSTGRES_AWAY, REDIS_AWAY, gap, unexpected};
pub use mirror::Mirror;
pub use pg::{Frozen, Pg};
pub use process::{Dir, Process, Signal, remove_dirs};
pub use proxy::{Mode, Proxy, Trap, Way};
pub use redis_server::{Redis, free_port};
pub use scenario::{SOON_AFTER_SILENCE, Scenario, Setup};
pub use seed::rng;
pub use sink::{Sink, full_disk, unread};
pub use skip::skipped;
pub use tmpfs::Tmpfs;
pub use wait::{DEADLINE, Lsn, Raise, wait_for};
pub use watch::{Looks, Watch};
