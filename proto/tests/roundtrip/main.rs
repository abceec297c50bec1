//! What is written is what is read: by this crate's reader, by prost's, and from prost's writer; and no bytes make the
//! reader panic.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs
)]

mod cells;
mod check;
mod items;

use proptest::collection::vec;
use proptest::prelude::*;
use prost::Message;
use walmirror_proto::frame::{CaptureRef, FrameReader, WireError};
use walmirror_proto::pb::{self, Encoding};
use walmirror_proto::row::TupleRef;
use walmirror_proto::writer::TupleBuilder;

use cells::{Cell, build, cell, encoding, tuple_bytes};
use check::{assert_frame, assert_row, read_all};
use items::{Item, item, write};

proptest! {
    #[test]
    fn the_reader_returns_what_was_written(items in vec(item(), 0..20)) {
        assert_frame(write(&items).as_bytes(), &items);
    }

    #[test]
    fn a_reused_writer_starts_anew(first in vec(item(), 0..5), second in vec(item(), 0..5)) {
        let mut frame = write(&first);
        frame.clear();
        prop_assert!(frame.is_empty());
        let fresh = write(&second);
        for item in &second {
            match item {
                Item::Row { kind, relation, cells, old_key } => {
                    frame.row(*kind, *relation, &build(cells), old_key.as_deref().map(build).as_ref());
                }
                Item::Capture { capture, .. } => frame.record(&capture.clone().into()),
                Item::Other(record) => frame.record(record),
            }
        }
        prop_assert_eq!(frame.as_bytes(), fresh.as_bytes());
        prop_assert_eq!(frame.len(), fresh.len());
    }

    #[test]
    fn prost_reads_what_the_writer_wrote_and_writes_the_same_bytes(items in vec(item(), 0..20)) {
        let frame = write(&items);
        let decoded = pb::Frame::decode(frame.as_bytes()).unwrap();
        prop_assert_eq!(decoded.records.len(), items.len());
        for (record, item) in decoded.records.iter().zip(&items) {
            match item {
                Item::Row { kind, relation, cells, old_key } => {
                    prop_assert_eq!(record.kind(), *kind);
                    prop_assert!(record.relation == *relation || record.relation == 0);
                    prop_assert_eq!(record.old_key.is_some(), old_key.is_some());
                    let nulls = cells.iter().filter(|cell| matches!(cell, Cell::Null(_))).count();
                    prop_assert_eq!(record.nulls.iter().map(|byte| byte.count_ones() as usize).sum::<usize>(), nulls);
                }
                // As bytes, because a NaN does not equal itself.
                Item::Capture { capture, .. } => {
                    let read = record.capture.as_ref().map(Message::encode_to_vec);
                    prop_assert_eq!(read, Some(capture.encode_to_vec()));
                }
                Item::Other(wrote) => prop_assert_eq!(record, wrote),
            }
        }
        // Canonical: fields in order, no default spelled out. So prost's writer and this one agree on every byte.
        prop_assert_eq!(decoded.encode_to_vec(), frame.as_bytes().to_vec());
    }

    #[test]
    fn groups_may_be_spread_and_unpacked(cells in vec(cell(), 0..20)) {
        // Another writer may put each number in a field of its own; protobuf says that this means the same.
        let tuple = pb::Tuple::decode(tuple_bytes(&cells).as_slice()).unwrap();
        let mut bytes = vec![15 << 3, 7];
        let mut texts = tuple.texts.into_iter();
        for int in tuple.ints {
            bytes.extend(pb::Tuple { texts: texts.next().into_iter().collect(), ..pb::Tuple::default() }.encode_to_vec());
            bytes.push(3 << 3);
            prost::encoding::encode_varint(((int << 1) ^ (int >> 63)) as u64, &mut bytes);
        }
        bytes.extend(pb::Tuple { texts: texts.collect(), ..pb::Tuple::default() }.encode_to_vec());
        for double in tuple.doubles {
            bytes.push(5 << 3 | 1);
            bytes.extend(double.to_le_bytes());
        }
        for float in tuple.floats {
            bytes.extend(pb::Tuple { floats: vec![float], ..pb::Tuple::default() }.encode_to_vec());
        }
        bytes.extend(pb::Tuple { nulls: tuple.nulls, unchanged: tuple.unchanged, ..pb::Tuple::default() }.encode_to_vec());
        assert_row(TupleRef::parse(&bytes).unwrap(), &cells);
    }

    #[test]
    fn a_row_of_another_width_is_an_error(cells in vec(cell(), 1..12), extra in encoding()) {
        let bytes = tuple_bytes(&cells);
        let tuple = TupleRef::parse(&bytes).unwrap();
        let mut encodings: Vec<_> = cells.iter().map(Cell::encoding).collect();
        encodings.push(extra);
        prop_assert!(matches!(tuple.datums(&encodings).last(), Some(Err(_))));
        encodings.truncate(cells.len() - 1);
        prop_assert!(matches!(tuple.datums(&encodings).last(), Some(Err(WireError::LeftOver))));
    }

    #[test]
    fn no_bytes_panic(bytes in vec(any::<u8>(), 0..300)) {
        let _ = read_all(&bytes);
        let _ = TupleRef::parse(&bytes);
        let _ = CaptureRef::parse(&bytes);
    }

    #[test]
    fn no_mutation_panics(items in vec(item(), 1..10), edits in vec((any::<usize>(), any::<u8>()), 1..5), cut: usize) {
        let mut bytes = write(&items).as_bytes().to_vec();
        let _ = read_all(&bytes[..cut % (bytes.len() + 1)]);
        let len = bytes.len();
        edits.into_iter().for_each(|(at, byte)| bytes[at % len] = byte);
        let _ = read_all(&bytes);
    }

    #[test]
    fn unknown_fields_are_skipped(items in vec(item(), 1..5), unknown in vec(any::<u8>(), 0..9)) {
        // Field 30 of Frame and of Record, as a later minor version might add them.
        let mut bytes = vec![30 << 3 & 0x7F | 2 | 0x80, 1, unknown.len() as u8];
        bytes.extend(&unknown);
        let plain = write(&items);
        let mut with_unknown = bytes.clone();
        for mut record in pb::Frame::decode(plain.as_bytes()).unwrap().records.iter().map(Message::encode_to_vec) {
            record.extend(&bytes);
            with_unknown.push(1 << 3 | 2);
            prost::encoding::encode_varint(record.len() as u64, &mut with_unknown);
            with_unknown.extend(record);
        }
        assert_frame(&with_unknown, &items);
    }
}

