//! Writes rows and frames. The output plugin, `walmirror.pack` and the SELECT capture build tuples here; only the output
//! plugin builds frames. Buffers are reused, so that a row costs no allocation, and lengths are summed before anything
//! is written, so that no byte is moved twice.

use std::collections::TryReserveError;

use prost::Message;

use crate::pb::{self, Kind};
use crate::varint;

/// Protobuf tags (field number << 3 | wire type) of the fields that rows consist of.
mod tag {
    pub const FRAME_RECORDS: u8 = 1 << 3 | 2;
    pub const KIND: u8 = 1 << 3;
    pub const RELATION: u8 = 2 << 3;
    pub const INTS: u8 = 3 << 3 | 2;
    pub const TEXTS: u8 = 4 << 3 | 2;
    pub const DOUBLES: u8 = 5 << 3 | 2;
    pub const FLOATS: u8 = 6 << 3 | 2;
    pub const NULLS: u8 = 7 << 3 | 2;
    pub const UNCHANGED: u8 = 8 << 3 | 2;
    pub const OLD_KEY: u8 = 9 << 3 | 2;
    pub const MARKER: u32 = 15 << 3 | 2;
    pub const CAPTURE: u32 = 16 << 3 | 2;
    pub const MARKER_CONTENT: u8 = 1 << 3 | 2;
    pub const MARKER_LSN: u8 = 2 << 3;
}

/// What a buffer keeps of its memory from one row or frame to the next, in bytes; the next large one asks again.
const KEPT_BYTES: usize = 32 << 20;

/// One row under construction. Each call appends the next column; the calls must follow the encodings of the
/// Relation's columns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TupleBuilder {
    /// The groups as they will stand in the message, without their tag and length.
    ints: Vec<u8>,
    doubles: Vec<u8>,
    floats: Vec<u8>,
    nulls: Vec<u8>,
    unchanged: Vec<u8>,
    /// The texts with tags and lengths: each item is a field of its own.
    texts: Vec<u8>,
    columns: usize,
}

impl TupleBuilder {
    /// An empty row.
    pub fn new() -> Self {
        Self::default()
    }

    /// Empties the row and keeps its memory, within limits.
    pub fn clear(&mut self) {
        self.ints.clear();
        self.doubles.clear();
        self.floats.clear();
        self.nulls.clear();
        self.unchanged.clear();
        empty(&mut self.texts);
        self.columns = 0;
    }

    /// Empties the row and gives back what is more than so many bytes.
    pub fn give_back(&mut self, keep: usize) {
        self.clear();
        self.texts.shrink_to(keep);
    }

    /// Bytes of texts so far, with their tags and lengths: what makes a row large.
    #[inline]
    pub fn text_bytes(&self) -> usize {
        self.texts.len()
    }

    /// Makes room for a text, to be told if there is no memory.
    pub fn try_reserve_text(&mut self, bytes: usize) -> Result<(), TryReserveError> {
        reserve(&mut self.texts, bytes)
    }

    /// Number of columns appended so far.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// SQL NULL.
    pub fn null(&mut self) {
        set_bit(&mut self.nulls, self.columns);
        self.columns += 1;
    }

    /// An unchanged TOASTed value, which the WAL does not hold.
    pub fn unchanged(&mut self) {
        set_bit(&mut self.unchanged, self.columns);
        self.columns += 1;
    }

    /// BOOL.
    pub fn bool(&mut self, value: bool) {
        self.int(i64::from(value));
    }

    /// INT; also DATE (days), TIMESTAMP and TIMESTAMPTZ (microseconds), both since 2000-01-01.
    #[inline]
    pub fn int(&mut self, value: i64) {
        varint::put(&mut self.ints, varint::zigzag(value));
        self.columns += 1;
    }

    /// OID.
    pub fn oid(&mut self, value: u32) {
        self.int(i64::from(value));
    }

    /// FLOAT4.
    pub fn float4(&mut self, value: f32) {
        self.floats.extend_from_slice(&value.to_le_bytes());
        self.columns += 1;
    }

    /// FLOAT8.
    pub fn float8(&mut self, value: f64) {
        self.doubles.extend_from_slice(&value.to_le_bytes());
        self.columns += 1;
    }

