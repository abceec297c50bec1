//! A database, a Redis, and the sink between them: what most tests want.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::compare::{Report, compare};
use crate::logs::{keeps_secret, unexpected};
use crate::{DEADLINE, Db, Lsn, Pg, Redis, Sink, wait_for};

/// The whole way of a row. Fields are dropped in this order: the sink goes first.
pub struct Mirror {
    sink: Mutex<Option<Sink>>,
    /// The Redis.
    pub redis: Redis,
    /// The database.
    pub db: Db,
}

impl Mirror {
    /// A new database of the shared server, an empty Redis, no sink yet.
    pub fn new() -> Mirror {
        Mirror::on(Pg::shared())
    }

    /// The same on a server of the test's own, for settings or a load that others should not meet.
    pub fn alone(settings: &str) -> Mirror {
        Mirror::on(Arc::new(Pg::start(settings)))
    }

    /// The same on a given server.
    pub fn on(pg: Arc<Pg>) -> Mirror {
        Mirror::of(Db::create(pg))
    }

    /// The same for a given database.
    pub fn of(db: Db) -> Mirror {
        Mirror::between(db, Redis::start())
    }

    /// The same for a given database and a given Redis.
    pub fn between(db: Db, redis: Redis) -> Mirror {
        Mirror {
            sink: Mutex::new(None),
            redis,
            db,
        }
    }

    /// A mirror with these statements executed and the sink started after them.
    #[track_caller]
    pub fn with(setup: &str) -> Mirror {
        let mirror = Mirror::new();
        mirror.sql(setup);
        mirror.start();
        mirror.settle();
        mirror
    }

    /// Starts the sink.
    pub fn start(&self) {
        self.start_with(&[]);
    }

    /// Starts the sink with further arguments.
    pub fn start_with(&self, args: &[&str]) {
        self.start_at(&self.db.pg.conninfo(&self.db.name), &self.redis.url(), args, &[]);
    }

    /// Starts the sink with other ways to its servers, and with variables of its environment.
    pub fn start_at(&self, conninfo: &str, url: &str, args: &[&str], environment: &[(String, String)]) {
        let args = [&["run"][..], args].concat();
        let args = arguments(&args, conninfo, url, &self.db.name);
        *self.slot() = Some(Sink::start_in(&args, environment));
    }

    /// What to type for a command of `walmirror` that is about this mirror: these arguments, its servers and its slot.
    pub fn arguments(&self, args: &[&str]) -> Vec<String> {
        let conninfo = self.db.pg.conninfo(&self.db.name);
        arguments(args, &conninfo, &self.redis.url(), &self.db.name)
    }

    /// Runs such a command to its end: its exit code and what it printed.
    pub fn run(&self, args: &[&str]) -> (Option<i32>, String) {
        Sink::run(&self.arguments(args), DEADLINE)
    }

    /// How another role connects to the database.
    pub fn conninfo_as(&self, role: &str) -> String {
        format!("{} user={role}", self.db.pg.conninfo(&self.db.name))
    }

    /// [`Mirror::run`] as another role of Postgres.
    pub fn run_as(&self, role: &str, args: &[&str]) -> (Option<i32>, String) {
        let args = arguments(args, &self.conninfo_as(role), &self.redis.url(), &self.db.name);
        Sink::run(&args, DEADLINE)
    }

    /// A second sink for the same slot.
    pub fn second_sink(&self) -> Sink {
        Sink::start(&self.arguments(&["run"]))
    }

    /// The running sink.
    pub fn sink<T>(&self, f: impl FnOnce(&mut Sink) -> T) -> T {
        f(self.slot().as_mut().expect("the sink was started"))
    }

    fn slot(&self) -> MutexGuard<'_, Option<Sink>> {
        self.sink.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// [`Db::sql`].
    #[track_caller]
    pub fn sql(&self, statements: &str) {
        self.db.sql(statements);
    }

    /// The position that Redis stands at, if it has one.
    pub fn progress(&self) -> Option<Lsn> {
        let key = format!("walmirror:{{{}}}:progress", self.db.name);
        let lsn: Option<String> = redis::cmd("HGET")
            .arg(key)
            .arg("lsn")
            .query(&mut self.redis.connect())
            .unwrap_or(None);
        lsn.map(|lsn| lsn.parse().unwrap())
    }

    /// Waits until everything that is committed now has been applied.
    #[track_caller]
    pub fn sync(&self) {
        self.sync_within(DEADLINE);
    }

    /// [`Mirror::sync`] for a load that takes longer.
    #[track_caller]
    pub fn sync_within(&self, deadline: Duration) {
        let target = self.db.lsn();
        wait_for(deadline, format!("progress to reach {target}"), || {
            self.sink(Sink::assert_running);
            self.progress().filter(|&lsn| lsn >= target)
        });
    }

    /// Waits for the end of the backfill of each table, as `walmirror status` tells it, which notes what it finds as well.
    #[track_caller]
    pub fn filled(&self) {
        let tables: usize = self
            .db
            .value("SELECT count(*) FROM walmirror.mirrors")
            .parse()
            .unwrap();
        wait_for(DEADLINE, "the backfill to end", || {
            let (_, status) = self.run(&["status"]);
            (status.matches("   complete").count() == tables).then_some(())
        });
    }

