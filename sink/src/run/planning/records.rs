//! The records of the stream, one by one.

use std::collections::BTreeSet;
use std::sync::Arc;

use walmirror_proto::Lsn;
use walmirror_proto::frame::{FrameReader, RecordRef};
use walmirror_proto::key::KeyTemplate;
use walmirror_proto::pb;

use super::super::metrics::add;
use super::{Definition, Planning, standing};
use crate::backfill::Catalog;
use crate::error::Error;
use crate::plan::{Change, Mapping, Planned, Purge, Trust};
use crate::rejected::Rejected;
use crate::request::Request;

use super::Standing;

/// Relation.index counts the tables of a stream; far more than any database has would be a broken frame.
const INDEX_MAX: usize = 10_000_000;

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
        Ok(())
    }

    fn row(&mut self, index: u32, change: &Change<'_>) -> Result<(), Error> {
        let definition = self.definitions.get(index as usize).and_then(Option::as_ref);
        if definition.is_some_and(|definition| matches!(definition.standing, Standing::Unregistered)) {
            // A cache is emptied of what was there before it.
            self.cut_before_purge();
        }
        let open = self
            .transactions
            .change("a row")
            .map_err(|error| self.broken("a row", error))?;
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
            Standing::Taken => {
                add(&self.shared.metrics.rows_skipped.forgotten_table, 1);
                let oid = definition.mapping.oid;
                if self.registry.get(oid).is_none() {
                    // Or it is the other table that is of the past.
                    self.doubt_by_row(oid);
                }
                return Ok(());
            }
            Standing::Outdated => {
                // The catalog has to say which version counts.
                let oid = definition.mapping.oid;
                self.doubt_by_row(oid);
                Trust::Refreshing
            }
            Standing::Stray => {
                let relation = definition.relation.clone();
                self.stray(&relation)?;
                return self.planned_row(open.xid, index, Trust::Refreshing, change);
            }
            Standing::Unregistered => {
                // Perhaps the row of an old transaction, and the table was forgotten in an earlier session.
                let relation = definition.relation.clone();
                self.register(relation)?;
                self.backfill.want_reconcile();
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

    fn relation(&mut self, relation: pb::Relation) -> Result<(), Error> {
        let index = relation.index as usize;
        if index == 0 || index > INDEX_MAX {
            return Err(self.broken("RELATION", format!("its index is {index}")));
        }
        let mut mapping = Mapping::new(&relation).map_err(|error| self.broken("RELATION", error))?;
        if relation.announced {
            // The keys of a cached table go.
            self.cut_before_purge();
            let open = self
                .transactions
                .change("RELATION")
                .map_err(|error| self.broken("RELATION", error))?;
            if let Some(open) = open {
                self.announced(relation.clone(), open.xid)?;
            }
        }
        // Rows of another version may leave fields that this one has no column for.
        let spoiled = self.registry.get(mapping.oid).filter(|registered| {
            registered.cursor.on_nothing && registered.relation.fingerprint != mapping.fingerprint
        });
        if let Some(registered) = spoiled {
            let relation = registered.relation.clone();
            self.register(relation)?;
        }
        if self.definitions.len() <= index {
            self.definitions.resize_with(index + 1, || None);
        }
        let standing = standing(&self.registry, &self.forgotten, &relation);
        let horizon = self.registry.cache_horizon(relation.oid);
        mapping.claims = self.registry.claims(&relation);
        if let Some(place) = self.definitions.get_mut(index) {
            *place = Some(Definition {
                relation,
                mapping: Arc::new(mapping),
                standing,
                horizon,
            });
        }
        Ok(())
    }

    /// The table may be another one than the stream has told: the catalog has to say what it is. What was told behind that still counts more.
    /// Not while a catalog may be on its way that was read before what was told: who reads the table tries again.
    pub(super) fn doubt(&mut self, oid: u32) {
        if self.backfill.is_reconciled() {
            self.announced.remove(&oid);
            self.backfill.want_reconcile();
        }
    }

    /// A row says the same, and may be the last one that does: where such a catalog is on its way, another one is read behind it.
    fn doubt_by_row(&mut self, oid: u32) {
        if !self.backfill.is_reconciled() {
            self.doubted.insert(oid);
        }
        self.doubt(oid);
    }

    /// A row of a version that is neither the registered one nor was announced: the catalog has to say which one counts.
    fn stray(&mut self, relation: &pb::Relation) -> Result<(), Error> {
        self.registry
            .outdate(self.assembly.batch(), relation)
            .map_err(|error| self.broken("RELATION", error))?;
        self.announced.remove(&relation.oid);
        self.backfill.want_reconcile();
        self.restate();
        Ok(())
    }

    /// DDL or a label changed the table.
    fn announced(&mut self, relation: pb::Relation, xid: u64) -> Result<(), Error> {
        self.announced.insert(relation.oid);
        match self.registry.get(relation.oid) {
            Some(known) if known.relation.fingerprint == relation.fingerprint && !relation.refresh => {
                let amended = self.registry.amend(self.assembly.batch(), relation);
                amended.map_err(|error| self.broken("RELATION", error))
            }
            _ => {
                // Any row may be another one from here on, without a record of it: what was read before is stale.
                self.gate.record_truncate(relation.oid, xid);
                self.register(relation)
            }
        }
    }

    pub(super) fn register(&mut self, relation: pb::Relation) -> Result<(), Error> {
        tracing::info!(
            table = format!("{}.{}", relation.schema, relation.name),
            key = relation.key,
            "mirroring a table"
        );
        self.forgotten.remove(&relation.oid);
        let outside = self.replay.iter().flat_map(|replay| replay.outside());
        let known = self.definitions.iter().chain(outside).flatten();
        let mut known = known.map(|known| &known.mapping);
        if known.any(|known| known.oid == relation.oid && known.fingerprint != relation.fingerprint) {
            self.registry.doubt();
        }
        let oid = relation.oid;
        let left = self.registry.leaves(oid, Some(&relation));
        let purges = self
            .registry
            .register(self.assembly.batch(), relation)
            .map_err(|error| self.broken("RELATION", error))?;
        self.purge(purges);
        self.hand_on(oid, &left)?;
        self.dirty = true;
        self.restate();
        Ok(())
    }

    /// A table no longer has these templates. Where another one is less specific, keys that were taken from it are its own again: it is
    /// read anew, or, if it is a cache, emptied.
    fn hand_on(&mut self, oid: u32, left: &[KeyTemplate]) -> Result<(), Error> {
        for heir in self.registry.heirs(oid, left) {
            let table = format!("{}.{}", heir.schema, heir.name);
            tracing::info!(
                table,
                key = heir.key,
                "keys of the table are its own again, so it is made anew"
            );
            let purges = self
                .registry
                .register(self.assembly.batch(), heir)
                .map_err(|error| self.broken("RELATION", error))?;
            self.purge(purges);
        }
        Ok(())
    }

    fn truncate(&mut self, truncate: &pb::Truncate) -> Result<(), Error> {
        self.cut_before_purge();
        let open = self
            .transactions
            .change("TRUNCATE")
            .map_err(|error| self.broken("TRUNCATE", error))?;
        let Some(open) = open else { return Ok(()) };
        for &index in &truncate.relations {
            let Some(Some(definition)) = self.definitions.get(index as usize) else {
                return Err(self.broken("TRUNCATE", format!("relation {index} was never defined")));
            };
            if definition.standing == Standing::Forgotten {
                continue;
            }
            let mapping = Arc::clone(&definition.mapping);
            self.gate.record_truncate(mapping.oid, open.xid);
            if definition.standing == Standing::Taken {
                continue;
            }
            add(&self.shared.metrics.truncates, 1);
            let purge = self.registry.purge(mapping.oid, &mapping.template);
            self.purge(vec![purge]);
        }
        Ok(())
    }

    fn forget(&mut self, forget: &pb::Forget) -> Result<(), Error> {
        self.cut_before_purge();
        if self.counted("FORGET")? {
            self.announced.insert(forget.oid);
            self.forget_relation(forget.oid, forget.keep_keys)?;
        }
        Ok(())
    }

    fn forget_relation(&mut self, oid: u32, keep_keys: bool) -> Result<(), Error> {
        let left = self.registry.leaves(oid, None);
        let table = self
            .registry
            .get(oid)
            .map(|registered| registered.mapping.table.clone());
        self.forgotten.insert(oid);
        let Some(purges) = self.registry.forget(self.assembly.batch(), oid, keep_keys) else {
            // Nobody had told of it yet, but a row of an older transaction may come.
            self.restate();
            return Ok(());
        };
        tracing::info!(table, keep_keys, "a table is no longer mirrored");
        self.purge(purges);
        self.hand_on(oid, &left)?;
        self.gate.forget_relation(oid);
        self.dirty = true;
        self.restate();
        Ok(())
    }

    pub(super) fn purge(&mut self, purges: Vec<Purge>) {
        let commit = self.transactions.open();
        for purge in purges {
            self.assembly.purge(purge, commit);
        }
    }

    /// A purge needs a MULTI that Redis has not begun yet. Must come before the record that wants the purge is counted.
    fn cut_before_purge(&mut self) {
        if self.assembly.is_split() {
            self.close();
        }
    }

    /// Counts a change record; whether it is to be applied.
    fn counted(&mut self, what: &'static str) -> Result<bool, Error> {
        let open = self
            .transactions
            .change(what)
            .map_err(|error| self.broken(what, error))?;
        Ok(open.is_some())
    }

    fn error(&mut self, error: &pb::Error) -> Result<(), Error> {
        if self.registry.is_kept_cache(error.oid) {
            self.cut_before_purge();
        }
        let open = self
            .transactions
            .note("ERROR")
            .map_err(|error| self.broken("ERROR", error))?;
        if open.is_some() {
            add(&self.shared.metrics.errors, 1);
            self.outdate_misfit(error.oid)?;
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

    /// What was done to a table is not told, as its label does not fit it or a key is not in the WAL: whatever it is next, it is made
    /// anew. Of a cache any key may be stale from here on, so they go at once.
    fn outdate_misfit(&mut self, oid: u32) -> Result<(), Error> {
        match self.registry.get(oid) {
            Some(registered) if !registered.is_outdated() => {
                let relation = registered.relation.clone();
                let is_cache = self.registry.is_kept_cache(oid);
                self.stray(&relation)?;
                if is_cache {
                    let purges = self.registry.purges(oid);
                    self.purge(purges);
                }
                Ok(())
            }
            _ => Ok(()),
        }
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

    /// Compares what the catalog says with the registry, at the place of the stream where it was read.
    pub(super) fn reconcile(&mut self, catalog: &Catalog) -> Result<(), Error> {
        for relation in catalog
            .relations
            .iter()
            .filter(|relation| !self.announced.contains(&relation.oid))
            .collect::<Vec<_>>()
        {
            let known = self
                .registry
                .get(relation.oid)
                .map(|registered| registered.relation.fingerprint);
            if known != Some(relation.fingerprint) {
                self.register(relation.clone())?;
            }
        }
        for misfit in &catalog.misfits {
            if !self.announced.contains(&misfit.oid) {
                self.outdate_misfit(misfit.oid)?;
            }
        }
        // What has a label that does not fit it, or that could not be looked at, stays as it is.
        let fitting = catalog.relations.iter().map(|relation| relation.oid);
        let others = catalog.misfits.iter().map(|misfit| misfit.oid);
        let locked = catalog.locked.iter().map(|(locked, _)| *locked);
        let labelled: BTreeSet<u32> = fitting.chain(others).chain(locked).collect();
        for oid in self.registry.oids() {
            if !self.announced.contains(&oid) && !labelled.contains(&oid) {
                self.forget_relation(oid, false)?;
            }
        }
        // What is labelled from now on finds in Redis what somebody has put there since the session began.
        self.registry.doubt();
        if catalog.locked.is_empty() {
            self.backfill.note_reconciled(catalog.wishes);
            if self.backfill.is_reconciled() {
                for oid in std::mem::take(&mut self.doubted) {
                    self.announced.remove(&oid);
                    self.backfill.want_reconcile();
                }
            }
        }
        Ok(())
    }

    pub(super) fn broken(&self, what: &str, source: impl Into<crate::error::Source>) -> Error {
        Error::stream(format!("the stream cannot be followed: {what}"), source).at(self.lsn)
    }
}
