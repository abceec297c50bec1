//! A connection to one Postgres database: connecting, queries, cancelling.
//!
//! Every wait goes through `poll(2)` with a waker beside the socket, so that a shutdown ends even a query that would
//! take hours (creating a slot waits for all running transactions).

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use super::Waker;
use super::connect::connect;
use super::error::{ErrorKind, PqError, Target};
use super::ffi::{ExecStatusType, PGVerbosity, RawCancel, RawConnection, RawResult, c_string};
use super::result::QueryResult;
use super::silence::Lookout;
use super::wait::{read_and, wait};

/// How long the server may take to answer a cancel request before the connection is given up.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a server may take to prepare a session that it has just let in.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(10);

/// So many cancel requests may be stuck. The server ends the queries of connections that are closed, too, only later.
const CANCELS_MAX: usize = 8;

/// A connection. May be moved to another thread, but not shared.
pub struct Connection {
    pub(super) raw: RawConnection,
    target: Target,
    pub(super) interrupt: Option<Waker>,
    pub(super) flush_pending: bool,
    patience: Option<Duration>,
    pub(super) heard: Instant,
    pub(super) lookout: Option<Lookout>,
}

/// What every session sets, whatever the role or the database has set for theirs. Whoever may create in a schema of the role's search_path
/// could put an operator there that a statement of ours finds, and that runs as us. How long something may take, and waits, is known here.
/// Transactions must neither wait for those of others, as a deferrable one does, nor fail because of them, as a serializable one may, nor
/// be kept from taking an id. An ERROR ends a statement and not the session. Names and messages are UTF-8, and SQL is read and printed as
/// it is written here. The transaction that sets it is such a one itself. No statement of ours is worth another process, or being compiled.
const SETTINGS: &str = "BEGIN ISOLATION LEVEL READ COMMITTED NOT DEFERRABLE; \
    SET search_path = pg_catalog, pg_temp; SET statement_timeout = 0; SET lock_timeout = 0; \
    SET idle_in_transaction_session_timeout = 0; SET idle_session_timeout = 0; \
    SET default_transaction_isolation = 'read committed'; SET default_transaction_read_only = off; \
    SET default_transaction_deferrable = off; SET exit_on_error = off; SET client_encoding = 'UTF8'; \
    SET standard_conforming_strings = on; SET quote_all_identifiers = off; SET max_parallel_workers_per_gather = 0; SET jit = off; \
    SELECT set_config('transaction_timeout', '0', false) WHERE current_setting('transaction_timeout', true) IS NOT NULL; \
    COMMIT";

impl Connection {
    /// Connects. `conninfo` is anything that psql takes: a URI, `key=value` pairs, a database name, or nothing.
    ///
    /// `extra` wins over `conninfo`; `&[("replication", "database")]` makes a replication connection.
    pub fn connect(conninfo: &str, extra: &[(&str, &str)]) -> Result<Self, PqError> {
        Self::made(conninfo, extra, None)
    }

    /// The same, ended by the waker, too; and so is what the connection waits for later: [`Self::interrupt_with`].
    pub fn connect_interrupted_with(
        conninfo: &str,
        extra: &[(&str, &str)],
        waker: Waker,
    ) -> Result<Self, PqError> {
        Self::made(conninfo, extra, Some(waker))
    }

    fn made(conninfo: &str, extra: &[(&str, &str)], interrupt: Option<Waker>) -> Result<Self, PqError> {
        let (mut raw, target) = connect(conninfo, extra, interrupt.as_ref())?;
        raw.set_verbosity(PGVerbosity::PQERRORS_DEFAULT);
        let mut connection = Self {
            raw,
            target,
            interrupt,
            flush_pending: false,
            patience: Some(PREPARE_TIMEOUT),
            heard: Instant::now(),
            lookout: None,
        };
        connection.simple(SETTINGS)?;
        connection.patience = None;
        Ok(connection)
    }

    /// From now on, raising this waker cancels what this connection waits for. It is never cleared here: one that was
    /// raised makes every later wait fail too. See `Shutdown::waker`.
    pub fn interrupt_with(&mut self, waker: Waker) {
        self.interrupt = Some(waker);
    }

    /// Takes [`Self::interrupt_with`] back.
    pub fn no_interrupt(&mut self) {
        self.interrupt = None;
    }

    /// From now on the server has so long to answer a statement; None: as long as it takes. For what takes a moment on a
    /// server that lives: TCP alone does not notice one that hangs, nor a proxy that lost what is behind it.
    pub fn answer_within(&mut self, patience: Option<Duration>) {
        self.patience = patience;
    }

