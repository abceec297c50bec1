//! START_REPLICATION and what follows: reading frames, answering keepalives, sending feedback.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use walmirror_proto::lsn::Lsn;

use super::message::{Message, parse, status_update};
use crate::error::Error;
use crate::pq::{Connection, Copied, CopyBuffer, Waker, connect_failed, quote_identifier, quote_literal};

/// 2000-01-01 00:00:00 UTC, where Postgres' clock starts, in seconds since 1970.
const POSTGRES_EPOCH_S: u64 = 946_684_800;
/// How soon a status update is tried again that the socket had no room for.
const STATUS_RETRY: Duration = Duration::from_millis(100);

/// What [`Stream::next`] ended with.
#[derive(Debug)]
pub enum Event {
    /// One write of the output plugin.
    Frame {
        /// Where the plugin was when it wrote.
        wal_start: Lsn,
        /// The end of the WAL on the server, as far as the walsender knew.
        wal_end: Lsn,
        /// The data, in the memory that it was received into. May go to another thread.
        bytes: CopyBuffer,
    },
    /// The server has sent everything before `wal_end`. Where a reply was wanted, it is on its way already.
    Keepalive {
        /// Everything before this has been sent.
        wal_end: Lsn,
        /// The server asked for a reply.
        reply_requested: bool,
    },
    /// Nothing came in time.
    Timeout,
    /// Somebody raised the waker.
    Woken,
    /// The server ended the stream in good order: it is shutting down.
    End,
}

/// The three positions of a status update.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Feedback {
    /// Applied in Redis: what `synchronous_commit = remote_write` waits for.
    pub written: Lsn,
    /// Durable in Redis. The slot is confirmed up to here (INVARIANT I1).
    pub flushed: Lsn,
    /// What `synchronous_commit = remote_apply` waits for.
    pub applied: Lsn,
}

/// A running replication stream, owned by one thread.
pub struct Stream {
    connection: Connection,
    slot: String,
    feedback: Feedback,
    status_interval: Duration,
    status_due: Instant,
    waker: Waker,
    seen: Lsn,
}

impl Stream {
    /// Connects and starts to stream from `start_lsn` (from where the slot is confirmed, if that is later).
    ///
    /// `options` are those of the output plugin. A status update is sent at least every `status_interval`.
    pub fn start(
        conninfo: &str,
        slot: &str,
        start_lsn: Lsn,
        options: &[(&str, &str)],
        status_interval: Duration,
    ) -> Result<Self, Error> {
        let connection =
            Connection::connect(conninfo, &[("replication", "database")]).map_err(connect_failed)?;
        Self::start_on(connection, slot, start_lsn, options, status_interval)
    }

    /// The same on a replication connection that is open already: the one that made a temporary slot.
    pub fn start_on(
        mut connection: Connection,
        slot: &str,
        start_lsn: Lsn,
        options: &[(&str, &str)],
        status_interval: Duration,
    ) -> Result<Self, Error> {
        let waker = Waker::new().map_err(|error| Error::io("cannot make a waker", error))?;
        connection
            .start_copy_both(&start_command(slot, start_lsn, options))
            .map_err(|error| {
                super::slot::explain(
                    Error::postgres(format!("cannot stream from the slot {slot:?}"), error),
                    slot,
                    &connection.target().user,
                )
                .at(start_lsn)
            })?;
        // From here on the stream's own waker interrupts; ending it in good order must not be interrupted.
        connection.no_interrupt();
        Ok(Self {
            connection,
            slot: slot.to_owned(),
            feedback: Feedback::default(),
            status_interval,
            status_due: Instant::now(),
            waker,
            seen: start_lsn,
        })
    }

    /// The next event, waited for at most `timeout`. Keepalives that want a reply have got it when this returns.
    ///
    /// While messages keep coming, a raised waker is not looked at: a caller that gets a frame has its own chance to
    /// look at what it would be woken for.
    pub fn next(&mut self, timeout: Duration) -> Result<Event, Error> {
        let deadline = Instant::now() + timeout;
        loop {
            let now = self.send_status_if_due()?;
            let wait = deadline.min(self.status_due).saturating_duration_since(now);
            let copied = self.connection.poll_copy_data(wait, Some(&self.waker));
            match copied.map_err(|error| self.broken(error))? {
                Copied::Data(message) => return self.receive(message),
                Copied::Woken => return Ok(Event::Woken),
                Copied::Done => return Ok(Event::End),
                Copied::Timeout if deadline <= Instant::now() => return Ok(Event::Timeout),
                Copied::Timeout => {}
            }
        }
    }

