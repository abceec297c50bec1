//! Removals of all keys of a table: each needs a MULTI of its own, so what Redis has begun already is cut before it.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use super::*;

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

/// The story: a mirror had written a key in the same batch before it gave its template away, and the cache that has it now, or whose
/// template is less specific, held that row for good: nothing sweeps a cache. Nor did anything where Redis had told of that cache before its
/// time, because the stream began anew from before it.
#[test]
fn a_cache_is_emptied_also_of_what_another_table_has_just_written() {
    for (heir, is_new) in [("t:{id}", true), ("{any}", false), ("t:{any}", false)] {
        let mut stored = settled();
        let other = pb::Relation {
            oid: 600,
            index: 2,
            announced: true,
            columns: vec![pb::Column {
                name: if is_new { "id" } else { "any" }.into(),
                encoding: Encoding::Text.into(),
                ..Column::default()
            }],
            ..cache(3, heir)
        };
        if !is_new {
            stored.relations.insert(600, other.clone());
        }
        let mut planning = planning(stored, 1 << 20, 1 << 24);
        let mut frame = Frame::default()
            .relation(relation(1, "t:{id}"))
            .begin(100, 10)
            .row(Kind::Insert, "1", Some("a"))
            .commit(20)
            .begin(101, 20)
            .relation(pb::Relation {
                announced: true,
                ..relation(2, "v:{id}")
            })
            .row(Kind::Insert, "2", Some("b"));
        if is_new {
            frame = frame.relation(other);
        }
        frame.commit(30).feed(&mut planning);
        let written = flushed(&mut planning);
        let place = |line: &str| written.iter().rposition(|other| other.starts_with(line));
        assert!(place("UNLINK t:1") > place("HSET t:1 "), "{heir}: {written:?}");
        assert!(place("UNLINK v:2") < place("HSET v:2 "), "{heir}: {written:?}");
    }
}

/// Found by the simulator: a table that got the template of one whose keys were kept, and left it in the same transaction, took only its own
/// keys with it.
#[test]
fn who_leaves_a_template_takes_what_another_table_had_written_there() {
    let other = |fingerprint, key| pb::Relation {
        oid: 600,
        announced: true,
        ..cache(fingerprint, key)
    };
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    Frame::default()
        .relation(relation(1, "t:{id}"))
        .begin(100, 10)
        .row(Kind::Insert, "1", Some("a"))
        .record(pb::Forget {
            oid: OID,
            keep_keys: true,
        })
        .relation(pb::Relation {
            mode: pb::Mode::Mirror.into(),
            ..other(2, "t:{id}")
        })
        .relation(other(3, "u:{id}"))
        .commit(20)
        .feed(&mut planning);
    let written = flushed(&mut planning);
    let place = |line: &str| written.iter().rposition(|other| other.starts_with(line));
    assert!(place("HSET t:1 ").is_some(), "{written:?}");
    assert!(place("UNLINK t:1") > place("HSET t:1 "), "{written:?}");
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
        assert_eq!(
            lines(&segment).contains(&"HSET walmirror:{s}:progress healing 1".to_owned()),
            resync
        );
        let cursor = &planning.registry.get(OID).unwrap().cursor;
        assert_eq!(cursor.old_keys, ["old:{id}"]);
    }
}

