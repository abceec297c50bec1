//! Case `e2e`: a backlog into an empty Redis, by the sink and by what it is set against. W1 is one transaction; the part
//! `e2e-w2` is a hundred thousand of one row each; `e2e-growth` (LONG=1) are transactions of ten thousand to ten million.

use crate::backlog::{Backlog, ORIGIN, SLOT};
use crate::bed::Bed;
use crate::figures::{Contestant, Goal, Metric, Outcome, RATE, WALSENDER_CPU, number};
use crate::growth;
use crate::options::Options;
use crate::peers::PEERS;
use crate::receive::{PLUGINS, receive};
use crate::rivals::{self, Run, Shape, in_multi, pipe, ready_made};
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

/// What is to be applied, each time from the beginning.
#[derive(Clone, Copy)]
enum Load {
    /// W1: one INSERT of so many rows.
    One(u64),
    /// W2, with inserts: so many transactions of one row.
    Many(u64),
}

/// Decoding with nobody to apply it.
const DECODING: &str = "decoding alone";
/// A peer that needs more seconds than this is run once, or the case would take a quarter of an hour.
const SLOW: f64 = 30.0;

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
        .map(|kind| measure(options, kind, Load::One(rows)))
        .collect();
    if options.wants("e2e-w2") {
        outcomes.push(measure(options, &KINDS[0], Load::Many(options.rows(100_000))));
    }
    if options.long && options.wants("e2e-growth") {
        outcomes.push(growth::run(options));
    }
    outcomes
}

impl Load {
    fn rows(self) -> u64 {
        let (Load::One(rows) | Load::Many(rows)) = self;
        rows
    }

    fn make(self, bed: &Bed) {
        match self {
            Load::One(rows) => workload::insert(bed, rows),
            Load::Many(rows) => workload::insert_one_by_one(bed, rows),
        }
    }

    fn name(self, kind: &Kind) -> String {
        match self {
            Load::One(_) => format!("e2e-{}", kind.name),
            Load::Many(_) => "e2e-w2".to_owned(),
        }
    }

    fn title(self, kind: &Kind) -> String {
        let (rows, kind) = (self.rows(), kind.name);
        match self {
            Load::One(_) => format!("{rows} rows in one INSERT, into {kind}"),
            Load::Many(_) => format!("{rows} one-row INSERT transactions, into {kind}"),
        }
    }
}

/// The table and the publication that pgoutput wants to be older than the load, and the load.
pub fn backlog(kind: &Kind, load: impl FnOnce(&Bed)) -> Backlog {
    let publication = "CREATE PUBLICATION bench FOR TABLE bench";
    Backlog::make(
        "",
        |bed| {
            bed.db
                .sql(&format!("{}; {}; {publication}", workload::TABLE, kind.label))
        },
        load,
    )
}

fn measure(options: &Options, kind: &Kind, load: Load) -> Outcome {
    let rows = load.rows();
    let backlog = backlog(kind, |bed| load.make(bed));
    let (bed, redis) = (&backlog.bed, &backlog.redis);
    let mut files = Vec::new();
    for (i, (name, shape)) in kind.shapes.iter().enumerate() {
        let file = ready_made(bed, kind.query, *shape, &format!("commands{i}"));
        files.push(((*name).to_owned(), file));
    }
    if matches!(load, Load::One(_)) {
        // What Postgres commits as one, Redis has to apply as one. The last shape is what the sink sends.
        if let Some((name, file)) = files.last() {
            files.push((format!("{name} in MULTI"), in_multi(file)));
        }
    }
    let mut ours = Contestant::new("walmirror");
    let mut pipes: Vec<Contestant> = files.iter().map(|(name, _)| Contestant::new(name)).collect();
    let mut limit = Contestant::new(DECODING);
    let peers = &PEERS[..2];
    let mut peers: Vec<_> = if kind.name == "hash" {
        peers
            .iter()
            .map(|peer| (peer, Contestant::new(peer.name)))
            .collect()
    } else {
        Vec::new()
    };
    let mut expected: Option<String> = None;
    let mut check = |who: &str| {
        let digest = backlog.digest();
        let wanted = expected.get_or_insert_with(|| digest.clone());
        assert_eq!(
            &digest, wanted,
            "Redis after {who} holds something else than the commands made by Postgres say"
        );
    };
    let name = load.name(kind);
    for round in 0..options.rounds {
        let log =
            |who: &str, seconds: f64| eprintln!("  {name} round {} {who:<24} {seconds:.2} s", round + 1);
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
        log(DECODING, pass.seconds);
        limit.add(RATE, rows as f64 / pass.seconds);
        limit.add(WALSENDER_CPU, pass.walsender.cpu * 1e6 / rows as f64);

        let slow = |c: &Contestant| c.rounds(RATE).iter().any(|rate| rows as f64 / rate > SLOW);
        for (peer, contestant) in &mut peers {
            if contestant.skipped.is_some() || slow(contestant) {
                continue;
            }
            match peer.command(bed, redis, SLOT) {
                Ok(mut command) => {
                    backlog.rewind(peer.plugin);
                    let run = rivals::run(&mut command, peer.name, bed, redis, Some(SLOT));
                    check(peer.name);
                    log(peer.name, run.seconds);
                    note(contestant, &run, rows);
                }
                Err(why) => contestant.skipped = Some(why),
            }
        }
    }
    let mut contestants = vec![ours];
    contestants.extend(pipes);
    contestants.push(limit);
    contestants.extend(peers.into_iter().map(|(_, contestant)| contestant));
    let mut outcome = Outcome {
        name,
        title: load.title(kind),
        compared: "After every run all of Redis had the same digest as after the commands that Postgres itself made. A peer that needs \
                   more than half a minute ran once.".to_owned(),
        headline: RATE,
        contestants,
        goals: Vec::new(),
    };
    if let Some(bound) = bound(&outcome, load) {
        outcome.compared.push_str(&bound);
    }
    outcome.goals = goals(&outcome, kind);
    outcome
}

