//! One schedule: Postgres, Redis, sinks and what happens to them, step by step, by the dice of one seed. Here are the steps
//! and what Postgres does; `sinks` is what the sink does, `faults` what befalls it.

mod faults;
mod put_back;
mod sinks;

use std::time::{Duration, Instant};

use walmirror_proto::pb::Mode;

use super::check::Checks;
use super::dice::Dice;
use super::link::{self, lock};
use super::postgres::{CHOICES, IDS, OIDS, Postgres, Wal, definition};
use super::redis::Broken;
use super::sink::{Session, Setting, Starting, at};
use super::table::{Id, KEY_BYTES, NARROW, NEXT};
use crate::config::Durability;
use crate::plan::RedisKeys;
use crate::request::Request;
use crate::run::decide::Found;
use crate::run::planning::Limits;

use put_back::Lost;

/// What `--durability memory` waits for, in milliseconds of the model's clock.
pub(super) const WINDOW: u64 = 100;

pub(super) struct World {
    pub(super) dice: Dice,
    pub(super) setting: Setting,
    pub(super) postgres: Postgres,
    pub(super) server: link::Shared,
    /// The sink that holds the slot.
    sink: Option<Session>,
    starting: Option<Starting>,
    /// Sinks that were stalled while others took over.
    stalled: Vec<Session>,
    stalled_starting: Vec<Starting>,
    /// Rows that a SELECT has read and not yet logged.
    captures: Vec<Wal>,
    pub(super) checks: Checks,
    /// Whether Redis may lose more than `--durability` allows, the slot may be dropped, and so on.
    disasters: bool,
    /// One happened, or the slot was confirmed up to the end by a clean stop: a gap is what has to follow.
    gap_is_due: bool,
    /// What was durable before Redis lost more than it may. The sink that runs has seen that, and may still say so.
    was_durable: u64,
    late_claim: bool,
    /// Whether the files of Postgres are copied and put back, the copy, and what was lost each time.
    put_backs: bool,
    /// Whether the copy is that of a standby, which is promoted.
    failovers: bool,
    copy: Option<Postgres>,
    lost: Vec<Lost>,
    /// What the last session found.
    found: Option<Found>,
}

/// What was wrong, in words.
pub(super) type Wrong = String;

impl World {
    pub(super) fn new(seed: u64, broken: Broken) -> Self {
        let mut dice = Dice::new(seed);
        let window = Duration::from_millis(WINDOW);
        let durability = if dice.once_in(3) {
            Durability::Aof
        } else {
            Durability::Memory { window }
        };
        let small = dice.once_in(2);
        let setting = Setting {
            keys: RedisKeys::new("s"),
            durability,
            limits: Limits {
                batch_bytes: if small { 600 } else { 4000 },
                transaction_bytes: if small { 2_000 } else { 20_000 },
                value_bytes: match broken {
                    Broken::LongKeys => crate::plan::VALUE_BYTES,
                    _ => KEY_BYTES,
                },
            },
            gate_bytes: if dice.once_in(2) { 64 } else { 4096 },
            purge_keys: [0, 2, 10_000][dice.roll(3) as usize],
            epoch: Instant::now(),
        };
        let mut postgres = Postgres::new();
        let server = link::Shared::default();
        lock(&server).redis.broken = broken;
        for oid in OIDS {
            let index = postgres.begin();
            for id in (0..IDS).filter(|_| dice.once_in(2)).collect::<Vec<_>>() {
                postgres.write(index, oid, id, 7, 0);
            }
            if !dice.once_in(4) {
                let choice = dice.roll(CHOICES);
                postgres.relabel(index, oid, |fingerprint| definition(oid, fingerprint, choice));
            }
        }
        postgres.end_all();
        let failovers = dice.once_in(2);
        postgres.failover = !dice.once_in(4);
        Self {
            setting,
            postgres,
            server,
            sink: None,
            starting: None,
            stalled: Vec::new(),
            stalled_starting: Vec::new(),
            captures: Vec::new(),
            checks: Checks::default(),
            disasters: dice.once_in(3),
            gap_is_due: false,
            was_durable: 0,
            late_claim: false,
            put_backs: dice.once_in(3),
            failovers,
            copy: None,
            lost: Vec::new(),
            found: None,
            dice,
        }
    }

    /// Prints what happens.
    pub(super) fn trace(&mut self) {
        lock(&self.server).redis.trace = true;
    }

    /// Runs the schedule to its end and compares.
    pub(super) fn run(&mut self) -> Result<(), Wrong> {
        for _ in 0..150 + self.dice.roll(250) {
            self.step()?;
            if self.dice.once_in(200) {
                self.run_ahead()?;
            }
        }
        if self.put_backs && self.dice.once_in(4) {
            self.begin_anew_and_put_back()?;
        }
        if self.put_backs && self.dice.once_in(3) {
            self.purge_and_put_back()?;
        }
        self.settle()
    }

