//! `walmirror status`: how far the mirror is, from both sides.

use redis::Value;
use serde_json::{Map, json};
use walmirror_proto::Lsn;

use super::args::StatusArgs;
use super::checks::Outcome;
use super::checks_redis::connect;
use super::checks_slot::slot_outcome;
use super::connect_postgres;
use super::say;
use crate::backfill::Catalog;
use crate::config::{Options, RedisUrl, SlotName};
use crate::error::Error;
use crate::plan::RedisKeys;
use crate::progress::Progress;
use crate::redis::read_stored;
use crate::rejected::{self, Rejected};
use crate::replication::{self, SlotInfo};
use crate::shown;

/// Rejected rows that are listed.
const REJECTED: u32 = 10;

/// What Postgres says.
struct Postgres {
    slot: Option<SlotInfo>,
    /// Where it is not there: which others are.
    others: String,
    /// Why the mirror cannot stream from it, and the next command.
    unfit: Option<(String, String)>,
    wal: Option<Lsn>,
    tables: Vec<Table>,
}

/// A row of walmirror.mirrors.
struct Table {
    oid: u32,
    name: String,
    mode: String,
    value: String,
    key: String,
    /// Why its label does not fit it, if that is so: then it is not mirrored.
    problem: Option<String>,
}

/// What Redis says.
struct Redis {
    progress: Option<Progress>,
    pending: i64,
    /// How many rows were rejected, and the latest of them.
    rejected: (u64, Vec<Rejected>),
}

/// Prints it.
pub fn run(options: &Options, args: &StatusArgs) -> Result<(), Error> {
    let slot = options.slot();
    let url = options.redis_if_given()?;
    if options.postgres.is_none() && url.is_none() {
        options.postgres()?;
    }
    let conninfo = options.postgres.as_ref();
    let postgres = conninfo.map(|conninfo| ask_postgres(conninfo.expose(), &slot));
    let redis = url.map(|url| ask_redis(&url, &slot));
    // What one side says is worth showing where the other does not answer.
    let (postgres, mut failure) = apart(postgres);
    let (redis, of_redis) = apart(redis);
    failure = failure.or(of_redis);
    if postgres.is_some() || redis.is_some() {
        if args.json {
            say(as_json(&slot, postgres.as_ref(), redis.as_ref()))?;
        } else {
            print(&slot, postgres.as_ref(), redis.as_ref())?;
        }
    }
    failure.map_or(Ok(()), Err)
}

fn apart<T>(answer: Option<Result<T, Error>>) -> (Option<T>, Option<Error>) {
    match answer {
        Some(Ok(answer)) => (Some(answer), None),
        Some(Err(error)) => (None, Some(error)),
        None => (None, None),
    }
}

fn ask_postgres(conninfo: &str, slot: &SlotName) -> Result<Postgres, Error> {
    let failed = |error| Error::postgres("cannot ask Postgres for the state of the mirror", error);
    let mut connection = connect_postgres(conninfo)?;
    let info = replication::slot_info(&mut connection, slot)?;
    let unfit = match slot_outcome(slot, info.as_ref(), &connection.target().database) {
        Outcome::Fail(what, next) => Some((what, next)),
        _ => None,
    };
    let wal = connection
        .query(&format!("SELECT {}", replication::WAL_END), &[])
        .map_err(failed)?;
    let wal = wal.text(0, 0).and_then(|text| text.parse().ok());
    let there = connection
        .query("SELECT pg_catalog.to_regclass('walmirror.mirrors')", &[])
        .map_err(failed)?;
    let mut tables = Vec::new();
    if there.text(0, 0).is_some() {
        let sql = "SELECT oid, relation, mode, value, key FROM walmirror.mirrors ORDER BY relation::text";
        let misfits = Catalog::read_from(&mut connection)?.misfits;
        let problem = |oid: u32| misfits.iter().find(|misfit| misfit.oid == oid);
        let result = connection.query(sql, &[]).map_err(failed)?;
        let text = |row: crate::pq::Row<'_>, column| row.text(column).unwrap_or_default().to_owned();
        tables.extend(result.rows().map(|row| {
            Table {
                oid: row.parse(0).unwrap_or(0),
                name: text(row, 1),
                mode: text(row, 2),
                value: text(row, 3),
                key: text(row, 4),
                problem: row
                    .parse(0)
                    .and_then(problem)
                    .map(|misfit| misfit.problem.clone()),
            }
        }));
    }
    let others = match info {
        None => replication::slots_there(&mut connection),
        Some(_) => String::new(),
    };
    Ok(Postgres {
        slot: info,
        others,
        unfit,
        wal,
        tables,
    })
}

