//! Transactions that come while they are in progress.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use super::*;

/// A frame of the transaction 105, by the transaction itself or a subtransaction.
fn part(sub_xid: u64) -> Frame {
    Frame::default().record(pb::InProgress { xid: 105, sub_xid })
}

fn rollback(sub_xid: u64) -> pb::Rollback {
    pb::Rollback { xid: 105, sub_xid }
}

fn late_commit(commit_lsn: u64, end_lsn: u64) -> Frame {
    Frame::default().record(pb::LateCommit {
        begin: Some(pb::Begin {
            xid: 105,
            commit_lsn,
            commit_time: 0,
        }),
        commit: Some(pb::Commit { end_lsn }),
    })
}

fn replay(planning: &mut Planning) {
    while planning.is_replaying() {
        planning.replay().unwrap();
    }
}

#[test]
fn it_counts_where_it_commits_without_what_was_rolled_back() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    part(105)
        .relation(relation(1, "t:{id}"))
        .row(Kind::Insert, "1", Some("first"))
        .record(pb::InProgress {
            xid: 105,
            sub_xid: 106,
        })
        .row(Kind::Insert, "2", Some("undone"))
        .feed(&mut planning);
    part(107)
        .relation(relation(1, "t:{id}"))
        .row(Kind::Insert, "4", Some("kept"))
        .feed(&mut planning);
    Frame::default().record(rollback(106)).feed(&mut planning);
    Frame::default()
        .relation(relation(1, "t:{id}"))
        .begin(108, 10)
        .row(Kind::Insert, "3", Some("between"))
        .commit(20)
        .feed(&mut planning);
    planning.keepalive(Lsn(25)).unwrap();
    assert_eq!(
        flushed(&mut planning),
        [
            "HSET t:3 id 3 v between",
            "HSET walmirror:{s}:progress lsn 0/19 commit_ts 2000-01-01 00:00:00+00 last_commit 0/A 108 0"
        ]
    );
    late_commit(30, 40).feed(&mut planning);
    assert!(planning.is_replaying() && !planning.wants_piece());
    replay(&mut planning);
    assert_eq!(
        flushed(&mut planning),
        [
            "HSET t:1 id 1 v first",
            "HSET t:4 id 4 v kept",
            "HSET walmirror:{s}:progress lsn 0/28 commit_ts 2000-01-01 00:00:00+00 last_commit 0/1E 105 0"
        ]
    );
}

#[test]
fn what_is_rolled_back_whole_or_applied_already_is_not_planned() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    let first = |planning: &mut Planning| {
        part(105)
            .relation(relation(1, "t:{id}"))
            .row(Kind::Insert, "1", Some("a"))
            .feed(planning);
    };
    first(&mut planning);
    Frame::default().record(rollback(105)).feed(&mut planning);
    assert!(
        late_commit(30, 40)
            .fails(&mut planning)
            .to_string()
            .contains("transaction 105")
    );
    first(&mut planning);
    late_commit(5, 10).feed(&mut planning);
    replay(&mut planning);
    assert!(flushed(&mut planning).is_empty());
}

/// Whether one comes of which everything was rolled back but its commit depends on how the server sends it: it is no part of the history
/// that is compared.
#[test]
fn one_of_which_nothing_is_left_is_not_the_last_that_was_applied() {
    let nothing_left = |planning: &mut Planning, commit_lsn, end_lsn| {
        part(105)
            .record(pb::InProgress {
                xid: 105,
                sub_xid: 106,
            })
            .relation(relation(1, "t:{id}"))
            .row(Kind::Insert, "1", Some("a"))
            .feed(planning);
        Frame::default().record(rollback(106)).feed(planning);
        late_commit(commit_lsn, end_lsn).feed(planning);
        replay(planning);
    };
    let mut fresh = planning(settled(), 1 << 20, 1 << 24);
    nothing_left(&mut fresh, 30, 40);
    assert_eq!(flushed(&mut fresh), ["HSET walmirror:{s}:progress lsn 0/28"]);

    let mut stored = settled();
    let progress = stored.progress.as_mut().unwrap();
    progress.last = Some(crate::continuity::Last::NoneSince(Lsn(3)));
    let continuity = Continuity::of(progress, Lsn(3));
    let mut resumed = planning(stored, 1 << 20, 1 << 24);
    resumed.continuity = continuity;
    nothing_left(&mut resumed, 5, 8);
    resumed.keepalive(Lsn(8)).unwrap();
    // One of which something is left was never applied.
    part(105)
        .relation(relation(1, "t:{id}"))
        .row(Kind::Insert, "1", Some("a"))
        .feed(&mut resumed);
    late_commit(8, 10).feed(&mut resumed);
    let mut planned = Ok(());
    while planned.is_ok() && resumed.is_replaying() {
        planned = resumed.replay();
    }
    let error = planned.unwrap_err();
    assert!(
        error
            .gap_reason()
            .is_some_and(|why| why.contains("which Redis has never seen")),
        "{error}"
    );
}

