//! A relation's definition, worked out once so that a row costs only its values: which columns make the key, what the
//! fields of the hash are called on the wire, in which order the members of the JSON object stand.

use walmirror_proto::key::{KeyError, KeyTemplate};
use walmirror_proto::pb::{Encoding, Mode, OnWrite, Relation, ValueKind};
use walmirror_proto::row::{Datum, TupleRef, WireError, encodings};
use walmirror_proto::value::JsonShape;

use super::{Claims, RedisKeys};
use crate::resp::bulk;

/// A relation definition that cannot be used. The extension checks labels, so this is a bug of the decoder.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MappingError {
    /// The key template does not parse.
    #[error("the key template of {table}: {reason}")]
    Template {
        /// `schema.name`
        table: String,
        /// What the parser said.
        reason: String,
    },
    /// The key template names a column that is not in the stream.
    #[error("the key template of {table} names the column \"{column}\", which is not in the stream")]
    KeyColumn {
        /// `schema.name`
        table: String,
        /// The column.
        column: String,
    },
    /// An enum of the wire format has a value of a later version.
    #[error("the definition of {table} has a {what} that this version does not know: update walmirror")]
    Unknown {
        /// `schema.name`
        table: String,
        /// Which field.
        what: &'static str,
    },
    /// A string mapping needs exactly one value column.
    #[error(
        "the value of {table} is a string, so it must have exactly one value column, but it has {columns}"
    )]
    NotOneColumn {
        /// `schema.name`
        table: String,
        /// How many it has.
        columns: usize,
    },
}

/// The fingerprint of a table of which rows of a version came that nobody announced. No version has it.
pub const OUTDATED: u64 = 0;

/// A compiled relation.
#[derive(Clone, Debug)]
pub struct Mapping {
    /// pg_class.oid of the labelled table.
    pub oid: u32,
    /// The version of the table and its label.
    pub fingerprint: u64,
    /// `schema.name`, for messages.
    pub table: String,
    /// mirror or cache
    pub mode: Mode,
    /// hash, string or json
    pub value: ValueKind,
    /// What a write does to a cached key.
    pub on_write: OnWrite,
    /// Expiry in milliseconds as Redis takes it; None: no expiry.
    pub ttl: Option<Vec<u8>>,
    /// How the columns are encoded, in order.
    pub encodings: Vec<Encoding>,
    /// The key template.
    pub template: KeyTemplate,
    /// For each placeholder of the template its column.
    pub key_columns: Vec<usize>,
    /// Whether the template can make bookkeeping keys, as `{id}` can.
    may_be_reserved: bool,
    /// The keys that it can make and that are other tables'. Who knows the other tables sets it.
    pub claims: Claims,
    /// The columns of the value.
    pub fields: Vec<Field>,
    /// How a row looks as JSON.
    pub json: JsonShape,
    /// The JSON members in the order of jsonb, for patches.
    pub members: Vec<Field>,
}

/// Whether a row has a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keyed {
    /// It has, and this is rendered.
    Yes,
    /// No: a key column is NULL.
    Null,
    /// No: what is rendered is a bookkeeping key.
    Reserved,
    /// No: what is rendered is a key of the table with this oid, whose template is more specific.
    Claimed(u32),
    /// No: Redis takes no key that long. Of what is rendered there may be nothing.
    TooLong,
}

/// A column of the value.
#[derive(Clone, Debug)]
pub struct Field {
    /// Its place in the row.
    pub column: usize,
    /// Its name as a RESP argument; for a JSON member the name as a JSON string.
    pub name: Vec<u8>,
}

/// What is longer is no expiry: Redis refuses times beyond 63 bits of milliseconds since 1970. 10,000 years, as labels allow.
const TTL_MS_MAX: u64 = 10_000 * 365 * 86_400_000;

