//! The invariants, checked after every step, and the comparison of everything at the end.

use std::collections::BTreeMap;

use prost::Message;
use walmirror_proto::pb::Mode;

use super::history::History;
use super::postgres::OIDS;
use super::redis::{PENDING, RELATIONS, Redis, Stored};
use super::table::{Definition, Id, NARROW};
use crate::backfill::Cursor;
use crate::progress::Progress;

#[derive(Debug, Default)]
pub(super) struct Checks {
    /// Epoch and position when they were looked at last.
    last: Option<(u64, u64)>,
    steps: usize,
    /// The cursors, and what they were read from.
    cursors: BTreeMap<u32, (String, Option<Cursor>)>,
}

impl Checks {
    /// Redis lost something: positions may go back.
    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }

    /// `incarnation` is that of Postgres: until a sink has written there what of it it knows, Redis holds what is lost.
    pub(super) fn look(
        &mut self,
        redis: &Redis,
        history: &History,
        incarnation: usize,
    ) -> Result<(), String> {
        if let Some(violation) = &redis.violation {
            return Err(violation.clone());
        }
        if redis.steps.len() == self.steps {
            return Ok(());
        }
        self.steps = redis.steps.len();
        let Some(progress) = redis.progress() else {
            return Ok(());
        };
        let (epoch, lsn) = (progress.epoch, progress.lsn.0);
        if let Some((last_epoch, last)) = self.last
            && epoch == last_epoch
            && lsn < last
        {
            return Err(format!(
                "the position went back from {last} to {lsn} in epoch {epoch} (I4)"
            ));
        }
        self.last = Some((epoch, lsn));
        if progress.resync || redis.incarnation() != incarnation {
            // Everything is to be made anew, and the first step of the session says so.
            return Ok(());
        }
        self.cursors.retain(|oid, _| progress.cursors.contains_key(oid));
        for (oid, text) in &progress.cursors {
            if self.cursors.get(oid).is_none_or(|(read, _)| read != text) {
                self.cursors.insert(*oid, (text.clone(), Cursor::parse(text)));
            }
        }
        let step = Step::last(redis, history, &progress, incarnation);
        for oid in OIDS {
            let Some(label) = history.label(oid, lsn) else {
                continue;
            };
            let is_cut = progress
                .part
                .is_some_and(|part| history.relabels(oid, part.commit_lsn.0));
            if !is_cut && is_known(redis, label) {
                let cursor = self.cursors.get(&oid).and_then(|(_, cursor)| cursor.as_ref());
                check_table(redis, history, &progress, &step, label, cursor)?;
            }
        }
        Ok(())
    }

    /// At rest: Redis holds every row of every mirrored table, rows of cached tables, and nothing else.
    pub(super) fn compare(&self, redis: &Redis, history: &History, end: u64) -> Result<(), String> {
        let mut held: BTreeMap<_, _> = redis
            .data
            .iter()
            .filter(|(key, _)| !key.starts_with(b"walmirror:{"))
            .collect();
        for label in OIDS.iter().filter_map(|oid| history.label(*oid, end)) {
            for (key, stored) in history.keys(label, end) {
                match held.remove(&key) {
                    Some(found) if *found == stored => {}
                    None if label.mode == Mode::Cache => {}
                    found => return Err(differs("at rest", &key, found, Some(&stored))),
                }
            }
        }
        // What was lost with an earlier life of Postgres is not known any more.
        let is_first = redis.incarnation() == 0;
        if let Some((table, key)) = redis.notes.iter().find(|note| is_first && !is_bad(history, note)) {
            let (table, key) = (String::from_utf8_lossy(table), String::from_utf8_lossy(key));
            return Err(format!(
                "at rest: the row {key} of {table} was never one that is not mirrored"
            ));
        }
        match held.into_iter().find(|(key, _)| !history.is_kept(key, end)) {
            Some((key, found)) => Err(differs("at rest", key, Some(found), None)),
            None if redis.pending().next().is_some() => Err("a key is still pending".to_owned()),
            None => Ok(()),
        }
    }
}

/// Whether a row that was noted has a key that is too long, or one that another table could take.
fn is_bad(history: &History, (table, key): &(Vec<u8>, Vec<u8>)) -> bool {
    let oid = OIDS
        .into_iter()
        .find(|oid| format!("public.t{oid}").into_bytes() == *table);
    let mut labels = oid.into_iter().flat_map(|oid| history.labels(oid));
    labels.any(|label| {
        let is_long = |id: Id| !label.is_short(id) && label.key(id).starts_with(key);
        (0..super::postgres::IDS).any(is_long) || label.may_be_taken(key)
    })
}

/// What of a `pb::Relation` is looked at after every step.
#[derive(Clone, PartialEq, Message)]
struct Version {
    #[prost(fixed64, tag = "11")]
    fingerprint: u64,
}

/// Whether Redis is kept by this version of the table.
fn is_known(redis: &Redis, label: &Definition) -> bool {
    known(redis, label.oid) == Some(label.fingerprint)
}

/// By which version of the table Redis is kept.
fn known(redis: &Redis, oid: u32) -> Option<u64> {
    let stored = redis.hash(RELATIONS)?.get(oid.to_string().as_bytes())?;
    Version::decode(stored.as_slice())
        .ok()
        .map(|version| version.fingerprint)
}

