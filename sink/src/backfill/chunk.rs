//! What a backfill hands to the planner: rows or keys that were read in one snapshot. The planner holds a chunk until its
//! marker comes down the stream, and then passes it through the gate.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use xxhash_rust::xxh3::xxh3_64;

use super::{Catalog, Cursor};
use crate::gate::Snapshot;

/// Rows in the form of `walmirror.pack`, one behind the other in one buffer.
#[derive(Clone, Default)]
pub struct PackedRows {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl std::fmt::Debug for PackedRows {
    // INVARIANT I8: the bytes are rows.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedRows({} rows, {} bytes)", self.len(), self.bytes.len())
    }
}

impl PackedRows {
    /// Appends a row.
    pub fn push(&mut self, packed: &[u8]) {
        self.bytes.extend_from_slice(packed);
        self.ends.push(self.bytes.len());
    }

    /// How many rows.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Their length.
    pub fn byte_len(&self) -> usize {
        self.bytes.len()
    }

    /// No more memory than they need: they may be held for long.
    pub fn shrink(&mut self) {
        self.bytes.shrink_to_fit();
        self.ends.shrink_to_fit();
    }

    /// A row.
    pub fn get(&self, index: usize) -> Option<&[u8]> {
        let start = index
            .checked_sub(1)
            .map_or(Some(0), |before| self.ends.get(before).copied())?;
        let range: Range<usize> = start..*self.ends.get(index)?;
        self.bytes.get(range)
    }
}

/// A table (pg_class.oid) and its generation.
pub type Life = (u32, u64);

/// What was read.
#[derive(Debug)]
pub enum Content {
    /// All rows of a stretch of the table.
    Rows(PackedRows),
    /// Keys that were noted as pending, and their rows, where there is one.
    Keys(Vec<(Vec<u8>, Option<Vec<u8>>)>),
    /// Keys that have no row.
    Absent(Vec<Vec<u8>>),
    /// Keys of rows that cannot be read.
    LeftOut(Vec<Vec<u8>>),
    /// Keys that were noted as pending for a table that is not mirrored.
    Orphans(Vec<Vec<u8>>),
    /// All labelled tables, as the catalog has them.
    Catalog(Catalog),
    /// The table could not be read as what the stream has told of it.
    Changed,
    /// A transaction id that was taken after these tables had been announced.
    Horizon(u64, Vec<Life>),
}

impl Content {
    /// How many items it has.
    pub fn len(&self) -> usize {
        match self {
            Self::Rows(rows) => rows.len(),
            Self::Keys(keys) => keys.len(),
            Self::Absent(keys) | Self::LeftOut(keys) | Self::Orphans(keys) => keys.len(),
            Self::Catalog(catalog) => catalog.relations.len(),
            Self::Changed => 0,
            Self::Horizon(_, tables) => tables.len(),
        }
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How much memory it takes, about.
    pub fn byte_len(&self) -> usize {
        let keys = |keys: &[Vec<u8>]| keys.iter().map(|key| size_of::<Vec<u8>>() + key.len()).sum();
        match self {
            Self::Rows(rows) => rows.bytes.len() + rows.ends.len() * size_of::<usize>(),
            Self::Keys(pairs) => {
                let row = |row: &Option<Vec<u8>>| row.as_ref().map_or(0, Vec::len);
                let pair = size_of::<(Vec<u8>, Option<Vec<u8>>)>();
                pairs
                    .iter()
                    .map(|(key, value)| pair + key.len() + row(value))
                    .sum()
            }
            Self::Absent(all) | Self::LeftOut(all) | Self::Orphans(all) => keys(all),
            Self::Catalog(_) | Self::Horizon(..) | Self::Changed => 0,
        }
    }
}

/// Rows or keys, and the snapshot that they were read in.
#[derive(Debug)]
pub struct Chunk {
    /// The number in its marker.
    pub id: u64,
    /// pg_class.oid of the labelled table.
    pub relation: u32,
    /// The life of the table's backfill that it belongs to; a chunk of an earlier one is dropped.
    pub generation: u64,
    /// When it was read.
    pub snapshot: Snapshot,
    /// What was read.
    pub content: Content,
    /// Where the backfill is once it is written.
    pub cursor: Option<Cursor>,
    /// Where to tell what became of it.
    pub window: Arc<Window>,
    /// What it takes of the worker's room.
    pub permit: Option<Permit>,
}

/// How much a worker may have on its way, in bytes (INVARIANT I7). Where the stream is behind, chunks wait for their markers for as long as
/// it is: what fits in here is what a backfill moves in that time.
///
/// Where Redis is the bottleneck, chunks whose markers come all at once wait for each other, and the gate lets go of what the last of them
/// do not see: those are read for nothing. So there is less room after a chunk was dropped, and a little more after each that was planned: then
/// they are read about as fast as they are planned.
#[derive(Debug)]
pub struct Room {
    most: usize,
    state: Mutex<RoomState>,
    changed: Condvar,
}

#[derive(Debug)]
struct RoomState {
    taken: usize,
    /// From [`ROOM_MIN`] to `most`.
    limit: usize,
}

/// A part of a room, until it is dropped.
#[derive(Debug)]
pub struct Permit {
    room: Arc<Room>,
    bytes: usize,
}

/// What a chunk takes besides its content, about.
const CHUNK_OVERHEAD: usize = 1024;
/// A room is never narrower, in bytes.
const ROOM_MIN: usize = 64 * 1024;
/// How much wider it is after a chunk that was planned.
const ROOM_STEP: usize = 16 * 1024;

impl Room {
    /// For so many bytes.
    pub fn of(most: usize) -> Arc<Self> {
        let state = RoomState {
            taken: 0,
            limit: most,
        };
        Arc::new(Self {
            most,
            state: Mutex::new(state),
            changed: Condvar::new(),
        })
    }

