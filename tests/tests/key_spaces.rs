//! The key spaces of templates: whose a key is that two of them could make, and what a sweep leaves alone.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use walmirror_tests::{DEADLINE, Db, Mirror, Pg, wait_for};

/// The story: a key that could be of two tables went with the more specific one, or stayed as its row was, and the other table's row was
/// missing, or wrong, until it was written again.
#[test]
fn what_a_more_specific_table_leaves_is_the_other_tables_again() {
    let m = Mirror::with(
        "CREATE TABLE wide (id text PRIMARY KEY, v text); INSERT INTO wide VALUES ('b1', 'w'), ('c1', 'w'); \
         CREATE TABLE cache (id text PRIMARY KEY, v text); \
         SELECT walmirror.mirror('wide', key => 'x:{id}'), walmirror.cache('cache', key => 'y:{id}')",
    );
    m.settle();
    let left = [
        "SELECT walmirror.unmirror('narrow'), walmirror.unmirror('other')",
        "SELECT walmirror.mirror('narrow', key => 'n:{id}'), walmirror.mirror('other', key => 'o:{id}')",
        "DROP TABLE narrow, other",
    ];
    for leave in left {
        m.sql(
            "CREATE TABLE IF NOT EXISTS narrow (id int PRIMARY KEY, v text); CREATE TABLE IF NOT EXISTS other (LIKE narrow INCLUDING ALL); \
             INSERT INTO narrow VALUES (1, 'n'), (2, 'n') ON CONFLICT DO NOTHING; INSERT INTO other VALUES (1, 'o') ON CONFLICT DO NOTHING; \
             SELECT walmirror.mirror('narrow', key => 'x:b{id}'), walmirror.mirror('other', key => 'y:b{id}')",
        );
        wait_for(DEADLINE, "the more specific ones", || {
            let keys = m.redis.keys();
            ["x:b1", "x:b2", "y:b1"]
                .iter()
                .all(|key| keys.contains(&(*key).to_owned()))
                .then_some(())
        });
        m.sql(leave);
        m.settle();
    }
    assert_eq!(m.redis.keys(), ["x:b1", "x:c1"]);
}

/// A key that the other table had written goes when it is taken, whatever the table that takes it has, and whatever becomes of the row then.
#[test]
fn what_a_more_specific_table_takes_holds_no_row_of_the_other() {
    let m = Mirror::with(
        "CREATE TABLE wide (id text PRIMARY KEY, v text, doc text); ALTER TABLE wide ALTER doc SET STORAGE EXTERNAL; \
         INSERT INTO wide VALUES ('a:1', 'w', repeat('x', 9000)), ('b', 'w', repeat('x', 9000)); \
         CREATE TABLE narrow (id int PRIMARY KEY, v text); INSERT INTO narrow VALUES (2, 'n'); \
         SELECT walmirror.mirror('wide', key => 'x:{id}')",
    );
    m.settle();
    for (label, keys) in [
        ("mirror('narrow', key => 'x:a:{id}')", &["x:a:2", "x:b"][..]),
        ("cache('narrow', key => 'x:a:{id}')", &["x:b"]),
        (
            "mirror('narrow', key => 'x:a:{id}', value => 'json')",
            &["x:a:2", "x:b"],
        ),
    ] {
        assert_eq!(m.redis.keys(), ["x:a:1", "x:b"], "{label}");
        m.sql(&format!(
            "UPDATE wide SET v = 'before'; SELECT walmirror.{label}; UPDATE wide SET v = 'after'"
        ));
        wait_for(DEADLINE, "what was taken", || {
            (m.redis.keys() == keys).then_some(())
        });
        // The large column is left alone, and the row moves away and back.
        m.sql("UPDATE wide SET id = 'c' WHERE id = 'a:1'; UPDATE wide SET v = 'c' WHERE id = 'c'");
        m.settle();
        m.sql("UPDATE wide SET id = 'a:1' WHERE id = 'c'; UPDATE wide SET v = 'again'; UPDATE narrow SET v = v || 'n'");
        m.sync();
        assert_eq!(m.redis.keys(), keys, "{label}");
        m.sql("BEGIN; TRUNCATE wide; INSERT INTO wide VALUES ('a:1', 'w', repeat('y', 9000)), ('b', 'w', repeat('y', 9000)); COMMIT");
        m.sync();
        assert_eq!(m.redis.keys(), keys, "{label}");
        m.sql("SELECT walmirror.unmirror('narrow')");
        m.settle();
    }
}

/// The story: keys that a cache was told to leave behind were its own again when it got their template back, and as old as they were.
#[test]
fn kept_keys_are_not_taken_for_those_of_a_cache() {
    let m = Mirror::with(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a'); \
         SELECT walmirror.cache('t', key => 'x:{id}', on_write => 'populate')",
    );
    m.sync();
    m.outlast_announced();
    m.sql("UPDATE t SET v = 'kept'");
    m.sync();
    m.sql("SELECT walmirror.unmirror('t', keep_keys => true)");
    m.sync();
    assert_eq!(m.redis.keys(), ["x:1"]);
    m.sql("UPDATE t SET v = 'new'; SELECT walmirror.cache('t', key => 'y:{id}')");
    m.sync();
    assert_eq!(m.redis.keys(), ["x:1"]);
    m.sql("SELECT walmirror.cache('t', key => 'x:{id}')");
    m.sync();
    assert_eq!(m.redis.keys(), Vec::<String>::new());
}

