//! The backfill's threads. One reads tables and sweeps, one reads pending keys; both sleep when there is nothing to do and
//! connect only when there is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;

use super::catalog::Catalog;
use super::sql::{Snapshots, Sql};
use super::troubles::Troubles;
use super::writers::Writers;
use super::{Backfill, Chunk, Content, Cursor, Stage, Task, Window, fill, horizon, pending, sweep};
use crate::config::{Conninfo, RedisUrl};
use crate::error::Error;
use crate::gate::Snapshot;
use crate::plan::RedisKeys;
use crate::pq::Waker;
use crate::redis::Connection;
use crate::run::Input;

/// How often a sleeping worker looks whether there is something to do, should a notice get lost.
const IDLE: Duration = Duration::from_millis(500);

/// How long a table that is filled waits for others before its keys are checked.
const SWEEP_AFTER: Duration = Duration::from_secs(5);

/// A table that is another one than it was told to be is tried again after so long; twice as long after each attempt.
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(2);
/// The same for keys that could not be read again.
const PENDING_MIN: Duration = Duration::from_millis(20);
const PENDING_MAX: Duration = Duration::from_millis(500);

/// So long a worker waits for a table that somebody has locked. A pass over the pending keys takes the tables in turn, and who reads
/// again what it could not read loses nothing.
const LOCK_TABLES: Duration = Duration::from_secs(5);
const LOCK_PENDING: Duration = Duration::from_secs(1);

/// What a worker needs.
#[derive(Clone)]
pub struct Context {
    /// The list of tables.
    pub backfill: Arc<Backfill>,
    /// Where chunks go.
    pub chunks: Sender<Input>,
    /// How to connect to Postgres.
    pub postgres: Conninfo,
    /// How to connect to Redis.
    pub redis: RedisUrl,
    /// The bookkeeping keys.
    pub keys: RedisKeys,
    /// What markers of this session begin with.
    pub marker_prefix: String,
    /// Raised when the session ends; ends what a connection waits for.
    pub interrupt: Waker,
}

/// What a thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Reads tables and looks for keys without rows.
    Tables,
    /// Reads pending keys again, and takes the horizons of tables that were announced. Neither waits for the other's transactions.
    Pending,
}

/// How to go on with a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flow {
    /// With the next stage.
    Go,
    /// From its cursor: a chunk was dropped, or the table is another one now.
    Restart,
    /// Not at all: the session ends.
    Stopped,
}

/// The life of a worker thread. An error that comes from being interrupted is none.
pub fn work(context: &Context, role: Role) -> Result<(), Error> {
    let result = match role {
        Role::Tables => tables(context),
        Role::Pending => pending_keys(context),
    };
    if context.stopped() { Ok(()) } else { result }
}

