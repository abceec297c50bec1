//! What is checked when a label is set, and by whose functions: as the catalogs are then, whatever was going on meanwhile.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::sync::Arc;

use postgres::Client;
use walmirror_tests::{DEADLINE, Db, Mirror, Pg, wait_for};

/// Runs statements that have to wait for another session, ends that with COMMIT, and returns what became of them.
fn after(db: &Db, mut other: Client, mut client: Client, statements: &'static str) -> Result<(), String> {
    let waiting = std::thread::spawn(move || client.batch_execute(statements));
    wait_for(DEADLINE, format!("{statements} to wait"), || {
        assert!(!waiting.is_finished(), "{statements} did not wait");
        let waits = db.value(
            "SELECT count(*) FROM pg_locks WHERE NOT granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
        );
        (waits == "1").then_some(())
    });
    other.batch_execute("COMMIT").unwrap();
    let result = waiting.join().unwrap();
    result.map_err(|error| error.as_db_error().unwrap().message().to_owned())
}

/// To parse it took a minute, in which nobody could cancel the statement or stop the server.
#[test]
fn a_key_template_is_not_endless() {
    let db = Db::create(Arc::new(Pg::start("")));
    db.sql("CREATE TABLE t (id int PRIMARY KEY, v text)");
    let mut client = db.connect();
    client.batch_execute("SET statement_timeout = '10 s'").unwrap();
    let columns = "(SELECT string_agg('{c' || i || '}', '') FROM generate_series(1, 200000) i)";
    let error = client
        .batch_execute(&format!(
            "SELECT walmirror.mirror('t', key => 't:{{id}}' || {columns})"
        ))
        .unwrap_err();
    let message = error.as_db_error().unwrap().message();
    assert!(message.ends_with("and 4096 are the most"), "{message}");
    db.sql("SELECT walmirror.mirror('t', key => rpad('t', 4092, 't') || '{id}')");
}

/// Checks once named an operator that pg_catalog does not have, and whoever may create something in a schema of the
/// search_path could make it: their function ran as the superuser who set a label or dropped an index.
#[test]
fn checks_run_no_function_of_the_callers_search_path() {
    let db = Db::create(Arc::new(Pg::start("")));
    db.sql(
        "CREATE ROLE mallory; GRANT CREATE ON SCHEMA public TO mallory; CREATE TABLE t (id int PRIMARY KEY, v text); \
         SET ROLE mallory",
    );
    // The first is found in any path, the others where public comes first.
    for (operator, left, right) in [
        ("<", "oid", "int4"),
        ("<", "oid", "oid"),
        ("=", "oid", "oid"),
        ("=", "name", "name"),
        ("=", "int2", "int2"),
        ("<=", "int8", "int2"),
        ("<>", "\"char\"", "\"char\""),
    ] {
        db.sql(&format!(
            "CREATE OR REPLACE FUNCTION public.evil({left}, {right}) RETURNS bool LANGUAGE plpgsql AS $$ BEGIN RAISE 'hijacked'; END $$; \
             CREATE OPERATOR public.{operator} (LEFTARG = {left}, RIGHTARG = {right}, FUNCTION = public.evil)",
        ));
    }
    let checks = |path: &str| {
        db.sql(&format!("RESET ROLE; SET search_path = {path}"));
        db.sql("SECURITY LABEL FOR walmirror ON TABLE t IS '{\"mode\":\"mirror\",\"key\":\"t:{id}\"}'");
        db.sql("CREATE UNIQUE INDEX t_id ON t (id)");
        db.sql("DROP INDEX CONCURRENTLY t_id");
        db.sql("SELECT walmirror.mirror('t')");
        db.sql("ALTER TABLE t ADD w text");
        db.sql("ALTER TABLE t DROP w");
    };
    checks("public");
    checks("public, pg_catalog");
}