fn ask_redis(url: &RedisUrl, slot: &SlotName) -> Result<Redis, Error> {
    let keys = RedisKeys::new(slot);
    let mut connection = connect(url)?;
    let stored = read_stored(&mut connection, &keys)?;
    let pending = match connection.call("count pending rows", &[b"HLEN", &keys.pending])? {
        Value::Int(count) => count,
        _ => 0,
    };
    Ok(Redis {
        progress: stored.progress,
        pending,
        rejected: rejected::read(&mut connection, &keys, REJECTED)?,
    })
}

fn behind(ahead: Option<Lsn>, at: Option<Lsn>) -> Option<u64> {
    Some(ahead?.0.saturating_sub(at?.0))
}

fn print(slot: &SlotName, postgres: Option<&Postgres>, redis: Option<&Redis>) -> Result<(), Error> {
    let line = |name: &str, text: String| say(format!("{name:<12} {text}"));
    let wal = postgres.and_then(|postgres| postgres.wal);
    if let Some(postgres) = postgres {
        match (&postgres.slot, &postgres.unfit) {
            (_, Some((what, next))) => line("slot", format!("{what}   ({next})"))?,
            (None, None) => line(
                "slot",
                format!(
                    "{slot}: not there{}   (walmirror init --slot {slot})",
                    postgres.others
                ),
            )?,
            (Some(info), None) => {
                let state = info.active_pid.map_or("nobody streams".to_owned(), |pid| {
                    format!("streaming, process {pid}")
                });
                line(
                    "slot",
                    format!(
                        "{slot}: {state}, WAL {}",
                        info.wal_status.as_deref().unwrap_or("?")
                    ),
                )?;
                line("confirmed", position(info.confirmed_flush_lsn, wal))?;
                line("kept from", position(info.restart_lsn, wal))?;
            }
        }
    }
    if let Some(redis) = redis {
        match &redis.progress {
            None => line("Redis", "no progress key: nothing was mirrored yet".to_owned())?,
            Some(progress) => {
                line("Redis", position(Some(progress.lsn), wal))?;
                let when = progress.commit_ts.as_deref().unwrap_or("unknown");
                line(
                    "last commit",
                    format!("{when}, epoch {}, timeline {}", progress.epoch, progress.timeline),
                )?;
            }
        }
        line("pending", format!("{} rows to be read again", redis.pending))?;
        let (count, latest) = &redis.rejected;
        // Notes of more may be gone.
        let least = if *count < rejected::KEPT { "" } else { "at least " };
        if *count > 0 {
            line(
                "rejected",
                format!("{least}{count} rows could not be mirrored; the latest:"),
            )?;
        }
        for one in latest {
            let key = shown::key(&one.key);
            let text = format!("{key:?} of {} at {}: {}", one.table, one.lsn, one.reason);
            line("", text)?;
        }
    }
    for table in postgres
        .map(|postgres| postgres.tables.as_slice())
        .unwrap_or_default()
    {
        let state = match &table.problem {
            Some(problem) => {
                format!("   NOT MIRRORED, its label does not fit: {problem}   (walmirror doctor)")
            }
            None => redis.map_or(String::new(), |_| backfill(cursor(redis, table.oid))),
        };
        line(
            "table",
            format!(
                "{}  {} {} {}{state}",
                table.name, table.mode, table.value, table.key
            ),
        )?;
    }
    Ok(())
}

/// The cursor of a table's backfill, which is JSON.
fn cursor(redis: Option<&Redis>, oid: u32) -> Option<serde_json::Value> {
    let text = redis?.progress.as_ref()?.cursor(oid)?;
    Some(serde_json::from_str(text).unwrap_or_else(|_| json!(text)))
}

