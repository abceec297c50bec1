//! Making a connection: defaults, deadline, lists of hosts. Called by [`super::Connection::connect`] only.

use std::ffi::CString;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use super::error::{ErrorKind, PqError, Target};
use super::ffi::{PGVerbosity, PostgresPollingStatusType, RawConnection, c_string};
use super::wait::wait;

/// How long an attempt may take when the connection string, the service file and PGCONNECT_TIMEOUT say nothing.
const CONNECT_TIMEOUT_DEFAULT: Duration = Duration::from_secs(10);

/// Begins to connect.
pub(super) fn start(conninfo: &str, extra: &[(&str, &str)]) -> Result<RawConnection, PqError> {
    // Later entries win, and the connection string stands in the middle: before it what is only a default, behind it
    // what must be so. Everything that the sink reads is UTF-8.
    let defaults = [
        ("fallback_application_name", "walmirror"),
        ("keepalives_idle", "30"),
        ("keepalives_interval", "10"),
        // Status updates leave every second, so that a server that has vanished is noticed after this many milliseconds.
        ("tcp_user_timeout", "60000"),
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

/// Where the connection goes.
pub(super) fn target(raw: &RawConnection) -> Target {
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

/// What the settings say about how long an attempt may take.
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
pub(super) fn connect_all(
    raw: &mut RawConnection,
    conninfo: &str,
    extra: &[(&str, &str)],
) -> Result<(), PqError> {
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
