//! One session: a handshake, the threads, and their end in good order. Whatever fails ends the session; the next one
//! begins with a handshake. There is one path for every failure.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{JoinHandle, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::unbounded;

use super::decide::Found;
use super::ending::{End, Ended, SILENCE, WORKERS, have_ended, unless_stopped};
use super::handshake::{Handshake, shake};
use super::health::{Began, Health};
use super::plan_loop::{self, Channels};
use super::planning::{Limits, Planning, Start};
use super::shared::{Input, Phase, Shared};
use super::{applier, receiver, versions};
use crate::backfill::{Backfill, Context, Role, work};
use crate::config::{RunConfig, Streaming};
use crate::continuity::Last;
use crate::error::Error;
use crate::gate::Gate;
use crate::plan::RedisKeys;
use crate::pq::Waker;
use crate::shutdown::Shutdown;
use crate::spool::Spool;

/// Memory of the gate.
const GATE_BYTES: usize = 4 * 1024 * 1024;
/// How often the session looks whether it should end.
const TICK: Duration = Duration::from_millis(20);
/// How often a line says how far the mirror is.
const LOG_EVERY: Duration = Duration::from_secs(30);

/// Runs a session to its end. `began` is called once streaming has begun.
/// `patience`: how many times longer than usual the server may be silent.
/// `found`: what the session before found in the stream; what this one finds, if that is why it ends.
pub(super) fn run(
    config: &RunConfig,
    shutdown: &Shutdown,
    health: &Arc<Health>,
    patience: u32,
    found: &mut Option<Found>,
    began: impl FnOnce(),
) -> Result<End, Error> {
    let keys = RedisKeys::new(config.slot.as_str());
    let interrupt = shutdown.waker()?;
    let begin = {
        let (config, keys, found) = (config.clone(), keys.clone(), found.take());
        let streaming = config.streaming == Streaming::On && health.can_spool();
        move || shake(&config, &keys, found.as_ref(), &interrupt, streaming)
    };
    let Handshake {
        stream,
        writer,
        epoch,
        scripts,
        stored,
        value_bytes,
        fresh,
        continuity,
        confirmed,
        silence,
        horizon,
        extension,
    } = unless_stopped(shutdown, "handshake", begin)?;
    let silence = silence.saturating_mul(patience);
    let start_lsn = fresh.unwrap_or_else(|| {
        stored
            .progress
            .as_ref()
            .map(|progress| progress.lsn)
            .unwrap_or_default()
    });
    // Until the stream is known to be of the history that Redis mirrors, nothing more is confirmed than was.
    let is_proved = continuity.is_proved();
    let applied = if is_proved { start_lsn } else { confirmed };
    let shared = Arc::new(Shared::of(health, applied));
    shared.set_stream_waker(stream.waker());
    let backfill = Arc::new(Backfill::default());
    // A transaction id is used once: markers of earlier sessions, which may come again, are told apart. The epoch would
    // not do, because it begins anew in an emptied Redis.
    let marker_prefix = format!("{}:{horizon}:", config.slot.as_str());
    tracing::info!(slot = config.slot.as_str(), lsn = %start_lsn, epoch, "streaming");
    let planning = Planning::new(Start {
        keys: keys.clone(),
        scripts,
        stored: stored.clone(),
        fresh,
        continuity,
        gate: Gate::new(
            GATE_BYTES,
            horizon,
            horizon ^ u64::from(std::process::id()).rotate_left(32),
        ),
        slot: config.slot.as_str().to_owned(),
        marker_prefix: marker_prefix.clone(),
        limits: Limits {
            batch_bytes: config.batch_bytes,
            transaction_bytes: config.transaction_bytes,
            value_bytes,
        },
        on_bad_row: config.on_bad_row,
        spool: Spool::new(config.spool_dir.clone()),
        backfill: Arc::clone(&backfill),
        shared: Arc::clone(&shared),
    })?;
    let stored = stored.progress.as_ref();
    let last = stored
        .filter(|_| fresh.is_none())
        .and_then(|progress| progress.last);
    let commit_time = match last {
        Some(Last::Commit(commit)) => Some(commit.time),
        _ => None,
    };
    let healing = stored.is_some_and(|progress| progress.resync || progress.healing);
    began();
    health.began(Began {
        fresh: fresh.is_some(),
        healing,
        proved: is_proved,
        applied: start_lsn,
        commit_time,
    });

    let (input_sender, input) = unbounded();
    let (segment_sender, segments) = unbounded();
    let (room_sender, room) = unbounded();
    // Not those of the shutdown: a worker is interrupted only once its chunks are of no use any more.
    let interrupts = [waker()?, waker()?, waker()?];
    let context = |interrupt: &Waker| Context {
        backfill: Arc::clone(&backfill),
        chunks: input_sender.clone(),
        postgres: config.postgres.clone(),
        redis: config.redis.clone(),
        keys: keys.clone(),
        marker_prefix: marker_prefix.clone(),
        interrupt: interrupt.clone(),
        silence,
    };
    let contexts: Vec<(Role, Context)> = Role::ALL
        .into_iter()
        .zip(interrupts.iter().map(context))
        .collect();
    let answers = writer.answers();
    let (shared, backfill) = (&shared, &backfill);
    let ended = std::thread::scope(|scope| {
        let sender = input_sender.clone();
        let receiver = guard(scope, shared, "receiver", move || {
            receiver::receive(stream, shared, &sender, config.durability, confirmed, silence)
        })?;
        let channels = Channels {
            input,
            segments: segment_sender,
            room,
        };
        let planner = guard(scope, shared, "planner", move || {
            plan_loop::plan(planning, &channels, shared)
        })?;
        let (durability, url) = (config.durability, config.redis.clone());
        let (of_applier, tables) = (Arc::clone(shared), Arc::clone(backfill));
        let applier = guard_apart(shared, "applier", move || {
            applier::apply(
                writer,
                &segments,
                &room_sender,
                &of_applier,
                &tables,
                durability,
                &url,
            )
        })?;
        let mut workers = Vec::new();
        for (role, context) in contexts {
            let worker = guard_apart(shared, role.name(), move || work(&context, role));
            workers.push(worker.inspect_err(|_| {
                // Those that run already wait for a planner that is not there any more.
                backfill.stop();
                interrupts.iter().for_each(Waker::wake);
            })?);
        }
        let ended = watch(config, shutdown, shared, backfill);
        // In the order in which data flows, so that what is complete still gets through.
        shared.enter(Phase::Draining);
        backfill.stop();
        let _ = input_sender.send(Input::Stop);
        let mut panicked = planner.join().is_err();
        let mut patience = SILENCE;
        if have_ended(&[&applier], shutdown, patience, || answers.count()) {
            panicked |= applier.join().is_err();
        } else {
            patience = WORKERS;
        }
        interrupts.iter().for_each(Waker::wake);
        if have_ended(&workers.iter().collect::<Vec<_>>(), shutdown, patience, || 0) {
            for worker in workers {
                panicked |= worker.join().is_err();
            }
        }
        shared.enter(Phase::Closing);
        panicked |= receiver.join().is_err();
        if panicked {
            return Err(Error::bug("a thread of the session panicked"));
        }
        Ok(ended)
    })?;
    match shared.take_failure() {
        Some(error) => {
            let slot_is_lost = error.is_wal_removed();
            let why = if slot_is_lost {
                Some(error.to_string())
            } else {
                error.gap_reason().map(str::to_owned)
            };
            *found = why.map(|why| Found {
                why,
                epoch,
                slot_is_lost,
            });
            Err(versions::explain(error, config.slot.as_str(), &extension))
        }
        None => Ok(End::of(ended, shared)),
    }
}

