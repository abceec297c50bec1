//! The records of the stream, one by one.

use std::sync::Arc;

use walmirror_proto::Lsn;
use walmirror_proto::frame::{FrameReader, RecordRef};
use walmirror_proto::pb;

use super::super::metrics::add;
use super::{Planning, Standing};
use crate::error::Error;
use crate::plan::{Change, Planned, Purge, Trust};
use crate::rejected::Rejected;
use crate::request::Request;

impl Planning {
    /// Plans one frame, which the plugin wrote when it was at `start`, or keeps it.
    pub(crate) fn frame(&mut self, frame: &[u8], start: Lsn) -> Result<(), Error> {
        add(&self.shared.metrics.bytes, frame.len() as u64);
        self.records(frame, start)
    }

    pub(super) fn records(&mut self, frame: &[u8], start: Lsn) -> Result<(), Error> {
        let mut rows = 0;
        let mut rolled_back = false;
        let mut reader = FrameReader::new(frame).enumerate();
        while let Some((number, record)) = reader.next() {
            let record = record.map_err(|error| self.broken("a frame cannot be read", error))?;
            match record {
                RecordRef::InProgress(in_progress) => match &self.replay {
                    Some(replay) => rolled_back = replay.is_rolled_back(in_progress.sub_xid),
                    None if number == 0 => return self.keep(in_progress.xid, frame),
                    None => return Err(self.broken("IN_PROGRESS", "it is not the first of its frame")),
                },
                _ if rolled_back => {}
                RecordRef::Row {
                    kind,
                    relation,
                    tuple,
                    old_key,
                } => {
                    rows += 1;
                    self.row(relation, &Change { kind, tuple, old_key })?;
                    // Frames hold tens of rows, but a row can be large.
                    if rows % 64 == 0 {
                        self.flush_if_full();
                    }
                }
                RecordRef::Begin(begin) => self.begin("BEGIN", &begin)?,
                RecordRef::Commit(commit) => self.commit(&commit)?,
                RecordRef::Relation(relation) => self.relation(relation)?,
                RecordRef::Truncate(truncate) => self.truncate(&truncate)?,
                RecordRef::Forget(forget) => self.forget(&forget)?,
                RecordRef::Marker(marker) => self.marker(&marker)?,
                RecordRef::Capture(capture) => self.capture(&capture, start)?,
                RecordRef::Error { error, .. } => self.error(&error)?,
                RecordRef::Rollback(rollback) => self.rollback(&rollback),
                RecordRef::LateCommit(late) if reader.next().is_none() => self.late_commit(late)?,
                RecordRef::LateCommit(_) => {
                    return Err(self.broken("LATE_COMMIT", "it is not the last of its frame"));
                }
            }
        }
        add(&self.shared.metrics.rows, rows);
        self.flush_if_full();
        self.bounded()
    }

    fn row(&mut self, index: u32, change: &Change<'_>) -> Result<(), Error> {
        let definition = self.definitions.get(index as usize).and_then(Option::as_ref);
        if self.begins_anew
            && definition.is_some_and(|definition| matches!(definition.standing, Standing::Unregistered))
        {
            // A cache is emptied of what was there before it.
            self.cut_before_purge();
        }
        let open = self
            .transactions
            .change("a row")
            .map_err(|error| self.misplaced("a row", error))?;
        let Some(open) = open else {
            add(&self.shared.metrics.rows_skipped.already_applied, 1);
            return Ok(());
        };
        let definition = self.definitions.get(index as usize).and_then(Option::as_ref);
        let Some(definition) = definition else {
            // INVARIANT I5: a relation stands before its first row.
            return Err(self.broken("a row", format!("relation {index} was never defined")));
        };
        let trust = match definition.standing {
            Standing::Trusted(trust) => trust,
            Standing::Forgotten => {
                add(&self.shared.metrics.rows_skipped.forgotten_table, 1);
                return Ok(());
            }
            Standing::Unregistered if self.begins_anew => {
                let relation = definition.relation.clone();
                self.register(relation)?;
                self.backfill.want_reconcile();
                return self.planned_row(open.xid, index, Trust::Refreshing, change);
            }
            Standing::Taken | Standing::Unregistered => {
                add(&self.shared.metrics.rows_skipped.forgotten_table, 1);
                let oid = definition.mapping.oid;
                if self.registry.get(oid).is_none() {
                    // Or it is the other table that is of the past; or the table was not forgotten, and whoever fills it waits for this one.
                    self.doubt_at_last(oid);
                }
                return Ok(());
            }
            Standing::Outdated => {
                // The catalog has to say which version counts.
                let oid = definition.mapping.oid;
                self.doubt_at_last(oid);
                Trust::Refreshing
            }
            Standing::Stray => {
                let relation = definition.relation.clone();
                self.stray(&relation)?;
                return self.planned_row(open.xid, index, Trust::Refreshing, change);
            }
        };
        self.planned_row(open.xid, index, trust, change)
    }

