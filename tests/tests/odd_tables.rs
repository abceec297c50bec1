//! Tables, keys and settings that are not like others: no row of them is lost, no key of a row is removed, and one of them that
//! cannot be read holds up neither the others nor the sink.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use walmirror_tests::{DEADLINE, Mirror, Signal, Sink, skipped, wait_for};

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
    m.complete(4);
    m.verified();
    // Whoever compares here takes the settings of the database as they come.
    m.sql(&format!("ALTER DATABASE {} RESET ALL", m.db.name));
    m.check();
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
    m.complete(2);
    m.check();
    m.verified();
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

/// The story: under such a collation nothing can be searched for, and what Postgres said of that was taken for keys without rows: they went.
#[test]
fn such_keys_stay_whatever_the_collation_of_their_columns() {
    let m = Mirror::new();
    let collation =
        "CREATE COLLATION any_case (provider = icu, locale = 'und-u-ks-level2', deterministic = false)";
    if m.db.connect().batch_execute(collation).is_err() {
        return skipped("this server has no ICU");
    }
    m.sql(
        "CREATE TABLE slugs (a text COLLATE any_case, b text COLLATE any_case, c text, doc text, PRIMARY KEY (a, b, c)); \
         ALTER TABLE slugs ALTER doc SET STORAGE EXTERNAL; \
         INSERT INTO slugs SELECT repeat('A-', 9) || i, '%:' || repeat('-b', 9), 'c-' || i, repeat('x', 9000) FROM generate_series(1, 20) i; \
         SELECT walmirror.mirror('slugs', key => 'slugs:{a}-{b}-{c}')",
    );
    let junk = "slugs:a-b-c-d-e-f-g-h-i-j-k-l-m-n-o-p-q-r";
    let _: String = m.redis.command(&format!("SET {junk} foreign"));
    m.start();
    m.complete(1);
    m.check();
    let key = m.redis.keys().swap_remove(0);
    let _: i64 = m.redis.command(&format!("DEL {key}"));
    m.sql("UPDATE slugs SET doc = doc");
    m.settle();
    m.verified();
}

/// Enums have one operator for all of them, and input functions raise whatever they like.
#[test]
fn junk_keys_of_any_type_are_removed_and_stop_nothing() {
    let m = Mirror::new();
    m.sql(
        "CREATE TYPE mood AS ENUM ('sad', 'happy'); CREATE DOMAIN denum AS mood; CREATE TABLE de (k denum PRIMARY KEY, n int); \
         CREATE TABLE jk (k jsonb PRIMARY KEY, n int); CREATE TABLE fk (k regproc PRIMARY KEY, n int); \
         CREATE TABLE z41 (k regclass PRIMARY KEY, n int); \
         INSERT INTO de VALUES ('sad', 1); INSERT INTO jk VALUES ('[1]', 1); INSERT INTO fk VALUES ('now', 1); \
         INSERT INTO z41 VALUES ('pg_class', 1); \
         SELECT walmirror.mirror('de'), walmirror.mirror('jk'), walmirror.mirror('fk'), walmirror.mirror('z41')",
    );
    let deep = format!("jk:{}", "[".repeat(20_000));
    for key in ["de:nobody", &deep, "fk:nosuch", "z41:nosuch"] {
        let _: String = m.redis.command(&format!("SET {key} junk"));
    }
    m.start();
    m.complete(4);
    m.check();
    for key in ["de:nobody", &deep, "fk:nosuch", "z41:nosuch"] {
        let _: String = m.redis.command(&format!("SET {key} junk"));
    }
    let (code, output) = m.run(&["verify"]);
    assert_eq!(code, Some(1), "{output}");
    let (code, output) = m.run(&["verify", "--repair"]);
    assert_eq!(code, Some(0), "{output}");
    m.check();
}

