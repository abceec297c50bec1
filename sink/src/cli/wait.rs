//! `walmirror wait`: returns once everything before an LSN is in Redis.

use std::time::{Duration, Instant};

use redis::Value;
use walmirror_proto::Lsn;

use super::args::{Position, WaitArgs};
use super::checks_redis::connect;
use super::connect_postgres;
use crate::config::Options;
use crate::error::Error;
use crate::plan::RedisKeys;
use crate::pq::{message_failed, quote_identifier};
use crate::redis::{Connection as Redis, read_stored};

/// The first pause between two looks, and the longest one.
const PAUSE_MIN: Duration = Duration::from_millis(1);
const PAUSE_MAX: Duration = Duration::from_millis(50);

/// Postgres has so long to answer at least.
const ANSWER_MIN: Duration = Duration::from_secs(1);

/// Waits; exit code 7 when the time is over.
pub fn run(options: &Options, args: &WaitArgs) -> Result<(), Error> {
    let deadline = Some(args.timeout.0)
        .filter(|time| !time.is_zero())
        .map(|time| Instant::now() + time);
    let (slot, keys) = (options.slot(), RedisKeys::new(&options.slot()));
    let mut redis = connect(&options.redis()?)?;
    let target = match args.lsn {
        Position::At(lsn) => lsn,
        Position::Current => current_lsn(options.postgres()?.expose(), deadline)?,
    };
    let mut pause = PAUSE_MIN;
    loop {
        let progress = progress(&mut redis, &keys)?;
        if progress.is_some_and(|lsn| lsn >= target) {
            return Ok(());
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            let at = progress.map_or_else(|| "nothing of it".to_owned(), |lsn| format!("it up to {lsn}"));
            let what = format!(
                "gave up after {}: of the slot {slot}, Redis should hold everything up to {target}, but holds {at}",
                args.timeout
            );
            return Err(Error::timeout(what).next(format!("walmirror status --slot {slot}")));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Where Postgres is now: every transaction that has committed before ends before it.
///
/// Neither the insert nor the write position would do. The first may lie in WAL that nobody flushes for minutes, the second
/// in the middle of a record; no stream gets to either. So a message goes into the WAL, and its own commit flushes it.
fn current_lsn(conninfo: &str, deadline: Option<Instant>) -> Result<Lsn, Error> {
    let mut connection = connect_postgres(conninfo)?;
    if let Some(deadline) = deadline {
        connection.answer_within(Some(
            deadline.saturating_duration_since(Instant::now()).max(ANSWER_MIN),
        ));
    }
    let what = "cannot ask Postgres for its current LSN";
    let results = connection.simple(
        "SET synchronous_commit = local; \
         SELECT pg_catalog.pg_logical_emit_message(true, 'walmirror.wait', '')",
    );
    let results =
        results.map_err(|error| message_failed(what, error, &quote_identifier(&connection.target().user)))?;
    let lsn = results
        .last()
        .and_then(|result| result.text(0, 0))
        .and_then(|text| text.parse().ok());
    lsn.ok_or_else(|| Error::answer(what))
}

/// How far Redis is; None: there is no progress key.
fn progress(redis: &mut Redis, keys: &RedisKeys) -> Result<Option<Lsn>, Error> {
    match redis.call("read the progress key", &[b"HGET", &keys.progress, b"lsn"])? {
        Value::BulkString(bytes) => {
            let lsn = std::str::from_utf8(&bytes)
                .ok()
                .and_then(|text| text.parse().ok());
            match lsn {
                Some(lsn) => Ok(Some(lsn)),
                // This says what is wrong with it, and what to do.
                None => Ok(read_stored(redis, keys)?.progress.map(|progress| progress.lsn)),
            }
        }
        _ => Ok(None),
    }
}
