//! Records as lines for people: headers for transactions, one aligned line a row, `column=value`. Pure: bytes in, text
//! out.

use std::collections::HashMap;
use std::io::Write;

use super::value::{identifier, value};
use walmirror_proto::Lsn;
use walmirror_proto::frame::{FrameReader, RecordRef, WireError};
use walmirror_proto::pb::{self, Encoding, Kind, Mode, OnWrite, ValueKind};
use walmirror_proto::row::{Datum, TupleRef, encodings};

/// Where in the WAL a frame has brought the reader.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// The commit position of the last transaction that begins in it.
    pub begins: Option<Lsn>,
    /// The end of the last transaction that ends in it.
    pub done: Option<Lsn>,
}

/// A table as the stream defined it last.
struct Table {
    name: String,
    columns: Vec<String>,
    encodings: Vec<Encoding>,
}

/// Turns frames into text. Remembers the tables that the stream has defined.
#[derive(Default)]
pub struct TextPrinter {
    tables: HashMap<u32, Table>,
    by_oid: HashMap<u32, u32>,
    full: bool,
    rows: u64,
    value: Vec<u8>,
    // The widest table name so far, so that columns line up.
    width: usize,
}

impl TextPrinter {
    /// `full`: long values are not cut.
    pub fn new(full: bool) -> Self {
        Self {
            full,
            ..Self::default()
        }
    }

