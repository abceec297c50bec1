//! Removes the keys of a table: what TRUNCATE and the end of a mirror come to. Few go in the EXEC of their transaction; many are
//! removed before it, page by page, and that is noted.

use std::time::{Duration, Instant};

use redis::Value;

use super::super::Prefixes;
use super::{Segment, Writer, touched};
use crate::error::{Class, Error};
use crate::plan::Script;
use crate::progress::{PURGING, Purging};
use crate::resp::Commands;
use crate::transaction::Commit;

/// A TRUNCATE of a table with at most so many keys is atomic with its transaction; a larger one removes its keys before.
pub(super) const ATOMIC_KEYS: usize = 10_000;
/// And so many bytes of keys.
const ATOMIC_BYTES: usize = 8 * 1024 * 1024;
/// A walk that takes longer is told of.
const SLOW: Duration = Duration::from_secs(1);
/// Keys removed by one command.
const UNLINK_KEYS: usize = 500;

impl Writer {
    /// Removes the keys of a segment's purges. Few keys become commands behind the MULTI that is returned, so that they go in the
    /// same atomic step; many are removed page by page before it.
    pub(super) fn purge(&mut self, segment: &Segment, stopped: &dyn Fn() -> bool) -> Result<Commands, Error> {
        let mut commands = Commands::new();
        commands.command(&[b"MULTI"]);
        // A session before may have removed keys for a later transaction, in a batch that was larger: until that one is applied, it
        // has to come.
        let own = segment.purging.commit;
        let last = [self.purging, own]
            .into_iter()
            .flatten()
            .max_by_key(|commit| commit.lsn);
        let (mut held, mut bytes): (Vec<Vec<u8>>, usize) = (Vec::new(), 0);
        let mut noted = false;
        // One walk for all tables: DROP SCHEMA may bring thousands.
        let tables = Prefixes::new(segment.purges.iter().enumerate());
        let goes = |key: &[u8]| {
            let mut purges = tables
                .places(key)
                .into_iter()
                .filter_map(|place| segment.purges.get(place));
            purges.any(|purge| purge.match_key(key).is_some())
        };
        let (started, mut told) = (Instant::now(), false);
        let mut scan = tables.scan();
        while let Some(keys) = scan.page(&mut self.connection)? {
            for key in keys.into_iter().filter(|key| goes(key)) {
                bytes += key.len();
                held.push(key);
            }
            if held.len() > self.atomic_purge_keys || bytes > ATOMIC_BYTES {
                if !noted {
                    self.note_purging(last)?;
                    noted = true;
                }
                self.unlink_now(&held)?;
                held.clear();
                bytes = 0;
            }
            if stopped() {
                return Err(Error::redis(
                    "a purge was interrupted",
                    Class::Retry,
                    "the session ends",
                ));
            }
            if !told && started.elapsed() > SLOW {
                told = true;
                tracing::info!(
                    tables = segment.purges.len(),
                    "the keys of tables that were emptied or forgotten are being removed; the stream waits until all of Redis was looked at"
                );
            }
        }
        if last == own {
            commands.command(&[b"HDEL", &self.keys.progress, PURGING]);
            self.purging = None;
        }
        for keys in held.chunks(UNLINK_KEYS) {
            commands.begin(1 + keys.len()).arg(b"UNLINK");
            for key in keys {
                commands.arg(key);
            }
        }
        Ok(commands)
    }

    /// From here to the next EXEC Redis lacks what it should have at its position. On this history of Postgres the purge comes
    /// again whatever crashes; on another one, after a failover or when files are put back, it may never have been.
    fn note_purging(&mut self, commit: Option<Commit>) -> Result<(), Error> {
        let what = "note that keys are being removed";
        let value = Purging { commit }.encode();
        self.connection.call(what, &[b"MULTI"])?;
        self.connection
            .call(what, &[b"HSET", &self.keys.progress, PURGING, value.as_bytes()])?;
        match self.connection.call(what, &[b"EXEC"])? {
            Value::Nil => Err(self.check_watch().err().unwrap_or_else(|| touched(&self.keys))),
            _ => {
                self.purging = commit;
                self.check()
            }
        }
    }

    fn unlink_now(&mut self, keys: &[Vec<u8>]) -> Result<(), Error> {
        let epoch = self.epoch.to_string();
        for keys in keys.chunks(UNLINK_KEYS) {
            let count = (keys.len() + 1).to_string();
            let mut command: Vec<&[u8]> = vec![
                b"EVALSHA",
                self.scripts.hash(Script::Purge),
                count.as_bytes(),
                &self.keys.progress,
            ];
            command.extend(keys.iter().map(Vec::as_slice));
            command.push(epoch.as_bytes());
            if self.connection.call("remove the keys of a table", &command)? == Value::Int(-1) {
                return Err(self.fenced(None));
            }
        }
        Ok(())
    }
}
