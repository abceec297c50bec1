//! Reads a table: chunk by chunk in the order of its blocks, each chunk in its own snapshot, so that no snapshot is held
//! for long. A row that moves to a block that was read already is in the stream, because moving is a change.

use super::lookup::Lookup;
use super::report::Report;
use super::sql::{Snapshots, Sql};
use super::worker::Context;
use super::{Content, Cursor, PackedRows, Room, Task, Window};
use crate::error::Error;
use crate::plan::Mapping;
use crate::pq::{PqError, binary_fields};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A chunk is read up to about so many bytes of rows.
const CHUNK_BYTES: usize = 1024 * 1024;
/// And over at most so many blocks, so that an empty stretch does not hold a snapshot for long either.
const BLOCKS_MAX: u32 = 4096;
/// What the rows of one take, about.
const BLOCK_BYTES: usize = 8192;
/// The first chunk of a table is over so many.
const PACE_START: u32 = 64;

/// How far a table is read. What was read need not be planned yet: the cursor of its task says how far that is.
pub(super) struct Filling {
    pub(super) generation: u64,
    pub(super) window: Arc<Window>,
    cursor: Cursor,
    /// The one that is being read.
    leaf: Option<Leaf>,
    pace: Pace,
    report: Report,
    /// All of it is.
    pub(super) is_read: bool,
}

/// How it goes on with a table.
pub(super) enum Flow {
    /// All of it is read, and on its way.
    Read,
    /// When other tables had their turn.
    Later,
    /// From the cursor of its task: a chunk was dropped, or the table is another one now, as Postgres may have said.
    Restart(Option<Error>),
    /// Not at all: the session ends.
    Stopped,
}

impl Filling {
    /// From the cursor of its task.
    pub(super) fn start(sql: &mut Sql, relation: u32, task: &Task, room: &Arc<Room>) -> Result<Self, Error> {
        let leaves = leaves(sql, relation)?;
        let (table, cursor) = (&task.mapping.table, task.cursor.clone());
        let report = Report::start("backfill", table, total_blocks(sql, &leaves)?, cursor.rows);
        Ok(Self {
            generation: task.generation,
            window: Window::in_room(room),
            cursor,
            leaf: None,
            pace: Pace::new(PACE_START),
            report,
            is_read: false,
        })
    }

    /// Reads on until then, and hands the chunks to the planner.
    pub(super) fn read_on(
        &mut self,
        context: &Context,
        sql: &mut Sql,
        room: &Room,
        relation: u32,
        task: &Task,
        until: Instant,
    ) -> Result<Flow, Error> {
        let leaves = leaves(sql, relation)?;
        let first = self.cursor.leaf;
        for oid in leaves.into_iter().filter(|oid| *oid >= first) {
            if !self.begin_leaf(sql, oid)? {
                continue;
            }
            while let Some(leaf) = self.leaf.as_ref().filter(|leaf| self.cursor.block < leaf.blocks) {
                if context.stopped() {
                    return Ok(Flow::Stopped);
                }
                if self.window.is_stale() || !context.is_current(relation, task.generation) {
                    return Ok(Flow::Restart(None));
                }
                if Instant::now() >= until || !room.wait(until, || context.stopped()) {
                    return Ok(Flow::Later);
                }
                self.pace.aim_at(room.chunk_bytes());
                let (at, blocks) = ((self.cursor.block, self.cursor.offset), leaf.blocks);
                let mut read = match read_next(context, sql, &task.mapping, leaf, at, &mut self.pace)? {
                    Next::Read(read) => read,
                    Next::Changed(why) => return Ok(Flow::Restart(why)),
                };
                let (start, rows) = (self.cursor.block, read.rows.len() as u64);
                self.report
                    .add(read.end.0.min(blocks).saturating_sub(start), rows);
                if let Some(key) = read.left_out.take() {
                    // What Redis holds of it is what it was before.
                    let (key, snapshot) = (Content::LeftOut(vec![key]), read.snapshot.clone());
                    context.submit(sql, &self.window, relation, task, snapshot, key, None)?;
                }
                (self.cursor.block, self.cursor.offset) = read.end;
                self.cursor.rows += rows;
                read.rows.shrink();
                let (rows, cursor) = (Content::Rows(read.rows), Some(self.cursor.clone()));
                context.submit(sql, &self.window, relation, task, read.snapshot, rows, cursor)?;
            }
        }
        let snapshot = sql.begin()?;
        sql.end()?;
        let (nothing, end) = (Content::Rows(PackedRows::default()), self.cursor.clone().filled());
        context.submit(sql, &self.window, relation, task, snapshot, nothing, Some(end))?;
        self.is_read = true;
        Ok(Flow::Read)
    }

