//! Both sides of the comparison, and the question of which came first: where the stream is, and which transactions are over.

use std::time::{Duration, Instant};

use redis::Value;
use walmirror_proto::Lsn;

use super::content::Content;
use super::table::Table;
use crate::backfill::Cursor;
use crate::backfill::lookup::ParsedKey;
use crate::backfill::sql::{AnySnapshot, Sql};
use crate::error::Error;
use crate::plan::RedisKeys;
use crate::progress::{RESYNC, cursor_field};
use crate::redis::{Connection, reply_error, unreadable};
use crate::replication::slot_info;
use crate::request::Request;
use crate::resp::Commands;
use crate::shutdown::Shutdown;

/// The first pause between two looks, and the longest one.
const PAUSE_MIN: Duration = Duration::from_micros(500);
const PAUSE_MAX: Duration = Duration::from_millis(50);
/// A transaction that lasts longer than this is looked at more closely.
const LONG: Duration = Duration::from_millis(50);

/// Values that are asked for at once should be no more than about so many bytes (INVARIANT I7): Redis keeps what it has answered
/// until it is fetched.
const READ_BYTES: usize = 1024 * 1024;
/// Keys that are asked for at once, at first and at most.
const READ_FIRST: usize = 32;
const READ_MOST: usize = 1000;

/// How often it is looked whether a table that is waited for is still the same.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Where a key that is compared comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// A row that was read has it, so that it is there unless that row has changed since.
    Rows,
    /// It was met in Redis, where anybody can write.
    Redis,
}

/// The two connections.
pub(super) struct Sides {
    pub(super) sql: Sql,
    pub(super) redis: Connection,
    pub(super) timeout: Duration,
    /// So many keys are asked for at once.
    at_once: usize,
    keys: RedisKeys,
    slot: String,
    shutdown: Shutdown,
}

impl Sides {
    pub(super) fn new(
        sql: Sql,
        redis: Connection,
        slot: &str,
        timeout: Duration,
        shutdown: Shutdown,
    ) -> Self {
        Self {
            sql,
            redis,
            timeout,
            at_once: READ_FIRST,
            keys: RedisKeys::new(slot),
            slot: slot.to_owned(),
            shutdown,
        }
    }

    /// Waits until everything that is visible now is in Redis, and every request sent before is taken up. Says where that
    /// is.
    pub(super) fn reach(&mut self) -> Result<Lsn, Error> {
        let target = Request::sync(&mut self.sql.connection, &self.slot)?;
        let mut wait = self.wait();
        loop {
            let at = self.position()?;
            if at.is_some_and(|lsn| lsn >= target) {
                return Ok(target);
            }
            if !wait.pause(self)? {
                return Err(self.stuck(at, target)?);
            }
        }
    }

    fn stuck(&mut self, at: Option<Lsn>, target: Lsn) -> Result<Error, Error> {
        let at = at.map_or_else(|| "nowhere".to_owned(), |lsn| lsn.to_string());
        let info = slot_info(&mut self.sql.connection, &self.slot)?;
        let slot = &self.slot;
        let (why, next) = match info.filter(|info| info.active) {
            Some(_) => (
                "the sink is busy or stuck",
                format!("walmirror status --slot {slot}"),
            ),
            None => (
                "no sink runs, or it cannot go on (its log tells why)",
                format!("walmirror run --slot {slot} …"),
            ),
        };
        Ok(Error::timeout(format!(
            "gave up after {:?}: Redis is at {at} and does not get to {target}: {why}",
            self.timeout
        ))
        .next(next))
    }

    fn position(&mut self) -> Result<Option<Lsn>, Error> {
        match self
            .redis
            .call("read the progress key", &[b"HGET", &self.keys.progress, b"lsn"])?
        {
            Value::BulkString(bytes) => Ok(std::str::from_utf8(&bytes)
                .ok()
                .and_then(|text| text.parse().ok())),
            _ => Ok(None),
        }
    }

    /// A table that is being filled differs in any case. One that is another one by now never is what is waited for.
    pub(super) fn wait_for_backfill(&mut self, table: &Table) -> Result<(), Error> {
        let (mut wait, mut looked) = (self.wait(), None::<Instant>);
        while !self.is_filled(table)? {
            if looked.is_none_or(|looked| looked.elapsed() > LOOK_EVERY) {
                if !table.is_same(&mut self.sql)? {
                    return Err(table.changed());
                }
                looked = Some(Instant::now());
            }
            if !wait.pause(self)? {
                return Err(
                    Error::timeout(format!("the table {} is still being backfilled", table.name))
                        .next(format!("walmirror status --slot {}", self.slot)),
                );
            }
        }
        Ok(())
    }

