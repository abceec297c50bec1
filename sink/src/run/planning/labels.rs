//! Which tables are mirrored, and how: what the stream says of them, and what the catalog says where the stream may have said nothing.

use std::collections::BTreeSet;
use std::sync::Arc;

use walmirror_proto::key::KeyTemplate;
use walmirror_proto::pb;

use super::{Definition, Planning, standing};
use crate::backfill::Catalog;
use crate::error::Error;
use crate::plan::Mapping;

/// Relation.index counts the tables of a stream; far more than any database has would be a broken frame.
const INDEX_MAX: usize = 10_000_000;

impl Planning {
    pub(super) fn relation(&mut self, relation: pb::Relation) -> Result<(), Error> {
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
                .map_err(|error| self.misplaced("RELATION", error))?;
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

    /// What says so may be the last that does: where such a catalog is on its way, another one is read behind it.
    pub(super) fn doubt_at_last(&mut self, oid: u32) {
        if !self.backfill.is_reconciled() {
            self.doubted.insert(oid);
        }
        self.doubt(oid);
    }

    /// A row of a version that is neither the registered one nor was announced: the catalog has to say which one counts.
    pub(super) fn stray(&mut self, relation: &pb::Relation) -> Result<(), Error> {
        self.registry
            .outdate(self.assembly.batch(), relation)
            .map_err(|error| self.broken("RELATION", error))?;
        self.announced.remove(&relation.oid);
        self.backfill.want_reconcile();
        self.restate();
        Ok(())
    }

    /// DDL or a label changed the table.
    pub(super) fn announced(&mut self, relation: pb::Relation, xid: u64) -> Result<(), Error> {
        let oid = relation.oid;
        self.announced.insert(oid);
        let known = self.registry.get(oid);
        let is_new = known.is_none_or(|known| known.relation.fingerprint != relation.fingerprint);
        if is_new || relation.refresh {
            // Any row may be another one from here on, without a record of it: what was read before is stale.
            self.gate.record_truncate(oid, xid);
            self.register(relation)?;
        } else {
            let amended = self.registry.amend(self.assembly.batch(), relation);
            amended.map_err(|error| self.broken("RELATION", error))?;
        }
        // It is what the table was when the DDL ran. ALTER TYPE and ALTER SCHEMA lock no table: another label may have been set since, and be
        // told already, or stand in the catalog that is on its way, which counts less now. No row need follow.
        if is_new || !self.backfill.is_reconciled() {
            self.doubt_at_last(oid);
        }
        Ok(())
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

    pub(super) fn forget(&mut self, forget: &pb::Forget) -> Result<(), Error> {
        self.cut_before_purge();
        if self.counted("FORGET")? {
            self.announced.insert(forget.oid);
            self.forget_relation(forget.oid, forget.keep_keys)?;
            self.doubt_at_last(forget.oid);
        }
        Ok(())
    }

    pub(super) fn forget_relation(&mut self, oid: u32, keep_keys: bool) -> Result<(), Error> {
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

    /// What was done to a table is not told, as its label does not fit it or a key is not in the WAL: whatever it is next, it is made
    /// anew. Of a cache any key may be stale from here on, so they go at once.
    pub(super) fn outdate_misfit(&mut self, oid: u32) -> Result<(), Error> {
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
}
