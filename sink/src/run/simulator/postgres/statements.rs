//! What a transaction of the model does to rows and labels, if the locks of others allow it. A rewrite takes its table for itself, as
//! ALTER TABLE does; a label and ALTER TYPE wait for no writer, and ALTER SCHEMA for nobody.

use std::sync::Arc;

use walmirror_proto::pb::Kind;

use super::super::table::{Definition, Id, NEXT, Row};
use super::{CHOICES, Effect, IDS, Postgres, Record, definition};

impl Postgres {
    /// What the transaction itself sees.
    fn latest(&self, oid: u32, id: Id) -> Option<Row> {
        self.rows.get(&(oid, id))?.last()?.1.clone()
    }

    fn latest_label(&self, oid: u32) -> Option<Arc<Definition>> {
        self.labels.get(&oid)?.last()?.1.clone()
    }

    fn may_write(&self, index: usize, oid: u32, id: Id) -> bool {
        !self.open[index].logged
            && self.open.iter().enumerate().all(|(other, open)| {
                other == index || (!open.rows.contains(&(oid, id)) && !open.exclusive.contains(&oid))
            })
    }

    fn may_take(&self, index: usize, oid: u32) -> bool {
        !self.open[index].logged
            && self.open.iter().enumerate().all(|(other, open)| {
                other == index || (!open.tables.contains(&oid) && !open.exclusive.contains(&oid))
            })
    }

    fn may_label(&self, index: usize, oid: u32) -> bool {
        !self.open[index].logged
            && self.open.iter().enumerate().all(|(other, open)| {
                other == index || (!open.labelled.contains(&oid) && !open.exclusive.contains(&oid))
            })
    }

    /// The label as the decoder sees it at a change that is made now: the transaction's own, or the last that has committed in the WAL.
    fn decoded_label(&self, index: usize, oid: u32) -> Option<Arc<Definition>> {
        let is_hidden = |xid: u64| {
            let mut others = self.open.iter().enumerate().filter(|(other, _)| *other != index);
            others.any(|(_, open)| open.xid == xid && !open.logged)
        };
        let versions = self.labels.get(&oid)?.iter().rev();
        versions.into_iter().find(|(xid, _)| !is_hidden(*xid))?.1.clone()
    }

    fn put(&mut self, index: usize, oid: u32, id: Id, row: Option<Row>) {
        let open = &mut self.open[index];
        self.rows
            .entry((oid, id))
            .or_default()
            .push((open.xid, row.clone()));
        open.rows.insert((oid, id));
        open.tables.insert(oid);
        open.effects.push(Effect::Row(oid, id, row));
    }

    fn log(&mut self, index: usize, record: impl FnOnce(Arc<Definition>) -> Record, oid: u32) {
        if let Some(definition) = self.decoded_label(index, oid) {
            self.open[index].records.push(record(definition));
        }
    }

    fn new_row(&mut self, id: Id, with_big: bool) -> Row {
        self.writes += 1;
        Row {
            id,
            v: self.writes,
            big: with_big.then(|| format!("b{}", self.writes)),
        }
    }

    /// INSERT, UPDATE (of values or of the key) or DELETE of one row.
    pub(in crate::run::simulator) fn write(&mut self, index: usize, oid: u32, id: Id, choice: u64, to: Id) {
        if !self.may_write(index, oid, id) {
            return;
        }
        let Some(old) = self.latest(oid, id) else {
            let row = self.new_row(id, choice != 1);
            self.put(index, oid, id, Some(row.clone()));
            return self.log_row(index, oid, Kind::Insert, row, false, None);
        };
        match choice {
            0 | 1 => {
                self.put(index, oid, id, None);
                self.log_row(index, oid, Kind::Delete, old, false, None);
            }
            2 | 3 if to != id && self.may_write(index, oid, to) && self.latest(oid, to).is_none() => {
                let mut row = self.new_row(to, true);
                let unchanged = choice == 2 && old.big.is_some();
                if unchanged {
                    row.big = old.big;
                }
                self.put(index, oid, id, None);
                self.put(index, oid, to, Some(row.clone()));
                self.log_row(index, oid, Kind::Update, row, unchanged, Some(id));
            }
            4 | 5 if old.big.is_some() => {
                let row = Row {
                    big: old.big,
                    ..self.new_row(id, true)
                };
                self.put(index, oid, id, Some(row.clone()));
                self.log_row(index, oid, Kind::Update, row, true, None);
            }
            _ => {
                let row = self.new_row(id, choice != 6);
                self.put(index, oid, id, Some(row.clone()));
                self.log_row(index, oid, Kind::Update, row, false, None);
            }
        }
    }

    fn log_row(&mut self, index: usize, oid: u32, kind: Kind, row: Row, unchanged: bool, old: Option<Id>) {
        let record = |definition| Record::Row {
            definition,
            kind,
            row,
            unchanged,
            old,
        };
        self.log(index, record, oid);
    }

