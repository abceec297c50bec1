//! Records as a frame has them, made by chance.

use proptest::collection::vec;
use proptest::prelude::*;
use prost::Message;
use walmirror_proto::pb::{self, Kind};
use walmirror_proto::writer::FrameWriter;

use super::cells::{Cell, build, cell, tuple_bytes};

#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)]
pub(super) enum Item {
    Row {
        kind: Kind,
        relation: u32,
        cells: Vec<Cell>,
        old_key: Option<Vec<Cell>>,
    },
    Capture {
        capture: pb::Capture,
        rows: Vec<Vec<Cell>>,
    },
    Other(pb::Record),
}

pub(super) fn other() -> impl Strategy<Value = pb::Record> {
    let column =
        ("\\PC{1,9}", any::<u32>(), 0..13, any::<bool>()).prop_map(|(name, type_oid, encoding, in_value)| {
            pb::Column {
                name,
                type_oid,
                encoding,
                in_value,
            }
        });
    let relation = (any::<u32>(), any::<u64>(), "\\PC{0,9}", vec(column, 0..20)).prop_map(
        |(index, fingerprint, name, columns)| pb::Relation {
            index,
            fingerprint,
            name,
            columns,
            announced: true,
            ..pb::Relation::default()
        },
    );
    prop_oneof![
        (any::<u64>(), any::<u64>(), any::<i64>()).prop_map(|(xid, commit_lsn, commit_time)| pb::Begin {
            xid,
            commit_lsn,
            commit_time
        }
        .into()),
        any::<u64>().prop_map(|end_lsn| pb::Commit { end_lsn }.into()),
        relation.prop_map(pb::Record::from),
        vec(any::<u32>(), 0..5).prop_map(|relations| pb::Truncate { relations }.into()),
        (any::<u32>(), any::<bool>()).prop_map(|(oid, keep_keys)| pb::Forget { oid, keep_keys }.into()),
        (vec(any::<u8>(), 0..40), any::<u64>()).prop_map(|(content, lsn)| pb::Marker { content, lsn }.into()),
        (any::<u64>(), any::<u64>()).prop_map(|(xid, sub_xid)| pb::InProgress { xid, sub_xid }.into()),
        (any::<u64>(), any::<u64>()).prop_map(|(xid, sub_xid)| pb::Rollback { xid, sub_xid }.into()),
        (any::<u64>(), any::<u64>()).prop_map(|(xid, end_lsn)| pb::LateCommit {
            begin: Some(pb::Begin {
                xid,
                ..pb::Begin::default()
            }),
            commit: Some(pb::Commit { end_lsn }),
        }
        .into()),
        ("\\PC{0,9}", any::<u64>(), 0u32..9).prop_map(|(reason, lsn, relation)| pb::Record {
            relation,
            ..pb::Error {
                reason,
                lsn,
                ..pb::Error::default()
            }
            .into()
        }),
    ]
}

pub(super) fn item() -> impl Strategy<Value = Item> {
    let kind = prop_oneof![Just(Kind::Insert), Just(Kind::Update), Just(Kind::Delete)];
    let row = (
        kind,
        1u32..4,
        vec(cell(), 0..30),
        proptest::option::of(vec(cell(), 0..5)),
    )
        .prop_map(|(kind, relation, cells, old_key)| Item::Row {
            kind,
            relation,
            cells,
            old_key,
        });
    let capture = (
        any::<u32>(),
        any::<u64>(),
        vec(any::<u64>(), 0..5),
        vec(vec(cell(), 0..5), 0..4),
    )
        .prop_map(|(oid, fingerprint, xip, rows)| {
            let snapshot = Some(pb::Snapshot {
                xmin: 3,
                xmax: 9,
                xip,
            });
            let tuples = rows
                .iter()
                .map(|cells| pb::Tuple::decode(tuple_bytes(cells).as_slice()).unwrap())
                .collect();
            Item::Capture {
                capture: pb::Capture {
                    oid,
                    fingerprint,
                    snapshot,
                    rows: tuples,
                },
                rows,
            }
        });
    prop_oneof![8 => row, 1 => capture, 2 => other().prop_map(Item::Other)]
}

pub(super) fn write(items: &[Item]) -> FrameWriter {
    let mut frame = FrameWriter::new();
    for item in items {
        match item {
            Item::Row {
                kind,
                relation,
                cells,
                old_key,
            } => {
                frame.row(
                    *kind,
                    *relation,
                    &build(cells),
                    old_key.as_deref().map(build).as_ref(),
                );
            }
            Item::Capture { capture, .. } => frame.record(&capture.clone().into()),
            Item::Other(record) => frame.record(record),
        }
    }
    frame
}
