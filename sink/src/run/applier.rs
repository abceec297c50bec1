//! The thread that writes to Redis: takes segments, has them applied, and says how far Redis is.

use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use walmirror_proto::Lsn;

use super::metrics::add;
use super::shared::Shared;
use super::stalled::Stalled;
use crate::backfill::Backfill;
use crate::config::{Durability, RedisUrl};
use crate::error::Error;
use crate::redis::{Applied, Segment, Writer};
use crate::rejected::{Rejected, Told};

/// An idle session asks Redis this often whether it is still there and still ours …
const CHECK_EVERY: Duration = Duration::from_secs(1);
/// … and more often where memory counts as durable early, because nothing does until Redis has answered.
const CHECK_EVERY_MIN: Duration = Duration::from_millis(50);
/// Under load Redis says this often whether it is a master still.
const ROLE_EVERY: Duration = Duration::from_millis(50);
/// How long replicas or the disk are waited for at once: as long as that, nothing is applied.
const WAIT_MS: u64 = 100;
/// How often they are asked.
const WAIT_EVERY: Duration = Duration::from_millis(50);

/// A purge may take so long at an end in good order. Given up, it leaves what was applied before it unconfirmed.
const PURGE_AT_END: Duration = Duration::from_secs(2);

/// Applies until the planner ends.
pub(super) fn apply(
    mut writer: Writer,
    segments: &Receiver<Segment>,
    room: &Sender<()>,
    shared: &Arc<Shared>,
    backfill: &Arc<Backfill>,
    durability: Durability,
    url: &RedisUrl,
) -> Result<(), Error> {
    let check_every = match durability {
        Durability::Memory { window } => (window / 2).clamp(CHECK_EVERY_MIN, CHECK_EVERY),
        Durability::Replicas { .. } | Durability::Aof => CHECK_EVERY,
    };
    let names = Arc::clone(backfill);
    writer.set_tables(move |oid| names.table(oid));
    let mut heard = Instant::now();
    let mut said = heard;
    let mut waited = Instant::now();
    let mut role_asked = waited;
    let mut durable = Lsn::INVALID;
    let mut stalled = Stalled::new(waited);
    let asks = !matches!(durability, Durability::Memory { .. });
    // Whether a part of the next segment was sent.
    let mut is_ahead = false;
    if durability == Durability::Aof {
        // A Redis that knows no WAITAOF, or has no append-only file, is told of at once and not at the first change.
        writer.wait_aof(1)?;
        if writer.never_syncs()? {
            tracing::warn!(
                next = url.complete("redis-cli CONFIG SET appendfsync everysec"),
                "--durability aof, and Redis' appendfsync is no: nothing is ever confirmed, and Postgres keeps its WAL"
            );
        }
    }
    let mut next: Option<Segment> = None;
    // When a purge was first told that the session ends.
    let ending = Cell::new(None);
    loop {
        match next.take().map_or_else(|| segments.recv_timeout(WAIT_EVERY), Ok) {
            Ok(segment) => {
                let commands = segment.batch.commands().count() as u64;
                next = segments.try_recv().ok();
                let asked = Instant::now();
                if role_asked.elapsed() >= ROLE_EVERY {
                    role_asked = asked;
                    writer.ask_role();
                }
                let stopped = || {
                    // Asked after each page of a purge, which may take long.
                    shared.health.note_redis();
                    if shared.is_running() {
                        return false;
                    }
                    let since = ending.get().unwrap_or_else(Instant::now);
                    ending.set(Some(since));
                    shared.has_failed() || since.elapsed() > PURGE_AT_END
                };
                // A DISCARD of what was sent ahead of a question would take the WATCH along, which tells of any loss.
                let sent = next.as_ref().filter(|_| !asks || waited.elapsed() < WAIT_EVERY);
                is_ahead = sent.is_some();
                let applied = writer.apply(segment, sent, &stopped)?;
                said = Instant::now();
                shared.health.note_redis();
                add(&shared.metrics.commands, commands);
                if let Some(applied) = applied {
                    // An EXEC was sent since. What was sent ahead may have been answered by a Redis that is not there any more.
                    heard = asked;
                    shared.set_heard(asked);
                    add(&shared.metrics.batches, 1);
                    if applied.pending {
                        backfill.note_pending();
                    }
                    backfill.answer(applied.asked);
                    reject(&mut writer, &applied, shared, backfill)?;
                    shared.set_applied(applied.step.lsn);
                    shared
                        .health
                        .note_applied(applied.step.lsn, applied.step.last.map(|last| last.time));
                }
                let _ = room.send(());
            }
            Err(RecvTimeoutError::Timeout) if heard.elapsed() >= check_every && !writer.is_open() => {
                heard = Instant::now();
                writer.check()?;
                shared.set_heard(heard);
                shared.wake_stream();
            }
            // Behind MULTI it would queue the question, and the rest of a transaction is on its way.
            Err(RecvTimeoutError::Timeout) if writer.is_open() => {
                if said.elapsed() >= CHECK_EVERY {
                    writer.keep_alive()?;
                    said = Instant::now();
                }
                shared.health.note_redis();
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                // What Redis has is confirmed at once now, whatever its window: so it has to be there.
                writer.abandon()?;
                writer.check()?;
                shared.set_clean();
                return Ok(());
            }
        }
        let applied = shared.applied();
        if applied <= durable {
            stalled.moves(Instant::now());
        } else if waited.elapsed() >= WAIT_EVERY && !writer.is_open() && !is_ahead {
            waited = Instant::now();
            match ask(&mut writer, durability)? {
                Answer::Durable => {
                    durable = applied;
                    shared.set_durable(applied);
                    stalled.moves(waited);
                }
                Answer::NotYet(answer) => {
                    if let Some(time) = stalled.waits(waited) {
                        tracing::warn!(
                            lsn = %applied,
                            next = url.complete("redis-cli INFO replication   # and INFO persistence; or --durability memory"),
                            "nothing has become durable in Redis for {} s: {answer}. The slot stands still, and Postgres keeps its WAL",
                            time.as_secs()
                        );
                    }
                }
                Answer::Unasked => {}
            }
            waited = Instant::now();
        }
    }
}

