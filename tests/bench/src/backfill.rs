//! Case `backfill`: a table that is there already into an empty Redis, by the sink from its very start (slot, first
//! connection and all) and by `redis-cli --pipe` with ready-made commands.

use crate::backlog::Backlog;
use crate::e2e::{KINDS, note};
use crate::figures::{Contestant, Goal, Outcome, RATE};
use crate::options::Options;
use crate::rivals::{self, pipe, ready_made};
use crate::workload;

/// The table of W1 into hashes.
pub fn run(options: &Options) -> Vec<Outcome> {
    let rows = options.rows(1_000_000);
    let kind = &KINDS[0];
    let backlog = Backlog::make(
        "",
        |bed| bed.db.sql(&format!("{}; {}", workload::TABLE, kind.label)),
        |bed| {
            workload::insert(bed, rows);
            bed.db.sql("VACUUM ANALYZE bench");
        },
    );
    let (bed, redis) = (&backlog.bed, &backlog.redis);
    let (name, shape) = kind.shapes[0];
    let file = ready_made(bed, kind.query, shape, "commands");
    let mut ours = Contestant::new("walmirror");
    let mut piped = Contestant::new(name);
    for round in 0..options.rounds {
        backlog.empty();
        let run = rivals::run(&mut pipe(&file, redis), name, bed, redis, None);
        note(&mut piped, &run, rows);
        let expected = backlog.digest();
        eprintln!("  backfill round {} {name:<20} {:.2} s", round + 1, run.seconds);

        backlog.empty();
        let run = backlog.run_sink();
        note(&mut ours, &run, rows);
        assert_eq!(
            backlog.digest(),
            expected,
            "Redis after the backfill is not what Postgres holds"
        );
        eprintln!(
            "  backfill round {} {:<20} {:.2} s",
            round + 1,
            "walmirror",
            run.seconds
        );
    }
    let mut outcome = Outcome {
        name: "backfill".to_owned(),
        title: format!("backfill of {rows} rows into hash"),
        compared: "After every run all of Redis had the same digest.".to_owned(),
        headline: RATE,
        contestants: vec![ours, piped],
        goals: Vec::new(),
    };
    let against_pipe = outcome.ratio(name, RATE).unwrap();
    outcome
        .goals
        .push(Goal::at_least("rows/s against --pipe", 0.9, "×", against_pipe));
    vec![outcome]
}
