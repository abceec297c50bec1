//! Commands for one atomic step, and an index of what they write. The index says which command belongs to which key (for
//! messages about a refused command), which keys of a relation were written earlier in the step (a TRUNCATE must remove
//! them at its place), and lets a later full write of a key replace earlier ones.

mod pack;

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use super::Script;
use crate::resp::Commands;

/// What an operation means to others of the same key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// Writes or removes the whole key: whatever was done to the key before does not matter.
    Whole,
    /// Changes a part of the key.
    Patch,
    /// Reads or writes other keys as well (a rename, bookkeeping): it and what came before it on its key stay.
    Other,
}

/// The commands of one change of one key.
#[derive(Clone, Copy, Debug)]
pub struct Op {
    /// pg_class.oid of the relation.
    pub relation: u32,
    kind: OpKind,
    /// Replaced by a later operation.
    dead: bool,
    key_start: u32,
    key_len: u32,
    start: u32,
    first_command: u32,
    /// Its command is also that of the operation before: an MSET has many.
    shares: bool,
    /// The operation before this one on the same key, counted from 1; 0: none that could be replaced.
    previous: u32,
}

/// Commands and the index over them.
#[derive(Debug, Default)]
pub struct Batch {
    commands: Commands,
    ops: Vec<Op>,
    last: HashMap<u64, u32, BuildHasherDefault<AsIs>>,
    dead: usize,
    loaded: Vec<Script>,
}

/// The hash of a key is the gate's, which is good already.
#[derive(Debug, Default)]
struct AsIs(u64);

impl Hasher for AsIs {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _bytes: &[u8]) {}
    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// The commands as they are now.
    pub fn commands(&self) -> &Commands {
        &self.commands
    }

    /// What the batch weighs against a limit in bytes: commands and index.
    pub fn weight(&self) -> usize {
        self.commands.weight() + self.ops.len() * size_of::<Op>()
    }

    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.commands.is_empty()
    }

    /// Starts an operation whose commands are those appended to the returned buffer until the next operation starts. The
    /// key goes in with [`OpWriter::key`].
    pub fn op(&mut self, relation: u32, hash: u64, kind: OpKind, key: &[u8]) -> OpWriter<'_> {
        let number = u32::try_from(self.ops.len() + 1).unwrap_or(u32::MAX);
        let mut previous = self.last.insert(hash, number).unwrap_or(0);
        if kind == OpKind::Whole {
            self.kill(previous, key);
            previous = 0;
        }
        let start = position(self.commands.len());
        let first_command = position(self.commands.count());
        self.ops.push(Op {
            relation,
            kind,
            dead: false,
            key_start: start,
            key_len: 0,
            start,
            first_command,
            shares: false,
            previous,
        });
        OpWriter { batch: self }
    }

    /// Marks what came before on the same key, back to an operation that touches other keys.
    fn kill(&mut self, mut number: u32, key: &[u8]) {
        while let Some(index) = (number as usize).checked_sub(1) {
            let same_key = self
                .ops
                .get(index)
                .is_some_and(|op| op.kind != OpKind::Other && self.key_of(op) == key);
            let Some(op) = self.ops.get_mut(index).filter(|_| same_key) else {
                return;
            };
            if !op.dead {
                op.dead = true;
                self.dead += 1;
            }
            number = op.previous;
        }
    }

    /// An operation on another key reads or moves this one too: what was written to it before stays.
    pub fn pin(&mut self, hash: u64) {
        self.last.remove(&hash);
    }

    /// Commands that belong to no key of a relation (progress, the registry). What was written before is out of reach of
    /// [`OpKind::Whole`] only for their own keys, which no relation has.
    pub fn bookkeeping(&mut self) -> &mut Commands {
        let start = position(self.commands.len());
        let first_command = position(self.commands.count());
        let op = Op {
            relation: 0,
            kind: OpKind::Other,
            dead: false,
            key_start: start,
            key_len: 0,
            start,
            first_command,
            shares: false,
            previous: 0,
        };
        self.ops.push(op);
        &mut self.commands
    }

    /// Has a script there when the batch is applied, whatever happened to Redis' scripts before: a command that fails does not
    /// undo the others of its EXEC, and the position is one of them.
    pub fn load(&mut self, script: Script) {
        if !self.loaded.contains(&script) {
            self.loaded.push(script);
            self.bookkeeping()
                .command(&[b"SCRIPT", b"LOAD", script.source().as_bytes()]);
        }
    }

    /// The key of an operation.
    pub fn key_of(&self, op: &Op) -> &[u8] {
        let start = op.key_start as usize;
        self.commands
            .as_bytes()
            .get(start..start + op.key_len as usize)
            .unwrap_or_default()
    }

    /// The operations that the command with this number (from 0) belongs to: one, or those of an MSET; empty where there is
    /// no such command. Valid after [`Self::seal`].
    pub fn ops_of_command(&self, command: usize) -> &[Op] {
        let after = self
            .ops
            .partition_point(|op| op.first_command as usize <= command);
        let ops = self.ops.get(..after).unwrap_or_default();
        let first = ops.iter().rposition(|op| !op.shares).unwrap_or(0);
        ops.get(first..).unwrap_or_default()
    }

    /// Appends the removal of every key that the batch has written so far and that `goes`, by the relation that wrote it last: the place of a
    /// TRUNCATE.
    pub fn unlink_written(&mut self, goes: impl Fn(u32, &[u8]) -> bool) {
        let live = || self.ops.iter().filter(|op| !op.dead && op.key_len > 0);
        let last: HashMap<&[u8], u32> = live().map(|op| (self.key_of(op), op.relation)).collect();
        let mut keys: Vec<Vec<u8>> = last
            .into_iter()
            .filter(|(key, writer)| goes(*writer, key))
            .map(|(key, _)| key.to_vec())
            .collect();
        keys.sort_unstable();
        let commands = self.bookkeeping();
        for key in &keys {
            commands.command(&[b"UNLINK", key]);
        }
        self.keep();
    }

    /// Nothing before this point may be dropped in favour of something behind it from now on; simpler than to prove which could.
    pub fn keep(&mut self) {
        self.last.clear();
    }

    /// Ends the batch: takes the commands that were replaced out of the buffer, and makes one MSET of SETs side by side.
    pub fn seal(&mut self) {
        self.last = HashMap::default();
        if pack::is_needed(self) {
            (self.commands, self.ops) = pack::pack(self);
            self.dead = 0;
        }
    }

    /// The commands of an operation, encoded.
    fn bytes(&self, index: usize) -> &[u8] {
        let start = |index: usize| self.ops.get(index).map(|op| op.start as usize);
        let end = start(index + 1).unwrap_or(self.commands.len());
        let range = start(index).unwrap_or(end)..end;
        self.commands.as_bytes().get(range).unwrap_or_default()
    }

    /// How many they are.
    fn count(&self, index: usize) -> usize {
        let first = |index: usize| self.ops.get(index).map(|op| op.first_command as usize);
        let end = first(index + 1).unwrap_or(self.commands.count());
        end - first(index).unwrap_or(end)
    }
}

