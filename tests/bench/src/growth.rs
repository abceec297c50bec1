//! Part `e2e-growth` (LONG=1): the same table in one transaction of ten thousand to ten million rows. Neither the rate nor the
//! memory of the sink may depend on the size of a transaction.

use crate::e2e::{KINDS, backlog, memory_goal, note};
use crate::figures::{Contestant, Outcome, RATE};
use crate::options::Options;
use crate::rivals::{self, pipe, ready_made};
use crate::workload;

const SIZES: [u64; 4] = [10_000_000, 1_000_000, 100_000, 10_000];

/// The largest first: the others are set against it. It is run once, it takes minutes.
pub fn run(options: &Options) -> Outcome {
    let kind = &KINDS[0];
    let (name, shape) = kind.shapes[0];
    let mut contestants = Vec::new();
    for rows in SIZES.map(|rows| options.rows(rows)) {
        let backlog = backlog(kind, |bed| workload::insert(bed, rows));
        let (bed, redis) = (&backlog.bed, &backlog.redis);
        let file = ready_made(bed, kind.query, shape, "commands");
        backlog.rewind("walmirror");
        rivals::run(&mut pipe(&file, redis), name, bed, redis, None);
        let expected = backlog.digest();
        let mut contestant = Contestant::new(&format!("{rows} rows"));
        for round in 0..if rows > 1_000_000 { 1 } else { options.rounds } {
            let run = backlog.sink();
            assert_eq!(
                backlog.digest(),
                expected,
                "Redis after {rows} rows in one transaction"
            );
            eprintln!(
                "  e2e-growth round {} {:<14} {:.2} s",
                round + 1,
                contestant.name,
                run.seconds
            );
            note(&mut contestant, &run, rows);
        }
        contestants.push(contestant);
    }
    let goals = vec![memory_goal(&contestants[0])];
    Outcome {
        name: "e2e-growth".to_owned(),
        title: "rows in one INSERT, into hash".to_owned(),
        compared: "After every run all of Redis had the same digest as after the commands that Postgres itself made.".to_owned(),
        headline: RATE,
        contestants,
        goals,
    }
}