/// The snapshot of the statement is older than what it waited for; that of the transaction is older still.
#[test]
fn a_label_is_checked_as_of_when_it_is_set() {
    let db = Db::create(Pg::shared());
    db.sql("CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE u (id int PRIMARY KEY)");
    let lose_key = |table: &str| {
        let mut other = db.connect();
        other
            .batch_execute(&format!(
                "BEGIN; ALTER TABLE {table} DROP CONSTRAINT {table}_pkey"
            ))
            .unwrap();
        other
    };
    let is_told = |result: Result<(), String>| {
        let message = result.expect_err("a table without a key was mirrored");
        assert!(message.contains("is not unique"), "{message}");
    };
    is_told(after(
        &db,
        lose_key("t"),
        db.connect(),
        "SELECT walmirror.mirror('t', key => 't:{id}')",
    ));
    for command in ["CREATE TEMPORARY TABLE own ()", "SELECT 1"] {
        let mut old = db.connect();
        old.batch_execute(&format!(
            "BEGIN ISOLATION LEVEL REPEATABLE READ; {command}; SELECT count(*) FROM pg_class"
        ))
        .unwrap();
        lose_key("u").batch_execute("COMMIT").unwrap();
        let result = old.batch_execute("SELECT walmirror.mirror('u', key => 'u:{id}')");
        is_told(result.map_err(|error| error.as_db_error().unwrap().message().to_owned()));
        db.sql("ALTER TABLE u ADD PRIMARY KEY (id)");
        old.batch_execute("ROLLBACK; SELECT walmirror.mirror('u')")
            .unwrap();
        db.sql("SELECT walmirror.unmirror('u')");
    }
    assert_eq!(db.value("SELECT count(*) FROM walmirror.mirrors"), "0");
}

/// A transaction whose snapshot is older than what other sessions did to its tables saw both versions of a table that it altered too
/// ("more than one row returned by a subquery"), and no table that was made since.
#[test]
fn ddl_in_a_snapshot_that_is_older_than_that_of_others() {
    let m = Mirror::with(
        "CREATE TYPE pair AS (x int, y text); CREATE TYPE mood AS ENUM ('ok'); CREATE TABLE parent (n int); \
         CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE child (id int PRIMARY KEY, n int); INSERT INTO t VALUES (1, 'v'); \
         INSERT INTO child VALUES (1, 2); SELECT walmirror.mirror('t'), walmirror.mirror('child')",
    );
    let others = "ALTER TABLE t ADD a int DEFAULT 1; ALTER TABLE child INHERIT parent; CREATE TABLE since (id int PRIMARY KEY, p pair, m mood); \
         INSERT INTO since VALUES (1, ROW(1, 'y'), 'ok'); SELECT walmirror.mirror('since', value => 'json')";
    let old: Vec<_> = [
        "ALTER TABLE t ADD b int DEFAULT 2",
        "ALTER TABLE parent ADD inherited int DEFAULT 3",
        "ALTER TYPE pair RENAME ATTRIBUTE x TO z",
        "ALTER TYPE mood RENAME VALUE 'ok' TO 'fine'",
    ]
    .map(|statement| {
        let mut client = m.db.connect();
        let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1";
        client.batch_execute(begin).unwrap();
        (client, statement)
    })
    .into();
    m.sql(others);
    m.settle();
    for (mut client, statement) in old {
        println!("{statement}");
        client.batch_execute(&format!("{statement}; COMMIT")).unwrap();
        m.settle();
    }
}

/// Nor does the DDL of another session see the label that is about to be set: an unlogged partition once came to be mirrored.
#[test]
fn a_label_waits_for_ddl_on_the_partitions() {
    let db = Db::create(Pg::shared());
    db.sql(
        "CREATE TABLE p (id int PRIMARY KEY) PARTITION BY LIST (id); CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1); \
         CREATE TABLE p2 PARTITION OF p FOR VALUES IN (2) PARTITION BY LIST (id); CREATE TABLE p3 PARTITION OF p2 FOR VALUES IN (2)",
    );
    for (partition, statement) in [
        ("p1", "SELECT walmirror.mirror('p')"),
        (
            "p3",
            "SECURITY LABEL FOR walmirror ON TABLE p IS '{\"mode\":\"cache\"}'",
        ),
    ] {
        let mut other = db.connect();
        other
            .batch_execute(&format!("BEGIN; ALTER TABLE {partition} SET UNLOGGED"))
            .unwrap();
        let message = after(&db, other, db.connect(), statement).unwrap_err();
        assert!(
            message.contains(&format!("{partition}\" is unlogged")),
            "{message}"
        );
        db.sql(&format!("ALTER TABLE {partition} SET LOGGED"));
    }
    // DDL that comes later waits, and is refused.
    let mut labels = db.connect();
    labels
        .batch_execute("BEGIN; SELECT walmirror.mirror('p')")
        .unwrap();
    let message = after(&db, labels, db.connect(), "ALTER TABLE p3 SET UNLOGGED").unwrap_err();
    assert!(message.contains("p3\" is unlogged"), "{message}");
}

