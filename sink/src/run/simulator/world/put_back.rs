//! The files of Postgres, slot included, are copied and put back, and it writes on: up to the position that Redis has, and beyond. Or
//! the copy is that of a standby, which is promoted: then it is on another timeline.

use super::super::link::lock;
use super::super::postgres::{OIDS, Postgres, Wal};
use super::{World, Wrong};
use crate::continuity::Last;
use crate::transaction::{Commit, Part};

/// What was lost when a copy was put back.
pub(super) struct Lost {
    /// Where the copy ended.
    from: u64,
    /// The WAL as it was, and where that ended.
    wal: Vec<Wal>,
    end: u64,
}

impl World {
    pub(super) fn copy_or_put_back(&mut self) {
        if !self.dice.once_in(3) {
            return;
        }
        let Some(copy) = self.copy.take() else {
            if let Some(slot) = &mut self.postgres.slot
                && self.dice.once_in(2)
            {
                // It was stopped in good order.
                slot.persisted = slot.confirmed;
            }
            self.copy = Some(self.postgres.copy());
            return;
        };
        self.put_back(copy, self.failovers);
        // Whatever it writes before a sink looks.
        for _ in 0..self.dice.roll(60) {
            self.write();
        }
        if self.dice.once_in(2) {
            self.write_beyond();
        }
    }

    /// Redis has all that a copy has, then keys are removed for a transaction that the copy does not have, and it is put back.
    pub(super) fn purge_and_put_back(&mut self) -> Result<(), Wrong> {
        self.setting.purge_keys = 0;
        self.settle()?;
        self.copy = Some(self.postgres.copy());
        let oid = *self.dice.pick(&OIDS).unwrap();
        let index = self.postgres.begin();
        if self.dice.once_in(3) {
            self.postgres.unlabel(index, oid, false);
        } else {
            self.postgres.truncate(index, oid);
        }
        self.postgres.end_all();
        for _ in 0..self.dice.roll(20) {
            self.write();
        }
        lock(&self.server).purge_fault = Some(self.dice.once_in(4));
        let mut is_cut = false;
        for _ in 0..400 {
            is_cut = lock(&self.server).purge_fault.is_none() && self.sink.is_none();
            if is_cut {
                break;
            }
            self.drive()?;
            self.look()?;
        }
        let Some(copy) = self.copy.take().filter(|_| is_cut) else {
            return Ok(());
        };
        // Some of its keys are gone, and it may be that nothing else tells.
        self.put_back(copy, self.failovers);
        for _ in 0..self.dice.roll(6) * self.dice.roll(6) {
            self.write();
        }
        if self.dice.once_in(2) {
            self.write_beyond();
        }
        Ok(())
    }

    /// A session has ended between removing keys and the transaction that they go with: a copy of before that may not have it.
    pub(super) fn put_back_in_purge(&mut self) {
        let is_purging = || {
            let progress = lock(&self.server).redis.progress();
            progress.is_some_and(|progress| progress.purging.is_some())
        };
        if self.copy.is_none() || !is_purging() || !self.dice.once_in(4) {
            return;
        }
        if let Some(copy) = self.copy.take() {
            self.put_back(copy, self.failovers);
            for _ in 0..self.dice.roll(30) {
                self.write();
            }
            if self.dice.once_in(2) {
                self.write_beyond();
            }
        }
    }

    /// WAL of no interest, up to where what was lost had ended, and a little more.
    fn write_beyond(&mut self) {
        let ended = self.lost.last().map_or(0, |lost| lost.end);
        let position = ended + 8 * self.dice.roll(8);
        self.postgres.write_up_to(position);
    }

    /// Everything is made anew behind what a copy has, and that is all that Redis knows when the copy is put back.
    pub(super) fn begin_anew_and_put_back(&mut self) -> Result<(), Wrong> {
        let copy = self.postgres.copy();
        for _ in 0..self.dice.roll(60) {
            self.write();
        }
        self.settle()?;
        self.kill();
        lock(&self.server).redis.flush_all();
        self.checks.forget();
        self.gap_is_due = true;
        self.settle()?;
        self.kill();
        self.put_back(copy, false);
        self.write_beyond();
        Ok(())
    }

