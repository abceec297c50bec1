//! `make bench`: private servers, every case, one table each, results as JSON and SVG.
//!
//!     bench [CASE]...        decode, e2e, latency, backfill, workloads, capture; all of them without a name
//!
//! A part of a case has a name of its own: `e2e-hash`, `e2e-json`, `e2e-string`, `e2e-w2`, `e2e-growth`.
//!
//! `QUICK=1` measures on a tenth of the rows, `LONG=1` adds 10 M rows, `ROUNDS=n` repeats n times (at least 3), and
//! `OUT=dir` says where the results go. The contestants of a case take turns within each round, so that a machine that
//! slows down slows down all of them, and CPU time per row stands beside every rate. A case compares what its
//! contestants put out before it reports anything.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod options;

// What is run.
mod backlog;
mod bed;
mod peers;
mod receive;
mod rivals;
mod workload;

// How it is measured and shown.
mod figures;
mod machine;
mod meter;
mod plot;

// The cases.
mod backfill;
mod capture;
mod decode;
mod e2e;
mod growth;
mod latency;
mod workloads;

use options::Options;

type Case = (&'static str, fn(&Options) -> Vec<figures::Outcome>);

const CASES: [Case; 6] = [
    ("decode", decode::run),
    ("e2e", e2e::run),
    ("latency", latency::run),
    ("backfill", backfill::run),
    ("workloads", workloads::run),
    ("capture", capture::run),
];

fn main() {
    end_on_signal();
    let options = Options::from_environment();
    let known = CASES.map(|(name, _)| name);
    let is_known = |case: &String| known.contains(&case.split('-').next().unwrap_or_default());
    if let Some(unknown) = options.cases.iter().find(|case| !is_known(case)) {
        eprintln!(
            "bench: there is no case {unknown}; there are {}",
            known.join(", ")
        );
        std::process::exit(2);
    }
    std::fs::create_dir_all(&options.out).expect("make the directory of the results");
    let machine = machine::describe();
    println!("{machine}");
    for (name, run) in CASES {
        if options.wants(name) {
            println!("\n== {name}");
            for outcome in run(&options) {
                println!("\n{outcome}");
                outcome.save(&options, &machine);
            }
        }
    }
    println!("\nresults: {}", options.out.display());
}

/// On Ctrl-C the servers end with this process; their directories go here.
fn end_on_signal() {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM]).expect("signal handlers");
    std::thread::spawn(move || {
        signals.forever().next();
        walmirror_tests::remove_dirs();
        std::process::exit(130);
    });
}
