//! Removes keys that have no row: left over from an earlier life of Redis, from a table's old key template, or written by
//! somebody else under a name that belongs to the table. All tables that are due share one walk over the keyspace, which
//! may be large and hold the keys of thousands of tables.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::lookup::{Lookup, ParsedKey};
use super::sql::{Snapshots, Sql};
use super::troubles::Troubles;
use super::worker::Context;
use super::{Content, Cursor, Task, Window};
use crate::error::Error;
use crate::plan::{Belongs, Owned};
use crate::redis::{Connection, Prefixes};

/// Keys that are looked up at once.
const KEYS: usize = 500;
/// The longest pause after a page of keys.
const PAUSE_MAX: Duration = Duration::from_millis(10);
/// Chunks of a table on their way to the planner.
const AHEAD: usize = 2;

/// A table that is swept.
struct Swept {
    relation: u32,
    task: Task,
    /// The keys of its template of today, and of those that it had before.
    owned: Owned,
    lookup: Lookup,
    window: Arc<Window>,
    /// Keys that a row could have.
    held: Vec<ParsedKey>,
    /// Keys that no row can have.
    absent: Vec<Vec<u8>>,
    removed: usize,
    /// Something failed, so that not all of its keys were looked at: it is to be swept again.
    is_broken_off: bool,
}

/// Looks at every key of the tables' templates, old ones included. A table that changes meanwhile is left for another
/// time.
pub(super) fn sweep(
    context: &Context,
    sql: &mut Sql,
    redis: &mut Connection,
    tasks: Vec<(u32, Task)>,
    troubles: &mut Troubles,
) -> Result<(), Error> {
    let mut tables = Vec::new();
    for (relation, task) in tasks {
        let name = task.mapping.table.clone();
        match Swept::new(context, sql, relation, task) {
            Ok(table) => tables.extend(table),
            Err(error) => troubles.take(relation, &name, error, || sql.whoever_locks(relation))?,
        }
    }
    let places = tables.iter().enumerate();
    let index = Prefixes::new(
        places.flat_map(|(place, table)| table.owned.purges().map(move |purge| (place, purge))),
    );
    let mut scan = index.scan();
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
        for table in &mut tables {
            if table.held.len() >= KEYS || table.absent.len() >= KEYS {
                let removed = table.remove_absent(context, sql);
                table.go_on_after(removed, sql, troubles)?;
            }
        }
    }
    for table in &mut tables {
        let finished = table.finish(context, sql);
        table.go_on_after(finished, sql, troubles)?;
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

impl Swept {
    fn new(context: &Context, sql: &mut Sql, relation: u32, task: Task) -> Result<Option<Self>, Error> {
        let Some(lookup) = Lookup::new(sql, &task.mapping)? else {
            return Ok(None);
        };
        let others = context.backfill.other_templates(relation);
        Ok(Some(Self {
            relation,
            owned: Owned::new(relation, &task.mapping.template, &task.cursor.old_keys, &others)
                .of_any_bytes(context.backfill.any_bytes()),
            lookup,
            task,
            window: Arc::new(Window::default()),
            held: Vec::new(),
            absent: Vec::new(),
            removed: 0,
            is_broken_off: false,
        }))
    }

    /// Which values the row must have is what the template of today says, also for a key of an old one.
    fn take(&mut self, key: &[u8]) {
        match self.owned.belongs(key) {
            Belongs::ToRow(values) => self.held.push((key.to_vec(), values)),
            Belongs::ToNoRow => self.absent.push(key.to_vec()),
            Belongs::Elsewhere => {}
        }
    }

    /// Hands the keys that have no row to the planner.
    fn remove_absent(&mut self, context: &Context, sql: &mut Sql) -> Result<(), Error> {
        let held = std::mem::take(&mut self.held);
        let absent = std::mem::take(&mut self.absent);
        if !self.is_alive(context) {
            return Ok(());
        }
        if !absent.is_empty() {
            // No row of today can render to these keys, whatever the snapshot.
            if let Some(snapshot) = context.begin(sql, &self.task.mapping.table)? {
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
        sql: &mut Sql,
        troubles: &mut Troubles,
    ) -> Result<(), Error> {
        let Err(error) = result else { return Ok(()) };
        self.is_broken_off = true;
        if error.is_of_a_changed_table() {
            // The stream will say so.
            return Ok(());
        }
        let relation = self.relation;
        troubles.take(relation, &self.task.mapping.table, error, || {
            sql.whoever_locks(relation)
        })
    }

    fn is_alive(&self, context: &Context) -> bool {
        !self.is_broken_off
            && self.window.wait(AHEAD - 1, || context.stopped())
            && !context.stopped()
            && context.is_current(self.relation, self.task.generation)
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
