//! What Redis and Postgres may say of each other, and what is decided.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::progress::Purging;
use crate::transaction::{Commit, Part};

const END: Lsn = Lsn(100);

fn identity(timeline: u32) -> Identity {
    Identity {
        system_id: "1".into(),
        timeline,
        database: "d".into(),
    }
}

fn progress(lsn: u64) -> Progress {
    let Identity {
        system_id,
        timeline,
        database,
    } = identity(1);
    Progress {
        lsn: Lsn(lsn),
        epoch: 1,
        system_id,
        timeline,
        database,
        ..Progress::default()
    }
}

fn slot(confirmed: u64) -> SlotInfo {
    SlotInfo {
        plugin: Some("walmirror".into()),
        database: Some("d".into()),
        confirmed_flush_lsn: Some(Lsn(confirmed)),
        restart_lsn: Some(Lsn(confirmed)),
        active: false,
        active_pid: None,
        wal_status: Some("reserved".into()),
        failover: Some(true),
    }
}

fn server<'a>(identity: &'a Identity, slot: &'a SlotInfo, history: &'a History) -> Server<'a> {
    Server {
        slot: Some(slot),
        identity,
        history,
        end: END,
    }
}

/// On timeline 1.
fn at_home(progress: Option<&Progress>, slot: Option<&SlotInfo>) -> Decision {
    on(&identity(1), progress, slot)
}

/// On timeline 3, which left 2 at 60, which had left 1 at 50.
fn after_two_failovers(progress: &Progress, slot: &SlotInfo) -> Decision {
    on(&identity(3), Some(progress), Some(slot))
}

fn on(identity: &Identity, progress: Option<&Progress>, slot: Option<&SlotInfo>) -> Decision {
    let history = History::parse("1 0/32 x\n2 0/3C x").unwrap();
    let server = Server {
        slot,
        identity,
        history: &history,
        end: END,
    };
    decide(progress, &server, None)
}

#[track_caller]
fn assert_gap(decision: &Decision, start: Option<u64>, because: &str) {
    assert!(
        matches!(decision, Decision::Gap { why, slot } if why.contains(because) && *slot == start.map(Lsn)),
        "{decision:?}"
    );
}

fn purging(commit: Option<u64>) -> Purging {
    let commit = commit.map(|lsn| Commit {
        lsn: Lsn(lsn),
        xid: 1,
        time: 1,
    });
    Purging { commit }
}

#[test]
fn what_fits_goes_on() {
    assert_eq!(at_home(None, None), Decision::First(None));
    for confirmed in [5, 10] {
        assert_eq!(
            at_home(Some(&progress(10)), Some(&slot(confirmed))),
            Decision::Resume(Lsn(10))
        );
    }
    // On its own timeline the slot need not be a failover slot, and what is ahead of the position comes again.
    let ahead = Progress {
        part: Some(part(70)),
        purging: Some(purging(Some(70))),
        ..progress(10)
    };
    let plain = SlotInfo {
        failover: Some(false),
        ..slot(5)
    };
    assert_eq!(at_home(Some(&ahead), Some(&plain)), Decision::Resume(Lsn(10)));
}

#[test]
fn what_does_not_fit_is_a_gap_with_a_reason() {
    assert_gap(&at_home(Some(&progress(10)), Some(&slot(11))), Some(11), "0/B");
    assert_gap(&at_home(Some(&progress(101)), Some(&slot(5))), Some(5), "0/64");
    let in_part = Progress {
        part: Some(part(100)),
        ..progress(10)
    };
    assert_gap(
        &at_home(Some(&in_part), Some(&slot(5))),
        Some(5),
        "ends at 0/64: the server was put back",
    );
    assert_gap(&at_home(Some(&progress(10)), None), None, "slot is gone");
    assert_gap(&at_home(None, Some(&slot(5))), Some(5), "no progress");
    let other = |identity: Identity| on(&identity, Some(&progress(10)), Some(&slot(5)));
    let cluster = Identity {
        system_id: "2".into(),
        ..identity(1)
    };
    assert_gap(&other(cluster), Some(5), "system identifier");
    let database = Identity {
        database: "e".into(),
        ..identity(1)
    };
    assert_gap(&other(database), Some(5), "database");
    let lost = SlotInfo {
        wal_status: Some("lost".into()),
        ..slot(5)
    };
    assert_gap(
        &at_home(Some(&progress(10)), Some(&lost)),
        None,
        "has lost the WAL",
    );
}

#[test]
fn what_the_session_before_found_is_a_gap_unless_another_one_began_since() {
    let found = |epoch| Found {
        why: "never was".to_owned(),
        epoch,
        slot_is_lost: false,
    };
    let (identity, slot, history) = (identity(1), slot(5), History::none());
    let server = server(&identity, &slot, &history);
    let decision = decide(Some(&progress(10)), &server, Some(&found(1)));
    assert_gap(&decision, Some(5), "never was");
    let later = decide(Some(&progress(10)), &server, Some(&found(0)));
    assert_eq!(later, Decision::Resume(Lsn(10)));
    // A slot whose WAL was removed behind its back is of no use.
    let lost = Found {
        slot_is_lost: true,
        ..found(1)
    };
    let decision = decide(Some(&progress(10)), &server, Some(&lost));
    assert_gap(&decision, None, "never was");
}

fn part(commit_lsn: u64) -> Part {
    Part {
        xid: 7,
        commit_lsn: Lsn(commit_lsn),
        commit_time: None,
        records: 3,
    }
}

