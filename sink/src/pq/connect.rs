//! Making a connection: defaults, and a deadline for each address. Called by [`super::Connection::connect`] only.

use std::ffi::CString;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use super::Waker;
use super::addresses::{Address, Entry, entries, remaining, resolve};
use super::error::{ErrorKind, PqError, Target};
use super::ffi::{PGVerbosity, PostgresPollingStatusType, RawConnection, c_string};
use super::wait::wait;

/// How long an attempt at one address may take when the connection string, the service file and PGCONNECT_TIMEOUT say nothing.
const CONNECT_TIMEOUT_DEFAULT: Duration = Duration::from_secs(10);

/// Begins to connect.
fn start(conninfo: &str, extra: &[(&str, &str)]) -> Result<RawConnection, PqError> {
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

/// What the settings say about how long an attempt at one address may take.
fn timeout(raw: &RawConnection) -> Option<Duration> {
    let seconds = raw
        .option("connect_timeout")
        .and_then(|text| text.trim().parse::<u64>().ok());
    // libpq, too, makes at least two seconds of one.
    seconds
        .filter(|seconds| *seconds > 0)
        .map(|seconds| Duration::from_secs(seconds.max(2)))
}

/// Connects to the first address that answers, of one host or of a list of hosts, and says where to. Waits until `interrupt` is raised.
///
/// libpq moves on by itself from an address that refuses, and waits for ever for one that is silent. What is left is then tried
/// anew without that one: only libpq's blocking functions can do it otherwise, and they cannot be interrupted.
pub(super) fn connect(
    conninfo: &str,
    extra: &[(&str, &str)],
    interrupt: Option<&Waker>,
) -> Result<(RawConnection, Target), PqError> {
    let mut raw = start(conninfo, extra)?;
    // The server may have been told apart from the string by a service file or the environment: say which it is.
    let target = target(&raw);
    let patience = timeout(&raw).unwrap_or(CONNECT_TIMEOUT_DEFAULT);
    let hostaddr = raw.option("hostaddr").unwrap_or_default();
    let host = raw.option("host").unwrap_or_default();
    let all = entries(&host, &hostaddr, &target.port);
    let mut silent: Vec<Address> = Vec::new();
    let failed = |error: PqError| PqError {
        target: Some(Box::new(target.clone())),
        ..error
    };
    loop {
        let address = match finish_connecting(&mut raw, patience, conninfo, interrupt) {
            Ok(None) => return Ok((raw, target)),
            Ok(Some(address)) => address,
            Err(mut error) => {
                for address in &silent {
                    error.message += &format!("; no answer from {address} in time");
                }
                return Err(failed(error));
            }
        };
        // One that comes again although it was left out is a name that resolves to something else each time.
        let is_new = !silent.contains(&address);
        silent.push(address);
        let left = remaining(&all, &silent, resolve);
        if left.is_empty() || !is_new {
            let hosts = &target.host;
            let message = format!("no answer from {hosts:?} in time");
            return Err(failed(PqError::new(ErrorKind::Connection, message)));
        }
        let list = |field: fn(&Entry) -> &str| left.iter().map(field).collect::<Vec<_>>().join(",");
        let lists = [
            ("host", list(|entry| &entry.host)),
            ("hostaddr", list(|entry| &entry.hostaddr)),
            ("port", list(|entry| &entry.port)),
        ];
        let lists = lists.iter().map(|(keyword, value)| (*keyword, value.as_str()));
        let extra: Vec<(&str, &str)> = extra.iter().copied().chain(lists).collect();
        raw = start(conninfo, &extra)?;
    }
}

/// Ok(Some): this address has been silent for too long.
fn finish_connecting(
    raw: &mut RawConnection,
    patience: Duration,
    conninfo: &str,
    interrupt: Option<&Waker>,
) -> Result<Option<Address>, PqError> {
    let failed = |raw: &RawConnection| PqError::from_connection_attempt(&raw.error_message(), conninfo);
    if raw.is_bad() {
        return Err(failed(raw));
    }
    let mut address = raw.address();
    let mut deadline = Instant::now() + patience;
    // libpq asks for a wait for writability before the first PQconnectPoll.
    let mut state = PostgresPollingStatusType::PGRES_POLLING_WRITING;
    loop {
        let write = match state {
            PostgresPollingStatusType::PGRES_POLLING_OK => return Ok(None),
            PostgresPollingStatusType::PGRES_POLLING_FAILED => return Err(failed(raw)),
            PostgresPollingStatusType::PGRES_POLLING_WRITING => true,
            _ => false,
        };
        let at = raw.address();
        if at != address {
            (address, deadline) = (at, Instant::now() + patience);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(Some(address));
        }
        let socket = raw.socket().ok_or_else(|| failed(raw))?;
        let flags = if write { PollFlags::OUT } else { PollFlags::IN };
        let ready = wait(socket, flags, interrupt, Some(left))?;
        if ready.woken {
            return Err(super::connection::interrupted());
        }
        if ready.socket {
            state = raw.poll_connect();
        }
    }
}