    /// Waits until there is some. False: the time is up before that.
    pub fn wait(&self, until: Instant, stopped: impl Fn() -> bool) -> bool {
        let mut state = self.lock();
        while state.taken >= state.limit && !stopped() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self
                .changed
                .wait_timeout(state, left.min(Duration::from_millis(100)));
            state = waited.map_or_else(|error| error.into_inner().0, |(state, _)| state);
        }
        true
    }

    /// How large a chunk may be, so that several fit.
    pub fn chunk_bytes(&self) -> usize {
        self.lock().limit / 4
    }

    fn narrow(&self) {
        let mut state = self.lock();
        state.limit = (state.limit / 4).max(ROOM_MIN.min(self.most));
    }

    fn widen(&self) {
        let mut state = self.lock();
        state.limit = (state.limit + ROOM_STEP).min(self.most);
    }

    /// Takes a part, which may be more than there is: the next one waits.
    fn take(self: &Arc<Self>, bytes: usize) -> Permit {
        self.lock().taken += bytes;
        Permit {
            room: Arc::clone(self),
            bytes,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, RoomState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut state = self.room.lock();
        state.taken = state.taken.saturating_sub(self.bytes);
        self.room.changed.notify_all();
    }
}

/// So many keys are remembered that the gate has refused.
pub(super) const REFUSED_MAX: usize = 1 << 18;

/// The chunks of one table that are on their way. Those behind one that was dropped are dropped too.
#[derive(Debug, Default)]
pub struct Window {
    state: Mutex<WindowState>,
    changed: Condvar,
    room: Option<Arc<Room>>,
}

#[derive(Debug, Default)]
struct WindowState {
    outstanding: usize,
    stale: bool,
    /// Hashes of keys.
    refused: Vec<u64>,
}

impl Window {
    /// One whose chunks take of this room.
    pub fn in_room(room: &Arc<Room>) -> Arc<Self> {
        Arc::new(Self {
            room: Some(Arc::clone(room)),
            ..Self::default()
        })
    }

    /// The part of the room that a chunk takes.
    pub fn permit(&self, content: &Content) -> Option<Permit> {
        let room = self.room.as_ref()?;
        Some(room.take(CHUNK_OVERHEAD + content.byte_len()))
    }

    /// A chunk is on its way.
    pub fn sent(&self) {
        self.lock().outstanding += 1;
    }

    /// A chunk was planned, or dropped because it is stale. Whatever follows a stale one is stale as well, until the
    /// worker begins anew.
    pub fn done(&self, stale: bool) {
        let mut state = self.lock();
        state.outstanding = state.outstanding.saturating_sub(1);
        if let Some(room) = self.room.as_ref().filter(|_| !stale) {
            room.widen();
        }
        state.stale |= stale;
        self.changed.notify_all();
    }