/// The story: what Postgres had no room for ended the session, again and again, and the stream with it.
#[test]
fn a_table_that_takes_more_locks_than_there_are_holds_up_no_other() {
    let m = Mirror::alone(
        "max_locks_per_transaction = 10\nmax_connections = 40\nmax_prepared_transactions = 0\nmax_wal_senders = 5",
    );
    m.sql("CREATE TABLE p (id int PRIMARY KEY, n int) PARTITION BY LIST (id); CREATE INDEX ON p (n); CREATE INDEX ON p (n, id); \
         CREATE INDEX ON p (id, n); CREATE TABLE z (id int PRIMARY KEY)");
    for first in (0..500).step_by(50) {
        m.sql(&format!(
            "DO $$ BEGIN FOR i IN {first}..{first} + 49 LOOP EXECUTE format('CREATE TABLE p%s PARTITION OF p FOR VALUES IN (%s)', i, i); \
             END LOOP; END $$"
        ));
    }
    m.sql("INSERT INTO p7 VALUES (7); INSERT INTO z VALUES (1); SELECT walmirror.mirror('p'), walmirror.mirror('z')");
    let _: String = m.redis.command("SET p:nobody junk");
    m.start();
    let log = || m.sink(|sink| sink.output());
    wait_for(DEADLINE, "the table to be told of", || {
        m.sink(Sink::assert_running);
        log().contains("53200").then_some(())
    });
    m.sql("INSERT INTO z VALUES (2)");
    wait_for(DEADLINE, "the other table", || {
        let keys = m.redis.keys();
        ["z:1", "z:2"]
            .iter()
            .all(|key| keys.iter().any(|other| other == key))
            .then_some(())
    });
    assert_eq!(log().matches("streaming slot=").count(), 1, "{}", log());
}

/// Tools that compact a table swap its file for that of a copy, and no WAL says so. The story: who read rows again took his snapshot, waited
/// for the swap, and then looked into the new file, where all rows were of a transaction that he did not see: they were taken for deleted.
#[test]
fn a_file_that_is_swapped_while_rows_are_read_again() {
    let m = Mirror::alone("");
    m.sql(
        "CREATE TABLE t (id int PRIMARY KEY, n int, doc text); ALTER TABLE t ALTER doc SET STORAGE EXTERNAL; \
         INSERT INTO t SELECT i, 0, repeat('x', 9000) FROM generate_series(1, 100) i; \
         CREATE TABLE twin (LIKE t INCLUDING ALL); SELECT walmirror.mirror('t')",
    );
    m.start();
    m.complete(1);
    for id in 1..=100 {
        let _: i64 = m.redis.command(&format!("DEL t:{id}"));
    }
    m.sink(|sink| sink.signal(Signal::STOP));
    m.sql("UPDATE t SET n = 1");
    let mut tool = m.db.connect();
    tool.batch_execute(
        "BEGIN; LOCK TABLE t; INSERT INTO twin SELECT * FROM t; \
         UPDATE pg_class a SET relfilenode = b.relfilenode, reltoastrelid = b.reltoastrelid FROM pg_class b \
         WHERE (a.oid, b.oid) IN (('t'::regclass, 'twin'::regclass), ('twin'::regclass, 't'::regclass), \
            ('t_pkey'::regclass, 'twin_pkey'::regclass), ('twin_pkey'::regclass, 't_pkey'::regclass))",
    )
    .unwrap();
    m.sink(|sink| sink.signal(Signal::CONT));
    wait_for(DEADLINE, "somebody to wait for the table", || {
        let waits = "SELECT count(*) FROM pg_locks WHERE relation = 't'::regclass AND NOT granted";
        (m.db.value(waits) != "0").then_some(())
    });
    tool.batch_execute("COMMIT").unwrap();
    m.settle();
}

