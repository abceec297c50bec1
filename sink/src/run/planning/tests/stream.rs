//! Transactions and keepalives: what shares a MULTI, where a large transaction is cut, and from where a session goes on.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use super::*;

#[test]
fn transactions_that_are_complete_share_one_multi_with_their_progress() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    Frame::default()
        .relation(relation(1, "t:{id}"))
        .begin(100, 10)
        .row(Kind::Insert, "1", Some("a"))
        .commit(20)
        .feed(&mut planning);
    Frame::default()
        .begin(101, 20)
        .row(Kind::Insert, "2", None)
        .row(Kind::Delete, "1", None)
        .commit(30)
        .feed(&mut planning);
    // One that is not complete waits, and so does what is in front of it.
    Frame::default()
        .begin(102, 30)
        .row(Kind::Insert, "3", Some("c"))
        .feed(&mut planning);
    assert!(!planning.is_dirty());
    Frame::default().commit(40).feed(&mut planning);
    planning.flush();
    let segment = planning.next_segment().unwrap();
    assert_eq!(
        lines(&segment),
        [
            "MULTI",
            "HSET t:2 id 2",
            "HDEL t:2 v",
            "UNLINK t:1",
            "HSET t:3 id 3 v c",
            "HSET walmirror:{s}:progress lsn 0/28 commit_ts 2000-01-01 00:00:00+00 last_commit 0/1E 102 0",
            "EXEC",
            "WATCH walmirror:{s}:progress",
            "HMGET walmirror:{s}:progress epoch lsn",
        ]
    );
    assert_eq!(segment.step.map(|step| step.lsn), Some(Lsn(40)));
    assert!(planning.next_segment().is_none());
}

#[test]
fn what_the_progress_says_is_applied_is_skipped() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    Frame::default()
        .relation(relation(1, "t:{id}"))
        .begin(99, 5)
        .row(Kind::Insert, "1", Some("a"))
        .commit(10)
        .feed(&mut planning);
    assert!(flushed(&mut planning).is_empty());
    Frame::default()
        .begin(100, 10)
        .row(Kind::Insert, "2", Some("b"))
        .commit(20)
        .feed(&mut planning);
    assert_eq!(flushed(&mut planning)[0], "HSET t:2 id 2 v b");
}

/// A transaction far over the limit, restarted at every place where it was cut: every row is applied exactly once.
#[test]
fn a_large_transaction_is_cut_and_goes_on_where_it_was_cut() {
    let rows = 600;
    let feed = |planning: &mut Planning| {
        Frame::default()
            .relation(relation(1, "t:{id}"))
            .begin(100, 10)
            .feed(planning);
        for row in 0..rows {
            Frame::default()
                .row(Kind::Insert, &row.to_string(), Some("value"))
                .feed(planning);
        }
        Frame::default().commit(20).feed(planning);
        if planning.is_dirty() {
            planning.flush();
        }
    };
    let mut whole = planning(settled(), 2_000, 20_000);
    feed(&mut whole);
    let mut steps = Vec::new();
    let mut segments = 0;
    while let Some(segment) = whole.next_segment() {
        segments += 1;
        steps.extend(segment.step);
    }
    // The first piece is as large as a transaction may be that is not cut, the others are batches.
    assert!(
        steps.len() > 5 && segments > 5 + steps.len(),
        "{segments} segments, {} steps",
        steps.len()
    );
    let (last, parts) = steps.split_last().unwrap();
    assert_eq!((last.lsn, last.part, last.clear_part), (Lsn(20), None, true));
    for step in parts {
        let part = step.part.unwrap();
        assert_eq!((step.lsn, part.xid, part.commit_lsn), (Lsn(10), 100, Lsn(10)));
        let mut stored = settled();
        stored.progress.as_mut().unwrap().part = Some(part);
        let mut resumed = planning(stored, 2_000, 20_000);
        feed(&mut resumed);
        let written = flushed(&mut resumed)
            .into_iter()
            .filter(|line| line.starts_with("HSET t:"))
            .collect::<Vec<_>>();
        assert_eq!(written.len() as u64, rows - part.records);
        assert_eq!(written[0], format!("HSET t:{0} id {0} v value", part.records));
    }
}

