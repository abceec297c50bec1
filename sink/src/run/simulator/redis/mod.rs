//! A model of Redis: keys, clients with MULTI and WATCH, and a log of steps that can be undone, because a Redis that
//! crashes or fails over loses its last steps as a whole. `commands` is what each command does.

mod commands;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use redis::Value;

use crate::progress::Progress;

pub(super) const PROGRESS: &[u8] = b"walmirror:{s}:progress";
pub(super) const RELATIONS: &[u8] = b"walmirror:{s}:relations";
pub(super) const PENDING: &[u8] = b"walmirror:{s}:pending";
const REJECTED: &[u8] = b"walmirror:{s}:rejected";

pub(super) type Fields = BTreeMap<Vec<u8>, Vec<u8>>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Stored {
    Hash(Fields),
    Text(Vec<u8>),
}

pub(super) type Command = Vec<Vec<u8>>;

#[derive(Debug, Default)]
struct Client {
    name: Vec<u8>,
    /// Commands behind MULTI.
    queue: Option<Vec<Command>>,
    /// A command was refused: EXEC will be as well.
    spoiled: bool,
    watched: Option<u64>,
}

/// One atomic change.
#[derive(Debug)]
pub(super) struct Step {
    at: u64,
    before: BTreeMap<Vec<u8>, Option<Stored>>,
    /// The position that Redis has after it.
    lsn: u64,
    /// The incarnation of Postgres that its content is of.
    incarnation: usize,
}

#[derive(Debug, Default)]
pub(super) struct Redis {
    pub(super) data: BTreeMap<Vec<u8>, Stored>,
    pub(super) steps: Vec<Step>,
    clients: BTreeMap<u64, Client>,
    next_client: u64,
    /// Rises whenever the progress key is written.
    stamp: u64,
    /// What it said at which stamp.
    parsed: RefCell<Option<(u64, Option<Arc<Progress>>)>>,
    /// The clock, in milliseconds.
    pub(super) now: u64,
    before: BTreeMap<Vec<u8>, Option<Stored>>,
    /// The incarnation of Postgres that is being written. None: the content stays that of the one before.
    pub(super) writes: Option<usize>,
    /// How many steps are on a replica or on disk.
    pub(super) saved: usize,
    /// Rows that were not mirrored, ever: table and key.
    pub(super) notes: BTreeSet<(Vec<u8>, Vec<u8>)>,
    pub(super) broken: Broken,
    /// Print every command: for the replay of a seed.
    pub(super) trace: bool,
    /// The command removes keys ahead of the transaction that they go with.
    is_ahead: bool,
    /// The connection that has the right to write.
    owner: Option<u64>,
    /// What must never be, found while it happened.
    pub(super) violation: Option<String>,
}

/// Parts of the sink that can be taken out, to see that it is noticed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Broken {
    #[default]
    Nothing,
    /// The progress is written by itself, before the data.
    ProgressBefore,
    /// The slot is confirmed up to what is applied.
    ConfirmAhead,
    /// A row that SQL read is fresh if every commit that is in the WAL before it is seen.
    GateByLsn,
    /// A sink that lost its claim may write.
    NoFence,
    /// What was applied before a restart is applied again from where the slot is.
    ForgetPosition,
    /// Chunks are written at once instead of where their marker stands.
    NoMarker,
    /// Where Redis and the slot do not fit together, the stream goes on all the same.
    IgnoreGap,
    /// Whether the stream is of the history that Redis mirrors is not looked at.
    AnyHistory,
    /// The slot is confirmed up to the position before that is known.
    ConfirmUnproved,
    /// A progress that begins anew names no transaction until one of somebody else comes.
    NoLandmark,
    /// Keys without a row are looked for before what is planned is in Redis.
    SweepAhead,
    /// Of a key that changes, one of its columns is told as it is now.
    HalfKey,
    /// What is no longer mirrored keeps its keys always.
    KeepKeys,
    /// A table that was announced is captured and refreshed whoever was writing to it.
    NoHorizon,
    /// A row is noted whose key another table takes, and written all the same.
    WriteTaken,
    /// A session that begins knows nothing of the table that takes keys from the others, until the catalog tells.
    NoTaker,
    /// Keys that are too long are written.
    LongKeys,
    /// Keys are removed ahead of their transaction whoever has the right to write.
    PurgeUnfenced,
    /// Whether the transaction comes that keys were removed for is not looked at.
    ForgetPurge,
    /// Whatever timeline the server is on, it is taken to have all of the one that Redis mirrors.
    AnyTimeline,
    /// Where a server left the timeline that Redis mirrors is never known.
    NoTimelines,
    /// The catalog is looked at while labels that the stream has told of are invisible.
    EarlyCatalog,
}

