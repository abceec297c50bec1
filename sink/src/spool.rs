//! Where transactions in progress wait until they commit. Postgres sends one that has outgrown `logical_decoding_work_mem` in
//! parts, so that it need not write it to its own disk and read it back; here its frames are appended to a file, as they came.
//!
//! A file has no name, so nothing is left behind however the process ends: the server sends the transaction again. Small
//! transactions stay in memory. INVARIANT I7: that memory is bounded, whatever the number of transactions; a subtransaction that was
//! rolled back takes some 20 bytes besides, a small part of what it takes in Postgres.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, Read, Seek, Write};
use std::path::PathBuf;

/// A transaction keeps so much in memory, and writes it all at once.
const BUFFER_BYTES: usize = 128 * 1024;
/// All of them together keep so much, about.
const BUFFERS_BYTES: usize = 4 * 1024 * 1024;
/// Bytes before each frame: its length, as u32 in little-endian order.
const LENGTH_BYTES: usize = 4;

/// The transactions in progress.
#[derive(Debug)]
pub struct Spool {
    directory: PathBuf,
    transactions: HashMap<u64, Stored>,
    /// Bytes that all of them have in memory.
    buffered: usize,
    /// Bytes that all of them have, in memory and in files.
    bytes: u64,
}

#[derive(Debug, Default)]
struct Stored {
    file: Option<File>,
    written: u64,
    buffer: Vec<u8>,
    /// Subtransactions that were rolled back.
    rolled_back: HashSet<u64>,
}

impl Spool {
    /// An empty one. `directory` is looked at only when there is something to write.
    pub fn new(directory: PathBuf) -> Self {
        Self {
            directory,
            transactions: HashMap::new(),
            buffered: 0,
            bytes: 0,
        }
    }

    /// Keeps a frame of a transaction, which may be its first.
    pub fn append(&mut self, xid: u64, frame: &[u8]) -> io::Result<()> {
        let length = u32::try_from(frame.len()).map_err(io::Error::other)?;
        let stored = self.transactions.entry(xid).or_default();
        stored.buffer.extend_from_slice(&length.to_le_bytes());
        stored.buffer.extend_from_slice(frame);
        self.buffered += LENGTH_BYTES + frame.len();
        self.bytes += (LENGTH_BYTES + frame.len()) as u64;
        if stored.buffer.len() >= BUFFER_BYTES || self.buffered >= BUFFERS_BYTES {
            let file = match &mut stored.file {
                Some(file) => file,
                none => none.insert(tempfile::tempfile_in(&self.directory)?),
            };
            file.write_all(&stored.buffer)?;
            stored.written += stored.buffer.len() as u64;
            self.buffered -= stored.buffer.len();
            // A large row must not keep its room until the transaction ends.
            stored.buffer = Vec::new();
        }
        Ok(())
    }

    /// What a subtransaction did is undone, or, where both ids are the same, all of the transaction.
    pub fn roll_back(&mut self, xid: u64, sub_xid: u64) {
        if xid == sub_xid {
            self.remove(xid);
        } else if let Some(stored) = self.transactions.get_mut(&xid) {
            stored.rolled_back.insert(sub_xid);
        }
    }

    /// The transaction commits: hands out its frames. None: there is no such transaction.
    pub fn take(&mut self, xid: u64) -> io::Result<Option<Frames>> {
        let Some(stored) = self.remove(xid) else {
            return Ok(None);
        };
        let rest = Cursor::new(stored.buffer);
        let reader: Box<dyn BufRead + Send> = match stored.file {
            None => Box::new(rest),
            Some(mut file) => {
                file.rewind()?;
                Box::new(BufReader::with_capacity(BUFFER_BYTES, file).chain(rest))
            }
        };
        Ok(Some(Frames {
            reader,
            rolled_back: stored.rolled_back,
        }))
    }

