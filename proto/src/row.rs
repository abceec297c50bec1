//! Reads the values of one row by walking its relation's columns over the groups of a Tuple, in place. Used for rows of
//! frames, captured rows and the result of `walmirror.pack`.

use crate::fields::{self, Value};
use crate::pb::{self, Encoding};
use crate::varint;

pub use crate::fields::WireError;

/// numeric's largest display scale in Postgres; a larger one would make a few bytes print megabytes of zeros.
const MAX_NUMERIC_SCALE: i64 = 16_383;

/// One value, borrowed from the frame. `write_text` and `write_json` (module value) print it as Postgres does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Datum<'a> {
    /// SQL NULL.
    Null,
    /// An unchanged TOASTed value that is not in the stream.
    Unchanged,
    /// boolean
    Bool(bool),
    /// smallint, integer, bigint
    Int(i64),
    /// oid
    Oid(u32),
    /// real
    Float4(f32),
    /// double precision
    Float8(f64),
    /// numeric, as mantissa / 10^scale
    Numeric {
        /// Number of fraction digits.
        scale: u32,
        /// The value times 10^scale.
        mantissa: i64,
    },
    /// numeric, as text
    NumericText(&'a [u8]),
    /// date: days since 2000-01-01; i32::MAX and i32::MIN are the infinities
    Date(i32),
    /// timestamp without time zone: microseconds since 2000-01-01; i64::MAX and i64::MIN are the infinities
    Timestamp(i64),
    /// timestamp with time zone: the same, in UTC
    Timestamptz(i64),
    /// uuid: 16 bytes
    Uuid(&'a [u8]),
    /// bytea: the raw bytes
    Bytea(&'a [u8]),
    /// Any other type: its `::text`
    Text(&'a [u8]),
    /// Any other type in a table of value kind JSON: its `to_jsonb(...)::text`
    Json(&'a [u8]),
}

/// The encodings of a relation's columns: what [`TupleRef::datums`] needs. Made once per Relation record.
pub fn encodings(relation: &pb::Relation) -> Result<Vec<Encoding>, WireError> {
    relation
        .columns
        .iter()
        .map(|column| {
            Encoding::try_from(column.encoding).map_err(|_| WireError::UnknownEncoding(column.encoding))
        })
        .collect()
}

/// A row in place.
#[derive(Clone, Copy, Debug, Default)]
pub struct TupleRef<'a> {
    message: &'a [u8],
    fields: TupleFields<'a>,
}

/// Where the groups of a row begin. Each slice starts at the first field of its group and reaches to the end of the
/// message, because protobuf allows a group to be spread over it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct TupleFields<'a> {
    ints: &'a [u8],
    texts: &'a [u8],
    doubles: &'a [u8],
    floats: &'a [u8],
    nulls: &'a [u8],
    unchanged: &'a [u8],
}

impl<'a> TupleFields<'a> {
    /// Notes field 3 to 8 of a Tuple or Record; `here` is the message from this field on.
    #[inline]
    pub(crate) fn field(&mut self, field: u32, value: Value<'a>, here: &'a [u8]) -> Result<(), WireError> {
        let (group, fits) = match field {
            3 => (
                &mut self.ints,
                matches!(value, Value::Bytes(_) | Value::Varint(_)),
            ),
            4 => (&mut self.texts, matches!(value, Value::Bytes(_))),
            5 => (
                &mut self.doubles,
                matches!(value, Value::Bytes(_) | Value::Fixed64(_)),
            ),
            6 => (
                &mut self.floats,
                matches!(value, Value::Bytes(_) | Value::Fixed32(_)),
            ),
            7 => return value.bytes(field).map(|bitmap| self.nulls = bitmap),
            8 => return value.bytes(field).map(|bitmap| self.unchanged = bitmap),
            _ => return Ok(()),
        };
        if !fits {
            return Err(WireError::WireType { field });
        }
        if group.is_empty() {
            *group = here;
        }
        Ok(())
    }

    /// `message` is the one that they are fields of.
    pub(crate) fn finish(self, message: &'a [u8]) -> TupleRef<'a> {
        TupleRef {
            message,
            fields: self,
        }
    }
}

impl<'a> TupleRef<'a> {
    /// Reads a bare Tuple message.
    pub fn parse(message: &'a [u8]) -> Result<Self, WireError> {
        let mut tuple = TupleFields::default();
        let mut rest = message;
        loop {
            let here = rest;
            let Some((field, value)) = fields::next(&mut rest)? else {
                break;
            };
            tuple.field(field, value, here)?;
        }
        Ok(tuple.finish(message))
    }

    /// The values, one for each of `encodings`, which have to be those of the row's relation. A row that holds fewer or
    /// more values than that ends in an error: it was written for another version of the table.
    pub fn datums<'e>(&self, encodings: &'e [Encoding]) -> Datums<'a, 'e> {
        let fields = self.fields;
        Datums {
            encodings,
            column: 0,
            nulls: fields.nulls,
            unchanged: fields.unchanged,
            ints: Group::new(fields.ints),
            texts: fields.texts,
            doubles: Group::new(fields.doubles),
            floats: Group::new(fields.floats),
            done: false,
        }
    }

    /// The message that it is in: a Tuple or a Record, which [`Self::parse`] reads alike.
    pub fn as_bytes(&self) -> &'a [u8] {
        self.message
    }

    /// Whether it has a value wherever `earlier`, an older version of the same row, has one.
    pub fn stands_for(&self, earlier: &TupleRef<'_>) -> bool {
        let before = earlier.fields.unchanged;
        let mut bytes = self.fields.unchanged.iter().enumerate();
        bytes.all(|(place, byte)| byte & !before.get(place).copied().unwrap_or(0) == 0)
    }

    /// Whether any column is unchanged TOAST.
    pub fn has_unchanged(&self) -> bool {
        self.fields.unchanged.iter().any(|&byte| byte != 0)
    }
}

/// Iterator over a row's values; ends after the first error.
#[derive(Clone, Debug)]
pub struct Datums<'a, 'e> {
    encodings: &'e [Encoding],
    column: usize,
    nulls: &'a [u8],
    unchanged: &'a [u8],
    ints: Group<'a>,
    texts: &'a [u8],
    doubles: Group<'a>,
    floats: Group<'a>,
    done: bool,
}

impl<'a> Datums<'a, '_> {
    #[inline]
    fn datum(&mut self, encoding: Encoding) -> Result<Datum<'a>, WireError> {
        if bit(self.nulls, self.column) {
            return Ok(Datum::Null);
        }
        if bit(self.unchanged, self.column) {
            return Ok(Datum::Unchanged);
        }
        let column = self.column;
        let range = |_| WireError::ValueRange { column };
        Ok(match encoding {
            Encoding::Text => Datum::Text(self.text()?),
            Encoding::Int => Datum::Int(self.int()?),
            Encoding::Bool => match self.int()? {
                0 => Datum::Bool(false),
                1 => Datum::Bool(true),
                _ => return Err(WireError::ValueRange { column }),
            },
            Encoding::Oid => Datum::Oid(self.int()?.try_into().map_err(range)?),
            Encoding::Float4 => Datum::Float4(f32::from_le_bytes(self.floats.fixed(6, column)?)),
            Encoding::Float8 => Datum::Float8(f64::from_le_bytes(self.doubles.fixed(5, column)?)),
            Encoding::Numeric => self.numeric()?,
            Encoding::Date => Datum::Date(self.int()?.try_into().map_err(range)?),
            Encoding::Timestamp => Datum::Timestamp(self.int()?),
            Encoding::Timestamptz => Datum::Timestamptz(self.int()?),
            Encoding::Uuid => match self.text()? {
                uuid if uuid.len() == 16 => Datum::Uuid(uuid),
                _ => return Err(WireError::ValueRange { column }),
            },
            Encoding::Bytea => Datum::Bytea(self.text()?),
            Encoding::Jsonb => Datum::Json(self.text()?),
        })
    }

    #[inline]
    fn int(&mut self) -> Result<i64, WireError> {
        self.ints.int(self.column)
    }

    #[inline]
    fn text(&mut self) -> Result<&'a [u8], WireError> {
        while let Some((field, value)) = fields::next(&mut self.texts)? {
            if field == 4 {
                return value.bytes(field);
            }
        }
        Err(WireError::MissingValue { column: self.column })
    }

    fn numeric(&mut self) -> Result<Datum<'a>, WireError> {
        match self.int()? {
            -1 => self.text().map(Datum::NumericText),
            scale @ 0..=MAX_NUMERIC_SCALE => Ok(Datum::Numeric {
                scale: scale as u32,
                mantissa: self.int()?,
            }),
            _ => Err(WireError::ValueRange { column: self.column }),
        }
    }

    /// Whether every value was taken and no bit stands for a column that is not there.
    fn is_spent(&mut self) -> Result<bool, WireError> {
        let columns = self.encodings.len();
        Ok(self.ints.is_spent(3)?
            && self.doubles.is_spent(5)?
            && self.floats.is_spent(6)?
            && matches!(self.text(), Err(WireError::MissingValue { .. }))
            && bits_below(self.nulls, columns)
            && bits_below(self.unchanged, columns))
    }
}

