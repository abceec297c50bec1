//! Every way to write a row, and Redis equal to Postgres after each.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::io::Write;
use std::time::Duration;

use postgres::Client;
use walmirror_tests::{Mirror, Sink, wait_for};

/// Three tables with the same columns, one of each value kind. `{t}` in a statement stands for each of them.
fn tables() -> Mirror {
    let mirror = Mirror::new();
    each(
        &mirror,
        "CREATE TABLE {t} (id int PRIMARY KEY, name text, qty int, price numeric(12,2), at timestamptz)",
    );
    mirror.sql("SELECT walmirror.mirror('h')");
    mirror.sql("SELECT walmirror.mirror('j', value => 'json')");
    mirror.sql("SELECT walmirror.mirror('s', value => 'string', columns => '{name}')");
    each(
        &mirror,
        "INSERT INTO {t} SELECT i, 'name ' || i, i % 10, i * 1.25, '2026-01-01 00:00:00+00'::timestamptz + i * interval '1 hour' \
         FROM generate_series(1, 200) i",
    );
    mirror.start();
    mirror.settle();
    mirror
}

fn each(mirror: &Mirror, statement: &str) {
    for table in ["h", "j", "s"] {
        mirror.sql(&statement.replace("{t}", table));
    }
}

/// Executes the statements for each table, and compares after each.
fn run(mirror: &Mirror, statements: &[&str]) {
    for statement in statements {
        each(mirror, statement);
        mirror.check();
    }
}

#[test]
fn insert_update_and_delete_with_every_kind_of_where() {
    let m = tables();
    run(
        &m,
        &[
            "INSERT INTO {t} VALUES (1001, 'one', 1, 1.10, now())",
            "INSERT INTO {t} (id) VALUES (1002), (1003), (1004)",
            "INSERT INTO {t} SELECT id + 2000, upper(name), qty, NULL, at FROM {t} WHERE id BETWEEN 10 AND 20",
            "UPDATE {t} SET qty = qty + 1 WHERE id = 7",
            "UPDATE {t} SET name = NULL WHERE id IN (8, 9, 10)",
            "UPDATE {t} SET name = '' WHERE name IS NULL",
            "UPDATE {t} SET name = 'Ünïcode \u{1F600} ' || chr(10) || chr(9) || '\"\\' WHERE id < 5 OR qty = 3 AND price > 100",
            "UPDATE {t} SET price = price * 2, at = NULL WHERE name LIKE 'name 1%'",
            "UPDATE {t} SET qty = 0 WHERE id = ANY (ARRAY[30, 31, 32]) OR EXISTS (SELECT FROM {t} u WHERE u.id = {t}.id + 1 AND u.qty = 5)",
            "UPDATE {t} SET name = x.n FROM (VALUES (40, 'forty'), (41, 'forty-one')) x(i, n) WHERE id = x.i",
            "UPDATE {t} a SET qty = b.qty FROM {t} b WHERE b.id = a.id + 1 AND a.id BETWEEN 50 AND 60",
            "UPDATE {t} SET (name, qty) = (SELECT 'sub', count(*) FROM {t}) WHERE id = 61",
            "DELETE FROM {t} WHERE id = 1001",
            "DELETE FROM {t} USING (VALUES (70), (71)) d(i) WHERE id = d.i",
            "DELETE FROM {t} WHERE id IN (SELECT id FROM {t} ORDER BY price DESC NULLS LAST LIMIT 5)",
            "WITH gone AS (DELETE FROM {t} WHERE id BETWEEN 80 AND 90 RETURNING *) \
               INSERT INTO {t} SELECT id + 5000, name, qty, price, at FROM gone",
            "WITH up AS (UPDATE {t} SET qty = 99 WHERE id = 100 RETURNING id), new AS (INSERT INTO {t} VALUES (6000) RETURNING id) \
               DELETE FROM {t} USING up WHERE {t}.id = up.id + 1",
            "BEGIN; DECLARE c CURSOR FOR SELECT * FROM {t} WHERE id = 110 FOR UPDATE; FETCH c; \
               UPDATE {t} SET name = 'where current of' WHERE CURRENT OF c; COMMIT",
            "UPDATE {t} SET name = name",
            "DELETE FROM {t}",
            "INSERT INTO {t} VALUES (1, 'again', 1, 1, now())",
        ],
    );
}

