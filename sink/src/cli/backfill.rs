//! `walmirror backfill`: asks the running sink to read tables again, and shows how far it is.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use walmirror_proto::Lsn;

use super::args::BackfillArgs;
use super::checks_redis::connect;
use super::checks_tables::unreadable;
use super::connect_postgres;
use super::say;
use crate::backfill::{Catalog, Cursor, Misfit, Stage};
use crate::config::{Conninfo, Options, SlotName};
use crate::error::Error;
use crate::plan::RedisKeys;
use crate::pq::Connection;
use crate::progress::Progress;
use crate::redis::{Connection as Redis, read_stored};
use crate::replication::{SlotInfo, slot_info, slots_there};
use crate::request::Request;
use crate::shell::word;
use crate::verify::resolve;

/// Between two looks at Redis.
const PAUSE: Duration = Duration::from_millis(250);
/// Between two looks at the slot.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A slot from which nobody has streamed for so long: the sink has stopped, or it cannot go on.
const GONE_AFTER: Duration = Duration::from_secs(5);
/// A table whose cursor has not moved for so long is worth a line.
const QUIET: Duration = Duration::from_secs(10);

/// A mirrored table.
struct Table {
    oid: u32,
    name: String,
    /// An estimate.
    rows: u64,
    is_cache: bool,
}

/// Asks, and waits until it is done.
pub fn run(options: &Options, args: &BackfillArgs) -> Result<(), Error> {
    let (conninfo, slot) = (options.postgres()?, options.slot());
    let keys = RedisKeys::new(slot.as_str());
    let mut redis = connect(&options.redis()?)?;
    let mut sql = connect_postgres(conninfo.expose())?;
    let Some(info) = slot_info(&mut sql, slot.as_str())? else {
        let others = slots_there(&mut sql);
        let what = format!("there is no slot {slot}, so no sink runs that could fill a table{others}");
        return Err(Error::setup(what).next(format!("walmirror status --slot {slot}")));
    };
    let Some(info) = Some(info).filter(|info| info.active) else {
        return Err(Error::setup(format!(
            "nobody streams from the slot {slot}: no sink runs, or it cannot go on (its log tells why); only a sink can fill a table"
        ))
        .next(format!(
            "walmirror run --slot {slot} …   # fills by itself what is missing"
        )));
    };
    let mut tables = choose(&mut sql, &args.table)?;
    let unfit = leave_out_unfit(&mut sql, &mut tables)?;
    match unfit.first() {
        Some(misfit) if !args.table.is_empty() => return Err(misfit.error()),
        _ => {}
    }
    for misfit in &unfit {
        say(format!(
            "{}: left out, as its label does not fit it",
            misfit.table
        ))?;
    }
    // The others are not held up by it.
    let done = || unfit.first().map_or(Ok(()), |misfit| Err(misfit.error()));
    // What would have to be waited for without end is told before anything is asked for.
    progress(&mut redis, &keys, &slot)?;
    check_rights(&mut sql, &info, &tables)?;
    for table in &tables {
        Request::Backfill(table.oid).send(&mut sql, slot.as_str())?;
    }
    let target = Request::sync(&mut sql, slot.as_str())?;
    if args.timeout.0.is_zero() {
        say("the sink is asked; `walmirror status` shows how far it is")?;
        return done();
    }
    let mut watch = Watch {
        sql,
        conninfo,
        slot,
        looked: Instant::now(),
        seen: Instant::now(),
    };
    await_begin(&mut redis, &keys, target, args, &mut watch)?;
    for table in &tables {
        follow(&mut redis, &keys, table, &mut watch)?;
    }
    done()
}

/// Whether there is still a sink to wait for.
struct Watch {
    sql: Connection,
    conninfo: Conninfo,
    slot: SlotName,
    looked: Instant,
    /// When somebody streamed from the slot.
    seen: Instant,
}

