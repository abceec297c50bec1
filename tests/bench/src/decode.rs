//! Case `decode`: the WAL of two workloads through pg_recvlogical into a pipe, by each output plugin.

use walmirror_tests::Lsn;

use crate::bed::Bed;
use crate::figures::{BYTES, Contestant, Goal, Outcome, RATE, WALSENDER_CPU, WALSENDER_MEMORY};
use crate::options::Options;
use crate::receive::{LIMIT, PLUGINS, Plugin, count, receive};
use crate::workload;

/// W1 and W2.
pub fn run(options: &Options) -> Vec<Outcome> {
    let bed = Bed::start("");
    bed.db.sql(workload::TABLE);
    bed.db
        .sql("SELECT walmirror.mirror('bench'); CREATE PUBLICATION bench FOR TABLE bench");
    let (rows, updates) = (options.rows(1_000_000), options.rows(200_000));

    bed.mark("w1");
    workload::insert(&bed, rows);
    let title = format!("W1: {rows} rows in one INSERT");
    let w1 = measure(options, &bed, "decode-w1", title, ("w1", bed.end()), (rows, 0));

    bed.mark("w2");
    workload::update(&bed, rows, updates);
    let title = format!("W2: {updates} one-row UPDATE transactions");
    let w2 = measure(options, &bed, "decode-w2", title, ("w2", bed.end()), (0, updates));

    let both = together(&w1, &w2, rows, updates);
    vec![w1, w2, both]
}

fn measure(
    options: &Options,
    bed: &Bed,
    name: &str,
    title: String,
    (mark, end): (&str, Lsn),
    expected: (u64, u64),
) -> Outcome {
    let rows = (expected.0 + expected.1) as f64;
    let mut contestants = Vec::new();
    for plugin in &PLUGINS {
        match bed.has_plugin(plugin.library) {
            Ok(()) => {
                check(bed, plugin, (mark, end), expected);
                contestants.push(Contestant::new(plugin.name));
            }
            Err(why) => contestants.push(Contestant::skipped(plugin.name, &why)),
        }
    }
    for round in 0..options.rounds {
        for (plugin, contestant) in PLUGINS.iter().zip(&mut contestants) {
            if contestant.skipped.is_some() {
                continue;
            }
            let pass = receive(bed, plugin, mark, end);
            eprintln!(
                "  {name} round {} {:<27} {:.2} s",
                round + 1,
                plugin.name,
                pass.seconds
            );
            contestant.add(RATE, rows / pass.seconds);
            contestant.add(BYTES, pass.bytes as f64 / rows);
            contestant.add(WALSENDER_CPU, pass.walsender.cpu * 1e6 / rows);
            contestant.add(WALSENDER_MEMORY, pass.walsender.private as f64 / 1048576.0);
        }
    }
    for contestant in contestants.iter().filter(|c| c.skipped.is_none()) {
        let bytes = contestant.sorted(BYTES).unwrap();
        assert_eq!(
            bytes.first(),
            bytes.last(),
            "{} put out different bytes",
            contestant.name
        );
    }
    let compared = "Every plugin's output held the same number of inserted and updated rows, and the same bytes in every round.";
    let mut outcome = Outcome {
        name: name.to_owned(),
        title,
        compared: compared.to_owned(),
        headline: RATE,
        contestants,
        goals: Vec::new(),
    };
    outcome.goals = goals(&outcome);
    outcome
}

/// Refuses to measure what is not equal.
fn check(bed: &Bed, plugin: &Plugin, (mark, end): (&str, Lsn), expected: (u64, u64)) {
    let expected = if plugin.name.starts_with(LIMIT) {
        (0, 0)
    } else {
        expected
    };
    let counted = count(bed, plugin, mark, end);
    assert_eq!(
        counted, expected,
        "{}: inserted and updated rows in its output",
        plugin.name
    );
}

fn goals(outcome: &Outcome) -> Vec<Goal> {
    let mut goals = Vec::new();
    let cpu = |name| outcome.find(name).and_then(|c| c.median(WALSENDER_CPU));
    if let (Some(ours), Some(limit)) = (cpu("walmirror"), cpu(LIMIT)) {
        goals.push(Goal::at_most(
            "walsender CPU over the nothing-sent limit",
            1.0,
            " µs/row",
            ours - limit,
        ));
    }
    if outcome.name == "decode-w1"
        && let Some(ratio) = outcome.ratio("pgoutput binary", BYTES)
    {
        goals.push(Goal::at_most(
            "bytes/row against pgoutput binary",
            0.6,
            "×",
            ratio,
        ));
    }
    goals
}

/// The two workloads one after the other: rows of both over the time of both, round by round.
fn together(w1: &Outcome, w2: &Outcome, rows: u64, updates: u64) -> Outcome {
    let mut contestants = Vec::new();
    for (first, second) in w1.contestants.iter().zip(&w2.contestants) {
        let mut both = Contestant::new(&first.name);
        both.skipped = first.skipped.clone();
        let rates = |c: &Contestant| c.rounds(RATE).to_vec();
        for (a, b) in rates(first).into_iter().zip(rates(second)) {
            both.add(
                RATE,
                (rows + updates) as f64 / (rows as f64 / a + updates as f64 / b),
            );
        }
        contestants.push(both);
    }
    let mut outcome = Outcome {
        name: "decode".to_owned(),
        title: "W1 and W2".to_owned(),
        compared: w1.compared.clone(),
        headline: RATE,
        contestants,
        goals: Vec::new(),
    };
    let targets = [
        ("pgoutput binary", 3.0),
        ("pgoutput binary, streaming", 3.0),
        ("wal2json", 4.5),
        ("decoderbufs", 4.5),
        ("test_decoding", 4.5),
    ];
    for (peer, target) in targets {
        if let Some(ratio) = outcome.ratio(peer, RATE) {
            outcome.goals.push(Goal::at_least(
                &format!("rows/s against {peer}"),
                target,
                "×",
                ratio,
            ));
        }
    }
    outcome
}
