//! One schedule: Postgres, Redis, sinks and what happens to them, step by step, by the dice of one seed.

use std::time::{Duration, Instant};

use super::check::Checks;
use super::dice::Dice;
use super::link::{self, Fault, lock};
use super::postgres::{IDS, OIDS, Postgres, Wal, definition};
use super::redis::Broken;
use super::sink::{Session, Setting, Starting, at, shake};
use super::table::Id;
use crate::config::Durability;
use crate::error::{Class, Error};
use crate::plan::RedisKeys;
use crate::run::planning::Limits;

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
    late_claim: bool,
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
                value_bytes: crate::plan::VALUE_BYTES,
            },
            gate_bytes: if dice.once_in(2) { 64 } else { 4096 },
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
                let choice = dice.roll(24);
                postgres.relabel(index, oid, |fingerprint| definition(oid, fingerprint, choice));
            }
        }
        postgres.end_all();
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
            late_claim: false,
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
        }
        self.settle()
    }

    fn step(&mut self) -> Result<(), Wrong> {
        match self.dice.roll(40) {
            0..=13 => self.write(),
            14 => self.select(),
            15 => self.log_capture(),
            16..=33 => self.drive()?,
            34 => self.feedback()?,
            35 => lock(&self.server).redis.now += self.dice.roll(40),
            36 => self.stalled_acts()?,
            37 if self.dice.once_in(3) => self.fail(),
            38 if self.dice.once_in(4) => self.end_of_session()?,
            39 if self.dice.once_in(5) => self.lose()?,
            _ => {}
        }
        self.look()
    }

    /// The invariants, wherever the last step has left the world.
    fn look(&mut self) -> Result<(), Wrong> {
        let server = lock(&self.server);
        self.checks.look(&server.redis, &self.postgres.history)
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
            22 if self.dice.once_in(3) => match self.dice.roll(5) {
                0 => self.postgres.unlabel(index, oid),
                1 => self.postgres.rewrite(index, oid),
                _ => {
                    let choice = self.dice.roll(24);
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

    fn now(&self) -> Instant {
        at(&self.setting, lock(&self.server).redis.now)
    }

    fn id(&mut self) -> Id {
        self.dice.roll(u64::from(IDS)) as Id
    }

    /// A SELECT reads rows of the cached table; its message enters the WAL later.
    fn select(&mut self) {
        let (oid, snapshot) = (103, self.postgres.snapshot());
        let (id, other) = (self.id(), self.id());
        if let Some(definition) = self
            .postgres
            .label(oid, &snapshot)
            .filter(|_| !self.postgres.is_locked(oid))
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

    /// The sink goes on, or begins.
    fn drive(&mut self) -> Result<(), Wrong> {
        let now = self.now();
        let Some(sink) = &mut self.sink else {
            return self.begin();
        };
        let result = match self.dice.roll(16) {
            0..=4 => sink.frame(&self.postgres, &mut self.dice, 6).map(drop),
            5 => {
                sink.keepalive(&self.postgres);
                Ok(())
            }
            6 => sink.piece().map(drop),
            7 | 8 => {
                sink.flush();
                Ok(())
            }
            9..=11 => sink.apply(now).map(drop),
            12 => sink.check(self.setting.durability, now),
            13 | 14 => sink.work(&mut self.postgres, &self.server, &mut self.dice, true),
            _ => sink.work(&mut self.postgres, &self.server, &mut self.dice, false),
        };
        self.outcome(result)
    }

    /// What an error of the session means.
    fn outcome(&mut self, result: Result<(), Error>) -> Result<(), Wrong> {
        let Err(error) = result else { return Ok(()) };
        let Some(sink) = self.sink.take() else {
            return Err(format!("{error}"));
        };
        let epoch = lock(&self.server).redis.progress().map(|progress| progress.epoch);
        // A stalled sink that had the slot before may still claim; then this one has to go.
        let was_fenced = epoch.is_some_and(|epoch| epoch != sink.epoch());
        if error.class() != Class::Retry && !was_fenced {
            return Err(format!("the sink would have stopped: {error}"));
        }
        Ok(())
    }

    fn begin(&mut self) -> Result<(), Wrong> {
        if let Some(starting) = self.starting.take() {
            if self.dice.once_in(3) {
                self.starting = Some(starting);
                return Ok(());
            }
            return match Session::claim(&self.setting, starting, &self.server, &mut self.postgres) {
                Ok(session) => {
                    self.sink = Some(session);
                    Ok(())
                }
                Err(error) if error.class() == Class::Retry => Ok(()),
                Err(error) => Err(format!("the sink would have stopped at its claim: {error}")),
            };
        }
        match shake(&self.setting, &self.server, &mut self.postgres, &mut self.dice) {
            Ok((_, Some(gap))) if !self.gap_is_due && !self.late_claim => {
                Err(format!("a gap where none should be: {gap}"))
            }
            Ok((starting, _)) => {
                // Until its beginning is durable, Redis may lose it again.
                self.gap_is_due |= starting.is_fresh();
                self.starting = Some(starting);
                Ok(())
            }
            Err(error) if error.class() == Class::Retry => Ok(()),
            Err(error) => Err(format!("the sink would have stopped at its start: {error}")),
        }
    }

    /// The receiver tells the server how far Redis is. INVARIANT I1.
    fn feedback(&mut self) -> Result<(), Wrong> {
        let (now, durable, least, broken, has_progress) = {
            let redis = &lock(&self.server).redis;
            let durable = self.durable_steps(redis);
            (
                redis.now,
                redis.position_after(durable),
                redis.least_position(durable),
                redis.broken,
                redis.progress().is_some(),
            )
        };
        let Some(sink) = &mut self.sink else { return Ok(()) };
        let Some(mut flushed) = sink.feedback(at(&self.setting, now)) else {
            return Ok(());
        };
        if broken == Broken::ConfirmAhead {
            flushed = sink.shared.applied().0;
        }
        if let Some(slot) = &mut self.postgres.slot {
            // An emptied Redis has nothing to be safe, and the gap is seen by that the progress is gone.
            if flushed > durable.max(slot.confirmed) && has_progress && broken != Broken::ConfirmAhead {
                return Err(format!(
                    "{flushed} is confirmed, but only {durable} is durable (I1)"
                ));
            }
            self.gap_is_due &= least < slot.confirmed;
            if lock(&self.server).redis.trace {
                println!("confirmed {}, now {flushed}; durable {durable}", slot.confirmed);
            }
            slot.confirmed = slot.confirmed.max(flushed);
            if self.dice.once_in(2) {
                slot.persisted = slot.confirmed;
            }
        }
        Ok(())
    }

    fn durable_steps(&self, redis: &super::redis::Redis) -> usize {
        match self.setting.durability {
            Durability::Memory { .. } => redis.old_steps(WINDOW),
            _ => redis.saved,
        }
    }

    /// A sink that was stalled wakes up. Whatever it does, Redis does not change.
    fn stalled_acts(&mut self) -> Result<(), Wrong> {
        if self.dice.once_in(4)
            && let Some(starting) = self.stalled_starting.pop()
        {
            // It has lost the slot, but claims all the same, and finds out with its first look at the stream.
            let claimed = Session::claim(&self.setting, starting, &self.server, &mut self.postgres);
            // If it had decided to begin anew, the position goes back while the other one still confirms: a gap for sure.
            self.late_claim = true;
            return match claimed {
                Err(error) if error.class() != Class::Retry => Err(format!("a late claim: {error}")),
                _ => Ok(()),
            };
        }
        let count = self.stalled.len() as u64;
        if count == 0 {
            return Ok(());
        }
        let index = self.dice.roll(count) as usize;
        let now = self.now();
        let stalled = &mut self.stalled[index];
        stalled.flush();
        let is_current = lock(&self.server)
            .redis
            .progress()
            .is_some_and(|progress| progress.epoch == stalled.epoch());
        let before = lock(&self.server).redis.steps.len();
        let result = stalled.apply(now);
        let wrote = lock(&self.server).redis.steps.len() != before;
        let broken = lock(&self.server).redis.broken;
        if wrote && !is_current && !matches!(broken, Broken::NoFence | Broken::ProgressBefore) {
            return Err("a sink wrote after another one had taken over".to_owned());
        }
        if result.is_err() {
            self.stalled.remove(index);
        }
        Ok(())
    }

    /// Something on the way to Redis fails with the next commands, whoever sends them.
    fn fail(&mut self) {
        let fault = match self.dice.roll(3) {
            0 => Fault::LoseAnswer,
            1 => Fault::Cut(self.dice.roll(12) as usize),
            _ => Fault::Refuse(self.dice.roll(8) as usize),
        };
        lock(&self.server).fault = Some(fault);
    }

    fn end_of_session(&mut self) -> Result<(), Wrong> {
        let now = self.now();
        match self.dice.roll(6) {
            // A clean stop.
            0 => {
                let Some(mut sink) = self.sink.take() else {
                    return Ok(());
                };
                let Ok(last) = sink.stop(now) else { return Ok(()) };
                if let (Some(slot), Some(last)) = (&mut self.postgres.slot, last) {
                    slot.confirmed = slot.confirmed.max(last);
                    // If Redis loses this now, that is more than the window allows.
                    self.gap_is_due |= matches!(self.setting.durability, Durability::Memory { .. });
                }
            }
            // It stalls, the server gives the slot to somebody else.
            1 | 2 => {
                if let Some(mut sink) = self.sink.take() {
                    sink.stream = None;
                    self.stalled.push(sink);
                }
                if let Some(mut starting) = self.starting.take() {
                    starting.stream = None;
                    self.stalled_starting.push(starting);
                }
            }
            // The server crashes and forgets what was confirmed since its checkpoint.
            3 => {
                self.kill();
                if let Some(slot) = &mut self.postgres.slot {
                    slot.confirmed = slot.persisted;
                }
            }
            _ => self.kill(),
        }
        Ok(())
    }

    fn kill(&mut self) {
        self.sink = None;
        self.starting = None;
    }

    /// Redis loses something, or Postgres its slot.
    fn lose(&mut self) -> Result<(), Wrong> {
        let mut server = lock(&self.server);
        let redis = &mut server.redis;
        let (all, durable) = (redis.steps.len(), self.durable_steps(redis));
        if redis.trace {
            println!("Redis has {all} steps, {durable} of them durable, and will lose some");
        }
        match self.dice.roll(if self.disasters { 8 } else { 4 }) {
            0 => redis.saved = all,
            1 | 2 => redis.roll_back_to(durable.max(all.saturating_sub(self.dice.roll(6) as usize))),
            3 => {
                let keys: Vec<_> = redis
                    .data
                    .keys()
                    .filter(|key| key.starts_with(b"c"))
                    .cloned()
                    .collect();
                if let Some(key) = self.dice.pick(&keys) {
                    redis.expire(key);
                }
                return Ok(());
            }
            4 => {
                redis.roll_back_to(all.saturating_sub(self.dice.roll(30) as usize));
                self.gap_is_due = true;
            }
            5 => {
                redis.flush_all();
                self.gap_is_due = true;
            }
            6 => {
                drop(server);
                self.kill();
                self.postgres.slot = None;
                self.gap_is_due = true;
                return Ok(());
            }
            _ => return Ok(()),
        }
        self.checks.forget();
        Ok(())
    }

    /// Everything comes to rest: the faults end, transactions end, and the sink catches up. Then Redis is what it must be.
    fn settle(&mut self) -> Result<(), Wrong> {
        self.postgres.end_all();
        while !self.captures.is_empty() {
            self.log_capture();
        }
        let mut calm = 0;
        for round in 0..4_000u64 {
            lock(&self.server).fault = None;
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
            sink.keepalive(&self.postgres);
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
