//! Changes into records into frames: what the output plugin's callbacks do, without their C.
//!
//! BEGIN is lazy: a transaction that touches no configured table sends nothing. Many records travel in one write: a frame
//! is sent when it has grown to `batch_bytes`, at commit, and before and after a marker.
//!
//! INVARIANT I5: a Relation record precedes the first row of each version of a table.
//! INVARIANT I6: nothing here waits for the sink beyond the socket.

use prost::Message;
use walmirror_proto::pb::{self, Kind};
use walmirror_proto::writer::FrameWriter;

use crate::error::Refusal;
use crate::ffi::datum::Tuple;
use crate::ffi::memory::Context;
use crate::ffi::relation::Rel;
use crate::json::JsonLines;
use crate::options::{Format, Options};
use crate::plan;
use crate::tables::{Table, Tables};

mod buffers;
pub mod ddl_message;
mod relations;

use buffers::Buffers;
use ddl_message::DdlMessage;
use relations::Relations;

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
            buffers: Buffers::new(context),
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
