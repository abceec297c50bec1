//! Rows whose keys are another table's, because the template of that one is more specific.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use super::*;

/// The table of the other tests, of which SELECTs are captured too.
fn wide() -> pb::Relation {
    pb::Relation {
        capture: true,
        ..relation(1, "t:{id}")
    }
}

/// It takes keys from that one.
fn narrow() -> pb::Relation {
    pb::Relation {
        oid: 600,
        index: 2,
        name: "narrow".into(),
        announced: true,
        ..relation(7, "t:a:{id}")
    }
}

fn stored(both: bool) -> Stored {
    let mut stored = settled();
    stored.relations.insert(OID, wide());
    if both {
        stored.relations.insert(600, narrow());
    }
    stored
}

/// Notes of rows that are not mirrored; no command may touch the key of the other table.
fn noted(lines: &[String]) -> usize {
    let touches = |line: &&String| line.contains("t:a:1") && !line.starts_with("XADD");
    assert_eq!(lines.iter().find(touches), None);
    lines.iter().filter(|line| line.starts_with("XADD")).count()
}

fn inserted(planning: &mut Planning, at: u64, ids: &[&str]) -> Vec<String> {
    let mut frame = Frame::default().begin(at, at);
    for id in ids {
        frame = frame.row(Kind::Insert, id, Some("v"));
    }
    frame.commit(at + 1).feed(planning);
    flushed(planning)
}

/// The story: the key held the row of the wrong table, and went with it; verify --repair removed it, and it came again.
#[test]
fn a_row_never_has_a_key_of_another_table() {
    let mut planning = planning(stored(true), 1 << 20, 1 << 24);
    Frame::default().relation(wide()).feed(&mut planning);
    let lines = inserted(&mut planning, 100, &["a:1", "a", "a1"]);
    assert!(lines.contains(&"HSET t:a id a v v".to_owned()), "{lines:?}");
    assert!(lines.contains(&"HSET t:a1 id a1 v v".to_owned()), "{lines:?}");
    assert_eq!(noted(&lines), 1, "{lines:?}");
    let note = lines.iter().find(|line| line.starts_with("XADD")).unwrap();
    for part in ["key t:a:1", "table public.t ", "one of the table public.narrow"] {
        assert!(note.contains(part), "{part}: {note}");
    }
    // Whatever becomes of the row.
    let moved = |from: &str, to: &str| {
        let mut frame = Frame::default().begin(110, 110);
        frame
            .0
            .row(Kind::Update, 1, &tuple(to, Some("w")), Some(&tuple(from, None)));
        frame
    };
    let frame = moved("a:1", "b").row(Kind::Delete, "a:1", None);
    frame.commit(111).feed(&mut planning);
    let lines = flushed(&mut planning);
    assert!(lines.contains(&"HSET t:b id b v w".to_owned()), "{lines:?}");
    assert_eq!(noted(&lines), 0, "{lines:?}");
    moved("b", "a:1").commit(120).feed(&mut planning);
    let lines = flushed(&mut planning);
    assert!(lines.contains(&"UNLINK t:b".to_owned()), "{lines:?}");
    assert_eq!(noted(&lines), 1, "{lines:?}");
    // What SQL read.
    let window = Arc::new(Window::default());
    for content in [
        rows(&[packed(1, "a:1", "read")]),
        Content::Keys(vec![(b"t:a:1".to_vec(), Some(packed(1, "a:1", "read")))]),
        Content::Keys(vec![(b"t:a:1".to_vec(), None)]),
        Content::LeftOut(vec![b"t:a:1".to_vec()]),
    ] {
        let is_row = content.len() == 1 && !matches!(&content, Content::Keys(keys) if keys[0].1.is_none());
        planning.chunk(chunk(&planning, 7, content, None, &window));
        let marker = pb::Marker {
            content: b"m:7".to_vec(),
            lsn: 200,
        };
        Frame::default().record(marker).feed(&mut planning);
        planning.piece().unwrap();
        let lines = flushed(&mut planning);
        assert_eq!(noted(&lines), usize::from(is_row), "{lines:?}");
    }
    let capture = pb::Capture {
        oid: OID,
        fingerprint: 1,
        snapshot: Some(pb::Snapshot {
            xmin: 205,
            xmax: 205,
            xip: Vec::new(),
        }),
        rows: vec![pb::Tuple {
            texts: vec!["a:1".into(), "read".into()],
            ..pb::Tuple::default()
        }],
    };
    Frame::default().record(capture).feed(&mut planning);
    assert_eq!(noted(&flushed(&mut planning)), 0);
}

#[test]
fn whose_a_key_is_follows_the_labels() {
    let mut planning = planning(stored(false), 1 << 20, 1 << 24);
    Frame::default().relation(wide()).feed(&mut planning);
    let writes = "HSET t:a:1 id a:1 v v".to_owned();
    assert!(inserted(&mut planning, 100, &["a:1"]).contains(&writes));
    Frame::default()
        .begin(110, 110)
        .relation(narrow())
        .commit(111)
        .feed(&mut planning);
    flushed(&mut planning);
    assert_eq!(noted(&inserted(&mut planning, 120, &["a:1"])), 1);
    Frame::default()
        .begin(130, 130)
        .record(pb::Forget {
            oid: 600,
            keep_keys: false,
        })
        .commit(131)
        .feed(&mut planning);
    flushed(&mut planning);
    // The table is made anew, and so its keys are replaced.
    assert!(inserted(&mut planning, 140, &["a:1"]).contains(&writes));
}

/// Where Redis was empty when the mirror began, a table that is announced then has no keys in it, unless they are those that another one
/// wrote before they were taken from it.
#[test]
fn what_a_table_takes_from_another_is_swept() {
    for (key, on_nothing) in [("t:a:{id}", false), ("u:{id}", true)] {
        let stored = Stored {
            nothing_else: true,
            ..Stored::default()
        };
        let mut planning = planning(stored, 1 << 20, 1 << 24);
        Frame::default()
            .begin(110, 110)
            .relation(pb::Relation {
                announced: true,
                ..wide()
            })
            .relation(pb::Relation {
                key: key.into(),
                ..narrow()
            })
            .commit(111)
            .feed(&mut planning);
        let cursor = |oid| &planning.registry.get(oid).unwrap().cursor;
        assert!(cursor(OID).on_nothing);
        assert_eq!(cursor(600).on_nothing, on_nothing, "{key}");
    }
}
