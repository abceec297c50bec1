//! What is written is what is read: by this crate's reader, by prost's, and from prost's writer; and no bytes make the
//! reader panic.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs
)]

use proptest::collection::vec;
use proptest::prelude::*;
use prost::Message;
use walmirror_proto::frame::{CaptureRef, FrameReader, RecordRef, WireError};
use walmirror_proto::pb::{self, Encoding, Kind};
use walmirror_proto::row::{Datum, TupleRef};
use walmirror_proto::writer::{FrameWriter, TupleBuilder};

/// A value that owns its bytes, and the column it stands in.
#[derive(Clone, Debug)]
enum Cell {
    Null(Encoding),
    Unchanged(Encoding),
    Bool(bool),
    Int(i64),
    Oid(u32),
    Float4(u32),
    Float8(u64),
    Numeric(u32, i64),
    NumericText(String),
    Date(i32),
    Timestamp(i64),
    Timestamptz(i64),
    Uuid([u8; 16]),
    Bytea(Vec<u8>),
    Text(Vec<u8>),
    Json(Vec<u8>),
}

impl Cell {
    fn encoding(&self) -> Encoding {
        match self {
            Self::Null(encoding) | Self::Unchanged(encoding) => *encoding,
            Self::Bool(_) => Encoding::Bool,
            Self::Int(_) => Encoding::Int,
            Self::Oid(_) => Encoding::Oid,
            Self::Float4(_) => Encoding::Float4,
            Self::Float8(_) => Encoding::Float8,
            Self::Numeric(..) | Self::NumericText(_) => Encoding::Numeric,
            Self::Date(_) => Encoding::Date,
            Self::Timestamp(_) => Encoding::Timestamp,
            Self::Timestamptz(_) => Encoding::Timestamptz,
            Self::Uuid(_) => Encoding::Uuid,
            Self::Bytea(_) => Encoding::Bytea,
            Self::Text(_) => Encoding::Text,
            Self::Json(_) => Encoding::Jsonb,
        }
    }

    fn append(&self, tuple: &mut TupleBuilder) {
        match self {
            Self::Null(_) => tuple.null(),
            Self::Unchanged(_) => tuple.unchanged(),
            Self::Bool(value) => tuple.bool(*value),
            Self::Int(value) | Self::Timestamp(value) | Self::Timestamptz(value) => tuple.int(*value),
            Self::Oid(value) => tuple.oid(*value),
            Self::Float4(bits) => tuple.float4(f32::from_bits(*bits)),
            Self::Float8(bits) => tuple.float8(f64::from_bits(*bits)),
            Self::Numeric(scale, mantissa) => tuple.numeric(*scale, *mantissa),
            Self::NumericText(text) => tuple.numeric_text(text.as_bytes()),
            Self::Date(days) => tuple.int((*days).into()),
            Self::Uuid(bytes) => tuple.text(bytes),
            Self::Bytea(bytes) | Self::Text(bytes) | Self::Json(bytes) => tuple.text(bytes),
        }
    }

    fn equals(&self, datum: Datum<'_>) -> bool {
        match (self, datum) {
            // NaN does not equal itself; its bits do.
            (Self::Float4(bits), Datum::Float4(value)) => value.to_bits() == *bits,
            (Self::Float8(bits), Datum::Float8(value)) => value.to_bits() == *bits,
            _ => datum == self.datum(),
        }
    }

