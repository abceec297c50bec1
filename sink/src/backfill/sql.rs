//! A worker's SQL connection: snapshots, markers, and waiting for transactions that are older than what the stream shows.

use std::time::Duration;

use crate::error::Error;
use crate::gate::Snapshot;
use crate::pq::{
    Connection, ErrorKind, PqError, QueryResult, Waker, connect_failed, message_failed, quote_identifier,
};

/// What every such session sets, besides what all of ours do. Rows must not be hidden by policies (better an error), waits for standbys
/// must not hold markers up, and values read as text must look as the value contract says. Keys are given in arrays of texts, where an
/// unquoted NULL must be one. Rows must come in the order of their ctids: a chunk that ends early goes on behind its last one, so no
/// plan may begin in the middle of the table. For how long it waits for locks is set by who connects.
const SETTINGS: &str = "SET row_security = off; SET synchronous_commit = local; SET DateStyle = 'ISO'; SET IntervalStyle = 'postgres'; \
    SET TimeZone = 'UTC'; SET bytea_output = 'hex'; SET extra_float_digits = 1; SET enable_tidscan = on; \
    SET walmirror.capture = off; SET array_nulls = on; SET lc_monetary = 'C'; SET synchronize_seqscans = off";

/// The session.
pub(crate) struct Sql {
    pub(crate) connection: Connection,
    /// The database is SQL_ASCII: its text is bytes, and keys that are made of it need not be UTF-8.
    pub(crate) any_bytes: bool,
    /// Its role, quoted.
    role: String,
}

/// Whoever reads says which snapshots it can use: who reads tables those that the gate will not refuse as a whole, others any.
pub(crate) trait Snapshots {
    /// Begins a transaction and says what it sees; `lock` as for [`Sql::begin_with`]. None: there is nothing to be read any more.
    fn begin(&self, sql: &mut Sql, table: &str, lock: Option<&str>) -> Result<Option<Snapshot>, Error>;
}

/// Any snapshot will do: nothing that is read is written, or the gate judges it key by key.
pub(crate) struct AnySnapshot;

impl Snapshots for AnySnapshot {
    fn begin(&self, sql: &mut Sql, _table: &str, lock: Option<&str>) -> Result<Option<Snapshot>, Error> {
        sql.begin_with(lock).map(Some)
    }
}

/// A transaction id that is above those of all transactions that have one.
pub(super) fn transaction_id(sql: &mut Sql) -> Result<u64, Error> {
    id(sql.query("cannot take a transaction id", "SELECT pg_current_xact_id()", &[])?)
}

#[allow(clippy::needless_pass_by_value)]
fn id(result: QueryResult) -> Result<u64, Error> {
    let id = result.text(0, 0).and_then(|text| text.parse().ok());
    id.ok_or_else(|| Error::answer("cannot take a transaction id"))
}

/// Gives an error of the server the command that helps this role, whose name is quoted.
pub(crate) fn explain(what: impl Into<String>, role: &str, error: PqError) -> Error {
    let next = match error.sqlstate.as_deref() {
        Some("42501") if error.message.contains("row-level security") => {
            Some(format!("ALTER ROLE {role} BYPASSRLS;"))
        }
        Some("42501") => Some(format!("GRANT SELECT ON <table> TO {role};")),
        _ => None,
    };
    let error = Error::postgres(what, error);
    match next {
        Some(next) => error.next(next),
        None => error,
    }
}

/// The schema of a name that is quoted where it has to be.
fn schema_of(name: &str) -> &str {
    let mut is_quoted = false;
    let end = name.find(|sign| {
        is_quoted ^= sign == '"';
        sign == '.' && !is_quoted
    });
    end.and_then(|end| name.get(..end)).unwrap_or(name)
}

