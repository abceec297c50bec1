//! Changes into records into frames: what the output plugin's callbacks do, without their C.
//!
//! BEGIN is lazy: a transaction that touches no configured table sends nothing. Many records travel in one write: a frame
//! is sent when it has grown to `batch_bytes`, at commit, and before and after a marker.
//!
//! With `streaming=on` a transaction that has outgrown `logical_decoding_work_mem` comes in parts while it is in progress, and
//! Postgres does not write it to disk and read it back. Its changes name the subtransaction that did them, so that
//! the client can leave out what was rolled back.
//!
//! INVARIANT I5: a Relation record precedes the first row of each version of a table.
//! INVARIANT I6: nothing here waits for the sink beyond the socket.
//! INVARIANT I11: the same WAL always gives the same transactions, as all that is looked at is the WAL and the catalogs as of it.

use walmirror_proto::frame::CaptureRef;
use walmirror_proto::pb::{self, Kind};
use walmirror_proto::writer::FrameWriter;

use crate::error::Refusal;
use crate::ffi::datum::Tuple;
use crate::ffi::failure;
use crate::ffi::memory::Context;
use crate::ffi::output_plugin::full_xid;
use crate::ffi::relation::{self, Rel};
use crate::json::JsonLines;
use crate::options::{Format, Options};
use crate::plan::{self, Plan};
use crate::tables::{Table, Tables};

mod buffers;
pub mod ddl_message;
mod opening;
mod relations;

use buffers::Buffers;
use ddl_message::DdlMessage;
use opening::Opening;
use relations::Relations;

pub use opening::Transaction;

/// Where frames go: the walsender, or the result of an SQL function.
pub trait Output {
    /// Sends one frame (`OutputPluginWrite`).
    fn write(&mut self, frame: &[u8]);
    /// Tells the client that the stream has come this far though nothing was sent (`OutputPluginUpdateProgress`).
    fn progress(&mut self);
}

