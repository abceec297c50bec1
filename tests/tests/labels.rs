//! Labels and schema changes take effect at their place in the stream, and the keys become right by themselves.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::time::Duration;

use rand::Rng;
use rand::rngs::StdRng;
use walmirror_tests::{DEADLINE, Mirror, Sink, rng, wait_for};

const TABLE: &str = "CREATE TABLE t (id int PRIMARY KEY, a text, b int, c numeric); \
     INSERT INTO t SELECT i, 'a' || i, i, i / 4.0 FROM generate_series(1, 500) i";

#[test]
fn a_label_set_changed_and_removed_while_the_sink_runs() {
    let m = Mirror::with(TABLE);
    assert!(m.redis.keys().is_empty());
    for statement in [
        "SELECT walmirror.mirror('t')",
        "UPDATE t SET b = b + 1; SELECT walmirror.mirror('t', value => 'json'); UPDATE t SET b = b + 1",
        "SELECT walmirror.mirror('t', key => 'other:{id}', value => 'json')",
        "SELECT walmirror.mirror('t', key => 'other:{id}', columns => '{a}')",
        "SELECT walmirror.mirror('t', key => 'other:{id}', value => 'string', columns => '{a}')",
        "SELECT walmirror.mirror('t', ttl => '1 day')",
        "SELECT walmirror.mirror('t')",
        "SELECT walmirror.unmirror('t')",
        "INSERT INTO t VALUES (1000)",
        "BEGIN; SELECT walmirror.mirror('t'); DELETE FROM t WHERE id < 100; COMMIT",
        "SECURITY LABEL FOR walmirror ON TABLE t IS NULL",
        "SECURITY LABEL FOR walmirror ON TABLE t IS '{\"mode\":\"mirror\",\"key\":\"label:{id}\"}'",
        "BEGIN; SELECT walmirror.unmirror('t'); UPDATE t SET b = 0; ROLLBACK",
        "BEGIN; SELECT walmirror.mirror('t', value => 'json'); SAVEPOINT a; SELECT walmirror.unmirror('t'); ROLLBACK TO a; COMMIT",
    ] {
        println!("{statement}");
        m.sql(statement);
        m.settle();
        m.sql("UPDATE t SET b = b + 1 WHERE id % 3 = 0; INSERT INTO t SELECT max(id) + 1, 'new' FROM t; DELETE FROM t WHERE id = (SELECT min(id) FROM t)");
        m.settle();
    }
}

/// The sink is down while labels change, so that it meets old rows, the change, and new rows in one go.
#[test]
fn label_changes_are_read_in_order_after_a_pause() {
    let m = Mirror::with(TABLE);
    m.sql("SELECT walmirror.mirror('t')");
    m.settle();
    let mut rng = rng("label_changes_are_read_in_order_after_a_pause");
    for round in 0..8 {
        m.sink(|sink| {
            sink.kill();
        });
        for _ in 0..rng.random_range(2..7) {
            let statement = random_label(&mut rng);
            println!("round {round}: {statement}");
            m.sql(&statement);
            m.sql("UPDATE t SET b = b + 1 WHERE id % 5 = 0; INSERT INTO t SELECT max(id) + 1, 'new' FROM t");
        }
        m.sink(Sink::restart);
        m.settle();
    }
}

fn random_label(rng: &mut StdRng) -> String {
    let all = [
        "SELECT walmirror.mirror('t')",
        "SELECT walmirror.mirror('t', value => 'json')",
        "SELECT walmirror.mirror('t', key => 'k{id}', columns => '{a,b}')",
        "SELECT walmirror.mirror('t', value => 'string', columns => '{b}')",
        "SELECT walmirror.mirror('t', value => 'json', ttl => '1 h')",
        "SELECT walmirror.unmirror(relation) FROM walmirror.mirrors",
        "TRUNCATE t; INSERT INTO t SELECT i, 'fresh' FROM generate_series(1, 50) i",
        "UPDATE t SET id = id + 100000 WHERE id % 2 = 0",
        "ALTER TABLE t ADD COLUMN IF NOT EXISTS d int DEFAULT 7",
        "ALTER TABLE t DROP COLUMN IF EXISTS d",
    ];
    all[rng.random_range(0..all.len())].to_owned()
}