    /// Waits until the sink has said of so many tables that their keys are complete.
    #[track_caller]
    pub fn complete(&self, tables: usize) {
        wait_for(DEADLINE, "the keys of the tables to be complete", || {
            self.sink(Sink::assert_running);
            let log = self.sink(|sink| sink.output());
            (log.matches("the keys of the table are complete").count() >= tables).then_some(())
        });
    }

    /// `walmirror verify` finds nothing.
    #[track_caller]
    pub fn verified(&self) {
        let (code, output) = self.run(&["verify"]);
        assert_eq!(code, Some(0), "{output}");
    }

    /// How many rows that cannot be mirrored are noted in Redis.
    #[track_caller]
    pub fn notes(&self) -> u64 {
        let count = format!("XLEN walmirror:{{{}}}:rejected", self.db.name);
        self.redis.command(&count)
    }

    /// Waits until the sink knows of all its tables who was writing to them when they were announced.
    #[track_caller]
    pub fn know_announced(&self) {
        wait_for(DEADLINE, "the horizons of the tables", || self.horizons());
    }

    /// Waits until those have ended, too: what is captured before that is left out, and a write removes a cached key. Whoever writes on the
    /// server counts, also in other tests.
    #[track_caller]
    pub fn outlast_announced(&self) {
        wait_for(DEADLINE, "who was writing when tables were announced", || {
            let horizons = self.horizons()?;
            let oldest = self.db.value("SELECT pg_snapshot_xmin(pg_current_snapshot())");
            let oldest: u64 = oldest.parse().unwrap();
            horizons.iter().all(|horizon| *horizon <= oldest).then_some(())
        });
    }

    /// The horizon of each table, once all are known.
    fn horizons(&self) -> Option<Vec<u64>> {
        let labelled = self.db.value("SELECT count(*) FROM walmirror.mirrors");
        let progress = self
            .redis
            .hash(&format!("walmirror:{{{}}}:progress", self.db.name));
        let cursors = progress
            .iter()
            .filter(|(field, _)| field.starts_with("backfill:"));
        let horizons: Option<Vec<u64>> = cursors
            .map(|(_, cursor)| {
                let cursor: serde_json::Value = serde_json::from_str(cursor).unwrap();
                cursor["horizon"].as_u64()
            })
            .collect();
        horizons.filter(|horizons| horizons.len().to_string() == labelled)
    }

    /// Waits until everything committed was applied; from then on Redis must equal Postgres.
    #[track_caller]
    pub fn check(&self) -> Report {
        self.sync();
        let report = self.compare();
        assert!(report.equal(), "{report}");
        report
    }

    /// Like [`Mirror::check`], but gives backfills and refreshes, which the LSN does not speak of, time to end.
    #[track_caller]
    pub fn settle(&self) -> Report {
        self.settle_within(DEADLINE)
    }

    /// [`Mirror::settle`] for a backfill that takes longer.
    #[track_caller]
    pub fn settle_within(&self, deadline: Duration) -> Report {
        self.sync_within(deadline);
        let start = Instant::now();
        loop {
            self.sink(Sink::assert_running);
            let report = self.compare();
            if report.equal() {
                return report;
            }
            assert!(
                start.elapsed() < deadline,
                "still different after {deadline:?}: {report}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Nothing unexpected is in the sink's log, and no value of a row, which has `word` in it, in any. `allowed`: a warning or an error must
    /// have one of these in it.
    #[track_caller]
    pub fn check_logs(&self, allowed: &[&str], word: &str) {
        let log = self.sink(|sink| sink.output());
        // Whoever is started again, or begins a new session, comes before the walsender of the one before has noticed that it is gone. And
        // what the loads of all tests on a server write while one of them is held up can be a gigabyte (faults_figures has the warning).
        let always = [
            "replication slot * is active for PID",
            "the slot keeps * MiB of WAL, and nothing limits it",
        ];
        let unexpected = unexpected(&log, &[allowed, &always].concat());
        assert!(
            unexpected.is_empty(),
            "not expected in the log:\n{}",
            unexpected.join("\n")
        );
        self.db.pg.assert_unharmed();
        keeps_secret("the sink's log", &log, word);
        keeps_secret("Postgres' log", &self.db.pg.log(), word);
        keeps_secret("Redis' log", &self.redis.log(), word);
    }

    /// Compares without waiting for anything.
    pub fn compare(&self) -> Report {
        compare(&mut self.db.connect(), &mut self.redis.connect())
    }
}

fn arguments(args: &[&str], conninfo: &str, url: &str, slot: &str) -> Vec<String> {
    let servers = ["--postgres", conninfo, "--redis", url, "--slot", slot];
    args.iter().chain(&servers).map(|&arg| arg.to_owned()).collect()
}

impl Default for Mirror {
    fn default() -> Self {
        Mirror::new()
    }
}
