//! Whether Redis and the slot fit together: the decision at the start of a session. Pure.
//!
//! START_REPLICATION behind the confirmed position is moved forward by the server without a word, so it has to be
//! compared before; what lies between would be lost.

use walmirror_proto::Lsn;

use crate::error::{Class, Error};
use crate::progress::Progress;
use crate::redis::{Identity, Stored};
use crate::replication::{History, SlotInfo};

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// Go on from here.
    Resume(Lsn),
    /// Neither has been here before: make the slot, mirror everything.
    First,
    /// They do not fit, for this reason. `slot`: the slot can be used as it is, from there on.
    Gap {
        /// For a person.
        why: String,
        /// Where the stream can begin; None: the slot has to be made anew.
        slot: Option<Lsn>,
    },
}

/// What Postgres says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Server<'a> {
    /// The slot, if there is one.
    pub(super) slot: Option<&'a SlotInfo>,
    /// Which server and database it is.
    pub(super) identity: &'a Identity,
    /// The ancestors of its timeline, asked for where Redis knows another one.
    pub(super) history: &'a History,
    /// How far its WAL is flushed.
    pub(super) end: Lsn,
}

/// What the session before found in the stream: it is of another history than what Redis holds. Nothing was written or confirmed
/// since, so this process need not remember it over its end: another one finds it once more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// For a person.
    pub(super) why: String,
    /// The epoch of that session. If another one has begun since, it may be healed.
    pub(super) epoch: u64,
}

/// Compares what Redis and Postgres say.
pub(super) fn decide(progress: Option<&Progress>, server: &Server<'_>, found: Option<&Found>) -> Decision {
    let Server {
        slot, identity, end, ..
    } = *server;
    let usable = slot
        .filter(|slot| slot.wal_status.as_deref() != Some("lost"))
        .and_then(|slot| slot.confirmed_flush_lsn);
    let gap = |why: String| Decision::Gap { why, slot: usable };
    match (progress, slot) {
        (None, None) => Decision::First,
        (None, Some(_)) => gap(
            "the slot exists, but Redis has no progress of it: it was emptied, or it is another one"
                .to_owned(),
        ),
        (Some(progress), _) if progress.system_id != identity.system_id => gap(format!(
            "Redis mirrors the cluster with system identifier {}, this one has {}",
            progress.system_id, identity.system_id
        )),
        (Some(progress), _) if progress.database != identity.database => gap(format!(
            "Redis mirrors the database {:?}, this one is {:?}",
            progress.database, identity.database
        )),
        (Some(progress), None) if progress.timeline != identity.timeline => gap(format!(
            "Redis is at {} of timeline {}, the server is on timeline {} and does not have the slot: there was a failover or \
             a restore, and the slot was not kept in step",
            progress.lsn, progress.timeline, identity.timeline
        )),
        (Some(progress), None) => gap(format!("Redis is at {}, but the slot is gone", progress.lsn)),
        (Some(progress), Some(slot)) if usable.is_none() => gap(format!(
            "Redis is at {}, but the slot has lost the WAL from there on (wal_status {})",
            progress.lsn,
            slot.wal_status.as_deref().unwrap_or("unknown")
        )),
        (Some(progress), Some(slot)) => match (strayed(progress, slot, server), usable) {
            (Some(why), _) => gap(why),
            // Only WAL that is flushed is ever sent. The server would wait until it gets there, and leave out what is before.
            _ if reach(progress) > end => gap(format!(
                "Redis is at {}, but the server's WAL ends at {end}: the server was put back to an earlier state",
                reach(progress)
            )),
            (_, Some(confirmed)) if confirmed > progress.lsn => gap(format!(
                "the slot is confirmed up to {confirmed}, but Redis is only at {}: it lost what is between",
                progress.lsn
            )),
            _ => match found.filter(|found| found.epoch == progress.epoch) {
                Some(found) => gap(found.why.clone()),
                None => Decision::Resume(progress.lsn),
            },
        },
    }
}

