//! The worker that reads tables and looks for keys without rows.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::super::dice::Dice;
use super::super::postgres::{IDS, OIDS, Postgres};
use super::super::redis::{Broken, Redis};
use super::super::table::{Definition, Id, row_of};
use super::Courier;
use crate::backfill::{Backfill, Catalog, Content, Cursor, PackedRows, Stage, Task};
use crate::error::Error;
use crate::gate::Snapshot;
use crate::plan::Belongs;
use crate::run::planning::Planning;

enum State {
    Idle,
    /// Until every transaction below this one is over; then the catalog is read, for so many wishes.
    Outlast(u64, u64),
    /// Until this question is answered.
    Ask(u64, u32, Task),
    Fill(u32, Task),
    /// Read, and its marker not yet written.
    Read(u32, Task, Snapshot, Content, Cursor),
    Sweep(u32, Task, VecDeque<Vec<u8>>),
    Absent(u32, Task, VecDeque<Vec<u8>>, Snapshot, Vec<Vec<u8>>),
}

/// A table that is being filled; others have their turns meanwhile.
struct Filling {
    generation: u64,
    cursor: Cursor,
    courier: Courier,
    is_read: bool,
}

impl Filling {
    fn is_of(&self, task: &Task) -> bool {
        self.generation == task.generation && !self.courier.window.is_stale()
    }
}

/// The worker that reads tables and looks for keys without rows.
pub(in crate::run::simulator) struct Tables {
    courier: Courier,
    fillings: BTreeMap<u32, Filling>,
    state: State,
}

impl Tables {
    pub(in crate::run::simulator) fn new(marker_prefix: String, broken: Broken) -> Self {
        Self {
            courier: Courier::new(marker_prefix, broken),
            fillings: BTreeMap::new(),
            state: State::Idle,
        }
    }

    pub(in crate::run::simulator) fn step(
        &mut self,
        planning: &mut Planning,
        backfill: &Backfill,
        postgres: &mut Postgres,
        redis: &Redis,
        dice: &mut Dice,
    ) -> Result<(), Error> {
        let window = Arc::clone(&self.courier.window);
        let is_over =
            |relation, task: &Task| window.is_stale() || !backfill.is_current(relation, task.generation);
        let state = std::mem::replace(&mut self.state, State::Idle);
        self.state = match state {
            State::Idle if window.outstanding() > 0 => State::Idle,
            State::Idle => {
                window.reset(|| true);
                if !backfill.is_reconciled() {
                    let until = match self.courier.broken {
                        Broken::EarlyCatalog => 0,
                        _ => postgres.burn_xid() + 1,
                    };
                    self.state = State::Outlast(until, backfill.wishes());
                    return Ok(());
                }
                self.fillings.retain(|relation, filling| {
                    let task = backfill.task(*relation).filter(|task| filling.is_of(task));
                    task.is_some_and(|task| !filling.is_read || task.cursor.stage == Stage::Fill)
                });
                let is_paused = |relation: u32, task: &Task| {
                    let horizon = task.cursor.horizon;
                    let filling = self.fillings.get(&relation);
                    horizon.is_none_or(|horizon| postgres.oldest_running() < horizon)
                        || filling.is_some_and(|filling| filling.is_read && task.cursor.stage == Stage::Fill)
                };
                let last = OIDS.get(dice.roll(OIDS.len() as u64) as usize).copied();
                match backfill.next_task(last.unwrap_or(0), is_paused) {
                    Some((relation, task)) if task.cursor.stage == Stage::Fill => State::Fill(relation, task),
                    Some((relation, task)) => self.ask(planning, backfill, postgres, relation, task)?,
                    None => State::Idle,
                }
            }
            State::Outlast(until, wishes) if postgres.oldest_running() < until => {
                State::Outlast(until, wishes)
            }
            State::Outlast(_, wishes) => {
                let snapshot = postgres.snapshot();
                let labels = OIDS.iter().filter_map(|oid| postgres.label(*oid, &snapshot));
                let content = Content::Catalog(Catalog {
                    relations: labels.map(|definition| definition.relation(0)).collect(),
                    wishes,
                    ..Catalog::default()
                });
                self.courier.submit(
                    planning,
                    backfill,
                    postgres,
                    (0, 0),
                    Snapshot::default(),
                    content,
                    None,
                )?;
                State::Idle
            }
            State::Ask(asked, relation, task) if !backfill.is_answered(asked) => {
                State::Ask(asked, relation, task)
            }
            State::Ask(_, relation, task) => {
                State::Sweep(relation, task, redis.data.keys().cloned().collect())
            }
            State::Fill(relation, task) => {
                let filling = self.fillings.entry(relation).or_insert_with(|| Filling {
                    generation: task.generation,
                    cursor: task.cursor.clone(),
                    courier: self.courier.another(),
                    is_read: false,
                });
                let is_current = filling.is_of(&task) && backfill.is_current(relation, task.generation);
                if !is_current || filling.courier.window.outstanding() > 4 || postgres.is_locked(relation) {
                    // It is not its turn, or begins anew.
                    return Ok(());
                }
                let cursor = filling.cursor.clone();
                match self.courier.snapshot(postgres, backfill) {
                    None => State::Idle,
                    Some(snapshot) => match postgres.label(relation, &snapshot) {
                        None => State::Idle,
                        Some(label) => self.read(postgres, relation, task, cursor, snapshot, &label, dice),
                    },
                }
            }
            State::Read(relation, task, snapshot, content, cursor) => {
                let Some(filling) = self.fillings.get_mut(&relation) else {
                    return Ok(());
                };
                let (target, next) = ((relation, task.generation), Some(cursor.clone()));
                filling
                    .courier
                    .submit(planning, backfill, postgres, target, snapshot, content, next)?;
                filling.is_read = cursor.stage != Stage::Fill;
                filling.cursor = cursor;
                if filling.is_read || dice.roll(3) == 0 {
                    State::Idle
                } else {
                    State::Fill(relation, task)
                }
            }
            State::Sweep(relation, task, _) if is_over(relation, &task) => State::Idle,
            State::Sweep(relation, task, keys)
                if window.outstanding() > 1 || postgres.is_locked(relation) =>
            {
                State::Sweep(relation, task, keys)
            }
            State::Sweep(relation, task, keys) if keys.is_empty() => {
                let (snapshot, done) = (postgres.snapshot(), Cursor::done(task.cursor.fingerprint));
                let target = (relation, task.generation);
                self.courier.submit(
                    planning,
                    backfill,
                    postgres,
                    target,
                    snapshot,
                    Content::Absent(vec![]),
                    Some(done),
                )?;
                State::Idle
            }
            State::Sweep(relation, task, mut keys) => match self.courier.snapshot(postgres, backfill) {
                None => State::Sweep(relation, task, keys),
                Some(snapshot) => {
                    let page: Vec<_> = keys.drain(..keys.len().min(4)).collect();
                    let absent = absent(postgres, backfill, relation, &task, &snapshot, page);
                    let snapshot = self.courier.claimed(postgres, snapshot);
                    State::Absent(relation, task, keys, snapshot, absent)
                }
            },
            State::Absent(relation, task, keys, snapshot, absent) => {
                let target = (relation, task.generation);
                self.courier.submit(
                    planning,
                    backfill,
                    postgres,
                    target,
                    snapshot,
                    Content::Absent(absent),
                    None,
                )?;
                State::Sweep(relation, task, keys)
            }
        };
        Ok(())
    }

