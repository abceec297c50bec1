//! The walmirror extension: what runs inside PostgreSQL.
//!
//! A row's way, in reading order: [`ffi::output_plugin`] (the C callbacks) calls [`decode`], which looks the table up in
//! [`tables`] (a cache of [`plan`]s, made from the table's [`label`]) and has [`encode`] write the row into a frame.
//! [`capture`] takes the rows that SELECTs read. [`options`] are what the client asked for. [`ddl`] keeps labels valid and tells the stream of schema changes;
//! [`functions`] are the SQL functions. All `unsafe` code stands in [`ffi`].

mod capture;
mod ddl;
mod decode;
mod encode;
mod error;
mod ffi;
mod functions;
mod json;
mod label;
mod options;
mod plan;
mod tables;

pgrx::pg_module_magic!();