fn tables(context: &Context) -> Result<(), Error> {
    let window = Arc::new(Window::default());
    let mut connection = None;
    let mut waiting: Option<Instant> = None;
    let (mut last, mut pause) = (0, RETRY_MIN);
    let (mut troubles, mut writers) = (Troubles::default(), Writers::default());
    while !context.stopped() {
        let is_reconciled = context.backfill.is_reconciled();
        let is_held_up = writers.hold_up_any(&context.backfill);
        if is_held_up && let Some(sql) = &mut connection {
            writers.look(&context.backfill, sql)?;
        }
        let is_paused = |relation: u32, task: &Task| troubles.is_paused(relation) || !writers.are_over(task);
        let task = context.backfill.next_task(last, is_paused);
        if is_reconciled && task.is_none() {
            if !is_held_up {
                // An idle session is one that somebody else could use.
                connection = None;
                context.backfill.wait(IDLE);
            } else if connection.is_none() {
                connection = Some(context.connect(Role::Tables)?);
            } else {
                context.backfill.wait(writers.pause());
            }
            continue;
        }
        let sql = match &mut connection {
            Some(sql) => sql,
            none => none.insert(context.connect(Role::Tables)?),
        };
        window.reset(|| context.stopped());
        let Some((relation, task)) = task.filter(|_| is_reconciled) else {
            match reconcile(context, sql, &window) {
                Ok(()) => _ = window.wait(0, || context.stopped()),
                // It is of all of them.
                Err(error) if error.is_of_a_lock() => {
                    troubles.take(0, "(the list of mirrored tables)", error, || sql.whoever_locks(0))?;
                }
                Err(error) => return Err(error),
            }
            continue;
        };
        // One walk over the keyspace serves all tables that are due, so more of them are waited for, but not for long.
        let due = task.cursor.stage == Stage::Sweep;
        let sweeps = context.backfill.sweeps(is_paused);
        waiting = waiting.or_else(|| sweeps.first().map(|_| Instant::now()));
        if due || waiting.is_some_and(|since| since.elapsed() > SWEEP_AFTER) {
            waiting = None;
            context.outlast_planned(sql)?;
            let mut redis = Connection::connect(&context.redis)?;
            sweep::sweep(context, sql, &mut redis, sweeps, &mut troubles)?;
            if context.backfill.sweeps(|_, _| false).is_empty() {
                pause = RETRY_MIN;
            } else {
                context.backfill.wait(pause);
                pause = (pause * 2).min(RETRY_MAX);
            }
            continue;
        }
        if relation <= last {
            // Each has had its turn, and not all could be read.
            context.backfill.wait(pause);
            (last, pause) = (0, (pause * 2).min(RETRY_MAX));
            continue;
        }
        match fill::fill(context, sql, &window, relation, &task) {
            Ok(Flow::Restart) => last = relation,
            Ok(Flow::Go | Flow::Stopped) => {
                troubles.clear(relation);
                pause = RETRY_MIN;
            }
            Err(error) => {
                troubles.take(relation, &task.mapping.table, error, || {
                    sql.whoever_locks(relation)
                })?;
                // Whatever the session was in the middle of.
                connection = None;
                last = relation;
            }
        }
    }
    Ok(())
}

fn pending_keys(context: &Context) -> Result<(), Error> {
    let windows = pending::Windows::default();
    // Whatever an earlier session left.
    context.backfill.note_pending();
    while !context.stopped() {
        horizon::take(context, &windows.horizons)?;
        if !context.backfill.has_pending() {
            context.backfill.wait(IDLE);
            continue;
        }
        let mut redis = Connection::connect(&context.redis)?;
        if is_empty(&mut redis, &context.keys)? {
            clear(context, &mut redis)?;
            continue;
        }
        let mut sql = context.connect(Role::Pending)?;
        let (mut pause, mut troubles) = (PENDING_MIN, Troubles::default());
        while !context.stopped() && !pending::pass(context, &mut sql, &mut redis, &windows, &mut troubles)? {
            // What was read is being applied; what the gate refused has to become visible first, and a table that changes has to come
            // down the stream.
            context.backfill.wait(pause);
            pause = (pause * 2).min(PENDING_MAX);
            horizon::take(context, &windows.horizons)?;
        }
    }
    Ok(())
}

fn is_empty(redis: &mut Connection, keys: &RedisKeys) -> Result<bool, Error> {
    Ok(redis.call("count the pending keys", &[b"HLEN", &keys.pending])? == redis::Value::Int(0))
}

/// Takes the notice back, unless something was noted since it was found to be empty.
fn clear(context: &Context, redis: &mut Connection) -> Result<(), Error> {
    context.backfill.clear_pending();
    if !is_empty(redis, &context.keys)? {
        context.backfill.note_pending();
    }
    Ok(())
}

