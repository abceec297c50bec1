//! The worker that reads tables and looks for keys without rows. All tables that are due take turns: one that takes hours, has a
//! transaction to wait for, or cannot be read, holds up no other; nor does one whose chunks wait for a stream that is behind.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::catalog::Catalog;
use super::fill::{Filling, Flow};
use super::sql::Sql;
use super::troubles::{Findings, LOCKED_PAUSE_MAX, PAUSE_MIN, Troubles};
use super::worker::{Context, IDLE, LOCK_TABLES, Role};
use super::writers::{Committing, Writers};
use super::{Content, Room, Stage, Task, Window, sweep};
use crate::error::Error;
use crate::gate::Snapshot;
use crate::redis::Connection;

/// What was read and is not planned yet takes at most about so much memory.
const ROOM_BYTES: usize = 16 * 1024 * 1024;
/// How long one table is read before others have their turn.
const TURN: Duration = Duration::from_secs(10);
/// The same while the catalog is to be compared.
const TURN_SHORT: Duration = Duration::from_millis(500);
/// So long each table is waited for when the catalog is read: one that is locked is compared later.
const LOCK_CATALOG: Duration = Duration::from_millis(100);
/// Where a table is locked, the catalog is read again after so many times as long as that took.
const CATALOG_SHARE: u32 = 10;
/// Where troubles with the list of tables are noted: no table has this oid.
const LIST: u32 = 0;
/// How long a table that is filled waits for others before its keys are checked.
const SWEEP_AFTER: Duration = Duration::from_secs(5);
/// A table that is another one than it was told to be is tried again after so long; twice as long after each attempt.
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(2);
/// What Postgres says of a table that changed is ordinary so many times; where it has not come further by then, it is told of.
const CHANGES_MAX: u32 = 5;

/// The worker.
pub(super) struct Tables<'c> {
    context: &'c Context,
    room: Arc<Room>,
    connection: Option<Sql>,
    /// The tables that are being filled.
    fillings: BTreeMap<u32, Filling>,
    changes: BTreeMap<u32, Changes>,
    troubles: Troubles,
    findings: Findings,
    writers: Writers,
    /// Whom the next look at the catalog waits for.
    committing: Option<Committing>,
    /// What was read of the catalog is on its way to the planner.
    comparing: Option<Arc<Window>>,
    /// The catalog was compared in this session, but for tables that were locked.
    is_compared: bool,
    /// The table that had the last turn.
    last: u32,
    /// Since when tables wait for a sweep.
    waiting: Option<Instant>,
    retry: Duration,
}

/// How many times in a row Postgres said of a table, at one place of it, that it had changed.
struct Changes {
    generation: u64,
    rows: u64,
    count: u32,
}

impl<'c> Tables<'c> {
    pub(super) fn new(context: &'c Context) -> Self {
        Self {
            context,
            room: Room::of(ROOM_BYTES),
            connection: None,
            fillings: BTreeMap::new(),
            changes: BTreeMap::new(),
            troubles: Troubles::default(),
            findings: Findings::default(),
            writers: Writers::default(),
            committing: None,
            comparing: None,
            is_compared: false,
            last: 0,
            waiting: None,
            retry: RETRY_MIN,
        }
    }

    /// Until the session ends.
    pub(super) fn work(mut self) -> Result<(), Error> {
        while !self.context.stopped() {
            // Whatever the session was in the middle of is over with its connection.
            let connection = self.connection.take();
            self.connection = self.turn(connection)?;
        }
        Ok(())
    }

