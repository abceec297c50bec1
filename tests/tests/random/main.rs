//! Random statements over random mappings with random kills: whatever the order, the server does not crash, and Redis equals
//! Postgres in the end. `generator` says what is drawn from.
//!
//! `SEED=… make test ARGS='-p walmirror-tests --test random'` repeats a run: the statements of each session are the same, their
//! timing against those of the others and against the sink is not. `RANDOM_SECONDS=3600` for longer.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod generator;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use postgres::Client;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use walmirror_tests::{Mirror, Sink, rng};

use generator::{MENDS, SETTINGS, TABLES, Transaction, changes, transaction};

/// Internal errors of a server without any extension, most of them of two schema changes at once.
const CLASHES: [&str; 6] = [
    "tuple concurrently",
    "could not open relation with OID",
    "cache lookup failed",
    "could not find tuple for",
    "missing partition",
    // Of a savepoint behind ALTER DOMAIN … DROP CONSTRAINT IF EXISTS.
    "unprocessed inval messages",
];
/// What a sink must not say: nothing was taken away from it, and no row or table of these is one that cannot be mirrored.
const NEVER: [&str; 6] = [
    " ERROR ",
    "panicked",
    "internal error",
    "lost the progress key",
    "somebody changed the key",
    "do not fit together",
];

/// Where the primary key is made anew within a transaction, what comes between may not be in the WAL: the table is compared anew.
const UNTOLD: [&str; 3] = ["does not tell the key", "has no primary key", "is not unique"];

/// What became of the steps of a session.
#[derive(Default)]
struct Tally {
    worked: BTreeMap<String, u64>,
    /// How often each error came, by its code, and an example.
    failed: BTreeMap<String, (u64, String)>,
}

impl Tally {
    fn add(&mut self, other: Tally) {
        for (name, count) in other.worked {
            *self.worked.entry(name).or_default() += count;
        }
        for (code, (count, example)) in other.failed {
            self.failed.entry(code).or_insert((0, example)).0 += count;
        }
    }
}

/// A connection that does one transaction after another.
struct Session {
    number: usize,
    client: Client,
    rng: StdRng,
    /// How many of its statements are schema changes.
    schema: f64,
    /// How the prepared transaction that it left behind is to end.
    prepared: Option<String>,
    tally: Tally,
}

impl Session {
    fn new(m: &Mirror, number: usize, rng: StdRng, schema: f64) -> Session {
        let mut client = m.db.connect();
        client.batch_execute(SETTINGS).unwrap();
        Session {
            number,
            client,
            rng,
            schema,
            prepared: None,
            tally: Tally::default(),
        }
    }

    fn run(&mut self, count: usize) {
        for _ in 0..count {
            let next = transaction(&mut self.rng, self.number, self.schema);
            let pause = Duration::from_millis(self.rng.random_range(0..6));
            self.transaction(next, pause);
        }
        self.end_prepared();
    }

    fn transaction(&mut self, next: Transaction, pause: Duration) {
        // One transaction at a time has its name, and there may be some transactions of others before its end.
        if next.prepared.is_some() || self.rng.random_bool(0.3) {
            self.end_prepared();
        }
        let (mut savepoint, is_alone) = (None, next.steps.len() == 1);
        for step in &next.steps {
            match self.client.batch_execute(&step.sql) {
                Ok(()) => {
                    println!("{}: {}", self.number, step.sql);
                    *self.tally.worked.entry(step.name.clone()).or_default() += 1;
                    if step.sql.starts_with("PREPARE") {
                        self.prepared.clone_from(&next.prepared);
                    }
                }
                Err(error) => {
                    self.failed(&step.sql, &error);
                    let mend = match &savepoint {
                        _ if is_alone => "",
                        Some(name) => &format!("ROLLBACK TO {name}"),
                        None => "ROLLBACK",
                    };
                    // A COMMIT that fails leaves no transaction behind.
                    if self.client.batch_execute(mend).is_err() || savepoint.is_none() {
                        let _ = self.client.batch_execute("ROLLBACK");
                        return;
                    }
                }
            }
            match step.sql.split_once(' ') {
                Some(("SAVEPOINT", name)) => savepoint = Some(name.to_owned()),
                Some(("RELEASE", _)) => savepoint = None,
                _ => {}
            }
            std::thread::sleep(pause);
        }
    }

    fn end_prepared(&mut self) {
        if let Some(end) = self.prepared.take() {
            println!("{}: {end}", self.number);
            self.client
                .batch_execute(&end)
                .unwrap_or_else(|e| panic!("{end}: {e:?}"));
        }
    }

    fn failed(&mut self, sql: &str, error: &postgres::Error) {
        let error = error
            .as_db_error()
            .unwrap_or_else(|| panic!("{sql}: the server is gone: {error:?}"));
        let (code, message) = (error.code().code(), error.message());
        let is_clash = CLASHES.iter().any(|clash| message.contains(clash));
        assert!(
            is_clash || !["XX", "57", "58", "53", "21"].contains(&&code[..2]) || code == "57014",
            "{sql}: {error:?}"
        );
        println!("{}: {code} {message}: {sql}", self.number);
        let failed = self.tally.failed.entry(code.to_owned());
        failed.or_insert_with(|| (0, format!("{message} [{sql}]"))).0 += 1;
    }
}

