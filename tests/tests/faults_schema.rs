//! What SQL itself does to the stream: schema changes while nobody reads, transactions that are large, spilled, prepared or
//! half rolled back.
//!
//! More of it in labels.rs (every kind of ALTER TABLE while the sink is up), dml.rs (prepared transactions), toast.rs and
//! keys.rs (replica identities).

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::time::Duration;

use rand::Rng;
use rand::seq::SliceRandom;
use walmirror_tests::{Mirror, Scenario, Setup, Sink, gap, rng};

/// Schema changes, each possible whatever was done before, and rows around them.
const CHANGES: [&str; 22] = [
    "ALTER TABLE t ADD IF NOT EXISTS c text; UPDATE t SET c = 'canary' || id WHERE id % 3 = 0",
    "ALTER TABLE t ADD IF NOT EXISTS d int DEFAULT 5",
    "ALTER TABLE t DROP COLUMN IF EXISTS c",
    "ALTER TABLE t DROP COLUMN IF EXISTS d; ALTER TABLE t ADD d text DEFAULT 'canary'",
    "DO $$ BEGIN ALTER TABLE t RENAME note TO remark; EXCEPTION WHEN undefined_column THEN ALTER TABLE t RENAME remark TO note; END $$",
    "ALTER TABLE t ALTER n TYPE bigint; UPDATE t SET n = n + 1 WHERE id < 50",
    "ALTER TABLE t ALTER n TYPE numeric; UPDATE t SET n = n + 1 WHERE id < 20",
    "ALTER TABLE t ALTER n TYPE int",
    "ALTER TABLE t ADD IF NOT EXISTS g int GENERATED ALWAYS AS (id * 2) STORED",
    "ALTER TABLE t DROP COLUMN IF EXISTS g",
    "ALTER TABLE t REPLICA IDENTITY FULL; DELETE FROM t WHERE id = 7; UPDATE t SET id = 9007 WHERE id = 8",
    "ALTER TABLE t REPLICA IDENTITY DEFAULT; DELETE FROM t WHERE id = 9; UPDATE t SET id = 9009 WHERE id = 10",
    "BEGIN; ALTER TABLE t ADD never int; UPDATE t SET never = 1; ROLLBACK",
    "BEGIN; TRUNCATE t; INSERT INTO t (id, n) SELECT i, -i FROM generate_series(1, 80) i; COMMIT",
    "VACUUM FULL t",
    "CREATE TABLE IF NOT EXISTS q3 PARTITION OF q FOR VALUES IN (3); INSERT INTO q VALUES (3, 1, 'canary') ON CONFLICT DO NOTHING",
    "ALTER TABLE q DETACH PARTITION q1; UPDATE q1 SET v = 'canary apart'; ALTER TABLE q ATTACH PARTITION q1 FOR VALUES IN (1)",
    "TRUNCATE q2; INSERT INTO q VALUES (2, 1, 'canary after truncate')",
    "DROP TABLE IF EXISTS gone; CREATE TABLE gone (id int PRIMARY KEY); SELECT walmirror.mirror('gone'); INSERT INTO gone VALUES (1), (2)",
    "DROP TABLE IF EXISTS gone",
    "SELECT walmirror.unmirror('u'); UPDATE u SET v = 'canary unseen'; SELECT walmirror.mirror('u', value => 'json')",
    "SELECT walmirror.mirror('u', key => 'u2:{id}'); UPDATE u SET v = 'canary seen'",
];

/// In any order, while no sink runs, and with sinks that are killed in the middle of making it good.
#[test]
fn schema_changes_while_the_sink_is_down() {
    let mut rng = rng("schema_changes_while_the_sink_is_down");
    let m = Mirror::with(
        "CREATE TABLE t (id int PRIMARY KEY, n int NOT NULL, note text); \
         INSERT INTO t SELECT i, i, 'canary' || i FROM generate_series(1, 300) i; \
         CREATE TABLE q (part int, id int, v text, PRIMARY KEY (part, id)) PARTITION BY LIST (part); \
         CREATE TABLE q1 PARTITION OF q FOR VALUES IN (1); CREATE TABLE q2 PARTITION OF q FOR VALUES IN (2); \
         INSERT INTO q SELECT 1 + i % 2, i, 'canary' FROM generate_series(1, 100) i; \
         CREATE TABLE u (id int PRIMARY KEY, v text); INSERT INTO u SELECT i, 'canary' FROM generate_series(1, 100) i; \
         SELECT walmirror.mirror('t'), walmirror.mirror('q'), walmirror.mirror('u')",
    );
    for round in 0..8 {
        m.sink(if round % 2 == 0 {
            |sink: &mut Sink| {
                sink.terminate();
            }
        } else {
            Sink::kill
        });
        let mut changes = CHANGES;
        changes.shuffle(&mut rng);
        for change in &changes[..rng.random_range(1..8)] {
            println!("{change}");
            // One after the other: VACUUM wants no transaction around it.
            if change.contains("$$") || change.starts_with("BEGIN") {
                m.sql(change);
            } else {
                change.split("; ").for_each(|statement| m.sql(statement));
            }
        }
        m.sink(Sink::restart);
        if round % 3 == 2 {
            std::thread::sleep(Duration::from_millis(rng.random_range(20..150)));
            m.sink(|sink| {
                sink.kill();
                sink.restart();
            });
        }
        m.settle();
    }
    // It was made good, and not by making everything anew.
    let log = m.sink(|sink| sink.output());
    assert_eq!(gap(&log), None);
    m.check_logs(&[], "canary");
}

