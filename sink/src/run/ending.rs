//! The end in good order: how long it waits for what waits for Redis, and what it may say of what is acknowledged.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, bounded};
use walmirror_proto::Lsn;

use super::shared::Shared;
use crate::error::{Class, Error};
use crate::shutdown::Shutdown;

/// Who was asked to stop waits no longer than this for a server that says nothing. What is not answered by then comes again at the next
/// start; whoever sent the signal has 10 s at most (Docker), and then kills.
pub(super) const SILENCE: Duration = Duration::from_secs(3);
/// The same for the workers where Redis has been silent for so long already: they hold nothing that counts.
pub(super) const WORKERS: Duration = Duration::from_millis(500);
const TICK: Duration = Duration::from_millis(5);

/// How a session ended without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// Somebody asked to stop.
    Stopped,
    /// Everything up to `--until-lsn` is applied.
    Reached,
}

/// What was known at the end.
#[derive(Clone, Copy, Debug)]
pub(super) struct End {
    pub(super) reason: Ended,
    /// Redis has answered up to here …
    pub(super) applied: Lsn,
    /// … and was there when it was asked for the last time.
    pub(super) is_clean: bool,
    /// What the server was told that it may forget, if it took that.
    pub(super) acknowledged: Option<Lsn>,
}

impl End {
    pub(super) fn of(reason: Ended, shared: &Shared) -> Self {
        Self {
            reason,
            applied: shared.applied(),
            is_clean: shared.is_clean(),
            acknowledged: shared.acknowledged(),
        }
    }

    /// What could not be done; None: everything was.
    fn lacks(&self) -> Option<&'static str> {
        match self.acknowledged {
            None => Some("Postgres did not take the last position"),
            Some(_) if !self.is_clean => Some("Redis did not answer at the end"),
            Some(acknowledged) if acknowledged < self.applied => {
                Some("Redis does not hold all of it durably yet")
            }
            Some(_) => None,
        }
    }

    pub(super) fn log(&self) {
        let reason = self.reason;
        match self.lacks() {
            None => {
                tracing::info!(
                    ?reason,
                    "the mirror has stopped; everything that was applied is acknowledged"
                )
            }
            // Nobody was silent; replicas or the disk are behind, as they are at any moment.
            Some(why) if self.is_clean && self.acknowledged.is_some() => tracing::info!(
                ?reason,
                applied = %self.applied,
                acknowledged = %self.acknowledged.unwrap_or_default(),
                "the mirror has stopped; {why}: what is not acknowledged comes again at the next start, and nothing is lost"
            ),
            Some(why) => tracing::warn!(
                ?reason,
                applied = %self.applied,
                acknowledged = %self.acknowledged.map_or_else(|| "unknown".to_owned(), |lsn| lsn.to_string()),
                "the mirror has stopped; {why}: what is not acknowledged comes again at the next start, and nothing is lost"
            ),
        }
    }
}

/// Waits until the threads have ended; false: somebody asked to stop, and since then nothing was heard (`answers`, a number that grows) for
/// so long. A thread that is left so ends with the process.
pub(super) fn have_ended(
    threads: &[&JoinHandle<()>],
    shutdown: &Shutdown,
    patience: Duration,
    answers: impl Fn() -> u64,
) -> bool {
    let (mut seen, mut since) = (answers(), Instant::now());
    while !threads.iter().all(|thread| thread.is_finished()) {
        let now = answers();
        if now != seen || !shutdown.requested() {
            (seen, since) = (now, Instant::now());
        }
        if since.elapsed() >= patience {
            return false;
        }
        std::thread::sleep(TICK);
    }
    true
}

/// Does what may wait for a silent server in a thread of its own, which is left behind where somebody asks to stop meanwhile.
pub(super) fn unless_stopped<T: Send + 'static>(
    shutdown: &Shutdown,
    name: &str,
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let (sender, done) = bounded(1);
    let run = move || drop(sender.send(work()));
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(run)
        .map_err(|error| Error::io(format!("cannot start the thread {name}"), error))?;
    let mut asked = None;
    loop {
        match done.recv_timeout(TICK * 4) {
            Ok(result) => return result,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::bug(format!("the thread {name} panicked")));
            }
            Err(RecvTimeoutError::Timeout) if shutdown.requested() => {
                let asked = asked.get_or_insert_with(Instant::now);
                if asked.elapsed() >= SILENCE {
                    return Err(Error::redis(
                        "cannot begin to mirror",
                        Class::Retry,
                        "no answer yet",
                    ));
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn all_is_said_to_be_acknowledged_only_where_it_is() {
        let end = End {
            reason: Ended::Stopped,
            applied: Lsn(7),
            is_clean: true,
            acknowledged: Some(Lsn(7)),
        };
        assert_eq!(end.lacks(), None);
        for (end, why) in [
            (
                End {
                    is_clean: false,
                    ..end
                },
                "Redis did not answer",
            ),
            (
                End {
                    acknowledged: None,
                    ..end
                },
                "Postgres did not take",
            ),
            (
                End {
                    acknowledged: Some(Lsn(6)),
                    ..end
                },
                "durably",
            ),
        ] {
            assert!(end.lacks().is_some_and(|lacks| lacks.contains(why)), "{end:?}");
        }
    }

    #[test]
    fn who_is_silent_is_left_once_somebody_asks_to_stop() {
        let shutdown = Shutdown::manual();
        shutdown.request();
        let (release, held) = bounded::<()>(1);
        let thread = std::thread::spawn(move || {
            let _ = held.recv();
        });
        let patience = Duration::from_millis(50);
        assert!(!have_ended(&[&thread], &shutdown, patience, || 0));
        let start = Instant::now();
        // As long as there are answers it is waited for.
        let answers = || (start.elapsed().as_millis() as u64).min(200);
        assert!(!have_ended(&[&thread], &shutdown, patience, answers));
        assert!(start.elapsed() >= Duration::from_millis(250));
        release.send(()).unwrap();
        assert!(have_ended(&[&thread], &shutdown, DEADLINE, || 0));
    }

    const DEADLINE: Duration = Duration::from_secs(60);
}
