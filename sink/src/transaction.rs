//! Where in which transaction the stream is, and which records of it are still to be applied. Pure; the planner thread
//! asks it about every record.
//!
//! INVARIANT I3: after a restart the stream begins again at the progress LSN. Transactions before it are skipped, and of
//! one that was applied in part exactly the records that were applied.

use walmirror_proto::Lsn;
use walmirror_proto::pb;

/// A transaction of which a part is applied: it was larger than the limit, so it went to Redis in several steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its top-level transaction id.
    pub xid: u64,
    /// Where its commit record starts.
    pub commit_lsn: Lsn,
    /// When it committed: microseconds since 2000-01-01 UTC. None: an older version of this program wrote this down.
    pub commit_time: Option<i64>,
    /// How many of its change records are applied: rows, truncates, forgets, announcements. Errors are none: how often one is told
    /// depends on the parts in which a transaction came.
    pub records: u64,
}

impl Part {
    fn is(&self, begin: &pb::Begin) -> bool {
        self.xid == begin.xid
            && self.commit_lsn.0 == begin.commit_lsn
            && self.commit_time.is_none_or(|time| time == begin.commit_time)
    }

    fn replaced(self, xid: u64, commit_lsn: Lsn) -> OrderError {
        self.lost(format!("transaction {xid}, which commits at {commit_lsn}"))
    }

    fn lost(self, next: String) -> OrderError {
        OrderError::PartLost {
            xid: self.xid,
            commit: self.commit_lsn,
            next,
        }
    }
}

/// A transaction that is applied whole, so that it can be told from any other: in another history of the same server another one may
/// commit at the same place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    /// Where its commit record starts.
    pub lsn: Lsn,
    /// Its top-level transaction id.
    pub xid: u64,
    /// When it committed: microseconds since 2000-01-01 UTC.
    pub time: i64,
}

/// The transaction that the stream is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Open {
    /// Its top-level transaction id.
    pub xid: u64,
    /// Where its commit record starts.
    pub commit_lsn: Lsn,
    /// When it committed: microseconds since 2000-01-01 UTC.
    pub commit_time: i64,
    /// Change records seen so far, skipped ones included.
    records: u64,
    /// Whether an error of it was told.
    noted: bool,
    /// Of these, the first so many are applied already.
    skip: u64,
    /// It stands before the one that is applied in part, which only one of which nothing is left may.
    is_early: bool,
}

impl Open {
    fn whole(&self) -> Commit {
        Commit {
            lsn: self.commit_lsn,
            xid: self.xid,
            time: self.commit_time,
        }
    }

    fn commit(&self) -> Option<Commit> {
        (self.records > 0 || self.noted).then(|| self.whole())
    }
}

/// Records came in an order that cannot be: the decoder or the server broke its promise.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// BEGIN inside of a transaction.
    #[error("transaction {new} begins inside of transaction {open}")]
    Nested {
        /// The one that was open.
        open: u64,
        /// The one that began.
        new: u64,
    },
    /// COMMIT or a change outside of any transaction.
    #[error("{0} outside of a transaction")]
    Outside(&'static str),
    /// The end of a transaction that is not behind its beginning.
    #[error("transaction {xid} ends at {end}, which is not behind its commit record at {commit}")]
    Backwards {
        /// The transaction.
        xid: u64,
        /// Where its commit record starts.
        commit: Lsn,
        /// Where it is said to end.
        end: Lsn,
    },
    /// The transaction that was applied in part is not the next one.
    #[error(
        "Redis has a part of transaction {xid}, which commits at {commit}, and Postgres goes on with {next} instead"
    )]
    PartLost {
        /// The one that was cut.
        xid: u64,
        /// Where its commit record starts.
        commit: Lsn,
        /// What came instead: a transaction, or nothing up to a position.
        next: String,
    },
}

/// A transaction that is over and whose effects are to count as applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Just after its commit record.
    pub end_lsn: Lsn,
    /// Which one it is. None: it changed nothing. One that came while it was in progress may have been rolled back but for its
    /// commit, and need not come at all the next time.
    pub commit: Option<Commit>,
}

/// Follows the stream from a progress position on.
#[derive(Debug)]
pub struct Transactions {
    from: Lsn,
    part: Option<Part>,
    open: Option<Open>,
}