    /// For what may take long: where the server has said nothing for `silence`, it is asked on another connection, made by the same
    /// `conninfo`, whether it still works on the statement. One that does has all the time it needs. Takes the place of no
    /// [`Self::answer_within`].
    pub fn look_after(&mut self, conninfo: &str, silence: Duration) -> Result<(), PqError> {
        let before = self.patience.replace(PREPARE_TIMEOUT);
        let results = self.simple(Lookout::WHO);
        self.patience = before;
        let who = results?
            .pop()
            .and_then(|result| Some(result.text(0, 0)?.to_owned()));
        self.lookout = who.map(|who| Lookout::new(conninfo, who, silence));
        Ok(())
    }

    /// From now on a statement may take as long as the server works on it.
    pub fn make_patient(&mut self, conninfo: &str, silence: Duration) -> Result<(), PqError> {
        self.look_after(conninfo, silence)?;
        self.answer_within(None);
        Ok(())
    }

    /// When the server last sent anything of a COPY, a part of a message at least.
    pub fn heard(&self) -> Instant {
        self.heard
    }

    /// Runs one statement with text parameters; the values of the rows are text.
    pub fn query(&mut self, sql: &str, params: &[Option<&[u8]>]) -> Result<QueryResult, PqError> {
        self.query_in_format(sql, params, false)
    }

    /// The same, but the values of the rows are in Postgres' binary format (a `bytea` is its bytes).
    pub fn query_binary(&mut self, sql: &str, params: &[Option<&[u8]>]) -> Result<QueryResult, PqError> {
        self.query_in_format(sql, params, true)
    }

    /// The same for rows of one value, each a result by itself. None: together they have more than `most` bytes, so the statement was
    /// cancelled; of a single row there is no limit.
    pub fn query_binary_up_to(
        &mut self,
        sql: &str,
        params: &[Option<&[u8]>],
        most: usize,
    ) -> Result<Option<Vec<QueryResult>>, PqError> {
        self.send_query(sql, params, true)?;
        self.raw.row_by_row()?;
        let (mut rows, mut error, mut bytes) = (Vec::new(), None, 0_usize);
        let mut is_too_much = false;
        while let Some(result) = self.wait_result()? {
            match result.status() {
                ExecStatusType::PGRES_SINGLE_TUPLE if !is_too_much => {
                    bytes = bytes.saturating_add(result.value(0, 0).map_or(0, <[u8]>::len));
                    rows.push(QueryResult::new(result));
                    if bytes > most && rows.len() > 1 {
                        is_too_much = true;
                        rows.clear();
                        self.cancel_handle()?.cancel_in_time();
                    }
                }
                ExecStatusType::PGRES_SINGLE_TUPLE | ExecStatusType::PGRES_TUPLES_OK => {}
                _ => error = error.or_else(|| Some(result.error())),
            }
        }
        match error {
            // That it was cancelled.
            Some(_) | None if is_too_much => Ok(None),
            Some(error) => Err(error),
            None => Ok(Some(rows)),
        }
    }

    fn query_in_format(
        &mut self,
        sql: &str,
        params: &[Option<&[u8]>],
        binary: bool,
    ) -> Result<QueryResult, PqError> {
        self.send_query(sql, params, binary)?;
        self.results()?
            .pop()
            .ok_or_else(|| PqError::new(ErrorKind::Protocol, "the statement gave no result"))
    }

    fn send_query(&mut self, sql: &str, params: &[Option<&[u8]>], binary: bool) -> Result<(), PqError> {
        let sql = c_string(sql, "the statement")?;
        let params = params
            .iter()
            .map(|value| {
                value
                    .map(|value| c_string(value, "a query parameter"))
                    .transpose()
            })
            .collect::<Result<Vec<_>, _>>()?;
        self.raw.send(&sql, Some(&params), binary)
    }

    /// Runs a replication command, or several statements separated by semicolons. One result for each.
    pub fn simple(&mut self, sql: &str) -> Result<Vec<QueryResult>, PqError> {
        self.raw.send(&c_string(sql, "the statement")?, None, false)?;
        self.results()
    }

    /// All results of what was sent, or the first error.
    pub(super) fn results(&mut self) -> Result<Vec<QueryResult>, PqError> {
        let mut results = Vec::new();
        let mut error = None;
        while let Some(result) = self.wait_result()? {
            match result.status() {
                ExecStatusType::PGRES_COMMAND_OK
                | ExecStatusType::PGRES_TUPLES_OK
                | ExecStatusType::PGRES_EMPTY_QUERY
                | ExecStatusType::PGRES_NONFATAL_ERROR => results.push(QueryResult::new(result)),
                ExecStatusType::PGRES_COPY_IN
                | ExecStatusType::PGRES_COPY_OUT
                | ExecStatusType::PGRES_COPY_BOTH => {
                    return Err(PqError::new(
                        ErrorKind::Protocol,
                        "a COPY where rows were expected",
                    ));
                }
                _ => error = error.or_else(|| Some(result.error())),
            }
        }
        error.map_or(Ok(results), Err)
    }