/// A cursor for people.
fn backfill(cursor: Option<serde_json::Value>) -> String {
    let Some(cursor) = cursor else {
        return "   not backfilled yet".to_owned();
    };
    let number = |field: &str| cursor.get(field).and_then(serde_json::Value::as_u64).unwrap_or(0);
    match cursor.get("stage").and_then(|stage| stage.as_str()) {
        Some("done") => "   complete".to_owned(),
        Some("fill") => format!(
            "   backfilling: {} rows, at block {}",
            number("rows"),
            number("block")
        ),
        Some("sweep") => "   backfilling: looking for keys without a row".to_owned(),
        _ => format!("   backfill at {cursor}"),
    }
}

fn position(at: Option<Lsn>, wal: Option<Lsn>) -> String {
    let at_text = at.map_or("nowhere".to_owned(), |lsn| lsn.to_string());
    match behind(wal, at) {
        Some(bytes) => format!("{at_text}, {} behind", size(bytes)),
        None => at_text,
    }
}

/// A number of bytes for people.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut tenths = bytes.saturating_mul(10);
    let mut unit = "";
    for next in UNITS {
        if tenths < 10 * 1024 {
            break;
        }
        (tenths, unit) = (tenths / 1024, next);
    }
    format!("{}.{} {unit}", tenths / 10, tenths % 10)
}

fn as_json(slot: &SlotName, postgres: Option<&Postgres>, redis: Option<&Redis>) -> serde_json::Value {
    let lsn = |lsn: Option<Lsn>| lsn.map(|lsn| lsn.to_string());
    let mut out = Map::new();
    out.insert("slot".into(), json!(slot.as_str()));
    let progress = redis.and_then(|redis| redis.progress.as_ref());
    if let Some(postgres) = postgres {
        let info = postgres.slot.as_ref();
        let confirmed = info.and_then(|info| info.confirmed_flush_lsn);
        out.insert("wal_lsn".into(), json!(lsn(postgres.wal)));
        let problem = postgres.unfit.as_ref().map(|(what, _)| what);
        out.insert("slot_problem".into(), json!(problem));
        out.insert("slot_active".into(), json!(info.map(|info| info.active)));
        out.insert(
            "wal_status".into(),
            json!(info.and_then(|info| info.wal_status.as_deref())),
        );
        out.insert("confirmed_lsn".into(), json!(lsn(confirmed)));
        out.insert(
            "confirmed_lag_bytes".into(),
            json!(behind(postgres.wal, confirmed)),
        );
        out.insert(
            "restart_lsn".into(),
            json!(lsn(info.and_then(|info| info.restart_lsn))),
        );
        out.insert(
            "lag_bytes".into(),
            json!(behind(postgres.wal, progress.map(|progress| progress.lsn))),
        );
        let table = |table: &Table| {
            json!({"oid": table.oid, "table": table.name, "mode": table.mode, "value": table.value, "key": table.key,
                   "backfill": cursor(redis, table.oid), "problem": table.problem})
        };
        out.insert("tables".into(), postgres.tables.iter().map(table).collect());
    }
    if let Some(redis) = redis {
        out.insert(
            "lsn".into(),
            json!(progress.map(|progress| progress.lsn.to_string())),
        );
        out.insert(
            "commit_ts".into(),
            json!(progress.and_then(|progress| progress.commit_ts.as_deref())),
        );
        out.insert("epoch".into(), json!(progress.map(|progress| progress.epoch)));
        out.insert("pending".into(), json!(redis.pending));
        let (count, latest) = &redis.rejected;
        let latest: Vec<_> = latest
            .iter()
            .map(|one| {
                json!({"key": String::from_utf8_lossy(&one.key), "table": one.table, "lsn": one.lsn.to_string(),
                       "reason": one.reason})
            })
            .collect();
        out.insert("rejected".into(), json!({"count": count, "latest": latest}));
    }
    serde_json::Value::Object(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backfill_is_told_in_words() {
        assert_eq!(backfill(None), "   not backfilled yet");
        assert_eq!(backfill(Some(json!({"stage": "done"}))), "   complete");
        let fill = json!({"stage": "fill", "rows": 7, "block": 3});
        assert_eq!(backfill(Some(fill)), "   backfilling: 7 rows, at block 3");
    }

    #[test]
    fn sizes_are_for_people() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(16 << 20), "16.0 MiB");
        assert_eq!(size(5 << 40), "5.0 TiB");
    }
}
