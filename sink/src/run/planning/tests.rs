//! Frames in, commands out: what the planner makes of the stream, read back from the RESP that it would send.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use std::collections::BTreeMap;

use walmirror_proto::pb::{self, Column, Encoding, Kind};
use walmirror_proto::writer::{FrameWriter, TupleBuilder};

use super::*;
use crate::backfill::{Content, Cursor, PackedRows, Window};
use crate::gate::Snapshot;
use crate::resp::tests::parse;

pub(super) const OID: u32 = 500;

pub(super) fn relation(fingerprint: u64, key: &str) -> pb::Relation {
    let column = |name: &str| Column {
        name: name.into(),
        encoding: Encoding::Text.into(),
        in_value: true,
        ..Column::default()
    };
    pb::Relation {
        index: 1,
        oid: OID,
        schema: "public".into(),
        name: "t".into(),
        key: key.into(),
        fingerprint,
        columns: vec![column("id"), column("v")],
        ..pb::Relation::default()
    }
}

pub(super) fn settled() -> Stored {
    let progress = Progress {
        lsn: Lsn(10),
        cursors: BTreeMap::from([(OID, Cursor::done(1).to_json())]),
        ..Progress::default()
    };
    Stored {
        progress: Some(progress),
        relations: BTreeMap::from([(OID, relation(1, "t:{id}"))]),
        ..Stored::default()
    }
}

pub(super) fn planning(stored: Stored, batch_bytes: usize, transaction_bytes: usize) -> Planning {
    Planning::new(Start {
        keys: RedisKeys::new("s"),
        scripts: Scripts::default(),
        fresh: None,
        stored,
        gate: Gate::new(1 << 16, 100, 0),
        slot: "s".to_owned(),
        marker_prefix: "m:".into(),
        limits: Limits {
            batch_bytes,
            transaction_bytes,
            value_bytes: crate::plan::VALUE_BYTES,
        },
        on_bad_row: crate::config::OnBadRow::Skip,
        backfill: Arc::new(Backfill::default()),
        shared: Arc::new(Shared::default()),
    })
    .unwrap()
}

/// Builds one frame.
#[derive(Default)]
pub(super) struct Frame(FrameWriter);

impl Frame {
    pub(super) fn begin(mut self, xid: u64, commit_lsn: u64) -> Self {
        self.0.record(
            &pb::Begin {
                xid,
                commit_lsn,
                commit_time: 0,
            }
            .into(),
        );
        self
    }

    pub(super) fn relation(mut self, relation: pb::Relation) -> Self {
        self.0.record(&relation.into());
        self
    }

    pub(super) fn record(mut self, record: impl Into<pb::Record>) -> Self {
        self.0.record(&record.into());
        self
    }

    pub(super) fn row(mut self, kind: Kind, id: &str, v: Option<&str>) -> Self {
        let mut tuple = TupleBuilder::new();
        tuple.text(id.as_bytes());
        match v {
            Some(v) => tuple.text(v.as_bytes()),
            None => tuple.null(),
        }
        self.0.row(kind, 1, &tuple, None);
        self
    }

    pub(super) fn commit(mut self, end_lsn: u64) -> Self {
        self.0.record(&pb::Commit { end_lsn }.into());
        self
    }

    pub(super) fn feed(self, planning: &mut Planning) {
        planning.frame(self.0.as_bytes()).unwrap();
    }

    pub(super) fn fails(self, planning: &mut Planning) -> Error {
        planning.frame(self.0.as_bytes()).unwrap_err()
    }
}

pub(super) fn packed(fingerprint: u64, id: &str, v: &str) -> Vec<u8> {
    let mut tuple = TupleBuilder::new();
    tuple.text(id.as_bytes());
    tuple.text(v.as_bytes());
    let mut bytes = fingerprint.to_be_bytes().to_vec();
    tuple.write_tuple(&mut bytes);
    bytes
}

fn lines(segment: &Segment) -> Vec<String> {
    let line = |command: &Vec<Vec<u8>>| {
        command
            .iter()
            .map(|arg| String::from_utf8_lossy(arg).into_owned())
            .collect::<Vec<_>>()
            .join(" ")
    };
    parse(segment.batch.commands().as_bytes())
        .iter()
        .map(line)
        .collect()
}