#[test]
fn unmirror_and_drop_remove_the_keys() {
    let m = Mirror::new();
    m.sql("CREATE SCHEMA extra");
    for name in ["a", "b", "c", "d", "extra.e", "f"] {
        m.sql(&format!("CREATE TABLE {name} (id int PRIMARY KEY); INSERT INTO {name} SELECT generate_series(1, 3000); SELECT walmirror.mirror('{name}')"));
    }
    m.start();
    m.settle();
    m.sql("SELECT walmirror.unmirror('a')");
    m.settle();
    m.sql("DROP TABLE b");
    m.settle();
    m.sql("BEGIN; DELETE FROM c WHERE id > 10; DROP TABLE c; COMMIT");
    m.settle();
    m.sql("DROP SCHEMA extra CASCADE");
    m.settle();
    // A table of the same name takes the place of the old one.
    m.sql("BEGIN; DROP TABLE f; CREATE TABLE f (id int PRIMARY KEY, v text); SELECT walmirror.mirror('f'); INSERT INTO f VALUES (1, 'new'); COMMIT");
    m.settle();
    m.sql("SELECT walmirror.unmirror('d', keep_keys => true)");
    m.sync();
    m.sql("SELECT walmirror.mirror('a')");
    m.sync();
    m.sql("INSERT INTO a VALUES (5000)");
    m.sync();
    let kept = m.redis.keys().iter().filter(|key| key.starts_with("d:")).count();
    assert_eq!(kept, 3000);
}

/// The story: a transaction that had written to the table before `unmirror` committed when the sink had been started again. The table was taken for a
/// new one, and as the catalog did not know it, all of its keys were removed, which were to be kept.
#[test]
fn keys_that_are_kept_outlast_a_restart_and_an_older_transaction() {
    let m = Mirror::with(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT i, 'a' FROM generate_series(1, 100) i; \
         CREATE TABLE u (id int PRIMARY KEY); INSERT INTO u VALUES (1); SELECT walmirror.mirror('t')",
    );
    let mut older = m.db.connect();
    older
        .batch_execute("BEGIN; UPDATE t SET v = 'b' WHERE id = 1; DELETE FROM t WHERE id = 2; INSERT INTO t VALUES (101, 'b')")
        .unwrap();
    m.sql("SELECT walmirror.unmirror('t', keep_keys => true)");
    m.sync();
    m.sink(|sink| {
        sink.kill();
    });
    m.sink(Sink::restart);
    older.batch_execute("COMMIT").unwrap();
    m.sync();
    // Whoever reads a table has compared the labels before.
    m.sql("SELECT walmirror.mirror('u')");
    m.sync();
    m.filled();
    let mut kept: Vec<_> = (1..=100).map(|id| format!("t:{id}")).collect();
    kept.push("u:1".to_owned());
    kept.sort();
    assert_eq!(m.redis.keys(), kept);
    let value: String = m.redis.command("HGET t:1 v");
    assert_eq!(value, "a");
}

#[test]
fn a_drop_while_the_sink_is_down() {
    let m = Mirror::new();
    for name in ["a", "b"] {
        m.sql(&format!("CREATE TABLE {name} (id int PRIMARY KEY); INSERT INTO {name} SELECT generate_series(1, 2000); SELECT walmirror.mirror('{name}')"));
    }
    m.start();
    m.settle();
    m.sink(Sink::kill);
    m.sql("INSERT INTO a VALUES (5000); DROP TABLE a; UPDATE b SET id = -id; SELECT walmirror.unmirror('b'); CREATE TABLE a (id int PRIMARY KEY, v text); SELECT walmirror.mirror('a'); INSERT INTO a VALUES (1, 'x')");
    m.sink(Sink::restart);
    m.settle();
}

