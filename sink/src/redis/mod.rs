//! The edge to Redis: one connection that writes (`Writer`, owned by the applying thread) and connections that only read
//! (the backfill's scans). Every reply is looked at, and every error is classed: try again, call the operator, or bug.

mod claim;
mod clients;
mod connection;
mod error;
mod prefixes;
mod role;
mod scan;
#[cfg(test)]
pub(crate) mod server;
#[cfg(test)]
mod tests;
mod writer;

pub use claim::{Claim, Identity, Stored, begin_first, read_stored};
pub use clients::{Other, other_cluster, require_own};
#[cfg(test)]
pub(crate) use connection::Wire;
pub(crate) use connection::pairs;
pub use connection::{Answers, Connection, setting, value_limit};
pub use error::{class_of, reply_error, rights_command, unreadable};
pub(crate) use prefixes::Prefixes;
pub use role::{CLUSTER, REPLICA, eviction, evicts, require_master, run_id};
pub use scan::{Pages, Scan};
pub use writer::{Applied, Refused, Segment, Writer};