impl Sql {
    /// A server that says nothing for `silence`, and does nothing either, is given up.
    pub(crate) fn connect(conninfo: &str, interrupt: Waker, silence: Duration) -> Result<Self, Error> {
        let extra = [("fallback_application_name", "walmirror backfill")];
        let mut connection =
            Connection::connect_interrupted_with(conninfo, &extra, interrupt).map_err(connect_failed)?;
        connection
            .look_after(conninfo, silence)
            .map_err(|error| Error::postgres("cannot tell the process of the connection", error))?;
        let role = quote_identifier(&connection.target().user);
        connection
            .simple(SETTINGS)
            .map_err(|error| explain("cannot prepare a session that reads tables", &role, error))?;
        let mut sql = Self {
            connection,
            any_bytes: false,
            role,
        };
        let role = sql.query(
            "cannot tell the role of the session",
            "SELECT quote_ident(current_user)",
            &[],
        )?;
        sql.role = role.text(0, 0).unwrap_or_default().to_owned();
        let encoding = sql.query("cannot read server_encoding", "SHOW server_encoding", &[])?;
        sql.any_bytes = encoding.text(0, 0) == Some("SQL_ASCII");
        if sql.any_bytes {
            // Else the server takes no other bytes than UTF-8.
            sql.query(
                "cannot set client_encoding",
                "SET client_encoding = 'SQL_ASCII'",
                &[],
            )?;
        }
        Ok(sql)
    }

    /// A table that somebody holds for himself is waited for so long: what waits holds up the other tables.
    pub(crate) fn set_lock_timeout(&mut self, time: Duration) -> Result<(), Error> {
        let statement = format!("SET lock_timeout = '{}ms'", time.as_millis().clamp(1, 1 << 30));
        self.query("cannot set lock_timeout", &statement, &[]).map(drop)
    }

    /// The role of the session, quoted.
    pub(super) fn role(&self) -> &str {
        &self.role
    }

    /// Like [`explain`] for an error of a statement about a table, whose quoted name the command that helps has to have.
    pub(crate) fn explain_table(&self, what: impl Into<String>, name: &str, error: PqError) -> Error {
        let role = &self.role;
        if !error.is("42501") || error.message.contains("row-level security") {
            return explain(what, role, error);
        }
        let next = if error.message.contains("for schema ") {
            format!("GRANT USAGE ON SCHEMA {} TO {role};", schema_of(name))
        } else {
            format!("GRANT SELECT ON {name} TO {role};")
        };
        Error::postgres(what, error).next(next)
    }

    /// Begins a transaction whose one snapshot every statement of it reads in, and says which one that is.
    pub(crate) fn begin(&mut self) -> Result<Snapshot, Error> {
        self.begin_with(None)
    }

    /// The same for who reads a table (quoted), that is locked first: who waited for whoever swaps its file for another one, as tools do
    /// that compact tables, would look into the new file with a snapshot that does not see the rows there.
    pub(crate) fn begin_with(&mut self, lock: Option<&str>) -> Result<Snapshot, Error> {
        let what = "cannot take a snapshot";
        let lock_it = lock.map(|table| format!("LOCK TABLE {table} IN ACCESS SHARE MODE; "));
        let sql = format!(
            "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; {}SELECT pg_current_snapshot()",
            lock_it.unwrap_or_default()
        );
        let results = match (self.connection.simple(&sql), lock) {
            (Err(error), Some(table)) if error.kind == ErrorKind::Server => {
                self.end()?;
                if error.is("42501") {
                    // A lock takes more than rights on all columns. What else is missing, the statement will say that reads the table.
                    return self.begin();
                }
                return Err(self.explain_table(what, table, error));
            }
            (results, _) => results.map_err(|error| explain(what, &self.role, error))?,
        };
        results
            .last()
            .and_then(|result| result.text(0, 0)?.parse().ok())
            .ok_or_else(|| Error::answer(what))
    }

    pub(crate) fn end(&mut self) -> Result<(), Error> {
        self.connection
            .simple("ROLLBACK")
            .map(drop)
            .map_err(|error| explain("cannot end a snapshot", &self.role, error))
    }