/// Nothing is written to the table after the ALTER, and the keys become right nevertheless.
#[test]
fn every_kind_of_alter_table() {
    let m = Mirror::with(
        "CREATE TYPE kind AS ENUM ('x', 'y'); CREATE TABLE h (id int PRIMARY KEY, a text, b int, k kind DEFAULT 'x', at timestamptz DEFAULT '2026-01-01'); \
         INSERT INTO h SELECT i, 'a' || i, i FROM generate_series(1, 300) i; \
         CREATE TABLE j (LIKE h INCLUDING ALL); INSERT INTO j SELECT * FROM h; \
         CREATE TABLE s (LIKE h INCLUDING ALL); INSERT INTO s SELECT * FROM h; \
         SELECT walmirror.mirror('h'), walmirror.mirror('j', value => 'json'), walmirror.mirror('s', value => 'string', columns => '{a}')",
    );
    for statement in [
        "ALTER TABLE {t} ADD c text",
        "ALTER TABLE {t} ADD d int DEFAULT 5",
        "ALTER TABLE {t} ADD e float8 DEFAULT random()",
        "ALTER TABLE {t} ADD g int GENERATED ALWAYS AS (b * 2) STORED",
        "ALTER TABLE {t} ADD f int, ADD x text DEFAULT 'x'",
        "ALTER TABLE {t} RENAME c TO cc",
        "ALTER TABLE {t} DROP COLUMN cc",
        "ALTER TABLE {t} DROP COLUMN g, ALTER b TYPE bigint USING b * 10",
        "ALTER TABLE {t} DROP COLUMN x, ADD COLUMN x text DEFAULT 'other'",
        "ALTER TABLE {t} ALTER a TYPE text USING upper(a)",
        "ALTER TABLE {t} ALTER b TYPE text",
        "ALTER TABLE {t} ALTER at TYPE date",
        "ALTER TABLE {t} ALTER id TYPE bigint",
        "ALTER TABLE {t} ALTER d SET DEFAULT 6, ALTER f SET DEFAULT 7",
        "ALTER TABLE {t} ADD CHECK (id > 0), ADD UNIQUE (a)",
        "ALTER TABLE {t} ALTER a SET NOT NULL",
        "ALTER TABLE {t} SET (fillfactor = 50)",
        "ALTER TABLE {t} ALTER a SET STORAGE EXTERNAL, ALTER a SET STATISTICS 10",
        "ALTER TABLE {t} REPLICA IDENTITY FULL",
        "ALTER TABLE {t} REPLICA IDENTITY DEFAULT",
        "ALTER TABLE {t} RENAME CONSTRAINT {t}_pkey TO {t}_key",
        "CREATE INDEX ON {t} (a)",
        "VACUUM FULL {t}",
        "CLUSTER {t} USING {t}_key",
        "ALTER TABLE {t} RENAME TO {t}_renamed",
        "ALTER TABLE {t}_renamed RENAME TO {t}",
        "CREATE SCHEMA IF NOT EXISTS other; ALTER TABLE {t} SET SCHEMA other",
        "ALTER TABLE other.{t} SET SCHEMA public",
        "BEGIN; ALTER TABLE {t} ADD never int DEFAULT 1; ROLLBACK",
        "BEGIN; ALTER TABLE {t} ADD z int DEFAULT 1; UPDATE {t} SET z = id WHERE id < 50; ALTER TABLE {t} RENAME z TO zz; COMMIT",
        "ALTER TABLE {t} DISABLE TRIGGER ALL; COMMENT ON TABLE {t} IS 'x'; ANALYZE {t}",
    ] {
        println!("{statement}");
        for table in ["h", "j", "s"] {
            m.sql(&statement.replace("{t}", table));
        }
        m.settle();
    }
    // The text of a value changes with its type.
    m.sql("ALTER TYPE kind RENAME VALUE 'x' TO 'renamed'");
    m.sql("UPDATE h SET k = k; UPDATE j SET k = k");
    m.settle();
}