/// Everything that would go to Redis now, without the frame of a MULTI.
pub(super) fn flushed(planning: &mut Planning) -> Vec<String> {
    if planning.is_dirty() || planning.is_advanced() {
        planning.flush();
    }
    let mut all = Vec::new();
    while let Some(segment) = planning.next_segment() {
        all.extend(lines(&segment));
    }
    all.retain(|line| {
        !["MULTI", "EXEC"].contains(&line.as_str()) && !line.starts_with("WATCH") && !line.starts_with("HGET")
    });
    all
}

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
            "HSET walmirror:{s}:progress lsn 0/28 commit_ts 2000-01-01 00:00:00+00",
            "EXEC",
            "WATCH walmirror:{s}:progress",
            "HGET walmirror:{s}:progress epoch",
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
    assert!(
        steps.len() > 2 && segments > 2 * steps.len(),
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

#[test]
fn a_label_takes_effect_at_its_place() {
    let mut planning = planning(
        Stored {
            progress: Some(Progress {
                lsn: Lsn(10),
                ..Progress::default()
            }),
            ..Stored::default()
        },
        1 << 20,
        1 << 24,
    );
    let announced = pb::Relation {
        announced: true,
        ..relation(1, "t:{id}")
    };
    Frame::default()
        .begin(100, 10)
        .relation(announced)
        .row(Kind::Insert, "1", Some("a"))
        .commit(20)
        .feed(&mut planning);
    let lines = flushed(&mut planning);
    assert!(
        lines[0].starts_with("HSET walmirror:{s}:relations 500 "),
        "{}",
        lines[0]
    );
    assert!(
        lines[1].starts_with("HSET walmirror:{s}:progress backfill:500 {"),
        "{}",
        lines[1]
    );
    // The table is not filled yet: a key may hold anything.
    assert_eq!(lines[2..4], ["UNLINK t:1", "HSET t:1 id 1 v a"]);

    // Another key: rows of a transaction that began before still have the old one.
    let changed = pb::Relation {
        announced: true,
        ..relation(2, "u:{id}")
    };
    Frame::default()
        .begin(101, 20)
        .relation(changed)
        .commit(30)
        .feed(&mut planning);
    Frame::default()
        .relation(relation(1, "t:{id}"))
        .begin(99, 30)
        .row(Kind::Insert, "2", Some("b"))
        .commit(40)
        .feed(&mut planning);
    let lines = flushed(&mut planning);
    assert!(lines[1].contains("\"old_keys\":[\"t:{id}\"]"), "{}", lines[1]);
    assert_eq!(lines[2..4], ["UNLINK t:2", "HSET t:2 id 2 v b"]);
    assert_eq!(planning.registry.get(OID).unwrap().relation.fingerprint, 2);

    // The same version once more, without a refresh: nothing begins anew.
    let generation = planning.registry.get(OID).unwrap().generation;
    Frame::default()
        .begin(102, 40)
        .relation(pb::Relation {
            announced: true,
            ..relation(2, "u:{id}")
        })
        .commit(50)
        .feed(&mut planning);
    assert_eq!(planning.registry.get(OID).unwrap().generation, generation);
    Frame::default()
        .begin(103, 50)
        .relation(pb::Relation {
            announced: true,
            refresh: true,
            ..relation(2, "u:{id}")
        })
        .commit(60)
        .feed(&mut planning);
    assert!(planning.registry.get(OID).unwrap().generation > generation);
}

#[test]
fn a_truncate_removes_what_was_written_before_it_and_nothing_behind_it() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    Frame::default()
        .relation(relation(1, "t:{id}"))
        .begin(100, 10)
        .row(Kind::Insert, "1", Some("a"))
        .record(pb::Truncate { relations: vec![1] })
        .row(Kind::Insert, "2", Some("b"))
        .commit(20)
        .feed(&mut planning);
    planning.flush();
    let segment = planning.next_segment().unwrap();
    assert_eq!(segment.purges.len(), 1);
    assert!(segment.opens);
    assert_eq!(
        lines(&segment)[1..4],
        ["HSET t:1 id 1 v a", "UNLINK t:1", "HSET t:2 id 2 v b"]
    );
}

