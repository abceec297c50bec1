//! Chunks of a backfill: held until their marker, then through the gate.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use super::*;

/// The story: the stream was silent while a large table was read, and only a frame ended a batch. What Redis could not take at once became one
/// EXEC of a million commands and 117 MB of memory.
#[test]
fn a_large_chunk_is_cut_into_batches_though_the_stream_is_silent() {
    const BATCH: usize = 16 * 1024;
    const PIECE: usize = 128 * 1024;
    let mut stored = settled();
    stored.progress.as_mut().unwrap().cursors.clear();
    let mut planning = planning(stored, BATCH, 1 << 24);
    let window = Arc::new(Window::default());
    let read: Vec<_> = (0..20_000).map(|id| packed(1, &id.to_string(), "read")).collect();
    planning.chunk(chunk(&planning, 7, rows(&read), None, &window));
    Frame::default()
        .record(pb::Marker {
            content: b"m:7".to_vec(),
            lsn: 31,
        })
        .feed(&mut planning);
    let mut rows = 0;
    while planning.wants_piece() {
        planning.piece().unwrap();
        let segment = planning.next_segment().unwrap();
        // A piece, with what the batch had before it and the last row of it.
        assert!(segment.batch.weight() <= BATCH + PIECE + 1024);
        rows += lines(&segment)
            .iter()
            .filter(|line| line.starts_with("HSET t:"))
            .count();
        assert!(planning.next_segment().is_none());
    }
    assert_eq!(rows, 20_000);
}

#[test]
fn a_chunk_waits_for_its_marker_and_passes_the_gate() {
    let mut stored = settled();
    stored.progress.as_mut().unwrap().cursors.clear();
    let mut planning = planning(stored, 1 << 20, 1 << 24);
    let window = Arc::new(Window::default());
    let content = rows(&[
        packed(1, "1", "read"),
        packed(1, "2", "read"),
        packed(1, "3", "read"),
    ]);
    let cursor = Cursor {
        block: 9,
        ..Cursor::start(1, Vec::new())
    };
    planning.chunk(chunk(&planning, 7, content, Some(cursor), &window));
    // 104 is visible to the snapshot of the chunk, 110 is not.
    Frame::default()
        .relation(relation(1, "t:{id}"))
        .begin(104, 10)
        .row(Kind::Insert, "1", Some("old"))
        .commit(20)
        .feed(&mut planning);
    Frame::default()
        .begin(110, 20)
        .row(Kind::Update, "2", Some("new"))
        .commit(30)
        .feed(&mut planning);
    assert!(!planning.wants_piece());
    let before = flushed(&mut planning);
    assert!(before.contains(&"HSET t:2 id 2 v new".to_owned()));
    Frame::default()
        .record(pb::Marker {
            content: b"m:7".to_vec(),
            lsn: 31,
        })
        .feed(&mut planning);
    assert!(planning.wants_piece());
    planning.piece().unwrap();
    let written = flushed(&mut planning);
    assert_eq!(
        written[..4],
        [
            "UNLINK t:1",
            "HSET t:1 id 1 v read",
            "UNLINK t:3",
            "HSET t:3 id 3 v read"
        ]
    );
    assert!(written[4].contains("\"block\":9"), "{}", written[4]);
    // What was read is never ahead of the position that it is written with.
    assert_eq!(written.last().unwrap(), "HSET walmirror:{s}:progress lsn 0/1F");
    assert!(window.wait(0, || true) && !window.is_stale());
}