/// The story: ALTER TYPE and ALTER SCHEMA lock no table, so one that they are about can get its label meanwhile, which is committed first. Then
/// what the stream told last was the label of before, and of a cache nobody reads anything that would have told better.
#[test]
fn a_label_that_is_set_while_its_table_is_altered_without_a_lock_counts() {
    let m = Mirror::with(
        "CREATE TYPE pair AS (x int, y text); CREATE SCHEMA s; CREATE TABLE s.t (id int PRIMARY KEY, r pair); \
         INSERT INTO s.t SELECT i, ROW(i, 'y'::text)::pair FROM generate_series(1, 100) i; SELECT walmirror.cache('s.t', key => 't:{id}')",
    );
    for (number, alter) in [
        "ALTER TYPE pair RENAME ATTRIBUTE y TO z",
        "ALTER SCHEMA s RENAME TO s1",
    ]
    .iter()
    .enumerate()
    {
        let mut other = m.db.connect();
        other.batch_execute(&format!("BEGIN; {alter}")).unwrap();
        m.sql(&format!(
            "SELECT walmirror.mirror('s.t', key => 't{number}:{{id}}')"
        ));
        other.batch_execute("COMMIT").unwrap();
        m.settle();
        m.sql("DO $$ BEGIN IF to_regclass('s1.t') IS NULL THEN PERFORM walmirror.cache('s.t', key => 't:{id}'); END IF; END $$");
        m.settle();
    }
}

#[test]
fn schema_changes_between_rows_of_one_transaction() {
    let m = Mirror::with(TABLE);
    m.sql("SELECT walmirror.mirror('t')");
    m.settle();
    m.sql(
        "BEGIN; UPDATE t SET b = 1 WHERE id = 1; ALTER TABLE t ADD n int DEFAULT 3; UPDATE t SET b = 2 WHERE id = 2; \
         ALTER TABLE t DROP n; UPDATE t SET b = 3 WHERE id = 3; ALTER TABLE t ADD n text DEFAULT 'q'; \
         INSERT INTO t (id) VALUES (900); TRUNCATE t; INSERT INTO t (id) VALUES (901); COMMIT",
    );
    m.settle();
    // A transaction that began before the ALTER of another, and writes after it.
    let mut old = m.db.connect();
    old.batch_execute("BEGIN; INSERT INTO first VALUES (1)")
        .unwrap_err();
    old.batch_execute("ROLLBACK; BEGIN; SELECT txid_current()")
        .unwrap();
    m.sql("ALTER TABLE t ADD later int DEFAULT 9");
    old.batch_execute("UPDATE t SET n = 'late'; COMMIT").unwrap();
    m.settle();
}

/// DDL that names another object than the table: what it inherits from, the type that it is OF, or has a column of, its schema.
#[test]
fn ddl_through_another_object() {
    let m = Mirror::with(
        "CREATE TABLE parent (id int, v text, gone text); CREATE TABLE child (PRIMARY KEY (id)) INHERITS (parent); \
         CREATE TYPE shape AS (id int, v text); CREATE TABLE of_type OF shape (PRIMARY KEY (id)); \
         CREATE TABLE part (a int, b int); CREATE TABLE whole (id int PRIMARY KEY, p part, many part[]); \
         CREATE SCHEMA s; CREATE TABLE s.t (id int PRIMARY KEY, v text); \
         INSERT INTO child SELECT i, 'v', 'g' FROM generate_series(1, 30) i; INSERT INTO of_type SELECT i, 'v' FROM generate_series(1, 30) i; \
         INSERT INTO whole SELECT i, ROW(i, 1)::part, ARRAY[ROW(i, 1)::part] FROM generate_series(1, 30) i; \
         INSERT INTO s.t SELECT i, 'v' FROM generate_series(1, 30) i; \
         SELECT walmirror.mirror('child'), walmirror.mirror('of_type'), walmirror.mirror('whole', value => 'json'), walmirror.mirror('s.t')",
    );
    for statement in [
        "ALTER TABLE parent RENAME v TO w",
        "ALTER TABLE parent ADD n int DEFAULT 7",
        "ALTER TABLE parent DROP gone",
        "ALTER TABLE parent ALTER n TYPE text",
        "ALTER TYPE shape RENAME ATTRIBUTE v TO w CASCADE",
        "ALTER TYPE shape ADD ATTRIBUTE n int CASCADE",
        "ALTER TYPE shape DROP ATTRIBUTE w CASCADE",
        "ALTER TABLE part RENAME b TO c",
        "ALTER TABLE part ADD d text",
        "ALTER TABLE part DROP c",
        "ALTER SCHEMA s RENAME TO renamed",
    ] {
        println!("{statement}");
        m.sql(statement);
        m.settle();
    }
    // The table is read by its new name, though no row has told of it.
    m.sql("ALTER TABLE renamed.t ADD n int DEFAULT 1");
    m.settle();
    for statement in [
        "ALTER TABLE parent RENAME id TO key",
        "ALTER TYPE shape RENAME ATTRIBUTE id TO key CASCADE",
    ] {
        let message = m.db.error(statement).message().to_owned();
        assert!(message.contains("would break"), "{statement}: {message}");
    }
    // A transaction whose snapshot is older than the label sees it all the same.
    m.sql("CREATE TABLE late (id int PRIMARY KEY, v text); INSERT INTO late VALUES (1, 'v')");
    let mut old = m.db.connect();
    old.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM late")
        .unwrap();
    m.sql("SELECT walmirror.mirror('late')");
    old.batch_execute("ALTER TABLE late RENAME v TO w; COMMIT")
        .unwrap();
    m.settle();
}

