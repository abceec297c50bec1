//! What capture knows in one backend: the queries that are running, their scans of cached tables, and the rows that wait
//! to be written to the WAL.

use prost::Message;
use walmirror_proto::pb;
use walmirror_proto::writer::TupleBuilder;

use super::seen;
use super::stats::{self, Counter};
use crate::encode::{self, Columns};
use crate::ffi::datum::Row;
use crate::ffi::memory::Context;
use crate::ffi::session::TextSession;
use crate::ffi::{executor, settings, shared};
use crate::plan::Plan;
use crate::tables::{Table, Tables};

/// A batch of rows is written to the WAL when it has grown to this many bytes, at the latest when the query has run.
const BATCH_BYTES: usize = 64 * 1024;

/// The capture state of a backend.
pub struct Session {
    tables: Tables,
    queries: Vec<Query>,
    row: Row,
    tuple: TupleBuilder,
    context: Context,
}

/// A query that reads cached tables.
struct Query {
    /// Which one: the address of its QueryDesc.
    id: usize,
    scans: Vec<Scan>,
    batches: Vec<Batch>,
}

/// A scan of a cached table.
#[derive(Debug, Clone, Copy)]
pub struct Scan {
    /// The address of its PlanState.
    pub node: usize,
    /// The function that runs the node when nobody captures.
    pub original: executor::ExecProcNode,
    /// `pg_class.oid` of what is scanned.
    pub table: u32,
    /// Rows that it has returned.
    rows: u64,
}

/// Rows of one table, encoded.
struct Batch {
    oid: u32,
    fingerprint: u64,
    /// `rows` fields of a Capture message: tag, length, Tuple.
    rows: Vec<u8>,
    count: u64,
}

/// What to do with a scan after one of its rows.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    Continue,
    /// It has returned as many rows as may be captured.
    Stop,
}

impl Session {
    /// A session without queries, whose caches live in `context`.
    pub fn new(context: Context) -> Self {
        Self {
            tables: Tables::new(context, false),
            queries: Vec::new(),
            row: Row::default(),
            tuple: TupleBuilder::new(),
            context: context.child(c"walmirror captured row"),
        }
    }

    /// Whether rows of a table are to be captured.
    pub fn captures(&mut self, table: u32) -> bool {
        matches!(self.tables.get_oid(table), Some(Table::Configured(plan)) if captured(plan))
    }

    /// A query starts that reads cached tables.
    pub fn start(&mut self, id: usize) {
        self.queries.push(Query {
            id,
            scans: Vec::new(),
            batches: Vec::new(),
        });
    }

    /// One of its scans is of a cached table.
    pub fn attach(&mut self, node: usize, original: executor::ExecProcNode, table: u32) {
        if let Some(query) = self.queries.last_mut() {
            query.scans.push(Scan {
                node,
                original,
                table,
                rows: 0,
            });
        }
    }

    /// The scan that a node is; the innermost query first.
    pub fn scan(&self, node: usize) -> Option<Scan> {
        self.queries
            .iter()
            .rev()
            .flat_map(|query| &query.scans)
            .find(|scan| scan.node == node)
            .copied()
    }

    /// A scan returned a row: captures it unless a rule says no.
    pub fn row(&mut self, node: usize, source: &executor::ScanSlot<'_>) -> Next {
        let Some(query) = self
            .queries
            .iter_mut()
            .rev()
            .find(|query| query.scans.iter().any(|scan| scan.node == node))
        else {
            return Next::Stop;
        };
        let Some(scan) = query.scans.iter_mut().find(|scan| scan.node == node) else {
            return Next::Stop;
        };
        scan.rows += 1;
        if scan.rows > settings::capture_max_rows() {
            stats::add(Counter::SkippedMaxRows, 1);
            return Next::Stop;
        }
        stats::add(Counter::RowsSeen, 1);
        let (block, offset) = source.place();
        let hash = seen::row_hash(executor::database(), scan.table, block, offset);
        if seen::check_and_mark(
            shared::seen(),
            hash,
            executor::statement_time_ms(),
            settings::capture_interval_ms(),
        ) {
            stats::add(Counter::SkippedRecent, 1);
            return Next::Continue;
        }
        let Some(Table::Configured(plan)) = self.tables.get_oid(scan.table) else {
            return Next::Stop;
        };
        let encoded = {
            let _entered = self.context.enter();
            let _session = TextSession::enter(plan.needs);
            executor::catching(|| {
                settings::failpoint(settings::Failpoint::CaptureEncode);
                source.read(&mut self.row, plan, settings::capture_max_bytes())
                    && encode::encode(plan, &self.row, None, Columns::All, &mut self.tuple).is_ok()
            })
        };
        self.context.reset();
        match encoded {
            Some(true) if self.tuple.encoded_len() <= settings::capture_max_bytes() => {
                query.add(plan, &self.tuple)
            }
            Some(_) => stats::add(Counter::SkippedMaxBytes, 1),
            None => stats::add(Counter::SkippedFailed, 1),
        }
        if query.batches.iter().map(|batch| batch.rows.len()).sum::<usize>() >= BATCH_BYTES {
            query.emit();
        }
        Next::Continue
    }

    /// A query has run, or returned as many rows as it was asked for: what it read goes into the WAL.
    pub fn emit(&mut self, id: usize) {
        if let Some(query) = self.queries.iter_mut().rev().find(|query| query.id == id) {
            query.emit();
        }
    }

    /// A query is over, well or with an error.
    pub fn end(&mut self, id: usize) {
        self.queries.retain(|query| query.id != id);
    }

    /// Whether no query captures.
    pub fn is_idle(&self) -> bool {
        self.queries.is_empty()
    }
}

/// Whether SELECTs of a table fill Redis.
fn captured(plan: &Plan) -> bool {
    plan.relation.mode() == pb::Mode::Cache || plan.relation.capture
}

impl Query {
    fn add(&mut self, plan: &Plan, tuple: &TupleBuilder) {
        let (oid, fingerprint) = (plan.relation.oid, plan.relation.fingerprint);
        let at = match self
            .batches
            .iter()
            .position(|batch| batch.oid == oid && batch.fingerprint == fingerprint)
        {
            Some(at) => at,
            None => {
                self.batches.push(Batch {
                    oid,
                    fingerprint,
                    rows: Vec::new(),
                    count: 0,
                });
                self.batches.len() - 1
            }
        };
        if let Some(batch) = self.batches.get_mut(at) {
            /// Field 4, length-delimited.
            const ROWS: u8 = 4 << 3 | 2;
            batch.rows.push(ROWS);
            prost::encoding::encode_varint(tuple.encoded_len() as u64, &mut batch.rows);
            tuple.write_tuple(&mut batch.rows);
            batch.count += 1;
        }
    }

    fn emit(&mut self) {
        for batch in std::mem::take(&mut self.batches) {
            // Meanwhile the transaction may have written, by a function that the query called.
            if executor::transaction_wrote() {
                stats::add(Counter::SkippedWrote, 1);
                continue;
            }
            let head = pb::Capture {
                oid: batch.oid,
                fingerprint: batch.fingerprint,
                snapshot: Some(executor::snapshot(self.id)),
                rows: Vec::new(),
            };
            let mut message = head.encode_to_vec();
            message.extend_from_slice(&batch.rows);
            if executor::catching(|| executor::write_capture(&message)).is_some() {
                stats::add(Counter::RowsEmitted, batch.count);
                stats::add(Counter::MessagesEmitted, 1);
                stats::add(Counter::BytesEmitted, message.len() as u64);
            } else {
                stats::add(Counter::SkippedFailed, batch.count);
            }
        }
    }
}