/// The story: a session with `--streaming off` had applied a part of the transaction 200. Before it the transaction 105 had committed, all of which
/// was rolled back, so it had not come. It did in the next session, with `--streaming on`, and was taken for one that stands in the other one's place:
/// a gap, and everything was made anew.
#[test]
fn one_of_which_nothing_is_left_comes_before_the_one_that_is_applied_in_part() {
    let cut = crate::transaction::Part {
        xid: 200,
        commit_lsn: Lsn(50),
        commit_time: Some(0),
        records: 2,
    };
    let resumed = || {
        let mut stored = settled();
        stored.progress.as_mut().unwrap().part = Some(cut);
        planning(stored, 1 << 20, 1 << 24)
    };
    let row = |planning: &mut Planning, sub_xid| {
        part(105)
            .record(pb::InProgress { xid: 105, sub_xid })
            .relation(relation(1, "t:{id}"))
            .row(Kind::Insert, "1", Some("a"))
            .feed(planning);
        Frame::default().record(rollback(106)).feed(planning);
    };
    let mut planning = resumed();
    row(&mut planning, 106);
    late_commit(30, 40).feed(&mut planning);
    replay(&mut planning);
    planning.flush();
    assert!(planning.next_segment().is_none(), "nothing may go out yet");
    Frame::default()
        .relation(relation(1, "t:{id}"))
        .begin(200, 50)
        .row(Kind::Insert, "1", Some("b"))
        .row(Kind::Insert, "2", Some("b"))
        .row(Kind::Insert, "3", Some("b"))
        .commit(60)
        .feed(&mut planning);
    let all = flushed(&mut planning);
    let rows: Vec<_> = all.iter().filter(|line| line.starts_with("HSET t:")).collect();
    assert_eq!(rows, ["HSET t:3 id 3 v b"]);

    // One of which something is left would have come before.
    let mut planning = resumed();
    row(&mut planning, 107);
    late_commit(30, 40).feed(&mut planning);
    let mut planned = Ok(());
    while planned.is_ok() && planning.is_replaying() {
        planned = planning.replay();
    }
    assert!(planned.unwrap_err().gap_reason().is_some());
}

/// What its frames define, perhaps an older version, serves them alone.
#[test]
fn its_definitions_are_its_own() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    part(105)
        .relation(relation(1, "t:{id}"))
        .row(Kind::Insert, "1", Some("old"))
        .feed(&mut planning);
    let new = pb::Relation {
        announced: true,
        ..relation(2, "n:{id}")
    };
    Frame::default()
        .begin(108, 10)
        .relation(new)
        .row(Kind::Insert, "2", Some("new"))
        .commit(20)
        .feed(&mut planning);
    late_commit(30, 40).feed(&mut planning);
    replay(&mut planning);
    Frame::default()
        .begin(109, 40)
        .row(Kind::Insert, "3", Some("new"))
        .commit(50)
        .feed(&mut planning);
    let all = flushed(&mut planning);
    let sets: Vec<_> = all
        .iter()
        .filter(|line| line.starts_with("HSET n:") || line.starts_with("HSET t:"))
        .collect();
    assert_eq!(
        sets,
        [
            "HSET n:2 id 2 v new",
            "HSET t:1 id 1 v old",
            "HSET n:3 id 3 v new"
        ]
    );
}

