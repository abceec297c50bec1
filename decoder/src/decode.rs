//! Changes into records into frames: what the output plugin's callbacks do, without their C.
//!
//! BEGIN is lazy: a transaction that touches no configured table sends nothing. Many records travel in one write: a frame
//! is sent when it has grown to `batch_bytes`, at commit, and before and after a marker.
//!
//! INVARIANT I5: a Relation record precedes the first row of each version of a table.
//! INVARIANT I6: nothing here waits for the sink beyond the socket.

use std::collections::HashMap;

use prost::Message;
use walmirror_proto::key::KeyTemplate;
use walmirror_proto::pb::{self, Kind};
use walmirror_proto::row::{self, Datum, TupleRef};
use walmirror_proto::writer::{FrameWriter, TupleBuilder};

use crate::encode::{self, Columns, EncodeError};
use crate::error::Refusal;
use crate::ffi::datum::{Row, Tuple};
use crate::ffi::memory::Context;
use crate::ffi::relation::Rel;
use crate::ffi::session::TextSession;
use crate::json::JsonLines;
use crate::options::{Format, Options};
use crate::plan::{self, Plan};
use crate::tables::{Table, Tables};

pub mod ddl_message;

use ddl_message::DdlMessage;

/// Where frames go: the walsender, or the result of an SQL function.
pub trait Output {
    /// Sends one frame (`OutputPluginWrite`).
    fn write(&mut self, frame: &[u8]);
    /// Tells the client that the stream has come this far though nothing was sent (`OutputPluginUpdateProgress`).
    fn progress(&mut self);
}

/// The transaction that is being decoded.
#[derive(Debug, Clone, Copy, Default)]
pub struct Transaction {
    /// The top-level transaction id, without epoch.
    pub xid: u32,
    /// Where its commit record starts.
    pub commit_lsn: u64,
    /// Microseconds since 2000-01-01 UTC.
    pub commit_time: i64,
}

/// What a change did, with its tuples.
#[derive(Clone, Copy)]
pub enum Change {
    Insert(Tuple),
    Update { old: Option<Tuple>, new: Tuple },
    Delete(Tuple),
}

/// Before PostgreSQL 16 only the plugin keeps the connection alive while it skips changes; about this many make a sign
/// of life due.
const SKIPPED_PER_PROGRESS: u32 = 100;

/// The state of one decoding session.
pub struct Decoder {
    options: Options,
    tables: Tables,
    relations: Relations,
    frame: FrameWriter,
    transaction: Transaction,
    /// Whether the Begin record of the transaction was written.
    begun: bool,
    skipped: u32,
    buffers: Buffers,
    json: Option<JsonLines>,
}

/// Reused from row to row.
struct Buffers {
    context: Context,
    new_row: Row,
    old_row: Row,
    new: TupleBuilder,
    old_key: TupleBuilder,
    new_key: TupleBuilder,
}

/// The relations that the client was told of.
#[derive(Default)]
struct Relations {
    /// `index - 1` by the oid of the labelled table.
    by_oid: HashMap<u32, usize>,
    /// The identity of the definition that was sent last, by `index - 1`.
    sent: Vec<Option<u64>>,
}

impl Decoder {
    /// A decoder whose caches live in `context`.
    pub fn new(options: Options, context: Context) -> Self {
        let json = (options.format == Format::Json).then(JsonLines::default);
        Self {
            options,
            tables: Tables::new(context, true),
            relations: Relations::default(),
            frame: FrameWriter::new(),
            transaction: Transaction::default(),
            begun: false,
            skipped: 0,
            buffers: Buffers {
                context: context.child(c"walmirror row"),
                new_row: Row::default(),
                old_row: Row::default(),
                new: TupleBuilder::new(),
                old_key: TupleBuilder::new(),
                new_key: TupleBuilder::new(),
            },
            json,
        }
    }

    /// Whether changes of this replication origin are left out; 0 is this server itself.
    pub fn filters_origin(&self, origin: u16) -> bool {
        self.options.origin == crate::options::Origin::None && origin != 0
    }

    /// A transaction starts. Nothing is sent yet.
    pub fn begin(&mut self, transaction: Transaction) {
        self.transaction = transaction;
        self.begun = false;
        // What an aborted decoding left behind belongs to no frame.
        self.frame.clear();
    }

