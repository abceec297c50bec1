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
use crate::ffi::{flusher, query, scan, settings, shared};
use crate::plan::Plan;
use crate::tables::{Table, Tables};

/// A batch of rows is written to the WAL when it has grown to this many bytes, at the latest when the query has run.
const BATCH_BYTES: usize = 64 * 1024;

/// Rows that a query is asked for one by one wait for each other, for so long: as long as others for their flush.
const WAIT_US: i64 = 10_000;

/// What stands before a row in its batch, at most: a tag and a length.
const ROW_HEADER_BYTES: usize = 11;

/// Between queries no buffer keeps more than this.
const KEPT_BYTES: usize = 16 * 1024;
/// Queries within queries are rarely deeper.
const SPARE_QUERIES: usize = 4;

/// The capture state of a backend.
pub struct Session {
    tables: Tables,
    queries: Vec<Query>,
    /// Of queries that are over, for those that come: a small query shall allocate nothing.
    spare: Vec<Query>,
    row: Row,
    tuple: TupleBuilder,
    message: Vec<u8>,
    context: Context,
}

/// A query that reads cached tables.
#[derive(Default)]
struct Query {
    /// Which one: the address of its QueryDesc.
    id: usize,
    scans: Vec<Scan>,
    /// The first `filled` hold rows; the others only lend their memory.
    batches: Vec<Batch>,
    filled: usize,
    /// When it began, in milliseconds since 2000-01-01. The client's statement may be a procedure that runs for hours.
    began_ms: u64,
    /// When a row was first seen to wait there.
    waiting_since_us: Option<i64>,
    /// Whether its rows go to nobody.
    left_out: bool,
}

/// A scan of a cached table.
#[derive(Debug, Clone, Copy)]
pub struct Scan {
    /// The address of its PlanState.
    pub node: usize,
    /// The function that runs the node when nobody captures.
    pub original: scan::ExecProcNode,
    /// `pg_class.oid` of what is scanned.
    pub table: u32,
    /// How long the keys of its rows live; `u64::MAX`: for ever.
    ttl_ms: u64,
    /// Rows that it has returned.
    rows: u64,
}

/// Rows of one table, encoded.
#[derive(Default)]
struct Batch {
    oid: u32,
    fingerprint: u64,
    /// `rows` fields of a Capture message: tag, length, Tuple.
    rows: Vec<u8>,
    /// The rows' marks in the recently-captured table.
    marks: Vec<Mark>,
}

/// That a row was captured, before its batch is written: another query shall not do it meanwhile.
#[derive(Debug, Clone, Copy)]
struct Mark {
    row: u64,
    at_ms: u64,
}