/// Whether Redis is kept by what the table that takes keys is at this position, so that it is known whose keys those are.
fn is_taker_known(redis: &Redis, history: &History, progress: &Progress) -> bool {
    let version = history
        .label(NARROW, progress.lsn.0)
        .map(|label| label.fingerprint);
    let is_cut = progress
        .part
        .is_some_and(|part| history.relabels(NARROW, part.commit_lsn.0));
    known(redis, NARROW) == version && !is_cut
}

/// What the last step did, for all tables alike.
struct Step<'a> {
    /// The keys that it changed.
    changed: Vec<&'a Vec<u8>>,
    /// The position before it.
    before: u64,
    /// Whether it told Redis what the tables are.
    is_met: bool,
    is_taker_known: bool,
    /// Keys may go with a label that nobody knows of any more: Redis had it from files that were put back since.
    may_purge_for_lost: bool,
}

impl<'a> Step<'a> {
    fn last(redis: &'a Redis, history: &History, progress: &Progress, incarnation: usize) -> Self {
        Self {
            changed: redis.changed().collect(),
            before: redis.position_after(redis.steps.len().saturating_sub(1)),
            is_met: redis.touched(RELATIONS),
            is_taker_known: is_taker_known(redis, history, progress),
            may_purge_for_lost: incarnation > 0,
        }
    }
}

/// INVARIANT I10, and that nothing is lost: a key whose table is complete is what the position says; of one whose table
/// is being filled, what the last step wrote is. Pending keys that the stream has brought are to be read again.
fn check_table(
    redis: &Redis,
    history: &History,
    progress: &Progress,
    step: &Step,
    label: &Definition,
    cursor: Option<&Cursor>,
) -> Result<(), String> {
    let is_done = cursor.is_some_and(|cursor| cursor.is_done() && cursor.fingerprint == label.fingerprint);
    let lsn = progress.lsn.0;
    // What the same step wrote to a key before a rewrite or under an old label is stale until the key is filled, as the others
    // are.
    // Who was writing when the label changed did so under several, perhaps this one before: that is stale until the key is filled, too.
    let is_stale = history.is_rewritten(label.oid, step.before, lsn) || history.labels(label.oid).count() > 1;
    for id in 0..super::postgres::IDS {
        let key = label.key(id);
        let may_be_taken = label.may_be_taken(&key);
        if may_be_taken && (!step.is_taker_known || history.is_taken(label, &key, lsn)) {
            continue;
        }
        // What the same step wrote before another table took the key, or while it was that one's, is another row.
        let is_stale = is_stale || step.is_met && (may_be_taken || label.is_shared() || label.oid == NARROW);
        let is_pending = redis
            .hash(PENDING)
            .is_some_and(|pending| pending.contains_key(&key));
        let is_changed = step.changed.contains(&&key);
        // A table is not complete while rows that only a backfill brings are still to be read.
        let is_filled = is_done && label.mode == Mode::Mirror && !history.is_touched(label.oid, id, lsn);
        if is_pending && !is_filled || !(is_done || is_changed && !is_stale) {
            continue;
        }
        let found = redis.data.get(&key);
        let is_purged =
            step.may_purge_for_lost && progress.purging.is_some() || is_purged(history, progress, label, id);
        if found.is_none() && (label.mode == Mode::Cache || is_purged) {
            continue;
        }
        let row = history.row(label.oid, id, lsn);
        let wanted = label.stored(row);
        if found != wanted.as_ref() && !is_in_part(history, progress, label, id, found) {
            let place = format!(
                "at {lsn}, table {}",
                if is_done { "complete" } else { "being filled" }
            );
            return Err(format!("{} (I10)", differs(&place, &key, found, wanted.as_ref())));
        }
    }
    Ok(())
}

/// Whether the key was removed ahead of the transaction that it goes with.
fn is_purged(history: &History, progress: &Progress, label: &Definition, id: Id) -> bool {
    progress.purging.is_some_and(|purging| match purging.commit {
        Some(commit) => {
            let key = label.key(id);
            history.is_gone(label.oid, id, &key, progress.lsn.0, commit.lsn.0)
        }
        // The catalog wants it, which knows more than the position.
        None => true,
    })
}

/// Of a large transaction a part is applied: then a key may be what that wrote to it.
fn is_in_part(
    history: &History,
    progress: &Progress,
    label: &Definition,
    id: Id,
    found: Option<&Stored>,
) -> bool {
    progress.part.is_some_and(|part| {
        let mut written = history.written(label.oid, id, part.commit_lsn.0);
        written.any(|row| label.stored(row).as_ref() == found)
    })
}

fn differs(place: &str, key: &[u8], found: Option<&Stored>, wanted: Option<&Stored>) -> String {
    let text = |stored: Option<&Stored>| match stored {
        None => "nothing".to_owned(),
        Some(Stored::Text(text)) => String::from_utf8_lossy(text).into_owned(),
        Some(Stored::Hash(fields)) => {
            let pair = |(field, value): (&Vec<u8>, &Vec<u8>)| {
                format!(
                    "{}={}",
                    String::from_utf8_lossy(field),
                    String::from_utf8_lossy(value)
                )
            };
            fields.iter().map(pair).collect::<Vec<_>>().join(" ")
        }
    };
    format!(
        "{place}: {} holds {}, and should hold {}",
        String::from_utf8_lossy(key),
        text(found),
        text(wanted)
    )
}