    /// A row changed.
    pub fn change(&mut self, output: &mut impl Output, table: &Rel, change: Change, lsn: u64) {
        let plan = match self.tables.get(table) {
            Table::Unconfigured => return self.skip(output),
            Table::Configured(plan) if !self.options.wants(&plan.relation.schema, &plan.relation.name) => {
                return self.skip(output);
            }
            Table::Configured(plan) => plan,
            Table::Broken(refusal) => {
                let error = broken(table, refusal, lsn);
                self.start();
                return self.record(output, Kind::Error, |record| record.error = Some(error));
            }
        };
        if !self.begun {
            begin_record(&mut self.frame, &self.transaction);
            self.begun = true;
        }
        let index = self.relations.define(plan, &mut self.frame);
        if let Err(error) = self.buffers.write(plan, table, change, index, &mut self.frame) {
            let key = self.buffers.key_text(plan, change);
            let record = pb::Record {
                kind: Kind::Error as i32,
                relation: index,
                error: Some(pb::Error {
                    table: qualified(&plan.relation),
                    key,
                    reason: error.reason,
                    lsn,
                }),
                ..Default::default()
            };
            self.frame.record(&record);
            // Better no key than one that holds what the row no longer is.
            self.buffers.write_deletes(plan, change, index, &mut self.frame);
        }
        if self.frame.len() >= self.options.batch_bytes || self.json.is_some() {
            self.flush(output);
        }
    }

    /// Tables were truncated. The list holds partitions too; a partitioned table's rows are all gone only if each of its
    /// partitions is in it, which is so when the parent is.
    pub fn truncate(&mut self, output: &mut impl Output, tables: &[Rel], lsn: u64) {
        let mut whole = Vec::new();
        let mut parts = Vec::new();
        for table in tables {
            let plan = match self.tables.get(table) {
                Table::Configured(plan) if self.options.wants(&plan.relation.schema, &plan.relation.name) => {
                    plan
                }
                Table::Configured(_) | Table::Unconfigured => continue,
                Table::Broken(refusal) => {
                    let error = broken(table, refusal, lsn);
                    self.start();
                    self.record(output, Kind::Error, |record| record.error = Some(error));
                    continue;
                }
            };
            if !self.begun {
                begin_record(&mut self.frame, &self.transaction);
                self.begun = true;
            }
            let index = self.relations.define(plan, &mut self.frame);
            if plan.relation.oid == u32::from(table.oid()) {
                whole.push(index);
            } else {
                parts.push((index, plan.relation.clone()));
            }
        }
        if !whole.is_empty() {
            let relations = whole.clone();
            self.record(output, Kind::Truncate, |record| {
                record.truncate = Some(pb::Truncate { relations })
            });
        }
        parts.retain(|(index, _)| !whole.contains(index));
        parts.dedup_by_key(|(index, _)| *index);
        for (index, relation) in parts {
            // One partition's rows are gone, and their keys are not told by the WAL: the table is to be compared anew.
            let relation = pb::Relation {
                index,
                announced: true,
                refresh: true,
                ..relation
            };
            self.record(output, Kind::Relation, |record| {
                record.relation_def = Some(relation)
            });
        }
    }

    /// The transaction is over.
    pub fn commit(&mut self, output: &mut impl Output, end_lsn: u64) {
        if !self.begun {
            output.progress();
            return;
        }
        self.begun = false;
        self.record(output, Kind::Commit, |record| {
            record.commit = Some(pb::Commit { end_lsn })
        });
        self.flush(output);
    }

    /// A marker that the sink wrote; outside transactions.
    pub fn marker(&mut self, output: &mut impl Output, content: &[u8], lsn: u64) {
        let content = content.to_vec();
        self.record(output, Kind::Marker, |record| {
            record.marker = Some(pb::Marker { content, lsn })
        });
        self.flush(output);
    }

    /// Rows that a SELECT read; outside transactions. Anybody may write logical messages: what is no Capture is left out.
    pub fn capture(&mut self, output: &mut impl Output, content: &[u8]) {
        let Ok(capture) = pb::Capture::decode(content) else {
            return;
        };
        self.record(output, Kind::Capture, |record| {
            record.capture = Some(capture);
        });
        self.flush(output);
    }

    /// DDL changed a table that has, or had, a label. Told by the event triggers of the extension.
    pub fn ddl(&mut self, output: &mut impl Output, message: &DdlMessage) {
        let table = if message.dropped || message.keep_keys {
            None
        } else {
            Rel::open_historic(plan::oid(message.oid))
        };
        let known = table.as_ref().map(|table| self.tables.get(table));
        let relation = match known {
            Some(Table::Configured(plan)) => Some(plan.relation.clone()),
            Some(Table::Broken(_)) => return,
            Some(Table::Unconfigured) | None => None,
        };
        let Some(relation) = relation else {
            self.start();
            let forget = pb::Forget {
                oid: message.oid,
                keep_keys: message.keep_keys,
            };
            return self.record(output, Kind::Forget, |record| record.forget = Some(forget));
        };
        if !self.options.wants(&relation.schema, &relation.name) {
            return;
        }
        self.start();
        let index = self.relations.index(relation.oid);
        // The announced definition also serves the rows that follow.
        self.relations.sent_now(index, &relation);
        let relation = pb::Relation {
            index,
            announced: true,
            refresh: message.refresh,
            ..relation
        };
        self.record(output, Kind::Relation, |record| {
            record.relation_def = Some(relation)
        });
    }

