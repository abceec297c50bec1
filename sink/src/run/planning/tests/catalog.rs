//! The comparison with the catalog: when it is wanted, and what counts more, the stream or the catalog.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use super::*;
use crate::backfill::Catalog;

/// The story: DDL was not announced, as event triggers were off, and what SQL read of the table was left out again and again, until a row
/// in the stream told of the change.
#[test]
fn what_is_read_of_another_version_has_the_catalog_compared() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    let plan = |planning: &mut Planning, id: u64, content: Content| {
        let window = Arc::new(Window::default());
        planning.chunk(chunk(planning, id, content, None, &window));
        let marker = pb::Marker {
            content: format!("m:{id}").into_bytes(),
            lsn: 100 + id,
        };
        Frame::default().record(marker).feed(planning);
        planning.piece().unwrap();
        flushed(planning)
    };
    let catalog = |planning: &Planning, fingerprint| {
        Content::Catalog(Catalog {
            relations: vec![relation(fingerprint, "t:{id}")],
            wishes: planning.backfill.wishes(),
            ..Catalog::default()
        })
    };
    let first = catalog(&planning, 1);
    plan(&mut planning, 1, first);
    // The stream knows better than the catalog, as long as it is right.
    let announced = pb::Relation {
        announced: true,
        ..relation(1, "t:{id}")
    };
    Frame::default()
        .begin(110, 110)
        .relation(announced)
        .commit(120)
        .feed(&mut planning);
    let readings = [
        Content::Keys(vec![(b"t:1".to_vec(), Some(packed(2, "1", "read")))]),
        Content::Changed,
    ];
    for (id, content) in (30..).zip(readings) {
        assert!(planning.backfill.is_reconciled());
        let wishes = planning.backfill.wishes();
        let written = plan(&mut planning, id, content);
        assert!(written.iter().all(|line| !line.contains("t:1")), "{written:?}");
        assert!(!planning.backfill.is_reconciled());
        // Once, until it is done.
        plan(&mut planning, id + 10, Content::Changed);
        assert_eq!(planning.backfill.wishes(), wishes + 1);
        let same = catalog(&planning, 1);
        plan(&mut planning, id + 20, same);
        assert_eq!(planning.registry.get(OID).unwrap().relation.fingerprint, 1);
    }
    plan(&mut planning, 60, Content::Changed);
    let other = catalog(&planning, 2);
    plan(&mut planning, 61, other);
    assert_eq!(planning.registry.get(OID).unwrap().relation.fingerprint, 2);
}

/// The story: a table had another version for a moment, and that was in the catalog which was on its way when a row told of the next one. No
/// other row came, and nobody looked again.
#[test]
fn a_row_of_a_version_that_counts_again_has_the_catalog_looked_at_behind_the_one_on_its_way() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    planning.backfill.note_reconciled(0);
    let row = |planning: &mut Planning, fingerprint, xid, lsn| {
        Frame::default()
            .relation(relation(fingerprint, "t:{id}"))
            .begin(xid, lsn)
            .row(Kind::Insert, "1", Some("a"))
            .commit(lsn + 1)
            .feed(planning);
        flushed(planning);
    };
    row(&mut planning, 2, 110, 20);
    assert!(!planning.backfill.is_reconciled());
    let catalog = |planning: &mut Planning, id: u64, fingerprint, lsn| {
        let window = Arc::new(Window::default());
        let content = Content::Catalog(Catalog {
            relations: vec![relation(fingerprint, "t:{id}")],
            wishes: planning.backfill.wishes(),
            ..Catalog::default()
        });
        planning.chunk(chunk(planning, id, content, None, &window));
        pb::Marker {
            content: format!("m:{id}").into_bytes(),
            lsn,
        }
    };
    let marker = catalog(&mut planning, 1, 2, 40);
    row(&mut planning, 1, 111, 30);
    Frame::default().record(marker).feed(&mut planning);
    planning.piece().unwrap();
    assert!(!planning.backfill.is_reconciled());
    let marker = catalog(&mut planning, 2, 1, 50);
    Frame::default().record(marker).feed(&mut planning);
    planning.piece().unwrap();
    assert!(planning.backfill.is_reconciled());
    assert_eq!(planning.registry.get(OID).unwrap().relation.fingerprint, 1);
}

