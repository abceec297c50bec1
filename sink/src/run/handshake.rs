//! The beginning of a session: look at both sides, decide, make or take what is missing, and get the right to write.

use std::sync::Once;
use std::time::Duration;

use walmirror_proto::Lsn;

use super::decide::{Decision, Found, Server, decide, still_fits};
use super::versions;
use crate::config::{OnGap, RedisUrl, RunConfig};
use crate::continuity::{Continuity, Last};
use crate::error::{Class, Error};
use crate::plan::{RedisKeys, Scripts};
use crate::pq::{Connection as Postgres, ErrorKind, PqError, Waker, message_failed, quote_identifier};
use crate::progress::Progress;
use crate::redis::{
    Claim, Connection as Redis, Identity, Stored, Writer, begin_first, eviction, read_stored, require_master,
    require_own, value_limit,
};
use crate::replication::slot::PLUGIN;
use crate::replication::{
    History, SlotInfo, Stream, drop_slot, history, identify_system, make_slot, slot_info,
};

/// What a session begins with.
pub(super) struct Handshake {
    pub(super) stream: Stream,
    /// The connection that has the right to write, and its epoch.
    pub(super) writer: Writer,
    pub(super) epoch: u64,
    pub(super) scripts: Scripts,
    /// What Redis held when the right was taken.
    pub(super) stored: Stored,
    /// The longest value that Redis takes.
    pub(super) value_bytes: usize,
    /// Where the progress begins anew, if it does.
    pub(super) fresh: Option<Lsn>,
    /// Whether the stream is of the history that Redis mirrors.
    pub(super) continuity: Continuity,
    /// What the slot is confirmed up to.
    pub(super) confirmed: Lsn,
    /// As long as the server may be silent although it was asked.
    pub(super) silence: Duration,
    /// A transaction id above those of all transactions that earlier sessions applied.
    pub(super) horizon: u64,
    /// The version of the extension.
    pub(super) extension: String,
}

/// How long the server may take to answer what takes it a moment.
const ANSWER: Duration = Duration::from_secs(30);
/// A beginning so many bytes before the old position has its landmark in between.
const OUTRUN_MAX: u64 = 1 << 20;
/// As long as the server may be silent where it does not mind how long the sink is.
const SILENCE: Duration = Duration::from_secs(60);

