//! Random statements over random mappings with random kills: whatever the order, Redis equals Postgres in the end.
//!
//! `SEED=… make test ARGS='-p walmirror-tests --test random'` repeats a run: the statements are the same, their timing
//! against the sink is not.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use rand::Rng;
use rand::rngs::StdRng;
use walmirror_tests::{Mirror, Sink, rng};

const TABLES: [&str; 3] = ["a", "b", "c"];

#[test]
fn random_statements_labels_alters_and_kills() {
    let m = Mirror::new();
    let mut rng = rng("random_statements_labels_alters_and_kills");
    for table in TABLES {
        m.sql(&format!(
            "CREATE TABLE {table} (id int PRIMARY KEY, n int, v text, doc text); ALTER TABLE {table} ALTER doc SET STORAGE EXTERNAL; \
             INSERT INTO {table} SELECT i, i, 't' || i, CASE WHEN i % 3 = 0 THEN repeat(md5(i::text), 100) END FROM generate_series(1, 300) i; \
             SELECT walmirror.mirror('{table}')"
        ));
    }
    m.start();
    for round in 0..25 {
        for _ in 0..rng.random_range(5..40) {
            let statement = statement(&mut rng);
            // Some statements fail by themselves (a key that is taken, a column that is there): that is part of it.
            if let Err(e) = m.db.connect().batch_execute(&statement) {
                let code = e
                    .as_db_error()
                    .map(|e| e.code().code().to_owned())
                    .unwrap_or_default();
                assert!(
                    ["23505", "42701", "42703", "55000", "42704", "0A000"].contains(&code.as_str()),
                    "{statement}: {e:?}"
                );
            }
        }
        if rng.random_bool(0.4) {
            m.sink(|sink| {
                sink.assert_running();
                sink.kill();
                sink.restart();
            });
        }
        if round % 3 == 2 {
            m.settle();
        }
    }
    m.sink(Sink::assert_running);
    let report = m.settle();
    println!("{} rows equal", report.rows);
}

/// One or a few statements, sometimes as one transaction, sometimes one that is rolled back.
fn statement(rng: &mut StdRng) -> String {
    let count = if rng.random_bool(0.3) {
        rng.random_range(2..6)
    } else {
        1
    };
    let mut all: Vec<String> = (0..count).map(|_| single(rng)).collect();
    if count > 2 && rng.random_bool(0.5) {
        all.insert(1, "SAVEPOINT x".to_owned());
        all.insert(3, "ROLLBACK TO x".to_owned());
    }
    match count {
        1 => all.remove(0),
        _ if rng.random_bool(0.15) => format!("BEGIN; {}; ROLLBACK", all.join("; ")),
        _ => format!("BEGIN; {}; COMMIT", all.join("; ")),
    }
}

fn single(rng: &mut StdRng) -> String {
    let t = TABLES[rng.random_range(0..TABLES.len())];
    let id = rng.random_range(1..400);
    let n = rng.random_range(0..1000);
    match rng.random_range(0..30) {
        0..=5 => format!("UPDATE {t} SET n = {n} WHERE id = {id}"),
        6..=8 => format!(
            "INSERT INTO {t} (id, n, v, doc) VALUES ({id}, {n}, 'new', repeat('{n}', {n} * 5)) ON CONFLICT (id) DO UPDATE SET n = excluded.n"
        ),
        9..=11 => format!(
            "UPDATE {t} SET v = 'multi {n}', n = n + 1 WHERE id % 7 = {}",
            n % 7
        ),
        12 | 13 => format!("DELETE FROM {t} WHERE id BETWEEN {id} AND {id} + 5"),
        14 | 15 => format!("UPDATE {t} SET id = id + 1000 WHERE id = {id}"),
        16 => format!(
            "UPDATE {t} SET id = id - 1000 WHERE id > 1000 AND id % 5 = {}",
            n % 5
        ),
        17 => format!("UPDATE {t} SET doc = repeat(md5('{n}'), 90) WHERE id BETWEEN {id} AND {id} + 10"),
        18 => format!("UPDATE {t} SET doc = NULL WHERE id = {id}"),
        19 => format!(
            "INSERT INTO {t} (id, n) SELECT i, {n} FROM generate_series(2000 + {id}, 2050 + {id}) i ON CONFLICT DO NOTHING"
        ),
        20 if rng.random_bool(0.3) => format!("TRUNCATE {t}"),
        21 => format!("SELECT walmirror.mirror('{t}')"),
        22 => format!("SELECT walmirror.mirror('{t}', value => 'json')"),
        23 => format!("SELECT walmirror.mirror('{t}', key => '{t}/{{id}}', columns => '{{n,doc}}')"),
        24 => {
            format!("SELECT walmirror.mirror('{t}', value => 'string', columns => '{{doc}}', ttl => '1 day')")
        }
        25 if rng.random_bool(0.4) => format!("SELECT walmirror.unmirror('{t}')"),
        26 => format!("ALTER TABLE {t} ADD COLUMN extra int DEFAULT {n}"),
        27 => format!("ALTER TABLE {t} DROP COLUMN extra"),
        28 => format!(
            "ALTER TABLE {t} ALTER n TYPE {}",
            if n % 2 == 0 { "bigint" } else { "int" }
        ),
        29 => format!("ALTER TABLE {t} ALTER v TYPE text USING v || '.'"),
        _ => format!("UPDATE {t} SET n = NULL WHERE id = {id}"),
    }
}