/// Everything comes in parts, or is spilled, changes of subtransactions that are rolled back among it.
fn with_64_kb_of_decoding_memory(test: &str, streaming: &str, counter: &str) {
    let setup = Setup::default().args(&["--streaming", streaming]);
    let s = Scenario::start(test, setup);
    s.kill_sink();
    s.flow();
    for round in 0..3 {
        s.m.sql(&format!(
            "BEGIN; INSERT INTO item SELECT i, 0, 'kept', repeat('k', 3000) FROM generate_series(5000, 6000) i; \
             SAVEPOINT a; UPDATE item SET note = 'never', big = repeat('n', 4000) WHERE id >= 5000; ROLLBACK TO a; \
             SAVEPOINT b; UPDATE item SET n = n + 1 WHERE id >= 5500; RELEASE b; \
             DELETE FROM item WHERE id >= 5000 AND id % 2 = {round} % 2; COMMIT; \
             BEGIN; UPDATE item SET id = id + 10000 * ({round} + 1) WHERE id BETWEEN 5000 AND 6000; COMMIT"
        ));
        s.kill_sink();
        s.flow();
    }
    let counted =
        format!("SELECT sum({counter}) FROM pg_stat_replication_slots WHERE slot_name = current_database()");
    assert_ne!(s.m.db.value(&counted), "0");
    s.finish(&[]);
}

#[test]
fn in_progress_with_64_kb_of_decoding_memory() {
    with_64_kb_of_decoding_memory("in_progress_with_64_kb_of_decoding_memory", "on", "stream_count");
}

#[test]
fn spilled_with_64_kb_of_decoding_memory() {
    with_64_kb_of_decoding_memory("spilled_with_64_kb_of_decoding_memory", "off", "spill_count");
}

/// The rows of a large table, or of a large transaction.
fn large_rows() -> u64 {
    std::env::var("LARGE_ROWS").map_or(200_000, |text| text.parse().expect("LARGE_ROWS is a number"))
}

fn large() -> Setup {
    Setup {
        writers: (1, Duration::from_millis(5)),
        ..Setup::alone("max_wal_size = 8GB")
    }
}

/// One transaction of `LARGE_ROWS` rows (10 million by hand), rolled back in part, with the sink killed in the middle of it.
/// Memory is bounded on the way.
#[test]
fn a_large_transaction() {
    let rows = large_rows();
    let mut s = Scenario::start("a_large_transaction", large());
    // A transaction that is too large for one EXEC is applied in steps: the accounts are in none of them.
    s.m.sql(&format!(
        "CREATE TABLE large (id int PRIMARY KEY, v text); SELECT walmirror.mirror('large'); \
         BEGIN; INSERT INTO large SELECT i, 'row ' || i FROM generate_series(1, {rows}) i; \
         SAVEPOINT a; DELETE FROM large WHERE id % 2 = 0; ROLLBACK TO a; \
         UPDATE large SET v = 'changed' WHERE id % 10 = 0; COMMIT"
    ));
    std::thread::sleep(Duration::from_millis(s.rng.random_range(100..1500)));
    s.kill_sink();
    s.load.rest();
    s.m.settle_within(Duration::from_secs(120 + rows / 5_000));
    let (_, memory) = s.m.sink(|sink| sink.memory());
    println!("{rows} rows, {} MB at most", memory >> 20);
    // Ten million rows are more WAL than a slot may keep without a word.
    s.finish(&["the slot keeps"]);
}

/// What is done to a whole table of `LARGE_ROWS` rows (millions by hand) takes no more memory than what is done to a row.
#[test]
fn a_large_table() {
    let rows = large_rows();
    let s = Scenario::start("a_large_table", large());
    s.m.sql(&format!(
        "CREATE TABLE large (id int PRIMARY KEY, v text); INSERT INTO large SELECT i, 'row ' || i FROM generate_series(1, {rows}) i"
    ));
    let steps = [
        "SELECT walmirror.mirror('large')",
        "UPDATE large SET v = 'changed' WHERE id % 2 = 0",
        "SELECT walmirror.mirror('large', key => 'other:{id}')",
        "ALTER TABLE large ADD w int",
        "DELETE FROM large WHERE id % 3 = 0",
        "SELECT walmirror.mirror('large', value => 'json')",
        "ALTER TABLE large ALTER w TYPE bigint; UPDATE large SET w = 1",
        "SELECT walmirror.unmirror('large')",
        "SELECT walmirror.mirror('large')",
        "TRUNCATE large",
    ];
    for step in steps {
        s.m.sql(step);
        s.load.rest();
        s.m.settle_within(Duration::from_secs(120 + rows / 5_000));
        s.load.resume();
        let (_, memory) = s.m.sink(|sink| sink.memory());
        println!("{} MB at most after {step}", memory >> 20);
    }
    s.finish(&["the slot keeps"]);
}
