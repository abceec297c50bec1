//! Walks the fields of a protobuf message in place, for the frame and row readers. Every length is checked against
//! what is there, so no bytes can make it panic, loop or allocate.

use crate::varint;

/// Why bytes are not a Frame, or not a row of the relation they claim.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The bytes end inside a field, or a varint is longer than 64 bits.
    #[error("the message is cut short or not protobuf")]
    Malformed,
    /// A known field with a wire type that its type does not have.
    #[error("field {field} has a wire type that does not fit it")]
    WireType {
        /// The field's number.
        field: u32,
    },
    /// More bytes than [`crate::frame::MAX_FRAME_BYTES`].
    #[error("a frame of {0} bytes is over the limit")]
    TooLarge(usize),
    /// A record kind that this version does not know; skipping it could lose data.
    #[error(
        "record kind {0} is not known to this version; upgrade this program to the version of the extension"
    )]
    UnknownKind(u64),
    /// A record without the message that its kind promises.
    #[error("a {0} record without its content")]
    MissingContent(&'static str),
    /// A record's message that prost refuses.
    #[error("a {kind} record with broken content: {reason}")]
    BrokenContent {
        /// The record's kind.
        kind: &'static str,
        /// What prost said.
        reason: String,
    },
    /// The first row of a frame does not say its relation.
    #[error("the first row of a frame does not name its relation")]
    MissingRelation,
    /// A column encoding that this version does not know.
    #[error(
        "column encoding {0} is not known to this version; upgrade this program to the version of the extension"
    )]
    UnknownEncoding(i32),
    /// The row ends before this column (counted from 0).
    #[error("the row holds no value for column {column}")]
    MissingValue {
        /// The column's place in the relation.
        column: usize,
    },
    /// A value that its encoding does not allow.
    #[error("the value of column {column} is out of range for its encoding")]
    ValueRange {
        /// The column's place in the relation.
        column: usize,
    },
    /// The row holds more than the relation's columns.
    #[error("the row holds more values than the relation has columns")]
    LeftOver,
}

/// The content of one field.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Value<'a> {
    Varint(u64),
    Fixed64([u8; 8]),
    Fixed32([u8; 4]),
    Bytes(&'a [u8]),
}

impl<'a> Value<'a> {
    pub(crate) fn varint(self, field: u32) -> Result<u64, WireError> {
        if let Self::Varint(value) = self {
            Ok(value)
        } else {
            Err(WireError::WireType { field })
        }
    }

    pub(crate) fn bytes(self, field: u32) -> Result<&'a [u8], WireError> {
        if let Self::Bytes(bytes) = self {
            Ok(bytes)
        } else {
            Err(WireError::WireType { field })
        }
    }
}

/// Takes the next field, its number and content, off the front of `message`; None at its end.
#[inline]
pub(crate) fn next<'a>(message: &mut &'a [u8]) -> Result<Option<(u32, Value<'a>)>, WireError> {
    if message.is_empty() {
        return Ok(None);
    }
    let tag = varint::take(message)
        .and_then(|tag| u32::try_from(tag).ok())
        .ok_or(WireError::Malformed)?;
    let field = tag >> 3;
    if field == 0 {
        return Err(WireError::Malformed);
    }
    let value = match tag & 7 {
        0 => varint::take(message).map(Value::Varint),
        1 => take_array(message).map(Value::Fixed64),
        2 => take_bytes(message).map(Value::Bytes),
        5 => take_array(message).map(Value::Fixed32),
        // Groups (3 and 4) are not in proto3.
        _ => None,
    };
    Ok(Some((field, value.ok_or(WireError::Malformed)?)))
}

/// Takes `N` bytes off the front.
#[inline]
pub(crate) fn take_array<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (array, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*array)
}

fn take_bytes<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let len = usize::try_from(varint::take(bytes)?).ok()?;
    let (taken, rest) = bytes.split_at_checked(len)?;
    *bytes = rest;
    Some(taken)
}
