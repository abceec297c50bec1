//! One database of a server, with the extension in it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use postgres::error::DbError;
use postgres::{Client, SimpleQueryMessage};

use crate::{DEADLINE, Lsn, Pg, wait_for};

/// A database and a connection to it.
pub struct Db {
    client: Mutex<Client>,
    /// The name, also used for the slot.
    pub name: String,
    /// The server.
    pub pg: Arc<Pg>,
}

/// A result row as text.
pub type Row = Vec<Option<String>>;

impl Db {
    /// Makes a database with the extension.
    pub fn create(pg: Arc<Pg>) -> Db {
        Db::create_with(pg, "")
    }

    /// Makes a database with options of CREATE DATABASE, for example an encoding.
    pub fn create_with(pg: Arc<Pg>, options: &str) -> Db {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        let name = format!("db{}", COUNT.fetch_add(1, Ordering::Relaxed));
        Db::named(pg, name, options)
    }

    /// Makes an empty database of the same name on another server.
    pub fn namesake(&self, pg: Arc<Pg>) -> Db {
        Db::named(pg, self.name.clone(), "")
    }

    fn named(pg: Arc<Pg>, name: String, options: &str) -> Db {
        pg.connect("postgres")
            .batch_execute(&format!("CREATE DATABASE {name} TEMPLATE template0 {options}"))
            .unwrap_or_else(|e| panic!("create database: {e:?}"));
        let client = Mutex::new(pg.connect(&name));
        let db = Db { client, name, pg };
        db.sql("CREATE EXTENSION walmirror");
        db
    }

    /// A further connection.
    pub fn connect(&self) -> Client {
        self.pg.connect(&self.name)
    }

    /// Connects again, after the server was restarted.
    pub fn reconnect(&self) {
        *self.client.lock().unwrap_or_else(|e| e.into_inner()) = self.connect();
    }

    /// Runs statements as one implicit transaction, unless they contain BEGIN and COMMIT.
    #[track_caller]
    pub fn sql(&self, statements: &str) {
        if let Err(error) = self.client().batch_execute(statements) {
            panic!("{statements}\n{}", explain(&error));
        }
    }

    /// Runs statements that must fail, and returns the error.
    #[track_caller]
    pub fn error(&self, statements: &str) -> DbError {
        let mut client = self.client();
        let result = client.batch_execute(statements);
        match result {
            Ok(()) => panic!("succeeded: {statements}"),
            Err(error) => {
                let _ = client.batch_execute("ROLLBACK");
                error
                    .as_db_error()
                    .unwrap_or_else(|| panic!("{statements}: {error}"))
                    .clone()
            }
        }
    }

    /// The rows of a query.
    #[track_caller]
    pub fn rows(&self, query: &str) -> Vec<Row> {
        rows(&mut self.client(), query)
    }

    /// The first value of a query.
    #[track_caller]
    pub fn value(&self, query: &str) -> String {
        let rows = self.rows(query);
        rows.first()
            .and_then(|row| row.first().cloned().flatten())
            .unwrap_or_default()
    }

    /// Waits until commits wait for a synchronous standby that there is not. That the configuration was read is for the checkpointer to say,
    /// with which nobody can talk: so a commit is tried.
    #[track_caller]
    pub fn commits_wait(&self) {
        wait_for(DEADLINE, "commits to wait for a standby", || {
            let mut session = self.connect();
            let pid: i32 = session.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
            let commit = "SET synchronous_commit = on; SELECT pg_logical_emit_message(true, 'commit', '')";
            let committing = std::thread::spawn(move || session.batch_execute(commit));
            let waits = wait_for(DEADLINE, "a commit to wait, or to end", || {
                let at = format!("SELECT wait_event FROM pg_stat_activity WHERE pid = {pid}");
                let waits = self.value(&at) == "SyncRep";
                (waits || committing.is_finished()).then_some(waits)
            });
            // One that waits is committed here, and has a warning.
            self.value(&format!("SELECT pg_cancel_backend({pid})"));
            committing.join().unwrap().unwrap();
            waits.then_some(())
        });
    }

    /// Where the WAL ends that is on disk: everything this session committed is before it.
    pub fn lsn(&self) -> Lsn {
        self.value("SELECT pg_current_wal_flush_lsn()").parse().unwrap()
    }

    /// What the slot that bears the database's name is confirmed up to.
    pub fn confirmed(&self) -> Lsn {
        let slot =
            "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = current_database()";
        self.value(slot).parse().unwrap()
    }

    fn client(&self) -> std::sync::MutexGuard<'_, Client> {
        self.client.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Runs a statement that has to be refused, with a hint; tells what is wrong otherwise.
    pub fn refuses(client: &mut Client, statement: &str) -> Option<String> {
        let Err(error) = client.batch_execute(statement) else {
            return Some(format!("accepted: {statement}"));
        };
        let error = error.as_db_error().unwrap();
        let (message, hint) = (error.message(), error.hint());
        println!("{statement}\n  {message}\n  hint: {}", hint.unwrap_or("none"));
        hint.is_none().then(|| format!("no hint: {statement}: {message}"))
    }
}

/// The rows of a query as text.
#[track_caller]
pub(crate) fn rows(client: &mut Client, query: &str) -> Vec<Row> {
    let messages = client
        .simple_query(query)
        .unwrap_or_else(|e| panic!("{query}\n{}", explain(&e)));
    let mut rows = Vec::new();
    for message in messages {
        if let SimpleQueryMessage::Row(row) = message {
            rows.push((0..row.len()).map(|i| row.get(i).map(str::to_owned)).collect());
        }
    }
    rows
}

fn explain(error: &postgres::Error) -> String {
    match error.as_db_error() {
        Some(db) => format!(
            "{}: {} {}\n{}\n{}",
            db.severity(),
            db.code().code(),
            db.message(),
            db.detail().unwrap_or_default(),
            db.hint().unwrap_or_default()
        ),
        None => format!("{error:?}"),
    }
}