/// What a key held before goes when it is filled, so the fill stays in the batch also where the table is complete in the same one,
/// and a change of the row comes behind.
#[test]
fn a_change_of_a_complete_table_does_not_replace_the_fill() {
    let mut stored = settled();
    stored.progress.as_mut().unwrap().cursors.clear();
    let mut planning = planning(stored, 1 << 20, 1 << 24);
    let window = Arc::new(Window::default());
    let content = rows(&[packed(1, "1", "read")]);
    planning.chunk(chunk(&planning, 7, content, Some(Cursor::done(1)), &window));
    Frame::default()
        .record(pb::Marker {
            content: b"m:7".to_vec(),
            lsn: 11,
        })
        .feed(&mut planning);
    planning.piece().unwrap();
    Frame::default()
        .relation(relation(1, "t:{id}"))
        .begin(110, 20)
        .row(Kind::Update, "1", Some("new"))
        .commit(30)
        .feed(&mut planning);
    let written = flushed(&mut planning);
    assert_eq!(written[..2], ["UNLINK t:1", "HSET t:1 id 1 v read"]);
    assert!(written.contains(&"HSET t:1 id 1 v new".to_owned()), "{written:?}");
}

/// The key of a complete table is read again because what it holds is not to be trusted: what was written then stays too, where a
/// change of the row comes behind it in the same batch.
#[test]
fn a_change_does_not_replace_what_was_read_again() {
    for read in [Some(packed(1, "1", "read")), None] {
        let mut planning = planning(settled(), 1 << 20, 1 << 24);
        let window = Arc::new(Window::default());
        let is_row = read.is_some();
        let content = Content::Keys(vec![(b"t:1".to_vec(), read)]);
        planning.chunk(chunk(&planning, 7, content, None, &window));
        Frame::default()
            .record(pb::Marker {
                content: b"m:7".to_vec(),
                lsn: 11,
            })
            .feed(&mut planning);
        planning.piece().unwrap();
        Frame::default()
            .relation(relation(1, "t:{id}"))
            .begin(110, 20)
            .row(Kind::Insert, "1", Some("new"))
            .commit(30)
            .feed(&mut planning);
        let written = flushed(&mut planning);
        assert_eq!(written[0], "UNLINK t:1", "{written:?}");
        assert_eq!(written.contains(&"HSET t:1 id 1 v read".to_owned()), is_row);
        assert!(written.contains(&"HSET t:1 id 1 v new".to_owned()), "{written:?}");
    }
}

/// The story: with Redis as the bottleneck there was one chunk with each segment, however small it was.
#[test]
fn small_chunks_share_a_piece() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    let window = Arc::new(Window::default());
    let mut frame = Frame::default();
    for id in 1..=3 {
        let key = format!("t:{id}").into_bytes();
        let content = Content::Keys(vec![(key, Some(packed(1, &id.to_string(), "again")))]);
        planning.chunk(chunk(&planning, id, content, None, &window));
        frame = frame.record(pb::Marker {
            content: format!("m:{id}").into_bytes(),
            lsn: 11,
        });
    }
    frame.feed(&mut planning);
    planning.piece().unwrap();
    let written = flushed(&mut planning);
    for id in 1..=3 {
        assert!(
            written.contains(&format!("HSET t:{id} id {id} v again")),
            "{written:?}"
        );
    }
}

#[test]
fn a_chunk_of_another_version_is_dropped_with_those_behind_it() {
    let mut stored = settled();
    stored.progress.as_mut().unwrap().cursors.clear();
    let mut planning = planning(stored, 1 << 20, 1 << 24);
    let window = Arc::new(Window::default());
    planning.chunk(chunk(&planning, 1, rows(&[packed(2, "1", "x")]), None, &window));
    planning.chunk(chunk(&planning, 2, rows(&[packed(1, "1", "x")]), None, &window));
    for id in ["m:1", "m:2"] {
        Frame::default()
            .record(pb::Marker {
                content: id.into(),
                lsn: 31,
            })
            .feed(&mut planning);
        planning.piece().unwrap();
    }
    assert!(window.is_stale());
    assert!(flushed(&mut planning).iter().all(|line| !line.contains("t:1")));
}

