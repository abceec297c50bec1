//! Tables that could not be read: a right is lacking, a file is damaged, a function raises an error, somebody has locked it, its label
//! does not fit it. Each of them is told of and tried again after a while; the others and the stream go on. Every worker has a list of
//! its own.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::catalog::Misfit;
use crate::error::Error;

/// The pause after the first failure; twice as long after each further one.
pub(super) const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// A lock is ordinary, and gone some time.
pub(super) const LOCKED_PAUSE_MAX: Duration = Duration::from_secs(4);
/// How often that is told of, and a label that does not fit.
const TOLD_EVERY: Duration = Duration::from_secs(60);
/// Of so many tables that are locked at once it is told by whom.
const NAMED_MAX: usize = 8;

/// The list.
#[derive(Debug, Default)]
pub(super) struct Troubles {
    tables: BTreeMap<u32, Trouble>,
}

#[derive(Debug)]
struct Trouble {
    until: Instant,
    pause: Duration,
    /// When a lock was told of.
    told: Option<Instant>,
}

impl Troubles {
    /// Tells of an error that belongs to one table, and has the table left alone for a while. Any other error comes back.
    /// `who` has the table locked, if that is what the error says.
    pub(super) fn take(
        &mut self,
        relation: u32,
        table: &str,
        error: Error,
        who: impl FnOnce() -> String,
    ) -> Result<(), Error> {
        if !error.is_of_one_table() {
            return Err(error);
        }
        if error.is_of_a_lock() {
            self.locked(relation, table, who);
            return Ok(());
        }
        let pause = self.note(relation, Instant::now(), PAUSE_MIN, PAUSE_MAX);
        tracing::error!(
            table,
            next = error.next_command(),
            "{error}; the other tables go on, and this one is tried again in {} s",
            pause.as_secs()
        );
        Ok(())
    }

    /// Whether the table was locked when it was to be read, and is so still: `locker` looks. A lock that is not had in time is an ERROR
    /// line in the server's log each time, a look is none.
    pub(super) fn is_locked_still(
        &mut self,
        relation: u32,
        table: &str,
        locker: impl FnOnce() -> Option<String>,
    ) -> bool {
        let was_locked = |trouble: &Trouble| trouble.told.is_some();
        if !self.tables.get(&relation).is_some_and(was_locked) {
            return false;
        }
        let Some(who) = locker() else { return false };
        self.locked(relation, table, || who);
        true
    }

    /// Tells of a table that is locked, and has it left alone for a while.
    fn locked(&mut self, relation: u32, table: &str, who: impl FnOnce() -> String) {
        if self.note_lock(relation, Instant::now()) {
            tell_of_lock(table, &who());
        }
    }

    /// Has a table left alone for a while that is not in trouble.
    pub(super) fn put_off(&mut self, relation: u32, min: Duration, max: Duration) {
        self.note(relation, Instant::now(), min, max);
    }

    /// Has one that is in trouble left alone for at least so long from now on.
    pub(super) fn leave_for(&mut self, relation: u32, time: Duration) {
        if let Some(trouble) = self.tables.get_mut(&relation) {
            trouble.until = trouble.until.max(Instant::now() + time);
        }
    }

    fn note(&mut self, relation: u32, now: Instant, min: Duration, max: Duration) -> Duration {
        let before = self.tables.get(&relation);
        let pause = before.map_or(min, |before| (before.pause * 2).clamp(min, max));
        let trouble = Trouble {
            until: now + pause,
            pause,
            told: before.and_then(|before| before.told),
        };
        self.tables.insert(relation, trouble);
        pause
    }

    /// True: it is to be told of.
    fn note_lock(&mut self, relation: u32, now: Instant) -> bool {
        self.note(relation, now, PAUSE_MIN, LOCKED_PAUSE_MAX);
        let Some(trouble) = self.tables.get_mut(&relation) else {
            return true;
        };
        let is_due = trouble
            .told
            .is_none_or(|told| now.saturating_duration_since(told) >= TOLD_EVERY);
        if is_due {
            trouble.told = Some(now);
        }
        is_due
    }

    /// It could be read.
    pub(super) fn clear(&mut self, relation: u32) {
        self.tables.remove(&relation);
    }

    /// When the next one has its turn, if one waits.
    pub(super) fn until_due(&self) -> Duration {
        let now = Instant::now();
        let waiting = self.tables.values().map(|trouble| trouble.until);
        let due = waiting.filter(|until| *until > now).min();
        due.map_or(Duration::MAX, |until| until - now)
    }

    /// Whether it is not its turn yet.
    pub(super) fn is_paused(&self, relation: u32) -> bool {
        self.is_paused_at(relation, Instant::now())
    }

    fn is_paused_at(&self, relation: u32, now: Instant) -> bool {
        self.tables
            .get(&relation)
            .is_some_and(|trouble| trouble.until > now)
    }
}

/// What comparing the catalog found of tables, as far as it was told of: that may be every few seconds.
#[derive(Debug, Default)]
pub(super) struct Findings {
    misfits: Told,
    locks: Told,
}

impl Findings {
    /// Tells of labels that do not fit, but for those that were told of a short while ago.
    pub(super) fn misfits(&mut self, misfits: &[Misfit]) {
        self.misfits
            .keep(|oid| misfits.iter().any(|misfit| misfit.oid == oid));
        for misfit in misfits {
            if self.misfits.is_due(misfit.oid, &misfit.problem, Instant::now()) {
                let error = misfit.error();
                tracing::error!(next = error.next_command(), "{error}");
            }
        }
    }

