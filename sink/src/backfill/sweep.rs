//! Removes keys that have no row: left over from an earlier life of Redis, from a table's old key template, or written by
//! somebody else under a name that belongs to the table. All tables that are due share one walk over the keyspace, which
//! may be large and hold the keys of thousands of tables. Now and then each table notes how far the walk is, so that no later session
//! begins it anew.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::held::{Held, Most};
use super::lookup::Lookup;
use super::sql::{Snapshots, Sql};
use super::troubles::Troubles;
use super::worker::Context;
use super::{Content, Cursor, Room, Task, Walk, Window};
use crate::error::Error;
use crate::plan::{Belongs, Owned};
use crate::redis::{Connection, Prefixes, run_id};

/// The longest pause after a page of keys.
const PAUSE_MAX: Duration = Duration::from_millis(10);
/// Chunks of a table on their way to the planner.
const AHEAD: usize = 2;
/// Those of all tables take at most about so much memory.
const ROOM_BYTES: usize = 16 * 1024 * 1024;

/// Where the tables took so long, Redis has heard nothing for too long.
const SAID_NOTHING: Duration = Duration::from_millis(500);

/// How often the place of the walk is noted; with many tables, less often: a tenth of the time goes there at most.
const NOTE_EVERY: Duration = Duration::from_secs(5);

/// A table that is swept.
struct Swept {
    relation: u32,
    task: Task,
    /// The keys of its template of today, and of those that it had before.
    owned: Owned,
    lookup: Lookup,
    window: Arc<Window>,
    room: Arc<Room>,
    held: Held,
    removed: usize,
    /// Something failed, so that not all of its keys were looked at: it is to be swept again.
    is_broken_off: bool,
}

/// Looks at every key of the tables' templates, old ones included. A table that changes meanwhile is left for another
/// time. So is the rest of the walk where `is_enough` says so, once its place is noted.
pub(super) fn sweep(
    context: &Context,
    sql: &mut Sql,
    redis: &mut Connection,
    tasks: Vec<(u32, Task)>,
    troubles: &mut Troubles,
    is_enough: impl Fn(&Troubles) -> bool,
) -> Result<(), Error> {
    let server = run_id(redis)?;
    let (place, tasks) = together(tasks, server.as_deref());
    let room = Room::of(ROOM_BYTES);
    let mut tables = Vec::new();
    for (relation, task) in tasks {
        let name = task.mapping.table.clone();
        if troubles.is_locked_still(relation, &name, || sql.locker(relation)) {
            continue;
        }
        match Swept::new(context, sql, relation, task, &room) {
            Ok(table) => tables.extend(table),
            Err(error) => troubles.take(relation, &name, error, || sql.whoever_locks(relation))?,
        }
    }
    let places = tables.iter().enumerate();
    let index = Prefixes::new(
        places.flat_map(|(place, table)| table.owned.purges().map(move |purge| (place, purge))),
    );
    let mut scan = index.scan();
    if let Some(place) = place {
        tracing::info!(
            tables = tables.len(),
            "the keys are checked from where an earlier walk over them came to"
        );
        scan = scan.from(place.as_bytes());
    }
    let (mut noted, mut pause) = (Instant::now(), NOTE_EVERY);
    loop {
        let started = Instant::now();
        let Some(page) = scan.page(redis)? else { break };
        if context.stopped() {
            return Ok(());
        }
        // Redis does nothing else during a page. Nobody waits for a sweep, so it leaves half of the time to others.
        std::thread::sleep(started.elapsed().min(PAUSE_MAX));
        for key in page {
            for place in index.places(&key) {
                if let Some(table) = tables.get_mut(place) {
                    table.take(&key);
                }
            }
        }
        let walk = server.clone().zip(scan.place()).map(|(run_id, at)| Walk {
            run_id,
            at: String::from_utf8_lossy(at).into_owned(),
        });
        let walk = walk.filter(|_| noted.elapsed() >= pause);
        let started = Instant::now();
        let most = Most::of(tables.iter().map(|table| &table.held));
        for table in &mut tables {
            if table.held.is_full(most) || walk.is_some() {
                let removed = table.remove_absent(context, sql);
                table.go_on_after(removed, context, sql, troubles)?;
            }
            if let Some(walk) = &walk {
                let done = table.note(context, sql, walk.clone());
                table.go_on_after(done, context, sql, troubles)?;
            }
        }
        if started.elapsed() >= SAID_NOTHING && server.is_some() {
            // Redis closes a connection that says nothing for its `timeout`, and so do balancers. The walk goes on in the same process alone.
            *redis = Connection::connect(&context.redis)?;
            if run_id(redis)? != server {
                return Ok(());
            }
        }
        if walk.is_some() {
            (noted, pause) = (Instant::now(), NOTE_EVERY.max(started.elapsed() * 10));
            if is_enough(troubles) {
                for table in &tables {
                    table.window.wait(0, || context.stopped());
                }
                return Ok(());
            }
        }
    }
    for table in &mut tables {
        let finished = table.finish(context, sql);
        table.go_on_after(finished, context, sql, troubles)?;
    }
    for table in &tables {
        if !table.is_broken_off && table.window.wait(0, || context.stopped()) && !context.stopped() {
            troubles.clear(table.relation);
            let name = &table.task.mapping.table;
            tracing::info!(
                table = name,
                keys_without_row = table.removed,
                "the keys of the table are complete"
            );
        }
    }
    Ok(())
}