/// Starts a thread of the session. Its error is kept before it lets go of its channels: what fails because of that comes
/// later.
fn guard<'scope>(
    scope: &'scope Scope<'scope, '_>,
    shared: &'scope Shared,
    name: &str,
    work: impl FnOnce() -> Result<(), Error> + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, ()>, Error> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn_scoped(scope, move || run_in(shared, work))
        .map_err(|error| not_started(shared, name, error))
}

/// The same for one that waits for Redis: where that is silent, a process that is to stop leaves the thread behind.
fn guard_apart(
    shared: &Arc<Shared>,
    name: &str,
    work: impl FnOnce() -> Result<(), Error> + Send + 'static,
) -> Result<JoinHandle<()>, Error> {
    let of_thread = Arc::clone(shared);
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || run_in(&of_thread, work))
        .map_err(|error| not_started(shared, name, error))
}

/// Whoever panics ends the session too: the others would wait for him for ever, or go on without what he does.
fn run_in(shared: &Shared, work: impl FnOnce() -> Result<(), Error>) {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => {}
        Ok(Err(error)) => shared.fail(error),
        Err(panic) => {
            shared.fail(Error::bug("a thread of the session panicked"));
            resume_unwind(panic);
        }
    }
}

/// Those that run already must not wait for this one.
fn not_started(shared: &Shared, name: &str, error: std::io::Error) -> Error {
    shared.enter(Phase::Closing);
    Error::io(format!("cannot start the thread {name}"), error)
}

fn waker() -> Result<Waker, Error> {
    Waker::new().map_err(|error| Error::io("cannot make a waker", error))
}

/// Waits until the session has to end, and says now and then how it goes.
fn watch(config: &RunConfig, shutdown: &Shutdown, shared: &Shared, backfill: &Backfill) -> Ended {
    let mut logged = Instant::now();
    while shared.is_running() && !shutdown.sleep(TICK) {
        if config.until_lsn.is_some_and(|until| shared.applied() >= until) && backfill.is_idle() {
            return Ended::Reached;
        }
        let health = &shared.health;
        let (tables, due) = backfill.progress();
        health.tables.store(tables, Ordering::Relaxed);
        health.tables_due.store(due, Ordering::Relaxed);
        health.pending.store(backfill.has_pending(), Ordering::Relaxed);
        if backfill.is_idle() {
            health.healed();
        }
        if logged.elapsed() >= LOG_EVERY {
            logged = Instant::now();
            let counters: Vec<String> = shared
                .metrics
                .read()
                .into_iter()
                .map(|(name, count)| format!("{name}={count}"))
                .collect();
            tracing::info!(lsn = %shared.applied(), "{}", counters.join(" "));
        }
    }
    Ended::Stopped
}

#[cfg(test)]
#[allow(clippy::panic)]
mod tests {
    use super::*;
    use walmirror_proto::Lsn;

    /// The story: the session went on without the thread, and nothing came to Redis any more, for as long as the process lived.
    #[test]
    fn a_thread_that_panics_ends_the_session() {
        let shared = Arc::new(Shared::new(Lsn(7)));
        let thread = guard_apart(&shared, "x", || panic!("on purpose"));
        assert!(thread.is_ok_and(|thread| thread.join().is_err()));
        assert!(!shared.is_running());
        let failure = shared.take_failure();
        assert!(failure.is_some_and(|error| error.class() == crate::error::Class::Bug));
    }
}
