//! The backfill's threads. One reads tables and sweeps, one reads pending keys, one takes horizons; they sleep when there is nothing
//! to do and connect only when there is. None waits for another's transactions.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;

use super::lookup::ParsedKey;
use super::refused::Refused;
use super::sql::{Snapshots, Sql};
use super::tables::Tables;
use super::troubles::Troubles;
use super::{Backfill, Chunk, Content, Cursor, Task, Window, horizon, pending};
use crate::config::{Conninfo, RedisUrl};
use crate::error::Error;
use crate::gate::Snapshot;
use crate::plan::RedisKeys;
use crate::pq::Waker;
use crate::redis::Connection;
use crate::run::Input;

/// How often a sleeping worker looks whether there is something to do, should a notice get lost.
pub(super) const IDLE: Duration = Duration::from_millis(500);

/// Keys that could not be read again are tried again after so long; twice as long after each attempt.
const PENDING_MIN: Duration = Duration::from_millis(20);
const PENDING_MAX: Duration = Duration::from_millis(500);

/// So long a worker waits for a table that somebody has locked. A pass over the pending keys takes the tables in turn, and who reads
/// again what it could not read loses nothing.
pub(super) const LOCK_TABLES: Duration = Duration::from_secs(5);
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
    /// As long as the server may be silent where it does not work.
    pub silence: Duration,
}

/// What a thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Reads tables and looks for keys without rows.
    Tables,
    /// Reads pending keys again.
    Pending,
    /// Takes the horizons of tables that were announced.
    Horizons,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Tables, Self::Pending, Self::Horizons];

    /// The name of its thread.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tables => "backfill",
            Self::Pending => "pending",
            Self::Horizons => "horizons",
        }
    }
}

/// The life of a worker thread. An error that comes from being interrupted is none.
pub fn work(context: &Context, role: Role) -> Result<(), Error> {
    let result = match role {
        Role::Tables => Tables::new(context).work(),
        Role::Pending => pending_keys(context),
        Role::Horizons => horizon::work(context),
    };
    if context.stopped() { Ok(()) } else { result }
}

fn pending_keys(context: &Context) -> Result<(), Error> {
    let room = pending::room();
    // Whatever an earlier session left.
    context.backfill.note_pending();
    while !context.stopped() {
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
        let (mut refused, mut pace) = (Refused::default(), pending::Pace::default());
        while !context.stopped() {
            refused.look(context, &mut sql)?;
            if pending::pass(
                context,
                &mut sql,
                &mut redis,
                &room,
                &mut troubles,
                &mut refused,
                &mut pace,
            )? {
                break;
            }
            // What was read is being applied; what the gate refused has to become visible first, and a table that changes has to come
            // down the stream.
            context.backfill.wait(pause);
            pause = (pause * 2).min(PENDING_MAX);
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

impl Context {
    pub(super) fn connect(&self, role: Role) -> Result<Sql, Error> {
        let mut sql = Sql::connect(self.postgres.expose(), self.interrupt.clone(), self.silence)?;
        sql.set_lock_timeout(match role {
            Role::Tables => LOCK_TABLES,
            Role::Pending | Role::Horizons => LOCK_PENDING,
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

    /// The table could not be read as what the stream has told of it: has the catalog compared, unless the stream tells before that place.
    /// Who tries again waits between any two times.
    pub(super) fn doubt(&self, sql: &mut Sql, relation: u32, task: &Task) -> Result<(), Error> {
        let (window, nothing) = (Arc::new(Window::default()), Snapshot::default());
        self.submit(sql, &window, relation, task, nothing, Content::Changed, None)
    }

    /// Keys are about to be read again: the planner keeps what changes them, so that a row which changes all the time gets there.
    pub(super) fn reread(&self, relation: u32, keys: &[ParsedKey]) {
        let keys = keys.iter().map(|(key, _)| key.clone()).collect();
        let _ = self.chunks.send(Input::Reread(relation, keys));
    }

    /// None of them is being read any more.
    pub(super) fn reread_over(&self) {
        let _ = self.chunks.send(Input::RereadOver);
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
        let permit = window.permit(&content);
        let chunk = Chunk {
            id,
            relation,
            generation,
            snapshot,
            content,
            cursor,
            window: Arc::clone(window),
            permit,
        };
        // The planner is gone only when the session ends.
        let _ = self.chunks.send(Input::Chunk(Box::new(chunk)));
        sql.marker(&format!("{}{id}", self.marker_prefix))
            // Without a marker it is never planned, so nobody must wait for it, nor keep it.
            .inspect_err(|_| {
                window.done(true);
                let _ = self.chunks.send(Input::Forget(id));
            })
    }
}

impl Snapshots for Context {
    /// Begins a transaction whose snapshot the gate will not refuse as a whole; waits for one. None: the session ends.
    fn begin(&self, sql: &mut Sql, table: &str, lock: Option<&str>) -> Result<Option<Snapshot>, Error> {
        let (started, mut told) = (Instant::now(), false);
        loop {
            let snapshot = sql.begin_with(lock)?;
            let Some(hidden) = self.backfill.hidden_from(&snapshot) else {
                return Ok(Some(snapshot));
            };
            sql.end()?;
            if self.stopped() {
                return Ok(None);
            }
            if !told && started.elapsed() > Duration::from_secs(1) {
                told = true;
                let who = sql.whoever_runs(hidden)?;
                tracing::info!(
                    table,
                    "the backfill waits until the transactions that the gate has forgotten are over: {who}"
                );
            }
            std::thread::sleep(Duration::from_millis(if told { 200 } else { 10 }));
        }
    }
}
