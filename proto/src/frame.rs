//! Reads a Frame record by record, in place: a row costs neither an allocation nor a copy. The sink, `tail` and the fuzz
//! target call it with bytes from the network.

use prost::Message;

use crate::fields::{self, Value};
use crate::pb::{self, Kind};
use crate::row::{TupleFields, TupleRef};

pub use crate::fields::WireError;

/// No frame is larger: Postgres cannot allocate more for one output-plugin write (MaxAllocSize).
pub const MAX_FRAME_BYTES: usize = (1 << 30) - 1;

/// One record of a frame.
#[derive(Clone, Debug)]
pub enum RecordRef<'a> {
    /// INSERT, UPDATE or DELETE.
    Row {
        /// Which of the three.
        kind: Kind,
        /// The Relation's index, also where the record leaves it out.
        relation: u32,
        /// The new row; for DELETE the old key columns.
        tuple: TupleRef<'a>,
        /// UPDATE that changed the key: the old key columns.
        old_key: Option<TupleRef<'a>>,
    },
    /// A transaction begins.
    Begin(pb::Begin),
    /// It ends.
    Commit(pb::Commit),
    /// A table's definition.
    Relation(pb::Relation),
    /// Tables were emptied.
    Truncate(pb::Truncate),
    /// A table is no longer mirrored.
    Forget(pb::Forget),
    /// A marker that the sink wrote came back.
    Marker(pb::Marker),
    /// Rows that a SELECT read.
    Capture(CaptureRef<'a>),
    /// A change that could not be encoded.
    Error {
        /// The Relation's index; 0 if not known.
        relation: u32,
        /// Table, key and reason.
        error: pb::Error,
    },
    /// What follows are changes of a transaction in progress.
    InProgress(pb::InProgress),
    /// What a transaction in progress did, or a subtransaction of it, is undone.
    Rollback(pb::Rollback),
    /// A transaction that came while it was in progress has committed.
    LateCommit(pb::LateCommit),
}

/// The records of one frame. After an error it ends: what follows broken bytes cannot be trusted.
#[derive(Clone, Debug)]
pub struct FrameReader<'a> {
    rest: &'a [u8],
    /// The relation of the last row, for the rows that leave it out.
    relation: u32,
    too_large: Option<usize>,
}

impl<'a> FrameReader<'a> {
    /// Reads the bytes of one output-plugin write.
    pub fn new(frame: &'a [u8]) -> Self {
        let too_large = (frame.len() > MAX_FRAME_BYTES).then_some(frame.len());
        Self {
            rest: frame,
            relation: 0,
            too_large,
        }
    }

    fn read(&mut self) -> Result<Option<RecordRef<'a>>, WireError> {
        if let Some(len) = self.too_large {
            return Err(WireError::TooLarge(len));
        }
        while let Some((field, value)) = fields::next(&mut self.rest)? {
            if field == 1 {
                return self.record(value.bytes(field)?).map(Some);
            }
        }
        Ok(None)
    }

    fn record(&mut self, record: &'a [u8]) -> Result<RecordRef<'a>, WireError> {
        let parts = Parts::parse(record)?;
        match parts.kind {
            Kind::Insert | Kind::Update | Kind::Delete => {
                if parts.relation != 0 {
                    self.relation = parts.relation;
                }
                if self.relation == 0 {
                    return Err(WireError::MissingRelation);
                }
                let old_key = parts.old_key.map(TupleRef::parse).transpose()?;
                let tuple = parts.tuple.finish(record);
                Ok(RecordRef::Row {
                    kind: parts.kind,
                    relation: self.relation,
                    tuple,
                    old_key,
                })
            }
            Kind::Begin => parts.content(10).map(RecordRef::Begin),
            Kind::Commit => parts.content(11).map(RecordRef::Commit),
            Kind::Relation => parts.content(12).map(RecordRef::Relation),
            Kind::Truncate => parts.content(13).map(RecordRef::Truncate),
            Kind::Forget => parts.content(14).map(RecordRef::Forget),
            Kind::Marker => parts.content(15).map(RecordRef::Marker),
            Kind::Capture => CaptureRef::parse(parts.content_bytes(16)?).map(RecordRef::Capture),
            Kind::Error => {
                let error = parts.content(17)?;
                Ok(RecordRef::Error {
                    relation: parts.relation,
                    error,
                })
            }
            Kind::InProgress => parts.content(18).map(RecordRef::InProgress),
            Kind::Rollback => parts.content(19).map(RecordRef::Rollback),
            Kind::LateCommit => parts.content(20).map(RecordRef::LateCommit),
        }
    }
}

