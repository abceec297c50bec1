//! Case `latency`: from the moment COMMIT returns to a session until a reader of Redis sees the row.
//!
//! Each writer updates a row of its own with a counter, and a random other row, in one statement. A reader asks Redis
//! for the counters again and again: what it sees at an instant was visible by then, so the figures contain the time
//! between two of its looks (about a quarter of a millisecond, reported as well) and are never too low by it. A row seen
//! before its COMMIT returned counts as 0.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use walmirror_tests::{DEADLINE, Redis, Sink, compare, wait_for};

use crate::bed::Bed;
use crate::figures::{Contestant, Goal, Metric, Outcome};
use crate::meter::{Watch, cpu_seconds};
use crate::options::Options;
use crate::peers::PEERS;
use crate::rivals::redis_pid;
use crate::workload::{self, TABLE};

const P50: Metric = Metric {
    name: "p50 ms",
    digits: 2,
};
const P99: Metric = Metric {
    name: "p99 ms",
    digits: 2,
};
const P999: Metric = Metric {
    name: "p99.9 ms",
    digits: 2,
};
const ACHIEVED: Metric = Metric {
    name: "tx/s",
    digits: 0,
};
const LOOKS: Metric = Metric {
    name: "reader's interval ms",
    digits: 2,
};
const CLIENT_CPU: Metric = Metric {
    name: "client µs/tx",
    digits: 1,
};
const WALSENDER_CPU: Metric = Metric {
    name: "walsender µs/tx",
    digits: 1,
};
const REDIS_CPU: Metric = Metric {
    name: "Redis µs/tx",
    digits: 1,
};

const WRITERS: usize = 4;
const ROWS: u64 = 20_000;
const RATES: [u64; 2] = [1_000, 5_000];
const SLOT: &str = "mirror";

/// Both rates, the sink and its peers in turns.
pub fn run(options: &Options) -> Vec<Outcome> {
    let duration = Duration::from_secs(if options.quick { 3 } else { 10 });
    let mut outcomes = Vec::new();
    let bed = Bed::start("");
    bed.db.sql(TABLE);
    workload::insert(&bed, ROWS);
    bed.db.sql("CREATE TABLE probe (id int PRIMARY KEY, seq bigint)");
    bed.db.sql(&format!(
        "INSERT INTO probe SELECT i, 0 FROM generate_series(0, {}) i",
        WRITERS - 1
    ));
    bed.db
        .sql("SELECT walmirror.mirror('bench'), walmirror.mirror('probe')");
    bed.db.sql("CREATE PUBLICATION bench FOR TABLE bench, probe");
    for rate in RATES {
        if !options.wants(&format!("latency-{rate}")) {
            continue;
        }
        let mut ours = Contestant::new("walmirror");
        let mut peers = PEERS.each_ref().map(|peer| (Contestant::new(peer.name), peer));
        for round in 0..options.rounds {
            let redis = Redis::start();
            measure_ours(&bed, &redis, &mut ours, rate, duration);
            report(&ours, rate, round);
            for (contestant, peer) in peers.iter_mut().filter(|(c, _)| c.skipped.is_none()) {
                let redis = Redis::start();
                match peer.command(&bed, &redis, SLOT) {
                    Ok(command) => {
                        measure_peer(&bed, &redis, command, peer.plugin, contestant, (rate, duration));
                        report(contestant, rate, round);
                    }
                    Err(why) => contestant.skipped = Some(why),
                }
            }
        }
        let mut contestants = vec![ours];
        contestants.extend(peers.map(|(contestant, _)| contestant));
        let mut outcome = Outcome {
            name: format!("latency-{rate}"),
            title: format!("commit to visible at {rate} transactions/s"),
            compared:
                "Every counter arrived, and in the end all of the mirror's Redis was compared with Postgres."
                    .to_owned(),
            headline: P50,
            contestants,
            goals: Vec::new(),
        };
        if rate == 5_000 {
            let median = |metric| outcome.contestants[0].median(metric).unwrap();
            outcome.goals = vec![
                Goal::at_most("p50 at 5 000 tx/s", 1.0, " ms", median(P50)),
                Goal::at_most("p99 at 5 000 tx/s", 5.0, " ms", median(P99)),
            ];
        }
        outcomes.push(outcome);
    }
    outcomes
}