    /// NUMERIC that fits: mantissa / 10^scale, printed with `scale` fraction digits.
    pub fn numeric(&mut self, scale: u32, mantissa: i64) {
        varint::put(&mut self.ints, varint::zigzag(i64::from(scale)));
        self.int(mantissa);
    }

    /// NUMERIC that does not fit: its text.
    pub fn numeric_text(&mut self, text: &[u8]) {
        varint::put(&mut self.ints, varint::zigzag(-1));
        self.text(text);
    }

    /// TEXT, UUID (16 bytes), BYTEA (raw) and JSON.
    #[inline]
    pub fn text(&mut self, bytes: &[u8]) {
        self.texts.push(tag::TEXTS);
        varint::put(&mut self.texts, bytes.len() as u64);
        self.texts.extend_from_slice(bytes);
        self.columns += 1;
    }

    /// Bytes that the row takes as a Tuple message, and as the fields of a Record.
    pub fn encoded_len(&self) -> usize {
        group_len(&self.ints)
            + self.texts.len()
            + group_len(&self.doubles)
            + group_len(&self.floats)
            + group_len(&self.nulls)
            + group_len(&self.unchanged)
    }

    /// Appends the row as a Tuple message without a length: what `walmirror.pack` returns.
    pub fn write_tuple(&self, out: &mut Vec<u8>) {
        put_group(out, tag::INTS, &self.ints);
        out.extend_from_slice(&self.texts);
        put_group(out, tag::DOUBLES, &self.doubles);
        put_group(out, tag::FLOATS, &self.floats);
        put_group(out, tag::NULLS, &self.nulls);
        put_group(out, tag::UNCHANGED, &self.unchanged);
    }
}

/// One Frame under construction.
#[derive(Clone, Debug, Default)]
pub struct FrameWriter {
    bytes: Vec<u8>,
    /// The relation of the last row in this frame; 0 before the first. The next row of the same relation leaves it out.
    relation: u32,
}

impl FrameWriter {
    /// An empty frame.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes written so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing was written yet.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The frame: complete after every call, since a Frame is the concatenation of its records.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Begins a new frame and keeps the memory, within limits.
    pub fn clear(&mut self) {
        empty(&mut self.bytes);
        self.relation = 0;
    }

    /// Makes room for a row, to be told if there is no memory.
    pub fn try_reserve(
        &mut self,
        new: &TupleBuilder,
        old_key: Option<&TupleBuilder>,
    ) -> Result<(), TryReserveError> {
        let keys = old_key.map_or(0, TupleBuilder::encoded_len);
        reserve(&mut self.bytes, new.encoded_len() + keys)
    }

    /// Appends a Marker, to be told if there is no memory: anybody may write one, of any size.
    pub fn marker(&mut self, content: &[u8], lsn: u64) -> Result<(), TryReserveError> {
        let len = 1 + varint::len(content.len() as u64) + content.len() + 1 + varint::len(lsn);
        self.begin_record(Kind::Marker, tag::MARKER, len)?;
        let out = &mut self.bytes;
        out.push(tag::MARKER_CONTENT);
        varint::put(out, content.len() as u64);
        out.extend_from_slice(content);
        out.push(tag::MARKER_LSN);
        varint::put(out, lsn);
        Ok(())
    }

    /// Appends a Capture, given as the message that it is, in the same way.
    pub fn capture(&mut self, message: &[u8]) -> Result<(), TryReserveError> {
        self.begin_record(Kind::Capture, tag::CAPTURE, message.len())?;
        self.bytes.extend_from_slice(message);
        Ok(())
    }

    /// Appends a record of one field up to that field's content, of `len` bytes, and makes room for that.
    fn begin_record(&mut self, kind: Kind, tag: u32, len: usize) -> Result<(), TryReserveError> {
        reserve(&mut self.bytes, len)?;
        let record = 2 + varint::len(tag.into()) + varint::len(len as u64) + len;
        let out = &mut self.bytes;
        out.push(tag::FRAME_RECORDS);
        varint::put(out, record as u64);
        out.push(tag::KIND);
        out.push(kind as u8);
        varint::put(out, tag.into());
        varint::put(out, len as u64);
        Ok(())
    }