impl Redis {
    pub(super) fn connect(&mut self) -> u64 {
        self.next_client += 1;
        self.clients.insert(self.next_client, Client::default());
        self.next_client
    }

    pub(super) fn is_connected(&self, client: u64) -> bool {
        self.clients.contains_key(&client)
    }

    pub(super) fn disconnect(&mut self, client: u64) {
        self.clients.remove(&client);
    }

    pub(super) fn hash(&self, key: &[u8]) -> Option<&Fields> {
        if let Some(Stored::Hash(fields)) = self.data.get(key) {
            Some(fields)
        } else {
            None
        }
    }

    /// What the progress key says between two commands. It is read anew only when it was written.
    pub(super) fn progress(&self) -> Option<Arc<Progress>> {
        let mut parsed = self.parsed.borrow_mut();
        if parsed.as_ref().is_none_or(|(stamp, _)| *stamp != self.stamp) {
            *parsed = Some((self.stamp, self.parse().map(Arc::new)));
        }
        parsed.as_ref().and_then(|(_, progress)| progress.clone())
    }

    fn parse(&self) -> Option<Progress> {
        let fields = self.hash(PROGRESS)?;
        Progress::parse(
            fields
                .iter()
                .map(|(field, value)| (field.as_slice(), value.as_slice())),
        )
        .ok()?
    }

    pub(super) fn pending(&self) -> impl Iterator<Item = (&Vec<u8>, &Vec<u8>)> {
        self.hash(PENDING).into_iter().flatten()
    }

    /// The keys that the last step changed.
    pub(super) fn changed(&self) -> impl Iterator<Item = &Vec<u8>> {
        let before = self.steps.last().into_iter().flat_map(|step| &step.before);
        before
            .filter(|(key, before)| self.data.get(*key) != before.as_ref())
            .map(|(key, _)| key)
    }

    /// Whether the last step wrote to the key, be it the same.
    pub(super) fn touched(&self, key: &[u8]) -> bool {
        self.steps
            .last()
            .is_some_and(|step| step.before.contains_key(key))
    }

    fn position(&self) -> u64 {
        let lsn = self
            .hash(PROGRESS)
            .and_then(|fields| fields.get(b"lsn".as_slice()));
        let lsn = lsn.and_then(|text| {
            std::str::from_utf8(text)
                .ok()?
                .parse::<walmirror_proto::Lsn>()
                .ok()
        });
        lsn.map_or(0, |lsn| lsn.0)
    }

    /// The incarnation of Postgres that the content is of.
    pub(super) fn incarnation(&self) -> usize {
        self.steps.last().map_or(0, |step| step.incarnation)
    }

    /// Steps that are safe from a crash when memory of that long ago is.
    pub(super) fn old_steps(&self, window: u64) -> usize {
        self.steps.partition_point(|step| step.at + window <= self.now)
    }

    /// The position after so many steps.
    pub(super) fn position_after(&self, steps: usize) -> u64 {
        steps
            .checked_sub(1)
            .and_then(|last| self.steps.get(last))
            .map_or(0, |step| step.lsn)
    }

    /// The least position that Redis can come back with, if it loses nothing of the first so many steps.
    pub(super) fn least_position(&self, steps: usize) -> u64 {
        (steps..=self.steps.len())
            .map(|steps| self.position_after(steps))
            .min()
            .unwrap_or(0)
    }

    /// Redis comes back without everything after so many steps. `keeps` its clients, as one that is made a replica and promoted again; but none
    /// that has claimed meanwhile.
    pub(super) fn roll_back_to(&mut self, steps: usize, keeps: bool) {
        let epoch = |redis: &Self| redis.progress().map(|progress| progress.epoch);
        let before = epoch(self);
        while self.steps.len() > steps {
            for (key, before) in self.steps.pop().into_iter().flat_map(|step| step.before) {
                match before {
                    Some(stored) => _ = self.data.insert(key, stored),
                    None => _ = self.data.remove(&key),
                }
            }
        }
        self.saved = self.saved.min(self.steps.len());
        self.stamp += 1;
        if !keeps || epoch(self) != before {
            self.clients.clear();
        }
    }

    pub(super) fn flush_all(&mut self) {
        self.data
            .keys()
            .cloned()
            .collect::<Vec<_>>()
            .iter()
            .for_each(|key| self.touch(key));
        self.data.clear();
        self.end_step();
    }

    /// A key expires.
    pub(super) fn expire(&mut self, key: &[u8]) {
        self.touch(key);
        self.data.remove(key);
        self.end_step();
    }