/// Those of the tables that can share a walk, and where it begins: places cannot be compared, so it is those that are at the same one, if
/// it is one of this process, or else all that have to begin. The others have their turn behind them.
fn together(tasks: Vec<(u32, Task)>, run_id: Option<&str>) -> (Option<String>, Vec<(u32, Task)>) {
    let place = |task: &Task| {
        let walk = task.cursor.walk.as_ref();
        let walk = walk.filter(|walk| Some(walk.run_id.as_str()) == run_id);
        walk.map(|walk| walk.at.clone())
    };
    let first = tasks.iter().find_map(|(_, task)| place(task));
    let mut together = tasks;
    together.retain(|(_, task)| place(task) == first);
    (first, together)
}

impl Swept {
    fn new(
        context: &Context,
        sql: &mut Sql,
        relation: u32,
        task: Task,
        room: &Arc<Room>,
    ) -> Result<Option<Self>, Error> {
        let Some(lookup) = Lookup::new(sql, &task.mapping)? else {
            context.doubt(sql, relation, &task)?;
            return Ok(None);
        };
        let backfill = &context.backfill;
        Ok(Some(Self {
            relation,
            owned: backfill.owned(relation, &task.mapping.template, &task.cursor.old_keys),
            lookup,
            task,
            window: Window::in_room(room),
            room: Arc::clone(room),
            held: Held::default(),
            removed: 0,
            is_broken_off: false,
        }))
    }

    /// Which values the row must have is what the template of today says, also for a key of an old one.
    fn take(&mut self, key: &[u8]) {
        match self.owned.belongs(key) {
            Belongs::ToRow(values) => self.held.push(key, values),
            Belongs::ToNoRow => self.held.push_rowless(key),
            Belongs::Elsewhere => {}
        }
    }

    /// Hands the keys that have no row to the planner.
    fn remove_absent(&mut self, context: &Context, sql: &mut Sql) -> Result<(), Error> {
        let held = self.held.take();
        let (held, absent) = (held.keys, held.rowless);
        if !self.is_alive(context) {
            return Ok(());
        }
        if !absent.is_empty() {
            // No row of today can render to these keys, whatever the snapshot.
            if let Some(snapshot) = context.begin(sql, &self.task.mapping.table, None)? {
                sql.end()?;
                self.submit(context, sql, snapshot, absent, None)?;
            }
        }
        if held.is_empty() {
            return Ok(());
        }
        for found in self.lookup.present(context, sql, &self.task.mapping, held)? {
            let absent: Vec<Vec<u8>> = found
                .keys
                .into_iter()
                .filter(|(_, row)| row.is_none())
                .map(|(key, _)| key)
                .collect();
            if !absent.is_empty() {
                self.submit(context, sql, found.snapshot, absent, None)?;
            }
        }
        Ok(())
    }

    /// All that was found so far is on its way: the walk need not come here again.
    fn note(&mut self, context: &Context, sql: &mut Sql, walk: Walk) -> Result<(), Error> {
        if !self.is_alive(context) {
            return Ok(());
        }
        let snapshot = sql.begin()?;
        sql.end()?;
        let cursor = Cursor {
            walk: Some(walk),
            ..self.task.cursor.clone()
        };
        self.submit(context, sql, snapshot, Vec::new(), Some(cursor))
    }

    /// The rest, and the word that the table is done.
    fn finish(&mut self, context: &Context, sql: &mut Sql) -> Result<(), Error> {
        self.remove_absent(context, sql)?;
        if !self.is_alive(context) {
            return Ok(());
        }
        let snapshot = sql.begin()?;
        sql.end()?;
        let done = Cursor::done(self.task.cursor.fingerprint);
        self.submit(context, sql, snapshot, Vec::new(), Some(done))
    }

    /// A table that fails is left for another time; the others go on.
    fn go_on_after(
        &mut self,
        result: Result<(), Error>,
        context: &Context,
        sql: &mut Sql,
        troubles: &mut Troubles,
    ) -> Result<(), Error> {
        let Err(error) = result else { return Ok(()) };
        self.is_broken_off = true;
        if error.is_of_a_changed_table() {
            return context.doubt(sql, self.relation, &self.task);
        }
        let relation = self.relation;
        troubles.take(relation, &self.task.mapping.table, error, || {
            sql.whoever_locks(relation)
        })
    }

    fn is_alive(&self, context: &Context) -> bool {
        !self.is_broken_off
            && self.window.wait(AHEAD - 1, || context.stopped())
            && self.has_room(context)
            && !context.stopped()
            && context.is_current(self.relation, self.task.generation)
    }

    /// Once there is some.
    fn has_room(&self, context: &Context) -> bool {
        while !self.room.wait(Instant::now() + NOTE_EVERY, || context.stopped()) {}
        true
    }

    fn submit(
        &mut self,
        context: &Context,
        sql: &mut Sql,
        snapshot: crate::gate::Snapshot,
        absent: Vec<Vec<u8>>,
        cursor: Option<Cursor>,
    ) -> Result<(), Error> {
        self.removed += absent.len();
        context.submit(
            sql,
            &self.window,
            self.relation,
            &self.task,
            snapshot,
            Content::Absent(absent),
            cursor,
        )
    }
}
