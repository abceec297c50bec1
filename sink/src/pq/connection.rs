//! A connection to one Postgres database: connecting, queries, cancelling.
//!
//! Every wait goes through `poll(2)` with a waker beside the socket, so that a shutdown ends even a query that would
//! take hours (creating a slot waits for all running transactions).

use std::ffi::CString;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Waker;
use super::error::{ErrorKind, PqError, Target};
use super::ffi::{
    ExecStatusType, PGVerbosity, PostgresPollingStatusType, RawCancel, RawConnection, RawResult, c_string,
};

/// How long a connection attempt may take when the connection string, the service file and PGCONNECT_TIMEOUT say nothing.
const CONNECT_TIMEOUT_DEFAULT: Duration = Duration::from_secs(10);
/// How long the server may take to answer a cancel request before the connection is given up.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection. May be moved to another thread, but not shared.
pub struct Connection {
    pub(super) raw: RawConnection,
    pub(super) interrupt: Option<Waker>,
    pub(super) flush_pending: bool,
}

impl Connection {
    /// Connects. `conninfo` is anything that psql takes: a URI, `key=value` pairs, a database name, or nothing.
    ///
    /// `extra` wins over `conninfo`; `&[("replication", "database")]` makes a replication connection.
    pub fn connect(conninfo: &str, extra: &[(&str, &str)]) -> Result<Self, PqError> {
        let mut raw = start(conninfo, extra)?;
        let connected = connect_all(&mut raw, conninfo, extra);
        // The server may have been told apart from the string by a service file or the environment: say which it is.
        connected.map_err(|error| PqError {
            target: Some(Box::new(target(&raw))),
            ..error
        })?;
        raw.set_verbosity(PGVerbosity::PQERRORS_DEFAULT);
        Ok(Self {
            raw,
            interrupt: None,
            flush_pending: false,
        })
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

    /// Runs one statement with text parameters; the values of the rows are text.
    pub fn query(&mut self, sql: &str, params: &[Option<&[u8]>]) -> Result<QueryResult, PqError> {
        self.query_in_format(sql, params, false)
    }

    /// The same, but the values of the rows are in Postgres' binary format (a `bytea` is its bytes).
    pub fn query_binary(&mut self, sql: &str, params: &[Option<&[u8]>]) -> Result<QueryResult, PqError> {
        self.query_in_format(sql, params, true)
    }

    fn query_in_format(
        &mut self,
        sql: &str,
        params: &[Option<&[u8]>],
        binary: bool,
    ) -> Result<QueryResult, PqError> {
        let sql = c_string(sql, "the statement")?;
        let params = params
            .iter()
            .map(|value| {
                value
                    .map(|value| c_string(value, "a query parameter"))
                    .transpose()
            })
            .collect::<Result<Vec<_>, _>>()?;
        self.raw.send(&sql, Some(&params), binary)?;
        self.results()?
            .pop()
            .ok_or_else(|| PqError::new(ErrorKind::Protocol, "the statement gave no result"))
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
                | ExecStatusType::PGRES_NONFATAL_ERROR => results.push(QueryResult { raw: result }),
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
        while self.raw.is_busy() {
            let flushed = self.raw.flush()?;
            let timeout = match cancelled_at {
                None => None,
                Some(at) => Some(CANCEL_TIMEOUT.checked_sub(at.elapsed()).ok_or_else(interrupted)?),
            };
            let interrupt = self.interrupt.as_ref().filter(|_| cancelled_at.is_none());
            let socket = self.raw.socket().ok_or_else(|| self.raw.connection_error())?;
            let ready = wait(socket, read_and(!flushed), interrupt, timeout)?;
            if ready.woken {
                self.cancel_handle()?.cancel()?;
                cancelled_at = Some(Instant::now());
            }
            // When the connection is lost, what the server said last may still be in the buffer.
            if ready.socket && !self.raw.consume_input() {
                break;
            }
        }
        Ok(self.raw.next_result())
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
        target(&self.raw)
    }

    /// Whether libpq still thinks that the connection is alive.
    pub fn is_ok(&self) -> bool {
        self.raw.is_ok()
    }
}

fn interrupted() -> PqError {
    PqError::new(ErrorKind::Connection, "interrupted while waiting for the server")
}

fn start(conninfo: &str, extra: &[(&str, &str)]) -> Result<RawConnection, PqError> {
    // Later entries win, and the connection string stands in the middle: before it what is only a default, behind it
    // what must be so. Everything that the sink reads is UTF-8.
    let defaults = [
        ("fallback_application_name", "walmirror"),
        ("keepalives_idle", "30"),
        ("keepalives_interval", "10"),
    ];
    let parameters = defaults
        .into_iter()
        .chain([("dbname", conninfo), ("client_encoding", "UTF8")])
        .chain(extra.iter().copied())
        .map(|(keyword, value)| {
            Ok((
                c_string(keyword, "an option")?,
                c_string(value, "the connection string")?,
            ))
        })
        .collect::<Result<Vec<(CString, CString)>, PqError>>()?;
    let mut raw = RawConnection::start(&parameters)?;
    raw.set_verbosity(PGVerbosity::PQERRORS_VERBOSE);
    Ok(raw)
}

fn target(raw: &RawConnection) -> Target {
    let option = |keyword| raw.option(keyword).unwrap_or_default();
    let host = raw
        .option("host")
        .or_else(|| raw.option("hostaddr"))
        .unwrap_or_default();
    Target {
        host,
        port: option("port"),
        user: option("user"),
        database: option("dbname"),
    }
}

fn timeout(raw: &RawConnection) -> Option<Duration> {
    let seconds = raw
        .option("connect_timeout")
        .and_then(|text| text.trim().parse::<u64>().ok());
    // libpq, too, makes at least two seconds of one.
    seconds
        .filter(|seconds| *seconds > 0)
        .map(|seconds| Duration::from_secs(seconds.max(2)))
}

/// Connects to the one host, or to the first of the list that answers.
fn connect_all(raw: &mut RawConnection, conninfo: &str, extra: &[(&str, &str)]) -> Result<(), PqError> {
    let deadline = Instant::now() + timeout(raw).unwrap_or(CONNECT_TIMEOUT_DEFAULT);
    if finish_connecting(raw, deadline, conninfo)? {
        return Ok(());
    }
    let hosts = target(raw).host;
    if !hosts.contains(',') {
        return Err(PqError::new(
            ErrorKind::Connection,
            format!("no answer from {hosts:?} in time"),
        ));
    }
    // Only libpq's blocking way gives each host of a list its own time limit.
    if timeout(raw).is_none() {
        let seconds = CONNECT_TIMEOUT_DEFAULT.as_secs().to_string();
        let extra: Vec<(&str, &str)> = extra
            .iter()
            .copied()
            .chain([("connect_timeout", seconds.as_str())])
            .collect();
        *raw = start(conninfo, &extra)?;
    }
    raw.reset();
    if raw.is_ok() {
        Ok(())
    } else {
        Err(PqError::from_connection_attempt(&raw.error_message(), conninfo))
    }
}

/// Ok(false): the deadline has passed.
fn finish_connecting(raw: &mut RawConnection, deadline: Instant, conninfo: &str) -> Result<bool, PqError> {
    let failed = |raw: &RawConnection| PqError::from_connection_attempt(&raw.error_message(), conninfo);
    if raw.is_bad() {
        return Err(failed(raw));
    }
    // libpq asks for a wait for writability before the first PQconnectPoll.
    let mut state = PostgresPollingStatusType::PGRES_POLLING_WRITING;
    loop {
        let write = match state {
            PostgresPollingStatusType::PGRES_POLLING_OK => return Ok(true),
            PostgresPollingStatusType::PGRES_POLLING_FAILED => return Err(failed(raw)),
            PostgresPollingStatusType::PGRES_POLLING_WRITING => true,
            _ => false,
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let socket = raw.socket().ok_or_else(|| failed(raw))?;
        let ready = wait(
            socket,
            if write { PollFlags::OUT } else { PollFlags::IN },
            None,
            Some(left),
        )?;
        if ready.socket {
            state = raw.poll_connect();
        }
    }
}

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
}

/// The result of a statement.
pub struct QueryResult {
    raw: RawResult,
}

impl QueryResult {
    /// The number of rows.
    pub fn len(&self) -> usize {
        self.raw.rows()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The value at this row and column; None for NULL, and for what is outside the result.
    pub fn get(&self, row: usize, column: usize) -> Option<&[u8]> {
        self.raw.value(row, column)
    }

    /// The same as text; None also where it is no UTF-8.
    pub fn text(&self, row: usize, column: usize) -> Option<&str> {
        self.get(row, column)
            .and_then(|value| std::str::from_utf8(value).ok())
    }

    /// The rows, in order.
    pub fn rows(&self) -> Rows<'_> {
        Rows {
            result: self,
            next: 0,
        }
    }
}

/// Iterates over the rows of a [`QueryResult`].
pub struct Rows<'a> {
    result: &'a QueryResult,
    next: usize,
}

impl<'a> Iterator for Rows<'a> {
    type Item = Row<'a>;

    fn next(&mut self) -> Option<Row<'a>> {
        let row = self.next;
        self.next += 1;
        (row < self.result.len()).then_some(Row {
            result: self.result,
            row,
        })
    }
}

/// One row.
#[derive(Clone, Copy)]
pub struct Row<'a> {
    result: &'a QueryResult,
    row: usize,
}

impl<'a> Row<'a> {
    /// The value of a column, counted from 0; None for NULL.
    pub fn get(&self, column: usize) -> Option<&'a [u8]> {
        self.result.get(self.row, column)
    }

    /// The same as text.
    pub fn text(&self, column: usize) -> Option<&'a str> {
        self.result.text(self.row, column)
    }

    /// The value parsed from its text; None for NULL and where it does not parse.
    pub fn parse<T: std::str::FromStr>(&self, column: usize) -> Option<T> {
        self.text(column)?.parse().ok()
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