    /// Whether the keys of this version of the table are complete.
    pub(super) fn is_filled(&mut self, table: &Table) -> Result<bool, Error> {
        // Of this table alone: there may be thousands.
        let field = cursor_field(table.oid);
        let command: [&[u8]; 4] = [b"HMGET", &self.keys.progress, field.as_bytes(), RESYNC.as_bytes()];
        let cursor = match self.redis.call("read the progress key", &command)? {
            Value::Array(values) => match values.as_slice() {
                [Value::BulkString(cursor), Value::Nil] => {
                    std::str::from_utf8(cursor).ok().and_then(Cursor::parse)
                }
                _ => None,
            },
            _ => return Err(unreadable("HMGET")),
        };
        Ok(cursor.is_some_and(|cursor| cursor.is_done() && cursor.fingerprint == table.fingerprint))
    }

    /// What these keys hold.
    pub(super) fn read<'k>(
        &mut self,
        table: &Table,
        keys: impl Iterator<Item = &'k [u8]>,
    ) -> Result<Vec<Content>, Error> {
        let mut found = Vec::new();
        let mut keys = keys.peekable();
        while keys.peek().is_some() {
            let mut commands = Commands::new();
            let (mut count, mut bytes) = (0, 0);
            for key in keys.by_ref().take(self.at_once) {
                commands.command(&[table.shape().command(), key]);
                commands.command(&[b"PTTL", key]);
                count += 1;
            }
            self.redis.send(commands.as_bytes())?;
            for _ in 0..count {
                let (reply, pttl) = (self.redis.receive()?, self.redis.receive()?);
                bytes += weight(&reply);
                found.push(table.shape().found(reply, pttl)?);
            }
            self.at_once = next_at_once(self.at_once, count, bytes);
        }
        Ok(found)
    }

    /// From here on until [`Self::are_untouched`] Redis watches these keys.
    pub(super) fn watch<'k>(&mut self, keys: impl Iterator<Item = &'k [u8]>) -> Result<(), Error> {
        let mut command: Vec<&[u8]> = vec![b"WATCH"];
        command.extend(keys);
        self.redis.call("watch keys", &command).map(drop)
    }

    pub(super) fn unwatch(&mut self) -> Result<(), Error> {
        self.redis.call("unwatch keys", &[b"UNWATCH"]).map(drop)
    }

    /// Whether none of the keys that are watched was touched: then they hold what was read since. They are not read again, as
    /// the answer to EXEC comes whole, however large the values are.
    pub(super) fn are_untouched(&mut self) -> Result<bool, Error> {
        let mut commands = Commands::new();
        // An EXEC of nothing would do, but a proxy could answer that by itself.
        commands
            .command(&[b"MULTI"])
            .command(&[b"HGET", &self.keys.progress, b"lsn"])
            .command(&[b"EXEC"]);
        self.redis.send(commands.as_bytes())?;
        for _ in 0..2 {
            if let Value::ServerError(error) = self.redis.receive()? {
                return Err(reply_error("Redis refuses to look at watched keys", &error));
            }
        }
        match self.redis.receive()? {
            Value::Nil => Ok(false),
            Value::Array(_) => Ok(true),
            Value::ServerError(error) => Err(reply_error("Redis refuses EXEC", &error)),
            _ => Err(unreadable("EXEC")),
        }
    }

    /// What the keys should hold: their rows, as a snapshot of now sees them.
    pub(super) fn rows(
        &mut self,
        table: &Table,
        mut keys: Vec<ParsedKey>,
        origin: Origin,
    ) -> Result<Vec<(Vec<u8>, Content)>, Error> {
        let mut out = Vec::with_capacity(keys.len());
        let mut text = Vec::new();
        let (lookup, mapping) = (&table.lookup, &table.mapping);
        while !keys.is_empty() {
            let found = match origin {
                Origin::Rows => lookup.rows_of_rows(&AnySnapshot, &mut self.sql, mapping, &mut keys),
                Origin::Redis => lookup.rows(&AnySnapshot, &mut self.sql, mapping, &mut keys),
            };
            let found = found.map_err(|error| {
                if error.is_of_a_changed_table() {
                    table.changed()
                } else {
                    error
                }
            })?;
            for (key, packed) in found.into_iter().flat_map(|found| found.keys) {
                let row = packed
                    .map(|packed| table.row(&packed, &mut text))
                    .transpose()?
                    .flatten();
                let expected = row.map_or(Content::Absent, |(_, content)| content);
                out.push((key, expected));
            }
        }
        Ok(out)
    }

    /// Waits until every transaction that Redis may hold already is visible. A commit is in the WAL, and so perhaps in Redis,
    /// before snapshots see it; with a synchronous standby, for long. A transaction whose session idles inside of it has not
    /// committed, however long it lasts, nor has one that is prepared. False: some transaction went on for too long.
    pub(super) fn outlast(&mut self) -> Result<bool, Error> {
        let mut open = self.sql.running()?;
        let started = Instant::now();
        let mut wait = self.wait();
        loop {
            let now = self.sql.snapshot()?;
            open.retain(|xid| !now.sees(*xid));
            if started.elapsed() > LONG && !open.is_empty() {
                let undecided = self.sql.undecided()?;
                open.retain(|xid| !undecided.contains(&(*xid as u32)));
            }
            if open.is_empty() {
                return Ok(true);
            }
            if !wait.pause(self)? {
                return Ok(false);
            }
        }
    }

    /// Which of the keys wait to be read again by the sink.
    pub(super) fn pending(&mut self, keys: &[Vec<u8>]) -> Result<Vec<bool>, Error> {
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        let mut command: Vec<&[u8]> = vec![b"HMGET", &self.keys.pending];
        command.extend(keys.iter().map(Vec::as_slice));
        match self.redis.call("read the pending keys", &command)? {
            Value::Array(items) => Ok(items.iter().map(|item| *item != Value::Nil).collect()),
            _ => Err(unreadable("HMGET")),
        }
    }

    /// Has the sink read these keys again, and waits until it has.
    pub(super) fn repair(&mut self, table: &Table, keys: &[Vec<u8>]) -> Result<(), Error> {
        for keys in keys.chunks(500) {
            let request = Request::Reread {
                relation: table.oid,
                keys: keys.to_vec(),
            };
            request.send(&mut self.sql.connection, &self.slot)?;
            self.reach()?;
            let mut wait = self.wait();
            while self.pending(keys)?.contains(&true) && wait.pause(self)? {}
        }
        Ok(())
    }

    /// Begins to wait.
    pub(super) fn wait(&self) -> Wait {
        Wait {
            until: Instant::now() + self.timeout,
            pause: PAUSE_MIN,
        }
    }

    /// Sleeps. An error: a signal asked to stop.
    pub(super) fn sleep(&self, time: Duration) -> Result<(), Error> {
        if self.shutdown.sleep(time) {
            return Err(Error::timeout(
                "stopped by a signal before the comparison was over",
            ));
        }
        Ok(())
    }
}