/// A restart in the middle of a resync said that all was well, because only the process that had begun it knew.
#[test]
fn the_progress_says_that_a_resync_is_not_at_its_end() {
    let mut stored = settled();
    if let Some(progress) = &mut stored.progress {
        progress.healing = true;
        progress
            .cursors
            .insert(OID, fenced(Cursor::start(1, Vec::new())).to_json());
    }
    let mut planning = planning(stored, 1 << 20, 1 << 24);
    let healed = "HDEL walmirror:{s}:progress healing".to_owned();
    planning.backfill.note_reconciled(0);
    planning.note_healed();
    assert!(!flushed(&mut planning).contains(&healed));
    let window = Arc::new(Window::default());
    let last = chunk(&planning, 1, rows(&[]), Some(fenced(Cursor::done(1))), &window);
    planning.chunk(last);
    planning.chunks.release(1);
    planning.piece().unwrap();
    planning.note_healed();
    let lines = flushed(&mut planning);
    let at = |sign: &str| lines.iter().position(|line| line.contains(sign));
    assert!(at("\"done\"") < at(&healed) && at(&healed).is_some(), "{lines:?}");
    planning.note_healed();
    assert!(flushed(&mut planning).is_empty());
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

/// A DELETE that did not tell its key left the key of a cache until the catalog had been compared, which waits for whoever is writing.
#[test]
fn a_change_that_does_not_tell_its_key_empties_a_cache_at_its_place() {
    let error = || pb::Error {
        table: "public.t".into(),
        oid: OID,
        ..pb::Error::default()
    };
    for relation in [cache(1, "t:{id}"), relation(1, "t:{id}")] {
        let mut stored = settled();
        stored.relations.insert(OID, relation.clone());
        let mut planning = planning(stored, 1 << 20, 1 << 24);
        Frame::default()
            .relation(relation.clone())
            .begin(110, 10)
            .row(Kind::Insert, "1", Some("a"))
            .record(error())
            .row(Kind::Insert, "2", Some("b"))
            .record(error())
            .commit(20)
            .feed(&mut planning);
        planning.flush();
        let segment = planning.next_segment().unwrap();
        let is_cache = relation.mode() == pb::Mode::Cache;
        let purged: Vec<_> = segment
            .purges
            .iter()
            .map(|purge| purge.prefix().to_vec())
            .collect();
        assert_eq!(purged, vec![b"t:".to_vec(); usize::from(is_cache)]);
        // Until the table is made anew nothing is written to a cache, so that nothing more has to go.
        let lines = lines(&segment);
        assert_eq!(
            lines.contains(&"HSET t:2 id 2 v b".to_owned()),
            !is_cache,
            "{lines:?}"
        );
        assert!(planning.registry.get(OID).unwrap().is_outdated());
    }
}

/// The cut is only where a purge needs it.
#[test]
fn a_change_that_does_not_tell_its_key_cuts_what_redis_has_begun() {
    for relation in [cache(1, "t:{id}"), relation(1, "t:{id}")] {
        let is_cache = relation.mode() == pb::Mode::Cache;
        let mut stored = settled();
        stored.relations.insert(OID, relation.clone());
        let mut planning = planning(stored, 500, 1 << 24);
        Frame::default()
            .relation(relation)
            .begin(110, 10)
            .feed(&mut planning);
        for row in 0..100 {
            Frame::default()
                .row(Kind::Insert, &row.to_string(), None)
                .feed(&mut planning);
        }
        let error = pb::Error {
            oid: OID,
            ..pb::Error::default()
        };
        Frame::default().record(error).commit(20).feed(&mut planning);
        planning.flush();
        let mut segments = Vec::new();
        while let Some(segment) = planning.next_segment() {
            segments.push(segment);
        }
        let is_cut = segments
            .iter()
            .any(|segment| segment.step.is_some_and(|step| step.part.is_some()));
        assert_eq!(is_cut, is_cache);
        assert_eq!(
            segments
                .iter()
                .any(|segment| segment.opens && !segment.purges.is_empty()),
            is_cache
        );
    }
}

/// The story: files that were put back to before a large transaction with a TRUNCATE, and other large transactions since: until the place of
/// that commit came, all of them were planned and held.
#[test]
fn what_waits_for_the_transaction_that_keys_were_removed_for_is_bounded() {
    let value = "x".repeat(1 << 20);
    let mut last = Ok(());
    for size in [1_usize, 200] {
        let mut stored = settled();
        let progress = stored.progress.as_mut().unwrap();
        let purged = Commit {
            lsn: Lsn(1_000_000),
            xid: 1_000,
            time: 0,
        };
        progress.purging = Some(crate::progress::Purging { commit: Some(purged) });
        let continuity = Continuity::of(progress, Lsn(10));
        let mut planning = planning(stored, 1 << 20, 1 << 24);
        planning.continuity = continuity;
        Frame::default()
            .relation(relation(1, "t:{id}"))
            .feed(&mut planning);
        for number in 0..size as u64 {
            let at = 20 + 10 * number;
            let frame = Frame::default()
                .begin(100 + number, at)
                .row(Kind::Insert, &number.to_string(), Some(&value))
                .commit(at + 5);
            last = planning.frame(frame.0.as_bytes(), Lsn::INVALID);
            if last.is_err() {
                break;
            }
        }
        if size == 1 {
            Frame::default().begin(1_000, 1_000_000).feed(&mut planning);
            assert!(planning.continuity.is_proved() && planning.next_segment().is_some());
        }
        let held: usize = planning.out.iter().map(|segment| segment.batch.weight()).sum();
        assert!(held < 80 << 20, "{held}");
    }
    let error = last.unwrap_err();
    assert!(
        error
            .gap_reason()
            .is_some_and(|why| why.contains("transaction 1000")),
        "{error}"
    );
}
