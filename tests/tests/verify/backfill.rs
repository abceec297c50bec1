//! `walmirror backfill`, and how both commands name tables.

use walmirror_tests::{DEADLINE, Mirror, Signal, Sink, wait_for};

use crate::{assert_equal, redis, walmirror};

#[test]
fn a_table_is_named_as_in_sql_and_a_cache_has_nothing_to_fill() {
    let m = Mirror::with(
        "CREATE SCHEMA \"My Shop\"; CREATE TABLE \"My Shop\".\"Big Orders\" (id int PRIMARY KEY); \
         SELECT walmirror.mirror('\"My Shop\".\"Big Orders\"', key => 'o:{id}'); \
         INSERT INTO \"My Shop\".\"Big Orders\" VALUES (1); \
         CREATE TABLE c (id int PRIMARY KEY); SELECT walmirror.cache('c')",
    );
    m.settle();
    for name in [
        "\"My Shop\".\"Big Orders\"",
        "My Shop.Big Orders",
        "Big Orders",
        "\"Big Orders\"",
    ] {
        assert_equal(&m, &["verify", "--table", name]);
        assert_equal(&m, &["backfill", "--table", name]);
    }
    let (code, output) = walmirror(&m, &["backfill", "--table", "c"]);
    assert_eq!(code, 2, "{output}");
    assert!(
        output.contains("the table public.c is cached on demand"),
        "{output}"
    );
    assert_equal(&m, &["backfill"]);
    m.sql("CREATE TABLE \"My Shop\".c (id int PRIMARY KEY); SELECT walmirror.mirror('\"My Shop\".c', key => 'mine:{id}')");
    for command in ["backfill", "verify"] {
        let (code, output) = walmirror(&m, &[command, "--table", "c"]);
        assert_eq!(code, 2, "{output}");
        let next = format!("next: walmirror {command} --table ");
        assert!(
            output.contains("there is more than one table") && output.contains(&next),
            "{output}"
        );
    }
}

/// Requests are in the WAL: a sink that is killed before it has taken one up finds it when it starts again.
#[test]
fn a_backfill_that_was_asked_for_survives_the_death_of_the_sink() {
    let m = Mirror::with(
        "CREATE TABLE t (id int PRIMARY KEY, v text); SELECT walmirror.mirror('t'); \
         INSERT INTO t SELECT i, 'v' FROM generate_series(1, 3000) i",
    );
    redis(&m, &["DEL", "t:1", "t:2000"]);
    redis(&m, &["HSET", "t:9999", "id", "9999"]);
    m.sink(|sink| sink.signal(Signal::STOP));
    let output = assert_equal(&m, &["backfill", "--timeout", "0"]);
    assert!(output.contains("walmirror status"), "{output}");
    m.sink(Sink::kill);
    m.sink(Sink::restart);
    m.settle();
    assert_equal(&m, &["verify"]);
}

/// The story: the command went on to wait for ever, and said nothing, when the sink had stopped meanwhile.
#[test]
fn a_backfill_that_is_waited_for_tells_that_the_sink_has_stopped() {
    let m = Mirror::with(
        "CREATE TABLE t (id int PRIMARY KEY, v text); SELECT walmirror.mirror('t'); \
         INSERT INTO t SELECT i, 'v' FROM generate_series(1, 100) i",
    );
    // The backfill waits until this transaction has ended.
    let mut open = m.db.connect();
    open.batch_execute("BEGIN; CREATE TABLE held ()").unwrap();
    let mut backfill = Sink::start(&m.arguments(&["backfill"]));
    wait_for(DEADLINE, "the backfill to begin", || {
        let (_, status) = walmirror(&m, &["status"]);
        status.contains("backfilling").then_some(())
    });
    backfill.assert_running();
    m.sink(Sink::kill);
    let code = backfill.wait(DEADLINE).code();
    let output = backfill.output();
    assert_eq!(code, Some(3), "{output}");
    assert!(
        output.contains("the sink has stopped") && output.contains("next: walmirror run"),
        "{output}"
    );
    open.batch_execute("COMMIT").unwrap();
    m.sink(Sink::restart);
    m.settle();
}
