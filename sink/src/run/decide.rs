//! Whether Redis and the slot fit together: the decision at the start of a session. Pure.
//!
//! START_REPLICATION behind the confirmed position is moved forward by the server without a word, so it has to be
//! compared before; what lies between would be lost.

use walmirror_proto::Lsn;

use crate::error::{Class, Error};
use crate::progress::Progress;
use crate::redis::{Identity, Stored};
use crate::replication::SlotInfo;

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

/// Compares what Redis and Postgres say.
///
/// `end`: how far the server's WAL is flushed.
pub(super) fn decide(
    progress: Option<&Progress>,
    slot: Option<&SlotInfo>,
    identity: &Identity,
    end: Lsn,
) -> Decision {
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
        (Some(progress), None) => gap(format!("Redis is at {}, but the slot is gone", progress.lsn)),
        (Some(progress), Some(slot)) if usable.is_none() => gap(format!(
            "Redis is at {}, but the slot has lost the WAL from there on (wal_status {})",
            progress.lsn,
            slot.wal_status.as_deref().unwrap_or("unknown")
        )),
        (Some(progress), Some(_)) if progress.timeline != identity.timeline => gap(format!(
            "Redis mirrors timeline {}, the server is on timeline {}: there was a failover or a restore",
            progress.timeline, identity.timeline
        )),
        // Only WAL that is flushed is ever sent. The server would wait until it gets there, and leave out what is before.
        (Some(progress), Some(_)) if progress.lsn > end => gap(format!(
            "Redis is at {}, but the server's WAL ends at {end}: the server was put back to an earlier state",
            progress.lsn
        )),
        (Some(progress), Some(_)) => match usable {
            Some(confirmed) if confirmed > progress.lsn => gap(format!(
                "the slot is confirmed up to {confirmed}, but Redis is only at {}: it lost what is between",
                progress.lsn
            )),
            _ => Decision::Resume(progress.lsn),
        },
    }
}

/// Whether what Redis held when the right to write was taken is what the decision was about: between the two, Redis may have
/// lost its tail, and the stream has begun already.
pub(super) fn still_fits(stored: &Stored, start: Lsn, fresh: Option<Lsn>) -> Result<(), Error> {
    let is_behind = stored
        .progress
        .as_ref()
        .is_none_or(|progress| progress.lsn < start);
    if fresh.is_none() && is_behind {
        let what = "the progress changed while this session began";
        return Err(Error::redis(what, Class::Retry, "it went back or was removed"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const END: Lsn = Lsn(100);

    fn identity() -> Identity {
        Identity {
            system_id: "1".into(),
            timeline: 1,
            database: "d".into(),
        }
    }

    fn progress(lsn: u64) -> Progress {
        let Identity {
            system_id,
            timeline,
            database,
        } = identity();
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
        }
    }

    fn why(decision: &Decision) -> &str {
        if let Decision::Gap { why, .. } = decision {
            why
        } else {
            ""
        }
    }

    #[test]
    fn what_fits_goes_on() {
        assert_eq!(decide(None, None, &identity(), END), Decision::First);
        assert_eq!(
            decide(Some(&progress(10)), Some(&slot(10)), &identity(), END),
            Decision::Resume(Lsn(10))
        );
        assert_eq!(
            decide(Some(&progress(10)), Some(&slot(5)), &identity(), END),
            Decision::Resume(Lsn(10))
        );
    }

    #[test]
    fn what_does_not_fit_is_a_gap_with_a_reason() {
        let ahead = decide(Some(&progress(10)), Some(&slot(11)), &identity(), END);
        assert!(
            matches!(
                &ahead,
                Decision::Gap {
                    slot: Some(Lsn(11)),
                    ..
                }
            ) && why(&ahead).contains("0/B"),
            "{ahead:?}"
        );
        let put_back = decide(Some(&progress(101)), Some(&slot(5)), &identity(), END);
        assert!(
            matches!(
                &put_back,
                Decision::Gap {
                    slot: Some(Lsn(5)),
                    ..
                }
            ) && why(&put_back).contains("0/64"),
            "{put_back:?}"
        );
        let gone = decide(Some(&progress(10)), None, &identity(), END);
        assert!(matches!(&gone, Decision::Gap { slot: None, .. }) && why(&gone).contains("slot is gone"));
        let emptied = decide(None, Some(&slot(5)), &identity(), END);
        assert!(matches!(
            &emptied,
            Decision::Gap {
                slot: Some(Lsn(5)),
                ..
            }
        ));
        for changed in [
            Identity {
                system_id: "2".into(),
                ..identity()
            },
            Identity {
                timeline: 2,
                ..identity()
            },
            Identity {
                database: "e".into(),
                ..identity()
            },
        ] {
            assert!(
                matches!(
                    decide(Some(&progress(10)), Some(&slot(5)), &changed, END),
                    Decision::Gap { .. }
                ),
                "{changed:?}"
            );
        }
        let lost = SlotInfo {
            wal_status: Some("lost".into()),
            ..slot(5)
        };
        assert!(matches!(
            decide(Some(&progress(10)), Some(&lost), &identity(), END),
            Decision::Gap { slot: None, .. }
        ));
    }
}
