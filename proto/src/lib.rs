//! The walmirror stream, for both of its ends: the output plugin writes frames, the sink reads them and turns their
//! values into what Redis holds. No I/O happens here, nothing here knows Postgres' headers or Redis, and no input makes
//! it panic. docs/wire.md describes the format for readers in other languages.

pub mod lsn;
pub mod pb;
mod varint;

pub mod writer;

mod fields;
pub mod frame;
pub mod row;

pub mod value;

pub mod key;

pub use lsn::Lsn;