    /// Writes a marker into the WAL. The transaction id that it takes makes the commit flush the WAL, so that the marker
    /// is on its way when this returns.
    pub(super) fn marker(&mut self, content: &str) -> Result<(), Error> {
        let sql = "SELECT pg_logical_emit_message(false, 'walmirror.marker', $1), pg_current_xact_id()";
        self.connection
            .query(sql, &[Some(content.as_bytes())])
            .map(drop)
            .map_err(|error| message_failed("cannot write a marker into the WAL", error, &self.role))
    }

    pub(crate) fn query(
        &mut self,
        what: &str,
        sql: &str,
        params: &[Option<&[u8]>],
    ) -> Result<QueryResult, Error> {
        self.connection
            .query(sql, params)
            .map_err(|error| explain(what, &self.role, error))
    }

    /// The same; the values of the rows are in binary.
    pub(crate) fn query_binary(
        &mut self,
        what: &str,
        sql: &str,
        params: &[Option<&[u8]>],
    ) -> Result<QueryResult, Error> {
        self.connection
            .query_binary(sql, params)
            .map_err(|error| explain(what, &self.role, error))
    }

    /// The oldest transaction id that is still running; all below it are over, for snapshots too.
    pub(super) fn oldest_running(&mut self) -> Result<u64, Error> {
        let statement = "SELECT pg_snapshot_xmin(pg_current_snapshot())";
        id(self.query("cannot take a snapshot", statement, &[])?)
    }

    /// What a transaction that begins now would see.
    pub(crate) fn snapshot(&mut self) -> Result<Snapshot, Error> {
        let what = "cannot take a snapshot";
        let result = self.query(what, "SELECT pg_current_snapshot()", &[])?;
        let snapshot = result.text(0, 0).and_then(|text| text.parse().ok());
        snapshot.ok_or_else(|| Error::answer(what))
    }

    /// The ids of the transactions that are not over. A snapshot does not list those above the last one that is over, and that may be the
    /// very one that is committing: so an id is taken that is above them.
    pub(crate) fn running(&mut self) -> Result<Vec<u64>, Error> {
        transaction_id(self)?;
        Ok(self.snapshot()?.in_progress().to_vec())
    }

    /// The (32-bit) ids of transactions that have changed nothing here by now, however long they last: those whose sessions wait for their
    /// clients or for a lock and those that are prepared, as they have not committed, and all of other databases.
    pub(crate) fn undecided(&mut self) -> Result<Vec<u32>, Error> {
        let statement = "SELECT backend_xid FROM pg_stat_activity WHERE backend_xid IS NOT NULL \
                         AND (state LIKE 'idle in transaction%' OR wait_event_type = 'Lock' OR datname <> current_database())";
        let idle = self.query("cannot look at the sessions", statement, &[])?;
        let mut undecided: Vec<u32> = idle.rows().filter_map(|row| row.parse(0)).collect();
        undecided.extend(self.prepared()?);
        Ok(undecided)
    }

    /// One that is prepared is still listed while its COMMIT PREPARED waits for a standby, so none of this database counts while somebody
    /// may be at that: who is, is looked for first, and whoever begins later commits behind that. Who applies a subscription says that he
    /// is idle meanwhile; then he does not wait for his publisher.
    fn prepared(&mut self) -> Result<Vec<u32>, Error> {
        let statement = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() \
                         AND (state IS NULL OR state = 'disabled' OR state = 'active' AND query ~* 'commit.*prepared' \
                         OR backend_type ~ '^logical replication' AND (state <> 'active' OR wait_event = 'SyncRep') \
                            AND coalesce(wait_event, '') !~* '^(logical|libpqwalreceiver)')";
        let result = self.query("cannot look at the sessions", statement, &[])?;
        let is_at_none = (result.text(0, 0) == Some("0")).to_string();
        let statement =
            "SELECT transaction FROM pg_prepared_xacts WHERE database <> current_database() OR $1::bool";
        let what = "cannot look at the prepared transactions";
        let result = self.query(what, statement, &[Some(is_at_none.as_bytes())])?;
        Ok(result.rows().filter_map(|row| row.parse(0)).collect())
    }