fn report(contestant: &Contestant, rate: u64, round: usize) {
    let last = |metric| contestant.rounds(metric).last().copied().unwrap_or_default();
    let (p50, p99) = (last(P50), last(P99));
    eprintln!(
        "  {rate} tx/s round {} {:<20} p50 {p50:.2} ms, p99 {p99:.2} ms",
        round + 1,
        contestant.name
    );
}

fn measure_ours(bed: &Bed, redis: &Redis, contestant: &mut Contestant, rate: u64, duration: Duration) {
    bed.drop_slot(SLOT);
    let (conninfo, url) = (bed.db.pg.conninfo(&bed.db.name), redis.url());
    let mut command = Sink::command(&["run", "--postgres", &conninfo, "--redis", &url, "--slot", SLOT]);
    let mut child = start(bed, &mut command);
    // The backfill comes first.
    wait_for(DEADLINE, "the backfill", || {
        compare(&mut bed.db.connect(), &mut redis.connect())
            .equal()
            .then_some(())
    });
    load(bed, redis, contestant, rate, duration, child.id());
    wait_for(DEADLINE, "Redis to equal Postgres", || {
        compare(&mut bed.db.connect(), &mut redis.connect())
            .equal()
            .then_some(())
    });
    child.kill().unwrap();
    child.wait().unwrap();
}

fn measure_peer(
    bed: &Bed,
    redis: &Redis,
    mut command: Command,
    plugin: &str,
    contestant: &mut Contestant,
    (rate, duration): (u64, Duration),
) {
    bed.drop_slot(SLOT);
    bed.db.sql(&format!(
        "SELECT pg_create_logical_replication_slot('{SLOT}', '{plugin}')"
    ));
    let mut child = start(bed, &mut command);
    load(bed, redis, contestant, rate, duration, child.id());
    child.kill().unwrap();
    child.wait().unwrap();
}

fn start(bed: &Bed, command: &mut Command) -> std::process::Child {
    let log = std::fs::File::create(bed.db.pg.data().with_file_name("client.log")).unwrap();
    command
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .expect("start the client")
}

/// Writes at a rate, looks at Redis meanwhile, and adds what was seen.
fn load(bed: &Bed, redis: &Redis, contestant: &mut Contestant, rate: u64, duration: Duration, client: u32) {
    // The counters go on from where the last run left them.
    bed.db.sql("UPDATE probe SET seq = 0");
    wait_for(DEADLINE, "the counters to be in Redis", || {
        (look(&mut redis.connect()) == [Some(0); WRITERS]).then_some(())
    });
    let walsender = bed.walsender(SLOT, || false).map(Watch::start).unwrap();
    let redis_process = redis_pid(redis);
    let cpu = |pid| cpu_seconds(pid).expect("it still runs");
    let (client_before, redis_before) = (cpu(client), cpu(redis_process));
    let walsender_before = bed.walsender(SLOT, || false).and_then(cpu_seconds).unwrap();
    let writing = AtomicBool::new(true);
    let start = Instant::now() + Duration::from_millis(100);
    let (commits, looks) = std::thread::scope(|scope| {
        let reader = scope.spawn(|| watch_counters(redis, &writing));
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| scope.spawn(move || write(bed, writer, start, rate, duration)))
            .collect();
        let commits: Vec<Vec<Instant>> = writers.into_iter().map(|w| w.join().unwrap()).collect();
        let last: [Option<u64>; WRITERS] = std::array::from_fn(|w| Some(commits[w].len() as u64));
        wait_for(DEADLINE, "the last counters", || {
            (look(&mut redis.connect()) == last).then_some(())
        });
        writing.store(false, Ordering::Relaxed);
        (commits, reader.join().unwrap())
    });
    let seconds = commits
        .iter()
        .filter_map(|c| c.last())
        .max()
        .unwrap()
        .duration_since(start)
        .as_secs_f64();
    let transactions: usize = commits.iter().map(Vec::len).sum();
    let per_transaction = |cpu: f64| cpu * 1e6 / transactions as f64;
    let mut latencies = latencies(&commits, &looks, start + duration / 10);
    latencies.sort_by(f64::total_cmp);
    let at = |share: f64| latencies[((latencies.len() - 1) as f64 * share) as usize];
    contestant.add(P50, at(0.5));
    contestant.add(P99, at(0.99));
    contestant.add(P999, at(0.999));
    contestant.add(ACHIEVED, transactions as f64 / seconds);
    let span = looks.last().unwrap().0.duration_since(looks[0].0).as_secs_f64() * 1e3;
    contestant.add(LOOKS, span / looks.len() as f64);
    contestant.add(CLIENT_CPU, per_transaction(cpu(client) - client_before));
    contestant.add(
        WALSENDER_CPU,
        per_transaction(walsender.stop().cpu - walsender_before),
    );
    contestant.add(REDIS_CPU, per_transaction(cpu(redis_process) - redis_before));
}

