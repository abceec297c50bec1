//! Case `capture`: how long a row takes from its SELECT to Redis on an idle server, and what SELECT capture costs the
//! queries, with pgbench's select-only transactions, prepared, scale 10, two clients. No sink reads the stream in the second
//! part: it is the price of writing it.
//!
//! The contestants take turns of a few seconds, many of them, in changing order, because the difference to be seen is
//! smaller than what a shared machine's speed changes within a minute. The ratio to the baseline is taken turn by turn.
//! Shorter turns would mostly measure how a new session meets each page of shared memory for the first time.

use std::fs;
use std::time::{Duration, Instant};

use rand::seq::SliceRandom;
use walmirror_tests::{DEADLINE, Db, Mirror, wait_for};

use crate::bed::Bed;
use crate::figures::{Contestant, Goal, Metric, Outcome};
use crate::options::Options;

const RATE: Metric = Metric {
    name: "transactions/s",
    digits: 0,
};
const RATIO: Metric = Metric {
    name: "of its baseline, turn by turn",
    digits: 3,
};
const CPU: Metric = Metric {
    name: "backend CPU µs/transaction",
    digits: 2,
};

/// Rows of scale 10.
const ROWS: u64 = 1_000_000;
const TURN_SECONDS: u64 = 4;
const TURNS_A_ROUND: usize = 4;

/// A way to run the queries.
struct Mode {
    name: &'static str,
    /// Whether it is the database where the table is cached.
    cached: bool,
    options: &'static str,
    /// What a transaction adds to the counters of capture: rows seen, rows written.
    seen: f64,
    written: f64,
    /// Which mode it is set against.
    baseline: usize,
}

const MODES: [Mode; 5] = [
    Mode {
        name: "capture off",
        cached: true,
        options: "-c walmirror.capture=off",
        seen: 0.0,
        written: 0.0,
        baseline: 0,
    },
    Mode {
        name: "captured recently",
        cached: true,
        options: "-c walmirror.capture_interval=3600000",
        seen: 1.0,
        written: 0.0,
        baseline: 0,
    },
    Mode {
        name: "every SELECT captures",
        cached: true,
        options: "-c walmirror.capture_interval=0",
        seen: 1.0,
        written: 1.0,
        baseline: 0,
    },
    Mode {
        name: "table not cached, off",
        cached: false,
        options: "-c walmirror.capture=off",
        seen: 0.0,
        written: 0.0,
        baseline: 3,
    },
    Mode {
        name: "table not cached, on",
        cached: false,
        options: "-c walmirror.capture=on",
        seen: 0.0,
        written: 0.0,
        baseline: 3,
    },
];

const P50: Metric = Metric {
    name: "SELECT to key, p50 ms",
    digits: 2,
};
const P99: Metric = Metric {
    name: "p99 ms",
    digits: 2,
};

/// Both parts.
pub fn run(options: &Options) -> Vec<Outcome> {
    vec![latency(options), overhead(options)]
}

/// A SELECT, and then looks at Redis until the key is there; between them nobody uses the server.
fn latency(options: &Options) -> Outcome {
    let looks = if options.quick { 20 } else { 60 };
    let rows = looks * options.rounds;
    let mirror = Mirror::alone("fsync = on");
    mirror.sql(&format!(
        "CREATE TABLE c (id int PRIMARY KEY, v text); INSERT INTO c SELECT i, 'v' || i FROM generate_series(1, {rows}) i"
    ));
    mirror.sql("SELECT walmirror.cache('c')");
    mirror.start();
    mirror.sync();
    let mut session = mirror.db.connect();
    let select = session.prepare("SELECT v FROM c WHERE id = $1").unwrap();
    let mut redis = mirror.redis.connect();
    let mut contestant = Contestant::new("walmirror");
    for round in 0..options.rounds {
        let mut taken: Vec<f64> = (1..=looks)
            .map(|look| {
                // Longer than wal_writer_delay, so that no flush of before helps.
                std::thread::sleep(Duration::from_millis(250));
                let id = (round * looks + look) as i32;
                let key = format!("c:{id}");
                let start = Instant::now();
                session.execute(&select, &[&id]).unwrap();
                while !redis::cmd("EXISTS").arg(&key).query::<bool>(&mut redis).unwrap() {
                    assert!(start.elapsed() < DEADLINE, "{key} did not arrive");
                    std::thread::sleep(Duration::from_micros(100));
                }
                start.elapsed().as_secs_f64() * 1e3
            })
            .collect();
        taken.sort_by(f64::total_cmp);
        contestant.add(P50, taken[looks / 2]);
        contestant.add(P99, taken[(looks - 1) * 99 / 100]);
    }
    let goals = vec![Goal::at_most(
        "median from SELECT to key",
        50.0,
        " ms",
        contestant.median(P50).unwrap(),
    )];
    Outcome {
        name: "capture-latency".to_owned(),
        title: "one SELECT on an idle server, fsync on".to_owned(),
        compared: "Every key arrived.".to_owned(),
        headline: P50,
        contestants: vec![contestant],
        goals,
    }
}