/// The other one was read instead, and the rest of the first never came.
#[test]
fn partitions_whose_schemas_are_swapped_while_they_are_filled() {
    let m = Mirror::new();
    m.sql(
        "CREATE SCHEMA a; CREATE SCHEMA b; CREATE TABLE t (id int, v text, PRIMARY KEY (id)) PARTITION BY RANGE (id); \
         CREATE TABLE a.p PARTITION OF t FOR VALUES FROM (1) TO (20001); \
         CREATE TABLE b.p PARTITION OF t FOR VALUES FROM (20001) TO (40001); \
         INSERT INTO t SELECT i, repeat('x', 1000) FROM generate_series(1, 40000) i; SELECT walmirror.mirror('t')",
    );
    m.start();
    let progress = format!("walmirror:{{{}}}:progress", m.db.name);
    wait_for(DEADLINE, "the first chunks", || {
        let progress = m.redis.hash(&progress);
        let mut cursors = progress
            .iter()
            .filter(|(field, _)| field.starts_with("backfill:"));
        cursors
            .any(|(_, cursor)| cursor.contains("\"rows\":") && !cursor.contains("\"rows\":0,"))
            .then_some(())
    });
    // What is planned waits for Redis, and the backfill for that.
    let _: String = m.redis.command("CLIENT PAUSE 60000 WRITE");
    m.sql(
        "BEGIN; ALTER SCHEMA a RENAME TO c; ALTER SCHEMA b RENAME TO a; ALTER SCHEMA c RENAME TO b; COMMIT",
    );
    let _: String = m.redis.command("CLIENT UNPAUSE");
    m.complete(1);
    m.verified();
}

/// The key of a row holds what its type prints, whatever somebody casts it to: the sweep removed the keys of all rows.
#[test]
fn a_cast_to_text_that_somebody_wrote_is_no_part_of_a_key() {
    let m = Mirror::new();
    m.sql(
        "CREATE TYPE color AS ENUM ('r', 'g'); \
         CREATE FUNCTION color_text(color) RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT 'no key' $$; \
         CREATE CAST (color AS text) WITH FUNCTION color_text(color); \
         CREATE TABLE paint (c color PRIMARY KEY, n int); INSERT INTO paint VALUES ('r', 1), ('g', 2); \
         SELECT walmirror.mirror('paint')",
    );
    // A key without a row, so that there is something to sweep.
    let _: i64 = m.redis.command("HSET paint:x c x");
    m.start();
    m.complete(1);
    m.verified();
    let mut keys = m.redis.keys();
    keys.retain(|key| key.starts_with("paint:"));
    keys.sort_unstable();
    assert_eq!(keys, ["paint:g", "paint:r"]);
}

/// The story: the rows of keys were looked for by it, so it ran as the sink, and as who typed `walmirror verify`; and the sweep removed
/// the keys of rows that it did not lead to.
#[test]
fn a_cast_from_text_that_somebody_wrote_is_not_what_rows_are_looked_for_by() {
    let m = Mirror::new();
    let cast = |name: &str, kind: &str, value: &str| {
        format!(
            "CREATE FUNCTION {name}(text) RETURNS {kind} LANGUAGE plpgsql AS $$ BEGIN RAISE LOG 'the cast runs'; RETURN {value}; END $$; \
             CREATE CAST (text AS {kind}) WITH FUNCTION {name}(text); "
        )
    };
    m.sql(&format!(
        "CREATE TYPE color AS ENUM ('r', 'g'); {}{} CREATE DOMAIN hue AS color; \
         CREATE TABLE paint (c color, h hue, a color[], n int, PRIMARY KEY (c, h, a)); \
         INSERT INTO paint VALUES ('r', 'g', '{{r,g}}', 1), ('g', 'r', '{{g}}', 2); SELECT walmirror.mirror('paint')",
        cast("color_of", "color", "'r'"),
        cast("colors_of", "color[]", "'{}'"),
    ));
    // A key without a row, so that there is something to sweep.
    let _: i64 = m.redis.command("HSET paint:r:r:{} n 7");
    let logged = m.db.pg.log().len();
    m.start();
    m.complete(1);
    m.verified();
    let mut keys = m.redis.keys();
    keys.retain(|key| key.starts_with("paint:"));
    keys.sort_unstable();
    assert_eq!(keys, ["paint:g:r:{g}", "paint:r:g:{r,g}"]);
    let log = m.db.pg.log().split_off(logged);
    assert!(!log.contains("the cast runs"), "{log}");
}