#[test]
fn on_conflict_and_merge() {
    let m = tables();
    run(
        &m,
        &[
            "INSERT INTO {t} VALUES (1, 'new', 1, 1, NULL) ON CONFLICT (id) DO UPDATE SET name = excluded.name, qty = {t}.qty + 1",
            "INSERT INTO {t} VALUES (2, 'not taken'), (3001, 'taken') ON CONFLICT DO NOTHING",
            "INSERT INTO {t} SELECT i, 'upsert', i FROM generate_series(190, 210) i \
               ON CONFLICT (id) DO UPDATE SET name = excluded.name WHERE {t}.id % 2 = 0",
        ],
    );
    if m.db.pg.version() < 15 {
        println!("not on this version: Postgres {} has no MERGE", m.db.pg.version());
        return;
    }
    run(
        &m,
        &[
            "MERGE INTO {t} USING (SELECT i, i % 3 AS k FROM generate_series(150, 260) i) n ON {t}.id = n.i \
               WHEN MATCHED AND n.k = 0 THEN DELETE \
               WHEN MATCHED AND n.k = 1 THEN UPDATE SET name = 'merged' \
               WHEN MATCHED THEN DO NOTHING \
               WHEN NOT MATCHED AND n.k <> 2 THEN INSERT (id, name) VALUES (n.i, 'merged in')",
        ],
    );
}

#[test]
fn copy() {
    let m = tables();
    let mut client = m.db.connect();
    for table in ["h", "j", "s"] {
        let mut copy = client
            .copy_in(&format!("COPY {table} (id, name, qty) FROM STDIN"))
            .unwrap();
        for id in 10_000..15_000 {
            writeln!(copy, "{id}\tcopied {id}\t\\N").unwrap();
        }
        copy.finish().unwrap();
    }
    m.check();
    // A COPY that breaks off leaves nothing behind.
    let mut copy = client.copy_in("COPY h (id, name) FROM STDIN").unwrap();
    copy.write_all(b"20001\tgood\nbad\tline\n").unwrap();
    assert!(copy.finish().is_err());
    // A bulk load into a table made in the same transaction.
    m.sql(
        "BEGIN; CREATE TABLE fresh (id int PRIMARY KEY, v text); SELECT walmirror.mirror('fresh'); \
         INSERT INTO fresh SELECT i, 'v' FROM generate_series(1, 3000) i; COMMIT",
    );
    m.settle();
}

#[test]
fn triggers_and_foreign_keys() {
    let m = tables();
    m.sql(
        "CREATE TABLE parent (id int PRIMARY KEY, total int NOT NULL DEFAULT 0, touched timestamptz); \
         CREATE TABLE child (id int PRIMARY KEY, parent_id int REFERENCES parent ON DELETE CASCADE ON UPDATE CASCADE, n int); \
         CREATE TABLE optional (id int PRIMARY KEY, parent_id int REFERENCES parent ON DELETE SET NULL ON UPDATE SET NULL); \
         CREATE FUNCTION before_row() RETURNS trigger LANGUAGE plpgsql AS \
           $$ BEGIN NEW.touched := '2026-01-01 12:00+00'; IF NEW.id = 13 THEN RETURN NULL; END IF; RETURN NEW; END $$; \
         CREATE FUNCTION after_row() RETURNS trigger LANGUAGE plpgsql AS \
           $$ BEGIN UPDATE parent SET total = total + NEW.n WHERE id = NEW.parent_id; RETURN NULL; END $$; \
         CREATE TRIGGER b BEFORE INSERT OR UPDATE ON parent FOR EACH ROW EXECUTE FUNCTION before_row(); \
         CREATE TRIGGER a AFTER INSERT ON child FOR EACH ROW EXECUTE FUNCTION after_row(); \
         SELECT walmirror.mirror('parent'), walmirror.mirror('child', value => 'json'), walmirror.mirror('optional')",
    );
    m.settle();
    for statement in [
        "INSERT INTO parent (id) VALUES (1), (2), (13), (3)",
        "INSERT INTO child SELECT i, i % 3 + 1, i FROM generate_series(1, 60) i",
        "INSERT INTO optional SELECT i, i FROM generate_series(1, 3) i",
        "UPDATE parent SET id = 20 WHERE id = 2",
        "DELETE FROM parent WHERE id = 1",
        "UPDATE parent SET id = id + 100",
    ] {
        m.sql(statement);
        m.check();
    }
}