/// Connects and claims. `found` is what the session before this one found in the stream. `interrupt` ends a wait when the process
/// should stop. `streaming`: transactions may come while they are in progress.
pub(super) fn shake(
    config: &RunConfig,
    keys: &RedisKeys,
    found: Option<&Found>,
    interrupt: &Waker,
    streaming: bool,
) -> Result<Handshake, Error> {
    let slot = config.slot.as_str();
    let mut redis = Redis::connect(&config.redis)?;
    // What Redis refuses is told before Postgres is asked for anything.
    read_stored(&mut redis, keys)?;
    require_master(&mut redis)?;
    warn_of_eviction(&mut redis, &config.redis)?;
    let extra = [("fallback_application_name", "walmirror")];
    let connect = |extra: &[(&str, &str)]| {
        Postgres::connect_interrupted_with(config.postgres.expose(), extra, interrupt.clone())
    };
    let mut sql = connect(&extra).map_err(|error| Error::postgres("cannot connect to Postgres", error))?;
    sql.answer_within(Some(ANSWER));
    let extension = check_database(&mut sql)?;
    // In this order, because another sink may have the slot meanwhile: what it confirms is in Redis before, and in the WAL before that.
    let info = slot_info(&mut sql, slot)?;
    check_slot(slot, info.as_ref(), &sql)?;
    let stored = read_stored(&mut redis, keys)?;
    let mut replication = connect(&[("replication", "database"), extra[0]])
        .map_err(|error| Error::postgres("cannot open a replication connection to Postgres", error))?;
    replication.answer_within(Some(ANSWER));
    let system = identify_system(&mut replication)?;
    let end = system.xlogpos;
    let identity = Identity::from(system);

    require_own(&mut redis, slot, &identity, &stored)?;

    let before = stored.progress.as_ref().map(|progress| progress.timeline);
    let history = ancestors(&mut replication, stored.progress.as_ref(), &identity)?;
    let server = Server {
        slot: info.as_ref(),
        identity: &identity,
        history: &history,
        end,
    };

    let decision = decide(stored.progress.as_ref(), &server, found);
    // The slot was looked for first, so another walmirror may have begun meanwhile: a slot that is there now is none that is gone.
    if matches!(decision, Decision::Gap { .. }) && info.is_none() && slot_info(&mut sql, slot)?.is_some() {
        return Err(changed(slot, "another walmirror has made it"));
    }
    let make = |sql: &mut Postgres, replication: &mut Postgres| {
        make_slot(sql, replication, slot).map_err(|error| look_again(error, slot))
    };
    let remove = |sql: &mut Postgres| drop_slot(sql, slot).map_err(|error| look_again(error, slot));
    // Making a slot waits for all transactions that are running.
    replication
        .make_patient(config.postgres.expose(), ANSWER)
        .map_err(|error| Error::postgres("cannot tell the process of the connection", error))?;
    let (start, fresh) = match decision {
        Decision::Resume(lsn) => {
            if let Some(before) = before.filter(|before| *before != identity.timeline) {
                tracing::info!(
                    slot,
                    %lsn,
                    "there was a failover from timeline {before} to {}, and nothing is missing: going on",
                    identity.timeline
                );
            }
            (lsn, None)
        }
        Decision::First(made) => {
            // Before the slot: whatever ends this session between the two, the next one finds its own first start, and no gap.
            if made.is_none() && !begin_first(&mut redis, keys, &identity)? {
                let why = "another walmirror began at the same time";
                return Err(Error::redis("cannot begin to mirror", Class::Retry, why));
            }
            let lsn = match made {
                Some(lsn) => {
                    tracing::info!(slot, %lsn, "the first start goes on: an earlier attempt has made the slot, and got no further");
                    lsn
                }
                None => make(&mut sql, &mut replication)?,
            };
            tracing::info!(slot, %lsn, "first start: the slot is made, all mirrored tables will be backfilled");
            (lsn, Some(lsn))
        }
        Decision::Gap { why, .. } if config.on_gap == OnGap::Fail => {
            return Err(
                Error::gap(format!("Redis and the slot {slot:?} do not fit together: {why}")).next(format!(
                    "walmirror run --slot {slot} --on-gap resync …   # backfills every table online"
                )),
            );
        }
        Decision::Gap { why, slot: usable } => {
            tracing::warn!(
                slot,
                "Redis and the slot do not fit together: {why}; every table is backfilled anew"
            );
            let lsn = match usable {
                Some(lsn) => lsn,
                None => {
                    if info.is_some() {
                        remove(&mut sql)?;
                    }
                    let position = stored
                        .progress
                        .as_ref()
                        .map_or(Lsn::INVALID, |progress| progress.lsn);
                    outrun(&mut sql, end, position)?;
                    let mut lsn = make(&mut sql, &mut replication)?;
                    // It has waited for transactions, and they have written on.
                    while outrun(&mut sql, lsn, position)? {
                        remove(&mut sql)?;
                        lsn = make(&mut sql, &mut replication)?;
                    }
                    lsn
                }
            };
            (lsn, Some(lsn))
        }
    };

    if fresh.is_some() {
        // Making a slot may have taken longer than Redis keeps a connection on which nothing is said.
        redis = Redis::connect(&config.redis)?;
    }
    replication.answer_within(Some(ANSWER));
    // The slot comes first: whoever holds it is alive, and is not to be fenced off.
    let streaming = if streaming { "on" } else { "off" };
    let options = [("proto_version", "1"), ("streaming", streaming)];
    let resumed = stored.progress.as_ref().filter(|_| fresh.is_none());
    let from = resumed.map_or(start, Continuity::start);
    let from = info
        .as_ref()
        .and_then(|slot| slot.confirmed_flush_lsn)
        .map_or(from, |confirmed| from.max(confirmed));
    let silence = silence(&mut sql)?;
    // While nothing is read, nobody hears that the server asks: so it is told before it gives up.
    let status_interval = config.status_interval.min(silence / 4);
    let stream = Stream::start_on(replication, slot, from, &options, status_interval)
        .map_err(|error| versions::explain(look_again(error, slot), slot, &extension))?;
    // Whoever had the slot before may have confirmed more since it was looked at: then the server begins there. From here
    // on only this session confirms.
    let info = slot_info(&mut sql, slot)?;
    let held = info.as_ref().and_then(|slot| slot.confirmed_flush_lsn);
    let server = Server {
        slot: info.as_ref(),
        ..server
    };
    let mut claim = Claim::take(redis, keys, slot, &identity, fresh, |stored| match fresh {
        Some(_) => Ok(()),
        None => still_fits(stored, start, &server),
    })?;
    let resumed = claim.stored.progress.as_ref().filter(|_| fresh.is_none());
    let continuity = match resumed {
        Some(progress) => Continuity::of(progress, held.map_or(from, |held| from.max(held))),
        None => Continuity::proved(),
    };
    let last = resumed.and_then(|progress| progress.last);
    // Nothing of this session waits for itself.
    sql.simple("SET synchronous_commit = local")
        .map_err(|error| Error::postgres("cannot set synchronous_commit", error))?;
    // Before the horizon: what a SELECT read before the landmark does not pass the gate.
    if !matches!(last, Some(Last::Commit(_))) {
        write_landmark(&mut sql)?;
    }
    let horizon = horizon(&mut sql)?;
    let confirmed = fresh.or(held).unwrap_or_default();
    let value_bytes = value_limit(&mut claim.connection)?;
    let (epoch, scripts, stored) = (claim.epoch, claim.scripts.clone(), claim.stored.clone());
    let mut writer = Writer::new(claim, keys.clone())?;
    writer.set_on_bad_row(config.on_bad_row);
    Ok(Handshake {
        stream,
        writer,
        epoch,
        scripts,
        stored,
        value_bytes,
        fresh,
        continuity,
        confirmed,
        silence,
        horizon,
        extension,
    })
}

