//! A server that says nothing, and whether it still works on the statement that it was given. Called by [`super::Connection`] while it waits.
//!
//! A statement may rightly take hours, and TCP sees to connections whose other end is gone. Not so where a proxy or a balancer
//! stands between the two and has lost one half of a connection, or the answer: then both sides wait for ever. The server itself knows,
//! so it is asked on another connection.

use std::time::{Duration, Instant};

use super::connection::silent;
use super::error::{ErrorKind, PqError};
use super::{Connection, Waker};

/// How long what the server has said may be on its way, once it says that it waits for us.
const GRACE: Duration = Duration::from_secs(5);
/// How long the server may take to say what a session of it does.
const ANSWER: Duration = Duration::from_secs(10);
/// A statement that takes longer than this is told of, and again when it has taken twice as long, and so on.
const TOLD_AFTER: Duration = Duration::from_secs(60);

/// Looks after one connection.
pub(super) struct Lookout {
    conninfo: String,
    /// The session: a process may have the number of one before it.
    who: String,
    silence: Duration,
    /// Since when nothing was heard …
    since: Instant,
    /// … or since the last look; and then the server was found to wait for us.
    looked: Instant,
    is_doubted: bool,
    tell_at: Duration,
}

/// What the server says of the session.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    Works(String),
    /// It waits for what we say, or for us to take what it says; or there is no such session any more.
    Waits(String),
    /// It does not tell.
    Unknown,
}

impl Lookout {
    /// Says who a connection is.
    pub(super) const WHO: &'static str = "SELECT pg_catalog.format('pid %s since %s', pid, extract(epoch from backend_start)) \
         FROM pg_catalog.pg_stat_activity WHERE pid = pg_catalog.pg_backend_pid()";

    pub(super) fn new(conninfo: &str, who: String, silence: Duration) -> Self {
        let now = Instant::now();
        Self {
            conninfo: conninfo.to_owned(),
            who,
            silence,
            since: now,
            looked: now,
            is_doubted: false,
            tell_at: TOLD_AFTER,
        }
    }

    /// The server said something, or was asked.
    pub(super) fn heard(&mut self) {
        self.since = Instant::now();
        self.looked = self.since;
        self.is_doubted = false;
        self.tell_at = TOLD_AFTER;
    }

    /// How long until it is to be looked at.
    pub(super) fn left(&self) -> Duration {
        let patience = if self.is_doubted { GRACE } else { self.silence };
        patience.saturating_sub(self.looked.elapsed())
    }

    /// Asks the server. An error: nothing is to be waited for.
    pub(super) fn look(&mut self, interrupt: Option<&Waker>) -> Result<(), PqError> {
        if self.is_doubted {
            return Err(silent());
        }
        let found = match self.ask(interrupt) {
            Ok(found) => found,
            // That there is no room for one more session, say, is no word about the other one.
            Err(error) if error.kind == ErrorKind::Server => Found::Unknown,
            Err(error) => {
                let message = format!(
                    "{}, nor on another connection: {}",
                    silent().message,
                    error.message
                );
                return Err(PqError::new(ErrorKind::Silence, message));
            }
        };
        self.looked = Instant::now();
        match found {
            Found::Works(at) => self.tell(&at),
            Found::Waits(at) => {
                tracing::debug!("the server is silent, and says that it waits for us: {at}");
                self.is_doubted = true;
            }
            Found::Unknown => self.tell("or so it is taken: it does not tell"),
        }
        Ok(())
    }

    fn tell(&mut self, at: &str) {
        let silence = self.since.elapsed();
        if silence >= self.tell_at {
            self.tell_at = self.tell_at.max(silence) * 2;
            let who = self.who.split(" since").next().unwrap_or_default();
            tracing::info!(
                "a statement takes long: the server was heard of {silence:.0?} ago, and works on it ({who}, {at})"
            );
        }
    }

    fn ask(&self, interrupt: Option<&Waker>) -> Result<Found, PqError> {
        let extra = [("fallback_application_name", "walmirror look")];
        let mut connection = match interrupt {
            Some(waker) => Connection::connect_interrupted_with(&self.conninfo, &extra, waker.clone())?,
            None => Connection::connect(&self.conninfo, &extra)?,
        };
        connection.answer_within(Some(ANSWER));
        let sql = "SELECT state, wait_event_type, wait_event FROM pg_catalog.pg_stat_activity \
                   WHERE pg_catalog.format('pid %s since %s', pid, extract(epoch from backend_start)) = $1";
        let result = connection.query(sql, &[Some(self.who.as_bytes())])?;
        let row = result.rows().next();
        Ok(row.map_or_else(
            || Found::Waits("there is no such session".to_owned()),
            |row| judge(row.text(0), row.text(1), row.text(2)),
        ))
    }
}

fn judge(state: Option<&str>, wait_event_type: Option<&str>, wait_event: Option<&str>) -> Found {
    let at = [state, wait_event_type, wait_event];
    let at = at.into_iter().flatten().collect::<Vec<_>>().join(" ");
    match state {
        // Without track_activities, or without the right to look.
        None | Some("disabled") => Found::Unknown,
        Some("active" | "fastpath function call") => match wait_event {
            Some("ClientRead" | "ClientWrite") => Found::Waits(at),
            _ => Found::Works(at),
        },
        Some(_) => Found::Waits(at),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_that_waits_for_us_does_not_work() {
        let is = |state, wait_event| judge(state, Some("x"), wait_event);
        let works = |state, event| matches!(is(state, event), Found::Works(_));
        let waits = |state, event| matches!(is(state, event), Found::Waits(_));
        assert!(works(Some("active"), None));
        assert!(works(Some("active"), Some("DataFileRead")));
        // Where a walsender reads the WAL that there is for a slot.
        assert!(works(Some("active"), Some("WalSenderWaitForWAL")));
        assert!(waits(Some("active"), Some("ClientWrite")));
        assert!(waits(Some("active"), Some("ClientRead")));
        for state in ["idle", "idle in transaction", "idle in transaction (aborted)"] {
            assert!(waits(Some(state), Some("ClientRead")));
        }
        assert_eq!(is(Some("disabled"), None), Found::Unknown);
        assert_eq!(is(None, None), Found::Unknown);
    }

    #[test]
    fn who_is_doubted_has_a_moment_for_what_is_on_its_way() {
        let mut lookout = Lookout::new("", "pid 1".to_owned(), Duration::from_secs(3600));
        assert!(lookout.left() > GRACE);
        lookout.is_doubted = true;
        assert!(lookout.left() <= GRACE);
        assert!(
            lookout
                .look(None)
                .is_err_and(|error| error.kind == ErrorKind::Silence)
        );
        lookout.heard();
        assert!(lookout.left() > GRACE);
    }
}
