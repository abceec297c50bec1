//! The way from Redis to Postgres: every key that a template could have made must have its row. For a cache, which holds
//! whatever somebody read, its value is compared as well.

use std::time::{Duration, Instant};

use redis::Value;

use super::content::{Content, compare};
use super::sides::{Origin, Sides};
use super::table::Table;
use super::{Finding, Job, judge, sample};
use crate::backfill::held::{Held, Most};
use crate::backfill::report::Report;
use crate::backfill::sql::AnySnapshot;
use crate::error::Error;
use crate::plan::is_text;
use crate::redis::{Prefixes, Scan};

/// The longest pause after a page of keys.
const PAUSE_MAX: Duration = Duration::from_millis(10);
/// Random keys that are asked for are this many times those that are wanted, because most may be somebody else's.
const SAMPLE_EFFORT: u64 = 10;
/// But no more than this many times those that there are: then nearly each has been met.
const SAMPLE_ROUNDS: u64 = 4;

/// Where the keys come from.
enum Source {
    Scan(Scan),
    /// So many keys are still to be chosen.
    Random(u64),
}

/// How many random keys are asked for, of so many, to find as many of each table; None: all of them are looked at.
fn effort(wanted: u64, total: u64) -> Option<u64> {
    let effort = wanted.saturating_mul(SAMPLE_EFFORT);
    (wanted < total).then(|| effort.min(total.saturating_mul(SAMPLE_ROUNDS)))
}

impl Source {
    fn page(&mut self, sides: &mut Sides) -> Result<Option<Vec<Vec<u8>>>, Error> {
        match self {
            Self::Scan(scan) => scan.page(&mut sides.redis),
            Self::Random(0) => Ok(None),
            Self::Random(left) => {
                let keys = sample::keys(sides, *left)?;
                *left = if keys.is_empty() {
                    0
                } else {
                    left.saturating_sub(keys.len() as u64)
                };
                Ok(Some(keys))
            }
        }
    }
}

/// Compares the keys of all tables, in one walk.
pub(super) fn compare_keys(sides: &mut Sides, tables: &mut [Table], job: &Job) -> Result<(), Error> {
    let index = Prefixes::new(tables.iter().map(|table| &table.own).enumerate());
    let total = match sides.redis.call("count the keys", &[b"DBSIZE"])? {
        Value::Int(count) => u64::try_from(count).unwrap_or(0),
        _ => 0,
    };
    let mut source = match job.sample.and_then(|count| effort(count, total)) {
        Some(effort) => Source::Random(effort),
        None => Source::Scan(index.scan()),
    };
    let mut report = Report::start("verify", "(the keys in Redis)", total, 0);
    let mut held: Vec<Held> = tables.iter().map(|_| Held::default()).collect();
    loop {
        let is_full = |count: u64| tables.iter().all(|table| table.tally.keys >= count);
        if job.sample.is_some_and(is_full) {
            break;
        }
        let started = Instant::now();
        let Some(page) = source.page(sides)? else { break };
        // Redis does nothing else during a page, so half of the time is left to others.
        sides.sleep(started.elapsed().min(PAUSE_MAX))?;
        let mut matched = 0;
        for key in page {
            for place in index.places(&key) {
                let (Some(table), Some(held)) = (tables.get_mut(place), held.get_mut(place)) else {
                    continue;
                };
                let Some(values) = table.own.match_key(&key) else {
                    continue;
                };
                if job.sample.is_some_and(|count| table.tally.keys >= count) {
                    continue;
                }
                table.tally.keys += 1;
                matched += 1;
                if is_text(&values, sides.sql.any_bytes) {
                    held.push(&key, values);
                } else {
                    held.push_rowless(&key);
                }
            }
        }
        report.add(matched, u64::from(matched));
        let most = Most::of(held.iter());
        for (table, held) in tables.iter_mut().zip(&mut held) {
            if held.is_full(most) {
                compare_held(sides, table, held, job)?;
            }
        }
    }
    for (table, held) in tables.iter_mut().zip(&mut held) {
        compare_held(sides, table, held, job)?;
    }
    report.finish("verify has read the keys");
    Ok(())
}

fn compare_held(sides: &mut Sides, table: &mut Table, held: &mut Held, job: &Job) -> Result<(), Error> {
    let held = held.take();
    let (keys, mut differ) = (held.keys, held.rowless);
    if table.is_cache() && !keys.is_empty() {
        let rows = sides.rows(table, keys, Origin::Redis)?;
        let found = sides.read(table, rows.iter().map(|(key, _)| key.as_slice()))?;
        for ((key, expected), found) in rows.into_iter().zip(found) {
            table.tally.rows += u64::from(expected != Content::Absent);
            if compare(expected, found, true) != Finding::Equal {
                differ.push(key);
            }
        }
    } else if !keys.is_empty() {
        let found = table
            .lookup
            .present(&AnySnapshot, &mut sides.sql, &table.mapping, keys)?;
        let keys = found.into_iter().flat_map(|found| found.keys);
        differ.extend(keys.filter(|(_, row)| row.is_none()).map(|(key, _)| key));
    }
    judge(sides, table, differ, Origin::Redis, job)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_asks_for_no_more_than_there_is() {
        assert_eq!(effort(100, 1_000_000), Some(1000));
        assert_eq!(effort(900, 1000), Some(4000));
        assert_eq!(effort(1000, 1000), None);
        assert_eq!(effort(u64::MAX, 0), None);
    }
}
