//! Online, resumable backfill. Workers read tables by SQL, each stretch in its own snapshot, while the stream goes on;
//! markers in the WAL tell where in the stream what they read belongs, and the gate decides row by row.
//!
//! Here is what planner and workers share: the list of tables with their cursors. The planner decides what is to be done
//! (it alone sees the stream), the workers do it and hand chunks back.
//!
//! INVARIANT I10: nothing that a worker read reaches Redis but through the gate.

pub(crate) mod catalog;
mod chunk;
mod cursor;
pub(crate) mod fill;
pub(crate) mod held;
mod horizon;
pub(crate) mod lookup;
mod pending;
mod refused;
pub(crate) mod report;
pub(crate) mod sql;
mod sweep;
mod tables;
mod troubles;
mod worker;
mod writers;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use walmirror_proto::key::KeyTemplate;

pub use catalog::{Catalog, Misfit};
pub use chunk::{Chunk, Content, Life, PackedRows, Permit, Room, Window};
pub use cursor::{Cursor, Stage, Walk};
pub use worker::{Context, Role, work};

use crate::gate::{Evicted, Gate, Snapshot};
use crate::plan::{Mapping, Owned};

/// A mirrored table, as the planner sees it at its place in the stream.
#[derive(Clone, Debug)]
pub struct Task {
    /// The version of the table that Redis is kept by.
    pub mapping: Arc<Mapping>,
    /// Raised whenever its backfill begins anew.
    pub generation: u64,
    /// How far its backfill is planned.
    pub cursor: Cursor,
}

/// The tables and what is to be done about them.
#[derive(Debug, Default)]
pub struct Backfill {
    tasks: Mutex<BTreeMap<u32, Task>>,
    changed: Condvar,
    stopped: AtomicBool,
    /// What the gate has forgotten, so that a worker does not read in a snapshot that the gate would refuse as a whole.
    forgotten: OnceLock<Arc<Evicted>>,
    /// Whether keys may be noted as pending.
    pending: AtomicBool,
    /// Whether the catalog was compared with the registry, and how many times that was wanted.
    reconciled: AtomicBool,
    wishes: AtomicU64,
    /// A table that was due when somebody asked last.
    last_due: AtomicU32,
    /// Whether the database is SQL_ASCII.
    any_bytes: AtomicBool,
    /// The number of the next marker.
    next_marker: AtomicU64,
    /// How many times a worker has asked to be told when what is planned is in Redis, and the last of these that was answered.
    asked: AtomicU64,
    answered: AtomicU64,
}

impl Backfill {
    /// Sets what is to be done about a table.
    pub fn set(&self, relation: u32, task: Task) {
        self.lock().insert(relation, task);
        self.changed.notify_all();
    }

    /// A table is no longer mirrored.
    pub fn remove(&self, relation: u32) {
        self.lock().remove(&relation);
        self.changed.notify_all();
    }

    /// What a worker read of this life of the table is planned.
    pub fn advance(&self, relation: u32, generation: u64, cursor: &Cursor) {
        if let Some(task) = self
            .lock()
            .get_mut(&relation)
            .filter(|task| task.generation == generation)
        {
            task.cursor = cursor.clone();
        }
        self.changed.notify_all();
    }

    /// The name of a table.
    pub fn table(&self, relation: u32) -> Option<String> {
        let tasks = self.lock();
        tasks.get(&relation).map(|task| task.mapping.table.clone())
    }

    /// Ends the workers.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    /// Whether the session ends.
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// The gate of the session.
    pub fn set_gate(&self, gate: &Gate) {
        let _ = self.forgotten.set(gate.forgotten());
    }

    /// Whether the gate would refuse nearly all that is read in this snapshot: what the gate itself asks of a key that it does not know.
    pub fn is_useless(&self, snapshot: &Snapshot) -> bool {
        self.hidden_from(snapshot).is_some()
    }

    /// The transaction for which that is so.
    fn hidden_from(&self, snapshot: &Snapshot) -> Option<u64> {
        self.forgotten.get()?.hidden_from(snapshot)
    }

    /// Keys were noted as pending.
    pub fn note_pending(&self) {
        if !self.pending.swap(true, Ordering::AcqRel) {
            self.changed.notify_all();
        }
    }

    /// Whether there may be keys that are noted as pending.
    pub(crate) fn has_pending(&self) -> bool {
        self.pending.load(Ordering::Acquire)
    }

    /// The pending hash was found to be empty. It has to be looked at once more after this: a key may have been noted meanwhile.
    pub(crate) fn clear_pending(&self) {
        self.pending.store(false, Ordering::Release);
    }

    pub(crate) fn note_any_bytes(&self) {
        self.any_bytes.store(true, Ordering::Release);
    }

    /// Whether text of the database may be any bytes.
    pub fn any_bytes(&self) -> bool {
        self.any_bytes.load(Ordering::Acquire)
    }

