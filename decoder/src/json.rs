//! `format=json`: one JSON object a record, for people. Rendered from the very frame that a sink would get.

use std::collections::HashMap;

use serde_json::{Map, Value, json};
use walmirror_proto::Lsn;
use walmirror_proto::frame::{FrameReader, RecordRef};
use walmirror_proto::pb::{self, Kind};
use walmirror_proto::row::{self, Datum, TupleRef};

/// Longer lines are not written. One write of the output plugin is below 1 GB (MaxAllocSize), its header included.
const MAX_LINE_BYTES: usize = (1 << 30) - 1024;

/// Renders frames; remembers the relations that they defined.
#[derive(Default)]
pub struct JsonLines {
    relations: HashMap<u32, pb::Relation>,
}

impl JsonLines {
    /// Calls `line` with the text of each record of the frame.
    pub fn render(&mut self, frame: &[u8], mut line: impl FnMut(&[u8])) {
        for record in FrameReader::new(frame) {
            let object = match record {
                Ok(record) => self.object(record),
                Err(error) => json!({"kind": "error", "reason": error.to_string()}),
            };
            let text = object.to_string();
            if text.len() <= MAX_LINE_BYTES {
                line(text.as_bytes());
            } else {
                let reason = format!(
                    "{} bytes as JSON are more than PostgreSQL passes on at once",
                    text.len()
                );
                line(json!({"kind": "error", "reason": reason}).to_string().as_bytes());
            }
        }
    }

    fn object(&mut self, record: RecordRef<'_>) -> Value {
        match record {
            RecordRef::Row {
                kind,
                relation,
                tuple,
                old_key,
            } => self.row(kind, relation, &tuple, old_key.as_ref()),
            RecordRef::Begin(begin) => json!({
                "kind": "begin", "xid": begin.xid, "commit_lsn": Lsn(begin.commit_lsn).to_string(), "commit_time": timestamp(begin.commit_time),
            }),
            RecordRef::Commit(commit) => {
                json!({"kind": "commit", "end_lsn": Lsn(commit.end_lsn).to_string()})
            }
            RecordRef::Relation(relation) => {
                let object = describe(&relation);
                self.relations.insert(relation.index, relation);
                object
            }
            RecordRef::Truncate(truncate) => json!({
                "kind": "truncate", "tables": truncate.relations.iter().map(|index| self.name(*index)).collect::<Vec<_>>(),
            }),
            RecordRef::Forget(forget) => {
                json!({"kind": "forget", "oid": forget.oid, "keep_keys": forget.keep_keys})
            }
            RecordRef::Marker(marker) => json!({
                "kind": "marker", "lsn": Lsn(marker.lsn).to_string(), "content": String::from_utf8_lossy(&marker.content),
            }),
            RecordRef::Capture(capture) => json!({"kind": "capture", "rows": capture.rows().count()}),
            RecordRef::Error { error, .. } => json!({
                "kind": "error", "table": error.table, "key": error.key, "reason": error.reason, "lsn": Lsn(error.lsn).to_string(),
            }),
            // The options do not allow them here.
            RecordRef::InProgress(_) | RecordRef::Rollback(_) | RecordRef::LateCommit(_) => {
                json!({"kind": "in progress"})
            }
        }
    }

    fn row(&self, kind: Kind, index: u32, tuple: &TupleRef<'_>, old_key: Option<&TupleRef<'_>>) -> Value {
        let name = match kind {
            Kind::Update => "update",
            Kind::Delete => "delete",
            _ => "insert",
        };
        let mut object = Map::new();
        object.insert("kind".into(), name.into());
        object.insert("table".into(), self.name(index).into());
        let Some(relation) = self.relations.get(&index) else {
            return object.into();
        };
        let columns = values(relation, tuple);
        if let Some(old_key) = old_key {
            object.insert("old_key".into(), key_object(&values(relation, old_key)));
        }
        if kind == Kind::Delete {
            object.insert("key".into(), key_object(&columns));
            return object.into();
        }
        let unchanged: Vec<&str> = columns
            .iter()
            .filter(|(_, _, value)| matches!(value, Datum::Unchanged))
            .map(|(name, ..)| *name)
            .collect();
        let row = columns
            .iter()
            .filter(|(_, in_value, value)| *in_value && !matches!(value, Datum::Unchanged));
        object.insert(
            "row".into(),
            row.map(|(name, _, value)| ((*name).to_owned(), to_json(value)))
                .collect::<Map<_, _>>()
                .into(),
        );
        if !unchanged.is_empty() {
            object.insert("unchanged".into(), unchanged.into());
        }
        object.into()
    }

    fn name(&self, index: u32) -> String {
        self.relations.get(&index).map_or_else(
            || index.to_string(),
            |relation| format!("{}.{}", relation.schema, relation.name),
        )
    }
}

fn values<'a, 'r>(relation: &'r pb::Relation, tuple: &TupleRef<'a>) -> Vec<(&'r str, bool, Datum<'a>)> {
    let Ok(encodings) = row::encodings(relation) else {
        return Vec::new();
    };
    let values: Vec<Datum<'a>> = tuple.datums(&encodings).map_while(Result::ok).collect();
    relation
        .columns
        .iter()
        .zip(values)
        .map(|(column, value)| (column.name.as_str(), column.in_value, value))
        .collect()
}

fn key_object(columns: &[(&str, bool, Datum<'_>)]) -> Value {
    columns
        .iter()
        .filter(|(_, _, value)| !matches!(value, Datum::Null))
        .map(|(name, _, value)| ((*name).to_owned(), to_json(value)))
        .collect::<Map<_, _>>()
        .into()
}

fn to_json(value: &Datum<'_>) -> Value {
    let mut text = Vec::new();
    value.write_json(&mut text);
    // serde_json's arbitrary_precision keeps every digit of a number.
    serde_json::from_slice(&text)
        .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&text).into_owned()))
}

fn timestamp(microseconds: i64) -> String {
    let mut text = Vec::new();
    Datum::Timestamptz(microseconds).write_text(&mut text);
    String::from_utf8_lossy(&text).into_owned()
}

fn describe(relation: &pb::Relation) -> Value {
    json!({
        "kind": "relation",
        "table": format!("{}.{}", relation.schema, relation.name),
        "mode": relation.mode().as_str_name().to_lowercase(),
        "key": relation.key,
        "value": relation.value().as_str_name().to_lowercase(),
        "columns": relation.columns.iter().map(|column| column.name.as_str()).collect::<Vec<_>>(),
        "announced": relation.announced,
    })
}
