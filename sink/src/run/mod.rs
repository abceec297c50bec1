//! `walmirror run`: sessions, one after the other. A session is a handshake and six threads:
//!
//!   receiver ─frames─▶ planner ─segments─▶ applier ─▶ Redis          (stream, gate and plan, MULTI/EXEC)
//!       ▲                 ▲                    │
//!       └───── applied LSN┼────────────────────┘        backfill workers ─chunks─▶ planner
//!
//! The planner alone decides what is written, the applier alone writes, the receiver alone confirms.

mod applier;
mod decide;
mod durability;
mod ending;
mod handshake;
mod health;
mod metrics;
mod outlook;
mod plan_loop;
mod planning;
mod receiver;
mod session;
mod shared;
#[cfg(test)]
mod simulator;
mod stalled;
mod versions;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

pub use health::Health;
pub use metrics::Metrics;
pub use outlook::{Outlook, outlook};
pub use shared::Input;

use crate::admin::Admin;
use crate::config::RunConfig;
use crate::error::{Class, Error};
use crate::shutdown::Shutdown;

/// The longest pause between two attempts, but for the quarter more that chance may add: ten seconds after all is well it goes on.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// A session that lasted this long worked: what ends it is a new failure.
const STEADY: Duration = Duration::from_secs(10);

/// The longest silence is so many doublings of the first one.
const SILENCES_MAX: u32 = 6;
/// A session that lasted this long, and longer with each doubling, did more than wait for a silent server: where one ends it, that has
/// nothing to do with the silence before.
const SILENCE_ANEW: Duration = Duration::from_secs(3600);

/// What may be said of an end outside of a session.
const BETWEEN: &str = "What is not acknowledged comes again at the next start, and nothing is lost";

/// Mirrors until somebody asks to stop, `--until-lsn` is reached, or an error needs a person.
pub fn run(config: &RunConfig, shutdown: &Shutdown) -> Result<(), Error> {
    let health = Arc::new(Health::default());
    let _admin = Admin::start(config, &health)?;
    let started = Instant::now();
    let mut streamed = false;
    let mut failures = 0;
    let mut silences = 0;
    let mut found = None;
    loop {
        let session = Instant::now();
        // What keeps a server silent may be work that it would begin anew each time: it gets twice as long the next time.
        let patience = patience(silences);
        let result = session::run(config, shutdown, &health, patience, &mut found, || {
            streamed = true
        });
        health.ended();
        if session.elapsed() >= STEADY {
            failures = 0;
        }
        let error = match result {
            Ok(end) => {
                end.log();
                return Ok(());
            }
            // What fails while the process is told to stop fails because of that.
            Err(error) if shutdown.requested() => {
                tracing::info!("the mirror has stopped, in the middle of this: {error}. {BETWEEN}");
                return Ok(());
            }
            Err(error) => error,
        };
        if found.is_some() {
            // The next session begins with that, and heals or refuses it.
            continue;
        }
        let passes = error.class() == Class::Retry || error.is_slot_gone();
        let heals = passes || streamed && error.heals_later();
        if !heals || config.once {
            return Err(error);
        }
        if let Some(limit) = config
            .connect_timeout
            .filter(|limit| !streamed && !error.is_slot_in_use() && started.elapsed() >= *limit)
        {
            return Err(Error::unreachable("cannot begin to mirror", limit, error));
        }
        let pause = pause(failures);
        failures += 1;
        health.retries.fetch_add(1, Ordering::Relaxed);
        if matches!(error, Error::Spool(..)) {
            health.note_cannot_spool();
            tracing::warn!(
                directory = %config.spool_dir.display(),
                next = "walmirror run --spool-dir <a directory with room> …",
                "there is no room for transactions in progress: until the next start Postgres keeps them until they commit"
            );
        }
        silences = silent(silences, error.is_silence(), session.elapsed());
        if passes {
            tracing::warn!(next_attempt_in = ?pause, "{error}");
        } else {
            // Only a person can mend it, and this process need not be told when that is done.
            tracing::error!(next_attempt_in = ?pause, next = config.redis.complete(error.next_command().unwrap_or_default()), "{error}");
        }
        if shutdown.sleep(pause) {
            tracing::info!("the mirror has stopped between two attempts. {BETWEEN}");
            return Ok(());
        }
    }
}

/// How many times longer than usual the server may be silent, after so many silences.
fn patience(silences: u32) -> u32 {
    1 << silences.min(SILENCES_MAX)
}

/// How many silences have followed each other, with the end of a session that lasted so long.
fn silent(silences: u32, is_silence: bool, lasted: Duration) -> u32 {
    let is_new = lasted >= SILENCE_ANEW.saturating_mul(patience(silences));
    match (is_silence, is_new) {
        (false, _) => 0,
        (true, true) => 1,
        (true, false) => silences + 1,
    }
}

/// Doubles from 100 ms; up to a quarter more or less, so that many sinks do not come back at once.
fn pause(failures: u32) -> Duration {
    let base = Duration::from_millis(100)
        .saturating_mul(1 << failures.min(10))
        .min(PAUSE_MAX);
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let jitter = (clock.subsec_nanos() ^ std::process::id().rotate_left(16)) % 512;
    base * 3 / 4 + base * jitter / 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The story: a network that falls silent once a week was noticed after a minute at first, and after more than an hour in the end.
    #[test]
    fn a_silence_counts_with_those_that_it_follows_soon() {
        let (soon, later) = (Duration::from_secs(120), Duration::from_secs(100 * 3600));
        let mut silences = 0;
        for count in 1..=9 {
            // What is done before the silence is done anew each time, and then it is waited for longer.
            silences = silent(silences, true, soon * patience(silences));
            assert_eq!(silences, count);
        }
        assert_eq!(patience(silences), 1 << SILENCES_MAX);
        assert_eq!(silent(silences, true, later), 1);
        assert_eq!(silent(silences, false, soon), 0);
    }

    #[test]
    fn pauses_grow_to_a_limit() {
        for failures in 0..40 {
            let pause = pause(failures);
            assert!(
                pause >= Duration::from_millis(75) && pause <= PAUSE_MAX * 5 / 4,
                "{failures}: {pause:?}"
            );
        }
        assert!(pause(0) <= Duration::from_millis(125));
        assert!(pause(9) >= PAUSE_MAX * 3 / 4);
    }
}
