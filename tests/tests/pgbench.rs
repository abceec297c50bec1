//! Real input: a TPC-B run, all four tables mirrored, every row compared afterwards.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::time::{Duration, Instant};

use walmirror_tests::Mirror;

#[test]
fn tpc_b_at_scale_10_with_4_clients_for_30_seconds() {
    let m = Mirror::alone("");
    let pgbench = |args: &[&str]| {
        let output =
            m.db.pg
                .program("pgbench", &m.db.name)
                .args(args)
                .output()
                .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    pgbench(&["-i", "-s", "10", "-q"]);
    // The history has no key of its own.
    m.sql("ALTER TABLE pgbench_history ADD id bigserial PRIMARY KEY");
    for table in ["accounts", "branches", "tellers", "history"] {
        m.sql(&format!("SELECT walmirror.mirror('pgbench_{table}')"));
    }
    m.start();
    let run = pgbench(&["-c", "4", "-j", "2", "-T", "30", "-n"]);
    println!(
        "{}",
        run.lines()
            .filter(|line| line.contains("number of transactions"))
            .collect::<Vec<_>>()
            .join("\n")
    );
    let start = Instant::now();
    m.sync_within(Duration::from_secs(120));
    println!("caught up {:?} after the end", start.elapsed());
    let report = m.settle_within(Duration::from_secs(120));
    for (table, rows) in &report.tables {
        println!("{table}: {rows} rows equal");
    }
    assert!(report.rows > 1_000_110);
}