/// An attribute that goes with its type goes from the values of all columns that it stands in.
#[test]
fn a_type_is_dropped_within_the_type_of_a_column() {
    let m = Mirror::with(
        "CREATE DOMAIN d AS int; CREATE TYPE part AS (x int, y d); CREATE TYPE outer_part AS (p part[]); \
         CREATE TABLE other (x int, y d); CREATE TABLE t (id int PRIMARY KEY, p part); \
         CREATE TABLE u (id int PRIMARY KEY, p outer_part); CREATE TABLE v (id int PRIMARY KEY, o other); \
         INSERT INTO t VALUES (1, ROW(1, 2)); INSERT INTO u VALUES (1, ROW(ARRAY[ROW(1, 2)::part])); INSERT INTO v VALUES (1, ROW(1, 2)); \
         SELECT walmirror.mirror('t', value => 'json'), walmirror.mirror('u', value => 'json'), walmirror.mirror('v')",
    );
    m.sql("DROP DOMAIN d CASCADE");
    m.settle();
}

/// A partition's rows appear under one table.
#[test]
fn a_partition_has_no_label_of_its_own() {
    let m = Mirror::with(
        "CREATE TABLE p (id int PRIMARY KEY, v text) PARTITION BY LIST (id); CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1); \
         CREATE TABLE p2 (id int PRIMARY KEY, v text); INSERT INTO p2 VALUES (2, 'v'); INSERT INTO p VALUES (1, 'v'); \
         SELECT walmirror.mirror('p'), walmirror.mirror('p2')",
    );
    let attach = "ALTER TABLE p ATTACH PARTITION p2 FOR VALUES IN (2)";
    let error = m.db.error(attach);
    assert!(
        error
            .message()
            .contains("partition \"public.p2\" has a label of its own")
            && error.hint().unwrap().contains("walmirror.unmirror('public.p2')"),
        "{error:?}"
    );
    m.check();
    m.sql("SELECT walmirror.unmirror('p2')");
    m.sql(attach);
    m.settle();
    // Nor does it become the partition of a table that has none.
    m.sql("SELECT walmirror.unmirror('p'); ALTER TABLE p DETACH PARTITION p2; SELECT walmirror.mirror('p2')");
    let error = m.db.error(attach);
    assert!(error.message().contains("is a partition"), "{error:?}");
    m.settle();
}

/// The story: as long as a key of such a table was noted to be read again, it was tried every two seconds, with an ERROR line here and one
/// in the log of Postgres each time.
fn is_told_of_once(m: &Mirror) {
    let log = m.db.pg.log();
    m.sink(Sink::kill);
    let pending = format!("walmirror:{{{}}}:pending", m.db.name);
    let oid: u32 = m.db.value("SELECT 't'::regclass::oid").parse().unwrap();
    m.redis.command::<u32>(&format!("HSET {pending} t:1 {oid}"));
    m.sink(Sink::restart);
    std::thread::sleep(Duration::from_secs(6));
    let told = m.sink(|sink| sink.output());
    let (_, told) = told.rsplit_once("walmirror starts").unwrap();
    assert_eq!(told.matches("does not fit it").count(), 1, "{told}");
    let said = m.db.pg.log().split_off(log.len());
    let is_of_pack =
        |line: &&str| line.contains(&m.db.name) && line.contains("STATEMENT:  SELECT walmirror.pack");
    let said = said.lines().filter(is_of_pack).count();
    assert!(said <= 1, "{said} ERROR lines in the log of Postgres");
}