#[test]
fn savepoints_and_aborted_subtransactions() {
    let m = tables();
    run(
        &m,
        &[
            "BEGIN; UPDATE {t} SET name = 'kept' WHERE id = 1; SAVEPOINT a; UPDATE {t} SET name = 'lost' WHERE id = 1; \
               INSERT INTO {t} (id) VALUES (7001); ROLLBACK TO a; UPDATE {t} SET qty = 7 WHERE id = 1; COMMIT",
            "BEGIN; SAVEPOINT a; DELETE FROM {t} WHERE id < 20; SAVEPOINT b; DELETE FROM {t} WHERE id < 40; \
               ROLLBACK TO b; RELEASE a; COMMIT",
            "BEGIN; SAVEPOINT a; TRUNCATE {t}; ROLLBACK TO a; UPDATE {t} SET qty = -1 WHERE id = 100; COMMIT",
            "BEGIN; DELETE FROM {t}; ROLLBACK",
            "DO $$ BEGIN FOR i IN 1..100 LOOP BEGIN \
               UPDATE {t} SET qty = i WHERE id = 100 + i; \
               IF i % 3 = 0 THEN RAISE EXCEPTION 'no'; END IF; \
             EXCEPTION WHEN raise_exception THEN NULL; END; END LOOP; END $$",
            "DO $$ BEGIN FOR i IN 1..5 LOOP UPDATE {t} SET qty = i WHERE id = 150; \
               IF i = 3 THEN ROLLBACK; ELSE COMMIT; END IF; END LOOP; END $$",
        ],
    );
    // More changes than a reorder buffer keeps in memory, half of them rolled back.
    m.sql(
        "BEGIN; INSERT INTO h SELECT i FROM generate_series(100000, 130000) i; SAVEPOINT a; \
         INSERT INTO h SELECT i FROM generate_series(200000, 230000) i; ROLLBACK TO a; \
         DELETE FROM h WHERE id % 2 = 0; COMMIT",
    );
    m.check();
}

#[test]
fn prepared_transactions() {
    let m = tables();
    let mut other = m.db.connect();
    let gid = |n: u32| format!("'{}-{n}'", m.db.name);
    let mut execute = |sql: String| {
        other
            .batch_execute(&sql)
            .unwrap_or_else(|e| panic!("{sql}: {e:?}"))
    };
    execute(format!(
        "BEGIN; UPDATE h SET name = 'prepared' WHERE id < 10; PREPARE TRANSACTION {}",
        gid(1)
    ));
    execute(format!(
        "BEGIN; INSERT INTO j (id) VALUES (8001); PREPARE TRANSACTION {}",
        gid(2)
    ));
    m.sql("UPDATE s SET name = 'between'");
    m.check();
    execute(format!("COMMIT PREPARED {}", gid(1)));
    m.check();
    execute(format!("ROLLBACK PREPARED {}", gid(2)));
    m.sql("INSERT INTO j (id) VALUES (8001)");
    m.check();
    // The sink does not see the commit happen.
    execute(format!(
        "BEGIN; DELETE FROM h WHERE id > 100; PREPARE TRANSACTION {}",
        gid(3)
    ));
    m.sink(Sink::kill);
    execute(format!("COMMIT PREPARED {}", gid(3)));
    m.sink(Sink::restart);
    m.check();
}