/// What a label rests on may go as long as it is there again at the end, or the table is gone. Until then keys may be given twice, and
/// the WAL may not tell them.
#[test]
fn a_key_may_be_replaced_within_a_transaction() {
    let m = Mirror::on(Arc::new(Pg::start("max_prepared_transactions = 2")));
    m.sql(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a'), (2, 'a'); ALTER TABLE t REPLICA IDENTITY FULL; \
         CREATE TABLE u (id int PRIMARY KEY, v text); INSERT INTO u VALUES (1, 'a'), (2, 'a'); CREATE TABLE w (id int PRIMARY KEY); \
         SELECT walmirror.mirror('t'), walmirror.mirror('u'), walmirror.mirror('w')",
    );
    m.start();
    m.settle();
    // The row that is deleted last has the key of one that stays.
    m.sql("BEGIN; ALTER TABLE t DROP CONSTRAINT t_pkey");
    m.sql("INSERT INTO t VALUES (1, 'b'); DELETE FROM t WHERE v = 'a'; ALTER TABLE t ADD PRIMARY KEY (id); COMMIT");
    m.settle();
    assert_eq!(m.redis.keys().len(), 3);
    m.sql("BEGIN; ALTER TABLE u DROP CONSTRAINT u_pkey");
    m.sql(
        "UPDATE u SET id = id + 10; DELETE FROM u WHERE id = 12; ALTER TABLE u ADD PRIMARY KEY (id); COMMIT",
    );
    m.settle();
    assert_eq!(m.redis.keys().len(), 2);
    for end in ["COMMIT", "PREPARE TRANSACTION 'p'"] {
        for between in [
            "INSERT INTO u VALUES (3)",
            "SAVEPOINT s; ALTER TABLE u ADD PRIMARY KEY (id); ROLLBACK TO s",
        ] {
            m.sql("BEGIN; ALTER TABLE u DROP CONSTRAINT u_pkey");
            m.sql(between);
            let error = m.db.error(end);
            assert!(error.message().contains("would break"), "{end}: {error:?}");
            assert!(
                error.hint().is_some_and(|hint| hint.contains("unmirror")),
                "{error:?}"
            );
        }
    }
    m.check();
    m.sql("BEGIN; SAVEPOINT s; ALTER TABLE u DROP CONSTRAINT u_pkey; ROLLBACK TO s; COMMIT");
    m.sql("BEGIN; ALTER TABLE u DROP CONSTRAINT u_pkey; SELECT walmirror.unmirror('u'); COMMIT");
    m.sql("BEGIN; ALTER TABLE w DROP CONSTRAINT w_pkey; DROP TABLE w; COMMIT");
    m.sql("BEGIN; ALTER TABLE t DROP CONSTRAINT t_pkey; ALTER TABLE t ADD PRIMARY KEY (id); PREPARE TRANSACTION 'p'");
    m.sql("INSERT INTO u VALUES (4)");
    m.sql("COMMIT PREPARED 'p'");
    m.settle();
    assert_eq!(m.redis.keys(), ["t:1"]);
}

/// A label may come before what makes its key unique, as in a restore. Rows of one key were mirrored all the same once the table had a
/// primary key of other columns.
#[test]
fn a_table_is_not_mirrored_before_its_key_is_unique() {
    let m = Mirror::with(
        "CREATE TABLE t (a int NOT NULL, b int NOT NULL); INSERT INTO t VALUES (1, 1); CREATE TABLE u (id int PRIMARY KEY); \
         SELECT walmirror.mirror('u')",
    );
    let problem = || {
        m.db.value("SELECT problem FROM walmirror.relations() WHERE oid = 't'::regclass")
    };
    m.sql("SECURITY LABEL FOR walmirror ON TABLE t IS '{\"mode\":\"mirror\",\"key\":\"t:{a}\"}'");
    for statement in [
        "INSERT INTO t VALUES (1, 2), (2, 3); INSERT INTO u VALUES (1)",
        "ALTER TABLE t ADD PRIMARY KEY (b)",
        "INSERT INTO t VALUES (1, 4), (3, 5); DELETE FROM t WHERE b = 4",
        "CREATE UNIQUE INDEX ON t (abs(a), b); CREATE UNIQUE INDEX ON t (a) WHERE b > 2",
        "UPDATE t SET a = 4 WHERE b = 3",
    ] {
        m.sql(statement);
        m.sync();
        assert!(problem().contains("is not unique"), "{statement}: {}", problem());
        assert_eq!(m.redis.keys(), ["u:1"], "{statement}");
    }
    m.sql("DELETE FROM t WHERE b = 2; CREATE UNIQUE INDEX t_a ON t (a)");
    m.sql("ALTER TABLE t ALTER a SET NOT NULL, REPLICA IDENTITY USING INDEX t_a");
    m.settle();
    assert_eq!(problem(), "");
    assert_eq!(m.redis.keys(), ["t:1", "t:3", "t:4", "u:1"]);
}

