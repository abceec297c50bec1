//! `--on-bad-row stop`: the sink ends with the row that cannot be mirrored, and does not go past it.
//!
//! Where it goes on without the row, as by default: bad_row.rs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use walmirror_tests::{DEADLINE, Db, Lsn, Mirror, Pg, Redis, Sink, figure, free_address, wait_for};

const STOP: [&str; 2] = ["--on-bad-row", "stop"];

/// A sink that stops at a bad row, and a Redis that takes values and keys of a megabyte at most.
fn mirror(setup: &str, args: &[&str]) -> Mirror {
    let redis = Redis::start_with(&["--proto-max-bulk-len", "1048576"]);
    let m = Mirror::between(Db::create(Pg::shared()), redis);
    m.sql(setup);
    m.start_with(&[&STOP[..], args].concat());
    m
}

/// Waits until the sink has ended with this exit code, and returns the line of the error, and that of the next command below it.
#[track_caller]
fn ended(m: &Mirror, code: i32) -> (String, String) {
    let status = m.sink(|sink| sink.wait(DEADLINE));
    let log = m.sink(|sink| sink.output());
    assert_eq!(status.code(), Some(code), "{log}");
    let mut lines = log.lines().rev();
    let next = lines.find(|line| line.contains("next: ")).unwrap_or_default();
    let error = lines.find(|line| line.contains("error: ")).unwrap_or_default();
    (error.to_owned(), next.to_owned())
}

/// The position that an error tells.
#[track_caller]
fn lsn(error: &str) -> Lsn {
    let (_, behind) = error
        .split_once("at LSN ")
        .unwrap_or_else(|| panic!("no LSN: {error}"));
    let end = behind.find(|sign: char| !sign.is_ascii_hexdigit() && sign != '/');
    behind[..end.unwrap_or(behind.len())].parse().unwrap()
}

/// It stops at the row, is started again and stops again, until it is told to skip the row.
#[track_caller]
fn stops_until_somebody_says_skip(setup: &str, good: &str, bad: &str, key: &str, keys: &[&str]) {
    let m = mirror(setup, &[]);
    m.filled();
    m.sql(good);
    let before = m.db.lsn();
    m.sql(bad);
    let behind = m.db.lsn();
    for _ in 0..2 {
        let (error, next) = ended(&m, 3);
        assert!(
            error.contains(&format!("the row with the key \"{key}")),
            "{error}"
        );
        assert!(
            error.contains(" of the table public.t cannot be mirrored: "),
            "{error}"
        );
        let at = lsn(&error);
        assert!(
            before <= at && at <= behind,
            "{at} is not in {before} to {behind}"
        );
        assert!(next.contains("next: walmirror run --on-bad-row skip"), "{next}");
        assert_eq!(m.notes(), 0);
        // It does not go past the row by being started again.
        m.start_with(&STOP);
    }
    m.sink(|sink| sink.wait(DEADLINE));
    m.start();
    m.sync();
    assert_eq!(m.redis.keys(), keys);
    assert_eq!(m.notes(), 1);
}

#[test]
fn a_value_that_is_too_large() {
    stops_until_somebody_says_skip(
        "CREATE TABLE t (id int PRIMARY KEY, v text); SELECT walmirror.mirror('t')",
        "INSERT INTO t VALUES (1, 'x')",
        "INSERT INTO t VALUES (2, repeat('x', 1048577)); INSERT INTO t VALUES (3, 'x')",
        "t:2\"",
        &["t:1", "t:3"],
    );
}

#[test]
fn a_key_that_is_too_long() {
    stops_until_somebody_says_skip(
        "CREATE TABLE t (id int PRIMARY KEY, v text, n int); ALTER TABLE t REPLICA IDENTITY FULL; \
         SELECT walmirror.mirror('t', key => 't:{id}:{v}', columns => '{id,n}')",
        "INSERT INTO t VALUES (1, 'x')",
        "INSERT INTO t VALUES (2, repeat('x', 1048577)); INSERT INTO t VALUES (3, 'x')",
        "t:2:xxx",
        &["t:1:x", "t:3:x"],
    );
}

#[test]
fn a_key_of_another_table() {
    stops_until_somebody_says_skip(
        "CREATE TABLE t (id text PRIMARY KEY); CREATE TABLE admins (id int PRIMARY KEY); \
         SELECT walmirror.mirror('t', key => 'user:{id}'), walmirror.mirror('admins', key => 'user:admin:{id}')",
        "INSERT INTO admins VALUES (1)",
        "INSERT INTO t VALUES ('admin:1'), ('x')",
        "user:admin:1\"",
        &["user:admin:1", "user:x"],
    );
}