    /// When the turn of a chunk came, the gate had let go of what it does not see: less is to be on its way.
    pub fn narrow(&self) {
        if let Some(room) = &self.room {
            room.narrow();
        }
    }

    /// The gate does not know who changed this key.
    pub fn refuse(&self, key: &[u8]) {
        let refused = &mut self.lock().refused;
        if refused.len() < REFUSED_MAX {
            refused.push(xxh3_64(key));
        }
    }

    /// Hashes of the keys of which that was said, but for those that are too many.
    pub fn take_refused(&self) -> Vec<u64> {
        std::mem::take(&mut self.lock().refused)
    }

    /// How many chunks are on their way.
    pub fn outstanding(&self) -> usize {
        self.lock().outstanding
    }

    /// Whether a chunk was dropped since the worker began.
    pub fn is_stale(&self) -> bool {
        self.lock().stale
    }

    /// Waits until at most `most` chunks are on their way. True: none was stale. `stopped` ends the wait.
    pub fn wait(&self, most: usize, stopped: impl Fn() -> bool) -> bool {
        let mut state = self.lock();
        while state.outstanding > most && !state.stale && !stopped() {
            let waited = self.changed.wait_timeout(state, Duration::from_millis(100));
            state = waited.map_or_else(|error| error.into_inner().0, |(state, _)| state);
        }
        !state.stale
    }

    /// Waits until nothing is on its way, and forgets that something was stale.
    pub fn reset(&self, stopped: impl Fn() -> bool) {
        let mut state = self.lock();
        while state.outstanding > 0 && !stopped() {
            let waited = self.changed.wait_timeout(state, Duration::from_millis(100));
            state = waited.map_or_else(|error| error.into_inner().0, |(state, _)| state);
        }
        state.stale = false;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, WindowState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_rows_are_found_again() {
        let mut rows = PackedRows::default();
        for row in [b"abc".as_slice(), b"", b"de"] {
            rows.push(row);
        }
        assert_eq!((rows.len(), rows.byte_len()), (3, 5));
        assert_eq!(
            [rows.get(0), rows.get(1), rows.get(2), rows.get(3)],
            [Some(b"abc".as_slice()), Some(b""), Some(b"de"), None]
        );
        assert!(!format!("{rows:?}").contains("abc"));
    }

    #[test]
    fn a_room_is_bounded_in_bytes() {
        let room = Room::of(3000);
        let window = Window::in_room(&room);
        let keys = Content::Absent(vec![vec![0; 1000]]);
        let first = window.permit(&keys);
        assert!(room.wait(Instant::now(), || false));
        let second = window.permit(&keys);
        assert!(!room.wait(Instant::now(), || false));
        drop(first);
        assert!(room.wait(Instant::now(), || false));
        drop(second);
        assert_eq!(room.lock().taken, 0);
        assert!(Window::default().permit(&keys).is_none());
    }

    #[test]
    fn a_room_is_narrower_after_a_chunk_was_dropped_until_others_were_planned() {
        let room = Room::of(1 << 20);
        let window = Window::in_room(&room);
        assert_eq!(room.chunk_bytes(), 1 << 18);
        window.narrow();
        // Those behind it tell nothing new.
        (0..5).for_each(|_| window.done(true));
        assert_eq!(room.chunk_bytes(), 1 << 16);
        (0..5).for_each(|_| window.narrow());
        assert_eq!(room.chunk_bytes(), ROOM_MIN / 4);
        window.done(false);
        assert_eq!(room.chunk_bytes(), (ROOM_MIN + ROOM_STEP) / 4);
        (0..1000).for_each(|_| window.done(false));
        assert_eq!(room.chunk_bytes(), 1 << 18);
    }

    #[test]
    fn a_window_waits_for_room_and_remembers_staleness() {
        let window = Window::default();
        window.sent();
        assert!(window.wait(1, || false));
        assert!(window.wait(0, || true));
        window.done(true);
        assert!(!window.wait(0, || false));
        window.reset(|| false);
        assert!(window.wait(0, || false));
    }
}