    /// Appends a record that is not a row. Rows that come this way all the same are written as they are.
    pub fn record(&mut self, record: &pb::Record) {
        self.bytes.push(tag::FRAME_RECORDS);
        let written = record.encode_length_delimited(&mut self.bytes);
        debug_assert!(written.is_ok(), "a Vec takes any message");
        if record.relation != 0 && is_row(record.kind()) {
            self.relation = record.relation;
        }
    }

    /// Appends an INSERT, UPDATE or DELETE. `relation` is the index of a Relation that the stream already holds
    /// (INVARIANT I5: the caller has written it before), never 0.
    pub fn row(&mut self, kind: Kind, relation: u32, new: &TupleBuilder, old_key: Option<&TupleBuilder>) {
        debug_assert!(relation != 0 && is_row(kind));
        let says_kind = kind != Kind::Insert;
        let says_relation = relation != self.relation;
        self.relation = relation;

        let old_key_len = old_key.map(TupleBuilder::encoded_len);
        let len = if says_kind { 2 } else { 0 }
            + if says_relation {
                1 + varint::len(relation.into())
            } else {
                0
            }
            + new.encoded_len()
            + old_key_len.map_or(0, |len| 1 + varint::len(len as u64) + len);

        let out = &mut self.bytes;
        out.reserve(len + ROW_HEADER_BYTES);
        out.push(tag::FRAME_RECORDS);
        varint::put(out, len as u64);
        if says_kind {
            out.push(tag::KIND);
            out.push(kind as u8);
        }
        if says_relation {
            out.push(tag::RELATION);
            varint::put(out, relation.into());
        }
        new.write_tuple(out);
        if let (Some(old_key), Some(len)) = (old_key, old_key_len) {
            out.push(tag::OLD_KEY);
            varint::put(out, len as u64);
            old_key.write_tuple(out);
        }
    }
}

/// More than the tags and lengths around a row and its old key take.
const ROW_HEADER_BYTES: usize = 6 * (1 + varint::MAX_LEN);

/// Room for so many bytes, and for small things behind them that do not ask: tags and lengths, numbers, names.
fn reserve(buffer: &mut Vec<u8>, bytes: usize) -> Result<(), TryReserveError> {
    const SLACK: usize = 128 << 10;
    let bytes = bytes.saturating_add(SLACK);
    buffer
        .try_reserve(bytes)
        .or_else(|_| buffer.try_reserve_exact(bytes))
}

/// Empties a buffer that is used again, and gives back what a large row took.
pub fn empty(bytes: &mut Vec<u8>) {
    if bytes.capacity() > KEPT_BYTES {
        *bytes = Vec::new();
    } else {
        bytes.clear();
    }
}

/// Whether records of this kind carry a row.
pub(crate) fn is_row(kind: Kind) -> bool {
    matches!(kind, Kind::Insert | Kind::Update | Kind::Delete)
}

fn set_bit(bitmap: &mut Vec<u8>, bit: usize) {
    if bitmap.len() <= bit / 8 {
        bitmap.resize(bit / 8 + 1, 0);
    }
    if let Some(byte) = bitmap.last_mut() {
        *byte |= 1 << (bit % 8);
    }
}

fn group_len(group: &[u8]) -> usize {
    if group.is_empty() {
        0
    } else {
        1 + varint::len(group.len() as u64) + group.len()
    }
}

fn put_group(out: &mut Vec<u8>, tag: u8, group: &[u8]) {
    if !group.is_empty() {
        out.push(tag);
        varint::put(out, group.len() as u64);
        out.extend_from_slice(group);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn markers_and_captures_are_what_prost_makes_of_them() {
        let content = vec![7; 300];
        let lsn = 1 << 40;
        let capture = pb::Capture {
            oid: 16_384,
            fingerprint: 5,
            snapshot: Some(pb::Snapshot {
                xmin: 7,
                xmax: 9,
                xip: vec![7, 8],
            }),
            rows: vec![pb::Tuple::default(); 3],
        };
        let (mut ours, mut prosts) = (FrameWriter::new(), FrameWriter::new());
        ours.marker(&content, lsn).unwrap();
        ours.capture(&capture.encode_to_vec()).unwrap();
        prosts.record(&pb::Marker { content, lsn }.into());
        prosts.record(&capture.into());
        assert_eq!(ours.as_bytes(), prosts.as_bytes());
    }
}