/// Found by the simulator: a keepalive that came before the transaction that was cut made the progress forget the part, and
/// after another restart the part was applied twice.
#[test]
fn a_part_outlasts_a_keepalive() {
    let mut stored = settled();
    stored.progress.as_mut().unwrap().part = Some(crate::transaction::Part {
        xid: 100,
        commit_time: Some(0),
        commit_lsn: Lsn(30),
        records: 3,
    });
    let mut planning = planning(stored, 1 << 20, 1 << 24);
    planning.keepalive(Lsn(20)).unwrap();
    // Until the transaction has begun again, it may be of a history that is lost.
    assert!(flushed(&mut planning).is_empty());
    Frame::default().begin(100, 30).feed(&mut planning);
    let lines = flushed(&mut planning);
    assert!(lines[0].contains("part_xid 100"), "{lines:?}");
    assert_eq!(lines.len(), 1);
}

/// Keys were removed ahead of a transaction that has not come.
fn purged_ahead() -> Planning {
    let purged = Commit {
        lsn: Lsn(30),
        xid: 101,
        time: 0,
    };
    let mut stored = settled();
    let progress = stored.progress.as_mut().unwrap();
    progress.purging = Some(crate::progress::Purging { commit: Some(purged) });
    let continuity = Continuity::of(progress, Lsn(10));
    let mut planning = planning(stored, 1 << 20, 1 << 24);
    planning.continuity = continuity;
    planning
}

/// Keys were removed ahead of the second of these transactions. What is planned before it has come is not applied by that.
#[test]
fn nothing_goes_out_before_what_keys_were_removed_for_has_come() {
    let mut planning = purged_ahead();
    Frame::default()
        .relation(relation(1, "t:{id}"))
        .begin(100, 10)
        .row(Kind::Insert, "1", Some("a"))
        .commit(20)
        .feed(&mut planning);
    assert!(flushed(&mut planning).is_empty());
    Frame::default().begin(101, 30).feed(&mut planning);
    assert!(planning.continuity.is_proved());
    assert_eq!(planning.shared.applied(), Lsn(10));
    assert_eq!(flushed(&mut planning)[0], "HSET t:1 id 1 v a");
}

/// What is planned meanwhile would pile up; what is held has the workers wait.
#[test]
fn no_chunk_is_planned_before_anything_may_go_out() {
    let mut planning = purged_ahead();
    let window = Arc::new(Window::default());
    let read = rows(&[packed(1, "1", "read")]);
    planning.chunk(chunk(&planning, 7, read, None, &window));
    Frame::default()
        .record(pb::Marker {
            content: b"m:7".to_vec(),
            lsn: 25,
        })
        .feed(&mut planning);
    assert!(!planning.wants_piece());
    Frame::default().begin(101, 30).commit(40).feed(&mut planning);
    assert!(planning.wants_piece());
}

