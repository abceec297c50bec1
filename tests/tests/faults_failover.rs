//! A primary with a failover slot (Postgres 17) dies, and its standby is promoted.
//!
//! Without such a slot a failover is a gap: faults_postgres.rs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::sync::Arc;

use walmirror_tests::{DEADLINE, POSTGRES_AWAY, Pg, Scenario, Setup, Signal, wait_for};

/// What the sink may say while there is no primary.
/// A primary, its standby, and a mirror that knows both. None, with a word, where Postgres has no failover slots.
fn start(name: &str, synchronized: bool) -> Option<(Scenario, Pg)> {
    let primary = Pg::start("");
    if primary.version() < 17 {
        println!(
            "not on this version: Postgres {} has no failover slots",
            primary.version()
        );
        return None;
    }
    let mut sql = primary.connect("postgres");
    sql.batch_execute("SELECT pg_create_physical_replication_slot('standby', true)")
        .unwrap();
    let standby = Pg::create("");
    standby.replace_data(&primary.base_backup());
    standby.configure(&format!(
        "unix_socket_directories = '{}'\n\
         primary_conninfo = '{}'\n\
         primary_slot_name = 'standby'\n\
         hot_standby_feedback = on\n\
         sync_replication_slots = on",
        standby.host(),
        primary.conninfo("postgres")
    ));
    standby.resume();
    if synchronized {
        sql.batch_execute("ALTER SYSTEM SET synchronized_standby_slots = 'standby'")
            .unwrap();
        sql.batch_execute("SELECT pg_reload_conf()").unwrap();
    }
    primary.fails_over_to(&standby);
    let setup = Setup {
        pg: Arc::new(primary),
        ..Setup::default()
    };
    let s = Scenario::start(name, setup);
    let slot = "SELECT FROM pg_replication_slots WHERE slot_name = $1 AND synced AND NOT temporary AND invalidation_reason IS NULL";
    wait_for(DEADLINE, "the standby to have the slot", || {
        // What the copy of the slot begins with has to be behind what the primary's slot needs.
        s.m.sql("SELECT pg_log_standby_snapshot()");
        let found = standby.connect("postgres").query(slot, &[&s.m.db.name]);
        (!found.unwrap().is_empty()).then_some(())
    });
    Some((s, standby))
}

/// The primary dies, whatever is under way.
fn fail_over(s: &Scenario, standby: &Pg) {
    s.m.db.pg.stop(Signal::KILL);
    standby
        .connect("postgres")
        .batch_execute("SELECT pg_promote()")
        .unwrap();
    s.m.db.reconnect();
}

/// `synchronized_standby_slots`: the sink sees nothing that the standby does not have, so it just goes on; a backfill as well.
#[test]
fn a_failover_slot_goes_on() {
    let Some((s, standby)) = start("a_failover_slot_goes_on", true) else {
        return;
    };
    s.flow();
    s.m.sql(
        "CREATE TABLE late (id int PRIMARY KEY, v text); INSERT INTO late SELECT i, repeat('v', 50) FROM generate_series(1, 60000) i; \
         SELECT walmirror.mirror('late')",
    );
    s.reach();
    fail_over(&s, &standby);
    s.said("there was a failover from timeline 1 to 2", 0);
    s.m.sql(
        "UPDATE late SET v = 'on the new primary' WHERE id % 100 = 0; DELETE FROM late WHERE id % 100 = 1",
    );
    s.flow();
    // The progress is of the new timeline.
    let seen = s.log().len();
    s.kill_sink();
    s.flow();
    let log = s.log();
    assert!(!log[seen..].contains("there was a failover"), "{log}");
    assert!(!log.contains("do not fit"), "{log}");
    s.load.rest();
    s.m.settle();
    s.keeps_secret("the standby's log", &standby.log());
    s.finish(&POSTGRES_AWAY);
}

/// Nothing keeps the sink from seeing what the standby does not have yet. Redis holds what Postgres lost: a gap, whose end is
/// that it does not.
#[test]
fn a_failover_slot_behind_redis_is_a_gap() {
    let Some((mut s, standby)) = start("a_failover_slot_behind_redis_is_a_gap", false) else {
        return;
    };
    let mut sql = standby.connect("postgres");
    // The story: what was prepared when the standby was cut off stayed so for ever on the new primary, and the backfill waited for it.
    s.load.rest();
    let rested = s.m.db.lsn();
    wait_for(DEADLINE, "the standby to have what the load did", || {
        let replayed = format!("SELECT FROM pg_last_wal_replay_lsn() AS lsn WHERE lsn >= '{rested}'");
        (!sql.query(&replayed, &[]).unwrap().is_empty()).then_some(())
    });
    sql.batch_execute("ALTER SYSTEM SET primary_conninfo = ''")
        .unwrap();
    sql.batch_execute("SELECT pg_reload_conf()").unwrap();
    wait_for(DEADLINE, "the standby to be cut off", || {
        let receivers = sql.query("SELECT FROM pg_stat_wal_receiver", &[]);
        receivers.unwrap().is_empty().then_some(())
    });
    s.load.resume();
    s.flow();
    s.m.sql("INSERT INTO item SELECT i, i, 'of a future that never was' FROM generate_series(2000, 2100) i; DELETE FROM doc");
    s.reach();
    s.resyncs();
    s.load.rest();
    fail_over(&s, &standby);
    s.said("Postgres lost what is between", 0);
    s.m.settle();
    s.keeps_secret("the standby's log", &standby.log());
    s.finish(&[&POSTGRES_AWAY[..], &["Postgres lost what is between"]].concat());
}
