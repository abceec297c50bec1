//! What labels and DDL on labelled tables are refused, whom they wait for, and which rights they need.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use walmirror_tests::{DEADLINE, Db, Mirror, wait_for};

/// What would break a mapping is refused when it is tried, with a hint, and leaves everything as it was.
#[test]
fn ddl_that_breaks_a_mapping_is_refused() {
    let m = Mirror::with(
        "CREATE TABLE t (id int PRIMARY KEY, tag text NOT NULL UNIQUE, a text, b int); \
         ALTER TABLE t REPLICA IDENTITY USING INDEX t_tag_key; \
         CREATE TABLE u (id int PRIMARY KEY, v text); \
         CREATE TABLE p (id int PRIMARY KEY, v text) PARTITION BY LIST (id); CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1); \
         CREATE TABLE x (id int NOT NULL, v text); CREATE UNIQUE INDEX x_id ON x (id); ALTER TABLE x REPLICA IDENTITY FULL; \
         CREATE TABLE y (id int NOT NULL, v text); CREATE UNIQUE INDEX y_id ON y (id); CREATE INDEX y_v ON y (v); \
         ALTER TABLE y REPLICA IDENTITY USING INDEX y_id; \
         SELECT walmirror.mirror('t', key => 't:{tag}', columns => '{a}'), walmirror.mirror('u'), walmirror.mirror('p'), \
                walmirror.mirror('x', key => 'x:{id}'), walmirror.mirror('y', key => 'y:{id}')",
    );
    let mut problems = Vec::new();
    for statement in [
        "ALTER TABLE t DROP COLUMN a",
        "ALTER TABLE t RENAME a TO aa",
        "ALTER TABLE t DROP COLUMN tag",
        "ALTER TABLE t RENAME tag TO label",
        "ALTER TABLE t REPLICA IDENTITY DEFAULT",
        "ALTER TABLE t REPLICA IDENTITY NOTHING",
        "ALTER TABLE t DROP CONSTRAINT t_tag_key",
        "ALTER TABLE t SET UNLOGGED",
        "ALTER TABLE u DROP CONSTRAINT u_pkey",
        "ALTER TABLE u RENAME id TO key",
        "ALTER TABLE u DROP COLUMN id",
        "ALTER TABLE u REPLICA IDENTITY NOTHING",
        "ALTER TABLE p1 REPLICA IDENTITY NOTHING",
        "DROP INDEX x_id",
        "DROP INDEX CONCURRENTLY x_id",
        "DROP INDEX y_id",
        "DROP INDEX CONCURRENTLY y_id",
    ] {
        problems.extend(Db::refuses(&mut m.db.connect(), statement));
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    m.sql(
        "INSERT INTO t VALUES (1, 'x', 'y', 2); INSERT INTO u VALUES (1, 'v'); INSERT INTO p VALUES (1, 'w'); \
         INSERT INTO x VALUES (1, 'v'); INSERT INTO y VALUES (1, 'v'), (2, 'v'), (3, 'v'); DELETE FROM y WHERE id = 1; \
         UPDATE y SET id = 4 WHERE id = 2",
    );
    m.check();
    // What no label rests on may go, and be made anew.
    m.sql("DROP INDEX CONCURRENTLY y_v");
    m.sql("REINDEX INDEX CONCURRENTLY y_id");
    m.sql("DELETE FROM y WHERE id = 3");
    m.check();
    m.sql("ALTER TABLE x ADD w text DEFAULT 'w'");
    m.settle();
    // Columns that no mapping names may go.
    m.sql("ALTER TABLE t DROP COLUMN b; ALTER TABLE u RENAME v TO w");
    m.settle();
}

/// DDL on a mirrored table, and its label, wait for nothing that a session does to another one.
#[test]
fn ddl_waits_for_nobody_at_another_table() {
    let m = Mirror::with(
        "CREATE TABLE a (id int PRIMARY KEY, v text, w text); CREATE TABLE b (id int PRIMARY KEY, v text UNIQUE, w text); \
         CREATE INDEX b_w ON b (w); SELECT walmirror.mirror('a'), walmirror.mirror('b')",
    );
    let mut other = m.db.connect();
    other
        .batch_execute("BEGIN; ALTER TABLE a ADD x int; ALTER TABLE a DROP COLUMN w")
        .unwrap();
    let mut client = m.db.connect();
    for statement in [
        "SET lock_timeout = '100ms'",
        "ALTER TABLE b ADD x int",
        "ALTER TABLE b DROP CONSTRAINT b_v_key",
        "ALTER TABLE b DROP COLUMN v",
        "DROP INDEX b_w",
        "SELECT walmirror.mirror('b', key => 'b2:{id}')",
    ] {
        client
            .batch_execute(statement)
            .unwrap_or_else(|error| panic!("{statement}: {error:?}"));
    }
    other.batch_execute("COMMIT").unwrap();
    m.sql("INSERT INTO a VALUES (1, 'v', 2); INSERT INTO b VALUES (1, 'w', 2)");
    m.settle();
}

/// Nor for one to another partition of the table, as a parallel restore does, or to the whole.
#[test]
fn ddl_of_a_partition_waits_for_no_other() {
    let m = Mirror::with(
        "CREATE TABLE p (id int PRIMARY KEY, v text) PARTITION BY LIST (id); CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1); \
         CREATE TABLE p2 PARTITION OF p FOR VALUES IN (2); CREATE TABLE p3 PARTITION OF p FOR VALUES IN (3); SELECT walmirror.mirror('p')",
    );
    m.settle();
    let mut clients = [1, 2].map(|partition| {
        let mut client = m.db.connect();
        client
            .batch_execute(&format!(
                "SET lock_timeout = '1s'; BEGIN; ALTER TABLE p{partition} ADD CHECK (id > 0)"
            ))
            .unwrap();
        client
    });
    for (client, partition) in clients.iter_mut().zip([1, 2]) {
        client
            .batch_execute(&format!("ALTER TABLE p{partition} REPLICA IDENTITY FULL"))
            .unwrap();
    }
    for client in &mut clients {
        client.batch_execute("COMMIT").unwrap();
    }
    // Somebody has the whole, and is about to ask for a partition.
    let mut whole = m.db.connect();
    whole
        .batch_execute("BEGIN; LOCK TABLE ONLY p IN ACCESS EXCLUSIVE MODE")
        .unwrap();
    m.db.connect()
        .batch_execute("SET lock_timeout = '1s'; ALTER TABLE p1 REPLICA IDENTITY DEFAULT")
        .unwrap();
    whole.batch_execute("ALTER TABLE p ADD w text; COMMIT").unwrap();
    m.sql("INSERT INTO p VALUES (1, 'v'), (2, 'v'); UPDATE p SET w = 'w'");
    m.settle();
}

/// Who does not own a table has no lock on it, nor waits for one: whom he waits for would be disturbed, as an autovacuum, which Postgres ends.
#[test]
fn a_table_of_others_is_not_locked() {
    let m = Mirror::new();
    let other = format!("{}_other", m.db.name);
    m.sql(&format!(
        "CREATE TABLE t (id int PRIMARY KEY); CREATE ROLE {other}"
    ));
    let mut owner = m.db.connect();
    owner
        .batch_execute("BEGIN; LOCK TABLE t IN SHARE UPDATE EXCLUSIVE MODE")
        .unwrap();
    for call in ["mirror('t')", "set_label('t'::regclass, '{}')"] {
        let error = m.db.error(&format!(
            "SET ROLE {other}; SET lock_timeout = '1s'; SELECT walmirror.{call}"
        ));
        assert!(error.message().contains("must be owner"), "{call}: {error:?}");
    }
    owner.batch_execute("COMMIT").unwrap();
    m.sql(&format!("DROP ROLE {other}"));
}

/// Owners mirror and alter their tables where nothing is anybody's by default, and nobody may write logical messages but the sink.
#[test]
fn a_database_that_grants_nothing() {
    let m = Mirror::new();
    let (owner, other) = (format!("{}_owner", m.db.name), format!("{}_other", m.db.name));
    m.sql(&format!(
        "DROP EXTENSION walmirror; DROP SCHEMA IF EXISTS walmirror; CREATE ROLE {owner}; CREATE ROLE {other}; \
         ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC; CREATE EXTENSION walmirror; \
         DO $$ DECLARE f regprocedure; BEGIN FOR f IN SELECT oid FROM pg_proc WHERE proname = 'pg_logical_emit_message' \
         LOOP EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', f); END LOOP; END $$; \
         GRANT CREATE, USAGE ON SCHEMA public TO {owner}, {other}; SET ROLE {owner}; \
         CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE u (id int PRIMARY KEY); CREATE TABLE w (id int PRIMARY KEY); \
         CREATE TABLE p (id int PRIMARY KEY, v text) PARTITION BY LIST (id); CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1); \
         INSERT INTO t VALUES (1, 'v'); INSERT INTO u VALUES (1); INSERT INTO p VALUES (1, 'v'); \
         SELECT walmirror.mirror('t'), walmirror.mirror('u'), walmirror.mirror('w'), walmirror.mirror('p'); \
         RESET ROLE; ALTER TABLE p1 OWNER TO {other}"
    ));
    m.start();
    m.settle();
    m.sql(&format!(
        "SET ROLE {owner}; ALTER TABLE t ADD n int DEFAULT 5; ALTER TABLE t DROP n, ADD n int DEFAULT 6; ALTER TABLE t ALTER n TYPE text; \
         SELECT walmirror.unmirror('u'), walmirror.unmirror('w', keep_keys => true); RESET ROLE"
    ));
    m.settle();
    // The table that the rows of this partition appear under is somebody else's.
    m.sql(&format!(
        "SET ROLE {other}; ALTER TABLE p1 ADD CHECK (id > 0); RESET ROLE"
    ));
    m.settle();
    for call in ["announce('t'::regclass, keep_keys => true)", "unmirror('t')"] {
        let error = m.db.error(&format!("SET ROLE {other}; SELECT walmirror.{call}"));
        assert!(error.message().contains("must be owner"), "{call}: {error:?}");
    }
    m.db.reconnect();
    m.settle();
    m.sql(&format!(
        "DROP TABLE t, u, w, p; DROP OWNED BY {owner}, {other}; DROP ROLE {owner}, {other}"
    ));
}

/// Two sessions give out the same keys at once, neither of them seeing the label of the other: the second waits, and is refused.
#[test]
fn one_template_is_given_out_once() {
    let m = Mirror::with("CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (LIKE a INCLUDING ALL)");
    for (round, begin) in ["BEGIN", "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1 FROM b"]
        .into_iter()
        .enumerate()
    {
        let mirror =
            |table: &str| format!("SELECT walmirror.mirror('{table}', key => 'round{round}:{{id}}')");
        let (mut first, mut second) = (m.db.connect(), m.db.connect());
        second.batch_execute(begin).unwrap();
        first.batch_execute(&format!("BEGIN; {}", mirror("a"))).unwrap();
        let asked = mirror("b");
        let waiting = std::thread::spawn(move || second.batch_execute(&asked));
        wait_for(DEADLINE, "the second to wait for the first", || {
            let waits = m.db.value(
                "SELECT count(*)::text FROM pg_locks WHERE NOT granted AND locktype = 'object' AND classid = 'pg_seclabel'::regclass \
                 AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
            );
            (waits == "1").then_some(())
        });
        first.batch_execute("COMMIT").unwrap();
        let error = waiting.join().unwrap().unwrap_err();
        let message = error.as_db_error().unwrap().message().to_owned();
        assert!(
            message.contains("would write the same keys"),
            "{begin}: {message}"
        );
    }
    m.settle();
}

/// Two tables may not have keys of which nobody can tell whose they are: a TRUNCATE of one removed rows of the other.
#[test]
fn templates_that_tie_are_refused() {
    let m = Mirror::with(
        "CREATE TABLE one (a text, b text, PRIMARY KEY (a, b)); CREATE TABLE other (LIKE one INCLUDING ALL); \
         SELECT walmirror.mirror('one', key => 'x:{a}-{b}')",
    );
    let error = m.db.error("SELECT walmirror.mirror('other', key => 'x:{a}_{b}')");
    for part in ["public.one", "public.other", "x:{a}-{b}", "x:{a}_{b}"] {
        assert!(error.message().contains(part), "{part}: {}", error.message());
    }
    assert!(error.hint().unwrap().contains("Choose another key"));
    // No key is of both, or it is that of the more specific one.
    for key in ["x:{a}:{b}", "x:{a}-{b}:more", "y:{a}_{b}"] {
        m.sql(&format!("SELECT walmirror.mirror('other', key => '{key}')"));
    }
    m.sql("INSERT INTO one VALUES ('1', '2'); INSERT INTO other VALUES ('1', '2')");
    m.settle();
}

/// Rows of a table became bad rows with the label of another one, and who set that was not told.
#[test]
fn who_takes_keys_of_another_table_is_told() {
    let m = Mirror::with(
        "CREATE TABLE wide (id text PRIMARY KEY, v text); CREATE TABLE narrow (LIKE wide INCLUDING ALL); \
         CREATE TABLE apart (LIKE wide INCLUDING ALL)",
    );
    let told = |sql: &str| -> String {
        let mut psql = m.db.pg.program("psql", &m.db.name);
        let output = psql.args(["-X", "-c", sql]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    assert_eq!(told("SELECT walmirror.mirror('wide', key => 'x:{id}')"), "");
    assert_eq!(told("SELECT walmirror.mirror('apart', key => 'y:{id}')"), "");
    let narrow = "SELECT walmirror.cache('narrow', key => 'x:b{id}')";
    let takes = "key template \"x:b{id}\" of table \"public.narrow\" takes keys that \"x:{id}\" of table \"public.wide\" could make";
    let notice = told(narrow);
    assert!(
        notice.starts_with("NOTICE:") && notice.contains(takes),
        "{notice}"
    );
    assert!(
        notice.contains("HINT:") && notice.contains("another prefix"),
        "{notice}"
    );
    // Set again with the same key it is no news, nor is DDL; the other way round it is.
    assert_eq!(told(narrow), "");
    assert_eq!(told("ALTER TABLE narrow ADD n int"), "");
    assert_eq!(told("SELECT walmirror.unmirror('wide')"), "");
    assert!(told("SELECT walmirror.mirror('wide', key => 'x:{id}')").contains(takes));
}

/// An index that becomes a deferrable constraint is checked at once no more: two rows may have one key for a while. That was accepted, at
/// most with a warning, and the table was not mirrored from then on.
#[test]
fn an_index_that_a_key_rests_on_is_not_made_deferrable() {
    let m = Mirror::with(
        "CREATE TABLE a (id int NOT NULL, v text); CREATE UNIQUE INDEX a_id ON a (id); ALTER TABLE a REPLICA IDENTITY FULL; \
         CREATE TABLE b (id int PRIMARY KEY, k int NOT NULL, v text); CREATE UNIQUE INDEX b_k ON b (k); ALTER TABLE b REPLICA IDENTITY FULL; \
         SELECT walmirror.mirror('a', key => 'a:{id}'), walmirror.mirror('b', key => 'b:{k}')",
    );
    let mut client = m.db.connect();
    for (table, index) in [("a", "a_id"), ("b", "b_k")] {
        let defer =
            format!("ALTER TABLE {table} ADD CONSTRAINT {table}_u UNIQUE USING INDEX {index} DEFERRABLE");
        let error = client.batch_execute(&defer).unwrap_err();
        let message = error.as_db_error().unwrap().message();
        assert!(message.contains("is not unique"), "{message}");
        // Another one may take its place before the end.
        let column = if table == "a" { "id" } else { "k" };
        m.sql(&format!(
            "BEGIN; {defer}; CREATE UNIQUE INDEX ON {table} ({column}); COMMIT"
        ));
    }
    m.sql("INSERT INTO a VALUES (1, 'v'); INSERT INTO b VALUES (1, 2, 'v'); UPDATE a SET id = 2; UPDATE b SET k = 3");
    m.settle();
    assert_eq!(m.redis.keys(), ["a:2", "b:3"]);
}
