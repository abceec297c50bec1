//! Neither SECURITY LABEL nor ALTER TYPE waits for who is writing to the table, and what such a writer has done until then is not in the
//! stream, or as it was before. Both left a stale key in a cache until the row was written again: a SELECT between label and COMMIT had
//! brought the row of before, or the COMMIT had brought what the row was under the old type. Each test has a server of its own, because a
//! transaction of any database that is in progress keeps rows from being captured.

use std::collections::BTreeSet;

use walmirror_tests::{DEADLINE, Mirror, Sink, wait_for};

use crate::{apply, keys, session, start, sync};

/// The value of a field of a hash.
fn field(m: &Mirror, key: &str, field: &str) -> Option<String> {
    let mut fields = m.redis.hash(key).into_iter();
    fields.find(|(name, _)| name == field).map(|(_, value)| value)
}

#[test]
fn a_row_that_is_being_written_when_its_table_is_labelled_is_not_captured_as_it_was() {
    let m = Mirror::alone("");
    m.sql(
        "CREATE TABLE c (id int PRIMARY KEY, v text); INSERT INTO c VALUES (1, 'old'), (2, 'old'); \
         CREATE TABLE w (id int PRIMARY KEY, v text); INSERT INTO w VALUES (1, 'old'), (2, 'old')",
    );
    start(&m);
    m.sync();
    let mut writer = m.db.connect();
    writer
        .batch_execute("BEGIN; UPDATE c SET v = 'new' WHERE id = 1; UPDATE w SET v = 'new' WHERE id = 1")
        .unwrap();
    m.sql("SELECT walmirror.cache('c'), walmirror.mirror('w', ttl => '10 min', capture => true)");
    apply(&m);
    let mut s = session(&m);
    s.batch_execute("SELECT * FROM c; SELECT * FROM w").unwrap();
    apply(&m);
    assert_eq!(keys(&m), BTreeSet::new(), "who was writing is not over");
    writer.batch_execute("COMMIT").unwrap();
    sync(&m);
    assert_eq!(field(&m, "c:1", "v"), None);
    s.batch_execute("SELECT * FROM c").unwrap();
    sync(&m);
    wait_for(DEADLINE, "the mirror to be read", || {
        field(&m, "w:1", "v").map(drop)
    });
    for (key, value) in [("c:1", "new"), ("c:2", "old"), ("w:1", "new"), ("w:2", "old")] {
        assert_eq!(field(&m, key, "v").as_deref(), Some(value), "{key}");
    }
}

#[test]
fn a_row_that_is_being_written_when_its_type_changes_does_not_come_back_as_it_was() {
    for restarts in [false, true] {
        let m = Mirror::alone("");
        m.sql(
            "CREATE TYPE er AS ENUM ('a', 'b'); CREATE TYPE pair AS (x int, y int); \
             CREATE TABLE c (id int PRIMARY KEY, v er, n int); INSERT INTO c VALUES (1, 'a', 0), (2, 'a', 0); \
             CREATE TABLE d (id int PRIMARY KEY, p pair, n int); INSERT INTO d VALUES (1, (1, 2), 0); \
             SELECT walmirror.cache('c'), walmirror.cache('d', value => 'json', on_write => 'populate')",
        );
        start(&m);
        let mut writer = m.db.connect();
        writer
            .batch_execute("BEGIN; UPDATE c SET n = 1 WHERE id = 1; UPDATE d SET n = 1")
            .unwrap();
        m.sql("ALTER TYPE er RENAME VALUE 'a' TO 'renamed'; ALTER TYPE pair RENAME ATTRIBUTE x TO z");
        apply(&m);
        let mut s = session(&m);
        s.batch_execute("SELECT * FROM c; SELECT * FROM d").unwrap();
        apply(&m);
        if restarts {
            m.sink(Sink::kill);
            m.sink(Sink::restart);
        }
        writer.batch_execute("COMMIT").unwrap();
        sync(&m);
        assert_eq!(field(&m, "c:1", "v"), None);
        assert_eq!(m.redis.get("d:1"), None);
        s.batch_execute("SELECT * FROM c; SELECT * FROM d").unwrap();
        sync(&m);
        for (key, n) in [("c:1", "1"), ("c:2", "0")] {
            assert_eq!(field(&m, key, "v").as_deref(), Some("renamed"), "{key}");
            assert_eq!(field(&m, key, "n").as_deref(), Some(n), "{key}");
        }
        let row = m.db.value("SELECT to_jsonb(d)::text FROM d");
        assert_eq!(m.redis.get("d:1"), Some(row));
        // Whoever writes from here on refreshes.
        m.sql("UPDATE c SET n = 2");
        sync(&m);
        assert_eq!(field(&m, "c:1", "n").as_deref(), Some("2"));
    }
}
