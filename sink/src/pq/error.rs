//! What libpq and the server say when something fails, and what to do about it.

use std::borrow::Cow;
use std::fmt;

use crate::error::Class;
use crate::shell::double_quoted;

/// Where a [`PqError`] comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The connection string, a service file or a TLS file is wrong: no server was asked.
    Settings,
    /// The server could not be reached, or the connection was lost.
    Connection,
    /// The server was asked, and said nothing for as long as it may.
    Silence,
    /// The server answered with an error.
    Server,
    /// The server or libpq did what this code does not expect.
    Protocol,
}

/// An error of libpq or of the server, with the fields that the server sent.
///
/// `Display` shows message, hint and SQLSTATE. It leaves out the server's detail, which can hold values of rows
/// (INVARIANT I8).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PqError {
    /// Where the error comes from.
    pub kind: ErrorKind,
    /// The five characters of the SQLSTATE, where the server sent one.
    pub sqlstate: Option<String>,
    /// ERROR, FATAL or PANIC (never translated).
    pub severity: Option<Box<str>>,
    /// The primary message.
    pub message: String,
    /// The server's DETAIL. May hold row values: never log it.
    pub detail: Option<Box<str>>,
    /// The server's HINT.
    pub hint: Option<Box<str>>,
    /// For a failed connection attempt: what it was made to.
    pub target: Option<Box<Target>>,
}

/// Where a connection goes, without secrets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// Host, or the directory of the socket.
    pub host: String,
    /// Port.
    pub port: String,
    /// Role.
    pub user: String,
    /// Database.
    pub database: String,
}

impl Target {
    /// What makes the extension there, which takes another role than the sink's.
    pub fn create_extension(&self) -> String {
        let target = Self {
            user: String::new(),
            ..self.clone()
        };
        let target = double_quoted(&target.to_string());
        format!("psql {target} -c 'CREATE EXTENSION walmirror'   # as a superuser")
    }
}

impl fmt::Display for Target {
    /// As a connection string that psql takes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [
            ("host", &self.host),
            ("port", &self.port),
            ("user", &self.user),
            ("dbname", &self.database),
        ];
        let mut first = true;
        for (keyword, value) in parts.into_iter().filter(|(_, value)| !value.is_empty()) {
            let space = if std::mem::take(&mut first) { "" } else { " " };
            let value = quoted(value);
            write!(f, "{space}{keyword}={value}")?;
        }
        Ok(())
    }
}

/// A value as it stands in a connection string.
fn quoted(value: &str) -> Cow<'_, str> {
    if value.contains(|sign: char| sign.is_ascii_whitespace() || matches!(sign, '\'' | '\\')) {
        let escaped = value.replace('\\', r"\\").replace('\'', r"\'");
        Cow::Owned(format!("'{escaped}'"))
    } else {
        Cow::Borrowed(value)
    }
}

impl PqError {
    /// An error that has no more than a message.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            sqlstate: None,
            severity: None,
            message: message.into(),
            detail: None,
            hint: None,
            target: None,
        }
    }

    /// Whether the SQLSTATE is this one.
    pub fn is(&self, sqlstate: &str) -> bool {
        self.sqlstate.as_deref() == Some(sqlstate)
    }

    /// Makes an error of what `PQerrorMessage` says after a failed connection attempt in verbose mode.
    ///
    /// libpq has no other way to tell the SQLSTATE of a refused connection: in verbose mode the text reads
    /// `… failed: FATAL:  28P01: password authentication failed for user "x"`.
    ///
    /// `conninfo` is looked at only to decide whether libpq may be quoted.
    pub fn from_connection_attempt(text: &str, conninfo: &str) -> Self {
        let mut error = Self::new(ErrorKind::Connection, String::new());
        let mut message: Vec<String> = Vec::new();
        for line in text.lines().map(str::trim_end).filter(|line| !line.is_empty()) {
            if line.starts_with("LOCATION:") {
                continue;
            }
            if let Some(hint) = line.strip_prefix("HINT:") {
                error.hint = Some(hint.trim().into());
                continue;
            }
            if let Some(detail) = line.strip_prefix("DETAIL:") {
                error.detail = Some(detail.trim().into());
                continue;
            }
            match split_sqlstate(line) {
                Some((before, sqlstate, after)) => {
                    error.kind = ErrorKind::Server;
                    error.sqlstate = Some(sqlstate.to_owned());
                    error.severity = Some("FATAL".into());
                    message.push(format!("{before} {after}"));
                }
                None => message.push(line.trim().to_owned()),
            }
        }
        error.message = if message.is_empty() {
            "libpq gave no reason".to_owned()
        } else {
            message.join(" ")
        };
        if error.kind == ErrorKind::Connection && is_wrong_setting(&error.message) {
            error.kind = ErrorKind::Settings;
            let secretive = ["pass", "://"].iter().any(|sign| conninfo.contains(sign));
            if secretive {
                error.message = without_quotation(error.message);
            }
        }
        error
    }

    /// What the caller can do: try again, tell the operator, or report a bug.
    pub fn class(&self) -> Class {
        match self.kind {
            ErrorKind::Settings => Class::Operator,
            ErrorKind::Connection | ErrorKind::Silence => Class::Retry,
            ErrorKind::Protocol => Class::Bug,
            ErrorKind::Server => self.sqlstate.as_deref().map_or(Class::Bug, class_of_sqlstate),
        }
    }
}