    /// Goes on with a leaf, or begins it. False: it is gone.
    fn begin_leaf(&mut self, sql: &mut Sql, oid: u32) -> Result<bool, Error> {
        if self.leaf.as_ref().is_some_and(|leaf| leaf.oid == oid) {
            return Ok(true);
        }
        if oid != self.cursor.leaf {
            let cursor = &mut self.cursor;
            (cursor.leaf, cursor.block, cursor.offset, cursor.file) = (oid, 0, 0, 0);
        }
        self.leaf = look_at_leaf(sql, oid)?;
        let Some(leaf) = &self.leaf else {
            return Ok(false);
        };
        if ![0, leaf.file].contains(&self.cursor.file) {
            tracing::info!(
                table = leaf.name,
                "its rows were moved to another file: it is read from its beginning"
            );
            (self.cursor.block, self.cursor.offset) = (0, 0);
        }
        self.cursor.file = leaf.file;
        self.pace = Pace::new(PACE_START);
        Ok(true)
    }

    /// What was read is planned.
    pub(super) fn finish(self, table: &str, is_done: bool) {
        self.report.finish("backfill has read the table");
        if is_done {
            tracing::info!(
                table,
                "the keys of the table are complete; Redis held none before"
            );
        }
    }
}

/// What was read of a table.
pub(crate) struct Read {
    pub(crate) rows: PackedRows,
    /// The key of a row that could not be read.
    pub(crate) left_out: Option<Vec<u8>>,
    pub(crate) snapshot: crate::gate::Snapshot,
    /// Block and offset to go on from.
    pub(crate) end: (u32, u16),
}

/// What comes of reading on.
pub(crate) enum Next {
    Read(Read),
    /// The table is not what it was when its definition was announced (as Postgres says, if it is from an error), or the session ends.
    Changed(Option<Error>),
}

/// How much is read at once.
pub(crate) struct Pace {
    blocks: u32,
    /// About so many bytes of rows.
    bytes: usize,
    /// Row by row, until the block is over: one of its rows cannot be read.
    is_by_row: bool,
}

impl Pace {
    /// So many blocks at first.
    pub(crate) fn new(blocks: u32) -> Self {
        Self {
            blocks,
            bytes: CHUNK_BYTES,
            is_by_row: false,
        }
    }

    /// Chunks are to be no larger, if that is less than they are at most.
    fn aim_at(&mut self, bytes: usize) {
        self.bytes = bytes.min(CHUNK_BYTES);
        if bytes < CHUNK_BYTES {
            let blocks = u32::try_from(bytes / BLOCK_BYTES).unwrap_or(u32::MAX);
            self.blocks = self.blocks.min(blocks.max(1));
        }
    }

    fn end(&self, (block, offset): (u32, u16)) -> (u32, u16) {
        if self.is_by_row && offset < ROWS_PER_BLOCK {
            (block, offset + 1)
        } else if self.is_by_row {
            (block.saturating_add(1), 0)
        } else {
            (block.saturating_add(self.blocks), 0)
        }
    }

    /// Less is read at once.
    fn narrow(&mut self) {
        self.is_by_row = self.blocks == 1;
        self.blocks = 1;
    }

    fn adapt(&mut self, start: (u32, u16), read: &Read) {
        self.is_by_row &= read.end.0 == start.0;
        self.blocks = if self.is_by_row || read.rows.byte_len() >= self.bytes / 2 {
            (self.blocks / 2).max(1)
        } else {
            (self.blocks * 2).min(BLOCKS_MAX)
        };
    }
}

/// More rows than a block has (MaxHeapTuplesPerPage, for blocks of 32 kB).
const ROWS_PER_BLOCK: u16 = 1200;

/// The rows from a place on. A row that Postgres cannot put together is left out, and said so; it is found by reading less and less.
pub(crate) fn read_next(
    snapshots: &dyn Snapshots,
    sql: &mut Sql,
    mapping: &Mapping,
    leaf: &Leaf,
    start: (u32, u16),
    pace: &mut Pace,
) -> Result<Next, Error> {
    loop {
        let stretch = (start, pace.end(start), pace.is_by_row);
        match read_chunk(snapshots, sql, mapping, leaf, stretch)? {
            Chunk::Read(read) => {
                pace.adapt(start, &read);
                return Ok(Next::Read(read));
            }
            Chunk::Changed(why) => return Ok(Next::Changed(why)),
            Chunk::Unreadable => pace.narrow(),
        }
    }
}