    /// Waits for the waker, for at most `timeout`, without reading anything, while status updates go on. True: woken.
    pub fn hold(&mut self, timeout: Duration) -> Result<bool, Error> {
        let deadline = Instant::now() + timeout;
        loop {
            let now = self.send_status_if_due()?;
            let wait = deadline.min(self.status_due).saturating_duration_since(now);
            let copied = self.connection.hold_copy(wait, &self.waker);
            match copied.map_err(|error| self.broken(error))? {
                Copied::Woken => return Ok(true),
                _ if deadline <= Instant::now() => return Ok(false),
                _ => {}
            }
        }
    }

    fn receive(&mut self, message: CopyBuffer) -> Result<Event, Error> {
        match parse(&message) {
            Ok(Message::Data {
                wal_start,
                wal_end,
                header_bytes,
            }) => {
                self.seen = self.seen.max(wal_start);
                Ok(Event::Frame {
                    wal_start,
                    wal_end,
                    bytes: message.skip(header_bytes),
                })
            }
            Ok(Message::Keepalive {
                wal_end,
                reply_requested,
            }) => {
                self.seen = self.seen.max(wal_end);
                if reply_requested {
                    self.send_status(false)?;
                }
                Ok(Event::Keepalive {
                    wal_end,
                    reply_requested,
                })
            }
            Err(error) => Err(Error::stream(
                format!("the stream of the slot {:?} cannot be read", self.slot),
                error,
            )
            .at(self.seen)),
        }
    }

    /// Sets what status updates say from now on, and sends one at once if that changed anything or a reply is wanted
    /// (the server then answers with a keepalive).
    pub fn feedback(&mut self, feedback: Feedback, reply_requested: bool) -> Result<(), Error> {
        if self.feedback == feedback && !reply_requested {
            return Ok(());
        }
        self.feedback = feedback;
        self.send_status(reply_requested)
    }

    /// When the server last sent anything.
    pub fn heard(&self) -> Instant {
        self.connection.heard()
    }

    /// What interrupts [`Self::next`] and [`Self::hold`] from another thread.
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// Sends the last feedback and ends the stream in good order, so that the slot is free when this returns. What the
    /// server was still sending is read and forgotten, for at most `timeout`. False: it has not ended the stream by then, and may not have
    /// the feedback.
    pub fn close(mut self, timeout: Duration) -> Result<bool, Error> {
        let deadline = Instant::now() + timeout;
        self.send_status(false)?;
        self.connection
            .put_copy_end()
            .map_err(|error| self.broken(error))?;
        while Instant::now() < deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.connection.poll_copy_data(left, None) {
                Ok(Copied::Done) => return Ok(true),
                Ok(_) => {}
                Err(error) => return Err(self.broken(error)),
            }
        }
        Ok(false)
    }

    fn send_status_if_due(&mut self) -> Result<Instant, Error> {
        let now = Instant::now();
        if now >= self.status_due {
            self.send_status(false)?;
        }
        Ok(now)
    }

    fn send_status(&mut self, reply_requested: bool) -> Result<(), Error> {
        let Feedback {
            written,
            flushed,
            applied,
        } = self.feedback;
        let message = status_update(written, flushed, applied, postgres_clock(), reply_requested);
        let sent = self
            .connection
            .put_copy_data(&message)
            .map_err(|error| self.broken(error))?;
        self.status_due = Instant::now() + if sent { self.status_interval } else { STATUS_RETRY };
        Ok(())
    }

    fn broken(&self, error: crate::pq::PqError) -> Error {
        let what = format!("the stream of the slot {:?} broke", self.slot);
        let role = self.connection.target().user;
        super::slot::explain(Error::postgres(what, error), &self.slot, &role).at(self.seen)
    }
}

fn start_command(slot: &str, start_lsn: Lsn, options: &[(&str, &str)]) -> String {
    let options: Vec<String> = options
        .iter()
        .map(|(name, value)| format!("{} {}", quote_identifier(name), quote_literal(value)))
        .collect();
    let options = if options.is_empty() {
        String::new()
    } else {
        format!(" ({})", options.join(", "))
    };
    format!(
        "START_REPLICATION SLOT {} LOGICAL {start_lsn}{options}",
        quote_identifier(slot)
    )
}

fn postgres_clock() -> i64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let since_2000 = since_1970.saturating_sub(Duration::from_secs(POSTGRES_EPOCH_S));
    i64::try_from(since_2000.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_command_quotes_names_and_values() {
        assert_eq!(
            start_command(
                "my\"slot",
                Lsn(0x16_0000_0010),
                &[("proto_version", "1"), ("tables", "o'x")]
            ),
            "START_REPLICATION SLOT \"my\"\"slot\" LOGICAL 16/10 (\"proto_version\" '1', \"tables\" 'o''x')"
        );
        assert_eq!(
            start_command("s", Lsn(0), &[]),
            "START_REPLICATION SLOT \"s\" LOGICAL 0/0"
        );
    }
}