/// One writer: a transaction whenever one is due; late ones follow at once. Returns when each COMMIT returned.
fn write(bed: &Bed, writer: usize, start: Instant, rate: u64, duration: Duration) -> Vec<Instant> {
    let mut client = bed.db.connect();
    let statement = client
        .prepare(
            "WITH other AS (UPDATE bench SET age = age + 1 WHERE id = $1) UPDATE probe SET seq = $2 WHERE id = $3",
        )
        .unwrap();
    let pause = Duration::from_secs_f64(WRITERS as f64 / rate as f64);
    let first = start + pause * writer as u32 / WRITERS as u32;
    let mut commits = Vec::new();
    let mut random = rand::rng();
    loop {
        let due = first + pause * commits.len() as u32;
        if due >= start + duration {
            return commits;
        }
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let other = rand::Rng::random_range(&mut random, 1..=ROWS as i64);
        let parameters: [&(dyn postgres::types::ToSql + Sync); 3] =
            [&other, &(commits.len() as i64 + 1), &(writer as i32)];
        client.execute(&statement, &parameters).unwrap();
        commits.push(Instant::now());
    }
}

/// The counters that Redis holds.
fn look(connection: &mut redis::Connection) -> [Option<u64>; WRITERS] {
    let mut pipeline = redis::pipe();
    for writer in 0..WRITERS {
        pipeline.cmd("HGET").arg(format!("probe:{writer}")).arg("seq");
    }
    let seen: Vec<Option<u64>> = pipeline.query(connection).unwrap();
    std::array::from_fn(|writer| seen[writer])
}

/// Looks again and again; the instant is taken after the answer.
fn watch_counters(redis: &Redis, writing: &AtomicBool) -> Vec<(Instant, [u64; WRITERS])> {
    let mut connection = redis.connect();
    let mut looks = Vec::new();
    loop {
        // One more look after the last counter has arrived.
        let more = writing.load(Ordering::Relaxed);
        let seen = look(&mut connection);
        looks.push((Instant::now(), seen.map(|counter| counter.unwrap_or(0))));
        if !more {
            return looks;
        }
        std::thread::sleep(Duration::from_micros(150));
    }
}

/// Milliseconds from each commit after `from` to the first look that saw it.
fn latencies(commits: &[Vec<Instant>], looks: &[(Instant, [u64; WRITERS])], from: Instant) -> Vec<f64> {
    let mut latencies = Vec::new();
    for (writer, commits) in commits.iter().enumerate() {
        let mut seen = looks.iter().peekable();
        for (i, &commit) in commits.iter().enumerate() {
            while seen
                .next_if(|(_, counters)| counters[writer] < i as u64 + 1)
                .is_some()
            {}
            if let Some((at, _)) = seen.peek().filter(|_| commit >= from) {
                latencies.push(at.saturating_duration_since(commit).as_secs_f64() * 1e3);
            }
        }
    }
    latencies
}
