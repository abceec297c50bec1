//! The transactional logical message by which a session that runs DDL tells the decoders of it.
//!
//! Written by the extension's event triggers (sql/) and by the drop hook; prefix [`PREFIX`], content JSON. What the
//! table looks like is not in the message: the decoder reads it from the catalogs, as of this position.

use serde::{Deserialize, Serialize};

/// The prefix of the message.
pub const PREFIX: &str = "walmirror.ddl";

/// What happened to a table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DdlMessage {
    /// `pg_class.oid` of the table that carries, or carried, the label.
    pub oid: u32,
    /// Rows may have changed without a change in the stream.
    #[serde(default)]
    pub refresh: bool,
    /// It is being dropped.
    #[serde(default)]
    pub dropped: bool,
    /// Its keys are to stay in Redis.
    #[serde(default)]
    pub keep_keys: bool,
}
