//! Errors of the whole sink: what failed, on which object, at which LSN, and the next command to type.
//!
//! Callers branch on [`Error::class`] (try again, or stop), `main` on [`Error::exit_code`].

use rustix::io::Errno;
use std::fmt;
use std::time::Duration;

use walmirror_proto::lsn::Lsn;

use crate::pq::{ErrorKind, PqError, next_after_connect};

/// What can be done about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// It may heal by itself: wait, connect again, and go on from the progress key.
    Retry,
    /// A person has to change something: stop with the next command.
    Operator,
    /// Whoever logs in is refused, lacks a right, or finds the sink of another cluster in its place. At the start a person has to change
    /// something; later somebody is changing it at this moment, so that it is tried again.
    Access,
    /// It should not be possible: stop, so that nobody builds on a wrong state.
    Bug,
}

/// The exit codes of the `walmirror` binary; docs/operations.md explains them.
pub mod exit {
    /// Done.
    pub const OK: u8 = 0;
    /// A bug or an internal error.
    pub const INTERNAL: u8 = 1;
    /// The command line, an environment variable or the configuration file is wrong.
    pub const USAGE: u8 = 2;
    /// PostgreSQL refuses: something has to be changed there.
    pub const POSTGRES: u8 = 3;
    /// Redis refuses: something has to be changed there.
    pub const REDIS: u8 = 4;
    /// PostgreSQL or Redis could not be reached within `--connect-timeout`, or `--once` was given and a connection broke.
    pub const UNREACHABLE: u8 = 5;
    /// Redis and the slot do not fit together (a gap), and `--on-gap fail` forbids the resync.
    pub const GAP: u8 = 6;
    /// `wait` gave up, or `backfill` before the sink began.
    pub const TIMEOUT: u8 = 7;
}

/// The part of the message that all errors share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What failed, and on which object: `cannot create the slot "walmirror"`.
    pub what: String,
    /// Where in the stream it happened.
    pub lsn: Option<Lsn>,
    /// The next command to type.
    pub next: Option<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        match self.lsn {
            Some(lsn) => write!(f, ", at LSN {lsn}"),
            None => Ok(()),
        }
    }
}

/// The source of an error, kept so that a caller can look at it.
pub type Source = Box<dyn std::error::Error + Send + Sync>;

