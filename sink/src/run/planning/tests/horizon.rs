//! What a transaction did to a table that was announced while it was in progress: it is not in the stream, or as it was before. Until it
//! can be told by its id, and then of it alone, nothing of the table is captured or refreshed.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use super::*;
use crate::backfill::Catalog;

fn refreshed() -> pb::Relation {
    pb::Relation {
        on_write: pb::OnWrite::Refresh.into(),
        ..cache(1, "t:{id}")
    }
}

fn empty() -> Stored {
    let progress = Progress {
        lsn: Lsn(10),
        ..Progress::default()
    };
    Stored {
        progress: Some(progress),
        ..Stored::default()
    }
}

/// The cache is announced anew by transaction 110, at 10.
fn announce(planning: &mut Planning, relation: pb::Relation) {
    let announced = pb::Relation {
        announced: true,
        refresh: true,
        ..relation
    };
    Frame::default()
        .begin(110, 10)
        .relation(announced)
        .commit(20)
        .feed(planning);
    flushed(planning);
}

/// What is written when a row was captured in a snapshot.
fn captured(planning: &mut Planning, xmax: u64, xip: &[u64]) -> Vec<String> {
    let snapshot = pb::Snapshot {
        xmin: xip.first().copied().unwrap_or(xmax),
        xmax,
        xip: xip.to_vec(),
    };
    let row = pb::Tuple {
        texts: vec!["1".into(), "read".into()],
        ..pb::Tuple::default()
    };
    let capture = pb::Capture {
        oid: OID,
        fingerprint: 1,
        snapshot: Some(snapshot),
        rows: vec![row],
    };
    Frame::default().record(capture).feed(planning);
    flushed(planning)
}

/// What is written when a transaction changed a row.
fn changed(planning: &mut Planning, relation: pb::Relation, xid: u64, lsn: u64) -> Vec<String> {
    Frame::default()
        .relation(relation)
        .begin(xid, lsn)
        .row(Kind::Update, "2", Some("new"))
        .commit(lsn + 5)
        .feed(planning);
    flushed(planning)
}

/// A worker has taken `horizon` for the life of the table that is `generation`.
fn take(planning: &mut Planning, horizon: u64, generation: u64, lsn: u64) -> Vec<String> {
    let window = Arc::new(Window::default());
    let content = Content::Horizon(horizon, vec![(OID, generation)]);
    planning.chunk(chunk(planning, lsn, content, None, &window));
    Frame::default()
        .record(pb::Marker {
            content: format!("m:{lsn}").into_bytes(),
            lsn,
        })
        .feed(planning);
    planning.piece().unwrap();
    assert_eq!(window.outstanding(), 0);
    flushed(planning)
}

fn generation(planning: &Planning) -> u64 {
    planning.registry.get(OID).unwrap().generation
}

#[test]
fn a_row_is_captured_when_all_that_wrote_before_the_label_are_seen() {
    let mut planning = planning(empty(), 1 << 20, 1 << 24);
    announce(&mut planning, refreshed());
    // 105 has written the row before it was labelled, and is in progress.
    assert!(captured(&mut planning, 111, &[105]).is_empty());
    assert!(
        captured(&mut planning, 115, &[]).is_empty(),
        "who was writing is not known"
    );
    assert_eq!(
        planning.backfill.without_horizon(),
        [(OID, generation(&planning))]
    );
    let generation = generation(&planning);
    let lines = take(&mut planning, 112, generation, 30);
    assert!(lines[0].contains("\"horizon\":112"), "{lines:?}");
    assert!(planning.backfill.without_horizon().is_empty());
    assert!(captured(&mut planning, 115, &[105]).is_empty());
    assert!(captured(&mut planning, 111, &[]).is_empty());
    assert_eq!(
        planning
            .shared
            .metrics
            .captures_dropped
            .forgotten
            .load(std::sync::atomic::Ordering::Relaxed),
        4
    );
    let lines = captured(&mut planning, 115, &[113]);
    assert!(lines.contains(&"HSET t:1 id 1 v read".to_owned()), "{lines:?}");
}

#[test]
fn so_it_is_where_the_catalog_has_told_of_the_label() {
    let mut planning = planning(empty(), 1 << 20, 1 << 24);
    let window = Arc::new(Window::default());
    let catalog = Catalog {
        relations: vec![refreshed()],
        ..Catalog::default()
    };
    planning.chunk(chunk(&planning, 1, Content::Catalog(catalog), None, &window));
    Frame::default()
        .record(pb::Marker {
            content: b"m:1".to_vec(),
            lsn: 21,
        })
        .feed(&mut planning);
    planning.piece().unwrap();
    flushed(&mut planning);
    assert!(captured(&mut planning, 115, &[]).is_empty());
    let generation = generation(&planning);
    take(&mut planning, 112, generation, 30);
    assert!(captured(&mut planning, 115, &[105]).is_empty());
    assert!(!captured(&mut planning, 115, &[]).is_empty());
}

