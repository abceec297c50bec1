//! A backfill into a Redis that held nothing removes nothing first, and nothing afterwards; whatever makes that
//! doubtful makes it a backfill like every other.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use super::*;
use crate::backfill::Stage;

/// A session whose Redis held nothing, and whose stream announced the table.
fn begun() -> Planning {
    let progress = Progress {
        lsn: Lsn(10),
        ..Progress::default()
    };
    let mut planning = planning(
        Stored {
            progress: Some(progress),
            nothing_else: true,
            ..Stored::default()
        },
        1 << 20,
        1 << 24,
    );
    Frame::default()
        .begin(100, 10)
        .relation(pb::Relation {
            announced: true,
            ..relation(1, "t:{id}")
        })
        .commit(20)
        .feed(&mut planning);
    flushed(&mut planning);
    planning
}

fn cursor(planning: &Planning) -> Cursor {
    planning.registry.get(OID).unwrap().cursor.clone()
}

/// Plans a chunk of one row at this place of the backfill.
fn fill(planning: &mut Planning, id: u64, cursor: Cursor) -> Vec<String> {
    fill_with(planning, id, cursor, Some("read"))
}

fn fill_with(planning: &mut Planning, id: u64, cursor: Cursor, v: Option<&str>) -> Vec<String> {
    let window = Arc::new(Window::default());
    let content = rows(&[packed_row(cursor.fingerprint, "1", v)]);
    planning.chunk(chunk(planning, id, content, Some(cursor), &window));
    Frame::default()
        .record(pb::Marker {
            content: format!("m:{id}").into_bytes(),
            lsn: 21,
        })
        .feed(planning);
    planning.piece().unwrap();
    flushed(planning)
}

#[test]
fn rows_are_written_without_a_removal_and_no_key_is_looked_for() {
    let mut planning = begun();
    let start = cursor(&planning);
    assert!(start.on_nothing);
    let written = fill(&mut planning, 1, start.filled());
    assert_eq!(written[0], "HSET t:1 id 1 v read");
    assert_eq!(cursor(&planning).stage, Stage::Done);
}

/// Found by the simulator: the row that was read took the place of a change in the same batch, and with it of the removal of the
/// field that had become NULL.
#[test]
fn a_row_that_was_read_does_not_replace_the_change_that_made_it() {
    let mut planning = begun();
    let start = cursor(&planning);
    let update = |planning: &mut Planning, xid, lsn, v| {
        Frame::default()
            .relation(relation(1, "t:{id}"))
            .begin(xid, lsn)
            .row(Kind::Update, "1", v)
            .commit(lsn + 5)
            .feed(planning);
    };
    update(&mut planning, 101, 20, Some("old"));
    flushed(&mut planning);
    update(&mut planning, 102, 30, None);
    let written = fill_with(&mut planning, 1, start.filled(), None);
    assert_eq!(
        written[..3],
        ["UNLINK t:1", "HSET t:1 id 1", "HSET t:1 id 1"],
        "{written:?}"
    );
}

#[test]
fn rows_of_another_version_make_it_an_ordinary_backfill() {
    let mut planning = begun();
    let generation = planning.registry.get(OID).unwrap().generation;
    // A transaction that began before the label was changed.
    Frame::default()
        .relation(relation(7, "t:{id}"))
        .begin(99, 20)
        .row(Kind::Insert, "2", Some("b"))
        .commit(30)
        .feed(&mut planning);
    assert_ne!(planning.registry.get(OID).unwrap().generation, generation);
    let now = cursor(&planning);
    assert!(!now.on_nothing);
    flushed(&mut planning);
    assert_eq!(fill(&mut planning, 1, now.clone())[0], "UNLINK t:1");
    assert_eq!(now.filled().stage, Stage::Sweep);
}

#[test]
fn so_does_a_table_whose_keys_may_have_been_kept() {
    let mut planning = begun();
    Frame::default()
        .begin(101, 20)
        .record(pb::Forget {
            oid: OID,
            keep_keys: true,
        })
        .relation(pb::Relation {
            announced: true,
            ..relation(2, "t:{id}")
        })
        .commit(30)
        .feed(&mut planning);
    assert!(!cursor(&planning).on_nothing);
}

/// Nothing reads all of a cache, so what was under its template before would stay, and be served.
#[test]
fn a_cache_begins_empty() {
    for nothing_else in [false, true] {
        let mut stored = settled();
        stored.relations.clear();
        stored.nothing_else = nothing_else;
        let mut planning = planning(stored, 1 << 20, 1 << 24);
        Frame::default()
            .begin(100, 10)
            .relation(pb::Relation {
                announced: true,
                ..cache(1, "t:{id}")
            })
            .commit(20)
            .feed(&mut planning);
        planning.flush();
        let segment = planning.next_segment().unwrap();
        assert_eq!(segment.purges.is_empty(), nothing_else);
    }
}

#[test]
fn so_does_a_definition_that_is_registered_behind_another_of_its_table() {
    let progress = Progress {
        lsn: Lsn(10),
        ..Progress::default()
    };
    let stored = Stored {
        progress: Some(progress),
        nothing_else: true,
        ..Stored::default()
    };
    let mut planning = planning(stored, 1 << 20, 1 << 24);
    Frame::default()
        .relation(relation(1, "t:{id}"))
        .begin(100, 10)
        .relation(pb::Relation {
            announced: true,
            index: 2,
            ..relation(2, "t:{id}")
        })
        .commit(20)
        .feed(&mut planning);
    assert!(!cursor(&planning).on_nothing);
}
