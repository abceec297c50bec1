//! What befalls a schedule: sinks that stall and wake up, commands that fail, ends of sessions, and a Redis or a slot that is
//! lost.

use super::super::link::{Fault, lock};
use super::super::sink::Session;
use super::{World, Wrong};
use crate::config::Durability;
use crate::error::Class;

impl World {
    /// A sink that was stalled wakes up. Whatever it does, Redis does not change.
    pub(super) fn stalled_acts(&mut self) -> Result<(), Wrong> {
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
        if wrote && !is_current {
            return Err("a sink wrote after another one had taken over (I4)".to_owned());
        }
        if result.is_err() {
            self.stalled.remove(index);
        }
        Ok(())
    }

    /// Something on the way to Redis fails with the next commands, whoever sends them.
    pub(super) fn fail(&mut self) {
        let fault = match self.dice.roll(4) {
            0 => Fault::LoseAnswer,
            1 => Fault::Cut(self.dice.roll(12) as usize),
            2 => Fault::Delay,
            _ => Fault::Refuse(self.dice.roll(8) as usize),
        };
        let purge_fault = self.dice.once_in(2).then(|| self.dice.once_in(2));
        let mut server = lock(&self.server);
        server.purge_fault = server.purge_fault.or(purge_fault);
        server.fault = Some(fault);
        // In the middle of a claim, or of a purge.
        server.fault_in = self.dice.roll(2) * self.dice.roll(10);
    }

    /// What somebody sent who has given up arrives after all.
    pub(super) fn arrive(&mut self) {
        let mut server = lock(&self.server);
        let (steps, epoch) = (
            server.redis.steps.len(),
            server.redis.progress().map(|progress| progress.epoch),
        );
        if !server.arrive() || server.redis.steps.len() == steps {
            return;
        }
        let progress = server.redis.progress();
        // A claim that begins anew takes the position back while the other one still confirms: a gap for sure.
        self.late_claim |= progress.is_some_and(|progress| progress.resync && Some(progress.epoch) != epoch);
    }

    /// Redis loses its last steps several times, and each time what heals it has hardly begun.
    pub(super) fn lose_again_and_again(&mut self) -> Result<(), Wrong> {
        for _ in 0..2 + self.dice.roll(4) {
            self.lose()?;
            for _ in 0..self.dice.roll(60) {
                if self.dice.once_in(8) {
                    self.write();
                }
                self.drive()?;
                self.look()?;
                if self.dice.once_in(10) {
                    lock(&self.server).redis.now += self.dice.roll(40);
                    self.feedback()?;
                    self.look()?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn end_of_session(&mut self) -> Result<(), Wrong> {
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

    pub(super) fn kill(&mut self) {
        self.sink = None;
        self.starting = None;
    }

    /// Redis loses something, or Postgres its slot.
    pub(super) fn lose(&mut self) -> Result<(), Wrong> {
        let mut server = lock(&self.server);
        let redis = &mut server.redis;
        let (all, durable) = (redis.steps.len(), self.durable_steps(redis));
        let keeps = all % 2 == 0;
        if redis.trace {
            println!("Redis has {all} steps, {durable} of them durable, and will lose some");
        }
        match self.dice.roll(if self.disasters { 8 } else { 4 }) {
            0 => redis.saved = all,
            1 | 2 => {
                let left = durable.max(all.saturating_sub(self.dice.roll(6) as usize));
                redis.roll_back_to(left, keeps);
            }
            3 => {
                let keys: Vec<_> = redis
                    .data
                    .keys()
                    .filter(|key| self.postgres.history.is_cached(key))
                    .cloned()
                    .collect();
                if let Some(key) = self.dice.pick(&keys) {
                    redis.expire(key);
                }
                return Ok(());
            }
            4 => {
                // The session that has seen it so may not know of the loss before this one yet.
                self.was_durable = self.was_durable.max(redis.position_after(durable));
                redis.roll_back_to(all.saturating_sub(self.dice.roll(30) as usize), keeps);
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
}
