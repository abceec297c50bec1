//! The worker that reads tables and looks for keys without rows.

use std::collections::VecDeque;
use std::sync::Arc;

use super::super::dice::Dice;
use super::super::postgres::{IDS, OIDS, Postgres};
use super::super::redis::{Broken, Redis};
use super::super::table::{Definition, Id};
use super::{Courier, row_of};
use crate::backfill::{Backfill, Catalog, Content, Cursor, PackedRows, Stage, Task};
use crate::error::Error;
use crate::gate::Snapshot;
use crate::plan::{Belongs, Owned};
use crate::run::planning::Planning;

enum State {
    Idle,
    /// Until every transaction below this one is over; then the catalog is read, for so many wishes.
    Outlast(u64, u64),
    /// Until this question is answered.
    Ask(u64, u32, Task),
    Fill(u32, Task, Cursor),
    /// Read, and its marker not yet written.
    Read(u32, Task, Snapshot, Content, Cursor),
    Sweep(u32, Task, VecDeque<Vec<u8>>),
    Absent(u32, Task, VecDeque<Vec<u8>>, Snapshot, Vec<Vec<u8>>),
}

/// The worker that reads tables and looks for keys without rows.
pub(in crate::run::simulator) struct Tables {
    courier: Courier,
    state: State,
}

impl Tables {
    pub(in crate::run::simulator) fn new(marker_prefix: String, broken: Broken) -> Self {
        Self {
            courier: Courier::new(marker_prefix, broken),
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
                    let newest = postgres.burn_xid();
                    self.state = State::Outlast(newest + 1, backfill.wishes());
                    return Ok(());
                }
                let is_held_up = |_: u32, task: &Task| {
                    let horizon = task.cursor.horizon;
                    horizon.is_none_or(|horizon| postgres.oldest_running() < horizon)
                };
                match backfill.next_task(0, is_held_up) {
                    Some((relation, task)) if task.cursor.stage == Stage::Fill => {
                        let cursor = task.cursor.clone();
                        State::Fill(relation, task, cursor)
                    }
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
            State::Fill(relation, task, _) if is_over(relation, &task) => State::Idle,
            State::Fill(relation, task, cursor)
                if window.outstanding() > 1 || postgres.is_locked(relation) =>
            {
                State::Fill(relation, task, cursor)
            }
            State::Fill(relation, task, cursor) => match self.courier.snapshot(postgres, backfill) {
                None => State::Fill(relation, task, cursor),
                Some(snapshot) => match postgres.label(relation, &snapshot) {
                    None => State::Idle,
                    Some(label) => self.read(postgres, relation, task, cursor, snapshot, &label, dice),
                },
            },
            State::Read(relation, task, snapshot, content, cursor) => {
                let (target, next) = ((relation, task.generation), cursor.clone());
                self.courier.submit(
                    planning,
                    backfill,
                    postgres,
                    target,
                    snapshot,
                    content,
                    Some(cursor),
                )?;
                if next.stage != Stage::Fill {
                    State::Idle
                } else {
                    State::Fill(relation, task, next)
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
    let others = backfill.other_templates(relation);
    let owned = Owned::new(relation, &task.mapping.template, &task.cursor.old_keys, &others);
    keys.retain(|key| match owned.belongs(key) {
        Belongs::ToRow(values) => {
            row_of(&values).is_none_or(|id| postgres.row(relation, id, snapshot).is_none())
        }
        Belongs::ToNoRow => true,
        Belongs::Elsewhere => false,
    });
    keys
}