/// The key of one row, which may be too large to be read whole. None: a column of its key is NULL.
fn key_at(sql: &mut Sql, mapping: &Mapping, leaf: &Leaf, at: (u32, u16)) -> Result<Option<Vec<u8>>, Error> {
    let Some(lookup) = Lookup::new(sql, mapping)? else {
        return Ok(None);
    };
    let (columns, name, (block, offset)) = (lookup.columns(), &leaf.name, at);
    let statement = format!("SELECT {columns} FROM ONLY {name} t WHERE t.ctid = '({block},{offset})'::tid");
    let result = sql.query("cannot read the key of a row", &statement, &[])?;
    let Some(row) = result.rows().next() else {
        return Ok(None);
    };
    let mut key = Vec::new();
    let value = |column: usize, out: &mut Vec<u8>| out.extend_from_slice(row.get(column).unwrap_or_default());
    let is_whole = (0..mapping.template.placeholders().len()).all(|column| row.get(column).is_some());
    let is_rendered = mapping.template.render(value, &mut key).is_ok();
    Ok((is_whole && is_rendered).then_some(key))
}

/// What came of reading a stretch of a table.
enum Chunk {
    Read(Read),
    /// As [`Next::Changed`].
    Changed(Option<Error>),
    /// Postgres cannot put one of its rows together: which one is found by reading less.
    Unreadable,
}

/// One chunk: the rows from one place up to another, or fewer; or one row, and the key of one that cannot be read.
fn read_chunk(
    snapshots: &dyn Snapshots,
    sql: &mut Sql,
    mapping: &Mapping,
    leaf: &Leaf,
    (start, end, is_by_row): ((u32, u16), (u32, u16), bool),
) -> Result<Chunk, Error> {
    let (table, name) = (&mapping.table, &leaf.name);
    let Some(snapshot) = snapshots.begin(sql, table, None)? else {
        return Ok(Chunk::Changed(None));
    };
    if is_by_row {
        sql.query("cannot set a savepoint", "SAVEPOINT row", &[])?;
    }
    let (copied, left_out) = match copy_rows(sql, name, start, end) {
        Ok(copied) => (copied, None),
        Err(error) => match why_unreadable(&error) {
            Some(why) if is_by_row => {
                let (block, offset) = start;
                tracing::error!(
                    table,
                    next = format!("SELECT pg_column_size(…) FROM {name} WHERE ctid = '({block},{offset})'"),
                    "a row is not mirrored: {why}"
                );
                // In the snapshot that has seen it: in a later one there may be another row in its place.
                sql.query("cannot go on behind a row", "ROLLBACK TO row", &[])?;
                let key = key_at(sql, mapping, leaf, start)?;
                (Some((PackedRows::default(), end)), key)
            }
            Some(_) => return sql.end().map(|()| Chunk::Unreadable),
            // The stream will say so.
            None if has_changed(&error) => {
                tracing::debug!(table, "the table changed while it was read: {error}");
                std::thread::sleep(Duration::from_millis(100));
                let error = cannot_read(sql, table, leaf, error);
                return sql.end().map(|()| Chunk::Changed(Some(error)));
            }
            None => return Err(cannot_read(sql, table, leaf, error)),
        },
    };
    sql.end()?;
    // A file is never that of the table again once it is another one, so this is the one that was read. Where schemas are swapped, the
    // name may be another table's.
    let is_same = |now: Leaf| now.file == leaf.file && now.name == leaf.name;
    let is_same = look_at_leaf(sql, leaf.oid)?.is_some_and(is_same);
    Ok(match copied {
        Some((rows, end)) if is_same => Chunk::Read(Read {
            rows,
            left_out,
            snapshot,
            end,
        }),
        _ => Chunk::Changed(None),
    })
}

fn cannot_read(sql: &Sql, table: &str, leaf: &Leaf, error: PqError) -> Error {
    sql.explain_table(format!("cannot read the table {table}"), &leaf.name, error)
}

/// Packed rows, and block and offset to go on from.
type Copied = (PackedRows, (u32, u16));

/// Reads the rows. None: the table is no longer labelled.
fn copy_rows(
    sql: &mut Sql,
    name: &str,
    start: (u32, u16),
    until: (u32, u16),
) -> Result<Option<Copied>, PqError> {
    let statement = format!(
        "COPY (SELECT t.ctid, walmirror.pack(t.*) FROM ONLY {name} t WHERE t.ctid >= '({},{})'::tid AND t.ctid < '({},{})'::tid) \
         TO STDOUT (FORMAT binary)",
        start.0, start.1, until.0, until.1
    );
    let mut rows = PackedRows::default();
    let mut order = Order::default();
    // Dropping it early cancels the query.
    for message in sql.connection.copy_out(&statement)? {
        let message = message?;
        let Some(mut fields) = binary_fields(&message) else {
            continue;
        };
        let ctid = fields.next().transpose()?.flatten().and_then(ctid);
        let packed = fields.next().transpose()?.flatten();
        // walmirror.pack gives NULL for a table that is no longer labelled.
        let (Some((block, offset)), Some(packed)) = (ctid, packed) else {
            return Ok(None);
        };
        rows.push(packed);
        order.note((block, offset));
        if rows.byte_len() >= CHUNK_BYTES
            && let Some(end) = order.end()
        {
            return Ok(Some((rows, end)));
        }
    }
    Ok(Some((rows, until)))
}