/// Appends the commands of one operation.
pub struct OpWriter<'a> {
    batch: &'a mut Batch,
}

impl<'a> OpWriter<'a> {
    /// Appends the operation's key as an argument, and notes where it stands.
    pub fn key(&mut self, key: &[u8]) -> &mut Commands {
        let at = self.batch.commands.arg_at(key);
        if let Some(op) = self.batch.ops.last_mut() {
            (op.key_start, op.key_len) = (position(at), position(key.len()));
        }
        &mut self.batch.commands
    }

    /// The buffer.
    pub fn commands(&mut self) -> &mut Commands {
        &mut self.batch.commands
    }

    /// The buffer, for a caller that goes on writing to the same operation.
    pub fn into_commands(self) -> &'a mut Commands {
        &mut self.batch.commands
    }
}

/// Batches are bounded far below 4 GiB, but for a single row of more than that, which Postgres cannot send.
fn position(at: usize) -> u32 {
    u32::try_from(at).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use super::*;
    use crate::resp::tests::parse;

    fn set(batch: &mut Batch, relation: u32, key: &str, value: &str) {
        let hash = u64::from(key.bytes().map(u32::from).sum::<u32>());
        let mut op = batch.op(relation, hash, OpKind::Whole, key.as_bytes());
        op.commands().begin(3).arg(b"SET");
        op.key(key.as_bytes()).arg(value.as_bytes());
    }

    fn patch(batch: &mut Batch, key: &str, kind: OpKind) {
        let hash = u64::from(key.bytes().map(u32::from).sum::<u32>());
        let mut op = batch.op(1, hash, kind, key.as_bytes());
        op.commands().begin(3).arg(b"PATCH");
        op.key(key.as_bytes()).arg(b"");
    }

    fn shown(batch: &Batch) -> Vec<String> {
        let line = |command: &Vec<Vec<u8>>| {
            command
                .iter()
                .map(|arg| String::from_utf8_lossy(arg).into_owned())
                .collect::<Vec<_>>()
                .join(" ")
        };
        parse(batch.commands().as_bytes()).iter().map(line).collect()
    }

    /// The keys that a command is of.
    fn keys(batch: &Batch, command: usize) -> Vec<String> {
        let ops = batch.ops_of_command(command).iter();
        ops.map(|op| String::from_utf8_lossy(batch.key_of(op)).into_owned())
            .collect()
    }

    #[test]
    fn a_later_write_replaces_earlier_ones_of_its_key_only() {
        let mut batch = Batch::new();
        set(&mut batch, 1, "a", "1");
        set(&mut batch, 1, "b", "2");
        patch(&mut batch, "a", OpKind::Patch);
        batch.bookkeeping().command(&[b"HSET", b"progress"]);
        set(&mut batch, 1, "a", "3");
        set(&mut batch, 1, "a", "4");
        batch.seal();
        assert_eq!(shown(&batch), ["SET b 2", "HSET progress", "SET a 4"]);
        assert_eq!(batch.commands().count(), 3);
        assert_eq!(keys(&batch, 2), ["a"]);
        assert_eq!(keys(&batch, 0), ["b"]);
    }

    #[test]
    fn a_hash_collision_replaces_nothing() {
        let mut batch = Batch::new();
        set(&mut batch, 1, "ab", "1");
        set(&mut batch, 1, "ba", "2");
        set(&mut batch, 1, "ab", "3");
        batch.seal();
        // The chain of "ab" was cut by "ba"; the first write stays, which costs time but changes nothing.
        assert_eq!(shown(&batch), ["MSET ab 1 ba 2 ab 3"]);
    }

    #[test]
    fn what_touches_other_keys_stays() {
        let mut batch = Batch::new();
        set(&mut batch, 1, "a", "1");
        patch(&mut batch, "a", OpKind::Other);
        set(&mut batch, 1, "a", "2");
        batch.seal();
        assert_eq!(shown(&batch), ["SET a 1", "PATCH a ", "SET a 2"]);
    }

    #[test]
    fn a_truncate_removes_what_the_batch_wrote_before_it() {
        let mut batch = Batch::new();
        set(&mut batch, 1, "a", "1");
        set(&mut batch, 2, "x", "1");
        set(&mut batch, 1, "a", "2");
        batch.unlink_written(|writer, _| writer == 1);
        set(&mut batch, 1, "a", "3");
        batch.seal();
        assert_eq!(shown(&batch), ["MSET x 1 a 2", "UNLINK a", "SET a 3"]);
    }

    #[test]
    fn a_truncate_leaves_what_another_table_has_written_since() {
        let mut batch = Batch::new();
        set(&mut batch, 1, "a", "1");
        set(&mut batch, 1, "b", "1");
        batch.keep();
        set(&mut batch, 2, "a", "2");
        batch.unlink_written(|writer, _| writer == 1);
        batch.seal();
        assert_eq!(shown(&batch).last().unwrap(), "UNLINK b");
    }

    #[test]
    fn sets_side_by_side_become_one_command() {
        let mut batch = Batch::new();
        batch.bookkeeping().command(&[b"MULTI"]);
        set(&mut batch, 1, "a", "1");
        set(&mut batch, 1, "gone", "1");
        set(&mut batch, 2, "b", "2");
        patch(&mut batch, "a", OpKind::Patch);
        set(&mut batch, 1, "gone", "2");
        patch(&mut batch, "b", OpKind::Patch);
        batch.seal();
        let expected = ["MULTI", "MSET a 1 b 2", "PATCH a ", "SET gone 2", "PATCH b "];
        assert_eq!(shown(&batch), expected);
        assert_eq!(batch.commands().count(), expected.len());
        let named: [&[&str]; 6] = [&[""], &["a", "b"], &["a"], &["gone"], &["b"], &["b"]];
        for (command, expected) in named.iter().enumerate() {
            assert_eq!(keys(&batch, command), *expected, "{command}");
        }
        let relations: Vec<u32> = batch.ops_of_command(1).iter().map(|op| op.relation).collect();
        assert_eq!(relations, [1, 2]);
    }

    #[test]
    fn an_mset_is_bounded() {
        let mut batch = Batch::new();
        for number in 0..300 {
            set(&mut batch, 1, &format!("key:{number:03}"), "x");
        }
        batch.seal();
        let lengths: Vec<usize> = parse(batch.commands().as_bytes())
            .iter()
            .map(|command| command.len() / 2)
            .collect();
        assert_eq!(lengths, [128, 128, 44]);
        assert_eq!(keys(&batch, 2).first().unwrap(), "key:256");
        assert_eq!(keys(&batch, 2).len(), 44);
    }
}
