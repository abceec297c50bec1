//! Whether the stream goes on with the history that Redis mirrors. Pure; the planner asks it about every transaction that
//! comes and every position that is reached, before anything is written or confirmed.
//!
//! A position, a timeline and a system identifier do not tell one history of a server from another: files that were copied while it was
//! down and are put back, slot included, get to every position once more. What tells them apart is what was committed where. So the
//! progress names the last transaction that was applied, and a session has the stream begin there instead of at the
//! position. Of what comes before the position there must be this transaction, and no other. INVARIANT I11: in the stream are
//! only transactions that touched a mirrored table, and the same WAL always gives the same ones. (Of those that come while they are
//! in progress that is true of the ones of which a change remains at their commit.)
//!
//! Where the slot is confirmed beyond that transaction it does not come again, and need not: a copy of the server that is
//! confirmed up to there was made when Redis had it. That no other one follows before the position is left to prove.
//!
//! A progress that begins anew names none. So a session that finds none named writes one, the landmark, before anything is read
//! that could be of a history that is lost later.
//!
//! Behind the position there may be a transaction that keys were removed for already. It has to come too, before anything is written.

use walmirror_proto::Lsn;

use crate::progress::{Progress, timestamp};
use crate::transaction::Commit;

/// The last transaction that is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Last {
    /// None since the progress began at this position.
    NoneSince(Lsn),
    /// This one.
    Commit(Commit),
}

impl Last {
    /// Where in the WAL it is.
    pub fn lsn(&self) -> Lsn {
        match self {
            Self::NoneSince(lsn) => *lsn,
            Self::Commit(commit) => commit.lsn,
        }
    }

    /// As the progress hash holds it: `<position> <transaction id> <time>`, or the position alone.
    pub(crate) fn encode(&self) -> String {
        match self {
            Self::NoneSince(lsn) => lsn.to_string(),
            Self::Commit(Commit { lsn, xid, time }) => format!("{lsn} {xid} {time}"),
        }
    }

    /// Reads that.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let lsn = words.next()?.parse().ok()?;
        let Some(xid) = words.next() else {
            return Some(Self::NoneSince(lsn));
        };
        Some(Self::Commit(Commit {
            lsn,
            xid: xid.parse().ok()?,
            time: words.next()?.parse().ok()?,
        }))
    }

    /// The epoch of a transaction id is not in the WAL: the server guesses it anew.
    fn is(&self, other: &Commit) -> bool {
        matches!(self, Self::Commit(commit) if commit.lsn == other.lsn
            && commit.xid as u32 == other.xid as u32
            && commit.time == other.time)
    }
}

/// The stream is of another history than what Redis holds.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Diverged {
    /// The last transaction that is applied never was.
    #[error(
        "Redis has transaction {}, which committed at {} ({}), and the server does not: its files were put back to an \
         earlier state, and it has written other WAL since",
        .0.xid, .0.lsn, timestamp(.0.time)
    )]
    Missing(Commit),
    /// There is one that Redis has never seen.
    #[error(
        "Redis is at {at}, and the server has transaction {}, which committed before at {} ({}), and which Redis has never \
         seen: its files were put back to an earlier state, and it has written other WAL since",
        .found.xid, .found.lsn, timestamp(.found.time)
    )]
    Unknown {
        /// The position of Redis.
        at: Lsn,
        /// The one that was found.
        found: Commit,
    },
    /// The one that keys were removed for never was.
    #[error(
        "Redis has lost keys to transaction {}, which committed at {} ({}), and the server does not have it: its files were put \
         back to an earlier state, and it has written other WAL since",
        .0.xid, .0.lsn, timestamp(.0.time)
    )]
    Purged(Commit),
    /// Before the one that keys were removed for comes more than the sink would have kept together with it.
    #[error(
        "Redis has lost keys to transaction {}, which committed at {} ({}), and the server sends more than {held} bytes of changes \
         before it, which Redis would have got before any key was removed: its files were put back to an earlier state, and it has \
         written other WAL since",
        .purged.xid, .purged.lsn, timestamp(.purged.time)
    )]
    Outrun {
        /// The one that has not come.
        purged: Commit,
        /// As many are held for it.
        held: usize,
    },
}

/// Follows the stream until it has passed the position of Redis.
#[derive(Clone, Debug)]
pub struct Continuity {
    /// What Redis says.
    at: Lsn,
    /// None: it is proved, or there is nothing to go by.
    last: Option<Last>,
    /// The last transaction has to come yet.
    is_awaited: bool,
    /// And this one, behind the position: keys are gone because of it.
    purged: Option<Commit>,
}

impl Continuity {
    /// Redis begins anew with this stream: there is nothing to be proved.
    pub fn proved() -> Self {
        Self {
            at: Lsn::INVALID,
            last: None,
            is_awaited: false,
            purged: None,
        }
    }