/// A server that was put back, and has written on: `frame` and `keepalive` end with a gap, and nothing was written before.
#[test]
fn what_is_of_another_history_is_a_gap() {
    let last = Commit {
        lsn: Lsn(6),
        xid: 90,
        time: 0,
    };
    let resumed = |part| {
        let mut stored = settled();
        let progress = stored.progress.as_mut().unwrap();
        (progress.last, progress.part) = (Some(crate::continuity::Last::Commit(last)), part);
        let continuity = Continuity::of(progress, Lsn(6));
        let mut planning = planning(stored, 1 << 20, 1 << 24);
        planning.continuity = continuity;
        planning
    };
    let assert_gap = |error: Error, because: &str| {
        assert!(
            error.gap_reason().is_some_and(|why| why.contains(because)),
            "{error}"
        );
    };
    let transaction = |xid| {
        Frame::default()
            .relation(relation(1, "t:{id}"))
            .begin(xid, 6)
            .row(Kind::Insert, "1", Some("a"))
            .commit(10)
    };
    let error = transaction(91).fails(&mut resumed(None));
    assert_gap(error, "Redis has transaction 90");
    let mut planning = resumed(None);
    assert_gap(
        planning.keepalive(Lsn(11)).unwrap_err(),
        "Redis has transaction 90",
    );
    assert!(flushed(&mut planning).is_empty());

    let part = crate::transaction::Part {
        xid: 100,
        commit_time: Some(0),
        commit_lsn: Lsn(30),
        records: 3,
    };
    let mut planning = resumed(Some(part));
    // One of which no change is left may come or not.
    Frame::default().begin(89, 6).commit(7).feed(&mut planning);
    transaction(90).feed(&mut planning);
    assert_eq!(planning.shared.applied(), Lsn(0));
    planning.keepalive(Lsn(10)).unwrap();
    assert_eq!(planning.shared.applied(), Lsn(10));
    assert_gap(
        planning.keepalive(Lsn(31)).unwrap_err(),
        "part of transaction 100",
    );
    assert!(flushed(&mut planning).is_empty());
    let error = Frame::default().begin(101, 30).fails(&mut planning);
    assert_gap(error, "part of transaction 100");
}

#[test]
fn a_keepalive_moves_the_position_between_transactions_only() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    planning.keepalive(Lsn(50)).unwrap();
    assert!(planning.is_advanced() && !planning.is_dirty());
    assert_eq!(flushed(&mut planning), ["HSET walmirror:{s}:progress lsn 0/32"]);
    planning.keepalive(Lsn(40)).unwrap();
    assert!(!planning.is_advanced());
    Frame::default()
        .relation(relation(1, "t:{id}"))
        .begin(100, 60)
        .feed(&mut planning);
    planning.keepalive(Lsn(70)).unwrap();
    assert!(!planning.is_advanced());
}

#[test]
fn a_broken_stream_is_an_error_that_says_where() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    let error = planning.frame(b"\x0a\x05nope!", Lsn::INVALID).unwrap_err();
    assert!(error.to_string().contains("0/A"), "{error}");
    let mut frame = Frame::default().begin(100, 10);
    let mut tuple = TupleBuilder::new();
    tuple.text(b"1");
    frame.0.row(Kind::Insert, 9, &tuple, None);
    assert!(
        planning
            .frame(frame.0.as_bytes(), Lsn::INVALID)
            .unwrap_err()
            .to_string()
            .contains("relation 9")
    );
}

/// The text of a key column could be the name of a key that the sink keeps for itself.
#[test]
fn a_row_never_has_a_bookkeeping_key() {
    let own = "walmirror:{s}:progress";
    let whole = || pb::Relation {
        capture: true,
        ..relation(1, "{id}")
    };
    let mut stored = settled();
    stored.relations.insert(OID, whole());
    let mut planning = planning(stored, 1 << 20, 1 << 24);
    let noted = |lines: &[String]| {
        let is_touched = |line: &&String| {
            line.contains(own) && !line.starts_with("XADD") && !line.starts_with(&format!("HSET {own} lsn "))
        };
        assert_eq!(lines.iter().find(is_touched), None);
        lines.iter().filter(|line| line.starts_with("XADD")).count()
    };
    Frame::default()
        .relation(whole())
        .begin(100, 10)
        .row(Kind::Insert, own, Some("a"))
        .row(Kind::Insert, "walmirror:own", Some("b"))
        .commit(20)
        .feed(&mut planning);
    let lines = flushed(&mut planning);
    assert!(lines.contains(&"HSET walmirror:own id walmirror:own v b".to_owned()));
    assert_eq!(noted(&lines), 1, "{lines:?}");
    // Whatever becomes of the row.
    let moved = |from: &str, to: &str| {
        let mut frame = Frame::default().begin(101, 20);
        frame
            .0
            .row(Kind::Update, 1, &tuple(to, Some("c")), Some(&tuple(from, None)));
        frame
            .row(Kind::Delete, "walmirror:{other}:pending", None)
            .commit(30)
    };
    moved(own, "1").feed(&mut planning);
    let lines = flushed(&mut planning);
    assert!(lines.contains(&"HSET 1 id 1 v c".to_owned()), "{lines:?}");
    assert_eq!(noted(&lines), 0, "{lines:?}");
    let mut frame = Frame::default().begin(102, 30);
    frame
        .0
        .row(Kind::Update, 1, &tuple(own, Some("d")), Some(&tuple("1", None)));
    frame.commit(40).feed(&mut planning);
    let lines = flushed(&mut planning);
    assert!(lines.contains(&"UNLINK 1".to_owned()), "{lines:?}");
    assert_eq!(noted(&lines), 1, "{lines:?}");
    // What SQL read.
    let window = Arc::new(Window::default());
    planning.chunk(chunk(
        &planning,
        7,
        rows(&[packed(1, own, "read")]),
        None,
        &window,
    ));
    let capture = pb::Capture {
        oid: OID,
        fingerprint: 1,
        snapshot: Some(pb::Snapshot {
            xmin: 105,
            xmax: 105,
            xip: Vec::new(),
        }),
        rows: vec![pb::Tuple {
            texts: vec![own.into(), "read".into()],
            ..pb::Tuple::default()
        }],
    };
    let marker = pb::Marker {
        content: b"m:7".to_vec(),
        lsn: 41,
    };
    Frame::default()
        .record(capture)
        .record(marker)
        .feed(&mut planning);
    planning.piece().unwrap();
    let lines = flushed(&mut planning);
    assert_eq!(noted(&lines), 1, "{lines:?}");
}

