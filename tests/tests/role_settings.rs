//! What is set for the sink's role changes nothing: neither what a row looks like in Redis, nor what the sink may do, nor how long it may take.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::sync::Arc;

use walmirror_tests::{Pg, Scenario, Setup};

/// Each of them a sensible default for somebody, or wrong for this; not every server knows all of them.
const SETTINGS: &[&str] = &[
    "statement_timeout = '300ms'",
    "lock_timeout = '100ms'",
    "idle_in_transaction_session_timeout = '200ms'",
    "idle_session_timeout = '300ms'",
    "transaction_timeout = '300ms'",
    "wal_sender_timeout = '2s'",
    "default_transaction_isolation = serializable",
    "default_transaction_read_only = on",
    "default_transaction_deferrable = on",
    "row_security = off",
    "session_replication_role = replica",
    "event_triggers = off",
    "exit_on_error = on",
    "track_activities = off",
    "search_path = nowhere",
    "standard_conforming_strings = off",
    "backslash_quote = off",
    "transform_null_equals = on",
    "array_nulls = off",
    "quote_all_identifiers = on",
    "DateStyle = German",
    "IntervalStyle = iso_8601",
    "TimeZone = 'America/St_Johns'",
    "bytea_output = escape",
    "extra_float_digits = -15",
    "xmlbinary = hex",
    "xmloption = document",
    "lc_monetary = 'C.utf8'",
    "client_encoding = LATIN1",
    "client_min_messages = debug1",
    "plan_cache_mode = force_generic_plan",
    "force_parallel_mode = on",
    "debug_parallel_query = on",
    "jit_above_cost = 0",
    "cursor_tuple_fraction = 0.0001",
    "enable_seqscan = off",
    "enable_indexscan = off",
    "enable_bitmapscan = off",
    "enable_tidscan = off",
    "enable_hashjoin = off",
    "enable_sort = off",
    "work_mem = '64kB'",
    "logical_decoding_work_mem = '1MB'",
    "synchronous_commit = remote_apply",
    "walmirror.capture = on",
];

/// Runs a command as that role, to a good end. Returns what it printed.
#[track_caller]
fn run(s: &Scenario, args: &[&str]) -> String {
    let (code, output) = s.m.run_as("mirror", args);
    assert_eq!(code, Some(0), "{output}");
    output
}

#[test]
fn what_is_set_for_the_role_changes_nothing() {
    let pg = Pg::start("");
    let mut client = pg.connect("postgres");
    let role = "CREATE ROLE mirror LOGIN REPLICATION; GRANT pg_read_all_data TO mirror";
    client.batch_execute(role).unwrap();
    for setting in SETTINGS {
        let (name, _) = setting.split_once(' ').unwrap();
        if name.contains('.') || pg.knows(name) {
            client
                .batch_execute(&format!("ALTER ROLE mirror SET {setting}"))
                .unwrap();
        }
    }
    let setup = Setup {
        pg: Arc::new(pg),
        user: "mirror".to_owned(),
        ..Setup::default()
    };
    let mut s = Scenario::start("what_is_set_for_the_role_changes_nothing", setup);
    s.flow();
    s.m.sql(
        "ALTER TABLE item ADD d date DEFAULT '2020-02-03', ADD b bytea DEFAULT '\\x00ff', ADD f float8 DEFAULT 0.1; \
         CREATE TABLE \"price in \u{20ac}\" (id int PRIMARY KEY, v text); INSERT INTO \"price in \u{20ac}\" VALUES (1, 'x'); \
         SELECT walmirror.mirror('\"price in \u{20ac}\"', key => 'price:{id}')",
    );
    s.flow();
    {
        // A transaction that is serializable, reads only and is deferrable waits for this one.
        let mut writer = s.m.db.connect();
        let begin = "BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT count(*) FROM account; UPDATE marker SET note = note WHERE id < 0";
        writer.batch_execute(begin).unwrap();
        s.kill_sink();
        s.recovers();
        assert!(run(&s, &["status"]).contains("price in \u{20ac}"));
        run(&s, &["doctor"]);
        run(&s, &["verify", "--table", "account"]);
        run(&s, &["wait"]);
    }
    let _: String = s.m.redis.command("FLUSHALL");
    s.resyncs();
    s.flow();
    run(&s, &["verify"]);
    s.finish(&["Redis"]);
}
