//! Tables, keys and settings that are not like others: no row of them is lost, no key of a row is removed, and one of them that
//! cannot be read holds up neither the others nor the sink.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use walmirror_tests::{DEADLINE, Mirror, wait_for};

/// Waits until so many tables are filled and swept.
#[track_caller]
fn complete(m: &Mirror, tables: usize) {
    wait_for(DEADLINE, "the keys of the tables to be complete", || {
        m.sink(walmirror_tests::Sink::assert_running);
        let log = m.sink(|sink| sink.output());
        (log.matches("the keys of the table are complete").count() >= tables).then_some(())
    });
}

#[track_caller]
fn assert_equal(m: &Mirror) {
    let (code, output) = m.run(&["verify"]);
    assert_eq!(code, Some(0), "{output}");
}

/// What a database sets for its sessions must not change how the sink asks for rows, nor in which order it gets them.
#[test]
fn settings_of_the_database_lose_no_rows_and_remove_no_keys() {
    let m = Mirror::new();
    m.sql(
        "CREATE TABLE a (k text[] PRIMARY KEY, n int); CREATE TABLE r (k regclass PRIMARY KEY, n int); \
         CREATE TABLE c (k money PRIMARY KEY, n int); CREATE TABLE large (id int PRIMARY KEY, v text); \
         ALTER TABLE large ALTER v SET STORAGE EXTERNAL; ALTER TABLE large SET (parallel_workers = 2); \
         INSERT INTO a VALUES ('{a,NULL}', 1); INSERT INTO r VALUES ('pg_class', 1); INSERT INTO c VALUES (1234.5, 1); \
         INSERT INTO large SELECT i, repeat(md5(i::text), 600) FROM generate_series(1, 3000) i; \
         SELECT walmirror.mirror('a'), walmirror.mirror('r'), walmirror.mirror('c'), walmirror.mirror('large')",
    );
    for setting in [
        "array_nulls = off",
        "quote_all_identifiers = on",
        "parallel_setup_cost = 0",
        "parallel_tuple_cost = 0",
        "min_parallel_table_scan_size = 0",
        "enable_tidscan = off",
    ] {
        m.sql(&format!("ALTER DATABASE {} SET {setting}", m.db.name));
    }
    // A key without a row, so that there is something to sweep.
    let _: i64 = m.redis.command("HSET large:junk id junk");
    m.start();
    m.settle();
    complete(&m, 4);
    m.check();
    assert_equal(&m);
}

/// Between four columns that may hold dashes a key can be read in more ways than anybody counts.
#[test]
fn a_key_that_can_be_read_in_very_many_ways_is_found() {
    let m = Mirror::new();
    m.sql(
        "CREATE TABLE u4 (a uuid, b uuid, c uuid, d uuid, n int, PRIMARY KEY (a, b, c, d)); \
         INSERT INTO u4 SELECT md5('a' || i)::uuid, md5('b' || i)::uuid, md5('c' || i)::uuid, md5('d' || i)::uuid, i \
         FROM generate_series(1, 20) i; \
         CREATE TABLE slugs (a text, b text, c text, doc text, PRIMARY KEY (a, b, c)); ALTER TABLE slugs ALTER doc SET STORAGE EXTERNAL; \
         INSERT INTO slugs SELECT repeat('a-', 9) || i, '%:' || repeat('-b', 9), 'c-' || i, repeat('x', 9000) FROM generate_series(1, 20) i; \
         SELECT walmirror.mirror('u4', key => 'u4:{a}-{b}-{c}-{d}'), walmirror.mirror('slugs', key => 'slugs:{a}-{b}-{c}')",
    );
    let _: String = m
        .redis
        .command("SET slugs:a-b-c-d-e-f-g-h-i-j-k-l-m-n-o-p-q-r foreign");
    let _: String = m.redis.command("SET u4:1-2-3-4 foreign");
    m.start();
    complete(&m, 2);
    m.check();
    assert_equal(&m);
    // A row whose key is gone is read again when its large value is left alone, and one that differs is found.
    let key = m
        .redis
        .keys()
        .into_iter()
        .find(|key| key.starts_with("slugs:"))
        .unwrap();
    let _: i64 = m.redis.command(&format!("DEL {key}"));
    m.sql("UPDATE slugs SET doc = doc");
    m.settle();
    for key in m.redis.keys() {
        let _: i64 = m.redis.command(&format!("DEL {key}"));
        if key.starts_with("u4:") {
            break;
        }
    }
    let (code, output) = m.run(&["verify"]);
    assert_eq!(code, Some(1), "{output}");
    let (code, output) = m.run(&["verify", "--repair"]);
    assert_eq!(code, Some(0), "{output}");
    m.settle();
}
