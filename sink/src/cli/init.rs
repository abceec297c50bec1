//! `walmirror init`: checks everything, creates the slot, and says what to do next.

use walmirror_proto::Lsn;

use super::checks::{self, Outcome};
use super::checks_slot::slot_outcome;
use super::doctor::print;
use super::{ANSWER, checks_redis, checks_tables, connect_replication, say};
use crate::config::{Options, RedisUrl, SlotName};
use crate::error::{Error, exit};
use crate::plan::RedisKeys;
use crate::redis::{self, Claim, Identity};
use crate::replication::{self, slot::PLUGIN};
use crate::shell::{single_quoted, word};
use crate::shutdown::Shutdown;

/// Does it. A failed check ends it before anything is changed.
pub fn run(options: &Options, shutdown: &Shutdown) -> Result<(), Error> {
    let (conninfo, slot) = (options.postgres()?, options.slot());
    let redis = options.redis_if_given()?;
    let url = redis.as_ref();
    let postgres = print(
        "server",
        exit::POSTGRES,
        Some(checks::postgres(&conninfo, &slot)),
        url,
    );
    let templates = checks_tables::templates(&conninfo);
    let redis_checks = url.map(|url| checks_redis::redis(url, &slot, &templates, Some(&conninfo), true));
    let redis_checks = print("Redis", exit::REDIS, redis_checks, url);
    let unsaid = postgres.unsaid.or(redis_checks.unsaid);
    if let Some(error) = postgres.failure.or(redis_checks.failure).or(unsaid) {
        return Err(error);
    }
    let mut connection = connect_replication(conninfo.expose())?;
    // Without this the server would go on making the slot when nobody waits for it any more.
    connection.interrupt_with(shutdown.waker()?);
    let database = connection.target().database;
    match replication::slot_info(&mut connection, &slot)? {
        Some(info) => match slot_outcome(&slot, Some(&info), &database) {
            Outcome::Fail(what, next) => return Err(Error::setup(what).next(next)),
            _ => say(format!("the slot {slot} exists already"))?,
        },
        None => {
            say(format!(
                "creating the slot {slot}: this waits for all transactions that run now"
            ))?;
            let identity = replication::identify_system(&mut connection)?.into();
            let keys = RedisKeys::new(slot.as_str());
            // Before the slot: should this end between the two, the first `run` finds its own beginning, and no gap.
            if let Some(url) = options.redis_if_given()? {
                redis::begin_first(&mut redis::Connection::connect(&url)?, &keys, &identity)?;
            }
            connection
                .make_patient(conninfo.expose(), ANSWER)
                .map_err(|error| Error::postgres("cannot tell the process of the connection", error))?;
            let made = shutdown.in_order(|| replication::create_slot(&mut connection, &slot, PLUGIN, false));
            let lsn = match (made, shutdown.exit_code()) {
                (Err(_), Some(code)) => {
                    let what = format!("stopped by a signal before the slot {slot} was made");
                    return Err(Error::checks(what, code).next(format!("walmirror init --slot {slot}")));
                }
                (made, _) => made?,
            };
            say(format!(
                "created the slot {slot}: it streams what commits after {lsn}"
            ))?;
            match options.redis_if_given()? {
                Some(url) => begin_progress(&url, &keys, &slot, &identity, lsn)?,
                // A slot without progress looks like a Redis that was emptied.
                None => say(
                    "note: without --redis the first `run` reports a gap, and --on-gap fail would refuse it",
                )?,
            }
        }
    }
    say("\nnext:")?;
    say("  SELECT walmirror.mirror('your_table');   -- in psql, for every table that Redis should hold")?;
    let redis = options
        .redis
        .as_ref()
        .map_or_else(|| "redis://localhost:6379".to_owned(), ToString::to_string);
    say(format!(
        "  walmirror run --postgres {} --redis {} --slot {slot}",
        single_quoted(&conninfo.to_string()),
        word(&redis)
    ))
}

/// Notes in Redis that the mirror of this slot begins here, so that the first `run` finds both sides in agreement.
fn begin_progress(
    url: &RedisUrl,
    keys: &RedisKeys,
    slot: &SlotName,
    identity: &Identity,
    lsn: Lsn,
) -> Result<(), Error> {
    Claim::take(
        redis::Connection::connect(url)?,
        keys,
        slot.as_str(),
        identity,
        Some(lsn),
        |_| Ok(()),
    )?;
    say(format!("Redis begins at {lsn} too"))
}