/// Where event triggers are off, a label may come not to fit its table. The other tables go on, and its keys stay until it is mended.
#[test]
fn a_label_that_does_not_fit_concerns_its_table_alone() {
    let m = Mirror::with(
        "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE u (LIKE t INCLUDING ALL); INSERT INTO t VALUES (1, 'v'); \
         SELECT walmirror.mirror('t', columns => '{v}'), walmirror.mirror('u')",
    );
    m.sql(
        "ALTER EVENT TRIGGER walmirror_ddl_command_end DISABLE; ALTER TABLE t RENAME v TO w; \
         ALTER EVENT TRIGGER walmirror_ddl_command_end ENABLE ALWAYS; INSERT INTO t VALUES (2, 'v'); INSERT INTO u VALUES (1, 'v')",
    );
    m.sink(|sink| {
        sink.kill();
        sink.restart();
    });
    m.sync();
    wait_for(DEADLINE, "the sink to tell", || {
        m.sink(|sink| {
            sink.output()
                .contains("the label of the table public.t does not fit it")
        })
        .then_some(())
    });
    let (code, told) = m.run(&["doctor"]);
    assert_eq!(code, Some(3), "{told}");
    assert!(
        told.contains("FAIL  labels                   the label of the table public.t does not fit it")
            && told.contains("next: SELECT walmirror.unmirror('public.t')"),
        "{told}"
    );
    let (_, told) = m.run(&["status"]);
    let marked: Vec<&str> = told
        .lines()
        .filter(|line| line.contains("NOT MIRRORED"))
        .collect();
    assert!(
        marked.len() == 1 && marked[0].contains("table        public.t "),
        "{told}"
    );
    assert_eq!(m.redis.keys(), ["t:1", "u:1"]);
    is_told_of_once(&m);
    let (code, output) = m.run(&["verify"]);
    assert_eq!(code, Some(2), "{output}");
    assert!(output.contains("walmirror.unmirror('public.t')"), "{output}");
    let (code, output) = m.run(&["verify", "--table", "u"]);
    assert_eq!(code, Some(0), "{output}");
    // The story: `backfill` asked for such a table, and waited for ever.
    let (code, output) = m.run(&["backfill", "--table", "t"]);
    assert_eq!(code, Some(2), "{output}");
    assert!(output.contains("walmirror.unmirror('public.t')"), "{output}");
    let (code, output) = m.run(&["backfill"]);
    assert_eq!(code, Some(2), "{output}");
    assert!(
        output.contains("public.u: filled again") && output.contains("walmirror.unmirror('public.t')"),
        "{output}"
    );
    m.sql("SELECT walmirror.unmirror('t'); SELECT walmirror.mirror('t')");
    m.settle();
}

/// The story: keys of a table whose label had come not to fit were "extra" to `verify` of another one, whose template takes them without it.
#[test]
fn keys_of_a_label_that_does_not_fit_are_no_other_tables() {
    let m = Mirror::with(
        "CREATE TABLE t (id text PRIMARY KEY); CREATE TABLE u (id int PRIMARY KEY, v text); \
         SELECT walmirror.mirror('t', key => 'user:{id}'), walmirror.mirror('u', key => 'user:admin:{id}', columns => '{v}'); \
         INSERT INTO t VALUES ('1'); INSERT INTO u VALUES (7, 'v')",
    );
    m.sql(
        "ALTER EVENT TRIGGER walmirror_ddl_command_end DISABLE; ALTER TABLE u RENAME v TO w; \
         ALTER EVENT TRIGGER walmirror_ddl_command_end ENABLE ALWAYS; INSERT INTO t VALUES ('2')",
    );
    m.sync();
    m.sink(|sink| {
        sink.kill();
        sink.restart();
    });
    m.sync();
    assert_eq!(m.redis.keys(), ["user:1", "user:2", "user:admin:7"]);
    let (code, output) = m.run(&["verify", "--table", "t"]);
    assert_eq!(code, Some(0), "{output}");
    // What is really too much is told.
    let _: i64 = m.redis.command("HSET user:3 id 3");
    let (code, output) = m.run(&["verify", "--table", "t"]);
    assert_eq!(code, Some(1), "{output}");
    assert!(
        output.contains("1 extra") && output.contains("user:3"),
        "{output}"
    );
    m.sql("SELECT walmirror.unmirror('u')");
    m.redis.command::<i64>("DEL user:3");
    m.settle();
}

