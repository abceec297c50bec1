//! What a session that began now would find, for `doctor`: the same questions and the same decision, and nothing is changed.

use std::time::Duration;

use super::decide::{Decision, Server, decide};
use super::handshake::ancestors;
use crate::config::Conninfo;
use crate::error::Error;
use crate::plan::RedisKeys;
use crate::pq::{Connection as Postgres, connect_failed};
use crate::redis::{Connection as Redis, Identity, read_stored};
use crate::replication::{identify_system, slot_info};

/// How the next session would begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outlook {
    /// It would go on.
    GoesOn,
    /// It would make the slot and mirror everything.
    First,
    /// A gap, for this reason: everything would be mirrored anew, or refused.
    Gap(String),
}

/// How long Postgres may take to answer.
const ANSWER: Duration = Duration::from_secs(60);

/// Looks at both sides.
pub fn outlook(conninfo: &Conninfo, redis: &mut Redis, slot: &str) -> Result<Outlook, Error> {
    let extra = [("replication", "database")];
    let mut replication = Postgres::connect(conninfo.expose(), &extra).map_err(connect_failed)?;
    replication.answer_within(Some(ANSWER));
    // In this order, because a sink may run meanwhile: what it confirms is in Redis before, and in the WAL before that.
    let info = slot_info(&mut replication, slot)?;
    let stored = read_stored(redis, &RedisKeys::new(slot))?;
    let system = identify_system(&mut replication)?;
    let identity = Identity {
        system_id: system.system_id,
        timeline: system.timeline,
        database: system.database.unwrap_or_default(),
    };
    let history = ancestors(&mut replication, stored.progress.as_ref(), &identity)?;
    let server = Server {
        slot: info.as_ref(),
        identity: &identity,
        history: &history,
        end: system.xlogpos,
    };
    Ok(match decide(stored.progress.as_ref(), &server, None) {
        Decision::Resume(_) => Outlook::GoesOn,
        Decision::First(_) => Outlook::First,
        Decision::Gap { why, .. } => Outlook::Gap(why),
    })
}
