//! Labels and definitions: a table is announced, changed, forgotten, or corrected by what the catalog says.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use super::*;
use crate::backfill::Catalog;

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

/// Keys of a template that the table had before, and that no sweep had removed yet, once stayed for good.
#[test]
fn a_table_that_keeps_its_keys_keeps_those_of_its_own_template() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    let announced = pb::Relation {
        announced: true,
        ..relation(2, "u:{id}")
    };
    Frame::default()
        .relation(relation(1, "t:{id}"))
        .begin(100, 10)
        .relation(announced)
        .record(pb::Forget {
            oid: OID,
            keep_keys: true,
        })
        .commit(20)
        .feed(&mut planning);
    planning.flush();
    let segment = planning.next_segment().unwrap();
    let prefixes: Vec<_> = segment.purges.iter().map(|purge| purge.prefix()).collect();
    assert_eq!(prefixes, [b"t:"]);
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
    let mut catalog = chunk(
        &planning,
        1,
        Content::Catalog(Catalog {
            relations: vec![other],
            ..Catalog::default()
        }),
        None,
        &window,
    );
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

/// The label of a cache changed while nobody read the stream, and changes again before the catalog was looked at: back, or to
/// another version under the template that the stray rows had. The latter was found by the simulator.
#[test]
fn keys_of_a_version_that_nobody_announced_go_with_the_next_change() {
    for next in [cache(1, "t:{id}"), cache(3, "u:{id}")] {
        let mut stored = settled();
        stored.relations = BTreeMap::from([(OID, cache(1, "t:{id}"))]);
        let mut planning = planning(stored, 1 << 20, 1 << 24);
        planning.backfill.note_reconciled(0);
        let stray = |planning: &mut Planning, xid, lsn| {
            Frame::default()
                .relation(cache(2, "u:{id}"))
                .begin(xid, lsn)
                .row(Kind::Insert, "1", Some("a"))
                .row(Kind::Insert, "2", Some("b"))
                .commit(lsn + 10)
                .feed(planning);
            flushed(planning)
        };
        let lines = stray(&mut planning, 100, 10);
        assert!(
            lines[0].starts_with("HSET walmirror:{s}:relations 500 "),
            "{lines:?}"
        );
        assert!(lines[1].contains("\"old_keys\":[\"u:{id}\"]"), "{lines:?}");
        assert!(lines.contains(&"UNLINK u:2".to_owned()), "{lines:?}");
        assert!(
            !planning.backfill.is_reconciled(),
            "the catalog is looked at again"
        );
        // That is noted once.
        let lines = stray(&mut planning, 101, 20);
        assert!(!lines[0].contains("relations"), "{lines:?}");
        Frame::default()
            .begin(102, 30)
            .relation(pb::Relation {
                announced: true,
                ..next
            })
            .commit(40)
            .feed(&mut planning);
        planning.flush();
        let segment = planning.next_segment().unwrap();
        for key in ["t:1", "u:1"] {
            assert!(
                segment
                    .purges
                    .iter()
                    .any(|purge| purge.match_key(key.as_bytes()).is_some()),
                "{key} stays"
            );
        }
    }
}

/// The story: with the keys of an earlier template went those that the same batch had just written under the table's own.
#[test]
fn keys_that_are_to_be_kept_stay_also_where_the_batch_has_just_written_them() {
    let mut stored = settled();
    let cursor = Cursor::start(1, vec!["old:{id}".to_owned()]);
    stored
        .progress
        .as_mut()
        .unwrap()
        .cursors
        .insert(OID, fenced(cursor).to_json());
    for keep_keys in [true, false] {
        let mut planning = planning(stored.clone(), 1 << 20, 1 << 24);
        let old = pb::Relation {
            index: 1,
            ..relation(9, "old:{id}")
        };
        Frame::default()
            .relation(old)
            .begin(100, 10)
            .row(Kind::Insert, "1", Some("a"))
            .relation(relation(1, "t:{id}"))
            .row(Kind::Insert, "2", Some("b"))
            .commit(20)
            .begin(101, 20)
            .record(pb::Forget { oid: OID, keep_keys })
            .commit(30)
            .feed(&mut planning);
        let written = flushed(&mut planning);
        let goes = |key: &str| {
            written.contains(&format!("UNLINK {key}")) && {
                let place = |line: &str| written.iter().rposition(|other| other.starts_with(line));
                place(&format!("UNLINK {key}")) > place(&format!("HSET {key} "))
            }
        };
        assert!(goes("old:1"), "{written:?}");
        assert_eq!(goes("t:2"), !keep_keys, "{written:?}");
    }
}

/// A table is forgotten before anybody told of it, and a transaction that wrote it before comes behind.
#[test]
fn a_table_is_forgotten_that_was_never_registered() {
    let stored = Stored {
        progress: Some(Progress {
            lsn: Lsn(10),
            ..Progress::default()
        }),
        ..Stored::default()
    };
    let mut planning = planning(stored, 1 << 20, 1 << 24);
    Frame::default()
        .begin(101, 10)
        .record(pb::Forget {
            oid: OID,
            keep_keys: false,
        })
        .commit(20)
        .relation(relation(1, "t:{id}"))
        .begin(100, 20)
        .row(Kind::Insert, "1", Some("a"))
        .commit(30)
        .feed(&mut planning);
    assert_eq!(flushed(&mut planning).len(), 1, "only the progress");
    assert_eq!(planning.registry.oids(), [] as [u32; 0]);
}