impl Transactions {
    /// Everything before `from` is applied, and this part of the transaction that comes first.
    pub fn resume(from: Lsn, part: Option<Part>) -> Self {
        Self {
            from,
            part,
            open: None,
        }
    }

    /// A BEGIN record.
    pub fn begin(&mut self, begin: &pb::Begin) -> Result<(), OrderError> {
        if let Some(open) = self.open {
            return Err(OrderError::Nested {
                open: open.xid,
                new: begin.xid,
            });
        }
        let commit_lsn = Lsn(begin.commit_lsn);
        // The progress LSN is the end of a record, so a commit record that starts before it ends at it or before.
        let (skip, is_early) = match self.part {
            _ if commit_lsn < self.from => (u64::MAX, false),
            None => (0, false),
            Some(part) if part.is(begin) => (part.records, false),
            Some(part) if commit_lsn < part.commit_lsn => (0, true),
            Some(part) => return Err(part.replaced(begin.xid, commit_lsn)),
        };
        self.open = Some(Open {
            xid: begin.xid,
            commit_lsn,
            commit_time: begin.commit_time,
            records: 0,
            noted: false,
            skip,
            is_early,
        });
        Ok(())
    }

    /// Between transactions: the server has sent all that ends before this.
    pub fn reached(&self, lsn: Lsn) -> Result<(), OrderError> {
        match self.part {
            Some(part) if self.open.is_none() && lsn > part.commit_lsn => {
                Err(part.lost(format!("what is behind {lsn}")))
            }
            _ => Ok(()),
        }
    }

    /// A change record of the open transaction. Some: it is to be applied.
    #[inline]
    pub fn change(&mut self, what: &'static str) -> Result<Option<Open>, OrderError> {
        let open = self.counts(what)?;
        open.records += 1;
        Ok((open.records > open.skip).then_some(*open))
    }

    /// A record of the open transaction that is no change, an error. Some: it is to be noted, as what comes next is to be applied. Where a
    /// transaction was cut just before it, that may be once more.
    pub fn note(&mut self, what: &'static str) -> Result<Option<Open>, OrderError> {
        let open = self.counts(what)?;
        open.noted = true;
        Ok((open.records >= open.skip).then_some(*open))
    }

    /// The open transaction, of which something is left at its commit: so it would have come to the earlier session too.
    #[inline]
    fn counts(&mut self, what: &'static str) -> Result<&mut Open, OrderError> {
        let open = self.open.as_mut().ok_or(OrderError::Outside(what))?;
        match self.part {
            Some(part) if open.is_early => Err(part.replaced(open.xid, open.commit_lsn)),
            _ => Ok(open),
        }
    }

    /// A COMMIT record. None: the whole transaction was applied before.
    pub fn commit(&mut self, commit: &pb::Commit) -> Result<Option<Ended>, OrderError> {
        let open = self.open.take().ok_or(OrderError::Outside("COMMIT"))?;
        let end_lsn = Lsn(commit.end_lsn);
        if end_lsn <= open.commit_lsn {
            return Err(OrderError::Backwards {
                xid: open.xid,
                commit: open.commit_lsn,
                end: end_lsn,
            });
        }
        if open.skip == u64::MAX {
            return Ok(None);
        }
        if !open.is_early {
            self.part = None;
        }
        Ok(Some(Ended {
            end_lsn,
            commit: open.commit(),
        }))
    }

    /// What the progress has to say if a step ends here: how far the open transaction is, or one of which an earlier
    /// session applied a part and that is still to come.
    pub fn part(&self) -> Option<Part> {
        match self.open {
            // Records that are skipped are applied already: the part never gets smaller.
            Some(open) if open.skip != u64::MAX && !open.is_early => Some(Part {
                xid: open.xid,
                commit_lsn: open.commit_lsn,
                commit_time: Some(open.commit_time),
                records: open.records.max(open.skip),
            }),
            _ => self.part,
        }
    }

    /// Whether the open transaction was applied whole before.
    pub fn is_skipped(&self) -> bool {
        self.open.is_some_and(|open| open.skip == u64::MAX)
    }

    /// The open transaction, if it was applied whole before, and a change of it has come.
    pub fn skipped(&self) -> Option<Commit> {
        self.open.filter(|_| self.is_skipped())?.commit()
    }

