//! What a key holds, and what it should hold, in a form that can be compared: a fingerprint of all fields or of the text, made
//! by the same rules for both sides. Pure.

use redis::Value;
use walmirror_proto::pb::{Relation, ValueKind};
use walmirror_proto::row::Datum;
use xxhash_rust::xxh3::Xxh3;

use super::Finding;
use crate::error::Error;
use crate::plan::Mapping;
use crate::redis::{pairs, reply_error, unreadable};

/// What a key holds or should hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    Absent,
    Present {
        /// Of 128 bits: two values that differ have the same one in no table that fits on earth.
        fingerprint: u128,
        expires: bool,
    },
    /// A key of another type.
    Foreign,
}

/// How the rows of a table look in Redis.
#[derive(Debug)]
pub(super) struct Shape {
    kind: ValueKind,
    expires: bool,
    /// The columns of the value by name, in the order of the names.
    fields: Vec<(Vec<u8>, usize)>,
}

impl Shape {
    pub(super) fn new(relation: &Relation, mapping: &Mapping) -> Self {
        let columns = relation.columns.iter().enumerate();
        let mut fields: Vec<(Vec<u8>, usize)> = columns
            .filter(|(_, column)| column.in_value)
            .map(|(place, column)| (column.name.as_bytes().to_vec(), place))
            .collect();
        fields.sort_unstable();
        Self {
            kind: mapping.value,
            expires: mapping.ttl.is_some(),
            fields,
        }
    }

    /// The command that reads a key.
    pub(super) fn command(&self) -> &'static [u8] {
        match self.kind {
            ValueKind::Hash => b"HGETALL",
            ValueKind::String | ValueKind::Json => b"GET",
        }
    }

    /// What the key of this row should hold.
    pub(super) fn expected(&self, mapping: &Mapping, row: &[Datum<'_>], text: &mut Vec<u8>) -> Content {
        let mut print = Print::default();
        let mut present = false;
        let value = |column: usize| row.get(column).filter(|datum| **datum != Datum::Null);
        match self.kind {
            ValueKind::Hash => {
                for (name, column) in &self.fields {
                    if let Some(datum) = value(*column) {
                        text.clear();
                        datum.write_text(text);
                        print.part(name);
                        print.part(text);
                        // Redis has no empty hash.
                        present = true;
                    }
                }
            }
            ValueKind::Json => {
                text.clear();
                present = mapping.json.write(row, text);
                print.part(text);
            }
            ValueKind::String => {
                if let Some(datum) = self.fields.first().and_then(|(_, column)| value(*column)) {
                    text.clear();
                    datum.write_text(text);
                    print.part(text);
                    present = true;
                }
            }
        }
        if !present {
            return Content::Absent;
        }
        Content::Present {
            fingerprint: print.0.digest128(),
            expires: self.expires,
        }
    }

    /// What the replies to the command and to PTTL say.
    pub(super) fn found(&self, reply: Value, pttl: Value) -> Result<Content, Error> {
        let unreadable = || unreadable("a read");
        let mut print = Print::default();
        match reply {
            Value::Nil => return Ok(Content::Absent),
            Value::BulkString(text) => print.part(&text),
            Value::Array(_) | Value::Map(_) => {
                let bytes = |pair| match pair {
                    (Value::BulkString(name), Value::BulkString(value)) => Ok((name, value)),
                    _ => Err(unreadable()),
                };
                let fields: Result<Vec<_>, Error> = pairs(reply).into_iter().map(bytes).collect();
                let mut fields = fields?;
                if fields.is_empty() {
                    return Ok(Content::Absent);
                }
                fields.sort_unstable();
                for (name, value) in &fields {
                    print.part(name);
                    print.part(value);
                }
            }
            Value::ServerError(error) if error.code() == "WRONGTYPE" => return Ok(Content::Foreign),
            Value::ServerError(error) => return Err(reply_error("Redis refuses to read a key", &error)),
            _ => return Err(unreadable()),
        }
        match pttl {
            // It expired between the two.
            Value::Int(-2) => Ok(Content::Absent),
            Value::Int(time_ms) => Ok(Content::Present {
                fingerprint: print.0.digest128(),
                expires: time_ms >= 0,
            }),
            Value::ServerError(error) => Err(reply_error("Redis refuses PTTL", &error)),
            _ => Err(unreadable()),
        }
    }
}

/// Lengths are part of it, so that no two lists of texts look the same.
#[derive(Default)]
struct Print(Xxh3);

impl Print {
    fn part(&mut self, text: &[u8]) {
        self.0.update(&(text.len() as u64).to_le_bytes());
        self.0.update(text);
    }
}

