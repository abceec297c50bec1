//! The relations that Redis is kept by: which version of each table, and how far its backfill is. Stored in Redis, changed
//! only by what comes down the stream (or by the comparison with the catalog, at its marker).

use std::collections::BTreeMap;
use std::sync::Arc;

use prost::Message;
use walmirror_proto::key::KeyTemplate;
use walmirror_proto::pb::{self, Mode};

use crate::backfill::{Backfill, Cursor, Task};
use crate::plan::{Batch, Belongs, Claims, Mapping, MappingError, OUTDATED, Owned, Purge, RedisKeys};
use crate::progress::write_cursor;

/// One mirrored table.
#[derive(Clone, Debug)]
pub(super) struct Registered {
    pub(super) relation: pb::Relation,
    pub(super) mapping: Arc<Mapping>,
    pub(super) generation: u64,
    pub(super) cursor: Cursor,
}

impl Registered {
    /// Whether Redis is not kept by any version of it now.
    pub(super) fn is_outdated(&self) -> bool {
        self.mapping.is_outdated()
    }

    /// Whether the keys are settled, for rows of this version. None: it is another version, whose keys nothing will remove.
    pub(super) fn is_settled_for(&self, relation: &pb::Relation) -> Option<bool> {
        if self.relation.fingerprint == relation.fingerprint {
            return Some(self.cursor.is_done());
        }
        // A backfill removes the keys of its table's old templates when all transactions that write them have ended.
        let is_due = self.is_outdated() || !self.cursor.is_done();
        let has_key = || self.relation.key == relation.key || self.cursor.old_keys.contains(&relation.key);
        (is_due && has_key()).then_some(false)
    }

    /// Transactions that were in progress when it was announced are below this; all are, until it is known.
    pub(super) fn horizon(&self) -> u64 {
        self.cursor.horizon.unwrap_or(u64::MAX)
    }
}

/// All of them. Tells the backfill about every change.
#[derive(Debug)]
pub(super) struct Registry {
    keys: RedisKeys,
    relations: BTreeMap<u32, Registered>,
    generations: u64,
    backfill: Arc<Backfill>,
    /// Redis holds no keys but those that this session wrote for the tables that are registered now.
    nothing_else: bool,
}

impl Registry {
    /// What an earlier session stored. Cursors that do not fit their relation begin anew; `session` is a transaction id that was taken
    /// when this session began.
    pub(super) fn new(
        keys: RedisKeys,
        backfill: Arc<Backfill>,
        stored: BTreeMap<u32, pb::Relation>,
        nothing_else: bool,
        cursors: &BTreeMap<u32, String>,
        session: u64,
    ) -> Result<Self, MappingError> {
        let mut registry = Self {
            keys,
            relations: BTreeMap::new(),
            generations: 0,
            backfill,
            nothing_else,
        };
        for (oid, relation) in stored {
            let mut cursor = cursors
                .get(&oid)
                .and_then(|text| Cursor::parse(text))
                .filter(|cursor| cursor.fingerprint == relation.fingerprint)
                .unwrap_or_else(|| fresh(&relation, Vec::new()));
            // One that is not below this is of a server that was put back since.
            cursor.horizon = cursor.horizon.filter(|horizon| *horizon < session);
            registry.insert(relation, cursor)?;
        }
        Ok(registry)
    }

    pub(super) fn get(&self, oid: u32) -> Option<&Registered> {
        self.relations.get(&oid)
    }

    /// The horizon for rows of the stream; 0: they count whoever wrote them, because a backfill that waits for all writers corrects
    /// what is not as it should be.
    pub(super) fn cache_horizon(&self, oid: u32) -> u64 {
        match self.get(oid) {
            Some(registered) if !is_cache(&registered.relation) => 0,
            // Nothing is written to it until it is made anew.
            Some(registered) if registered.is_outdated() => u64::MAX,
            Some(registered) => registered.horizon(),
            None => 0,
        }
    }

    pub(super) fn oids(&self) -> Vec<u32> {
        self.relations.keys().copied().collect()
    }

    /// Begins every backfill anew: Redis and the stream do not fit together. Returns the purges of the caches, whose keys may
    /// be stale for good.
    pub(super) fn restart_all(&mut self, batch: &mut Batch) -> Result<Vec<Purge>, MappingError> {
        let mut purges = Vec::new();
        for relation in self
            .relations
            .values()
            .map(|registered| registered.relation.clone())
            .collect::<Vec<_>>()
        {
            purges.extend(self.register(batch, relation)?);
        }
        Ok(purges)
    }