    #[inline]
    fn planned_row(&mut self, xid: u64, index: u32, trust: Trust, change: &Change<'_>) -> Result<(), Error> {
        let Some(Some(definition)) = self.definitions.get(index as usize) else {
            return Ok(());
        };
        // Ids are those of top-level transactions, which are below those of their subtransactions.
        let trust = if xid < definition.horizon {
            Trust::Outlived
        } else {
            trust
        };
        let planned = self.planner.change(
            self.assembly.batch(),
            &mut self.gate,
            xid,
            &definition.mapping,
            trust,
            change,
        );
        if !self.rereads.is_empty() {
            let is_written = planned == Ok(Planned::Done) && trust != Trust::Outlived;
            self.rereads
                .note(&self.gate, &self.planner, &definition.mapping, change, is_written);
        }
        match planned {
            Ok(Planned::Done) => Ok(()),
            Ok(Planned::TooLarge) => {
                let table = definition.mapping.table.clone();
                self.reject_too_large(table)
            }
            Ok(Planned::Reserved) => {
                let table = definition.mapping.table.clone();
                self.reject_reserved(table)
            }
            Ok(Planned::KeyTooLong) => {
                let table = definition.mapping.table.clone();
                self.reject_long_key(table)
            }
            Ok(Planned::Claimed(by)) => {
                let table = definition.mapping.table.clone();
                self.reject_claimed(table, by)
            }
            Ok(Planned::NoKey) => {
                add(&self.shared.metrics.rows_without_key, 1);
                Ok(())
            }
            Err(error) => Err(self.broken("a row cannot be planned", error)),
        }
    }

    pub(super) fn commit(&mut self, commit: &pb::Commit) -> Result<(), Error> {
        self.known()?;
        let ended = self
            .transactions
            .commit(commit)
            .map_err(|error| self.broken("COMMIT", error))?;
        if let Some(ended) = ended {
            self.lsn = self.lsn.max(ended.end_lsn);
            self.last = ended.commit.or(self.last);
            self.dirty = true;
            add(&self.shared.metrics.transactions, 1);
            // The transaction behind this one begins a MULTI of its own when this one fills a batch by itself.
            self.flush_if_full();
            if self.assembly.is_split() {
                self.flush();
            }
        }
        Ok(())
    }

    fn truncate(&mut self, truncate: &pb::Truncate) -> Result<(), Error> {
        self.cut_before_purge();
        let open = self
            .transactions
            .change("TRUNCATE")
            .map_err(|error| self.misplaced("TRUNCATE", error))?;
        let Some(open) = open else { return Ok(()) };
        for &index in &truncate.relations {
            let Some(Some(definition)) = self.definitions.get(index as usize) else {
                return Err(self.broken("TRUNCATE", format!("relation {index} was never defined")));
            };
            if definition.standing == Standing::Forgotten {
                continue;
            }
            let (mapping, standing) = (Arc::clone(&definition.mapping), definition.standing);
            self.gate.record_truncate(mapping.oid, open.xid);
            if standing == Standing::Unregistered && !self.begins_anew {
                self.doubt_at_last(mapping.oid);
                continue;
            }
            if standing == Standing::Taken {
                continue;
            }
            add(&self.shared.metrics.truncates, 1);
            let purge = self.registry.purge(mapping.oid, &mapping.template);
            self.purge(vec![purge]);
        }
        Ok(())
    }

    pub(super) fn purge(&mut self, purges: Vec<Purge>) {
        let commit = self.transactions.open();
        for purge in purges {
            self.assembly.purge(purge, commit);
        }
    }

    /// A purge needs a MULTI that Redis has not begun yet. Must come before the record that wants the purge is counted.
    pub(super) fn cut_before_purge(&mut self) {
        if self.assembly.is_split() {
            self.close();
        }
    }

    /// Counts a change record; whether it is to be applied.
    pub(super) fn counted(&mut self, what: &'static str) -> Result<bool, Error> {
        let open = self
            .transactions
            .change(what)
            .map_err(|error| self.misplaced(what, error))?;
        Ok(open.is_some())
    }

    fn error(&mut self, error: &pb::Error) -> Result<(), Error> {
        if self.registry.is_kept_cache(error.oid) {
            self.cut_before_purge();
        }
        let open = self
            .transactions
            .note("ERROR")
            .map_err(|error| self.misplaced("ERROR", error))?;
        if open.is_some() {
            self.outdate_misfit(error.oid)?;
            // DDL leaves out no row.
            if error.refresh {
                return Ok(());
            }
            add(&self.shared.metrics.errors, 1);
            // The decoder has sent deletes of the row's keys along with it.
            self.reject(Rejected {
                key: error.key.clone().into_bytes(),
                table: error.table.clone(),
                lsn: Lsn(error.lsn),
                reason: format!("it could not be encoded: {}", error.reason),
            })?;
        }
        Ok(())
    }

    fn marker(&mut self, marker: &pb::Marker) -> Result<(), Error> {
        if self.is_before(Lsn(marker.lsn)) {
            return Ok(());
        }
        if let Some(request) = Request::parse(&self.slot, &marker.content) {
            return self.request(&request, Lsn(marker.lsn));
        }
        let number = marker.content.strip_prefix(self.marker_prefix.as_slice());
        let number = number.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
        if let Some(number) = number {
            self.pass(Lsn(marker.lsn))?;
            self.chunks.release(number);
        }
        Ok(())
    }

    /// The position passes something that stands between transactions: every one that ended before it is planned, because
    /// the server sends them in that order. What SQL read is written with such a position, so that Redis never holds more
    /// than its position says: rows of a transaction that was not in the stream, as its table was not mirrored yet.
    pub(super) fn pass(&mut self, lsn: Lsn) -> Result<(), Error> {
        self.reached(lsn)?;
        if !self.transactions.is_open() {
            self.lsn = self.lsn.max(lsn);
        }
        Ok(())
    }

    pub(super) fn broken(&self, what: &str, source: impl Into<crate::error::Source>) -> Error {
        Error::stream(format!("the stream cannot be followed: {what}"), source).at(self.lsn)
    }
}