    pub(in crate::run::simulator) fn truncate(&mut self, index: usize, oid: u32) {
        if self.may_take(index, oid) {
            self.open[index].exclusive.insert(oid);
            for id in (0..IDS)
                .filter(|id| self.latest(oid, *id).is_some())
                .collect::<Vec<_>>()
            {
                self.put(index, oid, id, None);
            }
            self.open[index].tables.insert(oid);
            self.log(index, Record::Truncate, oid);
        }
    }

    /// Gives the table this label, with the definition that `make` makes of a new fingerprint.
    pub(in crate::run::simulator) fn relabel(
        &mut self,
        index: usize,
        oid: u32,
        make: impl FnOnce(u64) -> Definition,
    ) {
        if self.may_label(index, oid) {
            let definition = Arc::new(make(self.fingerprints + 1));
            if self.has_prefix(index, oid, &definition.prefix) {
                return;
            }
            self.fingerprints += 1;
            self.set_label(index, oid, Some(Arc::clone(&definition)));
            self.open[index].records.push(Record::Announce(definition, false));
        }
    }

    /// Whether another table has it, or has had it before a transaction that still runs.
    fn has_prefix(&self, index: usize, oid: u32, prefix: &str) -> bool {
        let mut others = self.labels.iter().filter(|(other, _)| **other != oid);
        others.any(|(other, versions)| {
            let mut running = self.open.iter().enumerate();
            let is_open = running.any(|(number, open)| number != index && open.labelled.contains(other));
            let mut last = versions
                .iter()
                .rev()
                .take(if is_open { versions.len() } else { 1 });
            last.any(|(_, label)| label.as_ref().is_some_and(|label| label.prefix == prefix))
        })
    }

    /// A table has what the keys of another one began with, which has something else from then on, or nothing.
    pub(in crate::run::simulator) fn hand_over(&mut self, index: usize, from: u32, choice: u64) {
        let Some(label) = self.latest_label(from) else {
            return;
        };
        let to = if from == NEXT && label.prefix.starts_with('a') {
            101
        } else if from == NEXT {
            103
        } else {
            NEXT
        };
        if !self.may_label(index, from) || !self.may_label(index, to) {
            return;
        }
        match choice % 3 {
            0 => {
                let other = definition(from, 0, choice / 3).prefix;
                self.relabel(index, from, |fingerprint| Definition {
                    fingerprint,
                    prefix: other,
                    ..Definition::clone(&label)
                });
            }
            _ => self.unlabel(index, from, choice % 6 == 1),
        }
        let number = label.prefix.ends_with("1:") as u64;
        let kinds = (0..CHOICES).map(|other| (choice + other) / 2 * 2 + number);
        let mut fitting = kinds.filter(|kind| definition(to, 0, *kind).prefix == label.prefix);
        if let Some(kind) = fitting.next() {
            self.relabel(index, to, |fingerprint| definition(to, fingerprint, kind));
        }
    }

    pub(in crate::run::simulator) fn unlabel(&mut self, index: usize, oid: u32, keep_keys: bool) {
        if self.may_label(index, oid) && self.latest_label(oid).is_some() {
            if keep_keys {
                self.open[index].effects.push(Effect::Keep(oid));
            }
            self.set_label(index, oid, None);
            self.open[index].records.push(Record::Forget(oid, keep_keys));
        }
    }

    /// ALTER TYPE of a type of its columns, which locks no table: values are printed in another way.
    pub(in crate::run::simulator) fn rename_values(&mut self, index: usize, oid: u32) {
        let label = self.latest_label(oid).filter(|_| self.may_label(index, oid));
        if let Some(label) = label {
            let definition = Arc::new(Definition {
                renames: label.renames + 1,
                ..Definition::clone(&label)
            });
            self.set_label(index, oid, Some(Arc::clone(&definition)));
            self.open[index].records.push(Record::Announce(definition, true));
        }
    }

    /// ALTER SCHEMA, of which the keys and values show nothing. It locks no table, so another label may be set, and committed first.
    pub(in crate::run::simulator) fn rename_schema(&mut self, index: usize, oid: u32) {
        if !self.open[index].logged {
            self.log(index, |definition| Record::Announce(definition, false), oid);
        }
    }

    /// DDL that changes rows without a record of any row: the definition is announced, to be refreshed.
    pub(in crate::run::simulator) fn rewrite(&mut self, index: usize, oid: u32) {
        if self.may_take(index, oid) && self.latest_label(oid).is_some() {
            self.open[index].exclusive.insert(oid);
            for id in (0..IDS)
                .filter(|id| self.latest(oid, *id).is_some())
                .collect::<Vec<_>>()
            {
                let row = self.new_row(id, true);
                self.put(index, oid, id, Some(row));
            }
            self.open[index].effects.push(Effect::Rewrite(oid));
            self.log(index, |definition| Record::Announce(definition, true), oid);
        }
    }

    fn set_label(&mut self, index: usize, oid: u32, label: Option<Arc<Definition>>) {
        let open = &mut self.open[index];
        self.labels
            .entry(oid)
            .or_default()
            .push((open.xid, label.clone()));
        open.labelled.insert(oid);
        open.tables.insert(oid);
        open.effects.push(Effect::Label(oid, label));
    }
}