#[test]
fn a_value_that_cannot_be_encoded() {
    stops_until_somebody_says_skip(
        "CREATE TABLE t (id int PRIMARY KEY, doc json); SELECT walmirror.mirror('t', value => 'json')",
        "INSERT INTO t VALUES (1, '{}')",
        r#"INSERT INTO t VALUES (2, '{"a": "\u0000"}'), (3, '{}')"#,
        "t:2\"",
        &["t:1", "t:3"],
    );
}

/// A backfill meets it.
#[test]
fn a_row_that_was_there_before() {
    let m = mirror(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'x'), (2, repeat('x', 1048577)); \
         SELECT walmirror.mirror('t')",
        &[],
    );
    for _ in 0..2 {
        let (error, next) = ended(&m, 3);
        assert!(
            error.contains("the row with the key \"t:2\" of the table public.t"),
            "{error}"
        );
        assert!(next.contains("next: walmirror run --on-bad-row skip"), "{next}");
        m.start_with(&STOP);
    }
    m.sink(|sink| sink.wait(DEADLINE));
    // Mended, it is in nobody's way.
    m.sql("UPDATE t SET v = 'x' WHERE id = 2");
    m.start_with(&STOP);
    m.settle();
}

/// Redis has applied the rest of the batch by the time it tells: the sink ends, and the next start reads the row again and replaces the key.
#[test]
fn a_key_of_another_type_is_replaced_at_the_next_start() {
    let m = mirror(
        "CREATE TABLE t (id int PRIMARY KEY, v text); SELECT walmirror.mirror('t')",
        &[],
    );
    // A backfill replaces what it finds.
    m.filled();
    m.sql("INSERT INTO t VALUES (1, 'x')");
    m.sync();
    let _: String = m.redis.command("SET t:5 foreign");
    let before = m.db.lsn();
    m.sql("INSERT INTO t SELECT i, 'v' FROM generate_series(2, 10) i");
    let behind = m.db.lsn();
    let (error, next) = ended(&m, 4);
    for sign in ["the key \"t:5\" of the table public.t", "WRONGTYPE"] {
        assert!(error.contains(sign), "{sign}: {error}");
    }
    let at = lsn(&error);
    assert!(
        before <= at && at <= behind,
        "{at} is not in {before} to {behind}"
    );
    assert!(
        next.contains("TYPE t:5") && next.contains("replaces it"),
        "{next}"
    );
    // Until then nobody has touched it.
    assert_eq!(m.redis.get("t:5").as_deref(), Some("foreign"));
    m.sink(Sink::restart);
    m.settle();
    assert_eq!(m.redis.keys().len(), 10);
    assert_eq!(m.redis.hash("t:5")[1], ("v".into(), "v".into()));
    assert_eq!(m.notes(), 0);
}

/// That is no fault: the row has no key, and is only counted.
#[test]
fn a_null_in_the_key_is_only_counted() {
    let address = free_address();
    let m = mirror(
        "CREATE TABLE t (id int PRIMARY KEY, nick text UNIQUE); ALTER TABLE t REPLICA IDENTITY FULL; \
         INSERT INTO t VALUES (1, 'a'), (2, NULL), (3, NULL); SELECT walmirror.mirror('t', key => 'nick:{nick}')",
        &["--admin", &address],
    );
    m.filled();
    let counted = || figure(&address, "walmirror_rows_without_key_total");
    // A backfill that began anew may have read them twice.
    let read = counted().unwrap();
    assert!(read >= 2.0, "{read}");
    m.sql("INSERT INTO t VALUES (4, NULL); UPDATE t SET nick = NULL WHERE id = 1");
    m.sql("INSERT INTO t VALUES (5, NULL), (6, 'b')");
    m.sync();
    assert_eq!(m.redis.keys(), ["nick:b"]);
    wait_for(DEADLINE, "three more to be counted", || {
        (counted()? == read + 3.0).then_some(())
    });
    for name in ["walmirror_rejected_total", "walmirror_errors_total"] {
        assert_eq!(figure(&address, name), Some(0.0), "{name}");
    }
    assert_eq!(m.notes(), 0);
    m.settle();
}