    fn put_back(&mut self, mut copy: Postgres, is_promoted: bool) {
        if let Some(mut sink) = self.sink.take()
            && self.dice.once_in(2)
        {
            sink.stream = None;
            self.stalled.push(sink);
        }
        if let Some(mut starting) = self.starting.take()
            && self.dice.once_in(2)
        {
            starting.stream = None;
            self.stalled_starting.push(starting);
        }
        self.captures.clear();
        let (from, has_slot) = (copy.end, copy.slot.is_some());
        if is_promoted {
            copy.promote();
        }
        let lost = self.postgres.put_back(copy);
        if lock(&self.server).redis.trace {
            println!(
                "Postgres is put back from {} to {from}, timeline {}",
                lost.end,
                self.postgres.timeline()
            );
        }
        self.lost.push(Lost {
            from,
            end: lost.end,
            wal: lost.wal,
        });
        self.gap_is_due |= !has_slot;
        self.checks.forget();
    }

    /// Whether Redis holds what Postgres does not, or would miss what it has. Else a gap would be a false alarm.
    pub(super) fn is_diverged(&self) -> bool {
        self.is_elsewhere() || self.has_lost_part() || self.has_lost_purge() || self.has_strayed()
    }

    /// It is on another timeline, and not known to have all that Redis has seen.
    fn has_strayed(&self) -> bool {
        let (redis, postgres) = (&lock(&self.server).redis, &self.postgres);
        let Some(progress) = redis
            .progress()
            .filter(|progress| progress.timeline != postgres.timeline())
        else {
            return false;
        };
        let left = postgres.left(progress.timeline);
        let has = |commit: u64| left.is_some_and(|left| commit < left);
        let purged = progress.purging.map(|purging| purging.commit);
        left.is_none_or(|left| progress.lsn.0 > left)
            || postgres.slot.is_none_or(|slot| !slot.failover)
            || progress.part.is_some_and(|part| !has(part.commit_lsn.0))
            || purged.is_some_and(|commit| commit.is_none_or(|commit| !has(commit.lsn.0)))
    }

    /// Up to the position.
    pub(super) fn is_elsewhere(&self) -> bool {
        let redis = &lock(&self.server).redis;
        let (Some(progress), Some(since)) = (redis.progress(), self.lost.get(redis.incarnation()..)) else {
            return false;
        };
        let Some(common) = since.iter().map(|lost| lost.from).min() else {
            return false;
        };
        let at = progress.lsn.0;
        if progress.resync {
            // Everything is to be made anew from there on.
            return at > self.postgres.end;
        }
        // What begins anew has read nothing until it names a transaction, so what was before its beginning does not matter.
        let from = match progress.last {
            Some(Last::NoneSince(beginning)) => common.max(beginning.0),
            _ => common,
        };
        // A position of another history may be in the middle of a record of this one.
        let is_between = |entry: &Wal| match entry {
            Wal::Commit { lsn, records, .. } => *lsn >= from && *lsn < at && !records.is_empty(),
            _ => false,
        };
        let mirrored = since.first().map_or(&[][..], |lost| &lost.wal);
        at > self.postgres.end || mirrored.iter().any(is_between) || self.postgres.wal.iter().any(is_between)
    }

    /// Behind the position: a transaction that keys were removed for.
    fn has_lost_purge(&self) -> bool {
        let progress = lock(&self.server).redis.progress();
        let purged = progress.and_then(|progress| {
            let commit = progress.purging?.commit?;
            (!progress.resync && commit.lsn >= progress.lsn).then_some(commit)
        });
        let has = |purged: Commit| {
            let mut wal = self.postgres.wal.iter();
            wal.any(|entry| match entry {
                Wal::Commit { lsn, time, .. } => *lsn == purged.lsn.0 && *time as i64 == purged.time,
                _ => false,
            })
        };
        purged.is_some_and(|purged| !has(purged))
    }

    /// Behind the position: a part of a transaction.
    fn has_lost_part(&self) -> bool {
        let part = lock(&self.server)
            .redis
            .progress()
            .and_then(|progress| progress.part);
        let has = |part: Part| {
            let mut wal = self.postgres.wal.iter();
            wal.any(|entry| match entry {
                Wal::Commit { lsn, time, .. } => {
                    *lsn == part.commit_lsn.0 && Some(*time as i64) == part.commit_time
                }
                _ => false,
            })
        };
        part.is_some_and(|part| !has(part))
    }
}