/// Hands the catalog to the planner, which compares it with the registry at this place of the stream: labels that the
/// stream has not told of (set before the slot was made, or while it did not exist) are found this way.
fn reconcile(context: &Context, sql: &mut Sql, window: &Arc<Window>) -> Result<(), Error> {
    let wishes = context.backfill.wishes();
    // A label whose transaction is in the stream already may still be invisible, while its COMMIT waits for a standby.
    sql.outlast_running("(the list of mirrored tables)", || context.stopped())?;
    let catalog = Catalog::read(sql, wishes)?;
    for misfit in &catalog.misfits {
        let error = misfit.error();
        tracing::error!(next = error.next_command(), "{error}");
    }
    context.submit_for(
        sql,
        window,
        0,
        0,
        Snapshot::default(),
        Content::Catalog(catalog),
        None,
    )
}

impl Context {
    pub(super) fn connect(&self, role: Role) -> Result<Sql, Error> {
        let mut sql = Sql::connect(self.postgres.expose(), self.interrupt.clone())?;
        sql.set_lock_timeout(match role {
            Role::Tables => LOCK_TABLES,
            Role::Pending => LOCK_PENDING,
        })?;
        if sql.any_bytes {
            self.backfill.note_any_bytes();
        }
        Ok(sql)
    }

    pub(super) fn stopped(&self) -> bool {
        self.backfill.is_stopped()
    }

    pub(super) fn is_current(&self, relation: u32, generation: u64) -> bool {
        self.backfill.is_current(relation, generation)
    }

    /// Waits until all that is planned is in Redis. A look at the keys before that would miss some: a change that came before their
    /// rows were gone, or before the table had its template, may not be written yet.
    pub(super) fn outlast_planned(&self, sql: &mut Sql) -> Result<(), Error> {
        let asked = self.backfill.ask();
        // So that there is something to be written.
        let (window, nothing) = (Arc::new(Window::default()), Content::Orphans(Vec::new()));
        self.submit_for(sql, &window, 0, 0, Snapshot::default(), nothing, None)?;
        while !self.backfill.is_answered(asked) && !self.stopped() {
            self.backfill.wait(IDLE);
        }
        Ok(())
    }

    /// Hands a chunk to the planner, then writes its marker: the planner has it before the marker comes.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn submit(
        &self,
        sql: &mut Sql,
        window: &Arc<Window>,
        relation: u32,
        task: &Task,
        snapshot: Snapshot,
        content: Content,
        cursor: Option<Cursor>,
    ) -> Result<(), Error> {
        self.submit_for(sql, window, relation, task.generation, snapshot, content, cursor)
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn submit_for(
        &self,
        sql: &mut Sql,
        window: &Arc<Window>,
        relation: u32,
        generation: u64,
        snapshot: Snapshot,
        content: Content,
        cursor: Option<Cursor>,
    ) -> Result<(), Error> {
        let id = self.backfill.marker();
        window.sent();
        let chunk = Chunk {
            id,
            relation,
            generation,
            snapshot,
            content,
            cursor,
            window: Arc::clone(window),
        };
        // The planner is gone only when the session ends.
        let _ = self.chunks.send(Input::Chunk(chunk));
        sql.marker(&format!("{}{id}", self.marker_prefix))
            // Without a marker it is never planned, so nobody must wait for it.
            .inspect_err(|_| window.done(true))
    }
}

impl Snapshots for Context {
    /// Begins a transaction whose snapshot the gate will not refuse as a whole; waits for one. None: the session ends.
    fn begin(&self, sql: &mut Sql, table: &str) -> Result<Option<Snapshot>, Error> {
        let (started, mut told) = (Instant::now(), false);
        loop {
            let snapshot = sql.begin()?;
            if !self.backfill.is_useless(&snapshot) {
                return Ok(Some(snapshot));
            }
            sql.end()?;
            if self.stopped() {
                return Ok(None);
            }
            if !told && started.elapsed() > Duration::from_secs(1) {
                told = true;
                let who = sql.whoever_runs(snapshot.oldest_in_progress().unwrap_or(snapshot.xmax))?;
                tracing::info!(
                    table,
                    "the backfill waits until the transactions that the gate has forgotten are over: {who}"
                );
            }
            std::thread::sleep(Duration::from_millis(if told { 200 } else { 10 }));
        }
    }
}
