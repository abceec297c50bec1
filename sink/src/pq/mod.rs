//! PostgreSQL through libpq, behind safe types.
//!
//! libpq rather than a Rust client, because then every connection string, service file, password file, TLS mode,
//! Kerberos set-up and multi-host failover that works with psql works here, and because it speaks CopyBoth, which the
//! replication stream needs. All `unsafe` of this crate is in `ffi`; nothing outside this folder sees a raw pointer.

mod addresses;
mod connect;
mod connection;
mod copy;
mod error;
mod explain;
mod ffi;
mod result;
mod silence;
mod wait;
mod wake;

pub use connection::{CancelHandle, Connection, quote_identifier, quote_literal};
pub use copy::{BinaryFields, Copied, CopyOut, binary_fields};
pub use error::{ErrorKind, PqError, Target};
pub use explain::{connect_failed, message_failed, message_grant, next_after_connect};
pub use ffi::CopyBuffer;
pub use result::{QueryResult, Row, Rows};
pub use wake::Waker;
