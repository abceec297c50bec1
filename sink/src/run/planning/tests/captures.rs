//! Rows that a SELECT read: what drops one, and that the reason is counted.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use super::*;

fn row(id: &str, v: &str) -> pb::Tuple {
    pb::Tuple {
        texts: vec![id.into(), v.into()],
        ..pb::Tuple::default()
    }
}

fn read(row: pb::Tuple) -> pb::Capture {
    pb::Capture {
        oid: OID,
        fingerprint: 1,
        snapshot: Some(snapshot(105)),
        rows: vec![row],
    }
}

/// A mirror, whose rows nobody captures.
fn other() -> pb::Relation {
    pb::Relation {
        oid: OID + 2,
        ..relation(1, "other:{id}")
    }
}

/// Everything below this transaction was over.
fn snapshot(xmax: u64) -> pb::Snapshot {
    pb::Snapshot {
        xmin: xmax,
        xmax,
        xip: Vec::new(),
    }
}

#[test]
fn each_reason_to_drop_a_captured_row_is_counted() {
    let relation = pb::Relation {
        capture: true,
        ..relation(1, "t:{id}")
    };
    let mut stored = settled();
    stored.relations.insert(OID, relation.clone());
    stored.relations.insert(OID + 2, other());
    let mut planning = planning(stored, 1 << 20, 1 << 24);
    planning.planner.limit_values(50);
    Frame::default()
        .relation(relation)
        .begin(110, 10)
        .row(Kind::Update, "2", Some("new"))
        .commit(20)
        .feed(&mut planning);
    flushed(&mut planning);
    let no_key = pb::Tuple {
        nulls: vec![1],
        texts: vec!["x".into()],
        ..pb::Tuple::default()
    };
    let not_encoded = pb::Tuple {
        unchanged: vec![2],
        texts: vec!["1".into()],
        ..pb::Tuple::default()
    };
    let cases = [
        (
            "unknown_table",
            pb::Capture {
                oid: OID + 1,
                ..read(row("1", "x"))
            },
        ),
        (
            "unknown_table",
            pb::Capture {
                oid: OID + 2,
                ..read(row("1", "x"))
            },
        ),
        (
            "other_version",
            pb::Capture {
                fingerprint: 2,
                ..read(row("1", "x"))
            },
        ),
        ("no_key", read(no_key)),
        ("not_encoded", read(not_encoded)),
        // Anybody may write the message.
        ("not_encoded", read(pb::Tuple::default())),
        ("changed", read(row("2", "old"))),
        (
            "forgotten",
            pb::Capture {
                snapshot: Some(snapshot(99)),
                ..read(row("1", "x"))
            },
        ),
        ("too_large", read(row("1", &"x".repeat(51)))),
    ];
    for (reason, capture) in cases {
        let before = planning.shared.metrics.captures_dropped.read();
        Frame::default().record(capture).feed(&mut planning);
        let after = planning.shared.metrics.captures_dropped.read();
        let rose: Vec<_> = after
            .iter()
            .zip(before)
            .filter(|((_, after), (_, before))| after != before)
            .map(|((name, after), (_, before))| (*name, after - before))
            .collect();
        assert_eq!(rose, [(reason, 1)]);
    }
    assert!(flushed(&mut planning).is_empty());
    Frame::default().record(read(row("1", "x"))).feed(&mut planning);
    assert_eq!(flushed(&mut planning)[..2], ["UNLINK t:1", "HSET t:1 id 1 v x"]);
}

#[test]
fn rows_and_chunks_that_have_nothing_to_do_are_counted() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    let window = Arc::new(Window::default());
    planning.chunk(chunk(&planning, 1, rows(&[packed(2, "1", "x")]), None, &window));
    planning.chunk(chunk(&planning, 2, rows(&[packed(1, "1", "x")]), None, &window));
    Frame::default()
        .relation(relation(1, "t:{id}"))
        .begin(99, 5)
        .row(Kind::Insert, "1", Some("a"))
        .commit(10)
        .record(pb::Marker {
            content: b"m:1".to_vec(),
            lsn: 11,
        })
        .record(pb::Marker {
            content: b"m:2".to_vec(),
            lsn: 11,
        })
        .feed(&mut planning);
    planning.piece().unwrap();
    planning.piece().unwrap();
    Frame::default()
        .begin(100, 10)
        .record(pb::Forget {
            oid: OID,
            keep_keys: false,
        })
        .commit(20)
        .begin(98, 20)
        .row(Kind::Insert, "1", Some("a"))
        .row(Kind::Insert, "2", Some("b"))
        .commit(30)
        .feed(&mut planning);
    let metrics = &planning.shared.metrics;
    assert_eq!(
        metrics.rows_skipped.read(),
        [("already_applied", 1), ("forgotten_table", 2)]
    );
    assert_eq!(
        metrics.chunks_dropped.read(),
        [("outdated", 1), ("other_version", 1), ("forgotten", 0)]
    );
}