    /// Writes the Begin record if it is still missing.
    fn start(&mut self) {
        if !self.begun {
            begin_record(&mut self.frame, &self.transaction);
            self.begun = true;
        }
    }

    fn record(&mut self, output: &mut impl Output, kind: Kind, fill: impl FnOnce(&mut pb::Record)) {
        let mut record = pb::Record {
            kind: kind as i32,
            ..Default::default()
        };
        fill(&mut record);
        self.frame.record(&record);
        if self.json.is_some() || self.frame.len() >= self.options.batch_bytes {
            self.flush(output);
        }
    }

    fn skip(&mut self, output: &mut impl Output) {
        self.skipped += 1;
        if self.skipped >= SKIPPED_PER_PROGRESS {
            self.skipped = 0;
            output.progress();
        }
    }

    fn flush(&mut self, output: &mut impl Output) {
        if !self.frame.is_empty() {
            match &mut self.json {
                None => output.write(self.frame.as_bytes()),
                Some(json) => json.render(self.frame.as_bytes(), |line| output.write(line)),
            }
        }
        self.frame.clear();
        self.skipped = 0;
    }
}

impl Relations {
    /// The index of a table, which stays with it for the life of the connection.
    fn index(&mut self, oid: u32) -> u32 {
        let next = self.sent.len();
        let at = *self.by_oid.entry(oid).or_insert(next);
        if at == next {
            self.sent.push(None);
        }
        u32::try_from(at + 1).unwrap_or(u32::MAX)
    }

    /// Writes the table's definition unless it stands in the stream already; returns its index.
    #[inline]
    fn define(&mut self, plan: &mut Plan, frame: &mut FrameWriter) -> u32 {
        let known = plan
            .index
            .and_then(|index| self.sent.get(index as usize - 1).copied());
        if let (Some(index), Some(Some(identity))) = (plan.index, known)
            && identity == plan.identity
        {
            return index;
        }
        let index = self.index(plan.relation.oid);
        plan.index = Some(index);
        let at = index as usize - 1;
        if self.sent.get(at).copied().flatten() != Some(plan.identity) {
            let relation = pb::Relation {
                index,
                ..plan.relation.clone()
            };
            frame.record(&pb::Record {
                kind: Kind::Relation as i32,
                relation_def: Some(relation),
                ..Default::default()
            });
            if let Some(sent) = self.sent.get_mut(at) {
                *sent = Some(plan.identity);
            }
        }
        index
    }

    fn sent_now(&mut self, index: u32, relation: &pb::Relation) {
        if let Some(sent) = self.sent.get_mut(index as usize - 1) {
            *sent = Some(plan::identity(relation));
        }
    }
}

impl Buffers {
    /// Encodes a change and appends its record to the frame.
    fn write(
        &mut self,
        plan: &mut Plan,
        table: &Rel,
        change: Change,
        index: u32,
        frame: &mut FrameWriter,
    ) -> Result<(), EncodeError> {
        let descriptor = table.descriptor();
        let entered = self.context.enter();
        let session = TextSession::enter(plan.needs);
        let result = match change {
            Change::Insert(new) => {
                self.new_row.deform(new, &descriptor);
                encode::encode(plan, &self.new_row, None, Columns::All, &mut self.new)
                    .map(|()| frame.row(Kind::Insert, index, &self.new, None))
            }
            Change::Delete(old) => {
                self.old_row.deform(old, &descriptor);
                encode::encode(plan, &self.old_row, None, Columns::Key, &mut self.old_key)
                    .map(|()| frame.row(Kind::Delete, index, &self.old_key, None))
            }
            Change::Update { old: None, new } => {
                self.new_row.deform(new, &descriptor);
                encode::encode(plan, &self.new_row, None, Columns::All, &mut self.new)
                    .map(|()| frame.row(Kind::Update, index, &self.new, None))
            }
            Change::Update { old: Some(old), new } => {
                self.new_row.deform(new, &descriptor);
                self.old_row.deform(old, &descriptor);
                self.encode_update(plan)
                    .map(|moved| frame.row(Kind::Update, index, &self.new, moved.then_some(&self.old_key)))
            }
        };
        drop(session);
        drop(entered);
        self.context.reset();
        result
    }