/// A mirror reads its rows again when all writers have ended, but what was captured before may come down the stream behind that.
#[test]
fn so_it_is_where_a_mirror_is_captured() {
    let mirror = pb::Relation {
        capture: true,
        ..relation(1, "t:{id}")
    };
    let mut planning = planning(empty(), 1 << 20, 1 << 24);
    announce(&mut planning, mirror.clone());
    let generation = generation(&planning);
    take(&mut planning, 112, generation, 30);
    let window = Arc::new(Window::default());
    // The worker does not know of the horizon, and it stays.
    let content = Content::Rows(PackedRows::default());
    planning.chunk(chunk(&planning, 2, content, Some(Cursor::done(1)), &window));
    Frame::default()
        .record(pb::Marker {
            content: b"m:2".to_vec(),
            lsn: 31,
        })
        .feed(&mut planning);
    planning.piece().unwrap();
    let lines = flushed(&mut planning);
    assert!(
        lines[0].contains("\"done\"") && lines[0].contains("\"horizon\":112"),
        "{lines:?}"
    );
    assert!(captured(&mut planning, 115, &[105]).is_empty());
    assert!(!captured(&mut planning, 115, &[]).is_empty());
    // Its rows count whoever wrote them.
    assert!(changed(&mut planning, mirror, 105, 40)[0].starts_with("HSET t:2 "));
}

#[test]
fn what_was_written_before_the_definition_changed_removes_the_key_of_a_cache() {
    for on_write in [pb::OnWrite::Refresh, pb::OnWrite::Populate] {
        let relation = pb::Relation {
            on_write: on_write.into(),
            ..refreshed()
        };
        let mut stored = settled();
        stored.relations.insert(OID, relation.clone());
        let mut planning = planning(stored, 1 << 20, 1 << 24);
        announce(&mut planning, relation.clone());
        let lines = changed(&mut planning, relation.clone(), 104, 20);
        assert_eq!(lines[0], "UNLINK t:2");
        // Taken for an earlier life of the table.
        let outdated = generation(&planning) - 1;
        take(&mut planning, 107, outdated, 30);
        assert_eq!(planning.registry.get(OID).unwrap().cursor.horizon, None);
        let generation = generation(&planning);
        take(&mut planning, 112, generation, 31);
        let lines = changed(&mut planning, relation.clone(), 105, 40);
        assert_eq!(lines[0], "UNLINK t:2");
        let lines = changed(&mut planning, relation, 112, 50);
        assert!(lines.iter().any(|line| line.contains(" t:2 ")), "{lines:?}");
        assert!(!lines.contains(&"UNLINK t:2".to_owned()), "{lines:?}");
    }
}

/// The writer outlives the session.
#[test]
fn a_horizon_is_stored_unless_the_server_was_put_back_behind_it() {
    for (horizon, lines_of_105, lines_of_98) in
        [(99, "HSET t:2", "UNLINK t:2"), (100, "UNLINK t:2", "UNLINK t:2")]
    {
        let mut stored = settled();
        stored.relations.insert(OID, cache(1, "t:{id}"));
        let cursor = Cursor {
            horizon: Some(horizon),
            ..Cursor::done(1)
        };
        stored
            .progress
            .as_mut()
            .unwrap()
            .cursors
            .insert(OID, cursor.to_json());
        // The session's is 100.
        let mut planning = planning(stored, 1 << 20, 1 << 24);
        assert_eq!(planning.backfill.without_horizon().is_empty(), horizon < 100);
        let lines = changed(&mut planning, cache(1, "t:{id}"), 105, 10);
        assert!(lines[0].starts_with(lines_of_105), "{lines:?}");
        let lines = changed(&mut planning, cache(1, "t:{id}"), 98, 20);
        assert!(lines[0].starts_with(lines_of_98), "{lines:?}");
    }
}

/// What is written when the pending key of a row was read again in a snapshot.
fn reread(planning: &mut Planning, xmax: u64, xip: &[u64]) -> Vec<String> {
    reread_as(planning, Some(packed(1, "1", "read")), xmax, xip)
}