impl Mapping {
    /// Compiles a definition.
    pub fn new(relation: &Relation) -> Result<Self, MappingError> {
        let table = format!("{}.{}", relation.schema, relation.name);
        let unknown = |what| MappingError::Unknown {
            table: table.clone(),
            what,
        };
        let template = KeyTemplate::parse(&relation.key).map_err(|error| MappingError::Template {
            table: table.clone(),
            reason: error.to_string(),
        })?;
        let place = |name: &String| {
            let missing = || MappingError::KeyColumn {
                table: table.clone(),
                column: name.clone(),
            };
            relation
                .columns
                .iter()
                .position(|column| column.name == *name)
                .ok_or_else(missing)
        };
        let key_columns = template
            .placeholders()
            .iter()
            .map(place)
            .collect::<Result<_, _>>()?;
        let in_value = || {
            relation
                .columns
                .iter()
                .enumerate()
                .filter(|(_, column)| column.in_value)
        };
        let fields: Vec<Field> = in_value()
            .map(|(column, definition)| Field {
                column,
                name: bulk(definition.name.as_bytes()),
            })
            .collect();
        let value = ValueKind::try_from(relation.value).map_err(|_| unknown("value kind"))?;
        if value == ValueKind::String && fields.len() != 1 {
            return Err(MappingError::NotOneColumn {
                table,
                columns: fields.len(),
            });
        }
        Ok(Self {
            oid: relation.oid,
            fingerprint: relation.fingerprint,
            mode: Mode::try_from(relation.mode).map_err(|_| unknown("mode"))?,
            value,
            on_write: OnWrite::try_from(relation.on_write).map_err(|_| unknown("on_write"))?,
            ttl: (1..=TTL_MS_MAX)
                .contains(&relation.ttl_ms)
                .then(|| relation.ttl_ms.to_string().into_bytes()),
            encodings: encodings(relation).map_err(|_| unknown("column encoding"))?,
            json: JsonShape::new(relation),
            members: members(
                in_value()
                    .map(|(column, definition)| (column, definition.name.as_str()))
                    .collect(),
            ),
            table,
            may_be_reserved: RedisKeys::may_be_reserved(template.prefix().as_bytes()),
            claims: Claims::default(),
            template,
            key_columns,
            fields,
        })
    }

    /// Whether it is of no version that there is: nothing that is read of the table fits it.
    pub fn is_outdated(&self) -> bool {
        self.fingerprint == OUTDATED
    }

    /// Reads a row's values.
    pub fn datums<'a>(&self, tuple: &TupleRef<'a>) -> Result<Vec<Datum<'a>>, WireError> {
        // A loop instead of collect(): it is told the size, which an iterator of Results does not.
        let mut row = Vec::with_capacity(self.encodings.len());
        for datum in tuple.datums(&self.encodings) {
            row.push(datum?);
        }
        Ok(row)
    }

    /// Replaces `out` by the row's key.
    pub fn key(&self, row: &[Datum<'_>], out: &mut Vec<u8>) -> Result<Keyed, MappingError> {
        out.clear();
        let column = |placeholder: usize| {
            self.key_columns
                .get(placeholder)
                .and_then(|&column| row.get(column))
        };
        for placeholder in 0..self.key_columns.len() {
            match column(placeholder) {
                None | Some(Datum::Null) => return Ok(Keyed::Null),
                // The decoder fills key columns in from the old tuple, so this would be a row that it did not finish.
                Some(Datum::Unchanged) => {
                    let name = self
                        .template
                        .placeholders()
                        .get(placeholder)
                        .cloned()
                        .unwrap_or_default();
                    return Err(MappingError::KeyColumn {
                        table: self.table.clone(),
                        column: name,
                    });
                }
                Some(_) => {}
            }
        }
        let value = |placeholder: usize, out: &mut Vec<u8>| {
            if let Some(datum) = column(placeholder) {
                datum.write_text(out);
            }
        };
        match self.template.render(value, out) {
            Ok(()) => Ok(self.keyed(out)),
            Err(KeyError::TooLong(_)) => Ok(Keyed::TooLong),
            Err(error) => Err(MappingError::Template {
                table: self.table.clone(),
                reason: error.to_string(),
            }),
        }
    }

    /// Whether a row may have this key, which the template made.
    pub fn keyed(&self, key: &[u8]) -> Keyed {
        if self.may_be_reserved && RedisKeys::is_reserved(key) {
            Keyed::Reserved
        } else {
            self.claims.of(key).map_or(Keyed::Yes, Keyed::Claimed)
        }
    }

    /// The type that Redis' TYPE names for this value kind.
    pub fn redis_type(&self) -> &'static str {
        if self.value == ValueKind::Hash {
            "hash"
        } else {
            "string"
        }
    }
}

/// Members sorted as jsonb sorts keys: by length, then by bytes.
fn members(mut names: Vec<(usize, &str)>) -> Vec<Field> {
    names.sort_unstable_by_key(|(_, name)| (name.len(), *name));
    let member = |(column, name): (usize, &str)| {
        let mut quoted = Vec::new();
        walmirror_proto::value::write_json_string(&mut quoted, name.as_bytes());
        Field {
            column,
            name: bulk(&quoted),
        }
    };
    names.into_iter().map(member).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Redis refuses such a time with an error, and would at each attempt.
    #[test]
    fn what_expires_after_the_end_of_time_does_not_expire() {
        let ttl = |ttl_ms| {
            let relation = Relation {
                key: "k:{id}".into(),
                columns: vec![walmirror_proto::pb::Column {
                    name: "id".into(),
                    ..Default::default()
                }],
                ttl_ms,
                ..Relation::default()
            };
            Mapping::new(&relation).unwrap().ttl
        };
        assert_eq!(ttl(0), None);
        assert_eq!(ttl(1500), Some(b"1500".to_vec()));
        assert_eq!(ttl(u64::MAX >> 1), None);
        assert_eq!(ttl(u64::MAX), None);
    }
}
