//! What a sealed batch looks like: without the commands that were replaced, and with one MSET for SETs that stand side by side. To
//! Redis a command costs more than a short value: it is looked up, queued and answered by itself. Within an EXEC nobody sees the
//! difference: MSET too replaces a value of any type, and takes its expiry away.

use super::{Batch, Op, position};
use crate::resp::Commands;

/// What stands before the key of a SET without options.
const SET: &[u8] = b"*3\r\n$3\r\nSET\r\n";
/// So many pairs at most in one MSET: by then the cost of a command is well spread.
const PAIRS_MAX: usize = 128;
/// And so many bytes at most: Redis answers a command when it has all of it, and what says nothing for long is given up, also where the link
/// is slow.
const BYTES_MAX: usize = 32 * 1024;

/// Whether [`pack`] would change anything.
pub(super) fn is_needed(batch: &Batch) -> bool {
    let is_set = |index: usize| batch.bytes(index).starts_with(SET);
    batch.dead > 0 || (1..batch.ops.len()).any(|index| is_set(index) && is_set(index - 1))
}

/// The commands and the index of a batch, packed.
pub(super) fn pack(batch: &Batch) -> (Commands, Vec<Op>) {
    let mut packed = Packed {
        commands: Commands::new(),
        ops: Vec::with_capacity(batch.ops.len() - batch.dead),
        sets: Vec::with_capacity(PAIRS_MAX),
        sets_bytes: 0,
    };
    for (index, op) in batch.ops.iter().enumerate().filter(|(_, op)| !op.dead) {
        let (bytes, count) = (batch.bytes(index), batch.count(index));
        if count == 1 && bytes.starts_with(SET) {
            packed.push_set(op, bytes);
        } else {
            packed.end_sets();
            packed.push(op, bytes, count);
        }
    }
    packed.end_sets();
    (packed.commands, packed.ops)
}

struct Packed<'a> {
    commands: Commands,
    ops: Vec<Op>,
    /// SETs side by side that are not in `commands` yet.
    sets: Vec<(&'a Op, &'a [u8])>,
    sets_bytes: usize,
}

impl<'a> Packed<'a> {
    fn push_set(&mut self, op: &'a Op, bytes: &'a [u8]) {
        if self.sets.len() == PAIRS_MAX || self.sets_bytes + bytes.len() > BYTES_MAX {
            self.end_sets();
        }
        self.sets.push((op, bytes));
        self.sets_bytes += bytes.len();
    }

    fn end_sets(&mut self) {
        let mut sets = std::mem::take(&mut self.sets);
        if let [(op, bytes)] = sets.as_slice() {
            self.push(op, bytes, 1);
        } else if !sets.is_empty() {
            let first_command = position(self.commands.count());
            self.commands.begin(1 + 2 * sets.len()).arg(b"MSET");
            for (number, (op, bytes)) in sets.iter().enumerate() {
                let start = position(self.commands.len());
                let pair = bytes.get(SET.len()..).unwrap_or_default();
                self.commands.encoded(pair);
                self.ops.push(Op {
                    start,
                    key_start: start + (op.key_start - op.start) - position(SET.len()),
                    first_command,
                    shares: number > 0,
                    ..**op
                });
            }
        }
        sets.clear();
        self.sets = sets;
        self.sets_bytes = 0;
    }

    fn push(&mut self, op: &Op, bytes: &[u8], count: usize) {
        let start = position(self.commands.len());
        self.ops.push(Op {
            start,
            key_start: start + (op.key_start - op.start),
            first_command: position(self.commands.count()),
            ..*op
        });
        self.commands.append(bytes, count);
    }
}