#[test]
fn keys_without_a_row_go_unless_something_newer_wrote_them() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    let window = Arc::new(Window::default());
    planning.chunk(chunk(
        &planning,
        1,
        Content::Absent(vec![b"t:1".to_vec(), b"t:2".to_vec()]),
        None,
        &window,
    ));
    let pending = vec![
        (b"t:3".to_vec(), None),
        (b"t:4".to_vec(), Some(packed(1, "4", "again"))),
        (b"t:5".to_vec(), None),
    ];
    planning.chunk(chunk(&planning, 2, Content::Keys(pending), None, &window));
    Frame::default()
        .relation(relation(1, "t:{id}"))
        .begin(110, 20)
        .row(Kind::Insert, "2", Some("new"))
        .row(Kind::Insert, "5", Some("new"))
        .commit(30)
        .record(pb::Marker {
            content: b"m:1".to_vec(),
            lsn: 31,
        })
        .record(pb::Marker {
            content: b"m:2".to_vec(),
            lsn: 31,
        })
        .feed(&mut planning);
    flushed(&mut planning);
    planning.piece().unwrap();
    planning.piece().unwrap();
    let mut written = flushed(&mut planning);
    written.retain(|line| !line.contains("lsn"));
    let pending = |key: &str| format!("HDEL walmirror:{{s}}:pending {key}");
    assert_eq!(
        written,
        [
            "UNLINK t:1",
            "UNLINK t:3",
            &pending("t:3"),
            "UNLINK t:4",
            "HSET t:4 id 4 v again",
            &pending("t:4")
        ]
    );
}

/// Feeds a chunk and its marker, and hands out what it gives.
fn plan(planning: &mut Planning, content: Content) -> Vec<String> {
    let window = Arc::new(Window::default());
    planning.chunk(chunk(planning, 7, content, None, &window));
    let marker = pb::Marker {
        content: b"m:7".to_vec(),
        lsn: 11,
    };
    Frame::default().record(marker).feed(planning);
    planning.piece().unwrap();
    flushed(planning)
}

#[test]
fn a_key_without_a_row_goes_if_it_is_the_tables_where_the_stream_stands() {
    let mut stored = settled();
    let cursor = Cursor {
        stage: crate::backfill::Stage::Sweep,
        ..Cursor::start(1, vec!["old:{id}".to_owned(), "taken:{id}".to_owned()])
    };
    let other = pb::Relation {
        oid: OID + 1,
        ..relation(1, "taken:{id}")
    };
    let progress = stored.progress.as_mut().unwrap();
    progress.cursors = BTreeMap::from([(OID, cursor.to_json())]);
    stored.relations.insert(OID + 1, other);
    let mut planning = planning(stored, 1 << 20, 1 << 24);
    let keys = ["t:1", "old:1", "taken:1", "b:1"];
    let absent = keys.iter().map(|key| key.as_bytes().to_vec()).collect();
    let written = plan(&mut planning, Content::Absent(absent));
    assert_eq!(written[..2], ["UNLINK t:1", "UNLINK old:1"]);
    assert_eq!(written.len(), 3, "{written:?}");
}

/// The pending hash has one place for a key, whichever table it is noted for.
#[test]
fn a_pending_key_of_another_table_is_noted_for_that_one() {
    let mut stored = settled();
    let other = pb::Relation {
        oid: OID + 1,
        ..relation(1, "other:{id}")
    };
    stored.relations.insert(OID + 1, other);
    let mut planning = planning(stored, 1 << 20, 1 << 24);
    let orphans = Content::Orphans(vec![b"other:1".to_vec(), b"nobody:1".to_vec()]);
    let written = plan(&mut planning, orphans);
    let noted = format!("HSET walmirror:{{s}}:pending other:1 {}", OID + 1);
    assert_eq!(
        written[..2],
        [noted.as_str(), "HDEL walmirror:{s}:pending nobody:1"]
    );
}

