//! `synchronized_standby_slots` (Postgres 17): a walsender waits for a standby before it sends what the standby does not have.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::io::Read;
use std::process::{Child, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use walmirror_tests::{DEADLINE, Db, Pg, wait_for};

/// A walsender that nobody wakes up looks around after ten seconds. Postgres itself may miss that the standby has more, once in some hundred
/// times; rows that were not sent were half of them.
const SOON: Duration = Duration::from_secs(5);
const MISSED: usize = 2;

/// Ends a program when it is dropped.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The story: of what the standby had, the last was read ahead and lay in the walsender's buffer until something woke the walsender up. The
/// client here says nothing by itself.
#[test]
fn what_the_standby_has_is_sent_before_more_is_waited_for() {
    let pg = Pg::start("wal_sender_timeout = 0");
    if pg.version() < 17 {
        println!(
            "not on this version: Postgres {} has no failover slots",
            pg.version()
        );
        return;
    }
    let db = Db::create(pg.into());
    db.sql("CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE other (v text); SELECT walmirror.mirror('t')");
    db.sql("SELECT pg_create_logical_replication_slot('s', 'walmirror', failover => true)");
    db.sql("SELECT pg_create_physical_replication_slot('standby', true)");
    db.sql("ALTER SYSTEM SET synchronized_standby_slots = 'standby'");
    db.pg.reload();
    let mut client = db
        .pg
        .program("pg_recvlogical", &db.name)
        .args(["-d", &db.name, "--slot", "s", "--start", "--no-loop", "-f", "-"])
        .args(["--fsync-interval", "0", "--status-interval", "0"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut stdout = client.stdout.take().unwrap();
    let stream = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut buffer = [0; 65_536];
            while let Ok(count @ 1..) = stdout.read(&mut buffer) {
                stream.lock().unwrap().extend_from_slice(&buffer[..count]);
            }
        });
        let _client = Ended(client);
        let has = |lsn| db.sql(&format!("SELECT pg_replication_slot_advance('standby', '{lsn}')"));
        let waits_for = |what: &str| {
            db.value(&format!(
                "SELECT count(*)::text FROM pg_stat_activity WHERE wait_event = '{what}'"
            )) == "1"
        };
        let mut late = 0;
        for id in 1..=20 {
            wait_for(DEADLINE, "the walsender to have read all", || {
                has(db.lsn());
                waits_for("WalSenderWaitForWal").then_some(())
            });
            let row = format!("row {id} of twenty");
            db.sql(&format!("INSERT INTO t VALUES ({id}, '{row}')"));
            wait_for(DEADLINE, "the walsender to wait for the standby", || {
                waits_for("WaitForStandbyConfirmation").then_some(())
            });
            let lsn = db.lsn();
            // More than the walsender leaves to its loop. The standby does not have it.
            db.sql("INSERT INTO other SELECT repeat('v', 1000) FROM generate_series(1, 300)");
            has(lsn);
            let started = Instant::now();
            wait_for(DEADLINE, &row, || {
                let stream = stream.lock().unwrap();
                let comes = stream.windows(row.len()).any(|bytes| bytes == row.as_bytes());
                comes.then_some(())
            });
            late += usize::from(started.elapsed() > SOON);
            assert!(late <= MISSED, "{late} of {id} rows were late");
        }
    });
}
