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
    /// Neither has been here before: make the slot, mirror everything. Some: an earlier attempt has made the slot, which can be used
    /// from there on.
    First(Option<Lsn>),
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

/// What the session before found in the stream: it is of another history than what Redis holds, or there is none any more. Nothing was written or confirmed
/// since, so this process need not remember it over its end: another one finds it once more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// For a person.
    pub(super) why: String,
    /// The epoch of that session. If another one has begun since, it may be healed.
    pub(super) epoch: u64,
    /// Nothing can be read from the slot, whatever it says of itself.
    pub(super) slot_is_lost: bool,
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
        (None, None) => Decision::First(None),
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
        // Of the same cluster: a slot that is there now was made since, and whatever it leaves out is read by the backfills.
        (Some(progress), slot) if progress.first && slot.is_some() == usable.is_some() => {
            Decision::First(usable)
        }
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
                Some(found) => Decision::Gap {
                    why: found.why.clone(),
                    slot: usable.filter(|_| !found.slot_is_lost),
                },
                None => Decision::Resume(progress.lsn),
            },
        },
    }
}

/// How far Redis has seen the WAL: a transaction of which it has a part, or for which it has lost keys, was whole when it was sent.
fn reach(progress: &Progress) -> Lsn {
    let part = progress.part.map(|part| part.commit_lsn);
    let purged = progress.purging.and_then(|purging| Some(purging.commit?.lsn));
    let behind = part.max(purged).map(|commit| Lsn(commit.0.saturating_add(1)));
    behind.map_or(progress.lsn, |behind| behind.max(progress.lsn))
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
    if slot.failover != Some(true) {
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
    match progress.purging?.commit {
        Some(commit) if commit.lsn < left => None,
        Some(commit) => Some(format!(
            "{at}, which begins at {left}, and Redis has lost keys to the transaction that commits at {}: Postgres lost it",
            commit.lsn
        )),
        None => Some(format!(
            "{at}, and Redis has lost keys to a change behind {}, which Postgres may have lost",
            progress.lsn
        )),
    }
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
            // A sink of before the server was put back may have gone on. What it is to be compared with might never come.
            if reach(progress) > server.end {
                return changed("it is beyond where the server's WAL ended");
            }
            let strayed = server.slot.and_then(|slot| strayed(progress, slot, server));
            strayed.map_or(Ok(()), |why| changed(&why))
        }
        _ => changed("it went back or was removed"),
    }
}

#[cfg(test)]
mod tests;