/// A table gave its template to another one, and a transaction that wrote it before that comes behind: neither its rows nor its
/// TRUNCATE concern the other table's keys.
#[test]
fn rows_of_a_template_that_another_table_has_by_now_are_left_out() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    let announced = |oid, fingerprint, key| pb::Relation {
        oid,
        index: 2,
        announced: true,
        ..relation(fingerprint, key)
    };
    Frame::default()
        .begin(100, 10)
        .relation(announced(OID, 2, "u:{id}"))
        .relation(announced(600, 3, "t:{id}"))
        .commit(20)
        .feed(&mut planning);
    flushed(&mut planning);
    Frame::default()
        .relation(relation(1, "t:{id}"))
        .begin(99, 20)
        .row(Kind::Insert, "1", Some("a"))
        .row(Kind::Delete, "2", None)
        .record(pb::Truncate { relations: vec![1] })
        .commit(30)
        .feed(&mut planning);
    planning.flush();
    let segment = planning.next_segment().unwrap();
    assert!(segment.purges.is_empty());
    let about_rows = lines(&segment).into_iter().filter(|line| line.contains(" t:"));
    assert_eq!(about_rows.collect::<Vec<_>>(), [] as [String; 0]);
}

/// The same after a restart, when nobody knows the first table any more.
#[test]
fn rows_of_an_unknown_table_with_the_template_of_a_known_one_wait_for_the_catalog() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    planning.backfill.note_reconciled(0);
    Frame::default()
        .relation(pb::Relation {
            oid: 600,
            ..relation(3, "t:{id}")
        })
        .begin(99, 10)
        .row(Kind::Insert, "1", Some("a"))
        .commit(20)
        .feed(&mut planning);
    assert_eq!(flushed(&mut planning).len(), 1, "only the progress");
    assert_eq!(planning.registry.oids(), [OID]);
    assert!(!planning.backfill.is_reconciled());
}

/// The story: a transaction that had written to a table before `unmirror` with `keep_keys` came after a restart. The table was registered with its row, a
/// cache emptied at once, and all keys removed when the catalog did not know the table.
#[test]
fn rows_of_a_table_that_an_earlier_session_may_have_forgotten_wait_for_the_catalog() {
    for relation in [relation(1, "t:{id}"), cache(1, "t:{id}")] {
        for is_labelled in [false, true] {
            let stored = Stored {
                progress: Some(Progress {
                    lsn: Lsn(10),
                    ..Progress::default()
                }),
                ..Stored::default()
            };
            let mut planning = planning(stored, 1 << 20, 1 << 24);
            planning.backfill.note_reconciled(0);
            Frame::default()
                .relation(relation.clone())
                .begin(99, 10)
                .row(Kind::Insert, "1", Some("a"))
                .row(Kind::Delete, "2", None)
                .record(pb::Truncate { relations: vec![1] })
                .commit(20)
                .feed(&mut planning);
            planning.flush();
            let segment = planning.next_segment().unwrap();
            assert!(segment.purges.is_empty());
            assert!(
                lines(&segment).iter().all(|line| !line.contains("t:")),
                "{:?}",
                lines(&segment)
            );
            assert!(!planning.backfill.is_reconciled());
            let relations = is_labelled.then(|| relation.clone());
            let content = Content::Catalog(Catalog {
                relations: relations.into_iter().collect(),
                wishes: planning.backfill.wishes(),
                ..Catalog::default()
            });
            let window = Arc::new(Window::default());
            planning.chunk(chunk(&planning, 1, content, None, &window));
            let marker = pb::Marker {
                content: b"m:1".to_vec(),
                lsn: 30,
            };
            Frame::default().record(marker).feed(&mut planning);
            planning.piece().unwrap();
            assert_eq!(planning.registry.get(OID).is_some(), is_labelled);
            planning.flush();
            let segment = planning.next_segment().unwrap();
            let is_emptied = is_labelled && relation.mode() == pb::Mode::Cache;
            assert_eq!(segment.purges.len(), usize::from(is_emptied));
        }
    }
}

/// Where the progress begins anew no session has forgotten it, and the row need not wait for the fill, which waits for whoever writes.
#[test]
fn rows_of_an_unknown_table_count_where_the_progress_begins_anew() {
    let mut planning = planning(Stored::default(), 1 << 20, 1 << 24);
    planning.begins_anew = true;
    Frame::default()
        .relation(relation(1, "t:{id}"))
        .begin(99, 10)
        .row(Kind::Insert, "1", Some("a"))
        .commit(20)
        .feed(&mut planning);
    assert!(flushed(&mut planning).contains(&"HSET t:1 id 1 v a".to_owned()));
    assert_eq!(planning.registry.oids(), [OID]);
}