#[test]
fn a_truncate_behind_what_redis_has_begun_already_cuts_the_transaction() {
    let mut planning = planning(settled(), 500, 1 << 24);
    Frame::default()
        .relation(relation(1, "t:{id}"))
        .begin(100, 10)
        .feed(&mut planning);
    (0..100).for_each(|row| {
        Frame::default()
            .row(Kind::Insert, &row.to_string(), None)
            .feed(&mut planning)
    });
    Frame::default()
        .record(pb::Truncate { relations: vec![1] })
        .row(Kind::Insert, "new", None)
        .commit(20)
        .feed(&mut planning);
    planning.flush();
    let mut segments = Vec::new();
    while let Some(segment) = planning.next_segment() {
        segments.push(segment);
    }
    let cut = segments
        .iter()
        .position(|segment| segment.step.is_some_and(|step| step.part.is_some()))
        .unwrap();
    assert_eq!(segments[cut].step.unwrap().part.unwrap().records, 100);
    let next = &segments[cut + 1];
    assert!(next.opens && next.purges.len() == 1, "{:?}", lines(next));
}

fn cache(fingerprint: u64, key: &str) -> pb::Relation {
    pb::Relation {
        mode: pb::Mode::Cache.into(),
        on_write: pb::OnWrite::Populate.into(),
        ..relation(fingerprint, key)
    }
}

/// Found by the simulator: after a gap the keys of a cached table stayed, as stale as they were, because nothing fills a
/// cache anew; and old key templates were forgotten with the cursors.
#[test]
fn a_resync_empties_caches_and_remembers_old_templates() {
    for resync in [false, true] {
        let mut stored = settled();
        stored.relations.insert(
            600,
            pb::Relation {
                oid: 600,
                ..cache(7, "c:{id}")
            },
        );
        if let Some(progress) = &mut stored.progress {
            progress.resync = resync;
            let cursor = Cursor::start(1, vec!["old:{id}".into()]);
            progress.cursors.insert(OID, cursor.to_json());
            progress.cursors.insert(600, Cursor::done(7).to_json());
        }
        let mut planning = planning(stored, 1 << 20, 1 << 24);
        assert_eq!(planning.is_dirty(), resync);
        planning.flush();
        let segment = planning.next_segment().unwrap();
        let purged: Vec<u32> = segment.purges.iter().map(|purge| purge.relation).collect();
        assert_eq!(purged, if resync { vec![600] } else { vec![] });
        assert_eq!(
            lines(&segment).contains(&"HDEL walmirror:{s}:progress resync".to_owned()),
            resync
        );
        let cursor = &planning.registry.get(OID).unwrap().cursor;
        assert_eq!(cursor.old_keys, ["old:{id}"]);
    }
}

/// Found by the simulator: the keys of a cached table stayed when its label changed in a transaction of which a part was on
/// its way to Redis already, because a purge needs a MULTI of its own.
#[test]
fn a_new_label_of_a_cache_behind_what_redis_has_begun_already_cuts_the_transaction() {
    let mut stored = settled();
    stored.relations.insert(OID, cache(1, "t:{id}"));
    let mut planning = planning(stored, 500, 1 << 24);
    Frame::default()
        .relation(cache(1, "t:{id}"))
        .begin(100, 10)
        .feed(&mut planning);
    (0..100).for_each(|row| {
        Frame::default()
            .row(Kind::Insert, &row.to_string(), None)
            .feed(&mut planning)
    });
    let announced = pb::Relation {
        announced: true,
        ..cache(2, "t:{id}")
    };
    Frame::default()
        .relation(announced)
        .commit(20)
        .feed(&mut planning);
    planning.flush();
    let segments: Vec<Segment> = std::iter::from_fn(|| planning.next_segment()).collect();
    let purging = segments.iter().find(|segment| !segment.purges.is_empty());
    assert!(purging.unwrap().opens);
}

