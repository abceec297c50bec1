//! Reads again what could not be written from the stream: keys that a patch did not find, rows that the gate had forgotten
//! about, keys that Redis refused. They are noted in the pending hash in the same EXEC, and leave it with the row.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use redis::Value;
use walmirror_proto::pb::Mode;

use super::lookup::{Lookup, ParsedKey};
use super::refused::Refused;
use super::sql::{AnySnapshot, Sql};
use super::troubles::Troubles;
use super::worker::Context;
use super::{Content, Room, Task, Window};
use crate::error::Error;
use crate::gate::Snapshot;
use crate::plan::Belongs;
use crate::redis::{Connection, unreadable};

/// Such rows have TOASTed columns, so a few of them can be many bytes.
const ROWS_START: usize = 16;
const ROWS_MAX: usize = 512;

/// How many rows are read at once.
pub(super) struct Pace(usize);

impl Default for Pace {
    fn default() -> Self {
        Self(ROWS_START)
    }
}

impl Pace {
    /// So many rows of those that were asked for could be read at once.
    fn note(&mut self, read: usize, asked: usize) {
        self.0 = if read < asked {
            read.max(1)
        } else {
            (self.0 * 2).min(ROWS_MAX)
        };
    }
}

/// What was read and is not planned yet takes at most about so much memory.
const ROOM_BYTES: usize = 4 * 1024 * 1024;
/// How long it waits for the stream at once.
const LOOK: Duration = Duration::from_secs(1);
/// A table that is another one than the stream has announced, or that may miss writers, is looked at again after so long; twice as long after each look.
const CHANGED_MIN: Duration = Duration::from_millis(50);
const CHANGED_MAX: Duration = Duration::from_secs(2);
/// The same for one that Redis is kept by no version of, as its label does not fit it: it stays so until somebody mends it.
const OUTDATED_MAX: Duration = Duration::from_secs(10);

/// The room for what it has on its way. Each table has a window of its own: what is dropped of one is no matter of the others.
pub(super) fn room() -> Arc<Room> {
    Room::of(ROOM_BYTES)
}

/// What is on its way of a table in one pass.
struct OnItsWay {
    window: Arc<Window>,
    /// Some of it may be older than what a transaction left that was writing when the table was announced: it stays noted until all of
    /// these are over.
    misses_writers: bool,
}

/// What came of reading keys.
enum Reread {
    Done,
    /// The snapshot may miss such a transaction.
    MissesWriters,
    /// The table is another one than the stream has announced.
    Changed,
    /// The same, and which one is not known.
    Outdated,
}

/// Goes over the pending hash once. True: it was empty.
pub(super) fn pass(
    context: &Context,
    sql: &mut Sql,
    redis: &mut Connection,
    room: &Arc<Room>,
    troubles: &mut Troubles,
    refused: &mut Refused,
    pace: &mut Pace,
) -> Result<bool, Error> {
    let mut cursor = b"0".to_vec();
    let mut empty = true;
    let mut tables: BTreeMap<u32, OnItsWay> = BTreeMap::new();
    loop {
        let command: [&[u8]; 5] = [b"HSCAN", &context.keys.pending, &cursor, b"COUNT", b"500"];
        let (next, page) = page(redis.call("read the pending keys", &command)?)?;
        empty &= page.is_empty();
        for (relation, mut keys) in page {
            keys.retain(|key| !refused.contains(key));
            if keys.is_empty() || troubles.is_paused(relation) {
                continue;
            }
            let name = || context.backfill.table(relation).unwrap_or_default();
            if troubles.is_locked_still(relation, &name(), || sql.locker(relation)) {
                continue;
            }
            let table = tables.entry(relation).or_insert_with(|| OnItsWay {
                window: Window::in_room(room),
                misses_writers: false,
            });
            // Where it is not read, the keys stay noted.
            match reread(context, sql, room, &table.window, pace, relation, keys) {
                Ok(Reread::Done) => {}
                Ok(Reread::MissesWriters) => table.misses_writers = true,
                Ok(Reread::Changed) => {
                    tables.remove(&relation);
                    troubles.put_off(relation, CHANGED_MIN, CHANGED_MAX);
                }
                Ok(Reread::Outdated) => {
                    tables.remove(&relation);
                    troubles.put_off(relation, CHANGED_MIN, OUTDATED_MAX);
                }
                Err(error) => {
                    tables.remove(&relation);
                    troubles.take(relation, &name(), error, || sql.whoever_locks(relation))?;
                }
            }
            if context.stopped() {
                return Ok(false);
            }
        }
        if next == b"0" {
            break;
        }
        cursor = next;
    }
    for table in tables.values() {
        table.window.wait(0, || context.stopped());
    }
    context.reread_over();
    for (relation, table) in tables {
        let window = table.window;
        refused.add(&window.take_refused());
        if window.is_stale() || table.misses_writers {
            troubles.put_off(relation, CHANGED_MIN, CHANGED_MAX);
        } else {
            troubles.clear(relation);
        }
    }
    Ok(empty)
}

