//! SELECT capture: the rows that queries read from cached tables go into the WAL, so that the sink can put them into Redis.
//!
//! [`crate::ffi::executor`] hooks the executor and calls here: [`Session::attach`] for every scan of a cached table,
//! [`Session::row`] for every row that such a scan returns, [`Session::emit`] when the query has run. This module never
//! imports the decoding callbacks; the two meet only in the WAL.
//!
//! INVARIANT I9: capture never fails a query. On any doubt it does nothing and counts it ([`stats`]).

pub mod seen;
pub mod session;
pub mod stats;

pub use session::Session;

/// The prefix of the logical messages that carry captured rows: non-transactional, content a Capture message.
pub const PREFIX: &std::ffi::CStr = c"walmirror.capture";