/// The story: ALTER TYPE locks no table, and tells of it as it was, behind a label that was set meanwhile. No row of the cache came that would
/// have told better.
#[test]
fn what_was_announced_last_is_compared_with_the_catalog() {
    let tell = |planning: &mut Planning, record: pb::Record, lsn| {
        Frame::default()
            .begin(lsn, lsn)
            .record(record)
            .commit(lsn + 1)
            .feed(planning);
        flushed(planning);
    };
    let announced = |relation: pb::Relation| {
        pb::Record::from(pb::Relation {
            announced: true,
            ..relation
        })
    };
    let compare = |planning: &mut Planning, lsn| {
        let content = Content::Catalog(Catalog {
            relations: vec![relation(2, "u:{id}")],
            wishes: planning.backfill.wishes(),
            ..Catalog::default()
        });
        let window = Arc::new(Window::default());
        planning.chunk(chunk(planning, lsn, content, None, &window));
        let marker = pb::Marker {
            content: format!("m:{lsn}").into_bytes(),
            lsn,
        };
        Frame::default().record(marker).feed(planning);
        planning.piece().unwrap();
    };
    let forget = pb::Forget {
        oid: OID,
        keep_keys: false,
    };
    for last in [announced(cache(1, "t:{id}")), forget.into()] {
        for is_on_its_way in [false, true] {
            let mut planning = planning(settled(), 1 << 20, 1 << 24);
            planning.backfill.note_reconciled(0);
            tell(&mut planning, announced(relation(2, "u:{id}")), 20);
            if !is_on_its_way {
                compare(&mut planning, 30);
                assert!(planning.backfill.is_reconciled());
            }
            tell(&mut planning, last.clone(), 40);
            // What a catalog says that was read before counts less.
            for lsn in [50, 60].into_iter().take(1 + usize::from(is_on_its_way)) {
                assert!(!planning.backfill.is_reconciled());
                compare(&mut planning, lsn);
            }
            assert!(planning.backfill.is_reconciled());
            let counts = planning.registry.get(OID).unwrap();
            assert_eq!(counts.relation.fingerprint, 2);
            // What is as it was known is nothing to doubt.
            tell(&mut planning, announced(relation(2, "u:{id}")), 70);
            assert!(planning.backfill.is_reconciled());
        }
    }
    // But the catalog that is on its way may say so.
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    tell(&mut planning, announced(relation(1, "t:{id}")), 20);
    for (lsn, fingerprint) in [(30, 1), (40, 2)] {
        assert!(!planning.backfill.is_reconciled());
        compare(&mut planning, lsn);
        let counts = planning.registry.get(OID).unwrap();
        assert_eq!(counts.relation.fingerprint, fingerprint);
    }
    assert!(planning.backfill.is_reconciled());
}

#[test]
fn a_table_that_could_not_be_looked_at_stays_as_it_is() {
    let mut planning = planning(settled(), 1 << 20, 1 << 24);
    let window = Arc::new(Window::default());
    for (id, locked) in [(1, vec![(OID, "public.t".to_owned())]), (2, Vec::new())] {
        let is_locked = !locked.is_empty();
        let catalog = Content::Catalog(Catalog {
            locked,
            ..Catalog::default()
        });
        planning.chunk(chunk(&planning, id, catalog, None, &window));
        let marker = pb::Marker {
            content: format!("m:{id}").into_bytes(),
            lsn: 20 + id,
        };
        Frame::default().record(marker).feed(&mut planning);
        planning.piece().unwrap();
        assert_eq!(planning.registry.get(OID).is_some(), is_locked);
        assert_eq!(planning.backfill.is_reconciled(), !is_locked);
    }
}