/// The same where this was found of it.
fn reread_as(planning: &mut Planning, row: Option<Vec<u8>>, xmax: u64, xip: &[u64]) -> Vec<String> {
    reread_key(planning, "t:1", row, xmax, xip)
}

fn reread_key(
    planning: &mut Planning,
    key: &str,
    row: Option<Vec<u8>>,
    xmax: u64,
    xip: &[u64],
) -> Vec<String> {
    let window = Arc::new(Window::default());
    let keys = Content::Keys(vec![(key.as_bytes().to_vec(), row)]);
    let read = Chunk {
        snapshot: Snapshot::new(xip.first().copied().unwrap_or(xmax), xmax, xip.to_vec()),
        ..chunk(planning, 7, keys, None, &window)
    };
    planning.chunk(read);
    Frame::default()
        .record(pb::Marker {
            content: b"m:7".to_vec(),
            lsn: 50,
        })
        .feed(planning);
    planning.piece().unwrap();
    flushed(planning)
}

/// Its key was noted while the table was a mirror, or by `verify --repair`. An old transaction that has changed the row is not in the
/// stream, so what was read without it stayed for good.
#[test]
fn a_pending_key_of_a_cache_is_read_when_all_that_wrote_before_the_label_are_seen() {
    let mut planning = planning(empty(), 1 << 20, 1 << 24);
    announce(&mut planning, refreshed());
    let removed = ["UNLINK t:1", "HDEL walmirror:{s}:pending t:1"];
    assert_eq!(reread(&mut planning, 115, &[])[..2], removed);
    let generation = generation(&planning);
    take(&mut planning, 112, generation, 30);
    assert_eq!(reread(&mut planning, 115, &[105])[..2], removed);
    let lines = reread(&mut planning, 115, &[113]);
    assert!(lines.contains(&"HSET t:1 id 1 v read".to_owned()), "{lines:?}");
}

/// The story: `verify --repair` came to a mirror that had been announced just then. What was read without an old transaction that had
/// changed the row stayed until the fill came there, and where that had been there already, for good.
#[test]
fn a_pending_key_of_a_mirror_waits_for_all_that_wrote_before_the_label() {
    let mirror = relation(1, "t:{id}");
    let mut planning = planning(empty(), 1 << 20, 1 << 24);
    announce(&mut planning, mirror.clone());
    let is_kept = |lines: &[String]| !lines.iter().any(|line| line.contains("t:1"));
    let lines = reread(&mut planning, 115, &[]);
    assert!(is_kept(&lines), "who was writing is not known: {lines:?}");
    let generation = generation(&planning);
    take(&mut planning, 112, generation, 30);
    for row in [Some(packed(1, "1", "read")), None] {
        let lines = reread_as(&mut planning, row, 115, &[105]);
        assert!(is_kept(&lines), "{lines:?}");
    }
    // 113 began behind the label: had an older one changed the row, it would have waited for it.
    Frame::default()
        .relation(mirror)
        .begin(113, 60)
        .row(Kind::Update, "1", Some("new"))
        .commit(65)
        .feed(&mut planning);
    flushed(&mut planning);
    let lines = reread(&mut planning, 115, &[105]);
    assert!(lines.contains(&"HSET t:1 id 1 v read".to_owned()), "{lines:?}");
    let lines = reread_as(&mut planning, None, 115, &[]);
    assert_eq!(lines[..2], ["UNLINK t:1", "HDEL walmirror:{s}:pending t:1"]);
}

/// An earlier session has met ALTER TYPE … RENAME VALUE, whose COMMIT waits for a standby. It locks no table, so that a later writer of the
/// row did not have to wait for it, and this session does not know it: what was read without it has the values as they were before.
#[test]
fn a_pending_key_waits_for_the_announcement_of_an_earlier_session_too() {
    let mut stored = settled();
    let cursor = Cursor {
        horizon: Some(99),
        ..Cursor::start(1, Vec::new())
    };
    stored
        .progress
        .as_mut()
        .unwrap()
        .cursors
        .insert(OID, cursor.to_json());
    let mut planning = planning(stored, 1 << 20, 1 << 24);
    changed(&mut planning, relation(1, "t:{id}"), 113, 10);
    for (xip, is_written) in [(98, false), (99, true)] {
        let lines = reread_key(&mut planning, "t:2", Some(packed(1, "2", "read")), 115, &[xip]);
        let written = lines.contains(&"HSET t:2 id 2 v read".to_owned());
        assert_eq!(written, is_written, "{xip}: {lines:?}");
    }
}