/// An error of the sink. `Display` is one line that ends with the cause; the next command is [`Error::next_command`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A flag, environment variable or configuration file is wrong.
    #[error("{0}")]
    Config(Report),
    /// libpq or the PostgreSQL server.
    #[error("{0}: {1}")]
    Postgres(Report, #[source] Box<PqError>),
    /// PostgreSQL works, but is not set up for what was asked.
    #[error("{0}")]
    Setup(Report),
    /// Redis, with what can be done about it.
    #[error("{0}: {2}")]
    Redis(Report, Class, #[source] Source),
    /// A bug of the decoder or a broken stream: bytes that are no frames, no row or no definition of a table, records in an impossible order.
    #[error("{0}: {1}")]
    Stream(Report, #[source] Source),
    /// Redis holds another history than the slot (another system, another timeline, lost progress).
    #[error("{0}")]
    Gap(Report),
    /// A server that could not be reached in time.
    #[error("{0} (gave up after {1:?}): {2}")]
    Unreachable(Report, Duration, #[source] Box<Error>),
    /// `wait` gave up.
    #[error("{0}")]
    Timeout(Report),
    /// `doctor` or `init` found something, and has said it: only the exit code is left to tell.
    #[error("{0}")]
    Checks(Report, u8),
    /// Reading or writing a local file, standard output, a signal handler.
    #[error("{0}: {1}")]
    Io(Report, #[source] std::io::Error),
    /// A transaction in progress could not be kept on the local disk: it can be asked for when it has committed.
    #[error("{0}: {1}")]
    Spool(Report, #[source] std::io::Error),
    /// A state that the code holds to be impossible.
    #[error("internal error: {0}")]
    Bug(Report),
}

fn report(what: impl Into<String>) -> Report {
    Report {
        what: what.into(),
        lsn: None,
        next: None,
    }
}

impl Error {
    /// A wrong flag, variable or file.
    pub fn config(what: impl Into<String>) -> Self {
        Self::Config(report(what))
    }

    /// An error of libpq or the server, with what was tried: `cannot create the slot "x"`.
    pub fn postgres(what: impl Into<String>, source: PqError) -> Self {
        let next = next_after_connect(&source);
        Self::Postgres(Report { next, ..report(what) }, Box::new(source))
    }

    /// PostgreSQL answered what nobody can read, with what was tried. The answer is left out: it could be anything.
    pub fn answer(what: impl Into<String>) -> Self {
        Self::postgres(
            what,
            PqError::new(ErrorKind::Protocol, "Postgres' answer cannot be read"),
        )
    }

    /// PostgreSQL is not set up for what was asked.
    pub fn setup(what: impl Into<String>) -> Self {
        Self::Setup(report(what))
    }

    /// An error of Redis, with what was tried.
    pub fn redis(what: impl Into<String>, class: Class, source: impl Into<Source>) -> Self {
        Self::Redis(report(what), class, source.into())
    }

    /// A stream that cannot be read.
    pub fn stream(what: impl Into<String>, source: impl Into<Source>) -> Self {
        Self::Stream(report(what), source.into())
    }

    /// Redis and the slot do not fit together.
    pub fn gap(what: impl Into<String>) -> Self {
        Self::Gap(report(what))
    }

    /// Why Redis and the slot do not fit together, if it is that.
    pub fn gap_reason(&self) -> Option<&str> {
        match self {
            Self::Gap(report) => Some(&report.what),
            _ => None,
        }
    }

    /// `wait` gave up.
    pub fn timeout(what: impl Into<String>) -> Self {
        Self::Timeout(report(what))
    }

    /// `doctor` or `init` found something that ends with this exit code.
    pub fn checks(what: impl Into<String>, exit_code: u8) -> Self {
        Self::Checks(report(what), exit_code)
    }

    /// A local file, standard output, a signal handler.
    pub fn io(what: impl Into<String>, source: std::io::Error) -> Self {
        Self::Io(report(what), source)
    }

    /// An error of the files in which transactions in progress wait.
    pub fn spool(what: impl Into<String>, source: std::io::Error) -> Self {
        Self::Spool(report(what), source)
    }

    /// A state that should be impossible.
    pub fn bug(what: impl Into<String>) -> Self {
        Self::Bug(report(what))
    }

    /// A retried error that lasted too long.
    pub fn unreachable(what: impl Into<String>, after: Duration, last: Error) -> Self {
        let next = last.next_command().map(str::to_owned);
        Self::Unreachable(Report { next, ..report(what) }, after, Box::new(last))
    }

    /// Adds where in the stream it happened.
    #[must_use]
    pub fn at(mut self, lsn: Lsn) -> Self {
        self.report_mut().lsn = Some(lsn);
        self
    }

    /// Adds the next command to type, unless a more specific one is there already.
    #[must_use]
    pub fn next(mut self, command: impl Into<String>) -> Self {
        self.report_mut().next.get_or_insert_with(|| command.into());
        self
    }

    /// The same, whatever is there already.
    #[must_use]
    pub fn next_instead(mut self, command: impl Into<String>) -> Self {
        self.report_mut().next = Some(command.into());
        self
    }

    /// The next command to type.
    pub fn next_command(&self) -> Option<&str> {
        self.report().next.as_deref()
    }

    /// Whether Postgres says that another session uses the slot (object_in_use): whoever wants it waits.
    pub fn is_slot_in_use(&self) -> bool {
        matches!(self, Self::Postgres(_, source) if source.is("55006"))
    }

    /// Whether there is a slot of this name (duplicate_object), where one was to be made.
    pub fn is_slot_there(&self) -> bool {
        matches!(self, Self::Postgres(_, source) if source.is("42710"))
    }

    /// Whether Postgres says that it has removed the WAL that the slot needs, which the slot itself may not know. In whatever language
    /// (`lc_messages`), it names the file, and that of a library is no such name.
    pub fn is_wal_removed(&self) -> bool {
        let is_segment = |word: &str| word.len() == 24 && word.bytes().all(|byte| byte.is_ascii_hexdigit());
        matches!(self, Self::Postgres(_, source) if source.is("58P01")
            && source.message.split(|sign: char| !sign.is_ascii_alphanumeric()).any(is_segment))
    }

    /// Whether the slot is not there (any more), or was invalidated: who looks at it again sees that. In whatever language: what else may be
    /// in the wrong state for a stream is a parameter.
    pub fn is_slot_gone(&self) -> bool {
        let Self::Postgres(_, source) = self else {
            return false;
        };
        let parameters = ["wal_level", "shared_preload_libraries"];
        source.is("42704")
            || source.is("55000") && !parameters.iter().any(|name| source.message.contains(name))
    }

    /// A table, its schema or a column is not there, or not under that name any more; or it has no label, or one that does not fit.
    pub fn is_of_a_changed_table(&self) -> bool {
        let states = ["42P01", "3F000", "42703", "55000"];
        matches!(self, Self::Postgres(_, source) if states.iter().any(|state| source.is(state)))
    }

    /// Whether a table was not to be had in time, because somebody holds it for himself.
    pub fn is_of_a_lock(&self) -> bool {
        matches!(self, Self::Postgres(_, source) if source.is("55P03"))
    }

    /// Whether an error of a statement about a table is taken for that table's own: neither has the connection or the server failed, nor may
    /// somebody not log in. What the machine refuses counts, as memory, locks or a file: a table of thousands of partitions, or one large
    /// row, can be what takes more than there is.
    pub fn is_of_one_table(&self) -> bool {
        let Self::Postgres(_, source) = self else {
            return false;
        };
        let class = source.sqlstate.as_deref().and_then(|state| state.get(..2));
        source.kind == ErrorKind::Server
            && class.is_some_and(|class| !["08", "25", "28", "40", "57"].contains(&class))
            && !source.is("53300")
    }

    /// Whether Postgres was given up because it said nothing.
    pub fn is_silence(&self) -> bool {
        matches!(self, Self::Postgres(_, source) if source.kind == ErrorKind::Silence)
    }

    /// What can be done about it.
    pub fn class(&self) -> Class {
        match self {
            Self::Postgres(_, source) => source.class(),
            Self::Redis(_, class, _) => *class,
            Self::Spool(..) => Class::Retry,
            // Nothing is left of what a process or the machine may have at once: that passes.
            Self::Io(_, source)
                if Errno::from_io_error(source).is_some_and(|errno| {
                    [Errno::MFILE, Errno::NFILE, Errno::AGAIN, Errno::NOMEM].contains(&errno)
                }) =>
            {
                Class::Retry
            }
            Self::Config(_)
            | Self::Setup(_)
            | Self::Gap(_)
            | Self::Unreachable(..)
            | Self::Timeout(_)
            | Self::Checks(..)
            | Self::Io(..) => Class::Operator,
            Self::Stream(..) | Self::Bug(_) => Class::Bug,
        }
    }

    /// Whether an error of a later session may heal while it is tried again, although it would stop the first one.
    pub fn heals_later(&self) -> bool {
        match self {
            // The same connection string has worked: its certificate or service file is being replaced.
            Self::Postgres(_, source) if source.kind == ErrorKind::Settings => true,
            _ => self.class() == Class::Access,
        }
    }

    /// The exit code of a process that ends with this error. See [`exit`].
    pub fn exit_code(&self) -> u8 {
        match (self, self.class()) {
            (Self::Config(_), _) => exit::USAGE,
            (Self::Setup(_), _) => exit::POSTGRES,
            (Self::Gap(_), _) => exit::GAP,
            (Self::Checks(_, code), _) => *code,
            (Self::Timeout(_), _) => exit::TIMEOUT,
            (Self::Unreachable(..), _) | (_, Class::Retry) => exit::UNREACHABLE,
            (Self::Postgres(_, source), Class::Operator) if source.kind == ErrorKind::Settings => exit::USAGE,
            (Self::Postgres(..), Class::Operator | Class::Access) => exit::POSTGRES,
            (Self::Redis(..), Class::Operator | Class::Access) => exit::REDIS,
            _ => exit::INTERNAL,
        }
    }

    fn report(&self) -> &Report {
        match self {
            Self::Config(report)
            | Self::Postgres(report, _)
            | Self::Setup(report)
            | Self::Redis(report, ..)
            | Self::Stream(report, _)
            | Self::Gap(report)
            | Self::Unreachable(report, ..)
            | Self::Timeout(report)
            | Self::Checks(report, _)
            | Self::Io(report, _)
            | Self::Spool(report, _)
            | Self::Bug(report) => report,
        }
    }

    fn report_mut(&mut self) -> &mut Report {
        match self {
            Self::Config(report)
            | Self::Postgres(report, _)
            | Self::Setup(report)
            | Self::Redis(report, ..)
            | Self::Stream(report, _)
            | Self::Gap(report)
            | Self::Unreachable(report, ..)
            | Self::Timeout(report)
            | Self::Checks(report, _)
            | Self::Io(report, _)
            | Self::Spool(report, _)
            | Self::Bug(report) => report,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_names_object_lsn_and_next_command() {
        let error = Error::postgres(
            "cannot start the slot \"x\"",
            PqError::new(ErrorKind::Server, "no such slot"),
        )
        .at(Lsn(0x16_0000_0010))
        .next("walmirror init --slot x")
        .next("something less specific");
        assert_eq!(
            error.to_string(),
            "cannot start the slot \"x\", at LSN 16/10: no such slot"
        );
        assert_eq!(error.next_command(), Some("walmirror init --slot x"));
    }

    #[test]
    fn exit_codes_follow_the_class() {
        let connection = || PqError::new(ErrorKind::Connection, "refused");
        assert_eq!(Error::config("x").exit_code(), exit::USAGE);
        assert_eq!(Error::postgres("x", connection()).exit_code(), exit::UNREACHABLE);
        assert_eq!(
            Error::postgres("x", PqError::new(ErrorKind::Settings, "y")).exit_code(),
            exit::USAGE
        );
        assert_eq!(Error::setup("x").exit_code(), exit::POSTGRES);
        assert_eq!(
            Error::redis("x", Class::Operator, "NOAUTH").exit_code(),
            exit::REDIS
        );
        assert_eq!(
            Error::redis("x", Class::Retry, "LOADING").exit_code(),
            exit::UNREACHABLE
        );
        assert_eq!(Error::bug("x").exit_code(), exit::INTERNAL);
        assert_eq!(Error::answer("x").exit_code(), exit::INTERNAL);
        let last = Error::postgres("x", connection());
        assert_eq!(
            Error::unreachable("Postgres", Duration::from_secs(1), last).exit_code(),
            exit::UNREACHABLE
        );
    }

    /// The story: a WAL segment that is not there any more was taken for a library that is not there.
    #[test]
    fn a_slot_that_is_of_no_use_any_more_is_told_from_a_missing_library() {
        let error = |sqlstate: &str, message: &str| {
            let source = PqError {
                sqlstate: Some(sqlstate.into()),
                ..PqError::new(ErrorKind::Server, message)
            };
            crate::replication::slot::explain(Error::postgres("x", source), "s'1", "My Role")
        };
        let segment = "requested WAL segment 000000010000000000000003 has already been removed";
        let lost = error("58P01", segment);
        assert!(lost.is_wal_removed() && !lost.is_slot_gone());
        // The story: where messages are translated, a mirror whose WAL was gone ended at each start.
        let translated = "das angeforderte WAL-Segment »000000010000000A000000FF« wurde schon entfernt";
        assert!(error("58P01", translated).is_wal_removed());
        assert_eq!(
            lost.next_command(),
            Some("SELECT pg_drop_replication_slot('s''1');   -- the next `run` makes it anew")
        );
        let library = error(
            "58P01",
            "could not access file \"walmirror\": No such file or directory",
        );
        assert!(!library.is_wal_removed());
        assert!(
            library
                .next_command()
                .is_some_and(|next| next.contains("make install"))
        );
        let denied = error("42501", "permission denied to use replication slots");
        assert_eq!(denied.next_command(), Some("ALTER ROLE \"My Role\" REPLICATION;"));
        for (sqlstate, message, is_gone) in [
            (
                "55000",
                "can no longer get changes from replication slot \"s\"",
                true,
            ),
            ("55000", "can no longer access replication slot \"s\"", true),
            ("55000", "cannot read from logical replication slot \"s\"", true),
            (
                "55000",
                "kann nicht mehr auf Replikations-Slot »s« zugreifen",
                true,
            ),
            ("42704", "replication slot \"s\" does not exist", true),
            ("55000", "logical decoding requires wal_level >= logical", false),
        ] {
            assert_eq!(error(sqlstate, message).is_slot_gone(), is_gone, "{message}");
        }
    }

    /// The story: bits flipped on the way, and a snapshot that was none any more was told as an internal error, with what it held.
    #[test]
    fn an_answer_that_cannot_be_read_is_told_without_it() {
        let error = Error::answer("cannot take a snapshot");
        assert_eq!(
            error.to_string(),
            "cannot take a snapshot: Postgres' answer cannot be read"
        );
        assert_eq!(error.next_command(), None);
    }

    #[test]
    fn every_exit_code_is_documented() {
        let documented = include_str!("../../docs/operations.md");
        let codes = [
            exit::OK,
            exit::INTERNAL,
            exit::USAGE,
            exit::POSTGRES,
            exit::REDIS,
            exit::UNREACHABLE,
            exit::GAP,
            exit::TIMEOUT,
        ];
        for code in codes {
            assert!(documented.contains(&format!("\n| {code} | ")), "{code}");
        }
    }
}