    /// Whether a transaction of which an earlier session applied a part has not begun yet: so it may never have been here.
    pub fn awaits_part(&self) -> bool {
        let is_other = |open: Open| open.skip == u64::MAX || open.is_early;
        self.part.is_some() && self.open.is_none_or(is_other)
    }

    /// The open transaction.
    pub fn open(&self) -> Option<Commit> {
        self.open.map(|open| open.whole())
    }

    /// Whether the stream is inside of a transaction.
    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn begin(xid: u64, commit_lsn: u64) -> pb::Begin {
        pb::Begin {
            xid,
            commit_lsn,
            commit_time: 7,
        }
    }

    /// Feeds transactions of so many records, the i-th with its commit record at 100 * (i + 1) and its end 10 later.
    /// Returns (transaction, record) of what was to be applied, and the progress after `stop` records in all.
    fn feed(
        mut transactions: Transactions,
        sizes: &[u64],
        stop: usize,
        mut lsn: Lsn,
    ) -> (Vec<(u64, u64)>, Lsn, Option<Part>) {
        let mut applied = Vec::new();
        let mut seen = 0;
        for (i, &size) in sizes.iter().enumerate() {
            let xid = i as u64 + 1;
            transactions.begin(&begin(xid, xid * 100)).unwrap();
            for record in 0..size {
                if seen == stop {
                    let part = transactions
                        .part()
                        .filter(|part| part.records > 0 && part.commit_lsn >= lsn);
                    return (applied, lsn, part);
                }
                seen += 1;
                if transactions.change("row").unwrap().is_some() {
                    applied.push((xid, record));
                }
            }
            if let Some(ended) = transactions
                .commit(&pb::Commit {
                    end_lsn: xid * 100 + 10,
                })
                .unwrap()
            {
                lsn = ended.end_lsn;
            }
        }
        (applied, lsn, None)
    }

    proptest! {
        /// Stopped anywhere and resumed from its progress, every record is applied exactly once, in order.
        #[test]
        fn a_cut_and_a_restart_lose_and_repeat_nothing(sizes in prop::collection::vec(0u64..6, 1..8), stop in 0usize..30) {
            let all: Vec<_> = sizes.iter().zip(1u64..).flat_map(|(&size, xid)| (0..size).map(move |record| (xid, record))).collect();
            let (mut applied, lsn, part) = feed(Transactions::resume(Lsn(0), None), &sizes, stop, Lsn(0));
            // What was seen of the open transaction and not cut is not applied: forget it.
            let (rest, _, _) = feed(Transactions::resume(lsn, part), &sizes, usize::MAX, lsn);
            if stop < all.len() {
                applied.extend(rest);
            }
            prop_assert_eq!(applied, all);
        }
    }

    #[test]
    fn what_ends_at_the_progress_is_skipped_and_what_starts_there_is_not() {
        let mut transactions = Transactions::resume(Lsn(110), None);
        transactions.begin(&begin(1, 100)).unwrap();
        assert_eq!(transactions.skipped(), None);
        assert_eq!(transactions.change("row"), Ok(None));
        assert_eq!(transactions.skipped().map(|commit| commit.xid), Some(1));
        assert_eq!(transactions.commit(&pb::Commit { end_lsn: 110 }), Ok(None));
        transactions.begin(&begin(2, 110)).unwrap();
        assert!(transactions.change("row").unwrap().is_some());
        let ended = transactions.commit(&pb::Commit { end_lsn: 120 }).unwrap();
        assert_eq!(
            ended,
            Some(Ended {
                end_lsn: Lsn(120),
                commit: Some(Commit {
                    lsn: Lsn(110),
                    xid: 2,
                    time: 7
                })
            })
        );
        assert_eq!(transactions.skipped(), None);
        transactions.begin(&begin(3, 120)).unwrap();
        let ended = transactions.commit(&pb::Commit { end_lsn: 130 }).unwrap();
        assert_eq!(ended.unwrap().commit, None);
    }