    /// A version of a table counts from here on, and its keys are made anew. Returns the purges of a cache, whose keys
    /// simply go.
    pub(super) fn register(
        &mut self,
        batch: &mut Batch,
        relation: pb::Relation,
    ) -> Result<Vec<Purge>, MappingError> {
        let oid = relation.oid;
        let mut old_keys = Vec::new();
        let mut purges = Vec::new();
        if let Some(old) = self.relations.get(&oid) {
            // Templates of an earlier change, whose sweep had not come to an end, still have to go.
            old_keys = old.cursor.old_keys.clone();
            old_keys.push(old.relation.key.clone());
            if is_cache(&relation) && old.relation.key != relation.key {
                purges.push(self.purge(oid, &old.mapping.template));
            }
        }
        // What somebody left there: an older version, another table that had it, one that kept its keys, be it this one long ago.
        // Or a table that had written what is this one's from here on.
        let takes = KeyTemplate::parse(&relation.key).is_ok_and(|template| self.takes(oid, &template));
        let may_hold = !self.nothing_else || takes || old_keys.contains(&relation.key);
        old_keys.retain(|key| *key != relation.key);
        old_keys.dedup();
        if is_cache(&relation) {
            purges.extend(self.retired(oid, &old_keys));
            // Nobody reads all of a cache again, so what is there under its own template has to go as well.
            let template = KeyTemplate::parse(&relation.key).ok().filter(|_| may_hold);
            purges.extend(template.map(|template| self.purge(oid, &template)));
        }
        // There are keys of those until they are swept, and what another table could have made is left to the sweep of that one.
        self.nothing_else &= old_keys.is_empty();
        let mut cursor = fresh(&relation, old_keys);
        cursor.on_nothing =
            self.nothing_else && !takes && !self.relations.contains_key(&oid) && !cursor.is_done();
        self.store(batch, &relation);
        write_cursor(batch.bookkeeping(), &self.keys, oid, Some(&cursor.to_json()));
        self.insert(relation, cursor)?;
        Ok(purges)
    }

    /// The templates of a table, as of now, that it has no longer once it is `next`, or is no longer mirrored.
    pub(super) fn leaves(&self, oid: u32, next: Option<&pb::Relation>) -> Vec<KeyTemplate> {
        let Some(registered) = self.get(oid) else {
            return Vec::new();
        };
        let keys = std::iter::once(&registered.relation.key).chain(&registered.cursor.old_keys);
        keys.filter(|key| next.is_none_or(|next| next.key != **key))
            .filter_map(|key| KeyTemplate::parse(key).ok())
            .collect()
    }

    /// The other tables that get keys of these templates, now that nobody else has them: the less specific ones. What those keys hold is of
    /// neither. And one that has the same template already: where the stream began anew, Redis tells of tables as they were later.
    pub(super) fn heirs(&self, oid: u32, left: &[KeyTemplate]) -> Vec<pb::Relation> {
        let inherits = |heir: &KeyTemplate| {
            let mut left = left.iter();
            left.any(|left| left.overlaps(heir) && !heir.takes_from(left))
        };
        let heirs = self.relations.values().filter(|other| {
            other.relation.oid != oid && !other.is_outdated() && inherits(&other.mapping.template)
        });
        heirs.map(|heir| heir.relation.clone()).collect()
    }

    /// The definition changed in a way that changes no key and no value.
    pub(super) fn amend(&mut self, batch: &mut Batch, relation: pb::Relation) -> Result<(), MappingError> {
        self.store(batch, &relation);
        let mapping = self.mapping(&relation)?;
        if let Some(registered) = self.relations.get_mut(&relation.oid) {
            let name = |relation: &pb::Relation| (relation.schema.clone(), relation.name.clone());
            if name(&registered.relation) != name(&relation) {
                // What is read by the old name may be of another table by now.
                self.generations += 1;
                registered.generation = self.generations;
            }
            registered.mapping = mapping;
            registered.relation = relation;
            let registered = registered.clone();
            self.tell(registered);
        }
        Ok(())
    }

    /// There may be keys that are not what the current versions of the tables make of their rows.
    pub(super) fn doubt(&mut self) {
        self.nothing_else = false;
    }

    /// The table is no longer mirrored. Returns what removes its keys; where they are kept, those of templates that it had before, which
    /// a sweep would have removed.
    pub(super) fn forget(&mut self, batch: &mut Batch, oid: u32, keep_keys: bool) -> Option<Vec<Purge>> {
        let purges = if keep_keys {
            self.left_behind(oid)
        } else {
            self.purges(oid)
        };
        self.relations.remove(&oid)?;
        self.claim(oid, None);
        // Its keys may be kept, and another table may get their template.
        self.nothing_else = false;
        self.backfill.remove(oid);
        let field = oid.to_string();
        batch
            .bookkeeping()
            .command(&[b"HDEL", &self.keys.relations, field.as_bytes()]);
        write_cursor(batch.bookkeeping(), &self.keys, oid, None);
        Some(purges)
    }