    /// Encodes an update whose old row, or old key, is known; tells whether the key changed.
    fn encode_update(&mut self, plan: &mut Plan) -> Result<bool, EncodeError> {
        encode::encode(
            plan,
            &self.new_row,
            Some(&self.old_row),
            Columns::All,
            &mut self.new,
        )?;
        encode::encode(plan, &self.old_row, None, Columns::Key, &mut self.old_key)?;
        encode::encode(
            plan,
            &self.new_row,
            Some(&self.old_row),
            Columns::Key,
            &mut self.new_key,
        )?;
        Ok(self.old_key != self.new_key)
    }

    /// Deletes the keys of a row that could not be encoded: where it would be, and where it was.
    fn write_deletes(&mut self, plan: &mut Plan, change: Change, index: u32, frame: &mut FrameWriter) {
        let entered = self.context.enter();
        let session = TextSession::enter(plan.needs);
        if let Change::Update { old: Some(_), .. } = change
            && encode::encode(plan, &self.old_row, None, Columns::Key, &mut self.old_key).is_ok()
        {
            frame.row(Kind::Delete, index, &self.old_key, None);
        }
        let (row, old) = match change {
            Change::Delete(_) => (&self.old_row, None),
            Change::Update { old: Some(_), .. } => (&self.new_row, Some(&self.old_row)),
            Change::Insert(_) | Change::Update { old: None, .. } => (&self.new_row, None),
        };
        if encode::encode(plan, row, old, Columns::Key, &mut self.new_key).is_ok() {
            frame.row(Kind::Delete, index, &self.new_key, None);
        }
        drop(session);
        drop(entered);
        self.context.reset();
    }

    /// The key of a row that could not be encoded, as far as it can be told; for the Error record.
    fn key_text(&mut self, plan: &mut Plan, change: Change) -> String {
        let row = if matches!(change, Change::Delete(_)) {
            &self.old_row
        } else {
            &self.new_row
        };
        let _entered = self.context.enter();
        let _session = TextSession::enter(plan.needs);
        if encode::encode(plan, row, None, Columns::Key, &mut self.new_key).is_err() {
            return String::new();
        }
        let mut tuple = Vec::new();
        self.new_key.write_tuple(&mut tuple);
        render_key(&plan.relation, &tuple).unwrap_or_default()
    }
}

/// The key of an encoded row; `None` if it has none.
pub fn render_key(relation: &pb::Relation, tuple: &[u8]) -> Option<String> {
    let template = KeyTemplate::parse(&relation.key).ok()?;
    let encodings = row::encodings(relation).ok()?;
    let values: Vec<Datum<'_>> = TupleRef::parse(tuple)
        .ok()?
        .datums(&encodings)
        .collect::<Result<_, _>>()
        .ok()?;
    let columns: Vec<Datum<'_>> = template
        .placeholders()
        .iter()
        .map(|name| key_column(relation, &values, name))
        .collect::<Option<_>>()?;
    if columns
        .iter()
        .any(|value| matches!(value, Datum::Null | Datum::Unchanged))
    {
        return None;
    }
    let mut key = Vec::new();
    template
        .render(
            |at, out| {
                if let Some(value) = columns.get(at) {
                    value.write_text(out)
                }
            },
            &mut key,
        )
        .ok()?;
    Some(String::from_utf8_lossy(&key).into_owned())
}

/// The value that the key takes for a column: the one that is there for the key alone, if there is one.
fn key_column<'a>(relation: &pb::Relation, values: &[Datum<'a>], name: &str) -> Option<Datum<'a>> {
    let named = || {
        relation
            .columns
            .iter()
            .zip(values)
            .filter(|(column, _)| column.name == name)
    };
    named()
        .find(|(column, _)| !column.in_value)
        .or_else(|| named().next())
        .map(|(_, value)| *value)
}

fn begin_record(frame: &mut FrameWriter, transaction: &Transaction) {
    let begin = pb::Begin {
        xid: crate::ffi::output_plugin::full_xid(transaction.xid),
        commit_lsn: transaction.commit_lsn,
        commit_time: transaction.commit_time,
    };
    frame.record(&pb::Record {
        kind: Kind::Begin as i32,
        begin: Some(begin),
        ..Default::default()
    });
}

fn qualified(relation: &pb::Relation) -> String {
    format!("{}.{}", relation.schema, relation.name)
}

fn broken(table: &Rel, refusal: &Refusal, lsn: u64) -> pb::Error {
    pb::Error {
        table: format!("{}.{}", table.schema(), table.name()),
        key: String::new(),
        reason: refusal.message.clone(),
        lsn,
    }
}