/// A wait with growing pauses and an end.
pub(super) struct Wait {
    until: Instant,
    pause: Duration,
}

impl Wait {
    /// False: the time is over.
    pub(super) fn pause(&mut self, sides: &Sides) -> Result<bool, Error> {
        if Instant::now() >= self.until {
            return Ok(false);
        }
        sides.sleep(self.pause)?;
        self.pause = (self.pause * 3 / 2).min(PAUSE_MAX);
        Ok(true)
    }
}

/// How many bytes of values a reply holds.
fn weight(reply: &Value) -> usize {
    match reply {
        Value::BulkString(bytes) => bytes.len(),
        Value::Array(items) => items.iter().map(weight).sum(),
        Value::Map(pairs) => pairs
            .iter()
            .map(|(name, value)| weight(name) + weight(value))
            .sum(),
        _ => 0,
    }
}

/// How many keys are asked for at once after `count` of them, the last ones perhaps fewer than could be, held so many bytes. One is read in
/// any case.
fn next_at_once(at_once: usize, count: usize, bytes: usize) -> usize {
    let most = if count < at_once { at_once } else { at_once * 2 };
    let each = bytes.checked_div(count).unwrap_or_default().max(1);
    (READ_BYTES / each).clamp(1, most.min(READ_MOST))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_values_are_read_one_by_one_and_small_ones_many_at_once() {
        let after = |sizes: &[usize]| {
            sizes
                .iter()
                .fold(READ_FIRST, |count, size| next_at_once(count, count, count * size))
        };
        assert_eq!(after(&[100; 9]), READ_MOST);
        assert_eq!(after(&[4 << 20]), 1);
        assert_eq!(after(&[4 << 20, 4 << 20]), 1);
        assert_eq!(after(&[64 << 10]), 16);
        assert_eq!(after(&[4 << 20, 100, 100]), 4);
        // Fewer than could be say how large they are, and not that more would do.
        assert_eq!(next_at_once(READ_MOST, 3, 3 * (2 << 20)), 1);
        assert_eq!(next_at_once(READ_FIRST, 1, 100), READ_FIRST);
    }
}