/// A key of one table is never taken for one without a row of another, although its template could have made it.
#[test]
fn templates_that_begin_alike_leave_each_other_alone() {
    let m = Mirror::with(
        "CREATE TABLE users (id text PRIMARY KEY, n int); CREATE TABLE profiles (id text PRIMARY KEY, n int); \
         CREATE TABLE orders (id text, line int, n int, PRIMARY KEY (id, line)); \
         SELECT walmirror.mirror('users', key => 'user:{id}'), walmirror.mirror('profiles', key => 'user:{id}:profile'), \
           walmirror.mirror('orders', key => 'user:{id}:order:{line}', value => 'json')",
    );
    for statement in [
        "INSERT INTO users SELECT i, i FROM generate_series(1, 20) i; INSERT INTO profiles SELECT i, i FROM generate_series(1, 30) i; \
             INSERT INTO orders SELECT i, 5, i FROM generate_series(1, 30) i",
        "ALTER TABLE users ADD v int DEFAULT 4",
        "ALTER TABLE profiles ADD v int DEFAULT 4",
        "ALTER TABLE orders ADD v int DEFAULT 4",
        "TRUNCATE users",
        "INSERT INTO users SELECT i, i FROM generate_series(1, 20) i",
        "TRUNCATE profiles",
        "SELECT walmirror.unmirror('users')",
    ] {
        m.sql(statement);
        m.settle();
        m.check();
    }
}

/// What stands between the columns may stand in their values too: then a key can be read in several ways, and one of them is its row.
/// And a key column may have a type whose operators are somewhere else, or one that refuses what a foreign key holds.
/// Text of such a database is bytes, and its keys too.
#[test]
fn keys_of_any_bytes_are_left_alone_by_a_sweep() {
    let m = Mirror::of(Db::create_with(Pg::shared(), "ENCODING 'SQL_ASCII' LOCALE 'C'"));
    m.sql(
        "CREATE TABLE t (id text PRIMARY KEY, v text); INSERT INTO t SELECT 'k' || chr(i), 'v' FROM generate_series(100, 255) i; \
         SELECT walmirror.mirror('t')",
    );
    let size = || m.redis.command::<u64>("DBSIZE");
    let _: String = m.redis.command("SET something 1");
    m.start();
    let filled = || {
        let cursors: Vec<String> = m
            .redis
            .command(&format!("HVALS walmirror:{{{}}}:progress", m.db.name));
        cursors
            .iter()
            .any(|cursor| cursor.contains("\"stage\":\"done\""))
            .then_some(())
    };
    wait_for(DEADLINE, "the keys to be complete", filled);
    let before = size();
    assert!(before > 156, "{before}");
    m.sql("DELETE FROM t WHERE id = 'k' || chr(233)");
    m.sync();
    assert_eq!(size(), before - 1);
    // One that has to be read again, and one that has no row.
    m.sql("UPDATE t SET v = repeat('long', 10000) WHERE id = 'k' || chr(234)");
    m.sync();
    let change = |script: &str| {
        let done: i64 = redis::cmd("EVAL")
            .arg(script)
            .arg(0)
            .query(&mut m.redis.connect())
            .unwrap();
        assert_eq!(done, 1);
    };
    change("return redis.call('DEL', 't:k\\234')");
    change("redis.call('HSET', 't:k\\233', 'v', 'w') return 1");
    m.sql("ALTER TABLE t ALTER v SET STORAGE EXTERNAL; UPDATE t SET id = id WHERE id = 'k' || chr(234)");
    m.sync();
    let (code, output) = m.run(&["verify", "--repair"]);
    assert_eq!(code, Some(0), "{output}");
    let (code, output) = m.run(&["verify"]);
    assert_eq!(code, Some(0), "{output}");
    assert_eq!(size(), before - 1);
}

#[test]
fn a_sweep_leaves_the_keys_of_rows_alone() {
    let m = Mirror::with(
        "CREATE TABLE stats (day date, id int, n int, PRIMARY KEY (day, id)); \
         CREATE DOMAIN positive AS int CHECK (VALUE > 0); CREATE TABLE checked (id positive PRIMARY KEY, n int); \
         SELECT walmirror.mirror('stats', key => 'stats-{day}-{id}'), walmirror.mirror('checked')",
    );
    m.sql(
        "INSERT INTO stats SELECT '2024-01-01'::date + i, -i, i FROM generate_series(1, 40) i; \
         INSERT INTO checked SELECT i, i FROM generate_series(1, 40) i",
    );
    let has_ltree = m.db.connect().batch_execute("CREATE EXTENSION ltree").is_ok();
    if has_ltree {
        m.sql(
            "CREATE TABLE tree (path ltree PRIMARY KEY, n int); SELECT walmirror.mirror('tree'); \
             INSERT INTO tree SELECT ('top.n' || i)::ltree, i FROM generate_series(1, 40) i",
        );
    } else {
        println!("not on this server: ltree");
    }
    m.settle();
    m.check();
    let _: String = m.redis.command("SET checked:-5 foreign");
    let _: String = m.redis.command("SET stats-2024-01-02-7-8 foreign");
    m.sql("ALTER TABLE stats ADD v int DEFAULT 4; ALTER TABLE checked ADD v int DEFAULT 4");
    if has_ltree {
        m.sql("ALTER TABLE tree ADD v int DEFAULT 4");
    }
    m.settle();
    m.check();
}