    /// Where the stream has to begin so that it can be told.
    pub fn start(progress: &Progress) -> Lsn {
        let last = progress.last.filter(|_| !progress.resync);
        last.map_or(progress.lsn, |last| last.lsn().min(progress.lsn))
    }

    /// Of a stream that begins at `from`.
    pub fn of(progress: &Progress, from: Lsn) -> Self {
        let last = progress.last.filter(|_| !progress.resync && from < progress.lsn);
        let purged = progress.purging.and_then(|purging| purging.commit);
        Self {
            at: progress.lsn,
            last,
            is_awaited: matches!(last, Some(Last::Commit(commit)) if from <= commit.lsn),
            purged: purged.filter(|commit| !progress.resync && commit.lsn >= progress.lsn),
        }
    }

    /// Whether the stream is known to be of the history that Redis mirrors, or there is no telling.
    pub fn is_proved(&self) -> bool {
        self.last.is_none() && self.purged.is_none()
    }

    /// The position that Redis had when the stream began.
    pub fn at(&self) -> Lsn {
        self.at
    }

    /// A transaction begins. True: that proved it.
    pub fn begun(&mut self, begun: Commit) -> Result<bool, Diverged> {
        let proved = self.reached(begun.lsn)?;
        match self.purged {
            Some(purged) if Last::Commit(purged).is(&begun) => {
                self.purged = None;
                Ok(self.is_proved())
            }
            Some(purged) if begun.lsn >= purged.lsn => Err(Diverged::Purged(purged)),
            _ => Ok(proved),
        }
    }

    /// A transaction that commits before the position has come whole.
    pub fn skipped(&mut self, found: Commit) -> Result<(), Diverged> {
        match self.last {
            Some(last) if last.is(&found) => self.is_awaited = false,
            Some(Last::Commit(commit)) if self.is_awaited && found.lsn >= commit.lsn => {
                return Err(Diverged::Missing(commit));
            }
            Some(last) if found.lsn >= last.lsn() => return Err(Diverged::Unknown { at: self.at, found }),
            _ => {}
        }
        Ok(())
    }

    /// So many bytes of changes cannot be written before the stream is known to be of the right history, and wait in memory.
    ///
    /// A sink removes keys for a transaction when a batch is full or nothing more is there, and whatever stands before that transaction in the
    /// batch is less than one batch. More of it is of another history. (Or `--batch-bytes` was larger by far then: who takes that for another
    /// history makes everything anew, which is never wrong.)
    pub fn holds(&self, held: usize, most: usize) -> Result<(), Diverged> {
        match self.purged {
            Some(purged) if held > most => Err(Diverged::Outrun { purged, held: most }),
            _ => Ok(()),
        }
    }