/// Keys by relation.
type Page = BTreeMap<u32, Vec<Vec<u8>>>;

fn page(reply: Value) -> Result<(Vec<u8>, Page), Error> {
    let unreadable = || unreadable("HSCAN");
    let Value::Array(parts) = reply else {
        return Err(unreadable());
    };
    let mut parts = parts.into_iter();
    let (Some(Value::BulkString(next)), Some(Value::Array(items))) = (parts.next(), parts.next()) else {
        return Err(unreadable());
    };
    let mut page: BTreeMap<u32, Vec<Vec<u8>>> = BTreeMap::new();
    let mut items = items.into_iter();
    while let (Some(Value::BulkString(key)), Some(Value::BulkString(oid))) = (items.next(), items.next()) {
        let oid = std::str::from_utf8(&oid)
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(0);
        page.entry(oid).or_default().push(key);
    }
    Ok((next, page))
}

/// Reads keys of one table.
fn reread(
    context: &Context,
    sql: &mut Sql,
    room: &Room,
    window: &Arc<Window>,
    pace: &mut Pace,
    relation: u32,
    keys: Vec<Vec<u8>>,
) -> Result<Reread, Error> {
    let orphans = |sql: &mut Sql, keys: Vec<Vec<u8>>, task: Option<&Task>| {
        context.submit_for(
            sql,
            window,
            relation,
            task.map_or(0, |task| task.generation),
            Snapshot::default(),
            Content::Orphans(keys),
            None,
        )
    };
    let Some(task) = context.backfill.task(relation) else {
        return orphans(sql, keys, None).map(|()| Reread::Done);
    };
    if task.mapping.is_outdated() {
        // Each attempt to read it would be an ERROR line in the server's log.
        context.doubt(sql, relation, &task)?;
        return Ok(Reread::Outdated);
    }
    let Some(lookup) = Lookup::new(sql, &task.mapping)? else {
        context.doubt(sql, relation, &task)?;
        return Ok(Reread::Changed);
    };
    // A key that is no longer one of this table's is somebody else's business: the sweep of the table removes it.
    let owned = context.backfill.owned(relation, &task.mapping.template, &[]);
    let mut parsed: Vec<ParsedKey> = Vec::new();
    let (mut foreign, mut rowless) = (Vec::new(), Vec::new());
    for key in keys {
        match owned.noted(&key) {
            Belongs::ToRow(values) => parsed.push((key, values)),
            Belongs::ToNoRow => rowless.push((key, None)),
            Belongs::Elsewhere => foreign.push(key),
        }
    }
    if !rowless.is_empty() {
        let snapshot = sql.begin()?;
        sql.end()?;
        context.submit(
            sql,
            window,
            relation,
            &task,
            snapshot,
            Content::Keys(rowless),
            None,
        )?;
    }
    if !foreign.is_empty() {
        orphans(sql, foreign, Some(&task))?;
    }
    let is_mirror = task.mapping.mode == Mode::Mirror;
    let horizon = task.cursor.horizon.unwrap_or(u64::MAX);
    let mut misses_writers = false;
    while !parsed.is_empty() && !context.stopped() {
        let rest = parsed.split_off(pace.0.min(parsed.len()));
        let mut keys = std::mem::replace(&mut parsed, rest);
        while !room.wait(Instant::now() + LOOK, || context.stopped()) {}
        if window.is_stale() {
            return Ok(Reread::Changed);
        }
        context.reread(relation, &keys);
        let asked = keys.len();
        let found = match lookup.rows(&AnySnapshot, sql, &task.mapping, &mut keys) {
            // They are looked at under its new name.
            Err(error) if error.is_of_a_changed_table() => {
                context.doubt(sql, relation, &task)?;
                return Ok(Reread::Changed);
            }
            found => found?,
        };
        pace.note(asked - keys.len(), asked);
        parsed.splice(..0, keys);
        for found in found {
            misses_writers |= is_mirror && found.snapshot.may_miss_below(horizon);
            context.submit(
                sql,
                window,
                relation,
                &task,
                found.snapshot,
                Content::Keys(found.keys),
                None,
            )?;
        }
    }
    Ok(if misses_writers {
        Reread::MissesWriters
    } else {
        Reread::Done
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_at_once_is_bounded_in_rows_and_bytes() {
        let mut pace = Pace::default();
        (0..10).for_each(|_| pace.note(7, 7));
        assert_eq!(pace.0, ROWS_MAX);
        pace.note(3, 7);
        assert_eq!(pace.0, 3);
        pace.note(3, 3);
        assert_eq!(pace.0, 6);
    }
}
