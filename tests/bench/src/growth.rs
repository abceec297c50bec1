//! Part `e2e-growth` (LONG=1): the same table in one transaction of ten thousand to ten million rows. Neither the rate nor the
//! memory of the sink may depend on the size of a transaction.

use std::collections::BTreeMap;

use postgres::SimpleQueryMessage;

use crate::backlog::Backlog;
use crate::e2e::{KINDS, backlog, memory_goal, note};
use crate::figures::{Contestant, Outcome, RATE};
use crate::options::Options;
use crate::workload;

const SIZES: [u64; 4] = [10_000_000, 1_000_000, 100_000, 10_000];

/// The largest first: the others are set against it. It is run once, it takes minutes.
pub fn run(options: &Options) -> Outcome {
    let mut contestants = Vec::new();
    for rows in SIZES.map(|rows| options.rows(rows)) {
        let backlog = backlog(&KINDS[0], |bed| workload::insert(bed, rows));
        let mut contestant = Contestant::new(&format!("{rows} rows"));
        for round in 0..if rows > 1_000_000 { 1 } else { options.rounds } {
            let run = backlog.sink();
            eprintln!(
                "  e2e-growth round {} {:<14} {:.2} s",
                round + 1,
                contestant.name,
                run.seconds
            );
            note(&mut contestant, &run, rows);
            check(&backlog, rows);
        }
        contestants.push(contestant);
    }
    let goals = vec![memory_goal(&contestants[0])];
    Outcome {
        name: "e2e-growth".to_owned(),
        title: "rows in one INSERT, into hash".to_owned(),
        compared: "After every run Redis held as many keys as there are rows, and a thousand of them were what Postgres prints.".to_owned(),
        headline: RATE,
        contestants,
        goals,
    }
}

/// The digest of ten million hashes takes minutes, so rows are counted, and a thousand that are spread evenly are compared.
fn check(backlog: &Backlog, rows: u64) {
    let mut connection = backlog.redis.connect();
    let size: u64 = redis::cmd("DBSIZE").query(&mut connection).unwrap();
    let own: Vec<String> = redis::cmd("KEYS")
        .arg("walmirror:*")
        .query(&mut connection)
        .unwrap();
    assert_eq!(size - own.len() as u64, rows, "keys in Redis");
    let sample = format!("FROM bench WHERE id % {} = 0", rows / 1_000);
    let query = KINDS[0].query.replace("FROM bench", &sample);
    let mut seen = 0;
    for message in backlog.bed.db.connect().simple_query(&query).unwrap() {
        let SimpleQueryMessage::Row(row) = message else {
            continue;
        };
        let text = |i| row.get(i).expect("a value").to_owned();
        let expected: BTreeMap<String, String> = (1..row.len())
            .step_by(2)
            .map(|i| (text(i), text(i + 1)))
            .collect();
        let held: BTreeMap<String, String> =
            redis::cmd("HGETALL").arg(text(0)).query(&mut connection).unwrap();
        assert_eq!(held, expected, "{}", text(0));
        seen += 1;
    }
    assert_eq!(seen, 1_000, "rows that were compared");
}