/// Whether rows come in the order of their ctids. Where they do not, a chunk cannot end before its stretch does.
#[derive(Default)]
struct Order {
    last: (u32, u16),
    is_broken: bool,
}

impl Order {
    /// A row came.
    fn note(&mut self, ctid: (u32, u16)) {
        self.is_broken |= ctid < self.last;
        self.last = ctid;
    }

    /// The place behind all that came. None: rows before it may be still to come.
    fn end(&self) -> Option<(u32, u16)> {
        let (block, offset) = self.last;
        let end = offset.checked_add(1).map(|offset| (block, offset));
        (!self.is_broken).then(|| end.unwrap_or((block.saturating_add(1), 0)))
    }
}

/// Whether the table was dropped, renamed or rewritten while it was read.
fn has_changed(error: &PqError) -> bool {
    ["42P01", "3F000", "42703", "XX000", "55000"]
        .iter()
        .any(|state| error.is(state))
}

/// Why Postgres cannot put a row together, if that is what the error says.
fn why_unreadable(error: &PqError) -> Option<&'static str> {
    if is_too_large(error) {
        return Some("it has more than 1 GB, which PostgreSQL does not put together");
    }
    // A whole page that is damaged is the table's trouble: which rows it had cannot be told.
    (is_damaged(error) && !error.message.contains("page")).then_some("what is stored of it is damaged")
}

/// Whether a row could not be put together: the executor makes one tuple of it, with the values that are stored apart, for a function
/// that takes a row.
pub(super) fn is_too_large(error: &PqError) -> bool {
    error.is("54000") || (error.is("XX000") && error.message.contains("invalid memory alloc request size"))
}

/// Whether what is stored cannot be read: a value or a page is damaged.
pub(super) fn is_damaged(error: &PqError) -> bool {
    error.is("XX001")
}

/// Block and offset of a tid in binary.
fn ctid(bytes: &[u8]) -> Option<(u32, u16)> {
    let (block, offset) = bytes.split_first_chunk::<4>()?;
    Some((
        u32::from_be_bytes(*block),
        u16::from_be_bytes(*offset.first_chunk::<2>()?),
    ))
}

/// The tables that hold the rows, in a stable order.
pub(crate) fn leaves(sql: &mut Sql, relation: u32) -> Result<Vec<u32>, Error> {
    let oid = relation.to_string();
    let what = "cannot list the partitions of a table";
    let result = sql.query(
        what,
        "SELECT l FROM walmirror.leaves($1::oid) l ORDER BY l",
        &[Some(oid.as_bytes())],
    )?;
    Ok(result.rows().filter_map(|row| row.parse(0)).collect())
}

/// A table that holds rows.
pub(crate) struct Leaf {
    oid: u32,
    /// Quoted.
    pub(crate) name: String,
    pub(crate) blocks: u32,
    /// Its relfilenode.
    file: u32,
}

/// None when the table is gone.
pub(crate) fn look_at_leaf(sql: &mut Sql, oid: u32) -> Result<Option<Leaf>, Error> {
    let statement = "SELECT format('%I.%I', n.nspname, c.relname), pg_relation_size(c.oid) / current_setting('block_size')::int, \
                     pg_relation_filenode(c.oid) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = $1::oid";
    let result = sql.query(
        "cannot look at a table",
        statement,
        &[Some(oid.to_string().as_bytes())],
    )?;
    Ok(result.rows().next().and_then(|row| {
        Some(Leaf {
            oid,
            name: row.text(0)?.to_owned(),
            blocks: row.parse(1)?,
            file: row.parse(2)?,
        })
    }))
}

pub(crate) fn total_blocks(sql: &mut Sql, leaves: &[u32]) -> Result<u64, Error> {
    let mut total = 0;
    for leaf in leaves {
        total += look_at_leaf(sql, *leaf)?.map_or(0, |leaf| u64::from(leaf.blocks));
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_ends_early_only_where_rows_come_in_order() {
        let mut order = Order::default();
        order.note((7, 1));
        order.note((7, 2));
        assert_eq!(order.end(), Some((7, 3)));
        order.note((8, u16::MAX));
        assert_eq!(order.end(), Some((9, 0)));
        order.note((3, 1));
        order.note((9, 1));
        assert_eq!(order.end(), None);
    }
}