    fn step(&mut self) -> Result<(), Wrong> {
        self.put_back_in_purge();
        match self.dice.roll(41) {
            0..=13 => self.write(),
            14 => self.select(),
            15 => self.log_capture(),
            16..=33 => self.drive()?,
            34 => self.feedback()?,
            35 => lock(&self.server).redis.now += self.dice.roll(40),
            36 => self.stalled_acts()?,
            37 if self.dice.once_in(3) => self.fail(),
            37 => self.arrive(),
            38 if self.dice.once_in(4) => self.end_of_session()?,
            39 if self.dice.once_in(5) => self.lose()?,
            39 if self.dice.once_in(20) => self.lose_again_and_again()?,
            40 if self.put_backs => self.copy_or_put_back(),
            40 => self.repair(),
            _ => {}
        }
        self.look()
    }

    /// Redis does not answer for a while, a label changes, and planner and workers go on as far as they can.
    fn run_ahead(&mut self) -> Result<(), Wrong> {
        for _ in 0..self.dice.roll(6) {
            self.write();
        }
        if self.dice.once_in(2) {
            let (oid, choice) = (*self.dice.pick(&OIDS).unwrap(), self.dice.roll(CHOICES));
            let index = self.postgres.begin();
            self.postgres
                .relabel(index, oid, |fingerprint| definition(oid, fingerprint, choice));
        }
        self.postgres.end_all();
        for _ in 0..self.dice.roll(120) {
            self.go_ahead()?;
            self.look()?;
        }
        Ok(())
    }

    /// The invariants, wherever the last step has left the world.
    fn look(&mut self) -> Result<(), Wrong> {
        let server = lock(&self.server);
        self.checks
            .look(&server.redis, &self.postgres.history, self.postgres.incarnation)
    }

    /// Postgres goes on.
    fn write(&mut self) {
        let (oid, id, to) = (*self.dice.pick(&OIDS).unwrap(), self.id(), self.id());
        let open = self.postgres.open.len() as u64;
        if open == 0 || (open < 4 && self.dice.once_in(4)) {
            self.postgres.begin();
        }
        let index = self.dice.roll(self.postgres.open.len() as u64) as usize;
        match self.dice.roll(24) {
            0..=12 => self.postgres.write(index, oid, id, self.dice.roll(9), to),
            13..=16 => self.postgres.commit(index),
            17..=19 => self.postgres.finish(index),
            20 => self.postgres.roll_back(index),
            21 if self.dice.once_in(2) => self.postgres.truncate(index, oid),
            22 if self.dice.once_in(3) => match self.dice.roll(8) {
                // What a copy that is put back knows nothing of, nobody removes.
                0 => self.postgres.unlabel(index, oid, !self.put_backs && to % 2 == 0),
                1 => self.postgres.rewrite(index, oid),
                2 if to % 2 == 0 => self.postgres.rename_values(index, oid),
                2 => self.rename_schema(index, oid),
                3 | 4 => self.hand_over(index),
                _ => {
                    let choice = self.dice.roll(CHOICES);
                    self.postgres
                        .relabel(index, oid, |fingerprint| definition(oid, fingerprint, choice));
                }
            },
            23 if self.dice.once_in(8) => {
                // A transaction that is larger than the limits.
                for _ in 0..40 {
                    let (id, to) = (self.id(), self.id());
                    self.postgres.write(index, oid, id, self.dice.roll(9), to);
                }
            }
            // WAL that is of no interest.
            _ => self.postgres.end += 8,
        }
    }

    fn hand_over(&mut self, index: usize) {
        let from = *self.dice.pick(&[101, 103, NEXT]).unwrap();
        let choice = self.dice.roll(3 * CHOICES);
        // What a copy that is put back knows nothing of, nobody removes.
        let is_kept = choice % 6 == 1;
        let choice = if self.put_backs && is_kept {
            choice + 1
        } else {
            choice
        };
        self.postgres.hand_over(index, from, choice);
    }

    /// And meanwhile the table may get another label, which the stream tells first.
    fn rename_schema(&mut self, index: usize, oid: u32) {
        self.postgres.rename_schema(index, oid);
        if self.dice.once_in(2) {
            let choice = self.dice.roll(CHOICES);
            self.relabel_at_once(oid, choice);
        }
    }