/// The ancestors of the server's timeline, where Redis is on another one: timelines only rise, and the first one has none.
pub(super) fn ancestors(
    replication: &mut Postgres,
    progress: Option<&Progress>,
    identity: &Identity,
) -> Result<History, Error> {
    if progress.is_some_and(|progress| progress.timeline < identity.timeline) {
        history(replication, identity.timeline)
    } else {
        Ok(History::none())
    }
}

/// A slot that was dropped, invalidated or made since it was looked at, as by another sink that found the same: the next look sees that.
fn look_again(error: Error, slot: &str) -> Error {
    if error.is_slot_gone() || error.is_slot_there() {
        return changed(slot, &error.to_string());
    }
    error
}

/// What this session has decided on is not so any more: the next one decides anew.
fn changed(slot: &str, why: &str) -> Error {
    let source = PqError::new(ErrorKind::Connection, why.to_owned());
    Error::postgres(
        format!("the slot {slot:?} changed while this session began"),
        source,
    )
}

/// Said once, as sessions may follow each other fast.
fn warn_of_eviction(redis: &mut Redis, url: &RedisUrl) -> Result<(), Error> {
    static SAID: Once = Once::new();
    if let Some(policy) = eviction(redis)? {
        SAID.call_once(|| {
            tracing::warn!(
                next = url.complete("redis-cli CONFIG SET maxmemory-policy noeviction"),
                "maxmemory-policy is {policy}: when it is full, Redis evicts mirrored rows, or the progress key"
            );
        });
    }
    Ok(())
}

/// Returns the version of the extension.
fn check_database(sql: &mut Postgres) -> Result<String, Error> {
    let database = sql.database().unwrap_or_default();
    let result = sql
        .query(
            "SELECT extversion, pg_catalog.pg_is_in_recovery() FROM pg_catalog.pg_extension WHERE extname = 'walmirror'",
            &[],
        )
        .map_err(|error| Error::postgres("cannot look for the extension", error))?;
    if result.is_empty() {
        return Err(Error::setup(format!(
            "the database {database:?} does not have the extension walmirror"
        ))
        .next(sql.target().create_extension()));
    }
    if result.text(0, 1) == Some("t") {
        // In the middle of a failover: nothing can be written there, markers neither, until it is promoted.
        let error = PqError::new(ErrorKind::Connection, "it is a standby, and may be promoted yet");
        return Err(Error::postgres("cannot mirror from this server", error)
            .next("walmirror run --postgres '… target_session_attrs=read-write' …"));
    }
    Ok(result.text(0, 0).unwrap_or_default().to_owned())
}

