//! What writes, schema changes and expiry then do to the keys that SELECTs filled.

use std::collections::BTreeSet;

use walmirror_tests::{DEADLINE, Mirror, wait_for};

use crate::{c_keys, empty, keys, session, setup, start, sync};

#[test]
fn writes_refresh_populate_or_invalidate() {
    let m = Mirror::new();
    for mode in ["refresh", "populate", "invalidate"] {
        m.sql(&format!(
            "CREATE TABLE {mode} (id int PRIMARY KEY, v text); INSERT INTO {mode} SELECT i, 'old' FROM generate_series(1, 9) i; \
             SELECT walmirror.cache('{mode}', on_write => '{mode}')"
        ));
    }
    start(&m);
    let mut s = session(&m);
    for mode in ["refresh", "populate", "invalidate"] {
        s.batch_execute(&format!("SELECT * FROM {mode} WHERE id = 1"))
            .unwrap();
        s.batch_execute(&format!(
            "UPDATE {mode} SET v = 'new' WHERE id <= 2; INSERT INTO {mode} VALUES (20, 'in')"
        ))
        .unwrap();
        s.batch_execute(&format!("SELECT * FROM {mode} WHERE id = 3"))
            .unwrap();
        s.batch_execute(&format!("DELETE FROM {mode} WHERE id = 3"))
            .unwrap();
    }
    sync(&m);
    let value = |key: &str| {
        m.redis
            .hash(key)
            .into_iter()
            .find(|(field, _)| field == "v")
            .map(|(_, value)| value)
    };
    assert_eq!(
        keys(&m),
        ["refresh:1", "populate:1", "populate:2", "populate:20"]
            .map(str::to_owned)
            .into_iter()
            .collect::<BTreeSet<_>>()
    );
    assert_eq!(value("refresh:1").as_deref(), Some("new"));
    assert_eq!(value("populate:1").as_deref(), Some("new"));
    assert_eq!(value("populate:20").as_deref(), Some("in"));
}

#[test]
fn a_changed_key_and_an_unchanged_large_column_follow_in_a_cache_too() {
    let m = Mirror::new();
    for value in ["hash", "json"] {
        m.sql(&format!(
            "CREATE TABLE t_{value} (id int PRIMARY KEY, n int, doc text); ALTER TABLE t_{value} ALTER doc SET STORAGE EXTERNAL; \
             INSERT INTO t_{value} SELECT i, 0, repeat(md5(i::text), 200) FROM generate_series(1, 4) i; \
             SELECT walmirror.cache('t_{value}', value => '{value}')"
        ));
    }
    start(&m);
    let mut s = session(&m);
    for value in ["hash", "json"] {
        s.batch_execute(&format!("SELECT n FROM t_{value} WHERE id IN (1, 2)"))
            .unwrap();
        s.batch_execute(&format!("UPDATE t_{value} SET n = 5")).unwrap();
        s.batch_execute(&format!("UPDATE t_{value} SET id = 10 + id WHERE id = 2"))
            .unwrap();
    }
    sync(&m);
    let found = keys(&m);
    assert!(
        found.contains("t_hash:1") && found.contains("t_json:1"),
        "{found:?}"
    );
    assert!(
        !found.contains("t_hash:2") && !found.contains("t_json:2"),
        "{found:?}"
    );
    assert!(
        !found.iter().any(|key| key.ends_with(":3") || key.ends_with(":4")),
        "{found:?}"
    );
    for key in found {
        let (table, id) = key.split_once(':').unwrap();
        if table == "t_json" {
            let expected =
                m.db.value(&format!("SELECT to_jsonb(t)::text FROM t_json t WHERE id = {id}"));
            assert_eq!(m.redis.get(&key).unwrap(), expected, "{key}");
        } else {
            let doc = m.db.value(&format!("SELECT doc FROM t_hash WHERE id = {id}"));
            let hash = m.redis.hash(&key);
            assert!(
                hash.contains(&("doc".to_owned(), doc)) && hash.contains(&("n".to_owned(), "5".to_owned())),
                "{key}"
            );
        }
    }
}