    /// A row came of a version that nobody announced: the label changed while there was no slot, or an older transaction wrote
    /// the row. Whatever is said of the table next, here or by the catalog, is a change; the keys of that version go with it.
    pub(super) fn outdate(&mut self, batch: &mut Batch, met: &pb::Relation) -> Result<(), MappingError> {
        let oid = met.oid;
        self.nothing_else = false;
        let Some(Registered {
            mut relation,
            mut cursor,
            ..
        }) = self.relations.remove(&oid)
        else {
            return Ok(());
        };
        relation.fingerprint = OUTDATED;
        cursor.fingerprint = OUTDATED;
        cursor.on_nothing = false;
        cursor.walk = None;
        if met.key != relation.key && !cursor.old_keys.contains(&met.key) {
            cursor.old_keys.push(met.key.clone());
        }
        self.store(batch, &relation);
        write_cursor(batch.bookkeeping(), &self.keys, oid, Some(&cursor.to_json()));
        self.insert(relation, cursor)
    }

    /// Whether this is a cache, and Redis is kept by a version of it.
    pub(super) fn is_kept_cache(&self, oid: u32) -> bool {
        let registered = self.get(oid);
        registered.is_some_and(|registered| is_cache(&registered.relation) && !registered.is_outdated())
    }

    /// What removes all keys of a table.
    pub(super) fn purges(&self, oid: u32) -> Vec<Purge> {
        let Some(registered) = self.get(oid) else {
            return Vec::new();
        };
        let mut purges = vec![self.purge(oid, &registered.mapping.template)];
        purges.extend(self.retired(oid, &registered.cursor.old_keys));
        purges
    }

    /// What removes the keys of a table.
    pub(super) fn purge(&self, oid: u32, template: &KeyTemplate) -> Purge {
        Purge::new(oid, template, self.templates(oid))
    }

    /// What removes the keys of templates that a table had before.
    fn retired(&self, oid: u32, old_keys: &[String]) -> Vec<Purge> {
        retired(oid, old_keys, self.templates(oid))
    }

    /// What removes the keys that a table had under other templates than its own.
    fn left_behind(&self, oid: u32) -> Vec<Purge> {
        // Of a version that nobody announced it is not known whether it is the one whose keys are kept.
        let Some(registered) = self.get(oid).filter(|registered| !registered.is_outdated()) else {
            return Vec::new();
        };
        let others = self.templates(oid).chain([&registered.mapping.template]);
        retired(oid, &registered.cursor.old_keys, others)
    }

    /// Whether the keys of a version that a table had before may be another table's by now. Nothing of that version is of interest
    /// any more: what the table is mirrored as is read when the transactions that knew the old one have ended.
    pub(super) fn is_taken(&self, relation: &pb::Relation) -> bool {
        let registered = self.relations.get(&relation.oid);
        if registered.is_some_and(|registered| registered.relation.key == relation.key) {
            return false;
        }
        let Ok(template) = KeyTemplate::parse(&relation.key) else {
            return false;
        };
        let mut others = self.templates(relation.oid);
        let is_same = |other: &KeyTemplate| {
            other.prefix() == template.prefix() && other.skeleton() == template.skeleton()
        };
        match registered {
            Some(_) => Purge::retired(relation.oid, &template, others).is_contested(),
            // No two labels write the same keys at one time, so this one is of the past, or the other.
            None => others.any(is_same),
        }
    }

    /// Which keys are a table's, as of now.
    pub(super) fn owned(&self, oid: u32) -> Option<Owned> {
        let registered = self.relations.get(&oid)?;
        let owned = Owned::new(
            oid,
            &registered.mapping.template,
            &registered.cursor.old_keys,
            self.templates(oid),
        );
        Some(owned.of_any_bytes(self.backfill.any_bytes()))
    }

    /// Whose rows could have a key, as of now.
    pub(super) fn owner(&self, key: &[u8]) -> Option<u32> {
        let matches = |registered: &Registered| registered.mapping.template.match_key(key).is_some();
        let mut candidates = self
            .relations
            .iter()
            .filter(|(_, registered)| matches(registered));
        let is_owner = |oid: u32| {
            self.owned(oid)
                .is_some_and(|owned| matches!(owned.noted(key), Belongs::ToRow(_)))
        };
        candidates.find(|(oid, _)| is_owner(**oid)).map(|(oid, _)| *oid)
    }

    /// A worker came so far. Of the horizon it knows nothing.
    pub(super) fn advance(&mut self, batch: &mut Batch, oid: u32, cursor: &Cursor) {
        if let Some(registered) = self.relations.get_mut(&oid) {
            registered.cursor = Cursor {
                horizon: registered.cursor.horizon,
                ..cursor.clone()
            };
            let cursor = &registered.cursor;
            write_cursor(batch.bookkeeping(), &self.keys, oid, Some(&cursor.to_json()));
            self.backfill.advance(oid, registered.generation, cursor);
        }
    }

