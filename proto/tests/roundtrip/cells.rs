//! Values as a row has them, made by chance, and the tuples that hold them.

use proptest::collection::vec;
use proptest::prelude::*;
use walmirror_proto::pb::Encoding;
use walmirror_proto::row::Datum;
use walmirror_proto::writer::TupleBuilder;

/// A value that owns its bytes, and the column it stands in.
#[derive(Clone, Debug)]
pub(super) enum Cell {
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
    pub(super) fn encoding(&self) -> Encoding {
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

    pub(super) fn append(&self, tuple: &mut TupleBuilder) {
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

    pub(super) fn equals(&self, datum: Datum<'_>) -> bool {
        match (self, datum) {
            // NaN does not equal itself; its bits do.
            (Self::Float4(bits), Datum::Float4(value)) => value.to_bits() == *bits,
            (Self::Float8(bits), Datum::Float8(value)) => value.to_bits() == *bits,
            _ => datum == self.datum(),
        }
    }

    pub(super) fn datum(&self) -> Datum<'_> {
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

pub(super) fn encoding() -> impl Strategy<Value = Encoding> {
    (0..=12).prop_map(|number| Encoding::try_from(number).unwrap())
}

pub(super) fn cell() -> impl Strategy<Value = Cell> {
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

pub(super) fn build(cells: &[Cell]) -> TupleBuilder {
    let mut tuple = TupleBuilder::new();
    cells.iter().for_each(|cell| cell.append(&mut tuple));
    assert_eq!(tuple.columns(), cells.len());
    tuple
}

pub(super) fn tuple_bytes(cells: &[Cell]) -> Vec<u8> {
    let (tuple, mut bytes) = (build(cells), Vec::new());
    tuple.write_tuple(&mut bytes);
    assert_eq!(bytes.len(), tuple.encoded_len());
    bytes
}