    /// Asks to be told when all that is planned by now is in Redis: [`Self::is_answered`] is, for this number.
    pub(crate) fn ask(&self) -> u64 {
        self.asked.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// The last question; what is planned now is behind it.
    pub fn asked(&self) -> u64 {
        self.asked.load(Ordering::Acquire)
    }

    /// What was planned before this question is in Redis.
    pub fn answer(&self, asked: u64) {
        if self.answered.fetch_max(asked, Ordering::AcqRel) < asked {
            // Whoever has just looked waits by now.
            drop(self.lock());
            self.changed.notify_all();
        }
    }

    pub(crate) fn is_answered(&self, asked: u64) -> bool {
        self.answered.load(Ordering::Acquire) >= asked
    }

    /// The catalog, as it was read after so many wishes, was compared with the registry.
    pub fn note_reconciled(&self, wishes: u64) {
        self.reconciled.store(self.wishes() == wishes, Ordering::Release);
        self.changed.notify_all();
    }

    /// How many times it was wanted that the catalog is compared.
    pub fn wishes(&self) -> u64 {
        self.wishes.load(Ordering::Acquire)
    }

    /// A table turned up that nobody announced: the catalog is to be compared again.
    pub fn want_reconcile(&self) {
        self.wishes.fetch_add(1, Ordering::AcqRel);
        self.reconciled.store(false, Ordering::Release);
        self.changed.notify_all();
    }

    pub(crate) fn is_reconciled(&self) -> bool {
        self.reconciled.load(Ordering::Acquire)
    }

    /// How many tables there are, and how many of them are not complete.
    pub(crate) fn progress(&self) -> (u64, u64) {
        let tasks = self.lock();
        let due = tasks.values().filter(|task| !task.cursor.is_done()).count();
        (tasks.len() as u64, due as u64)
    }

    /// Whether nothing is left to be done but what the stream brings.
    pub fn is_idle(&self) -> bool {
        let is_due = |task: &Task| !task.cursor.is_done() || task.cursor.horizon.is_none();
        if !self.is_reconciled() || self.has_pending() {
            return false;
        }
        let tasks = self.lock();
        // It is asked about every transaction for as long as thousands of tables may be due: mostly it is the same one that is.
        let last = self.last_due.load(Ordering::Relaxed);
        if tasks.get(&last).is_some_and(is_due) {
            return false;
        }
        let due = tasks.iter().find(|(_, task)| is_due(task));
        due.inspect(|(relation, _)| self.last_due.store(**relation, Ordering::Relaxed))
            .is_none()
    }

    /// The tables whose horizon is not known.
    pub(crate) fn without_horizon(&self) -> Vec<Life> {
        let tasks = self.lock();
        let without = tasks.iter().filter(|(_, task)| task.cursor.horizon.is_none());
        without
            .map(|(relation, task)| (*relation, task.generation))
            .collect()
    }

    /// The table, if it is still in this life.
    pub(crate) fn task(&self, relation: u32) -> Option<Task> {
        self.lock().get(&relation).cloned()
    }

    pub(crate) fn is_current(&self, relation: u32, generation: u64) -> bool {
        self.lock()
            .get(&relation)
            .is_some_and(|task| task.generation == generation)
    }

    /// The first table behind `last` that is to be filled, or one before, or else the first of those whose keys are to be checked.
    /// One that cannot be read does not hold up the others; those that `is_paused` says have to wait.
    pub(crate) fn next_task(&self, last: u32, is_paused: impl Fn(u32, &Task) -> bool) -> Option<(u32, Task)> {
        let tasks = self.lock();
        let is_paused = &is_paused;
        let of_stage = |stage: Stage| {
            tasks
                .iter()
                .filter(move |(relation, task)| task.cursor.stage == stage && !is_paused(**relation, task))
        };
        let behind = of_stage(Stage::Fill).find(|(relation, _)| **relation > last);
        let next = behind
            .or_else(|| of_stage(Stage::Fill).next())
            .or_else(|| of_stage(Stage::Sweep).next());
        next.map(|(relation, task)| (*relation, task.clone()))
    }

    /// The tables whose keys are to be checked.
    fn sweeps(&self, is_paused: impl Fn(u32, &Task) -> bool) -> Vec<(u32, Task)> {
        let tasks = self.lock();
        let due = tasks
            .iter()
            .filter(|(relation, task)| task.cursor.stage == Stage::Sweep && !is_paused(**relation, task));
        due.map(|(relation, task)| (*relation, task.clone())).collect()
    }

    /// The first of the tables that are due and whose horizon is above `oldest`, and how many there are.
    fn behind_writers(&self, oldest: u64) -> Option<(String, usize)> {
        let tasks = self.lock();
        let is_behind = |task: &&Task| {
            !task.cursor.is_done() && task.cursor.horizon.is_some_and(|horizon| horizon > oldest)
        };
        let mut behind = tasks.values().filter(is_behind);
        let first = behind.next()?.mapping.table.clone();
        Some((first, behind.count() + 1))
    }

    /// Whether a table is to be filled that does not have to wait.
    fn wants_fill(&self, is_paused: impl Fn(u32, &Task) -> bool) -> bool {
        let is_due =
            |relation: u32, task: &Task| task.cursor.stage == Stage::Fill && !is_paused(relation, task);
        let tasks = self.lock();
        tasks.iter().any(|(relation, task)| is_due(*relation, task))
    }

    /// Which keys are a table's that has this template, and had those of `old_keys`, as of now.
    pub(crate) fn owned(&self, relation: u32, template: &KeyTemplate, old_keys: &[String]) -> Owned {
        let tasks = self.lock();
        let others = tasks.iter().filter(|(other, _)| **other != relation);
        let others = others.map(|(_, task)| &task.mapping.template);
        Owned::new(relation, template, old_keys, others).of_any_bytes(self.any_bytes())
    }

    pub(crate) fn marker(&self) -> u64 {
        self.next_marker.fetch_add(1, Ordering::AcqRel)
    }

    /// Waits until something changed, for at most so long.
    fn wait(&self, time: Duration) {
        let tasks = self.lock();
        if !self.is_stopped() {
            drop(self.changed.wait_timeout(tasks, time));
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Task>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
