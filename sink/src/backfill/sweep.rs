//! Removes keys that have no row: left over from an earlier life of Redis, from a table's old key template, or written by
//! somebody else under a name that belongs to the table.

use std::sync::Arc;

use walmirror_proto::key::KeyTemplate;

use super::lookup::{Lookup, ParsedKey, is_text};
use super::sql::Sql;
use super::worker::{Context, Flow};
use super::{Content, Cursor, Task, Window};
use crate::error::Error;
use crate::plan::Purge;
use crate::redis::{Connection, Scan};

/// Keys that are looked up at once.
const KEYS: usize = 500;
/// Chunks on their way to the planner.
const AHEAD: usize = 2;

/// Looks at every key of the table's templates, old ones included.
pub(super) fn sweep(
    context: &Context,
    sql: &mut Sql,
    redis: &mut Connection,
    window: &Arc<Window>,
    relation: u32,
    task: &Task,
) -> Result<Flow, Error> {
    let Some(lookup) = Lookup::new(sql, &task.mapping)? else {
        return Ok(Flow::Restart);
    };
    let others = context.backfill.other_templates(relation);
    let own = Purge::new(relation, &task.mapping.template, &others);
    let old = task
        .cursor
        .old_keys
        .iter()
        .filter_map(|template| KeyTemplate::parse(template).ok());
    let retired: Vec<Purge> = old
        .map(|template| Purge::retired(relation, &template, &others))
        .collect();
    let mut removed = 0;
    for purge in std::iter::once(&own).chain(&retired) {
        let mut scan = Scan::new(purge.pattern());
        let mut held: Vec<ParsedKey> = Vec::new();
        let mut absent: Vec<Vec<u8>> = Vec::new();
        loop {
            let page = scan.page(redis)?;
            let ended = page.is_none();
            for key in page
                .into_iter()
                .flatten()
                .filter(|key| purge.match_key(key).is_some())
            {
                // Which values the row must have is what the template of today says, also for a key of an old one.
                match own.match_key(&key).filter(|values| is_text(values)) {
                    Some(values) => held.push((key, values)),
                    None => absent.push(key),
                }
            }
            if held.len() >= KEYS || absent.len() >= KEYS || ended {
                if !window.wait(AHEAD - 1, || context.stopped())
                    || !context.is_current(relation, task.generation)
                {
                    return Ok(Flow::Restart);
                }
                if context.stopped() {
                    return Ok(Flow::Stopped);
                }
                removed += remove_absent(
                    context,
                    sql,
                    window,
                    relation,
                    task,
                    &lookup,
                    std::mem::take(&mut held),
                    std::mem::take(&mut absent),
                )?;
            }
            if ended {
                break;
            }
        }
    }
    let snapshot = sql.begin()?;
    sql.end()?;
    context.submit(
        sql,
        window,
        relation,
        task,
        snapshot,
        Content::Absent(Vec::new()),
        Some(Cursor::done(task.cursor.fingerprint)),
    )?;
    if !window.wait(0, || context.stopped()) {
        return Ok(Flow::Restart);
    }
    tracing::info!(
        table = task.mapping.table,
        keys_without_row = removed,
        "the keys of the table are complete"
    );
    Ok(Flow::Go)
}

/// Hands the keys that have no row to the planner; returns how many they are.
#[allow(clippy::too_many_arguments)]
fn remove_absent(
    context: &Context,
    sql: &mut Sql,
    window: &Arc<Window>,
    relation: u32,
    task: &Task,
    lookup: &Lookup,
    held: Vec<ParsedKey>,
    absent: Vec<Vec<u8>>,
) -> Result<usize, Error> {
    let mut count = absent.len();
    if !absent.is_empty() {
        // No row of today can render to these keys, whatever the snapshot.
        if let Some(snapshot) = context.usable_snapshot(sql, &task.mapping.table)? {
            sql.end()?;
            context.submit(
                sql,
                window,
                relation,
                task,
                snapshot,
                Content::Absent(absent),
                None,
            )?;
        }
    }
    if held.is_empty() {
        return Ok(count);
    }
    for found in lookup.present(context, sql, &task.mapping, held)? {
        let absent: Vec<Vec<u8>> = found
            .keys
            .into_iter()
            .filter(|(_, row)| row.is_none())
            .map(|(key, _)| key)
            .collect();
        if !absent.is_empty() {
            count += absent.len();
            context.submit(
                sql,
                window,
                relation,
                task,
                found.snapshot,
                Content::Absent(absent),
                None,
            )?;
        }
    }
    Ok(count)
}