/// Found by the simulator: a keepalive that came before the transaction that was cut made the progress forget the part, and
/// after another restart the part was applied twice.
#[test]
fn a_part_outlasts_a_keepalive() {
    let mut stored = settled();
    stored.progress.as_mut().unwrap().part = Some(crate::transaction::Part {
        xid: 100,
        commit_lsn: Lsn(30),
        records: 3,
    });
    let mut planning = planning(stored, 1 << 20, 1 << 24);
    planning.keepalive(Lsn(20));
    let lines = flushed(&mut planning);
    assert!(lines[0].contains("part_xid 100"), "{lines:?}");
    assert_eq!(lines.len(), 1);
}

#[test]
fn a_forgotten_table_stays_forgotten() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    Frame::default()
        .relation(relation(1, "t:{id}"))
        .begin(100, 10)
        .record(pb::Forget {
            oid: OID,
            keep_keys: false,
        })
        .commit(20)
        .feed(&mut planning);
    planning.flush();
    let segment = planning.next_segment().unwrap();
    assert_eq!(segment.purges.len(), 1);
    assert_eq!(
        lines(&segment)[1..3],
        [
            "HDEL walmirror:{s}:relations 500",
            "HDEL walmirror:{s}:progress backfill:500"
        ]
    );
    Frame::default()
        .begin(99, 20)
        .row(Kind::Insert, "1", Some("a"))
        .commit(30)
        .feed(&mut planning);
    assert_eq!(flushed(&mut planning).len(), 1, "only the progress");
}

pub(super) fn chunk(
    planning: &Planning,
    id: u64,
    content: Content,
    cursor: Option<Cursor>,
    window: &Arc<Window>,
) -> Chunk {
    let generation = planning
        .registry
        .get(OID)
        .map_or(0, |registered| registered.generation);
    window.sent();
    Chunk {
        id,
        relation: OID,
        generation,
        snapshot: Snapshot::new(105, 105, vec![]),
        content,
        cursor,
        window: Arc::clone(window),
    }
}

pub(super) fn rows(rows: &[Vec<u8>]) -> Content {
    let mut content = PackedRows::default();
    rows.iter().for_each(|row| content.push(row));
    Content::Rows(content)
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
    assert!(window.wait(0, || true) && !window.is_stale());
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

#[test]
fn the_catalog_corrects_the_registry_where_the_stream_has_said_nothing() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    let window = Arc::new(Window::default());
    let other = pb::Relation {
        oid: 600,
        name: "u".into(),
        ..relation(3, "u:{id}")
    };
    let mut catalog = chunk(&planning, 1, Content::Catalog(vec![other]), None, &window);
    catalog.relation = 0;
    planning.chunk(catalog);
    Frame::default()
        .record(pb::Marker {
            content: b"m:1".to_vec(),
            lsn: 31,
        })
        .feed(&mut planning);
    planning.piece().unwrap();
    assert_eq!(planning.registry.oids(), [600]);
    assert!(planning.is_dirty());
}

#[test]
fn a_keepalive_moves_the_position_between_transactions_only() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    planning.keepalive(Lsn(50));
    assert!(planning.is_advanced() && !planning.is_dirty());
    assert_eq!(flushed(&mut planning), ["HSET walmirror:{s}:progress lsn 0/32"]);
    planning.keepalive(Lsn(40));
    assert!(!planning.is_advanced());
    Frame::default()
        .relation(relation(1, "t:{id}"))
        .begin(100, 60)
        .feed(&mut planning);
    planning.keepalive(Lsn(70));
    assert!(!planning.is_advanced());
}

#[test]
fn a_broken_stream_is_an_error_that_says_where() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    let error = planning.frame(b"\x0a\x05nope!").unwrap_err();
    assert!(error.to_string().contains("0/A"), "{error}");
    let mut frame = Frame::default().begin(100, 10);
    let mut tuple = TupleBuilder::new();
    tuple.text(b"1");
    frame.0.row(Kind::Insert, 9, &tuple, None);
    assert!(
        planning
            .frame(frame.0.as_bytes())
            .unwrap_err()
            .to_string()
            .contains("relation 9")
    );
}
