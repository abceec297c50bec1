//! What the reader makes of a frame, compared with what was written.

use walmirror_proto::frame::{FrameReader, RecordRef, WireError};
use walmirror_proto::pb::{self, Encoding};
use walmirror_proto::row::TupleRef;

use super::cells::Cell;
use super::items::Item;

pub(super) fn assert_row(tuple: TupleRef<'_>, cells: &[Cell]) {
    let encodings: Vec<_> = cells.iter().map(Cell::encoding).collect();
    let datums: Vec<_> = tuple.datums(&encodings).collect::<Result<_, _>>().unwrap();
    assert_eq!(datums.len(), cells.len());
    for (datum, cell) in datums.into_iter().zip(cells) {
        assert!(cell.equals(datum), "{cell:?} was read as {datum:?}");
    }
    assert_eq!(
        tuple.has_unchanged(),
        cells.iter().any(|cell| matches!(cell, Cell::Unchanged(_)))
    );
}

pub(super) fn assert_frame(frame: &[u8], items: &[Item]) {
    let records: Vec<_> = FrameReader::new(frame).collect::<Result<_, _>>().unwrap();
    assert_eq!(records.len(), items.len());
    for (record, item) in records.into_iter().zip(items) {
        match (record, item) {
            (
                RecordRef::Row {
                    kind,
                    relation,
                    tuple,
                    old_key,
                },
                Item::Row {
                    kind: wrote,
                    relation: of,
                    cells,
                    old_key: old_cells,
                },
            ) => {
                assert_eq!((kind, relation), (*wrote, *of));
                assert_row(tuple, cells);
                assert_eq!(old_key.is_some(), old_cells.is_some());
                old_key
                    .into_iter()
                    .zip(old_cells)
                    .for_each(|(tuple, cells)| assert_row(tuple, cells));
            }
            (RecordRef::Capture(read), Item::Capture { capture, rows }) => {
                assert_eq!((read.oid, read.fingerprint), (capture.oid, capture.fingerprint));
                assert_eq!(Some(&read.snapshot), capture.snapshot.as_ref());
                assert_eq!(read.rows().count(), rows.len());
                read.rows()
                    .zip(rows)
                    .for_each(|(tuple, cells)| assert_row(tuple, cells));
            }
            (record, Item::Other(wrote)) => assert_eq!(owned(record), *wrote),
            (record, item) => panic!("{item:?} was read as {record:?}"),
        }
    }
}

/// The record that prost would have read.
pub(super) fn owned(record: RecordRef<'_>) -> pb::Record {
    match record {
        RecordRef::Begin(begin) => begin.into(),
        RecordRef::Commit(commit) => commit.into(),
        RecordRef::Relation(relation) => relation.into(),
        RecordRef::Truncate(truncate) => truncate.into(),
        RecordRef::Forget(forget) => forget.into(),
        RecordRef::Marker(marker) => marker.into(),
        RecordRef::InProgress(in_progress) => in_progress.into(),
        RecordRef::Rollback(rollback) => rollback.into(),
        RecordRef::LateCommit(late) => late.into(),
        RecordRef::Error { relation, error } => pb::Record {
            relation,
            ..error.into()
        },
        record => panic!("{record:?}"),
    }
}

/// Reads everything there is in a frame, and says only whether it could.
pub(super) fn read_all(frame: &[u8]) -> Result<usize, WireError> {
    let all: Vec<_> = (0..=12)
        .map(|number| Encoding::try_from(number).unwrap())
        .collect();
    let mut out = Vec::new();
    let mut print = |tuple: TupleRef<'_>| {
        for datum in tuple.datums(&all).map_while(Result::ok) {
            datum.write_text(&mut out);
            datum.write_json(&mut out);
        }
    };
    let mut count = 0;
    for record in FrameReader::new(frame) {
        match record? {
            RecordRef::Row { tuple, old_key, .. } => {
                print(tuple);
                old_key.into_iter().for_each(&mut print);
            }
            RecordRef::Capture(capture) => capture.rows().for_each(&mut print),
            _ => {}
        }
        count += 1;
    }
    Ok(count)
}
