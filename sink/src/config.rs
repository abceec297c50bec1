//! What the sink was told to do: types of the options, where they come from, and how secrets stay out of logs.
//!
//! Every option can be a flag, a `WALMIRROR_…` environment variable and a key of the TOML file, in this order of
//! precedence. [`Options`] is all three at once: one field, one name, no drift.

mod file;
mod options;
mod secret;
mod values;

pub use file::RunConfig;
pub use options::{Options, RunOptions};
pub use secret::{Conninfo, RedisUrl, scrub};
pub use values::{ByteSize, Durability, LogFormat, LogLevel, OnBadRow, OnGap, SlotName, Span, Streaming};