impl Watch {
    /// Waits a moment. An error where nobody streams any more.
    fn pause(&mut self) -> Result<(), Error> {
        std::thread::sleep(PAUSE);
        if self.looked.elapsed() < LOOK_EVERY {
            return Ok(());
        }
        let is_active = self.is_active();
        self.looked = Instant::now();
        match is_active {
            Ok(true) => self.seen = self.looked,
            _ if self.seen.elapsed() < GONE_AFTER => {}
            Ok(false) => return Err(self.gone()),
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// A server that was restarted has another chance at the next look.
    fn is_active(&mut self) -> Result<bool, Error> {
        if !self.sql.is_ok() {
            self.sql = connect_postgres(self.conninfo.expose())?;
        }
        let info = slot_info(&mut self.sql, self.slot.as_str())?;
        Ok(info.is_some_and(|info| info.active))
    }

    fn gone(&self) -> Error {
        let slot = &self.slot;
        Error::setup(format!(
            "the sink has stopped: nobody streams from the slot {slot}; it goes on with the backfill when it is started again"
        ))
        .next(format!("walmirror run --slot {slot} …"))
    }
}

/// The tables that are meant. What is cached on demand is filled by reading it.
fn choose(sql: &mut Connection, names: &[String]) -> Result<Vec<Table>, Error> {
    let failed = |error| Error::postgres("cannot list the mirrored tables", error);
    sql.simple("SET synchronous_commit = local").map_err(failed)?;
    let statement = "SELECT m.oid, n.nspname || '.' || c.relname, \
                       (SELECT sum(greatest(l.reltuples, 0))::bigint FROM walmirror.leaves(m.oid) o JOIN pg_catalog.pg_class l ON l.oid = o), m.mode \
                     FROM walmirror.mirrors m JOIN pg_catalog.pg_class c ON c.oid = m.oid \
                     JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace ORDER BY 2";
    let result = sql.query(statement, &[]).map_err(failed)?;
    let mut tables: Vec<Table> = result
        .rows()
        .filter_map(|row| {
            Some(Table {
                oid: row.parse(0)?,
                name: row.text(1)?.to_owned(),
                rows: row.parse(2).unwrap_or(0),
                is_cache: row.text(3) == Some("cache"),
            })
        })
        .collect();
    if !names.is_empty() {
        let known: Vec<String> = tables.iter().map(|table| table.name.clone()).collect();
        let wanted: Vec<&String> = names
            .iter()
            .map(|name| resolve(&known, name, "backfill"))
            .collect::<Result<_, _>>()?;
        tables.retain(|table| wanted.contains(&&table.name));
        if let Some(table) = tables.iter().find(|table| table.is_cache) {
            let what = format!(
                "the table {} is cached on demand: a row comes into Redis when it is read, there is nothing to fill",
                table.name
            );
            return Err(Error::config(what).next(format!("walmirror verify --table {}", word(&table.name))));
        }
    }
    tables.retain(|table| !table.is_cache);
    Ok(tables)
}

/// Takes those out, and returns them, whose labels do not fit them: the sink fills none of them.
fn leave_out_unfit(sql: &mut Connection, tables: &mut Vec<Table>) -> Result<Vec<Misfit>, Error> {
    let mut unfit = Catalog::read_from(sql)?.misfits;
    unfit.retain(|misfit| tables.iter().any(|table| table.oid == misfit.oid));
    tables.retain(|table| unfit.iter().all(|misfit| misfit.oid != table.oid));
    Ok(unfit)
}

/// Whether the role of the sink may read the tables: it may be another one than that of this connection.
fn check_rights(sql: &mut Connection, info: &SlotInfo, tables: &[Table]) -> Result<(), Error> {
    let failed = |error| Error::postgres("cannot ask for the rights of the sink", error);
    let pid = info.active_pid.unwrap_or_default().to_string();
    let statement = "SELECT usename FROM pg_catalog.pg_stat_activity WHERE pid = $1::int";
    let role = sql.query(statement, &[Some(pid.as_bytes())]).map_err(failed)?;
    let found = unreadable(sql, role.text(0, 0)).map_err(failed)?;
    let found = found.of(|oid| tables.iter().any(|table| table.oid == oid));
    match found.told() {
        Some((what, next)) => Err(Error::setup(what).next(next)),
        None => Ok(()),
    }
}

/// Once Redis has passed the request, the tables' cursors are those of the new backfill.
fn await_begin(
    redis: &mut Redis,
    keys: &RedisKeys,
    target: Lsn,
    args: &BackfillArgs,
    watch: &mut Watch,
) -> Result<(), Error> {
    let deadline = Instant::now() + args.timeout.0;
    while progress(redis, keys, &watch.slot)?.lsn < target {
        if Instant::now() >= deadline {
            let what = format!(
                "gave up after {}: the sink has not taken the request up yet; it is not lost",
                args.timeout
            );
            return Err(Error::timeout(what).next(format!("walmirror status --slot {}", watch.slot)));
        }
        watch.pause()?;
    }
    Ok(())
}

fn follow(redis: &mut Redis, keys: &RedisKeys, table: &Table, watch: &mut Watch) -> Result<(), Error> {
    let bar = std::io::stderr().is_terminal().then(|| {
        let bar = ProgressBar::new(table.rows);
        if let Ok(style) = ProgressStyle::with_template("{prefix} {bar:32} {percent:>3}% {msg} {eta}") {
            bar.set_style(style);
        }
        bar.set_prefix(table.name.clone());
        bar
    });
    let mut quiet = Quiet::new();
    loop {
        let stored = read_stored(redis, keys)?;
        if !stored.relations.contains_key(&table.oid) {
            let what = format!("the table {} is no longer mirrored", table.name);
            return Err(Error::setup(what));
        }
        let progress = stored.progress.unwrap_or_default();
        if quiet.lasts(progress.cursor(table.oid)) {
            say(format!(
                "{}: the sink has not got further for {} s; if that lasts, its log tells why",
                table.name,
                QUIET.as_secs()
            ))?;
        }
        // None: everything is about to begin anew, this table too.
        let Some(cursor) = progress.cursor(table.oid).and_then(Cursor::parse) else {
            watch.pause()?;
            continue;
        };
        if let Some(bar) = &bar {
            let length = table.rows.max(cursor.rows);
            bar.set_length(length);
            match cursor.stage {
                Stage::Fill => {
                    bar.set_position(cursor.rows);
                    bar.set_message("reading rows");
                }
                // All rows are read, whatever the estimate was; then the cursor does not count them any more.
                Stage::Sweep | Stage::Done => {
                    bar.set_position(length);
                    bar.set_message("looking for keys without a row");
                }
            }
        }
        if cursor.is_done() {
            break;
        }
        watch.pause()?;
    }
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    say(format!("{}: filled again", table.name))
}

/// Whether a table's cursor stands still.
struct Quiet {
    cursor: Option<String>,
    since: Instant,
    told: bool,
}

impl Quiet {
    fn new() -> Self {
        Self {
            cursor: None,
            since: Instant::now(),
            told: false,
        }
    }

    /// True once, when it has stood still for long.
    fn lasts(&mut self, cursor: Option<&str>) -> bool {
        if self.cursor.as_deref() != cursor {
            *self = Self {
                cursor: cursor.map(str::to_owned),
                ..Self::new()
            };
        }
        let lasts = self.since.elapsed() >= QUIET && !self.told;
        self.told |= lasts;
        lasts
    }
}

fn progress(redis: &mut Redis, keys: &RedisKeys, slot: &SlotName) -> Result<Progress, Error> {
    read_stored(redis, keys)?.progress.ok_or_else(|| {
        Error::setup(format!(
            "Redis has no progress of the slot {slot}: is it the Redis, and the database of it, that the sink writes to?"
        ))
        .next(format!("walmirror status --slot {slot}"))
    })
}