    /// One turn of one table. Returns the connection, if it is to be kept.
    fn turn(&mut self, connection: Option<Sql>) -> Result<Option<Sql>, Error> {
        let backfill = &self.context.backfill;
        self.settle();
        let is_to_compare =
            !backfill.is_reconciled() && self.comparing.is_none() && !self.troubles.is_paused(LIST);
        let is_held_up = self.writers.hold_up_any(backfill);
        let idle = !is_to_compare && self.comparing.is_none() && !is_held_up && self.next().is_none();
        if idle && self.fillings.is_empty() {
            // An idle session is one that somebody else could use.
            drop(connection);
            backfill.wait(IDLE.min(self.troubles.until_due()));
            return Ok(None);
        }
        let mut sql = match connection {
            Some(sql) => sql,
            None => self.context.connect(Role::Tables)?,
        };
        // While it waits, tables that are known are filled.
        if is_to_compare && self.reconcile(&mut sql)? {
            return Ok(Some(sql));
        }
        if is_held_up {
            self.writers.look(backfill, &mut sql)?;
        }
        let Some((relation, task)) = self.next() else {
            let committing = self.committing.as_ref().map_or(IDLE, Committing::pause);
            let writers = if is_held_up { self.writers.pause() } else { IDLE };
            let pause = committing.min(writers);
            backfill.wait(pause.min(self.troubles.until_due()));
            return Ok(Some(sql));
        };
        // One walk over the keyspace serves all tables that are due, so more of them are waited for, but not for long.
        let sweeps = backfill.sweeps(|relation, task| self.is_paused(relation, task));
        if sweeps.is_empty() {
            self.waiting = None;
        } else {
            let since = *self.waiting.get_or_insert_with(Instant::now);
            if task.cursor.stage == Stage::Sweep || since.elapsed() > SWEEP_AFTER {
                self.waiting = None;
                self.sweep(&mut sql, sweeps)?;
                return Ok(Some(sql));
            }
        }
        self.last = relation;
        let table = &task.mapping.table;
        let locker = || sql.locker(relation);
        if self.troubles.is_locked_still(relation, table, locker) {
            return Ok(Some(sql));
        }
        match self.fill(&mut sql, relation, &task) {
            Ok(()) => Ok(Some(sql)),
            Err(error) => {
                self.troubles
                    .take(relation, table, error, || sql.whoever_locks(relation))?;
                Ok(None)
            }
        }
    }

    fn next(&self) -> Option<(u32, Task)> {
        let is_paused = |relation: u32, task: &Task| self.is_paused(relation, task);
        self.context.backfill.next_task(self.last, is_paused)
    }

    fn is_paused(&self, relation: u32, task: &Task) -> bool {
        let is_on_its_way =
            |filling: &Filling| filling.is_read && is_of(filling, task) && task.cursor.stage == Stage::Fill;
        // Nobody waits for a sweep, and what it removes should not be what an old label says.
        let is_early = task.cursor.stage == Stage::Sweep && !self.is_compared;
        self.troubles.is_paused(relation)
            || is_early
            || !self.writers.are_over(task)
            || self.fillings.get(&relation).is_some_and(is_on_its_way)
    }

    /// What became of the catalog, and of the tables whose chunks were on their way.
    fn settle(&mut self) {
        if let Some(window) = self.comparing.take_if(|window| window.outstanding() == 0) {
            self.is_compared |= !window.is_stale();
        }
        for (relation, filling) in std::mem::take(&mut self.fillings) {
            let task = self.context.backfill.task(relation);
            let Some(task) = task.filter(|task| is_of(&filling, task)) else {
                continue;
            };
            if filling.window.is_stale() {
                self.troubles.put_off(relation, RETRY_MIN, RETRY_MAX);
            } else if filling.is_read && task.cursor.stage != Stage::Fill {
                filling.finish(&task.mapping.table, task.cursor.is_done());
                self.changes.remove(&relation);
                self.troubles.clear(relation);
            } else {
                self.fillings.insert(relation, filling);
            }
        }
    }

    /// Reads a table for as long as a turn is.
    fn fill(&mut self, sql: &mut Sql, relation: u32, task: &Task) -> Result<(), Error> {
        let is_to_compare = !self.context.backfill.is_reconciled();
        let until = Instant::now() + if is_to_compare { TURN_SHORT } else { TURN };
        // It may have been announced anew since the last look at what became of the tables.
        let filling = self.fillings.remove(&relation);
        let mut filling = match filling.filter(|filling| is_of(filling, task)) {
            Some(filling) => filling,
            None => Filling::start(sql, relation, task, &self.room)?,
        };
        let flow = filling.read_on(self.context, sql, &self.room, relation, task, until);
        if !matches!(flow, Ok(Flow::Restart(_))) {
            // Also after an error: what was read is on its way.
            self.fillings.insert(relation, filling);
        }
        let Flow::Restart(why) = flow? else {
            return Ok(());
        };
        if why.is_some() {
            self.context.doubt(sql, relation, task)?;
        }
        match why {
            // It is told of, and tried again less and less often.
            Some(error) if self.changed(relation, task) > CHANGES_MAX => Err(error),
            _ => {
                self.troubles.put_off(relation, RETRY_MIN, RETRY_MAX);
                Ok(())
            }
        }
    }

