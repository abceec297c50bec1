//! What to do next when a connection cannot be made.

use super::error::{ErrorKind, PqError};
use super::quote_identifier;
use crate::error::Error;

/// Makes an [`Error`] with the next command out of a failed [`super::Connection::connect`].
pub fn connect_failed(source: PqError) -> Error {
    let target = source.target.clone().unwrap_or_default();
    // What libpq takes by itself needs no saying.
    let flag = |flag: &str, value: &str| {
        if value.is_empty() {
            String::new()
        } else {
            format!(" {flag} {value}")
        }
    };
    let at = flag("-h", &target.host) + &flag("-p", &target.port);
    let next = match (source.kind, source.sqlstate.as_deref()) {
        (ErrorKind::Settings, _) if source.message.contains("no password supplied") => {
            format!("psql \"{target}\"   # put the password that works into ~/.pgpass, or into PGPASSWORD")
        }
        (ErrorKind::Settings, _) => {
            "walmirror doctor --postgres 'host=localhost port=5432 dbname=mydb user=me'   # or postgresql://me@localhost/mydb".into()
        }
        (_, Some("28P01")) => {
            format!("psql \"{target}\"   # put the password that works into ~/.pgpass, or into PGPASSWORD")
        }
        (_, Some("28000")) if source.message.contains("does not exist") => {
            format!("createuser --replication{at} {}", target.user)
        }
        (_, Some("28000")) => {
            "SELECT * FROM pg_hba_file_rules;   -- a rule for this role is missing; then SELECT pg_reload_conf();".into()
        }
        (_, Some("3D000")) => format!("createdb{at} {}", target.database),
        // Only a replication connection asks for a right this early.
        (_, Some("42501")) => format!("ALTER ROLE {} REPLICATION;", quote_identifier(&target.user)),
        (_, Some("53300")) => "SHOW max_connections;   -- for the stream, max_wal_senders counts too".into(),
        _ => format!("pg_isready{at}"),
    };
    let what = match (target.user.as_str(), target.host.as_str()) {
        ("", _) | (_, "") => "cannot connect to Postgres".to_owned(),
        _ => format!("cannot connect to Postgres ({target})"),
    };
    Error::postgres(what, source).next(next)
}
