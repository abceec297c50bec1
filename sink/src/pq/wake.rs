//! A way to interrupt a thread that sleeps in `poll(2)`.
//!
//! The thread that owns the replication stream spends its life waiting for the server. When Redis has taken a batch, the
//! applying thread wakes it with a `Waker`, so that feedback leaves at once and a synchronous COMMIT does not wait.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

#[derive(Debug)]
struct Pair {
    receiver: UnixStream,
    sender: UnixStream,
    // Whether a byte is already on its way: a thousand wake-ups before the sleeper runs cost one system call.
    raised: AtomicBool,
}

/// Wakes the one thread that waits on it. Clones share the same state; any thread may hold one.
#[derive(Clone, Debug)]
pub struct Waker {
    pair: Arc<Pair>,
}

impl Waker {
    /// A waker that has not been raised. Fails only when the process is out of file descriptors.
    pub fn new() -> io::Result<Self> {
        let (receiver, sender) = UnixStream::pair()?;
        receiver.set_nonblocking(true)?;
        sender.set_nonblocking(true)?;
        Ok(Self {
            pair: Arc::new(Pair {
                receiver,
                sender,
                raised: AtomicBool::new(false),
            }),
        })
    }

    /// Interrupts the waiting thread, now or the next time that it waits.
    pub fn wake(&self) {
        if !self.pair.raised.swap(true, Ordering::AcqRel) {
            // A full socket buffer would mean that the sleeper has plenty to wake up for.
            let _ = (&self.pair.sender).write(&[1]);
        }
    }

    /// Takes the wake-up back. Called by the waiting thread before it looks at what it was woken for.
    pub fn clear(&self) {
        // First the bytes, then the flag. The other way round, a wake-up in between loses its byte and leaves the flag
        // up, so that no later one would send a byte again. In this order it only finds the flag up, and the caller
        // sees what it is about: the swap makes everything before the wake-up visible.
        let mut bytes = [0u8; 16];
        while matches!((&self.pair.receiver).read(&mut bytes), Ok(count) if count == bytes.len()) {}
        self.pair.raised.swap(false, Ordering::AcqRel);
    }

    /// Whether this is the only clone left, so that nobody can be waiting on it.
    pub fn is_abandoned(&self) -> bool {
        Arc::strong_count(&self.pair) == 1
    }

    /// What to give to `poll(2)`: readable when raised.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.pair.receiver.as_fd()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn readable(waker: &Waker) -> bool {
        let fd = waker.as_fd();
        let mut fds = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut fds, Some(&rustix::event::Timespec::default())).unwrap() > 0
    }

    #[test]
    fn a_wake_up_stays_until_it_is_cleared() {
        let waker = Waker::new().unwrap();
        assert!(!readable(&waker));
        waker.clone().wake();
        waker.wake();
        assert!(readable(&waker));
        waker.clear();
        assert!(!readable(&waker));
        waker.wake();
        assert!(readable(&waker));
    }

    /// The story: the flag was lowered before the bytes were read, so a wake-up in between was the last one ever. The
    /// feedback then came with the next tick, and synchronous commits took 100 ms.
    #[test]
    fn no_wake_up_is_lost_while_another_is_cleared() {
        let waker = Waker::new().unwrap();
        let count = std::sync::atomic::AtomicU64::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..20_000 {
                    count.fetch_add(1, Ordering::Release);
                    waker.wake();
                }
            });
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
            while count.load(Ordering::Acquire) < 20_000 {
                assert!(std::time::Instant::now() < deadline, "a wake-up was lost");
                let fd = waker.as_fd();
                let mut fds = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
                let step = rustix::event::Timespec {
                    tv_sec: 10,
                    tv_nsec: 0,
                };
                let ready = rustix::event::poll(&mut fds, Some(&step)).unwrap();
                assert!(
                    ready > 0 || count.load(Ordering::Acquire) == 20_000,
                    "slept through a wake-up"
                );
                waker.clear();
            }
        });
    }
}