    /// How many times Postgres has said so now.
    fn changed(&mut self, relation: u32, task: &Task) -> u32 {
        let (generation, rows) = (task.generation, task.cursor.rows);
        let before = self.changes.get(&relation);
        let before = before.filter(|before| (before.generation, before.rows) == (generation, rows));
        let count = before.map_or(0, |before| before.count) + 1;
        let changes = Changes {
            generation,
            rows,
            count,
        };
        self.changes.insert(relation, changes);
        count
    }

    fn sweep(&mut self, sql: &mut Sql, sweeps: Vec<(u32, Task)>) -> Result<(), Error> {
        self.context.outlast_planned(sql)?;
        let mut redis = Connection::connect(&self.context.redis)?;
        let mut troubles = std::mem::take(&mut self.troubles);
        // Where a table is to be filled, the walk goes on behind it.
        let is_enough = |troubles: &Troubles| {
            let is_paused =
                |relation: u32, task: &Task| troubles.is_paused(relation) || self.is_paused(relation, task);
            self.context.backfill.wants_fill(is_paused)
        };
        let swept = sweep::sweep(self.context, sql, &mut redis, sweeps, &mut troubles, is_enough);
        self.troubles = troubles;
        swept?;
        if self.context.backfill.sweeps(|_, _| false).is_empty() {
            self.retry = RETRY_MIN;
        } else {
            self.context.backfill.wait(self.retry);
            self.retry = (self.retry * 2).min(RETRY_MAX);
        }
        Ok(())
    }

    /// Hands the catalog to the planner, which compares it with the registry at this place of the stream: labels that the
    /// stream has not told of (set before the slot was made, or while it did not exist) are found this way. False: it waits.
    fn reconcile(&mut self, sql: &mut Sql) -> Result<bool, Error> {
        let (context, list) = (self.context, "(the list of mirrored tables)");
        // A label whose transaction is in the stream already may still be invisible, while its COMMIT waits for a standby. What the stream
        // tells behind this look counts more than the catalog.
        let mut committing = match self.committing.take() {
            Some(committing) => committing,
            None => Committing::look(sql, context.backfill.wishes())?,
        };
        if !committing.are_over(sql)? {
            self.committing = Some(committing);
            return Ok(false);
        }
        sql.set_lock_timeout(LOCK_CATALOG)?;
        let started = Instant::now();
        let catalog = Catalog::read(sql, committing.wishes);
        let took = started.elapsed();
        sql.set_lock_timeout(LOCK_TABLES)?;
        let catalog = match catalog {
            // It is of all of them.
            Err(error) if error.is_of_a_lock() => {
                self.troubles
                    .take(LIST, list, error, || sql.whoever_locks(LIST))?;
                return Ok(true);
            }
            catalog => catalog?,
        };
        self.findings.misfits(&catalog.misfits);
        self.findings
            .locks(&catalog.locked, |relation| sql.whoever_locks(relation));
        if catalog.locked.is_empty() {
            self.troubles.clear(LIST);
        } else {
            self.troubles.put_off(LIST, PAUSE_MIN, LOCKED_PAUSE_MAX);
            // All tables are looked at, and each one that is locked is waited for.
            self.troubles.leave_for(LIST, took.saturating_mul(CATALOG_SHARE));
        }
        let (window, nothing) = (Arc::new(Window::default()), Snapshot::default());
        context.submit_for(sql, &window, 0, 0, nothing, Content::Catalog(catalog), None)?;
        // The stream may be minutes behind, and whoever is filled meanwhile waits for it where he has to.
        self.comparing = Some(window);
        Ok(true)
    }
}

/// Whether it is this life of the table that is being filled.
fn is_of(filling: &Filling, task: &Task) -> bool {
    filling.generation == task.generation
}