fn check_slot(slot: &str, info: Option<&SlotInfo>, sql: &Postgres) -> Result<(), Error> {
    let Some(info) = info else { return Ok(()) };
    let plugin = info.plugin.as_deref();
    if plugin != Some(PLUGIN) {
        let other = plugin.map_or_else(
            || "is a physical slot".to_owned(),
            |plugin| format!("belongs to the plugin {plugin}, not to {PLUGIN}"),
        );
        return Err(
            Error::setup(format!("the slot {slot:?} {other}")).next("walmirror run --slot <another name> …")
        );
    }
    if info.active && info.confirmed_flush_lsn.is_none() {
        // The server goes on making it for a sink that was killed meanwhile, until all transactions of then have ended.
        let error = PqError::new(ErrorKind::Connection, "it waits for transactions that run");
        return Err(Error::postgres(
            format!("the slot {slot:?} is still being made"),
            error,
        ));
    }
    if info.database != sql.database() {
        let database = info.database.as_deref().unwrap_or_default();
        return Err(
            Error::setup(format!("the slot {slot:?} belongs to the database {database:?}"))
                .next("walmirror run --slot <another name> …"),
        );
    }
    Ok(())
}

/// Every transaction that an earlier session applied took its id before this one is taken.
fn horizon(sql: &mut Postgres) -> Result<u64, Error> {
    let failed = |error| Error::postgres("cannot take a transaction id", error);
    let result = sql.query("SELECT pg_current_xact_id()", &[]).map_err(failed)?;
    result
        .text(0, 0)
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| Error::answer("cannot take a transaction id"))
}

/// Commits a transaction that comes in the stream and changes nothing, because it forgets table 0, which there is not. What is read from
/// here on can be told from what a copy of the server that was made before it holds.
fn write_landmark(sql: &mut Postgres) -> Result<(), Error> {
    let statement =
        r#"SELECT pg_logical_emit_message(true, 'walmirror.ddl', '{"oid": 0, "keep_keys": true}')"#;
    sql.query(statement, &[])
        .map(drop)
        .map_err(|error| no_message("cannot write into the WAL where the mirror begins", error, sql))
}

/// The server was put back to just before where Redis is, and its slot is to be made anew. Should Redis lose the claim that follows,
/// its old position must not look like one behind the slot's beginning: the landmark tells that only where it fits in between.
/// True: WAL was written up to behind the position.
fn outrun(sql: &mut Postgres, end: Lsn, position: Lsn) -> Result<bool, Error> {
    let Some(bytes) = position.0.checked_sub(end.0).filter(|bytes| *bytes < OUTRUN_MAX) else {
        return Ok(false);
    };
    let statement =
        format!("SELECT pg_logical_emit_message(false, 'walmirror.filler', repeat('x', {bytes} + 1024))");
    sql.query(&statement, &[])
        .map(|_| true)
        .map_err(|error| no_message("cannot write into the WAL before the slot is made", error, sql))
}

fn no_message(what: &str, error: PqError, sql: &Postgres) -> Error {
    message_failed(what, error, &quote_identifier(&sql.target().user))
}

/// The server looks for what the sink says at least twice in its wal_sender_timeout, also while it decodes what it does not
/// send. A server that answers nothing for that long is not there any more.
fn silence(sql: &mut Postgres) -> Result<Duration, Error> {
    let result = sql
        .query(
            "SELECT setting::bigint FROM pg_catalog.pg_settings WHERE name = 'wal_sender_timeout'",
            &[],
        )
        .map_err(|error| Error::postgres("cannot read wal_sender_timeout", error))?;
    let timeout_ms = result.text(0, 0).and_then(|text| text.parse().ok());
    Ok(timeout_ms
        .filter(|timeout_ms| *timeout_ms > 0)
        .map_or(SILENCE, Duration::from_millis))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The story: two sinks found the slot gone, and the one that did not get to make it ended.
    #[test]
    fn a_slot_that_another_sink_has_dropped_or_made_is_looked_at_again() {
        for (sqlstate, class) in [
            ("42710", Class::Retry),
            ("42704", Class::Retry),
            ("53400", Class::Operator),
        ] {
            let source = PqError {
                sqlstate: Some(sqlstate.into()),
                ..PqError::new(ErrorKind::Server, "x")
            };
            let error = look_again(Error::postgres("cannot create the slot \"s\"", source), "s");
            assert_eq!(error.class(), class, "{sqlstate}");
        }
    }
}