impl<'a> Iterator for FrameReader<'a> {
    type Item = Result<RecordRef<'a>, WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        let item = self.read().transpose();
        if matches!(item, Some(Err(_))) {
            (self.rest, self.too_large) = (&[], None);
        }
        item
    }
}

/// The fields of one Record, before its kind decides which of them count.
struct Parts<'a> {
    kind: Kind,
    relation: u32,
    tuple: TupleFields<'a>,
    old_key: Option<&'a [u8]>,
    /// The last of the fields from 10 on: a Record has at most one.
    content: Option<(u32, Value<'a>)>,
}

impl<'a> Parts<'a> {
    fn parse(record: &'a [u8]) -> Result<Self, WireError> {
        let mut kind = 0;
        let mut parts = Self {
            kind: Kind::Insert,
            relation: 0,
            tuple: TupleFields::default(),
            old_key: None,
            content: None,
        };
        let mut rest = record;
        loop {
            let here = rest;
            let Some((field, value)) = fields::next(&mut rest)? else {
                break;
            };
            match field {
                1 => kind = value.varint(field)?,
                2 => {
                    parts.relation = u32::try_from(value.varint(field)?).map_err(|_| WireError::Malformed)?
                }
                3..=8 => parts.tuple.field(field, value, here)?,
                9 => parts.old_key = Some(value.bytes(field)?),
                10..=20 => parts.content = Some((field, value)),
                _ => {}
            }
        }
        parts.kind = i32::try_from(kind)
            .ok()
            .and_then(|kind| Kind::try_from(kind).ok())
            .ok_or(WireError::UnknownKind(kind))?;
        Ok(parts)
    }

    fn content_bytes(&self, field: u32) -> Result<&'a [u8], WireError> {
        match self.content {
            Some((found, value)) if found == field => value.bytes(field),
            _ => Err(WireError::MissingContent(self.kind.as_str_name())),
        }
    }

    fn content<M: Message + Default>(&self, field: u32) -> Result<M, WireError> {
        let kind = self.kind.as_str_name();
        M::decode(self.content_bytes(field)?).map_err(|error| WireError::BrokenContent {
            kind,
            reason: error.to_string(),
        })
    }
}

/// No snapshot is larger: a server has at most half a million transactions in progress. Its ids are read into memory, eight bytes
/// each.
const MAX_SNAPSHOT_BYTES: usize = 8 << 20;

/// A Capture record; its rows stay in place.
#[derive(Clone, Debug)]
pub struct CaptureRef<'a> {
    /// pg_class.oid of the labelled table.
    pub oid: u32,
    /// The version of the table that the rows are encoded by.
    pub fingerprint: u64,
    /// The snapshot that read the rows.
    pub snapshot: pb::Snapshot,
    message: &'a [u8],
}

impl<'a> CaptureRef<'a> {
    /// Checks a serialised pb::Capture, rows included.
    pub fn parse(message: &'a [u8]) -> Result<Self, WireError> {
        let mut capture = Self {
            oid: 0,
            fingerprint: 0,
            snapshot: pb::Snapshot::default(),
            message,
        };
        let mut rest = message;
        while let Some((field, value)) = fields::next(&mut rest)? {
            match (field, value) {
                (1, Value::Varint(oid)) => {
                    capture.oid = u32::try_from(oid).map_err(|_| WireError::Malformed)?
                }
                (2, Value::Fixed64(bytes)) => capture.fingerprint = u64::from_le_bytes(bytes),
                (3, Value::Bytes(bytes)) if bytes.len() > MAX_SNAPSHOT_BYTES => {
                    return Err(WireError::TooLarge(bytes.len()));
                }
                (3, Value::Bytes(bytes)) => {
                    let broken = |error: prost::DecodeError| WireError::BrokenContent {
                        kind: "CAPTURE",
                        reason: error.to_string(),
                    };
                    capture.snapshot = pb::Snapshot::decode(bytes).map_err(broken)?;
                }
                (4, Value::Bytes(bytes)) => {
                    TupleRef::parse(bytes)?;
                }
                (1..=4, _) => return Err(WireError::WireType { field }),
                _ => {}
            }
        }
        Ok(capture)
    }

    /// The rows, in the order in which they were read.
    pub fn rows(&self) -> impl Iterator<Item = TupleRef<'a>> + use<'a> {
        let mut rest = self.message;
        std::iter::from_fn(move || {
            loop {
                match fields::next(&mut rest) {
                    // parse() has read all this before, so no error is hidden here.
                    Ok(Some((4, Value::Bytes(bytes)))) => return TupleRef::parse(bytes).ok(),
                    Ok(Some(_)) => {}
                    Ok(None) | Err(_) => return None,
                }
            }
        })
    }
}
