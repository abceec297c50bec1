//! Transaction ids have 32 bits in WAL and in rows, and begin anew: what came later has the smaller one then.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::sync::Arc;

use walmirror_tests::{Pg, Scenario, Setup};

/// Ids that are used up at once, while the load goes on.
const BURST: &str =
    "DO $$ BEGIN FOR i IN 1..3000 LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$";

#[test]
fn transaction_ids_begin_anew() {
    let setup = Setup {
        pg: Arc::new(Pg::start_before_wraparound()),
        ..Setup::default()
    };
    let mut s = Scenario::start("transaction_ids_begin_anew", setup);
    let next = |s: &Scenario| {
        s.m.db
            .value("SELECT pg_current_xact_id()")
            .parse::<u64>()
            .unwrap()
    };
    assert!(next(&s) < 1 << 32, "they have begun anew already");
    // These begin before, and end after. The load leaves their rows alone.
    let mut early = s.m.db.connect();
    early
        .batch_execute("BEGIN; INSERT INTO item VALUES (1000, 1, 'early')")
        .unwrap();
    s.m.sql("INSERT INTO seen SELECT i, 0, 'early' FROM generate_series(1001, 1050) i");
    let mut reader = s.m.db.connect();
    reader
        .batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM item")
        .unwrap();
    let mut bursts = 0;
    while next(&s) < (1 << 32) + 10_000 {
        s.m.sql(BURST);
        bursts += 1;
        if bursts % 4 == 0 {
            s.kill_sink();
            s.flow();
        }
    }
    // What a SELECT reads with a snapshot from before is older than what was written since.
    s.m.sql("UPDATE seen SET n = 1, note = 'late' WHERE id > 1000");
    reader
        .batch_execute("SELECT * FROM seen WHERE id > 1000; COMMIT")
        .unwrap();
    early
        .batch_execute("UPDATE item SET n = n + 1 WHERE id = 1000; COMMIT")
        .unwrap();
    s.converge();
    assert!(s.cached > 0, "no cache ever held a row");
    let (code, output) = s.m.run(&["verify"]);
    assert_eq!(code, Some(0), "{output}");
    s.finish(&[]);
}