    /// The horizon of a table in this life is known. It is stored with the cursor: writers may outlive the session.
    pub(super) fn set_horizon(&mut self, batch: &mut Batch, oid: u32, generation: u64, horizon: u64) {
        let registered = self.relations.get_mut(&oid);
        if let Some(registered) = registered.filter(|registered| registered.generation == generation) {
            registered.cursor.horizon = Some(horizon);
            let cursor = &registered.cursor;
            write_cursor(batch.bookkeeping(), &self.keys, oid, Some(&cursor.to_json()));
            self.backfill.advance(oid, generation, cursor);
        }
    }

    fn store(&self, batch: &mut Batch, relation: &pb::Relation) {
        // What is stored has no place in any stream.
        let relation = pb::Relation {
            index: 0,
            announced: false,
            refresh: false,
            ..relation.clone()
        };
        let field = relation.oid.to_string();
        batch.bookkeeping().command(&[
            b"HSET",
            &self.keys.relations,
            field.as_bytes(),
            &relation.encode_to_vec(),
        ]);
    }

    fn insert(&mut self, relation: pb::Relation, cursor: Cursor) -> Result<(), MappingError> {
        let mapping = self.mapping(&relation)?;
        self.claim(relation.oid, Some(&mapping.template));
        self.generations += 1;
        let registered = Registered {
            mapping,
            generation: self.generations,
            cursor,
            relation,
        };
        self.tell(registered.clone());
        self.relations.insert(registered.relation.oid, registered);
        Ok(())
    }

    /// A definition, compiled as of now.
    fn mapping(&self, relation: &pb::Relation) -> Result<Arc<Mapping>, MappingError> {
        let mut mapping = Mapping::new(relation)?;
        let others = self.others(relation.oid);
        mapping.claims = Claims::new(
            &mapping.template,
            others.map(|(oid, other)| (oid, &other.mapping.template)),
        );
        Ok(Arc::new(mapping))
    }

    /// A table has this template from now on, or none: what it takes from the others changes.
    fn claim(&mut self, oid: u32, template: Option<&KeyTemplate>) {
        for (_, other) in self.relations.iter_mut().filter(|(other, _)| **other != oid) {
            let taking = template.filter(|template| template.takes_from(&other.mapping.template));
            if taking.is_some() || other.mapping.claims.has(oid) {
                Arc::make_mut(&mut other.mapping).claims.set(oid, taking);
            }
        }
    }

    /// Whether some keys of other tables are this one's once it has the template.
    fn takes(&self, oid: u32, template: &KeyTemplate) -> bool {
        self.others(oid)
            .any(|(_, other)| template.takes_from(&other.mapping.template))
    }

    /// The keys that rows of this version could have and that are other tables'. Where its template is not that of the table now, nobody
    /// takes any: else it would not be of interest (see [`Self::is_taken`]).
    pub(super) fn claims(&self, relation: &pb::Relation) -> Claims {
        let registered = self.relations.get(&relation.oid);
        let registered = registered.filter(|registered| registered.relation.key == relation.key);
        registered.map_or_else(Claims::default, |registered| registered.mapping.claims.clone())
    }

    fn tell(&self, registered: Registered) {
        let Registered {
            relation,
            mapping,
            generation,
            cursor,
        } = registered;
        self.backfill.set(
            relation.oid,
            Task {
                mapping,
                generation,
                cursor,
            },
        );
    }

    /// Not copied: there may be thousands, and whoever asks keeps few.
    fn templates(&self, without: u32) -> impl Iterator<Item = &KeyTemplate> + Clone {
        self.others(without)
            .map(|(_, registered)| &registered.mapping.template)
    }

    fn others(&self, without: u32) -> impl Iterator<Item = (u32, &Registered)> + Clone {
        let others = self.relations.iter().filter(move |(oid, _)| **oid != without);
        others.map(|(oid, registered)| (*oid, registered))
    }
}

/// What removes the keys of these templates, but for those that could be of others.
fn retired<'t>(
    oid: u32,
    old_keys: &[String],
    others: impl Iterator<Item = &'t KeyTemplate> + Clone,
) -> Vec<Purge> {
    old_keys
        .iter()
        .filter_map(|key| KeyTemplate::parse(key).ok())
        .map(|template| Purge::retired(oid, &template, others.clone()))
        .collect()
}

fn is_cache(relation: &pb::Relation) -> bool {
    relation.mode == i32::from(Mode::Cache)
}

/// A cache is filled by what is SELECTed: there is nothing to be read.
fn fresh(relation: &pb::Relation, old_keys: Vec<String>) -> Cursor {
    if is_cache(relation) {
        Cursor::done(relation.fingerprint)
    } else {
        Cursor::start(relation.fingerprint, old_keys)
    }
}