    /// Appends the lines of one frame.
    pub fn frame(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<Seen, WireError> {
        let mut seen = Seen::default();
        for record in FrameReader::new(bytes) {
            self.record(record?, out, &mut seen)?;
        }
        Ok(seen)
    }

    fn record(&mut self, record: RecordRef<'_>, out: &mut Vec<u8>, seen: &mut Seen) -> Result<(), WireError> {
        match record {
            RecordRef::Row {
                kind,
                relation,
                tuple,
                old_key,
            } => {
                self.rows += 1;
                let word = match kind {
                    Kind::Update => "UPDATE",
                    Kind::Delete => "DELETE",
                    _ => "INSERT",
                };
                self.row(word, relation, &tuple, kind == Kind::Delete, out)?;
                if let (Some(old), Some(table)) = (old_key, self.tables.get(&relation)) {
                    out.extend_from_slice(b"  was");
                    values(table, &old, true, self.full, &mut self.value, out)?;
                }
                out.push(b'\n');
            }
            // `tail` does not ask for transactions in progress.
            RecordRef::InProgress(_) | RecordRef::Rollback(_) | RecordRef::LateCommit(_) => {}
            RecordRef::Begin(begin) => {
                seen.begins = Some(Lsn(begin.commit_lsn));
                self.rows = 0;
                self.value.clear();
                Datum::Timestamptz(begin.commit_time).write_text(&mut self.value);
                let time = String::from_utf8_lossy(&self.value);
                line(
                    out,
                    format_args!("BEGIN   xid {}  at {}  {time}", begin.xid, Lsn(begin.commit_lsn)),
                );
            }
            RecordRef::Commit(commit) => {
                seen.done = Some(Lsn(commit.end_lsn));
                let plural = if self.rows == 1 { "" } else { "s" };
                line(
                    out,
                    format_args!("COMMIT  {} row{plural}  end {}", self.rows, Lsn(commit.end_lsn)),
                );
            }
            RecordRef::Relation(relation) => self.relation(&relation, out)?,
            RecordRef::Truncate(truncate) => {
                for index in &truncate.relations {
                    line(out, format_args!("  TRUNCATE  {}", self.name(*index)));
                }
            }
            RecordRef::Forget(forget) => {
                let name = self.by_oid.get(&forget.oid).map(|index| self.name(*index));
                let name = name.unwrap_or_else(|| format!("table with oid {}", forget.oid));
                let keys = if forget.keep_keys {
                    "its keys stay"
                } else {
                    "its keys go"
                };
                line(out, format_args!("  FORGET  {name}: no longer mirrored, {keys}"));
            }
            RecordRef::Marker(marker) => {
                let content = String::from_utf8_lossy(&marker.content).into_owned();
                line(
                    out,
                    format_args!("MARKER  at {}  {}", Lsn(marker.lsn), content.escape_debug()),
                );
            }
            RecordRef::Capture(capture) => {
                let index = self.by_oid.get(&capture.oid).copied().unwrap_or_default();
                let snapshot = &capture.snapshot;
                line(
                    out,
                    format_args!(
                        "CAPTURE {}  {} rows  snapshot {}:{}:{}",
                        self.name(index),
                        capture.rows().count(),
                        snapshot.xmin,
                        snapshot.xmax,
                        snapshot
                            .xip
                            .iter()
                            .map(u64::to_string)
                            .collect::<Vec<_>>()
                            .join(",")
                    ),
                );
            }
            RecordRef::Error { error, .. } => {
                let (table, reason) = (error.table.escape_debug(), error.reason.escape_debug());
                let key = error.key.escape_debug();
                line(
                    out,
                    format_args!("  ERROR   {table}  key {key}: {reason}  at {}", Lsn(error.lsn)),
                );
            }
        }
        Ok(())
    }

    fn row(
        &mut self,
        word: &str,
        relation: u32,
        tuple: &TupleRef<'_>,
        key_only: bool,
        out: &mut Vec<u8>,
    ) -> Result<(), WireError> {
        let Some(table) = self.tables.get(&relation) else {
            // INVARIANT I5 is the decoder's; a stream that breaks it is still worth looking at.
            let _ = write!(
                out,
                "  {word}  relation {relation}, which the stream has not defined"
            );
            return Ok(());
        };
        let _ = write!(out, "  {word}  {:<width$} ", table.name, width = self.width);
        values(table, tuple, key_only, self.full, &mut self.value, out)
    }

    fn relation(&mut self, relation: &pb::Relation, out: &mut Vec<u8>) -> Result<(), WireError> {
        let table = Table {
            name: format!("{}.{}", identifier(&relation.schema), identifier(&relation.name)),
            columns: relation
                .columns
                .iter()
                .map(|column| identifier(&column.name))
                .collect(),
            encodings: encodings(relation)?,
        };
        self.width = self.width.max(table.name.chars().count()).min(40);
        let mode = match relation.mode() {
            Mode::Mirror => "mirror".to_owned(),
            Mode::Cache => format!(
                "cache, on write {}",
                word(OnWrite::as_str_name(&relation.on_write()))
            ),
        };
        let _ = write!(
            out,
            "  TABLE   {}  {mode}, {}, key {}, columns ({})",
            table.name,
            word(ValueKind::as_str_name(&relation.value())),
            relation.key,
            table.columns.join(", ")
        );
        if relation.ttl_ms > 0 {
            let _ = write!(out, ", ttl {} ms", relation.ttl_ms);
        }
        if relation.announced {
            out.extend_from_slice(if relation.refresh {
                b", changed: refresh"
            } else {
                b", changed"
            });
        }
        out.push(b'\n');
        self.by_oid.insert(relation.oid, relation.index);
        self.tables.insert(relation.index, table);
        Ok(())
    }

    fn name(&self, index: u32) -> String {
        self.tables
            .get(&index)
            .map_or_else(|| format!("relation {index}"), |table| table.name.clone())
    }
}

fn line(out: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    // Writing to a Vec cannot fail.
    let _ = writeln!(out, "{text}");
}

fn word(name: &str) -> String {
    name.to_ascii_lowercase()
}

fn values(
    table: &Table,
    tuple: &TupleRef<'_>,
    key_only: bool,
    full: bool,
    scratch: &mut Vec<u8>,
    out: &mut Vec<u8>,
) -> Result<(), WireError> {
    for (name, datum) in table.columns.iter().zip(tuple.datums(&table.encodings)) {
        let datum = datum?;
        if key_only && datum == Datum::Null {
            continue;
        }
        out.push(b' ');
        out.extend_from_slice(name.as_bytes());
        out.push(b'=');
        match datum {
            Datum::Null => out.extend_from_slice(b"NULL"),
            Datum::Unchanged => out.extend_from_slice(b"(unchanged)"),
            datum => {
                scratch.clear();
                datum.write_text(scratch);
                value(scratch, full, out);
            }
        }
    }
    Ok(())
}

/// Where a frame of format=json has brought the reader. Only begin and commit records say.
pub fn json_position(bytes: &[u8]) -> Seen {
    let mut seen = Seen::default();
    for line in bytes.split(|byte| *byte == b'\n') {
        let Ok(serde_json::Value::Object(object)) = serde_json::from_slice(line) else {
            continue;
        };
        let lsn = |field: &str| {
            object
                .get(field)
                .and_then(|value| value.as_str())
                .and_then(|text| text.parse().ok())
        };
        match object.get("kind").and_then(|kind| kind.as_str()) {
            Some("begin") => seen.begins = lsn("commit_lsn"),
            Some("commit") => seen.done = lsn("end_lsn"),
            _ => {}
        }
    }
    seen
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use walmirror_proto::writer::{FrameWriter, TupleBuilder};

    fn users() -> pb::Relation {
        let column = |name: &str, encoding: Encoding| pb::Column {
            name: name.into(),
            encoding: encoding.into(),
            in_value: true,
            ..Default::default()
        };
        pb::Relation {
            index: 1,
            oid: 42,
            schema: "public".into(),
            name: "users".into(),
            key: "users:{id}".into(),
            columns: vec![
                column("id", Encoding::Int),
                column("Name", Encoding::Text),
                column("big", Encoding::Text),
            ],
            ..Default::default()
        }
    }

    fn tuple(id: i64, name: Option<&str>) -> TupleBuilder {
        let mut tuple = TupleBuilder::new();
        tuple.int(id);
        match name {
            Some(name) => tuple.text(name.as_bytes()),
            None => tuple.null(),
        }
        tuple
    }

    fn printed(frame: &FrameWriter) -> (String, Seen) {
        let mut out = Vec::new();
        let seen = TextPrinter::new(false).frame(frame.as_bytes(), &mut out).unwrap();
        (String::from_utf8(out).unwrap(), seen)
    }

    #[test]
    fn a_transaction_reads_like_a_report() {
        let mut frame = FrameWriter::new();
        frame.record(
            &pb::Begin {
                xid: 7,
                commit_lsn: 0x10,
                commit_time: 0,
            }
            .into(),
        );
        frame.record(&users().into());
        let mut row = tuple(1, Some("Ada L."));
        row.unchanged();
        frame.row(Kind::Insert, 1, &row, None);
        let (mut new, mut old) = (tuple(2, None), tuple(1, None));
        new.text(&[b'x'; 500]);
        old.null();
        frame.row(Kind::Update, 1, &new, Some(&old));
        frame.row(Kind::Delete, 1, &old, None);
        frame.record(&pb::Truncate { relations: vec![1] }.into());
        frame.record(
            &pb::Forget {
                oid: 42,
                keep_keys: false,
            }
            .into(),
        );
        frame.record(&pb::Commit { end_lsn: 0x20 }.into());
        let (text, seen) = printed(&frame);
        let want = format!(
            "BEGIN   xid 7  at 0/10  2000-01-01 00:00:00+00\n  \
             TABLE   public.users  mirror, hash, key users:{{id}}, columns (id, \"Name\", big)\n  \
             INSERT  public.users  id=1 \"Name\"='Ada L.' big=(unchanged)\n  \
             UPDATE  public.users  id=2 \"Name\"=NULL big={}…(500 bytes)  was id=1\n  \
             DELETE  public.users  id=1\n  \
             TRUNCATE  public.users\n  \
             FORGET  public.users: no longer mirrored, its keys go\n\
             COMMIT  3 rows  end 0/20\n",
            "x".repeat(120)
        );
        assert_eq!(text, want);
        assert_eq!(
            seen,
            Seen {
                begins: Some(Lsn(0x10)),
                done: Some(Lsn(0x20))
            }
        );
    }

    #[test]
    fn positions_are_found_in_json() {
        let seen = json_position(b"{\"kind\":\"commit\",\"end_lsn\":\"0/20\"}");
        assert_eq!(seen.done, Some(Lsn(0x20)));
        assert_eq!(
            json_position(b"{\"kind\":\"insert\",\"row\":{\"kind\":\"commit\"}}"),
            Seen::default()
        );
        assert_eq!(json_position(b"no json"), Seen::default());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = TextPrinter::new(false).frame(&bytes, &mut Vec::new());
            let _ = json_position(&bytes);
        }
    }
}
