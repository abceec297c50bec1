//! Case `e2e`: a backlog of one transaction into an empty Redis, by the sink and by what it is set against.
//!
//! The sink runs once on the empty table, so that slot and progress exist. Each round starts from copies of both.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use walmirror_tests::{Lsn, Redis, Sink};

use crate::bed::Bed;
use crate::figures::{Contestant, Goal, Metric, Outcome, RATE, WALSENDER_CPU};
use crate::options::Options;
use crate::receive::{PLUGINS, receive};
use crate::rivals::{self, Run, Shape, hand_written, pipe, ready_made};
use crate::workload;

/// CPU of the program that fills Redis.
pub const CLIENT_CPU: Metric = Metric {
    name: "client µs/row",
    digits: 2,
};
const REDIS_CPU: Metric = Metric {
    name: "Redis µs/row",
    digits: 2,
};
const CLIENT_MEMORY: Metric = Metric {
    name: "client peak MiB",
    digits: 1,
};

const ROWS_PER_EXEC: Metric = Metric {
    name: "rows/EXEC",
    digits: 0,
};

/// The slot, and the one that keeps its first position.
const SLOT: &str = "mirror";
pub const ORIGIN: &str = "origin";

/// How a table is mirrored, and what the ready-made commands for it are.
pub struct Kind {
    pub name: &'static str,
    pub label: &'static str,
    pub query: &'static str,
    pub shapes: &'static [(&'static str, Shape)],
}

pub const KINDS: [Kind; 3] = [
    Kind {
        name: "hash",
        label: "SELECT walmirror.mirror('bench')",
        query: "SELECT 'bench:' || id, 'id', id, 'name', name, 'email', email, 'age', age, 'balance', balance, \
                'active', active::text, 'created', created FROM bench ORDER BY id",
        shapes: &[("--pipe HSET", Shape::Hset)],
    },
    Kind {
        name: "json",
        label: "SELECT walmirror.mirror('bench', value => 'json')",
        query: "SELECT 'bench:' || id, to_jsonb(b) FROM bench b ORDER BY id",
        shapes: &[
            ("--pipe SET", Shape::Set),
            ("--pipe MSET of 100", Shape::Mset(100)),
        ],
    },
    Kind {
        name: "string",
        label: "SELECT walmirror.mirror('bench', value => 'string', columns => '{name}')",
        query: "SELECT 'bench:' || id, name FROM bench ORDER BY id",
        shapes: &[
            ("--pipe SET", Shape::Set),
            ("--pipe MSET of 100", Shape::Mset(100)),
        ],
    },
];

/// Each kind of value; with LONG=1 also 10 M rows in one transaction.
pub fn run(options: &Options) -> Vec<Outcome> {
    let rows = options.rows(1_000_000);
    let wanted = |kind: &&Kind| options.wants(&format!("e2e-{}", kind.name));
    let mut outcomes: Vec<Outcome> = KINDS
        .iter()
        .filter(wanted)
        .map(|kind| measure(options, kind, rows))
        .collect();
    if options.long {
        let mut long = measure(
            &Options {
                rounds: 1,
                ..options.clone()
            },
            &KINDS[0],
            10_000_000,
        );
        long.name = "e2e-hash-10m".to_owned();
        outcomes.push(long);
    }
    outcomes
}