/// How far Redis has seen the WAL: a transaction of which it has a part was whole when it was sent.
fn reach(progress: &Progress) -> Lsn {
    let part = progress.part.map(|part| Lsn(part.commit_lsn.0.saturating_add(1)));
    part.map_or(progress.lsn, |part| part.max(progress.lsn))
}

/// Why what Redis holds is not of the server's past, if that is so. On the same timeline it always is.
///
/// Up to where the server left the timeline that Redis mirrors, both have the same WAL. So what Redis has must end there, all of
/// it: the position, the transaction behind it that is applied in part, and a purge that goes before its transaction. What
/// was read by SQL is never ahead of the position, because the position passes its marker with it.
fn strayed(progress: &Progress, slot: &SlotInfo, server: &Server<'_>) -> Option<String> {
    let (old, new) = (progress.timeline, server.identity.timeline);
    if old == new {
        return None;
    }
    let at = format!("Redis mirrors timeline {old}, the server is on timeline {new}");
    let Some(left) = server.history.left(old) else {
        return Some(format!(
            "{at}, whose history does not know the other: it was restored, or is an old primary"
        ));
    };
    if !slot.failover {
        return Some(format!(
            "{at}: there was a failover or a restore, and the slot is no failover slot, so what it needs may be missing"
        ));
    }
    if progress.lsn > left {
        return Some(format!(
            "{at}, which begins at {left}, and Redis is at {}: Postgres lost what is between",
            progress.lsn
        ));
    }
    // A commit record that begins before that position is whole before it.
    if let Some(part) = progress.part.filter(|part| part.commit_lsn >= left) {
        return Some(format!(
            "{at}, which begins at {left}, and Redis has a part of the transaction that commits at {}: Postgres lost it",
            part.commit_lsn
        ));
    }
    progress.purging.then(|| {
        format!(
            "{at}, and Redis has lost keys to a change behind {}, which Postgres may have lost",
            progress.lsn
        )
    })
}