/// A row that could not be read and was written since is another one, and noted by whoever wrote it if that cannot be read either.
#[test]
fn a_row_that_cannot_be_read_is_noted_unless_something_newer_wrote_it() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    // The snapshot of the chunk does not see this one.
    Frame::default()
        .relation(relation(1, "t:{id}"))
        .begin(110, 10)
        .row(Kind::Update, "1", Some("new"))
        .commit(11)
        .feed(&mut planning);
    flushed(&mut planning);
    let own = "walmirror:{s}:progress";
    let keys = ["t:1", "t:2", own].map(|key| key.as_bytes().to_vec());
    let written = plan(&mut planning, Content::LeftOut(keys.to_vec()));
    assert_eq!(
        written[..2],
        ["UNLINK t:2", "HDEL walmirror:{s}:pending t:2"],
        "{written:?}"
    );
    let noted = |key: &str| {
        written
            .iter()
            .any(|line| line.starts_with("XADD") && line.contains(key))
    };
    assert!(!noted("t:1") && noted("t:2") && noted(own), "{written:?}");
}

/// The story: a large transaction stood in every snapshot, because its COMMIT waited for a standby, and the gate had let go of it. All
/// rows of a table were read in such snapshots and only noted as pending, and the table was called complete without a key.
#[test]
fn a_stretch_that_the_gate_cannot_judge_is_read_again_and_the_table_is_not_complete() {
    let hidden = || Snapshot::new(99, 120, vec![99]);
    let contents = [
        rows(&[packed(1, "1", "read")]),
        Content::Absent(vec![b"t:1".to_vec()]),
        Content::LeftOut(vec![b"t:1".to_vec()]),
    ];
    for content in contents {
        let mut stored = settled();
        stored.progress.as_mut().unwrap().cursors.clear();
        let mut planning = planning(stored, 1 << 20, 1 << 24);
        assert!(planning.backfill.is_useless(&hidden()));
        let window = Arc::new(Window::default());
        let read = chunk(&planning, 1, content, None, &window);
        planning.chunk(Chunk {
            snapshot: hidden(),
            ..read
        });
        planning.chunk(chunk(&planning, 2, rows(&[]), Some(Cursor::done(1)), &window));
        for id in ["m:1", "m:2"] {
            let (content, lsn) = (id.into(), 31);
            Frame::default()
                .record(pb::Marker { content, lsn })
                .feed(&mut planning);
            planning.piece().unwrap();
        }
        assert!(window.is_stale());
        let written = flushed(&mut planning);
        assert!(
            written
                .iter()
                .all(|line| !line.contains("t:1") && !line.contains("done")),
            "{written:?}"
        );
        assert_eq!(planning.backfill.progress(), (1, 1));
    }
}

/// Pending keys are judged one by one: a transaction that stays open for days holds up only those whose changer is not known.
#[test]
fn a_pending_key_whose_changer_is_known_is_written_in_any_snapshot() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    let window = Arc::new(Window::default());
    let keys = ["1", "2"].map(|id| (format!("t:{id}").into_bytes(), Some(packed(1, id, "again"))));
    let read = chunk(&planning, 1, Content::Keys(keys.into()), None, &window);
    planning.chunk(Chunk {
        snapshot: Snapshot::new(99, 120, vec![99]),
        ..read
    });
    Frame::default()
        .relation(relation(1, "t:{id}"))
        .begin(110, 20)
        .row(Kind::Insert, "1", Some("new"))
        .commit(30)
        .record(pb::Marker {
            content: b"m:1".to_vec(),
            lsn: 31,
        })
        .feed(&mut planning);
    flushed(&mut planning);
    planning.piece().unwrap();
    let written = flushed(&mut planning);
    assert_eq!(
        written[..4],
        [
            "UNLINK t:1",
            "HSET t:1 id 1 v again",
            "HDEL walmirror:{s}:pending t:1",
            "HSET walmirror:{s}:pending t:2 500"
        ]
    );
    assert!(!window.is_stale());
}