    /// The key is about to change.
    pub(super) fn touch(&mut self, key: &[u8]) {
        if key == PROGRESS {
            self.stamp += 1;
        }
        if !self.before.contains_key(key) {
            self.before.insert(key.to_vec(), self.data.get(key).cloned());
        }
    }

    fn end_step(&mut self) {
        let before = std::mem::take(&mut self.before);
        if !before.is_empty() {
            let (lsn, incarnation) = (self.position(), self.writes.unwrap_or(self.incarnation()));
            self.steps.push(Step {
                at: self.now,
                before,
                lsn,
                incarnation,
            });
        }
    }

    /// The next commands of this client are refused, as a Redis that is full does.
    pub(super) fn refuse(&mut self, client: u64) -> Value {
        if let Some(client) = self.clients.get_mut(&client) {
            client.spoiled |= client.queue.is_some();
        }
        error("OOM command not allowed when used memory > 'maxmemory'.")
    }

    pub(super) fn execute(&mut self, id: u64, command: Command) -> Value {
        let name = command.first().map(Vec::as_slice).unwrap_or_default();
        let stamp = self.stamp;
        if self.trace {
            let words: Vec<_> = command.iter().map(|word| String::from_utf8_lossy(word)).collect();
            println!("  {id}: {}", words.join(" "));
        }
        let Some(client) = self.clients.get_mut(&id) else {
            return Value::Nil;
        };
        match (name, &mut client.queue) {
            (b"EXEC", queue @ Some(_)) => {
                let queue = queue.take().unwrap_or_default();
                let watched = client.watched.take();
                if std::mem::take(&mut client.spoiled) {
                    return error("EXECABORT Transaction discarded because of previous errors.");
                }
                if watched.is_some_and(|watched| watched != stamp) && self.broken != Broken::NoFence {
                    return Value::Nil;
                }
                let replies = queue.into_iter().map(|command| self.run(id, &command)).collect();
                self.check_step(id);
                self.end_step();
                Value::Array(replies)
            }
            (_, Some(_)) if self.broken == Broken::ProgressBefore && is_step(&command) => {
                self.run(id, &command);
                self.end_step();
                let stamp = self.stamp;
                self.clients
                    .entry(id)
                    .and_modify(|client| client.watched = Some(stamp));
                Value::SimpleString("QUEUED".into())
            }
            (_, Some(queue)) => {
                queue.push(command);
                Value::SimpleString("QUEUED".into())
            }
            (b"MULTI", queue) => {
                *queue = Some(Vec::new());
                Value::Okay
            }
            (b"WATCH", None) => {
                client.watched.get_or_insert(stamp);
                Value::Okay
            }
            _ => {
                let reply = self.run(id, &command);
                self.check_step(id);
                self.end_step();
                reply
            }
        }
    }

    /// INVARIANT I2: rows change, and are noted, in a step that moves the position; but for those that go ahead of the
    /// transaction that the progress names. INVARIANT I4: only whoever claimed last writes.
    fn check_step(&mut self, id: u64) {
        let is_ahead = std::mem::take(&mut self.is_ahead);
        let is_data = |key: &&Vec<u8>| !key.starts_with(b"walmirror:{") || *key == REJECTED;
        let is_noted = || {
            let progress = self.hash(PROGRESS);
            progress.is_some_and(|fields| fields.contains_key(b"purging".as_slice()))
        };
        if let Some(key) = self.before.keys().find(is_data) {
            let key = String::from_utf8_lossy(key);
            if !(self.before.contains_key(PROGRESS) || is_ahead && is_noted()) {
                self.violation = Some(format!("{key} changed without the progress (I2)"));
            } else if self.owner != Some(id) && self.broken != Broken::NoFence {
                self.violation = Some(format!("{key} was changed by who lost the right to (I4)"));
            }
        }
        let epoch = |stored: Option<&Stored>| match stored {
            Some(Stored::Hash(fields)) => fields.get(b"epoch".as_slice()).cloned(),
            _ => None,
        };
        if let Some(before) = self.before.get(PROGRESS)
            && epoch(before.as_ref()) != epoch(self.data.get(PROGRESS))
        {
            self.owner = Some(id);
        }
    }
}

fn is_step(command: &[Vec<u8>]) -> bool {
    matches!(command, [name, key, field, ..] if name == b"HSET" && key == PROGRESS && field == b"lsn")
}

pub(super) fn error(line: &str) -> Value {
    redis::parse_redis_value(format!("-{line}\r\n").as_bytes()).unwrap_or(Value::Nil)
}