/// What a change did, with its tuples.
#[derive(Clone, Copy)]
pub enum Change {
    Insert(Tuple),
    Update {
        old: Option<Tuple>,
        new: Tuple,
    },
    Delete(Tuple),
    /// A DELETE whose old row is not in the WAL.
    Lost,
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
    opening: Opening,
    skipped: u32,
    /// Tables of which this transaction changed a row without a word of the key that it had, or that their label does not fit. In a
    /// part: which the subtransaction `lost_by` changed so, as what it told goes with it when it is rolled back.
    lost: Vec<u32>,
    lost_by: u32,
    buffers: Buffers,
    /// For what the catalogs are asked once a transaction.
    look_ups: Context,
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
            opening: Opening::default(),
            skipped: 0,
            lost: Vec::new(),
            lost_by: 0,
            buffers: Buffers::new(context),
            look_ups: context.child(c"walmirror look-ups"),
            json,
        }
    }

    /// Whether changes of this replication origin are left out; 0 is this server itself.
    pub fn filters_origin(&self, origin: u16) -> bool {
        self.options.origin == crate::options::Origin::None && origin != 0
    }

    /// A transaction starts. Nothing is sent yet.
    pub fn begin(&mut self, transaction: Transaction) {
        self.opening.begin(transaction);
        self.relations.leave_frame();
        // What an aborted decoding left behind belongs to no frame.
        self.frame.clear();
        self.lost.clear();
    }

    /// A part of a transaction in progress starts.
    pub fn part(&mut self, xid: u32) {
        self.opening.enter(Some(xid));
        self.frame.clear();
        self.lost.clear();
    }

    /// The part is over.
    pub fn part_end(&mut self, output: &mut impl Output) {
        self.flush(output);
        self.opening.enter(None);
        self.relations.leave_frame();
    }

    /// A row changed. `xid` is that of the transaction or subtransaction that did it.
    pub fn change(&mut self, output: &mut impl Output, table: &Rel, change: Change, xid: u32, lsn: u64) {
        let plan = match self.tables.get(table) {
            Table::Unconfigured => return self.skip(output),
            Table::Configured(plan) if !self.options.wants(&plan.relation.schema, &plan.relation.name) => {
                return self.skip(output);
            }
            Table::Configured(plan) if lacks_key(plan, change) => {
                let relation = plan.relation.clone();
                self.lost(output, &relation, xid, lsn);
                match self.tables.get(table) {
                    Table::Configured(plan) if !matches!(change, Change::Lost) => plan,
                    _ => return,
                }
            }
            Table::Configured(plan) => plan,
            Table::Broken(_) => return self.broken(output, table, xid, lsn),
        };
        self.opening.start(&mut self.frame, &mut self.relations, xid);
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
                    oid: 0,
                    refresh: false,
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

    /// A row of the table changed, and the WAL does not tell which key it had: the table is to be compared anew.
    #[cold]
    fn lost(&mut self, output: &mut impl Output, relation: &pb::Relation, xid: u32, lsn: u64) {
        if self.is_told(relation.oid, xid) {
            return;
        }
        let error = pb::Error {
            table: qualified(relation),
            key: String::new(),
            oid: relation.oid,
            reason: "the WAL of an UPDATE or DELETE does not tell the key, as it is not in the replica identity: the table is compared anew"
                .to_owned(),
            lsn,
            refresh: false,
        };
        self.record(output, xid, error);
    }

    /// A table that its label does not fit, if it is one. Each row of it comes here, and is told of once.
    #[cold]
    fn broken(&mut self, output: &mut impl Output, table: &Rel, xid: u32, lsn: u64) {
        if !matches!(self.tables.get(table), Table::Broken(_)) {
            return;
        }
        if self.is_told(u32::from(table.oid()), xid) {
            return self.skip(output);
        }
        match self.misfit(table, lsn) {
            Some(error) => self.record(output, xid, error),
            None => self.skip(output),
        }
    }

    /// Why the label of a table does not fit it, if the client wants to know. What the catalogs say takes memory that only the end of the
    /// transaction frees, so that they are asked in memory of its own.
    #[cold]
    fn misfit(&mut self, table: &Rel, lsn: u64) -> Option<pb::Error> {
        let entered = self.look_ups.enter();
        let wanted = self.wants(table);
        let error = match self.tables.get(table) {
            Table::Broken(refusal) if wanted => Some(broken(table, refusal, lsn)),
            _ => None,
        };
        drop(entered);
        self.look_ups.reset();
        error
    }

    /// Whether the client wants the table that the rows of this one appear under.
    #[cold]
    fn wants(&self, table: &Rel) -> bool {
        let root = relation::labelled(table.oid()).and_then(Rel::open_historic);
        let root = root.as_ref().unwrap_or(table);
        self.options.wants(&root.schema(), &root.name())
    }

    /// Whether this transaction has told of this table already; from here on it has.
    fn is_told(&mut self, oid: u32, xid: u32) -> bool {
        if self.opening.is_part() && self.lost_by != xid {
            self.lost.clear();
            self.lost_by = xid;
        }
        let is_told = self.lost.contains(&oid);
        if !is_told {
            self.lost.push(oid);
        }
        is_told
    }

    /// Announces that the table is to be compared anew.
    fn refresh(&mut self, output: &mut impl Output, xid: u32, relation: pb::Relation) {
        self.opening.start(&mut self.frame, &mut self.relations, xid);
        let index = self.relations.index(relation.oid);
        // The announced definition also serves the rows that follow.
        self.relations.sent_now(index, &relation);
        let relation = pb::Relation {
            index,
            announced: true,
            refresh: true,
            ..relation
        };
        self.record(output, xid, relation);
    }

    /// Tables were truncated. The list holds partitions too; a partitioned table's rows are all gone only if each of its
    /// partitions is in it, which is so when the parent is.
    pub fn truncate(&mut self, output: &mut impl Output, tables: &[Rel], xid: u32, lsn: u64) {
        for table in tables {
            self.broken(output, table, xid, lsn);
        }
        let (mut whole, mut indexes, mut parts) = (Vec::new(), Vec::new(), Vec::new());
        for table in tables {
            let Table::Configured(plan) = self.tables.get(table) else {
                continue;
            };
            if !self.options.wants(&plan.relation.schema, &plan.relation.name) {
                continue;
            }
            if plan.relation.oid != u32::from(table.oid()) {
                parts.push(plan.relation.clone());
                continue;
            }
            self.opening.start(&mut self.frame, &mut self.relations, xid);
            whole.push(plan.relation.oid);
            indexes.push(self.relations.define(plan, &mut self.frame));
        }
        if !indexes.is_empty() {
            self.record(output, xid, pb::Truncate { relations: indexes });
        }
        parts.retain(|relation| !whole.contains(&relation.oid));
        parts.dedup_by_key(|relation| relation.oid);
        for relation in parts {
            // One partition's rows are gone, and their keys are not told by the WAL.
            self.refresh(output, xid, relation);
        }
    }

    /// The transaction is over.
    pub fn commit(&mut self, output: &mut impl Output, end_lsn: u64) {
        if self.opening.end() {
            self.last(output, pb::Commit { end_lsn });
        } else {
            output.progress();
        }
    }

    /// A transaction that came in parts has committed. `subtransactions` belong to it.
    pub fn late_commit(
        &mut self,
        output: &mut impl Output,
        transaction: Transaction,
        end_lsn: u64,
        subtransactions: impl Iterator<Item = u32>,
    ) {
        let Some(mut sent) = self.opening.forget(transaction.xid) else {
            return output.progress();
        };
        // Postgres does not tell of each that was rolled back: not of one whose changes were spilled before they were sent
        // (ReorderBufferTruncateTXN notes as sent what has changes in memory).
        sent.remove(&transaction.xid);
        for sub_xid in subtransactions {
            sent.remove(&sub_xid);
        }
        for sub_xid in sent {
            self.frame.record(&rollback(transaction.xid, sub_xid).into());
            if self.frame.len() >= self.options.batch_bytes {
                self.flush(output);
            }
        }
        let commit = pb::LateCommit {
            begin: Some(transaction.into()),
            commit: Some(pb::Commit { end_lsn }),
        };
        self.last(output, commit);
    }

    /// A transaction of which parts may have been sent was rolled back, or a subtransaction of it.
    pub fn rollback(&mut self, output: &mut impl Output, xid: u32, sub_xid: u32) {
        let was_sent = if xid == sub_xid {
            self.opening.forget(xid).is_some()
        } else {
            self.opening.forget_part(xid, sub_xid)
        };
        if was_sent {
            self.last(output, rollback(xid, sub_xid));
        }
    }

    /// A marker that the sink wrote; outside transactions.
    pub fn marker(&mut self, output: &mut impl Output, content: &[u8], lsn: u64) {
        if self.frame.marker(content, lsn).is_err() {
            failure::out_of_memory(content.len());
        }
        self.flush(output);
    }

    /// Rows that a SELECT read; outside transactions. Anybody may write logical messages: what is no Capture is left out.
    pub fn capture(&mut self, output: &mut impl Output, content: &[u8]) {
        if CaptureRef::parse(content).is_err() {
            return;
        }
        if self.frame.capture(content).is_err() {
            failure::out_of_memory(content.len());
        }
        self.flush(output);
    }

    /// DDL changed a table that has, or had, a label. Told by the event triggers of the extension.
    pub fn ddl(&mut self, output: &mut impl Output, message: &DdlMessage, xid: u32, lsn: u64) {
        let table = if message.dropped || message.keep_keys {
            None
        } else {
            Rel::open_historic(plan::oid(message.oid))
        };
        let known = table.as_ref().map(|table| self.tables.get(table));
        let relation = match known {
            Some(Table::Configured(plan)) => Some(plan.relation.clone()),
            Some(Table::Broken(_)) => {
                // The label of before may come back, and nothing else would tell of this then.
                let misfit = table.filter(|_| message.refresh);
                if let Some(error) = misfit.and_then(|table| self.misfit(&table, lsn)) {
                    let error = pb::Error {
                        refresh: true,
                        ..error
                    };
                    self.record(output, xid, error);
                }
                return;
            }
            Some(Table::Unconfigured) | None => None,
        };
        let Some(relation) = relation else {
            let forget = pb::Forget {
                oid: message.oid,
                keep_keys: message.keep_keys,
            };
            return self.record(output, xid, forget);
        };
        if !self.options.wants(&relation.schema, &relation.name) {
            return;
        }
        self.opening.start(&mut self.frame, &mut self.relations, xid);
        let index = self.relations.index(relation.oid);
        // The announced definition also serves the rows that follow.
        self.relations.sent_now(index, &relation);
        let relation = pb::Relation {
            index,
            announced: true,
            refresh: message.refresh,
            ..relation
        };
        self.record(output, xid, relation);
    }

    /// Writes a record of a transaction that is no row.
    fn record(&mut self, output: &mut impl Output, xid: u32, record: impl Into<pb::Record>) {
        self.opening.start(&mut self.frame, &mut self.relations, xid);
        self.frame.record(&record.into());
        if self.json.is_some() || self.frame.len() >= self.options.batch_bytes {
            self.flush(output);
        }
    }

    /// Writes a record that ends a transaction, or stands between transactions.
    fn last(&mut self, output: &mut impl Output, record: impl Into<pb::Record>) {
        self.frame.record(&record.into());
        self.flush(output);
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

fn rollback(xid: u32, sub_xid: u32) -> pb::Rollback {
    pb::Rollback {
        xid: full_xid(xid),
        sub_xid: full_xid(sub_xid),
    }
}

/// Whether a change does not tell which key the row had before.
fn lacks_key(plan: &Plan, change: Change) -> bool {
    match change {
        Change::Lost => true,
        Change::Update { .. } | Change::Delete(_) => !plan.identified,
        Change::Insert(_) => false,
    }
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
        oid: relation::labelled(table.oid()).map_or(0, u32::from),
        refresh: false,
    }
}