    #[test]
    fn a_part_belongs_to_its_transaction_only() {
        let part = Part {
            xid: 5,
            commit_lsn: Lsn(100),
            commit_time: Some(7),
            records: 2,
        };
        let mut transactions = Transactions::resume(Lsn(50), Some(part));
        // Older transactions may come before it and are skipped.
        transactions.begin(&begin(4, 40)).unwrap();
        transactions.commit(&pb::Commit { end_lsn: 50 }).unwrap();
        assert!(matches!(
            transactions.begin(&begin(6, 100)),
            Err(OrderError::PartLost { xid: 5, .. })
        ));
        assert_eq!(transactions.reached(Lsn(100)), Ok(()));
        assert!(matches!(
            transactions.reached(Lsn(101)),
            Err(OrderError::PartLost { xid: 5, .. })
        ));
        let other = pb::Begin {
            commit_time: 8,
            ..begin(5, 100)
        };
        assert!(matches!(
            transactions.begin(&other),
            Err(OrderError::PartLost { xid: 5, .. })
        ));
        assert!(transactions.awaits_part());
        transactions.begin(&begin(5, 100)).unwrap();
        assert!(!transactions.awaits_part());
        let applied: Vec<bool> = (0..4)
            .map(|_| transactions.change("row").unwrap().is_some())
            .collect();
        assert_eq!(applied, [false, false, true, true]);
        assert_eq!(
            transactions.part(),
            Some(Part {
                xid: 5,
                commit_lsn: Lsn(100),
                commit_time: Some(7),
                records: 4
            })
        );
        transactions.commit(&pb::Commit { end_lsn: 110 }).unwrap();
        transactions.begin(&begin(6, 120)).unwrap();
        assert!(transactions.change("row").unwrap().is_some());
    }

    /// One that came while it was in progress, and of which everything was rolled back but its commit, may not have come before.
    #[test]
    fn one_of_which_nothing_is_left_may_stand_before_a_part() {
        let part = Part {
            xid: 5,
            commit_lsn: Lsn(100),
            commit_time: Some(7),
            records: 2,
        };
        let mut transactions = Transactions::resume(Lsn(50), Some(part));
        transactions.begin(&begin(4, 60)).unwrap();
        assert_eq!(transactions.part(), Some(part));
        assert!(transactions.awaits_part());
        let ended = transactions.commit(&pb::Commit { end_lsn: 70 }).unwrap();
        assert_eq!(ended.map(|ended| ended.commit), Some(None));
        assert_eq!(transactions.part(), Some(part));
        for counts in [
            |transactions: &mut Transactions| transactions.change("row"),
            |transactions: &mut Transactions| transactions.note("ERROR"),
        ] {
            let mut transactions = Transactions::resume(Lsn(50), Some(part));
            transactions.begin(&begin(4, 60)).unwrap();
            assert!(matches!(
                counts(&mut transactions),
                Err(OrderError::PartLost { xid: 5, .. })
            ));
        }
        transactions.begin(&begin(5, 100)).unwrap();
        assert_eq!(transactions.change("row"), Ok(None));
    }

    /// A keepalive or a backfill may write the progress before the transaction that was cut has come again.
    #[test]
    fn a_part_stays_until_its_transaction_is_over() {
        let part = Part {
            xid: 5,
            commit_lsn: Lsn(100),
            commit_time: Some(7),
            records: 2,
        };
        let mut transactions = Transactions::resume(Lsn(50), Some(part));
        assert_eq!(transactions.part(), Some(part));
        transactions.begin(&begin(4, 40)).unwrap();
        assert_eq!(transactions.change("row"), Ok(None));
        assert_eq!(transactions.part(), Some(part));
        transactions.commit(&pb::Commit { end_lsn: 50 }).unwrap();
        transactions.begin(&begin(5, 100)).unwrap();
        assert_eq!(transactions.change("row"), Ok(None));
        assert_eq!(transactions.part(), Some(part));
        transactions.commit(&pb::Commit { end_lsn: 110 }).unwrap();
        assert_eq!(transactions.part(), None);
    }

    #[test]
    fn impossible_orders_are_errors() {
        let mut transactions = Transactions::resume(Lsn(0), None);
        assert_eq!(transactions.change("row"), Err(OrderError::Outside("row")));
        assert_eq!(
            transactions.commit(&pb::Commit { end_lsn: 1 }),
            Err(OrderError::Outside("COMMIT"))
        );
        transactions.begin(&begin(1, 100)).unwrap();
        assert_eq!(
            transactions.begin(&begin(2, 200)),
            Err(OrderError::Nested { open: 1, new: 2 })
        );
        assert!(matches!(
            transactions.commit(&pb::Commit { end_lsn: 100 }),
            Err(OrderError::Backwards { .. })
        ));
    }
}