/// For one transaction, what no mirror can pass here: decoding, and then Redis. For many small ones, which overlap, what the
/// cores allow with the CPU that this mirror takes.
fn bound(outcome: &Outcome, load: Load) -> Option<String> {
    let ours = outcome.contestants.first()?;
    let decoding = outcome.find(DECODING)?;
    let pipes = outcome
        .contestants
        .iter()
        .filter(|c| c.name.starts_with("--pipe"));
    let piped = pipes.max_by(|a, b| {
        a.median(RATE)
            .unwrap_or(0.0)
            .total_cmp(&b.median(RATE).unwrap_or(0.0))
    })?;
    let (decoded, applied) = (decoding.median(RATE)?, piped.median(RATE)?);
    if matches!(load, Load::One(_)) {
        let limit = 1.0 / (1.0 / decoded + 1.0 / applied);
        return Some(format!(
            " Redis gets a transaction only when it was decoded to its commit: one after the other, without a mirror between \
             them, decoding alone and {} give {} rows/s. walmirror is at {:.2} of that.",
            piped.name,
            number(limit, 0),
            ours.median(RATE)? / limit,
        ));
    }
    let cores = std::thread::available_parallelism().map_or(1.0, |n| n.get() as f64);
    let cpu = ours.median(WALSENDER_CPU)? + ours.median(CLIENT_CPU)? + ours.median(REDIS_CPU)?;
    let limit = cores / cpu * 1e6;
    Some(format!(
        " Decoding alone and {} side by side give at most {} rows/s; the CPU of walsender, sink and Redis, {cpu:.2} µs/row, \
         allows {} on {cores} cores. walmirror is at {:.2} of that.",
        piped.name,
        number(decoded.min(applied), 0),
        number(limit, 0),
        ours.median(RATE)? / limit,
    ))
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
    let decoding = rate(DECODING).unwrap_or(f64::INFINITY);
    if kind.name == "hash" {
        let what = "rows/s against --pipe of the same commands";
        goals.push(Goal::at_least(what, 0.9, "×", ours / pipe));
        let what = "thousand rows/s into hashes";
        goals.push(Goal::at_least(what, 100.0, "", ours / 1000.0));
    } else {
        let what = "rows/s against --pipe or decoding, the lower";
        goals.push(Goal::at_least(what, 0.9, "×", ours / pipe.min(decoding)));
    }
    for peer in &PEERS[..2] {
        if let Some(theirs) = rate(peer.name) {
            let what = format!("rows/s against {}", peer.name);
            goals.push(Goal::at_least(&what, 8.0, "×", ours / theirs));
        }
    }
    goals.push(memory_goal(&outcome.contestants[0]));
    goals
}

/// The sink's memory, in the worst round.
pub fn memory_goal(contestant: &Contestant) -> Goal {
    let sorted = contestant.sorted(CLIENT_MEMORY);
    let most = sorted.and_then(|v| v.last().copied()).unwrap_or(0.0);
    Goal::at_most("peak resident memory of the sink", 64.0, " MiB", most)
}