    /// Who holds this transaction id, for a log line.
    pub(crate) fn whoever_runs(&mut self, xid: u64) -> Result<String, Error> {
        let sql = "SELECT format('pid %s (%s, state %s, since %s)', pid, coalesce(application_name, ''), state, xact_start) \
                   FROM pg_stat_activity WHERE backend_xid = ($1::bigint & 4294967295)::text::xid \
                   UNION ALL SELECT format('prepared transaction %s, since %s', gid, prepared) FROM pg_prepared_xacts \
                   WHERE transaction = ($1::bigint & 4294967295)::text::xid LIMIT 1";
        let result = self.query(
            "cannot look for a transaction",
            sql,
            &[Some(xid.to_string().as_bytes())],
        )?;
        Ok(result.text(0, 0).unwrap_or("it has just ended").to_owned())
    }

    /// Who holds a mirrored table (0: any of them), or an index, a partition or the TOAST table of it, for himself, or waits to: he has all
    /// who come later wait behind him. For a log line.
    pub(super) fn whoever_locks(&mut self, relation: u32) -> String {
        let who = self.locker(relation);
        who.unwrap_or_else(|| "whoever held it has just let it go".to_owned())
    }

    /// The same; None: nobody.
    pub(super) fn locker(&mut self, relation: u32) -> Option<String> {
        let sql = "WITH RECURSIVE tree (oid) AS (SELECT m.oid FROM walmirror.mirrors m WHERE $1::oid IN (0, m.oid) \
                       UNION SELECT i.inhrelid FROM tree t JOIN pg_inherits i ON i.inhparent = t.oid), \
                   parts (oid) AS (SELECT oid FROM tree UNION ALL SELECT i.indexrelid FROM tree t JOIN pg_index i ON i.indrelid = t.oid \
                       UNION ALL SELECT c.reltoastrelid FROM tree t JOIN pg_class c ON c.oid = t.oid) \
                   SELECT coalesce(format('pid %s (%s, state %s, since %s)', a.pid, coalesce(a.application_name, ''), a.state, a.xact_start), \
                       'a prepared transaction') \
                   FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid \
                   WHERE l.locktype = 'relation' AND l.mode = 'AccessExclusiveLock' AND (l.relation IN (SELECT oid FROM parts) \
                       OR EXISTS (SELECT FROM walmirror.tables_of_type(walmirror.row_type(l.relation)) t WHERE t IN (SELECT oid FROM tree))) \
                   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) \
                   ORDER BY l.granted DESC LIMIT 1";
        let oid = relation.to_string();
        let result = self.query("cannot look for a lock", sql, &[Some(oid.as_bytes())]);
        // Nothing hangs on it; should the connection have failed, whoever uses it next finds out.
        result
            .ok()
            .and_then(|result| result.text(0, 0).map(str::to_owned))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_right_is_told_with_the_role_that_needs_it() {
        let next = |message: &str| {
            let error = PqError {
                sqlstate: Some("42501".into()),
                ..PqError::new(crate::pq::ErrorKind::Server, message)
            };
            explain("x", "\"w\"", error).next_command().map(str::to_owned)
        };
        let policy = "query would be affected by row-level security policy for table \"t\"";
        assert_eq!(next(policy).as_deref(), Some("ALTER ROLE \"w\" BYPASSRLS;"));
        assert_eq!(
            next("permission denied for table t").as_deref(),
            Some("GRANT SELECT ON <table> TO \"w\";")
        );
    }

    #[test]
    fn the_schema_stands_before_the_dot_that_is_not_quoted() {
        for (name, schema) in [
            ("public.t", "public"),
            ("\"My.Shop\".\"t.u\"", "\"My.Shop\""),
            ("\"a\"\".b\".t", "\"a\"\".b\""),
        ] {
            assert_eq!(schema_of(name), schema);
        }
    }
}