/// What a decoder of a later version may write: none of it is skipped, as that would lose data, and the position stays before it.
#[test]
fn what_a_later_version_writes_ends_the_session_before_it() {
    let later = |broken: fn(&mut pb::Relation)| {
        let mut relation = relation(1, "t:{id}");
        broken(&mut relation);
        let mut frame = FrameWriter::default();
        frame.record(&relation.into());
        frame.as_bytes().to_vec()
    };
    let records = [
        // A record whose kind is 40.
        (vec![0x0a, 2, 8, 40], "record kind 40"),
        (
            later(|relation| relation.columns[1].encoding = 99),
            "column encoding",
        ),
        (later(|relation| relation.value = 99), "value kind"),
        (later(|relation| relation.mode = 99), "mode"),
        (later(|relation| relation.on_write = 99), "on_write"),
    ];
    for (record, what) in records {
        let mut planning = planning(settled(), 1 << 20, 1 << 24);
        let frame = Frame::default()
            .relation(relation(1, "t:{id}"))
            .begin(100, 100)
            .row(Kind::Insert, "1", Some("a"));
        let bytes = [frame.0.as_bytes(), &record].concat();
        let error = planning.frame(&bytes, Lsn::INVALID).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
        // Where Redis is.
        assert!(error.to_string().contains(", at LSN 0/A: "), "{error}");
        assert_eq!(error.class(), crate::error::Class::Bug);
        assert_eq!(error.exit_code(), crate::error::exit::INTERNAL);
        assert_eq!(flushed(&mut planning), Vec::<String>::new(), "{what}");
    }
}

/// The story: a sink kept as much memory as the largest row had that it had ever met.
#[test]
fn a_large_row_leaves_no_memory_behind() {
    let json = pb::Relation {
        value: pb::ValueKind::Json.into(),
        ..relation(1, "t:{id}")
    };
    let mut stored = settled();
    stored.relations = BTreeMap::from([(OID, json.clone())]);
    let mut planning = planning(stored, 1 << 20, 1 << 24);
    let large = "x".repeat(8 << 20);
    Frame::default()
        .relation(json)
        .begin(100, 100)
        .row(Kind::Insert, "1", Some(&large))
        .row(Kind::Insert, "2", Some("small"))
        .commit(105)
        .feed(&mut planning);
    assert!(flushed(&mut planning).iter().any(|line| line.len() > large.len()));
    assert!(planning.planner.kept() <= 1 << 20);
}