fn class_of_sqlstate(sqlstate: &str) -> Class {
    match sqlstate {
        // The slot is in use by another sink, or by the walsender of a connection that has just been lost.
        "55006" => Class::Retry,
        // Serialisation failures, deadlocks, lock and statement timeouts, cancelled queries.
        "40001" | "40P01" | "55P03" | "57014" => Class::Retry,
        // 08: connection lost. 53: out of connections, memory or disk. 57P: shutting down, crashed, starting up.
        // 58030: an I/O error. 25006: a read-only server, which a failover may heal.
        "58030" | "25006" => Class::Retry,
        // A right that the role lacks.
        "42501" => Class::Access,
        // The database was dropped; a limit of the configuration (max_replication_slots).
        "57P04" | "53400" => Class::Operator,
        // An internal error of one session, as when an output plugin fails. Corrupted data or indexes stay corrupted.
        "XX000" => Class::Retry,
        "XX001" | "XX002" => Class::Operator,
        _ => match sqlstate.get(..2) {
            Some("08" | "53" | "57") => Class::Retry,
            // Who may log in.
            Some("28") => Class::Access,
            // 3D, 3F: no such database, schema. 42: missing objects. 0A, 55: the server is not set up for this. 58, F0:
            // missing files, wrong configuration. 22, 23: what an operator's mapping asks of the data.
            Some("3D" | "3F" | "42" | "0A" | "55" | "58" | "F0" | "22" | "23" | "54" | "P0") => {
                Class::Operator
            }
            _ => Class::Bug,
        },
    }
}

/// libpq is never told about a locale, so its own messages are always these English ones.
fn is_wrong_setting(message: &str) -> bool {
    const SIGNS: [&str; 17] = [
        "URI",
        "percent-encoded",
        "invalid ",
        "missing \"=\"",
        "definition of service",
        "service file",
        "syntax error",
        "no password supplied",
        "certificate",
        "private key",
        "server does not support SSL",
        "SSL is not supported",
        "could not match",
        "unterminated quoted string",
        "requires a password",
        "requested but not compiled",
        "unrecognized",
    ];
    SIGNS.iter().any(|sign| message.contains(sign))
}

/// libpq's complaints about the form of a connection string repeat it, or the word that it stumbled over. Either may
/// hold a password with a space or a slash in it, so that the quotation goes.
fn without_quotation(mut message: String) -> String {
    const REPEATING: [&str; 5] = [
        "URI",
        "percent-encoded",
        "missing \"=\" after",
        "connection option",
        "service file",
    ];
    if REPEATING.iter().any(|sign| message.contains(sign)) {
        // The quotation comes last, or before "in connection info string".
        let from = if message.starts_with("missing") { 12 } else { 0 };
        if let Some(at) = message
            .get(from..)
            .and_then(|rest| rest.find(" \""))
            .map(|at| from + at)
        {
            message.truncate(at);
            message.push_str(" (not shown: it may be secret)");
        }
    }
    message
}

/// Splits `FATAL:  28P01: text` into what is before the code, the code, and what is behind it.
fn split_sqlstate(line: &str) -> Option<(&str, &str, &str)> {
    let mut from = 0;
    while let Some(found) = line.get(from..)?.find(":  ") {
        let start = from + found + 3;
        let code = line.get(start..start + 5);
        let rest = line.get(start + 5..).and_then(|rest| rest.strip_prefix(": "));
        if let (Some(code), Some(rest)) = (code, rest)
            && code
                .bytes()
                .all(|byte| byte.is_ascii_digit() || byte.is_ascii_uppercase())
        {
            return Some((line.get(..start)?.trim_end(), code, rest));
        }
        from = start;
    }
    None
}

