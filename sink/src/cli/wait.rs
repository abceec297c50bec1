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
use crate::pq::{ErrorKind, Row, message_failed, quote_identifier};
use crate::redis::{Connection as Redis, read_stored, unreadable};

/// The first pause between two looks, and the longest one.
const PAUSE_MIN: Duration = Duration::from_millis(1);
const PAUSE_MAX: Duration = Duration::from_millis(50);

/// Postgres has so long to answer at least.
const ANSWER_MIN: Duration = Duration::from_secs(1);

/// How far Redis is, and of which server.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Held {
    lsn: Lsn,
    system_id: String,
    timeline: String,
}

/// Which server it is, as the progress key names it.
#[derive(Debug)]
struct Server {
    system_id: String,
    timeline: String,
}

/// What Redis is waited for.
#[derive(Debug)]
struct Goal {
    lsn: Lsn,
    /// The server that was asked for it. None: none was, or it does not say.
    server: Option<Server>,
    /// Where Redis was before the server was asked, if that is behind what the server then said.
    ahead: Option<Lsn>,
}

impl Goal {
    /// Why what Redis holds says nothing of this server, if that is so. A position counts bytes of one history.
    fn stranger(&self, held: &Held) -> Option<String> {
        if let Some(server) = &self.server {
            if held.system_id != server.system_id {
                return Some(format!(
                    "Redis mirrors the cluster with system identifier {}, this one has {}",
                    held.system_id, server.system_id
                ));
            }
            // A session that goes on over a failover notes the new timeline when it begins.
            if held.timeline != server.timeline {
                return Some(format!(
                    "Redis mirrors timeline {}, the server is on timeline {}, and no sink has begun to stream from it",
                    held.timeline, server.timeline
                ));
            }
        }
        // Whoever moves it has found that both fit together, or begins anew.
        (self.ahead == Some(held.lsn)).then(|| {
            format!(
                "Redis is at {}, but the server's WAL ended at {}: the server was put back to an earlier state",
                held.lsn, self.lsn
            )
        })
    }
}

/// Waits; exit code 7 when the time is over.
pub fn run(options: &Options, args: &WaitArgs) -> Result<(), Error> {
    let deadline = Some(args.timeout.0)
        .filter(|time| !time.is_zero())
        .map(|time| Instant::now() + time);
    let (slot, keys) = (options.slot(), RedisKeys::new(&options.slot()));
    let mut redis = connect(&options.redis()?)?;
    let goal = match args.lsn {
        Position::At(lsn) => Goal {
            lsn,
            server: None,
            ahead: None,
        },
        Position::Current => {
            // Before the server is asked: what it then says is behind everything that it has sent.
            let before = progress(&mut redis, &keys)?.map(|held| held.lsn);
            let (lsn, server) = current(options.postgres()?.expose(), deadline)?;
            let ahead = before.filter(|before| *before > lsn);
            Goal { lsn, server, ahead }
        }
    };
    let (target, mut told) = (goal.lsn, false);
    let mut pause = PAUSE_MIN;
    loop {
        let held = progress(&mut redis, &keys)?;
        let stranger = held.as_ref().and_then(|held| goal.stranger(held));
        if stranger.is_none() && held.as_ref().is_some_and(|held| held.lsn >= target) {
            return Ok(());
        }
        if let Some(why) = stranger.as_ref().filter(|_| !told) {
            told = true;
            tracing::warn!(%slot, next = format!("walmirror status --slot {slot}"), "waiting for a sink: {why}");
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            let but = match (stranger, held) {
                (Some(why), _) => why,
                (None, Some(held)) => format!("it holds it up to {}", held.lsn),
                (None, None) => "it holds nothing of it".to_owned(),
            };
            let what = format!(
                "gave up after {}: of the slot {slot}, Redis should hold everything up to {target}, but {but}",
                args.timeout
            );
            return Err(Error::timeout(what).next(format!("walmirror status --slot {slot}")));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

const WHAT: &str = "cannot ask Postgres for its current LSN";

/// Where Postgres is now: every transaction that has committed before ends before it. And which server that is.
///
/// Neither the insert nor the write position would do. The first may lie in WAL that nobody flushes for minutes, the second
/// in the middle of a record; no stream gets to either. So a message goes into the WAL, and its own commit flushes it.
fn current(conninfo: &str, deadline: Option<Instant>) -> Result<(Lsn, Option<Server>), Error> {
    let failed = |error| Error::postgres(WHAT, error);
    let mut connection = connect_postgres(conninfo)?;
    if let Some(deadline) = deadline {
        connection.answer_within(Some(
            deadline.saturating_duration_since(Instant::now()).max(ANSWER_MIN),
        ));
    }
    let results = connection.simple(
        "SET synchronous_commit = local; \
         SELECT pg_catalog.pg_logical_emit_message(true, 'walmirror.wait', '')",
    );
    let results =
        results.map_err(|error| message_failed(WHAT, error, &quote_identifier(&connection.target().user)))?;
    let lsn = results
        .last()
        .and_then(|result| result.text(0, 0))
        .and_then(|text| text.parse().ok());
    let lsn = lsn.ok_or_else(|| Error::answer(WHAT))?;
    let server = match connection.query(SERVER, &[]) {
        Ok(result) => result.rows().next().and_then(server),
        // Everybody may ask for it, unless somebody has taken that away. The position alone is what there is then.
        Err(error) if error.kind == ErrorKind::Server => {
            tracing::debug!("cannot ask Postgres which server it is: {error}");
            None
        }
        Err(error) => return Err(failed(error)),
    };
    Ok((lsn, server))
}

/// What IDENTIFY_SYSTEM says, for which one needs a replication connection. The last checkpoint may still be one of the timeline before.
const SERVER: &str = "SELECT system_identifier, pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()) \
                      FROM pg_catalog.pg_control_system()";

fn server(row: Row<'_>) -> Option<Server> {
    // Postgres counts without a sign, and has no such type.
    let system_id = row.parse::<i64>(0)?.cast_unsigned();
    let timeline = u32::from_str_radix(row.text(1)?.get(..8)?, 16).ok()?;
    Some(Server {
        system_id: system_id.to_string(),
        timeline: timeline.to_string(),
    })
}

/// How far Redis is; None: there is no progress key.
fn progress(redis: &mut Redis, keys: &RedisKeys) -> Result<Option<Held>, Error> {
    let command: [&[u8]; 5] = [b"HMGET", &keys.progress, b"lsn", b"system_id", b"timeline"];
    let reply = redis.call("read the progress key", &command)?;
    let text = |value: &Value| match value {
        Value::BulkString(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        _ => String::new(),
    };
    let Value::Array(values) = reply else {
        return Err(unreadable("HMGET"));
    };
    let [lsn, system_id, timeline] = values.as_slice() else {
        return Err(unreadable("HMGET"));
    };
    if *lsn == Value::Nil {
        return Ok(None);
    }
    if let Ok(lsn) = text(lsn).parse() {
        return Ok(Some(Held {
            lsn,
            system_id: text(system_id),
            timeline: text(timeline),
        }));
    }
    // This says what is wrong with it, and what to do.
    Ok(read_stored(redis, keys)?.progress.map(|progress| Held {
        lsn: progress.lsn,
        system_id: progress.system_id,
        timeline: progress.timeline.to_string(),
    }))
}
