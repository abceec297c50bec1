//! COPY: rows out of the server (backfill), and both ways at once (the replication stream).

use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use super::error::{ErrorKind, PqError};
use super::ffi::{CopyBuffer, CopyState, ExecStatusType, c_string};
use super::silence::Lookout;
use super::wait::{Ready, read_and, wait};
use super::{Connection, Waker};

/// How long a COPY waits at once where nobody looks after it.
const TICK: Duration = Duration::from_secs(60);

/// What [`Connection::poll_copy_data`] ended with.
#[derive(Debug)]
pub enum Copied {
    /// One message.
    Data(CopyBuffer),
    /// Nothing came in time.
    Timeout,
    /// The waker was raised; it is cleared again.
    Woken,
    /// The server ended the COPY in good order.
    Done,
}

impl Connection {
    /// Runs `COPY … TO STDOUT` and iterates over its messages: one a row. In binary format the first message also holds
    /// the file header and a trailer ends it; see [`binary_fields`].
    ///
    /// Dropping the iterator early cancels the query, and the connection can be used again.
    pub fn copy_out(&mut self, sql: &str) -> Result<CopyOut<'_>, PqError> {
        self.start_copy(sql, ExecStatusType::PGRES_COPY_OUT)?;
        Ok(CopyOut {
            connection: self,
            ended: false,
        })
    }

    /// Runs a command that answers with CopyBoth: START_REPLICATION. From then on nothing blocks but `poll_copy_data`.
    pub fn start_copy_both(&mut self, sql: &str) -> Result<(), PqError> {
        self.start_copy(sql, ExecStatusType::PGRES_COPY_BOTH)?;
        if self.raw.set_nonblocking() {
            Ok(())
        } else {
            Err(self.raw.connection_error())
        }
    }

    fn start_copy(&mut self, sql: &str, wanted: ExecStatusType) -> Result<(), PqError> {
        self.raw.send(&c_string(sql, "the statement")?, None, false)?;
        match self.wait_result()? {
            Some(result) if result.status() == wanted => Ok(()),
            Some(result) => {
                let error = match result.status() {
                    ExecStatusType::PGRES_FATAL_ERROR | ExecStatusType::PGRES_BAD_RESPONSE => result.error(),
                    _ => PqError::new(
                        ErrorKind::Protocol,
                        "the statement did not start a COPY of the wanted kind",
                    ),
                };
                // The connection can be used again, unless another kind of COPY is running now.
                if !is_copy(result.status()) {
                    while self.wait_result()?.is_some() {}
                }
                Err(error)
            }
            None => Err(PqError::new(ErrorKind::Protocol, "the statement gave no result")),
        }
    }

    /// The next message of a running COPY, waited for at most `timeout`. While it waits, `waker` interrupts it, and what
    /// could not be sent before is sent.
    pub fn poll_copy_data(&mut self, timeout: Duration, waker: Option<&Waker>) -> Result<Copied, PqError> {
        let deadline = Instant::now() + timeout;
        let mut alive = true;
        loop {
            match self.raw.get_copy_data() {
                CopyState::Data(buffer) => return Ok(Copied::Data(buffer)),
                CopyState::Done => return self.end_copy(),
                CopyState::Failed => return Err(self.raw.connection_error()),
                CopyState::WouldBlock if !alive => return Err(self.raw.connection_error()),
                CopyState::WouldBlock => {}
            }
            match self.wait_copy(deadline, waker, true)? {
                Some(ended) => return Ok(ended),
                // When the connection is lost, messages that came before are still in the buffer, the server's reason
                // perhaps among them.
                None => {
                    self.heard = Instant::now();
                    self.lookout.iter_mut().for_each(Lookout::heard);
                    alive = self.raw.consume_input();
                }
            }
        }
    }

    /// Waits without reading, so that the server feels the back-pressure; what could not be sent before is sent.
    pub fn hold_copy(&mut self, timeout: Duration, waker: &Waker) -> Result<Copied, PqError> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(ended) = self.wait_copy(deadline, Some(waker), false)? {
                return Ok(ended);
            }
        }
    }

    /// One wait of a COPY. None: the socket is ready, and what had to be flushed was tried.
    fn wait_copy(
        &mut self,
        deadline: Instant,
        waker: Option<&Waker>,
        read: bool,
    ) -> Result<Option<Copied>, PqError> {
        let left = deadline.saturating_duration_since(Instant::now());
        let ready = {
            let socket = self.raw.socket().ok_or_else(|| self.raw.connection_error())?;
            match waker {
                Some(waker) if !read && self.flush_pending => {
                    wait(socket, PollFlags::OUT, Some(waker), Some(left))?
                }
                Some(waker) if !read => {
                    let ready = wait(waker.as_fd(), PollFlags::IN, None, Some(left))?;
                    Ready {
                        socket: false,
                        woken: ready.socket,
                    }
                }
                waker => wait(
                    socket,
                    read_and(self.flush_pending),
                    waker.or(self.interrupt.as_ref()),
                    Some(left),
                )?,
            }
        };
        if ready.socket && self.flush_pending {
            self.flush_copy()?;
        }
        if ready.woken {
            match waker {
                Some(waker) => waker.clear(),
                None => return Err(PqError::new(ErrorKind::Connection, "interrupted while copying")),
            }
            return Ok(Some(Copied::Woken));
        }
        Ok((!ready.socket && deadline <= Instant::now()).then_some(Copied::Timeout))
    }

    /// The server has ended the COPY: in good order, or with an error.
    fn end_copy(&mut self) -> Result<Copied, PqError> {
        while let Some(result) = self.wait_result()? {
            match result.status() {
                ExecStatusType::PGRES_FATAL_ERROR | ExecStatusType::PGRES_BAD_RESPONSE => {
                    let error = result.error();
                    while self.wait_result()?.is_some() {}
                    return Err(error);
                }
                // After CopyBoth the server waits for our end of it.
                ExecStatusType::PGRES_COPY_IN | ExecStatusType::PGRES_COPY_BOTH => {
                    self.raw.put_copy_end()?;
                    self.flush_copy()?;
                }
                _ => {}
            }
        }
        Ok(Copied::Done)
    }

    /// Sends one message of a CopyBoth. Ok(false): the socket is full and the message was not taken; try again later.
    pub fn put_copy_data(&mut self, bytes: &[u8]) -> Result<bool, PqError> {
        let taken = self.raw.put_copy_data(bytes)?;
        self.flush_copy()?;
        Ok(taken)
    }

    /// Ends our side of a CopyBoth; the server then ends its own.
    pub fn put_copy_end(&mut self) -> Result<(), PqError> {
        self.raw.put_copy_end()?;
        self.flush_copy()
    }

    fn flush_copy(&mut self) -> Result<(), PqError> {
        self.flush_pending = !self.raw.flush()?;
        Ok(())
    }
}

