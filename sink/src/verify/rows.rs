//! The way from Postgres to Redis: every row of a mirrored table, stretch by stretch, and the key that it should have.
//!
//! A row that an update moves to a stretch that was read already is not looked at: that update has just written its key.

use super::content::{Content, compare};
use super::sides::{Origin, Sides};
use super::table::Table;
use super::{Finding, Job, judge, sample};
use crate::backfill::fill::{Next, Pace, Read, leaves, look_at_leaf, read_next, total_blocks};
use crate::backfill::report::Report;
use crate::backfill::sql::AnySnapshot;
use crate::error::Error;

/// Keys that are read at once.
const KEYS: usize = 1000;

/// Compares the rows of a table. A cache is compared from its keys.
pub(super) fn compare_rows(sides: &mut Sides, table: &mut Table, job: &Job) -> Result<(), Error> {
    if table.is_cache() {
        return Ok(());
    }
    let leaves = leaves(&mut sides.sql, table.oid)?;
    if let Some(count) = job.sample {
        return sample::rows(sides, table, &leaves, count, job);
    }
    let total = total_blocks(&mut sides.sql, &leaves)?;
    let mut report = Report::start("verify", &table.name, total, 0);
    for leaf in leaves {
        let Some(leaf) = look_at_leaf(&mut sides.sql, leaf)? else {
            return Err(table.changed());
        };
        let (mut at, mut pace) = ((0, 0), Pace::new(64));
        while at.0 < leaf.blocks {
            let read = read_next(&AnySnapshot, &mut sides.sql, &table.mapping, &leaf, at, &mut pace)?;
            let Next::Read(read) = read else {
                return Err(table.changed());
            };
            report.add(
                read.end.0.min(leaf.blocks).saturating_sub(at.0),
                read.rows.len() as u64,
            );
            at = read.end;
            compare_chunk(sides, table, &read, job)?;
        }
    }
    report.finish("verify has read the rows");
    Ok(())
}

/// Compares rows that were just read with their keys.
pub(super) fn compare_chunk(
    sides: &mut Sides,
    table: &mut Table,
    read: &Read,
    job: &Job,
) -> Result<(), Error> {
    if let Some(key) = &read.left_out {
        look_at_unreadable(sides, table, key)?;
    }
    let rows = &read.rows;
    let mut text = Vec::new();
    let mut differ = Vec::new();
    let mut next = 0;
    while next < rows.len() {
        let mut pairs: Vec<(Vec<u8>, Content)> = Vec::with_capacity(KEYS);
        while pairs.len() < KEYS
            && let Some(packed) = rows.get(next)
        {
            next += 1;
            match table.row(packed, &mut text)? {
                Some(pair) => pairs.push(pair),
                None => table.tally.without_key += 1,
            }
        }
        let found = sides.read(table, pairs.iter().map(|(key, _)| key.as_slice()))?;
        table.tally.rows += pairs.len() as u64;
        for ((key, expected), found) in pairs.into_iter().zip(found) {
            if found == Content::Absent && expected != Content::Absent && table.may_be_absent() {
                table.tally.absent += 1;
            } else if compare(expected, found, false) != Finding::Equal {
                differ.push(key);
            }
        }
    }
    judge(sides, table, differ, Origin::Rows, job)
}

/// Nobody can tell what the key of a row that cannot be read should hold. The sink removes it when it finds that.
fn look_at_unreadable(sides: &mut Sides, table: &mut Table, key: &[u8]) -> Result<(), Error> {
    if table.own.match_row(key).is_none() {
        table.tally.without_key += 1;
        return Ok(());
    }
    table.tally.rows += 1;
    if sides.read(table, std::iter::once(key))? != [Content::Absent] {
        table.tally.count(key, Finding::Unknown);
    }
    Ok(())
}