/// The last thing that a restore makes may be an index, as where the WAL holds whole rows, and no row may follow it.
#[test]
fn a_table_is_mirrored_when_its_key_becomes_unique() {
    let m = Mirror::with("CREATE TABLE t (id int NOT NULL, v text); ALTER TABLE t REPLICA IDENTITY FULL");
    m.sql("SECURITY LABEL FOR walmirror ON TABLE t IS '{\"mode\":\"mirror\",\"key\":\"t:{id}\"}'");
    m.sql("INSERT INTO t VALUES (1, 'v'), (2, 'v')");
    m.sync();
    assert!(m.redis.keys().is_empty());
    m.sql("CREATE UNIQUE INDEX ON t (id)");
    m.settle();
    assert_eq!(m.redis.keys(), ["t:1", "t:2"]);
}

/// What is done to all rows at once while a label does not fit is seen when the label of before is back. The story: a rewrite, or a
/// partition that went, was told of in vain, and the keys stayed as they were for good, because nothing about the label had changed.
#[test]
fn a_rewrite_while_a_label_does_not_fit_counts_when_it_fits_again() {
    let m = Mirror::new();
    m.sql(
        "CREATE TABLE t (id int NOT NULL, v text); CREATE UNIQUE INDEX ON t (id); ALTER TABLE t REPLICA IDENTITY FULL; \
         CREATE TABLE c (LIKE t); CREATE UNIQUE INDEX ON c (id); ALTER TABLE c REPLICA IDENTITY FULL; \
         CREATE TABLE p (id int NOT NULL, v text) PARTITION BY LIST (id); CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1); \
         CREATE TABLE p2 PARTITION OF p FOR VALUES IN (2); CREATE UNIQUE INDEX ON p (id); ALTER TABLE p1 REPLICA IDENTITY FULL; \
         ALTER TABLE p2 REPLICA IDENTITY FULL; INSERT INTO t VALUES (1, 'a'); INSERT INTO c VALUES (1, 'a'); INSERT INTO p VALUES (1, 'a'), (2, 'b')",
    );
    let label = |key: &str| {
        for (table, mode) in [("t", "mirror"), ("c", "cache"), ("p", "mirror")] {
            m.sql(&format!(
                "SECURITY LABEL FOR walmirror ON TABLE {table} IS '{{\"mode\":\"{mode}\",\"key\":\"{table}:{{{key}}}\"}}'"
            ));
        }
    };
    label("id");
    m.start();
    m.settle();
    m.outlast_announced();
    m.sql("SET walmirror.capture_interval = 0; SELECT * FROM c WHERE id = 1");
    m.sql("INSERT INTO t VALUES (2, 'b')");
    m.settle();
    assert_eq!(m.redis.keys(), ["c:1", "p:1", "p:2", "t:1", "t:2"]);
    label("v");
    m.sql("ALTER TABLE t ALTER v TYPE text USING upper(v)");
    m.sql("ALTER TABLE c ALTER v TYPE text USING upper(v)");
    m.sql("ALTER TABLE p DETACH PARTITION p2");
    label("id");
    m.settle();
    assert_eq!(m.redis.keys(), ["p:1", "t:1", "t:2"]);
    // No row was left out.
    assert_eq!(m.notes(), 0, "{}", m.sink(|sink| sink.output()));
}