    /// A sweep begins.
    fn ask(
        &self,
        planning: &mut Planning,
        backfill: &Backfill,
        postgres: &mut Postgres,
        relation: u32,
        task: Task,
    ) -> Result<State, Error> {
        let asked = match self.courier.broken {
            Broken::SweepAhead => 0,
            _ => backfill.ask(),
        };
        let (nowhere, nothing) = (Snapshot::default(), Content::Orphans(vec![]));
        self.courier
            .submit(planning, backfill, postgres, (0, 0), nowhere, nothing, None)?;
        Ok(State::Ask(asked, relation, task))
    }

    #[allow(clippy::too_many_arguments)]
    fn read(
        &self,
        postgres: &Postgres,
        relation: u32,
        task: Task,
        cursor: Cursor,
        snapshot: Snapshot,
        label: &Definition,
        dice: &mut Dice,
    ) -> State {
        let mut rows = PackedRows::default();
        let mut next = cursor;
        let until = (next.block + 1 + dice.roll(3) as u32).min(u32::from(IDS));
        let is_last = next.block >= u32::from(IDS);
        while next.block < until {
            if let Some(row) = postgres.row(relation, next.block as Id, &snapshot) {
                rows.push(&label.pack(&row));
            }
            next.block += 1;
        }
        if is_last {
            next = next.filled();
        }
        let snapshot = self.courier.claimed(postgres, snapshot);
        State::Read(relation, task, snapshot, Content::Rows(rows), next)
    }
}

/// Those of the keys that belong to the table and have no row.
fn absent(
    postgres: &Postgres,
    backfill: &Backfill,
    relation: u32,
    task: &Task,
    snapshot: &Snapshot,
    mut keys: Vec<Vec<u8>>,
) -> Vec<Vec<u8>> {
    let owned = backfill.owned(relation, &task.mapping.template, &task.cursor.old_keys);
    keys.retain(|key| match owned.belongs(key) {
        Belongs::ToRow(values) => {
            row_of(relation, &values).is_none_or(|id| postgres.row(relation, id, snapshot).is_none())
        }
        Belongs::ToNoRow => true,
        Belongs::Elsewhere => false,
    });
    keys
}