/// What it means that a key should hold this and holds that. `may_be_absent`: a cache, or the key expires.
pub(super) fn compare(expected: Content, found: Content, may_be_absent: bool) -> Finding {
    match (expected, found) {
        (expected, found) if expected == found => Finding::Equal,
        (Content::Absent, _) => Finding::Extra,
        (_, Content::Absent) if may_be_absent => Finding::Equal,
        (_, Content::Absent) => Finding::Missing,
        _ => Finding::Different,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use walmirror_proto::pb;

    fn shape(kind: ValueKind) -> (Shape, Mapping) {
        let column = |name: &str, in_value| pb::Column {
            name: name.to_owned(),
            in_value,
            ..pb::Column::default()
        };
        let relation = Relation {
            key: "k:{id}".into(),
            value: i32::from(kind),
            columns: vec![column("id", kind != ValueKind::String), column("a", true)],
            ..Relation::default()
        };
        let mapping = Mapping::new(&relation).unwrap();
        (Shape::new(&relation, &mapping), mapping)
    }

    fn bulk(text: &str) -> Value {
        Value::BulkString(text.as_bytes().to_vec())
    }

    #[test]
    fn a_row_and_its_key_look_the_same() {
        let row = [Datum::Int(7), Datum::Text(b"x")];
        let mut text = Vec::new();
        for (kind, reply) in [
            (
                ValueKind::Hash,
                Value::Array(vec![bulk("id"), bulk("7"), bulk("a"), bulk("x")]),
            ),
            (ValueKind::Json, bulk(r#"{"a": "x", "id": 7}"#)),
            (ValueKind::String, bulk("x")),
        ] {
            let (shape, mapping) = shape(kind);
            let expected = shape.expected(&mapping, &row, &mut text);
            let found = |reply: &Value, pttl| shape.found(reply.clone(), Value::Int(pttl)).unwrap();
            assert_eq!(
                compare(expected, found(&reply, -1), false),
                Finding::Equal,
                "{kind:?}"
            );
            assert_eq!(compare(expected, found(&reply, 5), false), Finding::Different);
            assert_eq!(compare(expected, found(&reply, -2), false), Finding::Missing);
            assert_eq!(compare(expected, found(&Value::Nil, -2), true), Finding::Equal);
            assert_eq!(
                compare(expected, found(&bulk("y"), -1), false),
                Finding::Different
            );
            assert_eq!(compare(Content::Absent, found(&reply, -1), true), Finding::Extra);
            assert_eq!(compare(expected, Content::Foreign, true), Finding::Different);
        }
    }

    #[test]
    fn nulls_are_no_fields_and_no_fields_are_no_key() {
        let mut text = Vec::new();
        let (hash, mapping) = shape(ValueKind::Hash);
        let expected = hash.expected(&mapping, &[Datum::Int(7), Datum::Null], &mut text);
        let reply = Value::Array(vec![bulk("id"), bulk("7")]);
        assert_eq!(hash.found(reply, Value::Int(-1)).unwrap(), expected);
        assert_eq!(
            hash.expected(&mapping, &[Datum::Null, Datum::Null], &mut text),
            Content::Absent
        );
        let (string, mapping) = shape(ValueKind::String);
        assert_eq!(
            string.expected(&mapping, &[Datum::Int(7), Datum::Null], &mut text),
            Content::Absent
        );
    }

    /// The story: with `?protocol=resp3` no table of hashes could be verified.
    #[test]
    fn a_hash_is_read_as_a_map_too() {
        let (shape, _) = shape(ValueKind::Hash);
        let found = |reply| shape.found(reply, Value::Int(-1)).unwrap();
        let pairs = vec![(bulk("id"), bulk("7")), (bulk("a"), bulk("x"))];
        let array = vec![bulk("id"), bulk("7"), bulk("a"), bulk("x")];
        assert_eq!(found(Value::Map(pairs)), found(Value::Array(array)));
        assert_eq!(found(Value::Map(Vec::new())), Content::Absent);
    }

    #[test]
    fn fields_do_not_run_into_each_other() {
        let (shape, _) = shape(ValueKind::Hash);
        let found = |items: &[&str]| {
            let reply = Value::Array(items.iter().map(|item| bulk(item)).collect());
            shape.found(reply, Value::Int(-1)).unwrap()
        };
        assert_eq!(found(&["a", "1", "b", "2"]), found(&["b", "2", "a", "1"]));
        assert_ne!(found(&["a", "1b"]), found(&["a1", "b"]));
    }
}