    /// The same for tables that are locked, by oid and name: of each by name where there are few. `who` has one locked.
    pub(super) fn locks(&mut self, locked: &[(u32, String)], mut who: impl FnMut(u32) -> String) {
        self.locks
            .keep(|oid| locked.iter().any(|(other, _)| *other == oid));
        let now = Instant::now();
        let mut due = locked.iter().filter(|(oid, _)| self.locks.is_due(*oid, "", now));
        for (oid, table) in due.by_ref().take(NAMED_MAX) {
            tell_of_lock(table, &who(*oid));
        }
        let others = due.count();
        if others > 0 {
            tracing::info!("{others} more tables are locked");
        }
    }
}

/// What was told of tables, and when.
#[derive(Debug, Default)]
struct Told {
    tables: BTreeMap<u32, (String, Instant)>,
}

impl Told {
    /// Forgets the others.
    fn keep(&mut self, is_so_still: impl Fn(u32) -> bool) {
        self.tables.retain(|oid, _| is_so_still(*oid));
    }

    /// True: it is new, or was not told of for a while, and is told of now.
    fn is_due(&mut self, oid: u32, what: &str, now: Instant) -> bool {
        let told = self.tables.get(&oid);
        let is_told = told
            .is_some_and(|(before, at)| before == what && now.saturating_duration_since(*at) < TOLD_EVERY);
        if !is_told {
            self.tables.insert(oid, (what.to_owned(), now));
        }
        !is_told
    }
}

fn tell_of_lock(table: &str, who: &str) {
    tracing::info!(
        table,
        "the table is locked, and read when it is not; the other tables go on: {who}"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pq::{ErrorKind, PqError};

    #[test]
    fn a_table_is_tried_again_after_a_growing_pause() {
        let mut troubles = Troubles::default();
        let now = Instant::now();
        assert_eq!(troubles.note(7, now, PAUSE_MIN, PAUSE_MAX), PAUSE_MIN);
        assert!(troubles.is_paused_at(7, now) && !troubles.is_paused_at(8, now));
        assert!(!troubles.is_paused_at(7, now + PAUSE_MIN));
        for _ in 0..9 {
            troubles.note(7, now, PAUSE_MIN, PAUSE_MAX);
        }
        assert_eq!(troubles.note(7, now, PAUSE_MIN, PAUSE_MAX), PAUSE_MAX);
        troubles.clear(7);
        assert!(!troubles.is_paused_at(7, now));
        assert_eq!(troubles.note(7, now, PAUSE_MIN, PAUSE_MAX), PAUSE_MIN);
    }

    #[test]
    fn a_lock_is_tried_soon_and_told_of_once_a_minute() {
        let mut troubles = Troubles::default();
        let mut now = Instant::now();
        assert!(troubles.note_lock(7, now));
        for _ in 0..9 {
            assert!(!troubles.note_lock(7, now));
            assert!(!troubles.is_paused_at(7, now + LOCKED_PAUSE_MAX));
            now += LOCKED_PAUSE_MAX;
        }
        assert!(troubles.note_lock(7, now + TOLD_EVERY));
        troubles.clear(7);
        assert!(troubles.note_lock(7, now));
    }

    /// The story: where thousands of tables have labels, or some are locked, reading the catalog took as long as the pause between two reads.
    #[test]
    fn what_takes_long_is_tried_again_later() {
        let mut troubles = Troubles::default();
        troubles.leave_for(7, Duration::from_secs(60));
        assert!(!troubles.is_paused(7));
        let now = Instant::now();
        troubles.note_lock(7, now);
        troubles.leave_for(7, Duration::ZERO);
        assert!(!troubles.is_paused_at(7, now + PAUSE_MIN));
        troubles.leave_for(7, Duration::from_secs(60));
        assert!(troubles.is_paused_at(7, now + Duration::from_secs(59)));
        // What is told of it, and the pauses without that, stay.
        assert!(!troubles.note_lock(7, now));
        assert!(!troubles.is_paused_at(7, now + LOCKED_PAUSE_MAX));
    }

    /// The story: of several tables that were locked one a minute was told of.
    #[test]
    fn each_finding_is_told_of_once_a_minute() {
        let mut told = Told::default();
        let now = Instant::now();
        assert!(told.is_due(7, "x", now) && told.is_due(8, "x", now));
        assert!(!told.is_due(7, "x", now) && told.is_due(8, "y", now));
        assert!(told.is_due(7, "x", now + TOLD_EVERY));
        told.keep(|oid| oid != 8);
        assert!(told.is_due(8, "y", now) && !told.is_due(7, "x", now));
    }

    #[test]
    fn who_locks_many_tables_is_looked_for_a_few_times() {
        let locked: Vec<(u32, String)> = (1..100).map(|oid| (oid, format!("t{oid}"))).collect();
        let (mut findings, mut asked) = (Findings::default(), Vec::new());
        for _ in 0..2 {
            findings.locks(&locked, |oid| {
                asked.push(oid);
                String::new()
            });
        }
        assert_eq!(asked, (1..=NAMED_MAX as u32).collect::<Vec<_>>());
    }

    #[test]
    fn what_is_no_tables_fault_comes_back() {
        let take = |state: &str| {
            let error = PqError {
                sqlstate: Some(state.to_owned()),
                ..PqError::new(ErrorKind::Server, "x")
            };
            Troubles::default().take(7, "t", Error::postgres("x", error), String::new)
        };
        for state in [
            "42501", "XX001", "42883", "22P02", "XX000", "55P03", "53200", "53400", "58030", "58P01",
        ] {
            assert!(take(state).is_ok(), "{state}");
        }
        for state in ["08006", "40001", "53300", "57P01", "28000"] {
            assert!(take(state).is_err(), "{state}");
        }
        assert!(
            Troubles::default()
                .take(7, "t", Error::bug("x"), String::new)
                .is_err()
        );
    }
}
