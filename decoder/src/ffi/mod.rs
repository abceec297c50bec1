//! All that touches PostgreSQL's C interface, behind safe types. Nothing outside this folder is `unsafe`.
//!
//! Calls into `pg_sys` go through pgrx's guard: an `ereport(ERROR)` in them becomes a Rust unwind that the callback's
//! `#[pg_guard]` turns back into an ERROR of this backend, so destructors run. What Postgres may free by itself at such
//! a moment (memory contexts) is never freed by a destructor.

mod ahead;
pub mod at_commit;
pub mod catalog_query;
pub mod catalog_types;
pub mod datum;
mod ddl_command;
pub mod executor;
pub mod failure;
pub mod flusher;
pub mod function;
mod hold;
pub mod hooks;
pub mod labels;
pub mod local;
pub mod memory;
pub mod output_plugin;
pub mod pack;
pub mod query;
pub mod relation;
pub mod row_types;
pub mod scan;
pub mod session;
pub mod settings;
pub mod shared;
pub mod text;
mod unguarded;
mod user_code;
pub mod value;

#[cfg(not(all(target_endian = "little", target_pointer_width = "64")))]
compile_error!("the row encoder reads little-endian varlena headers and 8-byte datums");
