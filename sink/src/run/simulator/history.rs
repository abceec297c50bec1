//! The reference: what every row and label was at every position of the WAL, and so what Redis must hold at any position.
//! Deliberately simple; nothing of the sink is used here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use walmirror_proto::pb::Mode;

use super::postgres::Effect;
use super::redis::Stored;
use super::table::{Definition, Id, Row};

/// A value from a commit on: where its record starts, where it ends, the value.
type Since<T> = Vec<(u64, u64, Option<T>)>;

#[derive(Clone, Debug, Default)]
pub(super) struct History {
    rows: BTreeMap<(u32, Id), Since<Row>>,
    labels: BTreeMap<u32, Since<Arc<Definition>>>,
    /// What keys begin with that a table left behind with its label, under earlier ones too: where rows of one came that the stream had not
    /// told of, or that another one followed, the sink cannot know which is the last, and keeps both.
    kept: BTreeSet<String>,
    /// Those that a label has again, too.
    kept_once: BTreeSet<String>,
    /// oid, and the end of the transaction.
    rewrites: Vec<(u32, u64)>,
}

impl History {
    pub(super) fn add(&mut self, lsn: u64, end: u64, effects: &[Effect]) {
        for effect in effects {
            match effect {
                Effect::Row(oid, id, row) => {
                    self.rows
                        .entry((*oid, *id))
                        .or_default()
                        .push((lsn, end, row.clone()));
                }
                Effect::Rewrite(oid) => self.rewrites.push((*oid, end)),
                Effect::Keep(oid) => {
                    let prefixes: Vec<_> = self.labels(*oid).map(|label| label.prefix.clone()).collect();
                    self.kept_once.extend(prefixes.iter().cloned());
                    self.kept.extend(prefixes);
                }
                Effect::Label(oid, label) => {
                    if let Some(label) = label {
                        self.kept.remove(&label.prefix);
                    }
                    self.rewrites.push((*oid, end));
                    self.labels
                        .entry(*oid)
                        .or_default()
                        .push((lsn, end, label.clone()));
                }
            }
        }
    }

    /// What comes before a slot is made, no stream tells of: a label that had them again and is gone by then may never have been seen.
    pub(super) fn begin_stream(&mut self) {
        let labels = self.labels.values().filter_map(|since| since.last()?.2.as_ref());
        let prefixes: BTreeSet<String> = labels.map(|label| label.prefix.clone()).collect();
        let gone = self.kept_once.difference(&prefixes).cloned();
        self.kept.extend(gone.collect::<Vec<_>>());
    }

    /// Whether it was only ever a key of cached tables.
    pub(super) fn is_cached(&self, key: &[u8]) -> bool {
        let labels = self.labels.keys().flat_map(|oid| self.labels(*oid));
        let mut modes = labels
            .filter(|label| key.starts_with(label.prefix.as_bytes()))
            .map(|label| label.mode)
            .peekable();
        modes.peek().is_some() && modes.all(|mode| mode == Mode::Cache)
    }

    pub(super) fn row(&self, oid: u32, id: Id, at: u64) -> Option<&Row> {
        last(self.rows.get(&(oid, id)), at)
    }

    pub(super) fn label(&self, oid: u32, at: u64) -> Option<&Arc<Definition>> {
        last(self.labels.get(&oid), at)
    }

    /// Whether the row was touched, or all rows without a record of them, since the label of that position was committed.
    pub(super) fn is_touched(&self, oid: u32, id: Id, at: u64) -> bool {
        let mut labels = self.labels.get(&oid).into_iter().flatten();
        let labelled = labels.rfind(|(_, end, _)| *end <= at);
        let (start, end) = labelled.map_or((0, 0), |(start, end, _)| (*start, *end));
        let mut rows = self.rows.get(&(oid, id)).into_iter().flatten();
        rows.any(|(_, touched, _)| *touched > start) || self.is_rewritten(oid, end, at)
    }

    /// All that the table was ever labelled.
    pub(super) fn labels(&self, oid: u32) -> impl Iterator<Item = &Arc<Definition>> {
        let since = self.labels.get(&oid).into_iter().flatten();
        since.filter_map(|(.., label)| label.as_ref())
    }

    /// Whether behind `from`, up to `to`, rows were changed without a record of them, or the label was.
    pub(super) fn is_rewritten(&self, oid: u32, from: u64, to: u64) -> bool {
        self.rewrites
            .iter()
            .any(|(rewritten, end)| *rewritten == oid && *end > from && *end <= to)
    }

    /// Whether the transaction whose commit record starts there touched the label.
    pub(super) fn relabels(&self, oid: u32, lsn: u64) -> bool {
        self.labels
            .get(&oid)
            .is_some_and(|since| since.iter().any(|(start, ..)| *start == lsn))
    }

    /// Whether the row goes, or a table that could ever make its key gets another label or none, behind `from` and up to the transaction
    /// whose commit record starts at `to`.
    pub(super) fn is_gone(&self, oid: u32, id: Id, key: &[u8], from: u64, to: u64) -> bool {
        let is_between = |start: &u64, end: &u64| *end > from && *start <= to;
        let mut rows = self.rows.get(&(oid, id)).into_iter().flatten();
        rows.any(|(start, end, row)| is_between(start, end) && row.is_none())
            || self.labels.iter().any(|(other, since)| {
                since.iter().any(|(start, end, _)| is_between(start, end))
                    && self
                        .labels(*other)
                        .any(|label| key.starts_with(label.prefix.as_bytes()))
            })
    }

    /// What the transaction whose commit record starts there wrote to the row, one after the other.
    pub(super) fn written(&self, oid: u32, id: Id, lsn: u64) -> impl Iterator<Item = Option<&Row>> {
        let all = self.rows.get(&(oid, id)).into_iter().flatten();
        all.filter(move |(start, ..)| *start == lsn)
            .map(|(.., row)| row.as_ref())
    }

    /// Whether it is a key that a table left behind, and nobody's now.
    pub(super) fn is_kept(&self, key: &[u8], at: u64) -> bool {
        let mut labels = self.labels.keys().filter_map(|oid| self.label(*oid, at));
        self.kept.iter().any(|prefix| key.starts_with(prefix.as_bytes()))
            && !labels.any(|label| key.starts_with(label.prefix.as_bytes()))
    }

    /// Whether a key that this label can make is that of a table with a more specific one at this position.
    pub(super) fn is_taken(&self, label: &Definition, key: &[u8], at: u64) -> bool {
        let mut others = self.labels.keys().filter_map(|oid| self.label(*oid, at));
        others.any(|other| label.is_taken_by(&other.prefix, key))
    }

    /// All keys of a table, as they must be at this position.
    pub(super) fn keys(&self, definition: &Definition, at: u64) -> BTreeMap<Vec<u8>, Stored> {
        let rows = self.rows.range((definition.oid, 0)..=(definition.oid, Id::MAX));
        let stored = rows.filter_map(|((oid, id), _)| {
            let stored = definition.stored(self.row(*oid, *id, at))?;
            Some((definition.key(*id), stored))
        });
        stored
            .filter(|(key, _)| !self.is_taken(definition, key, at))
            .collect()
    }
}

fn last<T>(since: Option<&Since<T>>, at: u64) -> Option<&T> {
    let since = since?;
    let after = since.partition_point(|(_, end, _)| *end <= at);
    since.get(after.checked_sub(1)?)?.2.as_ref()
}