#[test]
fn truncate() {
    let m = tables();
    m.sql(
        "CREATE TABLE top (id serial PRIMARY KEY, v text); \
         CREATE TABLE sub (id serial PRIMARY KEY, top_id int REFERENCES top); \
         SELECT walmirror.mirror('top'), walmirror.mirror('sub')",
    );
    m.sql("INSERT INTO top (v) SELECT 'x' FROM generate_series(1, 50); INSERT INTO sub (top_id) SELECT id FROM top");
    m.settle();
    m.sql("TRUNCATE h");
    assert_eq!(
        m.check().tables.iter().find(|t| t.0.ends_with(".h")).unwrap().1,
        0
    );
    m.sql("TRUNCATE top RESTART IDENTITY CASCADE");
    m.check();
    m.sql("INSERT INTO top (v) VALUES ('after')");
    m.check();
    assert_eq!(
        m.redis.hash("top:1"),
        [("id".into(), "1".into()), ("v".into(), "after".into())]
    );
    m.sql("BEGIN; INSERT INTO j (id) VALUES (9001); TRUNCATE j, s; INSERT INTO j (id) VALUES (9002); COMMIT");
    m.check();
    assert_eq!(m.redis.keys(), ["j:9002", "top:1"]);
    m.sql("BEGIN; INSERT INTO h (id) VALUES (1); SAVEPOINT a; TRUNCATE h; ROLLBACK TO a; COMMIT");
    m.check();
}

#[test]
fn concurrent_writers() {
    let m = tables();
    std::thread::scope(|scope| {
        for worker in 0..4 {
            let mut client = m.db.connect();
            scope.spawn(move || hammer(&mut client, worker));
        }
    });
    m.check();
}

fn hammer(client: &mut Client, worker: i32) {
    for i in 0..300 {
        let id = (i * 7 + worker * 13) % 200 + 1;
        let sql = match i % 4 {
            0 => format!("UPDATE h SET qty = qty + 1, name = 'w{worker} {i}' WHERE id = {id}"),
            1 => {
                format!("INSERT INTO h VALUES ({id}, 'again') ON CONFLICT (id) DO UPDATE SET qty = h.qty - 1")
            }
            2 => format!("DELETE FROM h WHERE id = {id}"),
            _ => format!(
                "BEGIN; UPDATE h SET qty = {i} WHERE id = {id}; UPDATE j SET qty = {i} WHERE id = {id}; COMMIT"
            ),
        };
        client.batch_execute(&sql).unwrap();
    }
}

/// The sink must not hold a transaction in memory as the server does.
#[test]
fn one_million_rows_in_one_transaction_in_bounded_memory() {
    let m = Mirror::alone("");
    m.sql("CREATE TABLE big (id int PRIMARY KEY, name text, n int); SELECT walmirror.mirror('big')");
    m.start();
    m.settle();
    let long = Duration::from_secs(180);
    m.sql("INSERT INTO big SELECT i, 'row number ' || i, i % 1000 FROM generate_series(1, 1000000) i");
    m.sync_within(long);
    let (_, highest) = m.sink(|sink| sink.memory());
    println!("highest resident memory of the sink: {} MiB", highest >> 20);
    assert!(highest < 100 << 20, "the sink used {} MiB", highest >> 20);
    assert_eq!(m.check().rows, 1_000_000);
    m.sql("DELETE FROM big WHERE id % 1000 <> 0");
    m.sync_within(long);
    assert_eq!(m.check().rows, 1000);
    // A transaction as large that is rolled back costs nothing and stops nothing.
    m.sql("BEGIN; UPDATE big SET n = n + 1; INSERT INTO big SELECT -i FROM generate_series(1, 200000) i; ROLLBACK");
    m.sql("UPDATE big SET n = 5");
    m.check();
    let rss = wait_for(long, "memory", || m.sink(|sink| Some(sink.memory().0)));
    println!("resident memory at the end: {} MiB", rss >> 20);
}