/// Whether what Redis holds now that the right to write is being taken is what the decision was about: between the two, Redis
/// may have lost its tail, and the stream has begun already; or a session on the old primary has gone on. The server's slot is that
/// of the stream.
pub(super) fn still_fits(stored: &Stored, start: Lsn, server: &Server<'_>) -> Result<(), Error> {
    let changed = |why: &str| {
        let what = "the progress changed while this session began";
        Err(Error::redis(what, Class::Retry, why.to_owned()))
    };
    match &stored.progress {
        Some(progress) if progress.lsn >= start => {
            let confirmed = server.slot.and_then(|slot| slot.confirmed_flush_lsn);
            if confirmed.is_some_and(|confirmed| confirmed > progress.lsn) {
                return changed("the slot was confirmed beyond it");
            }
            let strayed = server.slot.and_then(|slot| strayed(progress, slot, server));
            strayed.map_or(Ok(()), |why| changed(&why))
        }
        _ => changed("it went back or was removed"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::transaction::Part;

    const END: Lsn = Lsn(100);

    fn identity(timeline: u32) -> Identity {
        Identity {
            system_id: "1".into(),
            timeline,
            database: "d".into(),
        }
    }

    fn progress(lsn: u64) -> Progress {
        let Identity {
            system_id,
            timeline,
            database,
        } = identity(1);
        Progress {
            lsn: Lsn(lsn),
            epoch: 1,
            system_id,
            timeline,
            database,
            ..Progress::default()
        }
    }

    fn slot(confirmed: u64) -> SlotInfo {
        SlotInfo {
            plugin: Some("walmirror".into()),
            database: Some("d".into()),
            confirmed_flush_lsn: Some(Lsn(confirmed)),
            restart_lsn: Some(Lsn(confirmed)),
            active: false,
            active_pid: None,
            wal_status: Some("reserved".into()),
            failover: true,
        }
    }

    /// On timeline 1.
    fn at_home(progress: Option<&Progress>, slot: Option<&SlotInfo>) -> Decision {
        on(&identity(1), progress, slot)
    }

    /// On timeline 3, which left 2 at 60, which had left 1 at 50.
    fn after_two_failovers(progress: &Progress, slot: &SlotInfo) -> Decision {
        on(&identity(3), Some(progress), Some(slot))
    }

    fn on(identity: &Identity, progress: Option<&Progress>, slot: Option<&SlotInfo>) -> Decision {
        let history = History::parse("1 0/32 x\n2 0/3C x").unwrap();
        let server = Server {
            slot,
            identity,
            history: &history,
            end: END,
        };
        decide(progress, &server, None)
    }

    #[track_caller]
    fn assert_gap(decision: &Decision, start: Option<u64>, because: &str) {
        assert!(
            matches!(decision, Decision::Gap { why, slot } if why.contains(because) && *slot == start.map(Lsn)),
            "{decision:?}"
        );
    }

    #[test]
    fn what_fits_goes_on() {
        assert_eq!(at_home(None, None), Decision::First);
        for confirmed in [5, 10] {
            assert_eq!(
                at_home(Some(&progress(10)), Some(&slot(confirmed))),
                Decision::Resume(Lsn(10))
            );
        }
        // On its own timeline the slot need not be a failover slot, and what is ahead of the position comes again.
        let ahead = Progress {
            part: Some(part(70)),
            purging: true,
            ..progress(10)
        };
        let plain = SlotInfo {
            failover: false,
            ..slot(5)
        };
        assert_eq!(at_home(Some(&ahead), Some(&plain)), Decision::Resume(Lsn(10)));
    }

    #[test]
    fn what_does_not_fit_is_a_gap_with_a_reason() {
        assert_gap(&at_home(Some(&progress(10)), Some(&slot(11))), Some(11), "0/B");
        assert_gap(&at_home(Some(&progress(101)), Some(&slot(5))), Some(5), "0/64");
        let in_part = Progress {
            part: Some(part(100)),
            ..progress(10)
        };
        assert_gap(
            &at_home(Some(&in_part), Some(&slot(5))),
            Some(5),
            "ends at 0/64: the server was put back",
        );
        assert_gap(&at_home(Some(&progress(10)), None), None, "slot is gone");
        assert_gap(&at_home(None, Some(&slot(5))), Some(5), "no progress");
        let other = |identity: Identity| on(&identity, Some(&progress(10)), Some(&slot(5)));
        let cluster = Identity {
            system_id: "2".into(),
            ..identity(1)
        };
        assert_gap(&other(cluster), Some(5), "system identifier");
        let database = Identity {
            database: "e".into(),
            ..identity(1)
        };
        assert_gap(&other(database), Some(5), "database");
        let lost = SlotInfo {
            wal_status: Some("lost".into()),
            ..slot(5)
        };
        assert_gap(
            &at_home(Some(&progress(10)), Some(&lost)),
            None,
            "has lost the WAL",
        );
    }

    #[test]
    fn what_the_session_before_found_is_a_gap_unless_another_one_began_since() {
        let history = History::none();
        let server = Server {
            slot: Some(&slot(5)),
            identity: &identity(1),
            history: &history,
            end: END,
        };
        let found = |epoch| Found {
            why: "never was".to_owned(),
            epoch,
        };
        let decision = decide(Some(&progress(10)), &server, Some(&found(1)));
        assert_gap(&decision, Some(5), "never was");
        let later = decide(Some(&progress(10)), &server, Some(&found(0)));
        assert_eq!(later, Decision::Resume(Lsn(10)));
    }

    fn part(commit_lsn: u64) -> Part {
        Part {
            xid: 7,
            commit_lsn: Lsn(commit_lsn),
            commit_time: None,
            records: 3,
        }
    }

    #[test]
    fn a_failover_that_lost_nothing_goes_on() {
        for lsn in [10, 50] {
            assert_eq!(
                after_two_failovers(&progress(lsn), &slot(5)),
                Decision::Resume(Lsn(lsn))
            );
        }
        let on_the_second = Progress {
            timeline: 2,
            ..progress(60)
        };
        assert_eq!(
            after_two_failovers(&on_the_second, &slot(60)),
            Decision::Resume(Lsn(60))
        );
        let in_part = Progress {
            part: Some(part(49)),
            ..progress(40)
        };
        assert_eq!(
            after_two_failovers(&in_part, &slot(40)),
            Decision::Resume(Lsn(40))
        );
    }

    #[test]
    fn a_failover_that_lost_something_is_a_gap() {
        let ahead = after_two_failovers(&progress(51), &slot(5));
        assert_gap(&ahead, Some(5), "begins at 0/32, and Redis is at 0/33");
        let in_part = Progress {
            part: Some(part(50)),
            ..progress(40)
        };
        assert_gap(
            &after_two_failovers(&in_part, &slot(5)),
            Some(5),
            "part of the transaction that commits at 0/32",
        );
        let purging = Progress {
            purging: true,
            ..progress(40)
        };
        assert_gap(&after_two_failovers(&purging, &slot(5)), Some(5), "lost keys");
        // Redis lost its tail as well.
        assert_gap(
            &after_two_failovers(&progress(40), &slot(41)),
            Some(41),
            "it lost what is between",
        );
    }

    #[test]
    fn a_failover_without_its_slot_is_a_gap() {
        assert_gap(
            &on(&identity(3), Some(&progress(10)), None),
            None,
            "not kept in step",
        );
        let plain = SlotInfo {
            failover: false,
            ..slot(5)
        };
        assert_gap(
            &after_two_failovers(&progress(10), &plain),
            Some(5),
            "no failover slot",
        );
        let lost = SlotInfo {
            wal_status: Some("lost".into()),
            ..slot(5)
        };
        assert_gap(
            &after_two_failovers(&progress(10), &lost),
            None,
            "has lost the WAL",
        );
    }

    #[test]
    fn a_timeline_that_is_no_ancestor_is_a_gap() {
        let elsewhere = Progress {
            timeline: 4,
            ..progress(10)
        };
        assert_gap(
            &after_two_failovers(&elsewhere, &slot(5)),
            Some(5),
            "does not know the other",
        );
        // The old primary is back.
        let old = Progress {
            timeline: 2,
            ..progress(10)
        };
        let history = History::none();
        let server = Server {
            slot: Some(&slot(5)),
            identity: &identity(1),
            history: &history,
            end: END,
        };
        assert_gap(
            &decide(Some(&old), &server, None),
            Some(5),
            "does not know the other",
        );
    }

    #[test]
    fn the_decision_holds_until_the_right_to_write_is_taken() {
        let history = History::parse("1 0/32 x").unwrap();
        let slot = slot(5);
        let fits = |timeline, progress: Option<Progress>| {
            let server = Server {
                slot: Some(&slot),
                identity: &identity(timeline),
                history: &history,
                end: END,
            };
            let stored = Stored {
                progress,
                ..Stored::default()
            };
            still_fits(&stored, Lsn(40), &server).is_ok()
        };
        for timeline in [1, 2] {
            assert!(fits(timeline, Some(progress(40))));
            assert!(fits(timeline, Some(progress(45))));
            assert!(!fits(timeline, Some(progress(39))));
            assert!(!fits(timeline, None));
        }
        // The slot was confirmed after it was looked at, and Redis has lost that.
        let ahead = SlotInfo {
            confirmed_flush_lsn: Some(Lsn(41)),
            ..slot.clone()
        };
        let server = Server {
            slot: Some(&ahead),
            identity: &identity(1),
            history: &history,
            end: END,
        };
        let stored = |lsn| Stored {
            progress: Some(progress(lsn)),
            ..Stored::default()
        };
        assert!(still_fits(&stored(40), Lsn(40), &server).is_err());
        assert!(still_fits(&stored(41), Lsn(40), &server).is_ok());
        // Somebody on the old primary has gone on.
        assert!(fits(1, Some(progress(51))));
        assert!(!fits(2, Some(progress(51))));
    }
}