/// Partitions whose rows are not in the WAL passed while a table had no primary key, and then for good.
#[test]
fn a_table_that_is_restored_has_no_partition_outside_of_the_wal() {
    let db = Db::create(Pg::shared());
    db.sql(
        "CREATE TABLE p (a int NOT NULL, b int) PARTITION BY LIST (a); CREATE FOREIGN DATA WRAPPER nothing; \
         CREATE SERVER elsewhere FOREIGN DATA WRAPPER nothing; \
         CREATE UNLOGGED TABLE p3 (a int NOT NULL, b int); CREATE FOREIGN TABLE p4 (a int NOT NULL, b int) SERVER elsewhere",
    );
    for label in [r#"{"mode":"mirror","key":"p:{a}"}"#, r#"{"mode":"mirror"}"#] {
        db.sql(&format!("SECURITY LABEL FOR walmirror ON TABLE p IS '{label}'"));
        for (statement, why) in [
            (
                "CREATE UNLOGGED TABLE p1 PARTITION OF p FOR VALUES IN (1)",
                "is unlogged",
            ),
            (
                "CREATE FOREIGN TABLE p2 PARTITION OF p FOR VALUES IN (2) SERVER elsewhere",
                "is a foreign table",
            ),
            (
                "ALTER TABLE p ATTACH PARTITION p3 FOR VALUES IN (3)",
                "is unlogged",
            ),
            (
                "ALTER TABLE p ATTACH PARTITION p4 FOR VALUES IN (4)",
                "is a foreign table",
            ),
        ] {
            let error = db.error(statement);
            assert!(error.message().contains(why), "{label}: {statement}: {error:?}");
        }
        db.sql("SECURITY LABEL FOR walmirror ON TABLE p IS NULL");
    }
    // Nor does one that came while nobody looked pass a statement that only adds.
    db.sql("CREATE UNLOGGED TABLE p1 PARTITION OF p FOR VALUES IN (1)");
    db.sql("ALTER EVENT TRIGGER walmirror_ddl_command_end DISABLE; ALTER TABLE p1 SET LOGGED");
    db.sql(r#"SECURITY LABEL FOR walmirror ON TABLE p IS '{"mode":"mirror","key":"p:{a}"}'"#);
    db.sql("ALTER TABLE p1 SET UNLOGGED; ALTER EVENT TRIGGER walmirror_ddl_command_end ENABLE ALWAYS");
    let error = db.error("ALTER TABLE p ADD CHECK (a > 0)");
    assert!(error.message().contains("p1\" is unlogged"), "{error:?}");
}

/// A label that is typed by hand may name a character that the database has not. The view of all labels failed for everybody then.
#[test]
fn a_label_holds_no_character_that_its_database_has_not() {
    for encoding in ["LATIN1", "SQL_ASCII"] {
        let options = format!("ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'");
        let db = Db::create_with(Pg::shared(), &options);
        db.sql("CREATE TABLE t (id int PRIMARY KEY)");
        for key in [r"\u4e2d:{id}", r"\\\u00e9:{id}"] {
            let label =
                format!(r#"SECURITY LABEL FOR walmirror ON TABLE t IS '{{"mode":"mirror","key":"{key}"}}'"#);
            let error = db.error(&label);
            assert!(error.message().contains("not in UTF8"), "{}", error.message());
        }
        db.sql(
            r#"SECURITY LABEL FOR walmirror ON TABLE t IS '{"mode":"mirror","key":"\u0061\\u4e2d:{id}"}'"#,
        );
        assert_eq!(db.value("SELECT key FROM walmirror.mirrors"), r"a\u4e2d:{id}");
    }
}

/// What the stream could not tell of is refused where it is typed: the walsender would fail at it for good.
#[test]
fn a_schema_is_not_renamed_to_what_is_no_utf8() {
    let db = Db::create_with(Pg::shared(), "ENCODING 'WIN1252' LOCALE 'C'");
    db.sql("CREATE SCHEMA s; CREATE TABLE s.t (id int PRIMARY KEY); SELECT walmirror.mirror('s.t')");
    let error =
        db.error("DO $$ BEGIN EXECUTE format('ALTER SCHEMA s RENAME TO %I', 'x' || chr(129)); END $$");
    assert_eq!(error.code().code(), "22P05", "{error:?}");
    db.sql("ALTER SCHEMA s RENAME TO r");
    assert_eq!(
        db.value("SELECT count(*) FROM walmirror.relations() WHERE problem IS NULL"),
        "1"
    );
}
