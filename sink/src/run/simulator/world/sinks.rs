//! What the sink does in a schedule: it begins, claims, goes on, and tells the server how far Redis is.

use super::super::link::lock;
use super::super::redis::{Broken, Redis};
use super::super::sink::{Session, at, shake};
use super::{WINDOW, World, Wrong};
use crate::config::Durability;
use crate::error::{Class, Error};
use crate::run::decide::Found;

impl World {
    /// The sink goes on, or begins.
    pub(super) fn drive(&mut self) -> Result<(), Wrong> {
        let now = self.now();
        let Some(sink) = &mut self.sink else {
            return self.begin();
        };
        let result = match self.dice.roll(16) {
            0..=4 => sink.frame(&self.postgres, &mut self.dice, 6).map(drop),
            5 => sink.keepalive(&self.postgres),
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

    /// The same while nothing is applied.
    pub(super) fn go_ahead(&mut self) -> Result<(), Wrong> {
        let Some(sink) = &mut self.sink else {
            return self.begin();
        };
        let result = match self.dice.roll(8) {
            0 | 1 => sink.frame(&self.postgres, &mut self.dice, 6).map(drop),
            2 => sink.keepalive(&self.postgres),
            3 | 4 => sink.piece().map(drop),
            role => sink.work(&mut self.postgres, &self.server, &mut self.dice, role > 5),
        };
        self.outcome(result)
    }

    /// What an error of the session means.
    pub(super) fn outcome(&mut self, result: Result<(), Error>) -> Result<(), Wrong> {
        let Err(error) = result else { return Ok(()) };
        let Some(sink) = self.sink.take() else {
            return Err(format!("{error}"));
        };
        let epoch = lock(&self.server).redis.progress().map(|progress| progress.epoch);
        // A stalled sink that had the slot before may still claim; then this one has to go.
        let was_fenced = epoch.is_some_and(|epoch| epoch != sink.epoch());
        if let Some(why) = error.gap_reason()
            && !was_fenced
        {
            // A process that ends now has it forgotten, and the next one finds it again.
            self.found = (!self.dice.once_in(3)).then(|| Found {
                why: why.to_owned(),
                epoch: sink.epoch(),
                slot_is_lost: false,
            });
            // Redis may have been emptied, and the session not know it yet.
            return if self.is_diverged() || epoch.is_none() {
                Ok(())
            } else {
                Err(format!("a gap was found where none should be: {why}"))
            };
        }
        if error.class() != Class::Retry && !was_fenced {
            return Err(format!("the sink would have stopped: {error}"));
        }
        Ok(())
    }

    pub(super) fn begin(&mut self) -> Result<(), Wrong> {
        if let Some(starting) = self.starting.take() {
            if self.dice.once_in(3) {
                self.starting = Some(starting);
                return Ok(());
            }
            return match Session::claim(&self.setting, starting, &self.server, &mut self.postgres) {
                Ok(session) => {
                    self.was_durable = 0;
                    self.sink = Some(session);
                    Ok(())
                }
                Err(error) if error.class() == Class::Retry => Ok(()),
                Err(error) => Err(format!("the sink would have stopped at its claim: {error}")),
            };
        }
        match shake(
            &self.setting,
            &self.server,
            &mut self.postgres,
            &mut self.dice,
            self.found.take().as_ref(),
        ) {
            Ok((_, Some(gap))) if !self.gap_is_due && !self.late_claim && !self.is_diverged() => {
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
    pub(super) fn feedback(&mut self) -> Result<(), Wrong> {
        let (now, durable, least, broken, has_progress) = {
            let redis = &lock(&self.server).redis;
            let durable = self.durable_steps(redis);
            (
                redis.now,
                // A late claim that begins anew takes the position back, and nothing else.
                if self.late_claim {
                    (0..=durable)
                        .map(|steps| redis.position_after(steps))
                        .max()
                        .unwrap_or(0)
                } else {
                    redis.position_after(durable)
                },
                redis.least_position(durable),
                redis.broken,
                redis.progress().is_some(),
            )
        };
        let is_elsewhere = self.is_elsewhere() && !self.late_claim;
        let Some(sink) = &mut self.sink else { return Ok(()) };
        let Some(mut flushed) = sink.feedback(at(&self.setting, now)) else {
            return Ok(());
        };
        if broken == Broken::ConfirmAhead {
            flushed = sink.shared.applied().0;
        }
        if let Some(slot) = &mut self.postgres.slot {
            // An emptied Redis has nothing to be safe, and the gap is seen by that the progress is gone.
            if flushed > durable.max(slot.confirmed).max(self.was_durable) && has_progress {
                return Err(format!(
                    "{flushed} is confirmed, but only {durable} is durable (I1)"
                ));
            }
            if is_elsewhere && flushed > slot.confirmed {
                return Err(format!(
                    "{flushed} is confirmed, but what Redis has there is of another history (I1)"
                ));
            }
            if lock(&self.server).redis.trace {
                println!("confirmed {}, now {flushed}; durable {durable}", slot.confirmed);
            }
            slot.confirmed = slot.confirmed.max(flushed);
            self.gap_is_due &= least < slot.confirmed;
            if self.dice.once_in(2) {
                slot.persisted = slot.confirmed;
            }
        }
        Ok(())
    }

    pub(super) fn durable_steps(&self, redis: &Redis) -> usize {
        match self.setting.durability {
            Durability::Memory { .. } => redis.old_steps(WINDOW),
            _ => redis.saved,
        }
    }
}