    fn datum(&self) -> Datum<'_> {
        match self {
            Self::Null(_) => Datum::Null,
            Self::Unchanged(_) => Datum::Unchanged,
            Self::Bool(value) => Datum::Bool(*value),
            Self::Int(value) => Datum::Int(*value),
            Self::Oid(value) => Datum::Oid(*value),
            Self::Float4(bits) => Datum::Float4(f32::from_bits(*bits)),
            Self::Float8(bits) => Datum::Float8(f64::from_bits(*bits)),
            Self::Numeric(scale, mantissa) => Datum::Numeric {
                scale: *scale,
                mantissa: *mantissa,
            },
            Self::NumericText(text) => Datum::NumericText(text.as_bytes()),
            Self::Date(days) => Datum::Date(*days),
            Self::Timestamp(micros) => Datum::Timestamp(*micros),
            Self::Timestamptz(micros) => Datum::Timestamptz(*micros),
            Self::Uuid(bytes) => Datum::Uuid(bytes),
            Self::Bytea(bytes) => Datum::Bytea(bytes),
            Self::Text(bytes) => Datum::Text(bytes),
            Self::Json(bytes) => Datum::Json(bytes),
        }
    }
}

fn encoding() -> impl Strategy<Value = Encoding> {
    (0..=12).prop_map(|number| Encoding::try_from(number).unwrap())
}

fn cell() -> impl Strategy<Value = Cell> {
    let text = || vec(any::<u8>(), 0..200);
    prop_oneof![
        encoding().prop_map(Cell::Null),
        encoding().prop_map(Cell::Unchanged),
        any::<bool>().prop_map(Cell::Bool),
        any::<i64>().prop_map(Cell::Int),
        any::<u32>().prop_map(Cell::Oid),
        any::<u32>().prop_map(Cell::Float4),
        any::<u64>().prop_map(Cell::Float8),
        (0u32..=16_383, any::<i64>()).prop_map(|(scale, mantissa)| Cell::Numeric(scale, mantissa)),
        "-?[0-9]{1,40}".prop_map(Cell::NumericText),
        any::<i32>().prop_map(Cell::Date),
        any::<i64>().prop_map(Cell::Timestamp),
        any::<i64>().prop_map(Cell::Timestamptz),
        any::<[u8; 16]>().prop_map(Cell::Uuid),
        text().prop_map(Cell::Bytea),
        text().prop_map(Cell::Text),
        text().prop_map(Cell::Json),
    ]
}

#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)]
enum Item {
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

fn other() -> impl Strategy<Value = pb::Record> {
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

fn item() -> impl Strategy<Value = Item> {
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

fn build(cells: &[Cell]) -> TupleBuilder {
    let mut tuple = TupleBuilder::new();
    cells.iter().for_each(|cell| cell.append(&mut tuple));
    assert_eq!(tuple.columns(), cells.len());
    tuple
}

fn tuple_bytes(cells: &[Cell]) -> Vec<u8> {
    let (tuple, mut bytes) = (build(cells), Vec::new());
    tuple.write_tuple(&mut bytes);
    assert_eq!(bytes.len(), tuple.encoded_len());
    bytes
}

fn write(items: &[Item]) -> FrameWriter {
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

fn assert_row(tuple: TupleRef<'_>, cells: &[Cell]) {
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

fn assert_frame(frame: &[u8], items: &[Item]) {
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
fn owned(record: RecordRef<'_>) -> pb::Record {
    match record {
        RecordRef::Begin(begin) => begin.into(),
        RecordRef::Commit(commit) => commit.into(),
        RecordRef::Relation(relation) => relation.into(),
        RecordRef::Truncate(truncate) => truncate.into(),
        RecordRef::Forget(forget) => forget.into(),
        RecordRef::Marker(marker) => marker.into(),
        RecordRef::Error { relation, error } => pb::Record {
            relation,
            ..error.into()
        },
        record => panic!("{record:?}"),
    }
}

/// Reads everything there is in a frame, and says only whether it could.
fn read_all(frame: &[u8]) -> Result<usize, WireError> {
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
        // Field 18 of Frame and of Record, as a later minor version might add them.
        let mut bytes = vec![18 << 3 & 0x7F | 2 | 0x80, 1, unknown.len() as u8];
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
    assert_eq!(error(&record(&[1 << 3, 11])), WireError::UnknownKind(11));
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