/// A backlog and everything needed to work it off again and again.
pub struct Backlog {
    /// The server.
    pub bed: Bed,
    /// The Redis that is filled.
    pub redis: Redis,
    /// The end of the load.
    pub end: Lsn,
    bookkeeping: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Backlog {
    /// Prepares a database, lets the sink see it once, and then loads it.
    pub fn make(settings: &str, prepare: impl FnOnce(&Bed), load: impl FnOnce(&Bed)) -> Backlog {
        let bed = Bed::start(settings);
        prepare(&bed);
        let redis = Redis::start_with(&["--enable-debug-command", "local"]);
        let mut backlog = Backlog {
            end: bed.end(),
            bed,
            redis,
            bookkeeping: BTreeMap::new(),
        };
        let arguments = backlog.arguments();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let (code, output) = Sink::run(&arguments, Duration::from_secs(120));
        assert_eq!(code, Some(0), "the sink on the loaded database:\n{output}");
        let mut connection = backlog.redis.connect();
        let keys: Vec<Vec<u8>> = redis::cmd("KEYS").arg("*").query(&mut connection).unwrap();
        for key in keys {
            let dump = redis::cmd("DUMP").arg(&key).query(&mut connection).unwrap();
            backlog.bookkeeping.insert(key, dump);
        }
        backlog.bed.copy_slot(SLOT, ORIGIN, "walmirror");
        load(&backlog.bed);
        backlog.end = backlog.bed.end();
        backlog
    }

    fn arguments(&self) -> Vec<String> {
        let (conninfo, url) = (self.bed.db.pg.conninfo(&self.bed.db.name), self.redis.url());
        let end = self.end.to_string();
        [
            "run",
            "--postgres",
            &conninfo,
            "--redis",
            &url,
            "--slot",
            SLOT,
            "--until-lsn",
            &end,
        ]
        .map(str::to_owned)
        .to_vec()
    }

    /// Redis and the slot as they were before the load.
    pub fn rewind(&self, plugin: &str) {
        let mut connection = self.redis.connect();
        redis::cmd("FLUSHALL").exec(&mut connection).unwrap();
        for (key, dump) in &self.bookkeeping {
            redis::cmd("RESTORE")
                .arg(key)
                .arg(0)
                .arg(dump)
                .exec(&mut connection)
                .unwrap();
        }
        self.bed.drop_slot(SLOT);
        self.bed.copy_slot(ORIGIN, SLOT, plugin);
    }

    /// Redis with nothing in it, and no slot: the sink will make one, and read the table.
    pub fn empty(&self) {
        redis::cmd("FLUSHALL").exec(&mut self.redis.connect()).unwrap();
        self.bed.drop_slot(SLOT);
    }

    /// The sink from where it stands to the end.
    pub fn run_sink(&self) -> Run {
        let arguments = self.arguments();
        let mut command: Command = Sink::command(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        rivals::run(&mut command, "walmirror", &self.bed, &self.redis, Some(SLOT))
    }

    /// The sink from the start of the load to the end.
    pub fn sink(&self) -> Run {
        self.rewind("walmirror");
        self.run_sink()
    }

    /// What Redis holds, but for the mirror's own keys: the same data, the same digest.
    pub fn digest(&self) -> String {
        let mut connection = self.redis.connect();
        let own: Vec<Vec<u8>> = redis::cmd("KEYS")
            .arg("walmirror:*")
            .query(&mut connection)
            .unwrap();
        if !own.is_empty() {
            redis::cmd("DEL").arg(own).exec(&mut connection).unwrap();
        }
        let digest: String = redis::cmd("DEBUG").arg("DIGEST").query(&mut connection).unwrap();
        let size: u64 = redis::cmd("DBSIZE").query(&mut connection).unwrap();
        let sample: redis::Value = match redis::cmd("GET").arg("bench:1").query(&mut connection) {
            Ok(value) => value,
            Err(_) => redis::cmd("HGETALL")
                .arg("bench:1")
                .query(&mut connection)
                .unwrap(),
        };
        format!("{size} keys, digest {digest}, bench:1 is {sample:?}")
    }
}

fn measure(options: &Options, kind: &Kind, rows: u64) -> Outcome {
    let backlog = Backlog::make(
        "",
        |bed| bed.db.sql(&format!("{}; {}", workload::TABLE, kind.label)),
        |bed| workload::insert(bed, rows),
    );
    let (bed, redis) = (&backlog.bed, &backlog.redis);
    let files: Vec<_> = kind
        .shapes
        .iter()
        .enumerate()
        .map(|(i, (name, shape))| {
            (
                *name,
                ready_made(bed, kind.query, *shape, &format!("commands{i}")),
            )
        })
        .collect();
    let mut ours = Contestant::new("walmirror");
    let mut pipes: Vec<Contestant> = files.iter().map(|(name, _)| Contestant::new(name)).collect();
    let mut limit = Contestant::new("decoding alone");
    let mut hand = Contestant::new("hand-written");
    let hand_able = kind.name == "hash" && rows <= 1_000_000;
    let mut expected: Option<String> = None;
    let mut check = |who: &str| {
        let digest = backlog.digest();
        let wanted = expected.get_or_insert_with(|| digest.clone());
        assert_eq!(
            &digest, wanted,
            "Redis after {who} holds something else than the commands made by Postgres say"
        );
    };
    for round in 0..options.rounds {
        let log = |name: &str, seconds: f64| {
            eprintln!("  {} round {} {name:<20} {seconds:.2} s", kind.name, round + 1)
        };
        for ((name, file), contestant) in files.iter().zip(&mut pipes) {
            backlog.rewind("walmirror");
            let run = rivals::run(&mut pipe(file, redis), name, bed, redis, None);
            check(name);
            log(name, run.seconds);
            note(contestant, &run, rows);
        }
        let run = backlog.sink();
        check("walmirror");
        log("walmirror", run.seconds);
        note(&mut ours, &run, rows);

        let pass = receive(bed, &PLUGINS[0], ORIGIN, backlog.end);
        log("decoding alone", pass.seconds);
        limit.add(RATE, rows as f64 / pass.seconds);
        limit.add(WALSENDER_CPU, pass.walsender.cpu * 1e6 / rows as f64);

        if hand_able && hand.skipped.is_none() {
            match hand_written(bed, redis, SLOT).filter(|_| bed.has_plugin("wal2json").is_ok()) {
                Some(mut command) => {
                    backlog.rewind("wal2json");
                    let run = rivals::run(&mut command, "the hand-written consumer", bed, redis, Some(SLOT));
                    check("the hand-written consumer");
                    log("hand-written", run.seconds);
                    note(&mut hand, &run, rows);
                }
                None => hand.skipped = Some("psycopg2, redis-py or wal2json is not installed".to_owned()),
            }
        }
    }
    let mut contestants = vec![ours];
    contestants.extend(pipes);
    contestants.push(limit);
    if hand_able {
        contestants.push(hand);
    }
    let mut outcome = Outcome {
        name: format!("e2e-{}", kind.name),
        title: format!("{rows} rows in one INSERT, into {}", kind.name),
        compared: "After every run all of Redis had the same digest as after the commands that Postgres itself made.".to_owned(),
        headline: RATE,
        contestants,
        goals: Vec::new(),
    };
    outcome.goals = goals(&outcome, kind);
    outcome
}

/// Adds the figures of a run.
pub fn note(contestant: &mut Contestant, run: &Run, rows: u64) {
    let rows = rows as f64;
    contestant.add(RATE, rows / run.seconds);
    if let Some(walsender) = run.walsender {
        contestant.add(WALSENDER_CPU, walsender.cpu * 1e6 / rows);
    }
    if run.execs > 0 {
        contestant.add(ROWS_PER_EXEC, rows / run.execs as f64);
    }
    contestant.add(CLIENT_CPU, run.client.cpu * 1e6 / rows);
    contestant.add(REDIS_CPU, run.redis * 1e6 / rows);
    contestant.add(CLIENT_MEMORY, run.client.resident as f64 / 1048576.0);
}

fn goals(outcome: &Outcome, kind: &Kind) -> Vec<Goal> {
    let mut goals = Vec::new();
    let ours = outcome.contestants[0].median(RATE).unwrap();
    let rate = |name: &str| outcome.find(name).and_then(|c| c.median(RATE));
    let pipe = kind
        .shapes
        .iter()
        .filter_map(|(name, _)| rate(name))
        .fold(0.0, f64::max);
    if kind.name == "hash" {
        goals.push(Goal::at_least(
            "rows/s against --pipe of the same commands",
            0.9,
            "×",
            ours / pipe,
        ));
        goals.push(Goal::at_least(
            "thousand rows/s into hashes",
            100.0,
            "",
            ours / 1000.0,
        ));
    } else {
        let bound = rate("decoding alone").map_or(pipe, |limit| pipe.min(limit));
        goals.push(Goal::at_least(
            "rows/s against --pipe or decoding, the lower",
            0.9,
            "×",
            ours / bound,
        ));
    }
    if let Some(hand) = rate("hand-written") {
        goals.push(Goal::at_least(
            "rows/s against the hand-written consumer",
            8.0,
            "×",
            ours / hand,
        ));
    }
    let memory = outcome.contestants[0]
        .sorted(CLIENT_MEMORY)
        .and_then(|v| v.last().copied())
        .unwrap_or(0.0);
    goals.push(Goal::at_most(
        "peak resident memory of the sink",
        64.0,
        " MiB",
        memory,
    ));
    goals
}
