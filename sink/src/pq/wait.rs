//! Waiting: `poll(2)` on a socket and a waker. Called by everything in this folder that waits.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Waker;
use super::error::{ErrorKind, PqError};

/// What a wait ended with. Neither: the time was over.
pub(super) struct Ready {
    pub socket: bool,
    pub woken: bool,
}

/// What to wait for: something to read, and room to write where something waits to be sent.
pub(super) fn read_and(write: bool) -> PollFlags {
    if write {
        PollFlags::IN | PollFlags::OUT
    } else {
        PollFlags::IN
    }
}

/// Waits until the descriptor is ready, the waker is raised, or the time is over.
pub(super) fn wait(
    socket: BorrowedFd<'_>,
    flags: PollFlags,
    waker: Option<&Waker>,
    timeout: Option<Duration>,
) -> Result<Ready, PqError> {
    let timeout = timeout.map(|timeout| Timespec {
        tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    });
    let mut ready = Ready {
        socket: false,
        woken: false,
    };
    // Waiting on the socket alone where there is no waker: the second entry is then a repetition of the first.
    let waker_fd = waker.map_or(socket, Waker::as_fd);
    let waker_flags = if waker.is_some() { PollFlags::IN } else { flags };
    let mut fds = [
        PollFd::from_borrowed_fd(socket, flags),
        PollFd::from_borrowed_fd(waker_fd, waker_flags),
    ];
    match poll(&mut fds, timeout.as_ref()) {
        Ok(_) => {}
        // A signal: the caller looks at the clock and waits again.
        Err(rustix::io::Errno::INTR) => return Ok(ready),
        Err(errno) => {
            return Err(PqError::new(
                ErrorKind::Connection,
                format!("poll on the socket: {errno}"),
            ));
        }
    }
    let [on_socket, on_waker] = &fds;
    ready.socket = !on_socket.revents().is_empty();
    ready.woken = waker.is_some() && !on_waker.revents().is_empty();
    Ok(ready)
}
