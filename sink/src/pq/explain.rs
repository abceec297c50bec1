//! What to do next when a connection cannot be made.

use super::error::{ErrorKind, PqError};
use super::quote_identifier;
use crate::error::Error;
use crate::shell::{double_quoted, word};

/// Makes an [`Error`] out of a failed [`super::Connection::connect`].
pub fn connect_failed(source: PqError) -> Error {
    let what = match source.target.as_deref().map(ToString::to_string) {
        Some(target) if !target.is_empty() && source.kind != ErrorKind::Settings => {
            format!("cannot connect to Postgres ({target})")
        }
        _ => "cannot connect to Postgres".to_owned(),
    };
    Error::postgres(what, source)
}

/// Makes one out of a failed `pg_logical_emit_message`, for this role, whose name is quoted.
pub fn message_failed(what: &str, source: PqError, role: &str) -> Error {
    let is_denied = source.is("42501");
    let error = Error::postgres(what, source);
    if is_denied {
        error.next(message_grant(role))
    } else {
        error
    }
}

/// Everybody may write messages, unless somebody has taken that away, as docs/operations.md advises.
pub fn message_grant(role: &str) -> String {
    // Newer servers have it with other arguments.
    format!(
        "DO $$ DECLARE f regprocedure; BEGIN FOR f IN SELECT oid FROM pg_proc WHERE proname = 'pg_logical_emit_message' LOOP \
         EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO {role}', f); END LOOP; END $$;"
    )
}

/// The next command after a failed connection attempt; None for every other error.
pub fn next_after_connect(source: &PqError) -> Option<String> {
    let target = source.target.as_deref()?;
    // What libpq takes by itself needs no saying.
    let flag = |flag: &str, value: &str| {
        if value.is_empty() {
            String::new()
        } else {
            format!(" {flag} {}", word(value))
        }
    };
    let connection = double_quoted(&target.to_string());
    let at = flag("-h", &target.host) + &flag("-p", &target.port);
    Some(match (source.kind, source.sqlstate.as_deref()) {
        (ErrorKind::Settings, _) if source.message.contains("no password supplied") => {
            format!("psql {connection}   # put the password that works into ~/.pgpass, or into PGPASSWORD")
        }
        (ErrorKind::Settings, _) if source.message.contains("certificate") => {
            let connection = double_quoted(&format!("{target} sslmode=verify-full"));
            format!("psql {connection}   # sslrootcert names the authorities to trust; the server's certificate is ssl_cert_file there")
        }
        (ErrorKind::Settings, _) => {
            "walmirror doctor --postgres 'host=localhost port=5432 dbname=mydb user=me'   # or postgresql://me@localhost/mydb".into()
        }
        (_, Some("28P01")) => {
            format!("psql {connection}   # put the password that works into ~/.pgpass, or into PGPASSWORD")
        }
        (_, Some("28000")) if source.message.contains("does not exist") => {
            format!("createuser --replication{at} {}", word(&target.user))
        }
        (_, Some("28000")) if source.message.contains("not permitted to log in") => {
            format!("ALTER ROLE {} LOGIN;", quote_identifier(&target.user))
        }
        (_, Some("28000")) => {
            "SELECT * FROM pg_hba_file_rules;   -- a rule for this role is missing; then SELECT pg_reload_conf();".into()
        }
        (_, Some("3D000")) => {
            let user = flag("-U", &target.user);
            format!("psql{at}{user} -l   # which databases there are; if it is to be made: createdb{at} {}", word(&target.database))
        }
        (_, Some("42501")) if source.message.contains("permission denied for database") => {
            let (database, role) = (quote_identifier(&target.database), quote_identifier(&target.user));
            format!("GRANT CONNECT ON DATABASE {database} TO {role};")
        }
        // Apart from that, only a replication connection asks for a right this early.
        (_, Some("42501")) => format!("ALTER ROLE {} REPLICATION;", quote_identifier(&target.user)),
        (_, Some("53300")) => "SHOW max_connections;   -- for the stream, max_wal_senders counts too".into(),
        _ => format!("pg_isready -d {connection}"),
    })
}