#[test]
fn records_where_they_cannot_be_are_an_error() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    let inside = Frame::default()
        .relation(relation(1, "t:{id}"))
        .begin(100, 10)
        .record(pb::InProgress {
            xid: 105,
            sub_xid: 105,
        });
    assert!(
        inside
            .fails(&mut planning)
            .to_string()
            .contains("not the first of its frame")
    );
    let behind = late_commit(30, 40).begin(106, 50);
    assert!(
        behind
            .fails(&mut planning)
            .to_string()
            .contains("not the last of its frame")
    );
}

/// How often a table is told of that does not fit its label depends on the parts in which the transaction came. Found by reading: the
/// count of what is applied did too, so that a row was lost when the rest came in other parts.
#[test]
fn errors_do_not_count_as_applied() {
    let error = || pb::Error {
        table: "public.m".into(),
        oid: 900,
        ..pb::Error::default()
    };
    let part = || {
        Frame::default().record(pb::InProgress {
            xid: 105,
            sub_xid: 105,
        })
    };
    let commit = |planning: &mut Planning| {
        let late = pb::LateCommit {
            begin: Some(pb::Begin {
                xid: 105,
                commit_lsn: 30,
                commit_time: 0,
            }),
            commit: Some(pb::Commit { end_lsn: 40 }),
        };
        Frame::default().record(late).feed(planning);
        while planning.is_replaying() {
            planning.replay().unwrap();
        }
    };
    let definition = || relation(1, "t:{id}");
    let rows = |segment: &Segment| {
        let lines = lines(segment).into_iter();
        lines
            .filter(|line| line.starts_with("HSET t:"))
            .collect::<Vec<_>>()
    };
    // Each frame is a piece.
    let mut first = planning(settled(), 300, 300);
    for id in ["1", "2", "3", "4"] {
        part()
            .record(error())
            .relation(definition())
            .row(Kind::Insert, id, Some("a"))
            .feed(&mut first);
    }
    commit(&mut first);
    let (mut applied, mut cut) = (Vec::new(), None);
    while applied.len() < 2 {
        let segment = first.next_segment().unwrap();
        applied.extend(rows(&segment));
        cut = segment.step.and_then(|step| step.part).or(cut);
    }
    assert_eq!(cut.unwrap().records, 2);
    let mut stored = settled();
    stored.progress.as_mut().unwrap().part = cut;
    let mut second = planning(stored, 1 << 20, 1 << 24);
    let mut whole = part().record(error()).relation(definition());
    for id in ["1", "2", "3", "4"] {
        whole = whole.row(Kind::Insert, id, Some("a"));
    }
    whole.feed(&mut second);
    commit(&mut second);
    second.flush();
    while let Some(segment) = second.next_segment() {
        applied.extend(rows(&segment));
    }
    let expected = ["1", "2", "3", "4"].map(|id| format!("HSET t:{id} id {id} v a"));
    assert_eq!(applied, expected);
}

/// Found by the simulator: what was written under a template that the stream itself had never told of stayed, for the sweep of its table leaves
/// it to the one that could have made it, and that one was taken to have nothing to sweep.
#[test]
fn what_an_earlier_template_left_behind_is_swept_by_whose_it_is() {
    let stored = Stored {
        progress: Some(Progress {
            lsn: Lsn(10),
            ..Progress::default()
        }),
        nothing_else: true,
        ..Stored::default()
    };
    let mut planning = planning(stored, 1 << 20, 1 << 24);
    planning.begins_anew = true;
    let narrow = |index, fingerprint, key| pb::Relation {
        oid: 600,
        index,
        name: "narrow".into(),
        ..relation(fingerprint, key)
    };
    part(105)
        .relation(narrow(1, 7, "t:a:{id}"))
        .row(Kind::Insert, "1", Some("v"))
        .feed(&mut planning);
    late_commit(15, 20).feed(&mut planning);
    replay(&mut planning);
    Frame::default()
        .begin(110, 25)
        .relation(pb::Relation {
            announced: true,
            ..narrow(2, 8, "u:{id}")
        })
        .commit(30)
        .begin(111, 35)
        .relation(relation(1, "t:{id}"))
        .row(Kind::Insert, "1", Some("v"))
        .commit(40)
        .feed(&mut planning);
    let cursor = |oid| &planning.registry.get(oid).unwrap().cursor;
    assert_eq!(cursor(600).old_keys, ["t:a:{id}"]);
    assert!(!cursor(OID).on_nothing);
}