/// What is done to such a table is not told; once its label fits again, however that came about, it is made anew.
#[test]
fn a_label_that_fits_again_makes_the_table_anew() {
    let m = Mirror::with(
        "CREATE TABLE a (id int PRIMARY KEY, v text); CREATE TABLE b (LIKE a INCLUDING ALL); CREATE TABLE c (LIKE a INCLUDING ALL); \
         INSERT INTO a SELECT i, 'v' FROM generate_series(1, 20) i; INSERT INTO b TABLE a; INSERT INTO c TABLE a; \
         SELECT walmirror.mirror('a', columns => '{v}'), walmirror.mirror('b', columns => '{v}'), walmirror.mirror('c')",
    );
    // The stream has named them, and need not do so again.
    m.sql("UPDATE a SET v = 'x' WHERE id = 7; UPDATE b SET v = 'x' WHERE id = 7");
    m.sync();
    let unseen = |m: &Mirror, ddl: &str| {
        m.sql(&format!(
            "ALTER EVENT TRIGGER walmirror_ddl_command_end DISABLE; {ddl}; ALTER EVENT TRIGGER walmirror_ddl_command_end ENABLE ALWAYS"
        ));
    };
    let changes = "DELETE FROM a WHERE id < 5; UPDATE a SET w = 'w' WHERE id > 15; INSERT INTO a VALUES (30, 'v'); \
                   DELETE FROM b WHERE id < 5; UPDATE b SET w = 'w' WHERE id > 15; INSERT INTO b VALUES (30, 'v')";
    unseen(&m, "ALTER TABLE a RENAME v TO w; ALTER TABLE b RENAME v TO w");
    m.sql(changes);
    m.sync();
    // One is announced when it fits again, the other is not.
    m.sql("ALTER TABLE a RENAME w TO v");
    unseen(&m, "ALTER TABLE b RENAME w TO v");
    m.sql("INSERT INTO b VALUES (31, 'v')");
    m.settle();
    // It is so while nobody looks, and where everything is to be made anew: the other tables do not wait for it.
    m.sink(Sink::terminate);
    unseen(&m, "ALTER TABLE a RENAME v TO w");
    m.sql("DELETE FROM c WHERE id < 10; SELECT pg_drop_replication_slot(current_database())");
    m.sink(Sink::restart);
    wait_for(DEADLINE, "the last table to be made anew", || {
        let held = m.redis.keys();
        (held.iter().filter(|key| key.starts_with("c:")).count() == 11).then_some(())
    });
    m.sql("DELETE FROM a WHERE id < 10");
    unseen(&m, "ALTER TABLE a RENAME w TO v");
    m.sql("INSERT INTO a VALUES (31, 'v')");
    m.settle();
}

/// The story: what SQL read of such a table was left out again and again, until a row in the stream told of the change. Where a key was read
/// again, it was taken for one without a row.
#[test]
fn a_change_that_was_not_announced_is_found_when_the_table_is_read() {
    let m = Mirror::with(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'v'); SELECT walmirror.mirror('t')",
    );
    m.settle();
    m.sql(
        "ALTER EVENT TRIGGER walmirror_ddl_command_end DISABLE; ALTER TABLE t ADD w int DEFAULT 7; \
         ALTER EVENT TRIGGER walmirror_ddl_command_end ENABLE ALWAYS; \
         SELECT pg_logical_emit_message(false, 'walmirror.marker', format('%s:reread:%s:3:t:1', current_database(), 't'::regclass::oid))",
    );
    let w = ("w".to_owned(), "7".to_owned());
    wait_for(DEADLINE, "the new column", || {
        m.redis.hash("t:1").contains(&w).then_some(())
    });
    m.settle();
}