    /// In a transaction of its own, which everybody sees at once.
    fn relabel_at_once(&mut self, oid: u32, choice: u64) {
        let labeller = self.postgres.begin();
        self.postgres
            .relabel(labeller, oid, |fingerprint| definition(oid, fingerprint, choice));
        self.postgres.commit(labeller);
        self.postgres.finish(labeller);
    }

    fn now(&self) -> Instant {
        at(&self.setting, lock(&self.server).redis.now)
    }

    fn id(&mut self) -> Id {
        self.dice.roll(u64::from(IDS)) as Id
    }

    /// A SELECT reads rows of a cached table; its message enters the WAL later.
    fn select(&mut self) {
        let oid = *self.dice.pick(&[NARROW, NEXT, 103, 103]).unwrap();
        let snapshot = self.postgres.snapshot();
        let (id, other) = (self.id(), self.id());
        if let Some(definition) = self
            .postgres
            .label(oid, &snapshot)
            .filter(|label| label.mode == Mode::Cache && !self.postgres.is_locked(oid))
        {
            let rows = [id, other]
                .into_iter()
                .filter_map(|id| self.postgres.row(oid, id, &snapshot))
                .collect();
            let broken = lock(&self.server).redis.broken;
            let snapshot = if broken == Broken::GateByLsn {
                self.postgres.snapshot_by_lsn()
            } else {
                snapshot
            };
            self.captures.push(Wal::Capture {
                lsn: 0,
                definition,
                snapshot,
                rows,
            });
        }
    }

    /// `verify --repair`: the keys of a table are to be read again. It may have been labelled just then, while somebody was writing.
    fn repair(&mut self) {
        let oid = *self.dice.pick(&OIDS).unwrap();
        if self.postgres.open.len() < 4 && self.dice.once_in(2) {
            let writer = self.postgres.begin();
            for id in 0..IDS {
                self.postgres.write(writer, oid, id, 7, 0);
            }
            let choice = self.dice.roll(CHOICES);
            self.relabel_at_once(oid, choice);
        }
        if let Some(label) = self.postgres.label(oid, &self.postgres.snapshot()) {
            let reread = Request::Reread {
                relation: oid,
                keys: (0..IDS)
                    .filter(|id| label.is_short(*id))
                    .map(|id| label.key(id))
                    .collect(),
            };
            let content = reread.encode("s");
            self.postgres.message(|lsn| Wal::Marker { lsn, content });
        }
    }

    fn log_capture(&mut self) {
        if let Some(Wal::Capture {
            definition,
            snapshot,
            rows,
            ..
        }) = self.captures.pop()
        {
            self.postgres.message(|lsn| Wal::Capture {
                lsn,
                definition,
                snapshot,
                rows,
            });
        }
    }

    /// Everything comes to rest: the faults end, transactions end, and the sink catches up. Then Redis is what it must be.
    fn settle(&mut self) -> Result<(), Wrong> {
        self.postgres.end_all();
        while !lock(&self.server).delayed.is_empty() {
            self.arrive();
        }
        while !self.captures.is_empty() {
            self.log_capture();
        }
        let mut calm = 0;
        for round in 0..4_000u64 {
            let mut server = lock(&self.server);
            (server.fault, server.purge_fault) = (None, None);
            drop(server);
            lock(&self.server).redis.now += 10;
            let now = self.now();
            if round % 4 == 0 {
                self.feedback()?;
                let mut server = lock(&self.server);
                server.redis.saved = server.redis.steps.len();
            }
            if round % 4 == 1
                && let Some(sink) = &mut self.sink
            {
                let checked = sink.check(self.setting.durability, now);
                self.outcome(checked)?;
            }
            let Some(sink) = &mut self.sink else {
                self.begin()?;
                continue;
            };
            let mut result = sink.frame(&self.postgres, &mut self.dice, 30).map(drop);
            result = result.and_then(|()| sink.piece().map(drop));
            result = result.and_then(|()| sink.keepalive(&self.postgres));
            sink.flush();
            result = result.and_then(|()| sink.apply(now).map(drop));
            for table_worker in [true, false] {
                result = result
                    .and_then(|()| sink.work(&mut self.postgres, &self.server, &mut self.dice, table_worker));
            }
            let is_done = sink.is_idle()
                && sink
                    .stream
                    .as_ref()
                    .is_some_and(|stream| stream.is_at_end(&self.postgres));
            calm = if is_done { calm + 1 } else { 0 };
            self.outcome(result)?;
            self.look()?;
            if calm > 4
                && self
                    .postgres
                    .slot
                    .is_some_and(|slot| slot.confirmed == self.postgres.end)
            {
                let server = lock(&self.server);
                return self
                    .checks
                    .compare(&server.redis, &self.postgres.history, self.postgres.end);
            }
        }
        Err("the sink did not catch up".to_owned())
    }
}