/// What Redis says of whether everything so far is durable.
enum Answer {
    Durable,
    /// In its own figures.
    NotYet(String),
    /// Memory counts by its age.
    Unasked,
}

fn ask(writer: &mut Writer, durability: Durability) -> Result<Answer, Error> {
    Ok(match durability {
        Durability::Memory { .. } => Answer::Unasked,
        Durability::Replicas { count } => match writer.wait_replicas(count, WAIT_MS)? {
            acknowledged if acknowledged >= i64::from(count) => Answer::Durable,
            acknowledged => Answer::NotYet(format!(
                "WAIT answers that {acknowledged} replicas have it, and --durability asks for {count}"
            )),
        },
        Durability::Aof if writer.wait_aof(WAIT_MS)? => Answer::Durable,
        Durability::Aof => {
            Answer::NotYet("WAITAOF answers that the append-only file on the disk does not have it".into())
        }
    })
}

/// Notes rows whose keys hold another type: what is there stays, and the mirror goes on without them.
fn reject(
    writer: &mut Writer,
    applied: &Applied,
    shared: &Arc<Shared>,
    backfill: &Arc<Backfill>,
) -> Result<(), Error> {
    if applied.refused.is_empty() {
        return Ok(());
    }
    add(&shared.metrics.rejected, applied.refused.len() as u64);
    let rejected: Vec<Rejected> = applied
        .refused
        .iter()
        .map(|refused| Rejected {
            key: refused.key.clone(),
            table: backfill
                .table(refused.relation)
                .unwrap_or_else(|| refused.relation.to_string()),
            lsn: applied.step.lsn,
            reason: "its key holds another type, and stays as it is (WRONGTYPE)".to_owned(),
        })
        .collect();
    let mut told = Told::default();
    rejected.iter().for_each(|one| told.log(one));
    told.end();
    writer.note_rejected(&rejected)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use crossbeam_channel::unbounded;

    use super::super::health::{Began, Health, SILENCE};
    use super::*;
    use crate::plan::{Batch, RedisKeys};
    use crate::redis::server::Server;
    use crate::redis::{Claim, Identity};

    /// The story: while a transaction of megabytes came over a slow link, `/readyz` said that Redis was silent, which was not asked anything.
    #[test]
    fn redis_is_not_silent_while_a_transaction_is_on_its_way() {
        let Some(server) = Server::start() else { return };
        let keys = RedisKeys::new("s");
        let (identity, start) = (Identity::default(), Some(Lsn(1)));
        let claim = Claim::take(server.connect(), &keys, "s", &identity, start, |_| Ok(())).unwrap();
        let writer = Writer::new(claim, keys).unwrap();
        let health = Arc::new(Health::default());
        let shared = Arc::new(Shared::of(&health, Lsn(1)));
        let (segment_sender, segments) = unbounded();
        let (room_sender, room) = unbounded();
        let of_thread = Arc::clone(&shared);
        let (backfill, url) = (Arc::new(Backfill::default()), server.url());
        let durability = Durability::Memory { window: SILENCE };
        let applier = std::thread::spawn(move || {
            apply(
                writer,
                &segments,
                &room_sender,
                &of_thread,
                &backfill,
                durability,
                &url,
            )
        });
        let mut batch = Batch::new();
        Writer::open(batch.bookkeeping());
        batch.seal();
        let segment = Segment {
            batch,
            opens: true,
            ..Segment::default()
        };
        segment_sender.send(segment).unwrap();
        room.recv().unwrap();
        health.began(Began {
            proved: true,
            ..Began::default()
        });
        std::thread::sleep(SILENCE + Duration::from_millis(500));
        health.note_stream(None);
        assert_eq!(health.ready(), Ok(()));
        drop(segment_sender);
        applier.join().unwrap().unwrap();
        assert!(shared.is_clean());
    }
}