/// So many transactions of each session, side by side, and a sink that is ended now and then meanwhile.
fn round(m: &Mirror, sessions: &mut [Session], rng: &mut StdRng, count: usize) {
    let running = AtomicUsize::new(sessions.len());
    std::thread::scope(|scope| {
        for session in sessions {
            let running = &running;
            scope.spawn(move || {
                session.run(count);
                running.fetch_sub(1, Ordering::Release);
            });
        }
        let mut next = Instant::now() + Duration::from_millis(rng.random_range(50..2_000));
        while running.load(Ordering::Acquire) > 0 {
            std::thread::sleep(Duration::from_millis(10));
            if Instant::now() < next {
                continue;
            }
            m.sink(|sink| {
                sink.assert_running();
                if rng.random_bool(0.7) {
                    sink.kill();
                } else {
                    assert_eq!(sink.terminate().code(), Some(0), "{}", sink.output());
                }
                if rng.random_bool(0.3) {
                    std::thread::sleep(Duration::from_millis(rng.random_range(0..500)));
                }
                sink.restart();
            });
            next = Instant::now() + Duration::from_millis(rng.random_range(50..3_000));
        }
    });
    // What was interrupted is left half done, which is no state to compare in.
    let interrupted =
        "SELECT inhparent::regclass, inhrelid::regclass FROM pg_inherits WHERE inhdetachpending";
    for row in m.db.rows(interrupted) {
        let (table, partition) = (row[0].clone().unwrap(), row[1].clone().unwrap());
        m.sql(&format!(
            "ALTER TABLE {table} DETACH PARTITION {partition} FINALIZE"
        ));
    }
    // A label that leaves the key to the primary key may come before that, as pg_restore does it. Until then nothing is mirrored.
    let keyless =
        "SELECT relation FROM walmirror.mirrors WHERE key IS NULL AND walmirror.default_key(oid) IS NULL";
    for row in m.db.rows(keyless) {
        let table = row[0].as_ref().unwrap();
        m.sql(&format!("SECURITY LABEL FOR walmirror ON TABLE {table} IS NULL"));
    }
}

fn random_statements(name: &str, schema: &[f64], count: usize) {
    let seconds: u64 =
        std::env::var("RANDOM_SECONDS").map_or(20, |text| text.parse().expect("RANDOM_SECONDS is a number"));
    let mut rng = rng(name);
    let m = Mirror::alone("deadlock_timeout = 100ms");
    m.sql(TABLES);
    m.start();
    m.settle();
    let mut sessions: Vec<Session> = (0..schema.len())
        .map(|number| Session::new(&m, number, StdRng::seed_from_u64(rng.random()), schema[number]))
        .collect();
    let (start, mut rounds, mut cached, mut rows) = (Instant::now(), 0, 0, 0);
    while start.elapsed() < Duration::from_secs(seconds) {
        for mend in MENDS {
            (0..3).for_each(|number| _ = sessions[0].client.batch_execute(&generator::mend(mend, number)));
        }
        round(&m, &mut sessions, &mut rng, count);
        println!("round {rounds}: the end");
        m.db.pg.assert_unharmed();
        let report = m.settle();
        let log = m.sink(|sink| sink.output());
        let line = log.lines().find(|line| {
            NEVER.iter().any(|sign| line.contains(sign)) && !UNTOLD.iter().any(|sign| line.contains(sign))
        });
        assert_eq!(line, None);
        rounds += 1;
        cached += report.cached;
        rows += report.rows;
    }
    let mut tally = Tally::default();
    sessions.drain(..).for_each(|session| tally.add(session.tally));
    for (code, (count, example)) in &tally.failed {
        println!("{count} times {code}: {example}");
    }
    let never: Vec<&str> = changes()
        .filter(|change| !tally.worked.contains_key(*change))
        .collect();
    println!(
        "{} of {} changes never worked: {never:#?}",
        never.len(),
        changes().count()
    );
    let worked: u64 = tally.worked.values().sum();
    println!("{rounds} rounds, {worked} steps, {rows} rows and {cached} of caches equal");
    m.sink(Sink::assert_running);
}

/// One session alone, whose statements each meet what the one before has left: a seed repeats them all.
#[test]
fn random_statements_labels_alters_and_kills() {
    random_statements("random_statements_labels_alters_and_kills", &[0.25], 60);
}

/// The counterpart of `faults_schema::schema_changes_while_the_sink_is_down`: the sink is up, and others write and change as well.
#[test]
fn schema_changes_while_others_write() {
    random_statements("schema_changes_while_others_write", &[0.6, 0.1, 0.03, 0.03], 40);
}