    /// The server has sent all that ends before this, and no transaction is open. True: that proved it.
    pub fn reached(&mut self, lsn: Lsn) -> Result<bool, Diverged> {
        match self.last {
            Some(Last::Commit(commit)) if self.is_awaited && lsn > commit.lsn => {
                Err(Diverged::Missing(commit))
            }
            _ => match self.purged {
                Some(purged) if lsn > purged.lsn => Err(Diverged::Purged(purged)),
                _ if self.last.is_some() && lsn >= self.at => {
                    self.last = None;
                    Ok(self.is_proved())
                }
                _ => Ok(false),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    use crate::progress::Purging;

    const COMMIT: Commit = Commit {
        lsn: Lsn(100),
        xid: 7,
        time: 5,
    };

    fn progress(last: Option<Last>) -> Progress {
        Progress {
            lsn: Lsn(150),
            last,
            ..Progress::default()
        }
    }

    fn resumed(from: u64) -> Continuity {
        Continuity::of(&progress(Some(Last::Commit(COMMIT))), Lsn(from))
    }

    fn commit(lsn: u64, xid: u64, time: i64) -> Commit {
        Commit {
            lsn: Lsn(lsn),
            xid,
            time,
        }
    }

    #[test]
    fn the_last_transaction_and_nothing_else_proves_it() {
        let progress = progress(Some(Last::Commit(COMMIT)));
        assert_eq!(Continuity::start(&progress), Lsn(100));
        for at in [150, 151] {
            let mut stream = resumed(90);
            assert!(!stream.is_proved());
            assert_eq!(stream.reached(Lsn(90)), Ok(false));
            // Older ones may come before it, where the server sends more than it was asked for.
            assert_eq!(stream.skipped(commit(95, 6, 5)), Ok(()));
            assert_eq!(stream.reached(Lsn(100)), Ok(false));
            // The epoch of its id is guessed.
            assert_eq!(stream.skipped(commit(100, 7 + (1 << 32), 5)), Ok(()));
            assert_eq!(stream.reached(Lsn(149)), Ok(false));
            assert_eq!(stream.reached(Lsn(at)), Ok(true));
            assert!(stream.is_proved());
            assert_eq!(stream.skipped(commit(120, 9, 6)), Ok(()));
        }
    }

    #[test]
    fn another_history_is_found_out() {
        let missing = Diverged::Missing(COMMIT);
        let found = |lsn, xid, time| resumed(90).skipped(commit(lsn, xid, time)).unwrap_err();
        // Another transaction commits there, behind it, behind the position, or none does.
        assert_eq!(found(100, 8, 5), missing);
        assert_eq!(found(100, 7, 6), missing);
        assert_eq!(found(101, 7, 5), missing);
        for lsn in [101, 160] {
            assert_eq!(resumed(100).reached(Lsn(lsn)).as_ref(), Err(&missing));
        }
        // It is there, and one more is.
        let mut stream = resumed(100);
        stream.skipped(COMMIT).unwrap();
        let more = stream.skipped(commit(140, 8, 6)).unwrap_err();
        let text = more.to_string();
        assert!(
            text.starts_with("Redis is at 0/96, and the server has transaction 8"),
            "{text}"
        );
    }

    #[test]
    fn what_the_slot_is_confirmed_beyond_need_not_come_again() {
        let mut stream = resumed(110);
        assert_eq!(stream.reached(Lsn(120)), Ok(false));
        assert!(matches!(
            stream.clone().skipped(commit(130, 8, 6)),
            Err(Diverged::Unknown { .. })
        ));
        assert_eq!(stream.reached(Lsn(150)), Ok(true));
        assert!(resumed(150).is_proved());
    }

    #[test]
    fn where_nothing_was_applied_nothing_may_come() {
        let none = progress(Some(Last::NoneSince(Lsn(80))));
        assert_eq!(Continuity::start(&none), Lsn(80));
        let mut stream = Continuity::of(&none, Lsn(80));
        assert!(matches!(
            stream.clone().skipped(commit(80, 8, 6)),
            Err(Diverged::Unknown { .. })
        ));
        assert_eq!(stream.skipped(commit(79, 8, 6)), Ok(()));
        assert_eq!(stream.reached(Lsn(151)), Ok(true));
    }

    #[test]
    fn the_transaction_that_keys_were_removed_for_has_to_come() {
        let purged = commit(170, 9, 6);
        let of = |last, from| {
            let purging = Some(Purging { commit: Some(purged) });
            let progress = Progress {
                purging,
                ..progress(last)
            };
            Continuity::of(&progress, Lsn(from))
        };
        // Where the rest is proved, and where it is not.
        for (last, from) in [(None, 150), (Some(Last::NoneSince(Lsn(80))), 90)] {
            let mut stream = of(last, from);
            assert!(!stream.is_proved());
            assert_eq!(stream.begun(commit(160, 8, 5)), Ok(false));
            assert_eq!(stream.reached(Lsn(170)), Ok(false));
            let lost = Err(Diverged::Purged(purged));
            assert_eq!(stream.clone().reached(Lsn(171)), lost);
            assert_eq!(stream.clone().begun(commit(170, 10, 6)), lost);
            assert_eq!(stream.clone().begun(commit(180, 9, 6)), lost);
            assert_eq!(stream.begun(purged), Ok(true));
            assert!(stream.is_proved());
            assert_eq!(stream.begun(commit(180, 10, 7)), Ok(false));
        }
        // An older version that does not know the field has written beyond it.
        let old = Progress {
            lsn: Lsn(171),
            purging: Some(Purging { commit: Some(purged) }),
            ..Progress::default()
        };
        assert!(Continuity::of(&old, Lsn(171)).is_proved());
    }

    #[test]
    fn more_than_a_batch_before_a_purge_is_of_another_history() {
        let purged = commit(170, 9, 6);
        let progress = Progress {
            purging: Some(Purging { commit: Some(purged) }),
            ..progress(None)
        };
        let mut stream = Continuity::of(&progress, Lsn(150));
        assert_eq!(stream.holds(8, 8), Ok(()));
        assert_eq!(stream.holds(9, 8), Err(Diverged::Outrun { purged, held: 8 }));
        stream.begun(purged).unwrap();
        assert_eq!(stream.holds(9, 8), Ok(()));
        assert_eq!(Continuity::proved().holds(9, 8), Ok(()));
    }

    #[test]
    fn an_old_progress_and_one_that_begins_anew_prove_nothing() {
        assert_eq!(Continuity::start(&progress(None)), Lsn(150));
        assert!(Continuity::of(&progress(None), Lsn(90)).is_proved());
        let resync = Progress {
            resync: true,
            ..progress(Some(Last::Commit(COMMIT)))
        };
        assert_eq!(Continuity::start(&resync), Lsn(150));
        assert!(Continuity::of(&resync, Lsn(90)).is_proved());
        assert!(Continuity::proved().is_proved());
    }
}