    /// Bytes that are kept.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn remove(&mut self, xid: u64) -> Option<Stored> {
        let stored = self.transactions.remove(&xid)?;
        self.buffered -= stored.buffer.len();
        self.bytes -= stored.written + stored.buffer.len() as u64;
        Some(stored)
    }
}

/// The frames of a transaction that has committed, in the order in which they came.
pub struct Frames {
    reader: Box<dyn BufRead + Send>,
    rolled_back: HashSet<u64>,
}

impl Frames {
    /// Reads the next frame in place of what `frame` holds. False: there is none.
    pub fn next(&mut self, frame: &mut Vec<u8>) -> io::Result<bool> {
        if self.reader.fill_buf()?.is_empty() {
            return Ok(false);
        }
        let mut length = [0; LENGTH_BYTES];
        self.reader.read_exact(&mut length)?;
        frame.resize(u32::from_le_bytes(length) as usize, 0);
        self.reader.read_exact(frame)?;
        Ok(true)
    }

    /// Whether what this subtransaction did was undone.
    pub fn is_rolled_back(&self, sub_xid: u64) -> bool {
        self.rolled_back.contains(&sub_xid)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn all(mut frames: Frames) -> Vec<Vec<u8>> {
        let (mut all, mut frame) = (Vec::new(), Vec::new());
        while frames.next(&mut frame).unwrap() {
            all.push(frame.clone());
        }
        all
    }

    proptest! {
        /// Frames of several transactions, small and larger than the buffers, come back whole and in their order.
        #[test]
        fn every_transaction_gets_its_frames_back(
            frames in proptest::collection::vec((0..5_u64, prop_oneof![0..40_usize, 0..40_000_usize, Just(BUFFER_BYTES)]), 0..200),
            rolled_back in 0..5_u64,
        ) {
            let mut spool = Spool::new(std::env::temp_dir());
            let mut model: HashMap<u64, Vec<Vec<u8>>> = HashMap::new();
            for (number, (xid, length)) in frames.into_iter().enumerate() {
                let frame = vec![number as u8; length];
                spool.append(xid, &frame).unwrap();
                model.entry(xid).or_default().push(frame);
                prop_assert!(spool.buffered < BUFFERS_BYTES);
            }
            spool.roll_back(rolled_back, rolled_back);
            model.remove(&rolled_back);
            let kept: usize = model.values().flatten().map(|frame| frame.len() + LENGTH_BYTES).sum();
            prop_assert_eq!(spool.bytes(), kept as u64);
            for xid in 0..5 {
                prop_assert_eq!(spool.take(xid).unwrap().map(all), model.remove(&xid));
            }
            prop_assert_eq!((spool.bytes(), spool.buffered), (0, 0));
        }
    }

    #[test]
    fn many_transactions_share_the_memory() {
        let mut spool = Spool::new(std::env::temp_dir());
        let frame = vec![7; BUFFER_BYTES / 2];
        for xid in 0..200 {
            spool.append(xid, &frame).unwrap();
            assert!(spool.buffered < BUFFERS_BYTES);
        }
        for xid in 0..200 {
            assert_eq!(
                all(spool.take(xid).unwrap().unwrap()),
                std::slice::from_ref(&frame)
            );
        }
    }

    #[test]
    fn a_subtransaction_that_was_undone_is_remembered() {
        let mut spool = Spool::new(std::env::temp_dir());
        spool.roll_back(1, 3);
        spool.append(1, b"x").unwrap();
        spool.roll_back(1, 2);
        let frames = spool.take(1).unwrap().unwrap();
        assert!(frames.is_rolled_back(2) && !frames.is_rolled_back(1) && !frames.is_rolled_back(3));
    }

    #[test]
    fn a_directory_that_is_not_there_is_an_error_of_the_first_write() {
        let mut spool = Spool::new("/nowhere/at all".into());
        spool.append(1, b"small").unwrap();
        assert!(spool.append(1, &vec![0; BUFFER_BYTES]).is_err());
    }
}