#[test]
fn a_failover_that_lost_nothing_goes_on() {
    for lsn in [10, 50] {
        assert_eq!(
            after_two_failovers(&progress(lsn), &slot(5)),
            Decision::Resume(Lsn(lsn))
        );
    }
    let on_the_second = Progress {
        timeline: 2,
        ..progress(60)
    };
    assert_eq!(
        after_two_failovers(&on_the_second, &slot(60)),
        Decision::Resume(Lsn(60))
    );
    let in_part = Progress {
        part: Some(part(49)),
        ..progress(40)
    };
    assert_eq!(
        after_two_failovers(&in_part, &slot(40)),
        Decision::Resume(Lsn(40))
    );
}

#[test]
fn a_failover_that_lost_something_is_a_gap() {
    let ahead = after_two_failovers(&progress(51), &slot(5));
    assert_gap(&ahead, Some(5), "begins at 0/32, and Redis is at 0/33");
    let in_part = Progress {
        part: Some(part(50)),
        ..progress(40)
    };
    assert_gap(
        &after_two_failovers(&in_part, &slot(5)),
        Some(5),
        "part of the transaction that commits at 0/32",
    );
    // A purge goes on where its transaction is in the history, and nobody knows about one without.
    for (commit, why) in [
        (Some(50), "lost keys to the transaction that commits at 0/32"),
        (None, "lost keys to a change behind 0/28"),
    ] {
        let ahead = Progress {
            purging: Some(purging(commit)),
            ..progress(40)
        };
        assert_gap(&after_two_failovers(&ahead, &slot(5)), Some(5), why);
    }
    let behind = Progress {
        purging: Some(purging(Some(49))),
        ..progress(40)
    };
    assert_eq!(after_two_failovers(&behind, &slot(5)), Decision::Resume(Lsn(40)));
    // Redis lost its tail as well.
    assert_gap(
        &after_two_failovers(&progress(40), &slot(41)),
        Some(41),
        "it lost what is between",
    );
}

#[test]
fn a_failover_without_its_slot_is_a_gap() {
    assert_gap(
        &on(&identity(3), Some(&progress(10)), None),
        None,
        "not kept in step",
    );
    let plain = SlotInfo {
        failover: Some(false),
        ..slot(5)
    };
    assert_gap(
        &after_two_failovers(&progress(10), &plain),
        Some(5),
        "no failover slot",
    );
    let lost = SlotInfo {
        wal_status: Some("lost".into()),
        ..slot(5)
    };
    assert_gap(
        &after_two_failovers(&progress(10), &lost),
        None,
        "has lost the WAL",
    );
}

#[test]
fn a_timeline_that_is_no_ancestor_is_a_gap() {
    let elsewhere = Progress {
        timeline: 4,
        ..progress(10)
    };
    assert_gap(
        &after_two_failovers(&elsewhere, &slot(5)),
        Some(5),
        "does not know the other",
    );
    // The old primary is back.
    let old = Progress {
        timeline: 2,
        ..progress(10)
    };
    let (identity, slot, history) = (identity(1), slot(5), History::none());
    assert_gap(
        &decide(Some(&old), &server(&identity, &slot, &history), None),
        Some(5),
        "does not know the other",
    );
}

#[test]
fn the_decision_holds_until_the_right_to_write_is_taken() {
    let history = History::parse("1 0/32 x").unwrap();
    let fits_slot = |slot: &SlotInfo, timeline, progress: Option<Progress>| {
        let stored = Stored {
            progress,
            ..Stored::default()
        };
        let identity = identity(timeline);
        still_fits(&stored, Lsn(40), &server(&identity, slot, &history)).is_ok()
    };
    let fits = |timeline, progress| fits_slot(&slot(5), timeline, progress);
    for timeline in [1, 2] {
        assert!(fits(timeline, Some(progress(40))));
        assert!(fits(timeline, Some(progress(45))));
        assert!(!fits(timeline, Some(progress(39))));
        assert!(!fits(timeline, None));
    }
    // The slot was confirmed after it was looked at, and Redis has lost that.
    assert!(!fits_slot(&slot(41), 1, Some(progress(40))));
    assert!(fits_slot(&slot(41), 1, Some(progress(41))));
    // Somebody on the old primary has gone on.
    assert!(fits(1, Some(progress(51))));
    assert!(!fits(2, Some(progress(51))));
    // Somebody has gone on with what the server lost when it was put back.
    assert!(fits(1, Some(progress(100))));
    assert!(!fits(1, Some(progress(101))));
}

/// The process was killed, or its connection to Redis ended, while the slot was made or just after: with `--on-gap fail` the first start
/// ended as a gap, with nothing wrong.
#[test]
fn a_first_start_that_did_not_end_goes_on() {
    let begun = Progress {
        first: true,
        epoch: 0,
        ..progress(0)
    };
    assert_eq!(at_home(Some(&begun), None), Decision::First(None));
    assert_eq!(
        at_home(Some(&begun), Some(&slot(11))),
        Decision::First(Some(Lsn(11)))
    );
    // What another cluster has begun is not its own, and a slot that is lost is none.
    let other = Progress {
        system_id: "2".into(),
        ..begun.clone()
    };
    assert_gap(&at_home(Some(&other), None), None, "system identifier");
    let lost = SlotInfo {
        wal_status: Some("lost".into()),
        ..slot(11)
    };
    assert_gap(&at_home(Some(&begun), Some(&lost)), None, "wal_status");
}
