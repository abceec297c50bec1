//! A transaction snapshot as `pg_current_snapshot()` gives it: which transactions a read saw. Ids are 64 bits wide (with
//! their epoch) and belong to top-level transactions.

use std::cmp::Reverse;
use std::str::FromStr;

use walmirror_proto::pb;

/// Which transactions a read saw: those below `xmax` that are not in `xip`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Every transaction below this was over.
    pub xmin: u64,
    /// No transaction from this one on was over.
    pub xmax: u64,
    /// In progress at the time; sorted, between `xmin` and `xmax`.
    xip: Vec<u64>,
}

/// The text is not a `pg_snapshot`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not a pg_snapshot: expected xmin:xmax:xip,xip,…")]
pub struct ParseSnapshotError(String);

impl Snapshot {
    /// A snapshot of these parts; `xip` in any order.
    pub fn new(xmin: u64, xmax: u64, mut xip: Vec<u64>) -> Self {
        xip.sort_unstable();
        Self { xmin, xmax, xip }
    }

    /// Whether the effects of this transaction (known to have committed) are visible.
    pub fn sees(&self, xid: u64) -> bool {
        xid < self.xmin || (xid < self.xmax && self.xip.binary_search(&xid).is_err())
    }

    /// Whether it was taken before the other one, as far as they differ: fewer transactions were over.
    pub fn is_before(&self, other: &Self) -> bool {
        let place = |snapshot: &Self| (snapshot.xmax, Reverse(snapshot.xip.len()));
        place(self) < place(other)
    }

    /// Whether some transaction below `horizon` could be invisible.
    pub fn may_miss_below(&self, horizon: u64) -> bool {
        self.xmax < horizon || self.xip.first().is_some_and(|&oldest| oldest < horizon)
    }

    /// The transactions that were in progress, in order.
    pub fn in_progress(&self) -> &[u64] {
        &self.xip
    }
}

impl FromStr for Snapshot {
    type Err = ParseSnapshotError;

    fn from_str(text: &str) -> Result<Self, ParseSnapshotError> {
        let parse = || {
            let mut parts = text.split(':');
            let xmin = parts.next()?.parse().ok()?;
            let xmax = parts.next()?.parse().ok()?;
            let list = parts.next()?;
            if parts.next().is_some() {
                return None;
            }
            let xip: Option<Vec<u64>> = list
                .split(',')
                .filter(|id| !id.is_empty())
                .map(|id| id.parse().ok())
                .collect();
            Some(Self::new(xmin, xmax, xip?))
        };
        parse().ok_or_else(|| ParseSnapshotError(text.to_owned()))
    }
}

impl From<&pb::Snapshot> for Snapshot {
    fn from(wire: &pb::Snapshot) -> Self {
        Self::new(wire.xmin, wire.xmax, wire.xip.clone())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn reads_what_postgres_prints() {
        assert_eq!(
            "10:20:10,14,15".parse(),
            Ok(Snapshot::new(10, 20, vec![15, 10, 14]))
        );
        assert_eq!("738:738:".parse(), Ok(Snapshot::new(738, 738, vec![])));
        for text in ["", "1", "1:2", "1:2:x", "1:2:3:4", "a:b:"] {
            assert!(text.parse::<Snapshot>().is_err(), "{text}");
        }
    }

    #[test]
    fn sees_what_was_over() {
        let snapshot: Snapshot = "10:20:10,14".parse().unwrap();
        let seen: Vec<u64> = (8..24).filter(|&xid| snapshot.sees(xid)).collect();
        assert_eq!(seen, [8, 9, 11, 12, 13, 15, 16, 17, 18, 19]);
    }

    #[test]
    fn may_miss_exactly_when_some_id_below_is_unseen() {
        for text in ["10:20:10,14", "20:20:", "15:20:15"] {
            let snapshot: Snapshot = text.parse().unwrap();
            for horizon in 1..30 {
                let missed = (0..horizon).any(|xid| !snapshot.sees(xid));
                assert_eq!(snapshot.may_miss_below(horizon), missed, "{text} {horizon}");
            }
        }
    }
}