/// Its row counts as captured for as long as its key lives, however long the interval is.
#[test]
fn an_expired_key_comes_back_when_it_is_read() {
    let m = Mirror::new();
    m.sql(
        "CREATE TABLE c (id int PRIMARY KEY, v text); INSERT INTO c VALUES (1, 'x'), (2, 'y'); \
         SELECT walmirror.cache('c', ttl => '500 ms'); \
         CREATE TABLE w (id int PRIMARY KEY, v text); INSERT INTO w VALUES (1, 'x'); \
         SELECT walmirror.mirror('w', ttl => '500 ms', capture => true)",
    );
    start(&m);
    let mut s = m.db.connect();
    s.batch_execute("SET walmirror.capture_interval = '1 h'").unwrap();
    for (table, key) in [("c", "c:1"), ("w", "w:1")] {
        for round in 0..3 {
            wait_for(DEADLINE, format!("{key} in round {round}"), || {
                s.batch_execute(&format!("SELECT v FROM {table} WHERE id = 1 AND v <> ''"))
                    .unwrap();
                let left: i64 = m.redis.command(&format!("PTTL {key}"));
                assert!(left <= 500 && left != -1, "{key}: {left} ms");
                (left > 0).then_some(())
            });
            wait_for(DEADLINE, format!("{key} to expire"), || {
                (!m.redis.keys().contains(&key.to_owned())).then_some(())
            });
        }
    }
}

#[test]
fn ddl_on_a_cached_table_removes_its_keys_and_old_captures_do_not_return() {
    let m = Mirror::new();
    setup(&m);
    m.sql("DROP VIEW c_view");
    start(&m);
    let mut s = session(&m);
    for (ddl, fields) in [
        ("ALTER TABLE c ADD COLUMN extra int DEFAULT 7", 5),
        ("ALTER TABLE c DROP COLUMN extra", 4),
        ("ALTER TABLE c ALTER COLUMN v TYPE varchar USING v || '!'", 4),
        ("SELECT walmirror.cache('c', columns => '{id,v}')", 2),
    ] {
        s.batch_execute("SELECT v FROM c WHERE grp = 1").unwrap();
        sync(&m);
        assert_eq!(keys(&m).len(), 6, "before {ddl}");
        s.batch_execute(ddl).unwrap();
        sync(&m);
        assert_eq!(keys(&m), BTreeSet::new(), "{ddl}");
        s.batch_execute("SELECT v FROM c WHERE id = 1").unwrap();
        sync(&m);
        assert_eq!(m.redis.hash("c:1").len(), fields, "{ddl}");
    }
    s.batch_execute("TRUNCATE c").unwrap();
    sync(&m);
    assert_eq!(keys(&m), BTreeSet::new());
    s.batch_execute("INSERT INTO c (id, v) VALUES (1, 'x')").unwrap();
    s.batch_execute("SELECT * FROM c WHERE id = 1").unwrap();
    sync(&m);
    assert_eq!(keys(&m), c_keys([1]));
    s.batch_execute("SELECT walmirror.unmirror('c')").unwrap();
    sync(&m);
    assert_eq!(keys(&m), BTreeSet::new());
}

/// How long ago a row was captured was told by when the client's statement began, and for a procedure that is long ago for ever.
#[test]
fn a_statement_that_runs_for_long_captures_a_row_again() {
    let m = Mirror::new();
    setup(&m);
    start(&m);
    let mut s = m.db.connect();
    let procedure = "SET walmirror.capture_interval = '500ms'; \
         DO $$ BEGIN PERFORM v FROM c WHERE id = 1; PERFORM pg_sleep(8); PERFORM v FROM c WHERE id = 1; END $$";
    let running = std::thread::spawn(move || s.batch_execute(procedure));
    let is_there = || (keys(&m) == c_keys([1])).then_some(());
    wait_for(DEADLINE, "the row", is_there);
    assert!(!running.is_finished());
    empty(&m);
    wait_for(DEADLINE, "the row again", is_there);
    running.join().unwrap().unwrap();
}