/// All modes in turns.
fn overhead(options: &Options) -> Outcome {
    // A slot for every row, so that all of them can be captured recently.
    let bed = Bed::start("walmirror.capture_table_size = 4194304");
    let plain = Db::create(bed.db.pg.clone());
    for db in [&bed.db, &plain] {
        let fill = db
            .pg
            .program("pgbench", &db.name)
            .args(["-i", "-q", "-s", "10"])
            .output();
        assert!(fill.expect("run pgbench").status.success(), "pgbench -i");
    }
    bed.db.sql("SELECT walmirror.cache('pgbench_accounts')");
    bed.db.sql(
        "SET max_parallel_workers_per_gather = 0;
         SET enable_indexonlyscan = off;
         SET walmirror.capture_interval = '1h';
         SET walmirror.capture_max_rows = 10000000;
         SELECT sum(abalance) FROM pgbench_accounts;
         RESET ALL",
    );
    assert_eq!(
        counter(&bed.db, "rows_emitted"),
        ROWS,
        "every row was captured once"
    );

    let mut contestants: Vec<Contestant> = MODES.iter().map(|mode| Contestant::new(mode.name)).collect();
    let mut order: Vec<usize> = (0..MODES.len()).collect();
    let turns = options.rounds * if options.quick { 1 } else { TURNS_A_ROUND };
    for turn in 0..turns {
        order.shuffle(&mut rand::rng());
        let mut rates = [0.0; MODES.len()];
        for &at in &order {
            let mode = &MODES[at];
            let db = if mode.cached { &bed.db } else { &plain };
            let (rate, cpu) = measure(db, mode);
            rates[at] = rate;
            contestants[at].add(RATE, rate);
            contestants[at].add(CPU, cpu);
        }
        for (at, mode) in MODES.iter().enumerate() {
            contestants[at].add(RATIO, rates[at] / rates[mode.baseline]);
        }
        let ratios: Vec<String> = (0..MODES.len())
            .map(|at| format!("{:.3}", rates[at] / rates[MODES[at].baseline]))
            .collect();
        eprintln!("  turn {} {}", turn + 1, ratios.join(" "));
    }
    let lost = |at: usize| (1.0 - contestants[at].median(RATIO).unwrap()) * 100.0;
    let goals = vec![
        Goal::at_most("lost when captured recently", 3.0, " %", lost(1)),
        Goal::at_most("lost when every SELECT captures", 12.0, " %", lost(2)),
        Goal::at_most("lost by tables that are not cached", 1.0, " %", lost(4)),
    ];
    Outcome {
        name: "capture".to_owned(),
        title: "pgbench -S, prepared, 2 clients".to_owned(),
        compared: "The counters of capture moved by as much as the transactions of each turn call for."
            .to_owned(),
        headline: RATE,
        contestants,
        goals,
    }
}

/// Transactions a second of a turn, and the CPU time of its backends in microseconds a transaction.
fn measure(db: &Db, mode: &Mode) -> (f64, f64) {
    let postmaster = postmaster(db);
    let children_before = children(postmaster);
    let cpu_before = cpu_of_children(postmaster);
    let (seen_before, written_before) = (counter(db, "rows_seen"), counter(db, "rows_emitted"));
    let seconds = TURN_SECONDS.to_string();
    let output = db
        .pg
        .program("pgbench", &db.name)
        .args(["-S", "-n", "-M", "prepared", "-c", "2", "-j", "2", "-T", &seconds])
        .env("PGOPTIONS", mode.options)
        .output()
        .expect("run pgbench");
    let text = String::from_utf8_lossy(&output.stdout);
    let figure = |name: &str| -> f64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let word = line.and_then(|rest| rest.split_whitespace().next());
        word.and_then(|word| word.parse().ok())
            .unwrap_or_else(|| panic!("pgbench printed no '{name}': {text}"))
    };
    let transactions = figure("number of transactions actually processed: ");
    // The kernel accounts a process to its parent when that has waited for it.
    wait_for(DEADLINE, "the backends to end", || {
        (children(postmaster) == children_before).then_some(())
    });
    let check = |what: &str, moved: u64, a_transaction: f64| {
        let share = moved as f64 / transactions;
        // A full bucket of the recently-captured table forgets a row now and then.
        assert!(
            (share - a_transaction).abs() < 0.02,
            "{}: {what} moved by {share:.3} a transaction",
            mode.name
        );
    };
    check("rows_seen", counter(db, "rows_seen") - seen_before, mode.seen);
    check(
        "rows_emitted",
        counter(db, "rows_emitted") - written_before,
        mode.written,
    );
    let cpu = (cpu_of_children(postmaster) - cpu_before).as_secs_f64();
    (figure("tps = "), cpu * 1e6 / transactions)
}

fn counter(db: &Db, name: &str) -> u64 {
    let query = format!("SELECT value FROM walmirror.capture_stats WHERE counter = '{name}'");
    db.value(&query).parse().expect("a counter")
}

fn postmaster(db: &Db) -> u32 {
    let file = fs::read_to_string(db.pg.data().join("postmaster.pid")).expect("postmaster.pid");
    file.lines()
        .next()
        .and_then(|line| line.parse().ok())
        .expect("a process id")
}

fn children(process: u32) -> usize {
    let text = fs::read_to_string(format!("/proc/{process}/task/{process}/children"));
    text.expect("/proc/…/children").split_whitespace().count()
}

/// CPU time of the children that ended (`cutime` and `cstime`; ticks of 10 ms).
fn cpu_of_children(process: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).expect("/proc/…/stat");
    let (_, fields) = stat.rsplit_once(") ").expect("a command name in parentheses");
    let ticks: u64 = fields
        .split(' ')
        .skip(13)
        .take(2)
        .map(|field| field.parse::<u64>().unwrap())
        .sum();
    Duration::from_millis(ticks * 10)
}