impl Mark {
    /// It was not captured after all: the next SELECT shall.
    fn take_back(self) {
        seen::unmark(shared::seen(), self.row, self.at_ms);
    }
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
            spare: Vec::new(),
            row: Row::default(),
            tuple: TupleBuilder::new(),
            message: Vec::new(),
            context: context.child(c"walmirror captured row"),
        }
    }

    /// Whether rows of a table are to be captured.
    pub fn captures(&mut self, table: u32) -> bool {
        plan_of(&mut self.tables, table).is_some()
    }

    /// Whether rows of any of these tables are to be captured.
    pub fn captures_any(&mut self, mut tables: impl Iterator<Item = u32> + Clone) -> bool {
        let known = &mut self.tables;
        // All in one subtransaction.
        if !tables.clone().all(|table| known.knows(table)) && !query::in_parallel_mode() {
            query::isolated(|| {
                for table in tables.clone() {
                    if !known.knows(table) {
                        known.look_up(table);
                    }
                }
                Some(())
            });
        }
        tables.any(|table| plan_of(known, table).is_some())
    }

    /// A query starts that reads cached tables.
    pub fn start(&mut self, id: usize) {
        let mut query = self.spare.pop().unwrap_or_default();
        query.id = id;
        query.began_ms = u64::try_from(query::now_us() / 1000).unwrap_or(0);
        self.queries.push(query);
    }

    /// One of its scans is of a cached table.
    pub fn attach(&mut self, node: usize, original: scan::ExecProcNode, table: u32) {
        let ttl_ms = plan_of(&mut self.tables, table).map_or(0, |plan| plan.relation.ttl_ms);
        if let Some(query) = self.queries.last_mut() {
            query.scans.push(Scan {
                node,
                original,
                table,
                ttl_ms: if ttl_ms == 0 { u64::MAX } else { ttl_ms },
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
    pub fn row(&mut self, node: usize, source: &scan::ScanSlot<'_>) -> Next {
        let found = self.queries.iter_mut().enumerate().rev().find_map(|(at, query)| {
            let scan = query.scans.iter_mut().find(|scan| scan.node == node)?;
            scan.rows += 1;
            (!query.left_out).then_some((at, *scan, query.began_ms))
        });
        let Some((at, scan, began_ms)) = found else {
            return Next::Stop;
        };
        if scan.rows > settings::capture_max_rows() {
            stats::add(Counter::SkippedMaxRows, 1);
            return Next::Stop;
        }
        stats::add(Counter::RowsSeen, 1);
        let (block, offset) = source.place();
        let mark = Mark {
            row: seen::row_hash(query::database(), scan.table, block, offset),
            // A cursor's client may ask it for rows long after it began.
            at_ms: query::statement_time_ms().max(began_ms),
        };
        if seen::check_and_mark(
            shared::seen(),
            mark.row,
            mark.at_ms,
            // A key that has expired comes back when its row is read.
            settings::capture_interval_ms().min(scan.ttl_ms),
        ) {
            stats::add(Counter::SkippedRecent, 1);
            return Next::Continue;
        }
        let encoded = self.encode(scan.table, source);
        self.context.reset();
        let Some(query) = self.queries.get_mut(at) else {
            return Next::Stop;
        };
        match encoded {
            Ok((oid, fingerprint)) => {
                if !query.add(oid, fingerprint, &self.tuple, mark) {
                    stats::add(Counter::SkippedFailed, 1);
                    mark.take_back();
                }
            }
            Err(reason) => {
                stats::add(reason, 1);
                // What is too large will be too large again, and to find that out costs the most.
                if reason != Counter::SkippedMaxBytes {
                    mark.take_back();
                }
            }
        }
        if query.filled().iter().map(|batch| batch.rows.len()).sum::<usize>() >= BATCH_BYTES {
            query.emit(&mut self.message);
        }
        Next::Continue
    }

    /// Encodes a row into `tuple`: the table's `pg_class.oid` and fingerprint, or why there is nothing to be captured.
    fn encode(&mut self, table: u32, source: &scan::ScanSlot<'_>) -> Result<(u32, u64), Counter> {
        let _entered = self.context.enter();
        query::catching(|| source.read(&mut self.row)).ok_or(Counter::SkippedFailed)?;
        let (row, tuple) = (&mut self.row, &mut self.tuple);
        let plan = plan_of(&mut self.tables, table).ok_or(Counter::SkippedFailed)?;
        let _session = TextSession::enter(plan.needs);
        let max_bytes = settings::capture_max_bytes();
        let reads_only_the_row = plan.reads_only(row);
        let work = || {
            settings::failpoint(settings::Failpoint::CaptureEncode);
            if !plan.know_row_types_at_once() {
                return None;
            }
            if !plan.fetch_toasted(row, max_bytes) {
                return Some(false);
            }
            encode::encode(plan, row, None, Columns::All, tuple).ok()?;
            Some(tuple.encoded_len() <= max_bytes)
        };
        let fits = if reads_only_the_row {
            query::catching(work).flatten()
        } else if query::in_parallel_mode() {
            return Err(Counter::SkippedParallel);
        } else {
            query::isolated(work)
        };
        match fits {
            Some(true) => Ok((plan.relation.oid, plan.relation.fingerprint)),
            Some(false) => Err(Counter::SkippedMaxBytes),
            None => Err(Counter::SkippedFailed),
        }
    }

    /// EXPLAIN ANALYZE runs a query: nobody asked for its rows.
    pub fn leave_out(&mut self, id: usize) {
        if let Some(query) = self.queries.iter_mut().rev().find(|query| query.id == id)
            && !std::mem::replace(&mut query.left_out, true)
        {
            stats::add(Counter::SkippedExplain, 1);
        }
    }

    /// A query has run, or returned as many rows as it was asked for: what it read goes into the WAL.
    pub fn emit(&mut self, id: usize) {
        if let Some(query) = self.queries.iter_mut().rev().find(|query| query.id == id) {
            query.emit(&mut self.message);
        }
    }

    /// A query returned a row and will be asked for the next one: what it read goes into the WAL if it has waited for long.
    pub fn emit_older(&mut self, id: usize) {
        if let Some(query) = self.queries.iter_mut().rev().find(|query| query.id == id)
            && !query.filled().is_empty()
        {
            let now_us = query::now_us();
            let since_us = *query.waiting_since_us.get_or_insert(now_us);
            if now_us.saturating_sub(since_us) >= WAIT_US {
                query.emit(&mut self.message);
            }
        }
    }

    /// A query is over, well or with an error.
    pub fn end(&mut self, id: usize) {
        if let Some(at) = self.queries.iter().rposition(|query| query.id == id) {
            let mut query = self.queries.remove(at);
            // Of a query that failed there are rows that were not written.
            query.take_back();
            self.tuple.give_back(KEPT_BYTES);
            if self.spare.len() < SPARE_QUERIES {
                query.clear();
                self.spare.push(query);
            }
        }
    }

    /// Whether no query captures.
    pub fn is_idle(&self) -> bool {
        self.queries.is_empty()
    }
}

/// The plan of a table if its rows are to be captured. A table that would have to be looked up in parallel mode is left out.
fn plan_of(tables: &mut Tables, table: u32) -> Option<&mut Plan> {
    if !tables.knows(table) {
        if query::in_parallel_mode() {
            return None;
        }
        query::isolated(|| {
            tables.look_up(table);
            Some(())
        })?;
    }
    match tables.known(table) {
        Some(Table::Configured(plan)) if captured(plan) => Some(plan),
        _ => None,
    }
}

/// Whether SELECTs of a table fill Redis.
fn captured(plan: &Plan) -> bool {
    plan.relation.mode() == pb::Mode::Cache || plan.relation.capture
}

impl Query {
    fn filled(&self) -> &[Batch] {
        self.batches.get(..self.filled).unwrap_or_default()
    }

    fn take_back(&self) {
        self.filled().iter().for_each(Batch::take_back);
    }

    /// Whether there was memory for the row.
    fn add(&mut self, oid: u32, fingerprint: u64, tuple: &TupleBuilder, mark: Mark) -> bool {
        let known = self
            .filled()
            .iter()
            .position(|batch| batch.oid == oid && batch.fingerprint == fingerprint);
        let at = known.unwrap_or(self.filled);
        if at == self.batches.len() {
            self.batches.push(Batch::default());
        }
        let Some(batch) = self.batches.get_mut(at) else {
            return false;
        };
        // Where Rust finds no memory by itself the process ends, and the server with it.
        if batch
            .rows
            .try_reserve(tuple.encoded_len() + ROW_HEADER_BYTES)
            .is_err()
        {
            return false;
        }
        self.filled = self.filled.max(at + 1);
        (batch.oid, batch.fingerprint) = (oid, fingerprint);
        /// Field 4, length-delimited.
        const ROWS: u8 = 4 << 3 | 2;
        batch.rows.push(ROWS);
        prost::encoding::encode_varint(tuple.encoded_len() as u64, &mut batch.rows);
        tuple.write_tuple(&mut batch.rows);
        batch.marks.push(mark);
        true
    }

    /// Writes what is filled, with `message` as the place to put it together.
    fn emit(&mut self, message: &mut Vec<u8>) {
        self.waiting_since_us = None;
        for batch in self.batches.iter_mut().take(std::mem::take(&mut self.filled)) {
            batch.emit(self.id, message);
            batch.clear();
        }
    }

    /// Makes it ready for another query, without memory that only a large one needs.
    fn clear(&mut self) {
        self.scans.clear();
        self.batches.truncate(1);
        self.batches.iter_mut().for_each(Batch::clear);
        self.filled = 0;
        self.waiting_since_us = None;
        self.left_out = false;
    }
}

impl Batch {
    fn emit(&self, query: usize, message: &mut Vec<u8>) {
        // Meanwhile the transaction may have written, by a function that the query called.
        if query::transaction_wrote() {
            stats::add(Counter::SkippedWrote, 1);
            return self.take_back();
        }
        let head = pb::Capture {
            oid: self.oid,
            fingerprint: self.fingerprint,
            snapshot: Some(query::snapshot(query)),
            rows: Vec::new(),
        };
        message.clear();
        let count = self.marks.len() as u64;
        // As for a row in its batch.
        let fits = message.try_reserve(head.encoded_len() + self.rows.len()).is_ok();
        let written = fits && {
            // Encoding into a Vec cannot fail.
            let _ = head.encode(message);
            message.extend_from_slice(&self.rows);
            query::catching(|| flusher::write_capture(message)).is_some()
        };
        if written {
            stats::add(Counter::RowsEmitted, count);
            stats::add(Counter::MessagesEmitted, 1);
            stats::add(Counter::BytesEmitted, message.len() as u64);
        } else {
            stats::add(Counter::SkippedFailed, count);
            self.take_back();
        }
        if message.capacity() > KEPT_BYTES {
            *message = Vec::new();
        }
    }

    fn take_back(&self) {
        self.marks.iter().for_each(|mark| mark.take_back());
    }

    fn clear(&mut self) {
        self.marks.clear();
        self.marks.shrink_to(KEPT_BYTES / size_of::<Mark>());
        self.rows.clear();
        self.rows.shrink_to(KEPT_BYTES);
    }
}
