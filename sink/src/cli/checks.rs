//! The checks of `doctor` and `init`: what one looks like, and in which order those of the Postgres side run. Each looks
//! at one thing and gives one line.

use std::fmt;

use super::checks_server as server;
use super::checks_slot::{free, retained_outcome, slot_outcome};
use super::checks_tables as tables;
use super::connect_postgres;
use crate::config::{Conninfo, RedisUrl, SlotName};
use crate::error::Error;
use crate::pq::{Connection, PqError, quote_identifier};
use crate::replication;

/// How a check ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// As it should be.
    Ok(String),
    /// Works, but somebody should know; with the next command, if there is one.
    Note(String, Option<String>),
    /// Works, and will not for long if nobody does something; with the next command.
    Warn(String, String),
    /// Does not work; with the next command.
    Fail(String, String),
}

/// One line of `doctor`.
#[derive(Clone, Debug)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// What was found.
    pub outcome: Outcome,
}

impl Check {
    pub fn failed(&self) -> bool {
        matches!(self.outcome, Outcome::Fail(..))
    }

    pub fn warned(&self) -> bool {
        matches!(self.outcome, Outcome::Warn(..))
    }

    /// The same with a command that is for this Redis.
    pub fn at(mut self, url: Option<&RedisUrl>) -> Self {
        let next = match &mut self.outcome {
            Outcome::Note(_, Some(next)) | Outcome::Warn(_, next) | Outcome::Fail(_, next) => Some(next),
            Outcome::Ok(_) | Outcome::Note(_, None) => None,
        };
        if let Some((next, url)) = next.zip(url) {
            *next = url.complete(next);
        }
        self
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (word, text, next) = match &self.outcome {
            Outcome::Ok(text) => ("ok  ", text, None),
            Outcome::Note(text, next) => ("note", text, next.as_ref()),
            Outcome::Warn(text, next) => ("WARN", text, Some(next)),
            Outcome::Fail(text, next) => ("FAIL", text, Some(next)),
        };
        write!(f, "{word}  {:<24} {text}", self.name)?;
        match next {
            Some(next) => write!(f, "\n      next: {next}"),
            None => Ok(()),
        }
    }
}

/// What an error of a connection attempt looks like as a check.
pub fn from_error(name: &'static str, error: &Error) -> Check {
    let next = error
        .next_command()
        .unwrap_or("walmirror doctor --log-level debug")
        .to_owned();
    Check {
        name,
        outcome: Outcome::Fail(error.to_string(), next),
    }
}

/// Connects, and runs every check in the order in which a person would repair.
pub fn postgres(conninfo: &Conninfo, slot: &SlotName) -> Result<Vec<Check>, Error> {
    let mut connection = connect_postgres(conninfo.expose())?;
    let mut checks = vec![server::server(&mut connection)];
    type Step = fn(&mut Connection) -> Result<Outcome, PqError>;
    let steps: [(&'static str, Step); 7] = [
        ("wal_level", server::wal_level),
        ("preloaded library", server::preloaded),
        ("extension", server::extension),
        ("output_plugin_libraries", server::plugin_list),
        ("replication right", server::replication_right),
        ("message right", server::message_right),
        ("row security", tables::row_security),
    ];
    for (name, step) in steps {
        checks.push(run(name, &mut connection, step));
    }
    checks.push(server::replication_connection(conninfo));
    let info = replication::slot_info(&mut connection, slot)?;
    let database = connection.target().database;
    let mut outcome = slot_outcome(slot, info.as_ref(), &database);
    if let (None, Outcome::Note(what, _)) = (&info, &mut outcome) {
        *what += &replication::slots_there(&mut connection);
    }
    checks.push(Check {
        name: "slot",
        outcome,
    });
    let name = slot.as_str().to_owned();
    checks.push(Check {
        name: "retained WAL",
        outcome: retained_outcome(replication::retained(&mut connection, &name)?.as_ref()),
    });
    checks.push(run("free slots and senders", &mut connection, |connection| {
        free(connection, info.as_ref())
    }));
    checks.push(run(
        "synchronous standbys",
        &mut connection,
        server::synchronous_standbys,
    ));
    checks.push(run("mirrored tables", &mut connection, tables::tables));
    checks.push(Check {
        name: "labels",
        outcome: tables::labels(&mut connection)
            .unwrap_or_else(|error| Outcome::Note(format!("cannot be looked at: {error}"), None)),
    });
    Ok(checks)
}

fn run(
    name: &'static str,
    connection: &mut Connection,
    step: impl FnOnce(&mut Connection) -> Result<Outcome, PqError>,
) -> Check {
    let outcome = step(connection).unwrap_or_else(|error| {
        let next = match error.sqlstate.as_deref() {
            Some("42501") => format!(
                "GRANT pg_read_all_settings TO {};",
                quote_identifier(&connection.target().user)
            ),
            _ => "walmirror doctor --log-level debug".to_owned(),
        };
        Outcome::Note(format!("cannot be looked at: {error}"), Some(next))
    });
    Check { name, outcome }
}

/// The first value of the first row, as text; empty for NULL.
pub fn value(connection: &mut Connection, sql: &str) -> Result<String, PqError> {
    Ok(connection
        .query(sql, &[])?
        .text(0, 0)
        .unwrap_or_default()
        .to_owned())
}