    /// The next result, waited for in a way that the waker interrupts.
    pub(super) fn wait_result(&mut self) -> Result<Option<RawResult>, PqError> {
        let mut cancelled_at: Option<Instant> = None;
        let asked_at = Instant::now();
        self.lookout.iter_mut().for_each(Lookout::heard);
        while self.raw.is_busy() {
            let flushed = self.raw.flush()?;
            let timeout = match cancelled_at {
                None => match self.patience {
                    None => {
                        self.look_if_due()?;
                        self.until_look()
                    }
                    Some(patience) => Some(patience.checked_sub(asked_at.elapsed()).ok_or_else(silent)?),
                },
                Some(at) => Some(CANCEL_TIMEOUT.checked_sub(at.elapsed()).ok_or_else(interrupted)?),
            };
            let interrupt = self.interrupt.as_ref().filter(|_| cancelled_at.is_none());
            let socket = self.raw.socket().ok_or_else(|| self.raw.connection_error())?;
            let ready = wait(socket, read_and(!flushed), interrupt, timeout)?;
            if ready.woken {
                // Where the request finds no way, nor does an answer.
                cancelled_at = Some(Instant::now());
                self.cancel_handle()?.cancel_in_time();
            }
            if ready.socket {
                self.lookout.iter_mut().for_each(Lookout::heard);
                // When the connection is lost, what the server said last may still be in the buffer.
                if !self.raw.consume_input() {
                    break;
                }
            }
        }
        Ok(self.raw.next_result())
    }

    /// How long the server may say nothing until somebody looks whether it works. None: as long as it likes.
    pub(super) fn until_look(&self) -> Option<Duration> {
        self.lookout.as_ref().map(Lookout::left)
    }

    /// Looks, if that long is over.
    pub(super) fn look_if_due(&mut self) -> Result<(), PqError> {
        let Some(lookout) = self.lookout.as_mut().filter(|lookout| lookout.left().is_zero()) else {
            return Ok(());
        };
        let looked = lookout.look(self.interrupt.as_ref());
        let socket = self.raw.socket().ok_or_else(|| self.raw.connection_error())?;
        let now = Some(Duration::ZERO);
        let ready = wait(socket, PollFlags::IN, self.interrupt.as_ref(), now)?;
        // Meanwhile there was an answer, or somebody ended the look as well as the wait.
        if ready.socket || ready.woken {
            Ok(())
        } else {
            looked
        }
    }

    /// What can cancel the running query from another thread.
    pub fn cancel_handle(&self) -> Result<CancelHandle, PqError> {
        let raw = self
            .raw
            .cancel_token()
            .ok_or_else(|| PqError::new(ErrorKind::Connection, "the connection is closed"))?;
        Ok(CancelHandle { raw: Arc::new(raw) })
    }

    /// The server's version as in `server_version_num`: 150020 is 15.20.
    pub fn server_version(&self) -> i32 {
        self.raw.server_version()
    }

    /// The database that this connection is in.
    pub fn database(&self) -> Option<String> {
        self.raw.option("dbname")
    }

    /// Where this connection goes.
    pub fn target(&self) -> Target {
        self.target.clone()
    }

    /// Whether libpq still thinks that the connection is alive.
    pub fn is_ok(&self) -> bool {
        self.raw.is_ok()
    }
}

pub(super) fn interrupted() -> PqError {
    PqError::new(ErrorKind::Connection, "interrupted while waiting for the server")
}

pub(super) fn silent() -> PqError {
    PqError::new(ErrorKind::Silence, "the server does not answer")
}

/// Cancels the running query of a connection. Clones may go to any thread.
#[derive(Clone)]
pub struct CancelHandle {
    raw: Arc<RawCancel>,
}

impl CancelHandle {
    /// Asks the server to cancel. The query ends with SQLSTATE 57014, unless it was faster.
    pub fn cancel(&self) -> Result<(), PqError> {
        self.raw.cancel()
    }

    /// The same, waited for only so long. libpq makes a connection of its own for the request, and waits until the server
    /// closes it: for ever, where the network swallows it. But it has to be waited for: a request that arrives late hits the
    /// next statement.
    pub(super) fn cancel_in_time(&self) {
        static UNDER_WAY: AtomicUsize = AtomicUsize::new(0);
        let handle = self.clone();
        let (done, wait) = mpsc::channel();
        let send = move || {
            let _ = handle.cancel();
            UNDER_WAY.fetch_sub(1, Ordering::AcqRel);
            let _ = done.send(());
        };
        let started = UNDER_WAY.fetch_add(1, Ordering::AcqRel) < CANCELS_MAX
            && std::thread::Builder::new()
                .name("cancel".to_owned())
                .spawn(send)
                .is_ok();
        if started {
            let _ = wait.recv_timeout(CANCEL_TIMEOUT);
        } else {
            UNDER_WAY.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

/// `name` as an SQL identifier, for commands that take no parameters.
pub fn quote_identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// `text` as an SQL string, for commands that take no parameters. Replication commands know no backslash escapes, and
/// for plain SQL the server's standard_conforming_strings must be on, as it is by default.
pub fn quote_literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}
