//! Stopping in good order: SIGTERM, SIGINT and SIGHUP set a flag and wake whoever waits.
//!
//! `main` installs it; `run` looks at it between steps; `pq` and `replication` are woken by it in the middle of a wait.
//! A second signal ends the process at once. A command that leaves nothing behind ends at the first one, wherever it is.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::error::Error;
use crate::pq::Waker;

/// Whether whoever started the process has it ignore a signal. Where the system does not tell, it is taken to: then the signal does what it
/// did.
fn ignores(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_none_or(|mask| (mask >> (signal - 1)) & 1 == 1)
}

/// As a shell tells that a signal ended a process.
fn exit_code(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(u8::MAX)
}

#[derive(Debug, Default)]
struct Inner {
    requested: AtomicBool,
    // Apart from `requested`, so that the first signal is never taken for a second one when the process is stopping
    // already, for a reason of its own.
    signalled: Arc<AtomicBool>,
    /// The signal that came.
    signal: AtomicI32,
    /// There is something to be put in order first: a signal only asks to stop.
    in_order: AtomicBool,
    wakers: Mutex<Vec<Waker>>,
    changed: Condvar,
}

/// Whether the process should stop. Clones share the same state.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    inner: Arc<Inner>,
}

impl Shutdown {
    /// One that only [`Shutdown::request`] raises: for tests.
    pub fn manual() -> Self {
        Self::default()
    }

    /// One that SIGTERM, SIGINT and SIGHUP raise; the last one not where it is ignored, as under nohup. Starts a thread that waits for the signals.
    pub fn install() -> Result<Self, Error> {
        let shutdown = Self::default();
        shutdown.inner.in_order.store(true, Ordering::Release);
        shutdown.listen(|_| ())
    }

    /// The same for a command that leaves nothing behind, but within [`Self::in_order`]: `report` tells of the exit code, and the process
    /// ends with that. A server that says nothing is not waited for.
    pub fn install_at_once(report: impl Fn(u8) + Send + 'static) -> Result<Self, Error> {
        Self::default().listen(report)
    }

    /// Does what has to be put in order if a signal comes: until it is done, that only asks to stop.
    pub fn in_order<T>(&self, work: impl FnOnce() -> T) -> T {
        self.inner.in_order.store(true, Ordering::Release);
        let done = work();
        self.inner.in_order.store(false, Ordering::Release);
        done
    }

    /// The exit code of a process that the signal which came has ended.
    pub fn exit_code(&self) -> Option<u8> {
        Some(self.inner.signal.load(Ordering::Acquire))
            .filter(|signal| *signal != 0)
            .map(exit_code)
    }

    fn listen(self, report: impl Fn(u8) + Send + 'static) -> Result<Self, Error> {
        let failed = |error| Error::io("cannot install the signal handlers", error);
        let shutdown = self;
        let mut stopping = vec![SIGTERM, SIGINT];
        stopping.extend(Some(SIGHUP).filter(|_| !ignores(SIGHUP)));
        for signal in stopping.iter().copied() {
            // Acts only when the flag is up already: the second signal, for somebody who does not want to wait.
            let flag = Arc::clone(&shutdown.inner.signalled);
            signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, flag).map_err(failed)?;
            signal_hook::flag::register(signal, Arc::clone(&shutdown.inner.signalled)).map_err(failed)?;
        }
        let mut signals = signal_hook::iterator::Signals::new(&stopping).map_err(failed)?;
        let for_thread = shutdown.clone();
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for signal in signals.forever() {
                    for_thread.inner.signal.store(signal, Ordering::Release);
                    if !for_thread.inner.in_order.load(Ordering::Acquire) {
                        let code = exit_code(signal);
                        report(code);
                        signal_hook::low_level::exit(code.into());
                    }
                    tracing::info!(signal, "stopping: a second signal ends the process at once");
                    for_thread.request();
                }
            })
            .map_err(failed)?;
        Ok(shutdown)
    }

    /// Asks everybody to stop.
    pub fn request(&self) {
        self.inner.requested.store(true, Ordering::Release);
        let wakers = self.inner.wakers.lock().unwrap_or_else(PoisonError::into_inner);
        for waker in wakers.iter() {
            waker.wake();
        }
        drop(wakers);
        self.inner.changed.notify_all();
    }

    /// Whether somebody has asked to stop.
    pub fn requested(&self) -> bool {
        self.inner.requested.load(Ordering::Acquire) || self.inner.signalled.load(Ordering::Acquire)
    }

    /// Raises `waker`, too, when the time has come (at once, if it has come already).
    pub fn subscribe(&self, waker: &Waker) {
        let mut wakers = self.inner.wakers.lock().unwrap_or_else(PoisonError::into_inner);
        wakers.retain(|other| !other.is_abandoned());
        wakers.push(waker.clone());
        drop(wakers);
        if self.requested() {
            waker.wake();
        }
    }

    /// A new waker that is raised when the time has come: for `Connection::interrupt_with`.
    pub fn waker(&self) -> Result<Waker, Error> {
        let waker = Waker::new().map_err(|error| Error::io("cannot make a waker", error))?;
        self.subscribe(&waker);
        Ok(waker)
    }

    /// Sleeps, for at most `time`. True: ended early, because somebody has asked to stop.
    pub fn sleep(&self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        let mut guard = self.inner.wakers.lock().unwrap_or_else(PoisonError::into_inner);
        while !self.requested() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            // The flag may also be set by the signal handler itself, a moment before the thread tells: the step bounds
            // how long that can go unseen.
            let step = left.min(Duration::from_millis(200));
            guard = self
                .inner
                .changed
                .wait_timeout(guard, step)
                .map_or_else(|error| error.into_inner().0, |(guard, _)| guard);
        }
        true
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_request_ends_a_sleep_and_raises_the_wakers() {
        let shutdown = Shutdown::manual();
        assert!(!shutdown.sleep(Duration::from_millis(1)));
        let other = shutdown.clone();
        let thread = std::thread::spawn(move || other.request());
        assert!(shutdown.sleep(Duration::from_secs(60)));
        thread.join().unwrap();
        assert!(shutdown.requested());
    }

    #[test]
    fn wakers_that_nobody_waits_on_are_forgotten() {
        let shutdown = Shutdown::manual();
        for _ in 0..100 {
            drop(shutdown.waker().unwrap());
        }
        assert!(shutdown.inner.wakers.lock().unwrap().len() <= 1);
    }
}
