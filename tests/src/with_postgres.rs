//! `with-postgres COMMAND…` runs a command while a private Postgres is up, which it finds in WALMIRROR_TEST_POSTGRES:
//! for the tests of the sink's own modules that want a server but nothing else of this crate.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::process::{Command, ExitCode};

use walmirror_tests::Pg;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (program, args) = args.split_first().expect("a command");
    let mut command = Command::new(program);
    command.args(args);
    let pg = Pg::start("");
    // These tests speak to the plugin that comes with Postgres, where its contrib modules are installed.
    let slot = "SELECT pg_create_logical_replication_slot('probe', 'test_decoding', true)";
    if pg.connect("postgres").batch_execute(slot).is_ok() {
        command.env("WALMIRROR_TEST_POSTGRES", pg.conninfo("postgres"));
    }
    let status = command.status().unwrap_or_else(|e| panic!("{program}: {e}"));
    drop(pg);
    ExitCode::from(
        status
            .code()
            .and_then(|code| u8::try_from(code).ok())
            .unwrap_or(1),
    )
}