fn is_copy(status: ExecStatusType) -> bool {
    use ExecStatusType::{PGRES_COPY_BOTH, PGRES_COPY_IN, PGRES_COPY_OUT};
    matches!(status, PGRES_COPY_BOTH | PGRES_COPY_IN | PGRES_COPY_OUT)
}

/// The messages of a running `COPY … TO STDOUT`.
pub struct CopyOut<'a> {
    connection: &'a mut Connection,
    ended: bool,
}

impl CopyOut<'_> {
    /// What can cancel this COPY from another thread.
    pub fn cancel_handle(&self) -> Result<super::CancelHandle, PqError> {
        self.connection.cancel_handle()
    }
}

impl Iterator for CopyOut<'_> {
    type Item = Result<CopyBuffer, PqError>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.ended {
            let until_look = self.connection.until_look().unwrap_or(TICK);
            let copied = match self.connection.poll_copy_data(until_look, None) {
                Ok(Copied::Timeout) => self.connection.look_if_due().map(|()| Copied::Timeout),
                copied => copied,
            };
            match copied {
                Ok(Copied::Data(buffer)) => return Some(Ok(buffer)),
                Ok(Copied::Timeout | Copied::Woken) => {}
                Ok(Copied::Done) => self.ended = true,
                Err(error) => {
                    // A server error has ended the COPY; anything else (an interruption) leaves it to `drop`.
                    self.ended = error.kind == ErrorKind::Server || !self.connection.is_ok();
                    return Some(Err(error));
                }
            }
        }
        None
    }
}

impl Drop for CopyOut<'_> {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        if let Ok(handle) = self.connection.cancel_handle() {
            handle.cancel_in_time();
        }
        // What is still on its way is read and forgotten; the server's "canceling statement" ends it.
        let interrupt = self.connection.interrupt.take();
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline
            && matches!(
                self.connection.poll_copy_data(Duration::from_secs(1), None),
                Ok(Copied::Data(_) | Copied::Timeout)
            )
        {}
        self.connection.interrupt = interrupt;
    }
}

const BINARY_SIGNATURE: &[u8] = b"PGCOPY\n\xff\r\n\0";

/// The fields of one row of a binary COPY. Skips the file header where it stands before the row; the trailer, and the
/// header alone, give None.
pub fn binary_fields(message: &[u8]) -> Option<BinaryFields<'_>> {
    let mut rest = message;
    if let Some(after) = rest.strip_prefix(BINARY_SIGNATURE) {
        let (_flags, after) = after.split_first_chunk::<4>()?;
        let (extension, after) = after.split_first_chunk::<4>()?;
        rest = after.get(usize::try_from(u32::from_be_bytes(*extension)).ok()?..)?;
    }
    let (count, rest) = rest.split_first_chunk::<2>()?;
    let count = u16::try_from(i16::from_be_bytes(*count)).ok()?;
    Some(BinaryFields { left: count, rest })
}

/// Iterates over the fields of a row: None for NULL, and an error where the message is cut.
pub struct BinaryFields<'a> {
    left: u16,
    rest: &'a [u8],
}

impl<'a> Iterator for BinaryFields<'a> {
    type Item = Result<Option<&'a [u8]>, PqError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let field = self.take();
        if field.is_none() {
            self.left = 0;
        }
        Some(field.ok_or_else(|| PqError::new(ErrorKind::Protocol, "a binary COPY row is cut")))
    }
}

impl<'a> BinaryFields<'a> {
    /// None: the message is cut. Some(None): NULL.
    fn take(&mut self) -> Option<Option<&'a [u8]>> {
        let (length, rest) = self.rest.split_first_chunk::<4>()?;
        let length = i32::from_be_bytes(*length);
        if length == -1 {
            self.rest = rest;
            return Some(None);
        }
        let (field, rest) = rest.split_at_checked(usize::try_from(length).ok()?)?;
        self.rest = rest;
        Some(Some(field))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_fields_of_a_binary_row_are_found_behind_the_file_header() {
        let mut message = BINARY_SIGNATURE.to_vec();
        message.extend([0; 8]);
        message.extend([0, 2, 0, 0, 0, 3, b'a', b'b', b'c', 255, 255, 255, 255]);
        let fields: Vec<_> = binary_fields(&message).unwrap().map(Result::unwrap).collect();
        assert_eq!(fields, [Some(b"abc".as_slice()), None]);
        assert!(binary_fields(&[255, 255]).is_none(), "the trailer");
        assert!(
            binary_fields(message.get(..19).unwrap()).is_none(),
            "the header alone"
        );
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_row_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Some(fields) = binary_fields(&bytes) {
                let _ = fields.count();
            }
        }
    }
}
