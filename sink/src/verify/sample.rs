//! `--sample`: rows of random blocks, and random keys.

use redis::Value;

use super::Job;
use super::rows::compare_chunk;
use super::sides::Sides;
use super::table::Table;
use crate::backfill::fill::{Next, Pace, look_at_leaf, read_next};
use crate::backfill::sql::AnySnapshot;
use crate::error::Error;
use crate::redis::reply_error;
use crate::resp::Commands;

/// Random keys that are asked for at once.
const KEYS: usize = 1000;

/// Compares all rows of random blocks, until there are so many of them.
pub(super) fn rows(
    sides: &mut Sides,
    table: &mut Table,
    leaves: &[u32],
    count: u64,
    job: &Job,
) -> Result<(), Error> {
    let mut sizes = Vec::new();
    for leaf in leaves {
        sizes.extend(look_at_leaf(&mut sides.sql, *leaf)?);
    }
    let total: u64 = sizes.iter().map(|leaf| u64::from(leaf.blocks)).sum();
    if total == 0 {
        return Ok(());
    }
    // Blocks may be empty: as many of them as the table has are enough.
    for number in 0..total {
        if table.tally.rows >= count {
            break;
        }
        let mut at = random(number) % total;
        let leaf = sizes.iter().find(|leaf| {
            let blocks = u64::from(leaf.blocks);
            let here = at < blocks;
            if !here {
                at -= blocks;
            }
            here
        });
        let (Some(leaf), Ok(block)) = (leaf, u32::try_from(at)) else {
            continue;
        };
        let (mut at, mut pace) = ((block, 0), Pace::new(1));
        // One of its rows may be large, or cannot be read: then they come one by one.
        while at.0 == block {
            let read = read_next(&AnySnapshot, &mut sides.sql, &table.mapping, leaf, at, &mut pace)?;
            let Next::Read(read) = read else {
                return Err(table.changed());
            };
            at = read.end;
            compare_chunk(sides, table, &read, job)?;
        }
    }
    Ok(())
}

/// About so many keys of Redis, chosen at random, some perhaps twice.
pub(super) fn keys(sides: &mut Sides, count: u64) -> Result<Vec<Vec<u8>>, Error> {
    let mut commands = Commands::new();
    for _ in 0..count.min(KEYS as u64) {
        commands.command(&[b"RANDOMKEY"]);
    }
    sides.redis.send(commands.as_bytes())?;
    let mut keys = Vec::with_capacity(commands.count());
    for _ in 0..commands.count() {
        match sides.redis.receive()? {
            Value::BulkString(key) => keys.push(key),
            Value::ServerError(error) => return Err(reply_error("Redis refuses RANDOMKEY", &error)),
            _ => {}
        }
    }
    Ok(keys)
}

/// A number that nobody foresees: the hasher of the standard library is seeded by the system.
fn random(number: u64) -> u64 {
    use std::hash::BuildHasher;
    std::hash::RandomState::new().hash_one(number)
}
