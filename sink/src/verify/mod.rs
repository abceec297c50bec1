//! `walmirror verify`: compares Postgres with Redis while both are written to, and asks the sink to mend what differs.
//!
//! Rows are read in chunks, each in a snapshot of its own, and the keys of a chunk right behind it. Most pairs are equal. The
//! few that are not (because of a change on its way, or of a true difference) are settled: [`settle`] compares them again until
//! they are equal, or until it is proven that at one position of the stream they were not. Then Redis is walked over for keys
//! that have no row. Nothing is held for longer than a chunk, so memory does not grow with the tables.

mod content;
mod keys;
mod rows;
mod sample;
mod settle;
mod sides;
mod table;
mod tally;

use std::time::Duration;

use walmirror_proto::Lsn;

use crate::backfill::sql::Sql;
use crate::config::{Conninfo, RedisUrl};
use crate::error::Error;
use crate::redis::Connection;
use crate::shutdown::Shutdown;

pub use tally::{Finding, Tally};

use settle::settle;
use sides::{Origin, Sides};
use table::Table;
pub(crate) use table::resolve;

/// As long as Postgres may be silent where it does not work.
const SILENCE: Duration = Duration::from_secs(60);

/// What is to be compared.
#[derive(Clone, Debug)]
pub struct Job {
    /// How to connect to Postgres.
    pub postgres: Conninfo,
    /// How to connect to Redis.
    pub redis: RedisUrl,
    /// Whose mirror.
    pub slot: String,
    /// Names of tables; none: all.
    pub tables: Vec<String>,
    /// Compare about so many rows and keys of each table, chosen at random.
    pub sample: Option<u64>,
    /// Have the sink read again what differs.
    pub repair: bool,
    /// How long to wait for the sink, and for a key that changes all the time.
    pub timeout: Duration,
}

/// What came of it.
#[derive(Debug)]
pub struct Outcome {
    /// Where in the stream the comparison began and ended.
    pub from: Lsn,
    /// Where it ended.
    pub to: Lsn,
    /// Table by table.
    pub tables: Vec<Tally>,
}

/// Compares. An error means that nobody can tell.
pub fn run(job: &Job, shutdown: &Shutdown) -> Result<Outcome, Error> {
    let mut sql = Sql::connect(job.postgres.expose(), shutdown.waker()?, SILENCE)?;
    // Somebody may hold a table for himself for hours.
    sql.set_lock_timeout(job.timeout)?;
    let mut redis = Connection::connect(&job.redis)?;
    let tables = Table::all(&mut sql, &mut redis, &job.slot, &job.tables)?;
    let mut sides = Sides::new(sql, redis, &job.slot, job.timeout, shutdown.clone());
    // A sink that does not move is noticed before anything is compared.
    let from = sides.reach()?;
    let mut chosen = table::choose(tables, &job.tables)?;
    for table in &chosen {
        sides.wait_for_backfill(table)?;
    }
    for table in &mut chosen {
        rows::compare_rows(&mut sides, table, job)?;
    }
    keys::compare_keys(&mut sides, &mut chosen, job)?;
    let to = sides.reach()?;
    let tables = chosen.into_iter().map(|table| table.tally).collect();
    Ok(Outcome { from, to, tables })
}

/// Settles what looked different, counts what is, and has it mended if that is wanted.
fn judge(
    sides: &mut Sides,
    table: &mut Table,
    keys: Vec<Vec<u8>>,
    origin: Origin,
    job: &Job,
) -> Result<(), Error> {
    if keys.is_empty() {
        return Ok(());
    }
    let mut findings = settle(sides, table, keys, origin)?;
    let is_wrong = |(_, finding): &(Vec<u8>, Finding)| finding.is_difference();
    if findings.iter().any(is_wrong) && !sides.is_filled(table)? {
        // It is being made anew since it was looked at, and differs in any case.
        sides.wait_for_backfill(table)?;
        let keys = findings.into_iter().map(|(key, _)| key).collect();
        findings = settle(sides, table, keys, origin)?;
    }
    let wrong: Vec<Vec<u8>> = findings
        .iter()
        .filter(|(_, finding)| finding.is_difference())
        .map(|(key, _)| key.clone())
        .collect();
    for (key, finding) in findings {
        table.tally.count(&key, finding);
    }
    if !job.repair || wrong.is_empty() {
        return Ok(());
    }
    let asked = wrong.len() as u64;
    sides.repair(table, &wrong)?;
    let left = settle(sides, table, wrong, origin)?
        .iter()
        .filter(|(_, finding)| finding.is_difference() || matches!(finding, Finding::Unknown))
        .count() as u64;
    table.tally.repaired += asked - left.min(asked);
    Ok(())
}