impl<'a> Iterator for Datums<'a, '_> {
    type Item = Result<Datum<'a>, WireError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        if let Some(&encoding) = self.encodings.get(self.column) {
            let datum = self.datum(encoding);
            self.column += 1;
            self.done = datum.is_err();
            return Some(datum);
        }
        self.done = true;
        match self.is_spent() {
            Ok(true) => None,
            Ok(false) => Some(Err(WireError::LeftOver)),
            Err(error) => Some(Err(error)),
        }
    }
}

/// A group of numbers: the packed run at hand, and the message after it.
#[derive(Clone, Copy, Debug)]
struct Group<'a> {
    run: &'a [u8],
    rest: &'a [u8],
}

impl<'a> Group<'a> {
    fn new(rest: &'a [u8]) -> Self {
        Self { run: &[], rest }
    }

    /// Moves to the next field of the group. Some: its content, where it is not a packed run.
    fn advance(&mut self, group: u32, column: usize) -> Result<Option<Value<'a>>, WireError> {
        loop {
            match fields::next(&mut self.rest)?.ok_or(WireError::MissingValue { column })? {
                (field, Value::Bytes(run)) if field == group => {
                    self.run = run;
                    return Ok(None);
                }
                (field, value) if field == group => return Ok(Some(value)),
                _ => {}
            }
        }
    }

    #[inline]
    fn int(&mut self, column: usize) -> Result<i64, WireError> {
        while self.run.is_empty() {
            if let Some(value) = self.advance(3, column)? {
                return value.varint(3).map(varint::unzigzag);
            }
        }
        varint::take(&mut self.run)
            .map(varint::unzigzag)
            .ok_or(WireError::Malformed)
    }

    fn fixed<const N: usize>(&mut self, field: u32, column: usize) -> Result<[u8; N], WireError> {
        while self.run.is_empty() {
            match self.advance(field, column)? {
                Some(Value::Fixed64(bytes)) => {
                    return fields::take_array(&mut bytes.as_slice()).ok_or(WireError::WireType { field });
                }
                Some(Value::Fixed32(bytes)) => {
                    return fields::take_array(&mut bytes.as_slice()).ok_or(WireError::WireType { field });
                }
                Some(_) => return Err(WireError::WireType { field }),
                None => {}
            }
        }
        fields::take_array(&mut self.run).ok_or(WireError::Malformed)
    }

    fn is_spent(&mut self, group: u32) -> Result<bool, WireError> {
        while self.run.is_empty() {
            match self.advance(group, 0) {
                Ok(None) => {}
                Ok(Some(_)) => return Ok(false),
                Err(WireError::MissingValue { .. }) => return Ok(true),
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }
}

#[inline]
fn bit(bitmap: &[u8], at: usize) -> bool {
    bitmap.get(at / 8).is_some_and(|byte| byte >> (at % 8) & 1 == 1)
}

/// Whether every set bit stands for one of `columns`.
fn bits_below(bitmap: &[u8], columns: usize) -> bool {
    let beyond = bitmap.get(columns / 8).map_or(0, |byte| byte >> (columns % 8));
    beyond == 0 && bitmap.iter().skip(columns / 8 + 1).all(|&byte| byte == 0)
}
