//! The comparison itself: it must find every kind of difference, or all other tests prove nothing.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use walmirror_tests::{Db, Pg, Redis, compare};

#[test]
fn every_kind_of_difference_is_found() {
    let db = Db::create(Pg::shared());
    let redis = Redis::start();
    db.sql(
        "CREATE TABLE h (id int PRIMARY KEY, v text, ok bool); INSERT INTO h VALUES (1, 'x', true), (2, NULL, false); \
         CREATE TABLE j (a text, b int, PRIMARY KEY (a, b)); INSERT INTO j VALUES ('x:y', 1); \
         CREATE TABLE s (id int PRIMARY KEY, v timestamptz); INSERT INTO s VALUES (1, '2026-01-31 12:00+05:45'), (2, NULL); \
         SELECT walmirror.mirror('h'), walmirror.mirror('j', value => 'json'), \
                walmirror.mirror('s', value => 'string', columns => '{v}', ttl => '1 day')",
    );
    let set = |words: &[&str]| {
        let mut command = redis::cmd(words[0]);
        command.arg(&words[1..]).exec(&mut redis.connect()).unwrap();
    };
    let right = || {
        set(&["FLUSHALL"]);
        set(&["HSET", "h:1", "id", "1", "v", "x", "ok", "true"]);
        set(&["HSET", "h:2", "id", "2", "ok", "false"]);
        set(&["SET", "j:x%3Ay:1", r#"{"a": "x:y", "b": 1}"#]);
        set(&["SET", "s:1", "2026-01-31 06:15:00+00", "EX", "1000"]);
        set(&["HSET", "walmirror:{slot}:progress", "lsn", "0/0"]);
    };
    let report = || compare(&mut db.connect(), &mut redis.connect());
    right();
    assert!(report().equal(), "{}", report());
    assert_eq!(report().rows, 5);
    for wrong in [
        &["DEL", "h:1"][..],
        &["HSET", "h:1", "v", "y"],
        &["HSET", "h:1", "extra", "y"],
        &["HDEL", "h:1", "ok"],
        &["HSET", "h:2", "v", ""],
        &["EXPIRE", "h:1", "1000"],
        &["PERSIST", "s:1"],
        &["SET", "s:1", "2026-01-31 06:15:00+00:00", "EX", "1000"],
        &["SET", "s:2", "", "EX", "1000"],
        &["SET", "j:x%3Ay:1", r#"{"b": 1, "a": "x:y"}"#],
        &["RENAME", "j:x%3Ay:1", "j:x:y:1"],
        &["SET", "h:1", "a string"],
        &["SET", "h:3", "no such row"],
        &["SET", "unrelated", "x"],
    ] {
        right();
        set(wrong);
        assert!(!report().equal(), "not found: {wrong:?}");
    }
}