#[test]
fn broken_frames_end_in_the_error_that_names_the_fault() {
    let record = |record: &[u8]| [&[1 << 3 | 2, record.len() as u8], record].concat();
    let error = |frame: &[u8]| read_all(frame).unwrap_err();
    assert_eq!(error(&record(&[1 << 3, 14])), WireError::UnknownKind(14));
    assert_eq!(error(&record(&[3 << 3 | 2, 1, 0])), WireError::MissingRelation);
    assert_eq!(error(&record(&[1 << 3, 3])), WireError::MissingContent("BEGIN"));
    assert_eq!(
        error(&record(&[2 << 3, 1, 4 << 3, 0])),
        WireError::WireType { field: 4 }
    );
    assert!(matches!(
        error(&record(&[1 << 3, 5, 12 << 3 | 2, 2, 3 << 3 | 2, 9])),
        WireError::BrokenContent { .. }
    ));
    assert_eq!(error(&[1 << 3 | 2, 5, 0]), WireError::Malformed);
    assert_eq!(error(&[0xFF; 20]), WireError::Malformed);
}

#[test]
fn after_an_error_the_reader_ends() {
    let frame = [1 << 3 | 2, 2, 1 << 3, 99, 1 << 3 | 2, 2, 2 << 3, 1];
    assert_eq!(FrameReader::new(&frame).count(), 1);
}

#[test]
fn values_out_of_range_are_errors() {
    let range = |append: &dyn Fn(&mut TupleBuilder), encoding| {
        let (mut tuple, mut bytes) = (TupleBuilder::new(), Vec::new());
        append(&mut tuple);
        tuple.write_tuple(&mut bytes);
        let first = TupleRef::parse(&bytes)
            .unwrap()
            .datums(&[encoding])
            .next()
            .unwrap();
        assert_eq!(first, Err(WireError::ValueRange { column: 0 }), "{encoding:?}");
    };
    range(&|tuple| tuple.int(2), Encoding::Bool);
    range(&|tuple| tuple.int(-1), Encoding::Oid);
    range(&|tuple| tuple.int(1 << 31), Encoding::Date);
    range(&|tuple| tuple.int(-2), Encoding::Numeric);
    range(&|tuple| tuple.numeric(16_384, 1), Encoding::Numeric);
    range(&|tuple| tuple.text(b"fifteen bytes.."), Encoding::Uuid);
}