impl fmt::Display for PqError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // libpq breaks its lines, and a log has one line for one event.
        for (number, line) in self.message.lines().enumerate() {
            f.write_str(if number > 0 { " " } else { "" })?;
            f.write_str(line.trim())?;
        }
        if let Some(sqlstate) = &self.sqlstate {
            write!(f, " (SQLSTATE {sqlstate})")?;
        }
        if let Some(hint) = &self.hint {
            write!(f, " Hint: {hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for PqError {}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_sqlstate_of_a_refused_connection_is_found() {
        let error = PqError::from_connection_attempt(
            "connection to server at \"localhost\" (::1), port 5432 failed: FATAL:  28P01: password authentication failed for user \"x\"\nLOCATION:  auth_failed, auth.c:326\n",
            "",
        );
        assert!(error.is("28P01"));
        assert_eq!(error.class(), Class::Access);
        assert!(
            error
                .message
                .ends_with("FATAL: password authentication failed for user \"x\""),
            "{}",
            error.message
        );
        assert!(!error.message.contains("auth.c"));
    }

    #[test]
    fn an_unreachable_server_is_worth_another_try() {
        let error = PqError::from_connection_attempt(
            "connection to server on socket \"/nowhere/.s.PGSQL.5432\" failed: No such file or directory\n\tIs the server running locally and accepting connections on that socket?\n",
            "",
        );
        assert_eq!((error.kind, error.class()), (ErrorKind::Connection, Class::Retry));
    }

    #[test]
    fn a_wrong_connection_string_is_the_operators() {
        for text in [
            "invalid sslmode value: \"maybe\"\n",
            "definition of service \"x\" not found\n",
        ] {
            let error = PqError::from_connection_attempt(text, "password=x");
            assert_eq!(
                (error.kind, error.class()),
                (ErrorKind::Settings, Class::Operator),
                "{text}"
            );
        }
    }

    #[test]
    fn a_wrong_connection_string_is_not_repeated() {
        for text in [
            "missing \"=\" after \"geheim\" in connection info string\n",
            "invalid connection option \"geheim\"\n",
            "unexpected character \"g\" in position 5 in URI (expected \":\" or \"/\"): \"postgresql://geheim\"\n",
        ] {
            let error = PqError::from_connection_attempt(text, "password=x");
            assert_eq!(error.kind, ErrorKind::Settings, "{text}");
            assert!(!error.message.contains("geheim"), "{}", error.message);
        }
    }

    #[test]
    fn a_server_that_starts_up_or_a_busy_slot_is_retried_and_a_missing_slot_is_not() {
        for (sqlstate, class) in [
            ("57P01", Class::Retry),
            ("57P03", Class::Retry),
            ("55006", Class::Retry),
            ("53300", Class::Retry),
            ("53400", Class::Operator),
            ("42704", Class::Operator),
            ("42501", Class::Access),
            ("55000", Class::Operator),
            ("0A000", Class::Operator),
            ("3D000", Class::Operator),
            ("58P01", Class::Operator),
            ("2F000", Class::Bug),
        ] {
            let error = PqError {
                sqlstate: Some(sqlstate.into()),
                ..PqError::new(ErrorKind::Server, "x")
            };
            assert_eq!(error.class(), class, "{sqlstate}");
        }
    }

    #[test]
    fn a_target_is_a_connection_string_whatever_the_names_are() {
        let target = Target {
            host: "/run/pg".into(),
            user: "o'neil".into(),
            database: r"my \db".into(),
            ..Target::default()
        };
        assert_eq!(
            target.to_string(),
            r"host=/run/pg user='o\'neil' dbname='my \\db'"
        );
        let target = Target {
            database: "shop".into(),
            ..target
        };
        assert_eq!(
            target.create_extension(),
            "psql \"host=/run/pg dbname=shop\" -c 'CREATE EXTENSION walmirror'   # as a superuser"
        );
    }

    #[test]
    fn the_detail_is_not_shown() {
        let error = PqError {
            detail: Some("Key (id)=(secret)".into()),
            ..PqError::new(ErrorKind::Server, "duplicate key")
        };
        assert!(!error.to_string().contains("secret"));
    }
}