/// A row of `a`, whose oid this is, and one of `z` are to be read again; waits until that of `z` was.
fn reread_both(m: &Mirror, oid: &str) {
    let _: i64 = m
        .redis
        .command(&format!("HSET walmirror:{{{}}}:pending a:1 {oid}", m.db.name));
    let _: i64 = m.redis.command("DEL z:1");
    m.sql("UPDATE z SET n = 1");
    wait_for(DEADLINE, "the row of the other table", || {
        m.sink(Sink::assert_running);
        m.redis.keys().contains(&"z:1".to_owned()).then_some(())
    });
}

/// The story: the worker waited for the lock, whoever held it and for how long, with all that was to be read of other tables behind it.
#[test]
fn a_locked_table_holds_up_no_other() {
    let m = Mirror::with(
        "CREATE TABLE a (id int PRIMARY KEY, n int, v text); CREATE TABLE z (LIKE a INCLUDING ALL); \
         ALTER TABLE z ALTER v SET STORAGE EXTERNAL; INSERT INTO a VALUES (1, 0, 'x'); INSERT INTO z VALUES (1, 0, repeat('x', 5000)); \
         SELECT walmirror.mirror('a'), walmirror.mirror('z')",
    );
    m.settle();
    let seen = m.sink(|sink| sink.output()).len();
    let oid = m.db.value("SELECT oid FROM pg_class WHERE relname = 'a'");
    let logged = m.db.pg.log().len();
    let mut holder = m.db.connect();
    holder
        .batch_execute("BEGIN; LOCK TABLE a IN ACCESS EXCLUSIVE MODE")
        .unwrap();
    reread_both(&m, &oid);
    let log = || m.sink(|sink| sink.output()).split_off(seen);
    wait_for(DEADLINE, "a line that says who has the lock", || {
        log().contains("the table is locked").then_some(())
    });
    // The story: each attempt left an ERROR line in the server's log, hundreds in an hour.
    let mut looks = std::collections::BTreeSet::new();
    wait_for(DEADLINE, "some looks whether it is free", || {
        let look = "SELECT query_start::text FROM pg_stat_activity WHERE query LIKE '%AccessExclusiveLock%' AND pid <> pg_backend_pid() \
            AND datname = current_database()";
        looks.extend(m.db.rows(look));
        (looks.len() > 3).then_some(())
    });
    let timeout = format!(" {} ERROR:  canceling statement due to lock timeout", m.db.name);
    assert_eq!(m.db.pg.log()[logged..].matches(&timeout).count(), 1);
    holder.batch_execute("COMMIT").unwrap();
    m.settle();
    assert!(log().contains("state idle in transaction"), "{}", log());
    assert!(!log().contains("ERROR") && !log().contains("WARN"), "{}", log());
}

/// The story: what is read of a table whose label is not the one that the stream has announced is dropped, and all that was read of other
/// tables behind it was dropped too, again and again.
#[test]
fn a_table_that_changed_unannounced_holds_up_no_other() {
    let m = Mirror::with(
        "CREATE TABLE a (id int PRIMARY KEY, v text); CREATE TABLE z (id int PRIMARY KEY, n int, v text); \
         ALTER TABLE z ALTER v SET STORAGE EXTERNAL; INSERT INTO a VALUES (1, 'x'); INSERT INTO z VALUES (1, 0, repeat('x', 5000)); \
         SELECT walmirror.mirror('a'), walmirror.mirror('z')",
    );
    m.settle();
    let oid = m.db.value("SELECT oid FROM pg_class WHERE relname = 'a'");
    m.sql(
        "ALTER EVENT TRIGGER walmirror_ddl_command_end DISABLE; ALTER TABLE a RENAME v TO w; \
         ALTER EVENT TRIGGER walmirror_ddl_command_end ENABLE ALWAYS",
    );
    reread_both(&m, &oid);
    // A row of the table tells of the change.
    m.sql("UPDATE a SET w = 'y'");
    m.settle();
}
