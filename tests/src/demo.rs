//! `make demo` and `make dev`: a private Postgres, a private Redis, the mirror between them, and something to look at.
//!
//! Without arguments it shows the mirror at work, compares every row and ends; exit code 0 means that all are equal.
//! With `--stay` it leaves everything up until Ctrl-C and prints the commands to connect.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::{Duration, Instant};

use redis::Connection;
use walmirror_tests::{DEADLINE, Lsn, Mirror, Pg, Raise, Sink, wait_for};

const TABLES: &str = "
CREATE TABLE users (id int PRIMARY KEY, name text NOT NULL, email text, credit numeric(10,2) DEFAULT 0, seen timestamptz);
CREATE TABLE orders (id int PRIMARY KEY, user_id int REFERENCES users, total numeric(10,2), doc jsonb);
CREATE TABLE sessions (token uuid PRIMARY KEY, user_id int, data text);
INSERT INTO users SELECT i, 'user ' || i, 'u' || i || '@example.org', i % 90, '2026-01-01 00:00+00'::timestamptz + i * interval '1 min'
  FROM generate_series(1, 5000) i;
INSERT INTO orders SELECT i, i % 5000 + 1, i * 0.99, jsonb_build_object('items', i % 7, 'note', repeat(md5(i::text), 100))
  FROM generate_series(1, 2000) i;
INSERT INTO sessions SELECT md5(i::text)::uuid, i, 'session of user ' || i FROM generate_series(1, 2000) i;
";

const MIRRORS: [&str; 3] = [
    "SELECT walmirror.mirror('users');",
    "SELECT walmirror.mirror('orders', key => 'order:{id}', value => 'json');",
    "SELECT walmirror.mirror('sessions', key => 'session:{token}', value => 'string', columns => '{data}', ttl => '1 day');",
];

fn main() -> ExitCode {
    let stay = std::env::args().any(|arg| arg == "--stay");
    end_on_signal(if stay { 0 } else { 130 });
    let demo = Demo::set_up();
    if stay {
        demo.stay();
    }
    demo.backfill();
    demo.statements();
    demo.load();
    demo.compare()
}

/// On Ctrl-C the servers end with this process; their directories go here.
fn end_on_signal(exit_code: i32) {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM]).expect("signal handlers");
    std::thread::spawn(move || {
        signals.forever().next();
        println!("\nstopping");
        walmirror_tests::remove_dirs();
        std::process::exit(exit_code);
    });
}

struct Demo {
    mirror: Mirror,
    start: Instant,
}

impl Demo {
    fn set_up() -> Demo {
        let start = Instant::now();
        // What psql would show with the usual settings; the tests' defaults are unusual on purpose.
        let pg = Arc::new(Pg::start(
            "TimeZone = 'UTC'\nDateStyle = 'ISO'\nextra_float_digits = 1",
        ));
        heading(&format!(
            "A private Postgres {} and a private Redis",
            version(&pg)
        ));
        let mirror = Mirror::on(pg);
        mirror.sql(TABLES);
        pgbench(&mirror, &["-i", "-s", "1", "-q"]);
        // The history has no key of its own.
        mirror.sql("ALTER TABLE pgbench_history ADD id bigserial PRIMARY KEY");
        println!("  sample database: users, orders, sessions, and the four tables of pgbench");
        heading("What to mirror is said in SQL, on the table");
        for sql in MIRRORS {
            println!("  {sql}");
            mirror.sql(sql);
        }
        for table in ["accounts", "branches", "tellers", "history"] {
            mirror.sql(&format!("SELECT walmirror.mirror('pgbench_{table}')"));
        }
        println!("  … and pgbench_accounts, _branches, _tellers, _history");
        mirror.start();
        Demo { mirror, start }
    }

    /// The rows that were there before.
    fn backfill(&self) {
        heading("walmirror run --postgres … --redis …   (the rows that are there already)");
        let start = Instant::now();
        let report = self.mirror.settle_within(Duration::from_secs(120));
        println!(
            "  {} rows are in Redis after {:.1} s",
            report.rows,
            start.elapsed().as_secs_f64()
        );
    }

    /// A few statements, and both sides after each.
    fn statements(&self) {
        heading("Every commit, as it happens");
        let users = |id: i32| {
            (
                format!("SELECT * FROM users WHERE id = {id}"),
                format!("HGETALL users:{id}"),
            )
        };
        let order = |id: i32| {
            let query = format!(
                "SELECT id, total, left(doc->>'note', 12) || '…' AS note FROM orders WHERE id = {id}"
            );
            (query, format!("GET order:{id}"))
        };
        self.show(
            "INSERT INTO users VALUES (9001, 'Ada', 'ada@example.org', 12.50, now())",
            users(9001),
        );
        self.show(
            "UPDATE users SET credit = credit + 100 WHERE name = 'Ada'",
            users(9001),
        );
        self.show(
            "UPDATE users SET id = 9002 WHERE id = 9001   -- the key changes",
            users(9002),
        );
        println!(
            "      {}",
            dim(&format!(
                "and users:9001 is {}",
                self.redis_says("EXISTS users:9001")
            ))
        );
        self.show(
            "UPDATE orders SET total = 1.00 WHERE id = 7   -- its large doc stays, unread",
            order(7),
        );
        self.show("DELETE FROM users WHERE id = 9002", users(9002));
        let count = ("SELECT count(*) FROM sessions".to_owned(), "DBSIZE".to_owned());
        self.show("TRUNCATE sessions", count);
    }

    fn show(&self, statement: &str, (query, command): (String, String)) {
        println!("\n  {}", bold(statement));
        let start = Instant::now();
        self.mirror.sql(statement);
        let committed = self.mirror.db.lsn();
        let mut redis = self.mirror.redis.connect();
        self.wait(&mut redis, committed);
        let lag = start.elapsed();
        let rows = self.mirror.db.rows(&query);
        let row = match rows.first() {
            Some(row) => row
                .iter()
                .map(|v| v.as_deref().unwrap_or("NULL"))
                .collect::<Vec<_>>()
                .join(" | "),
            None => "no row".to_owned(),
        };
        println!("      Postgres  {}", dim(&query));
        println!("                {}", cut(&row));
        println!(
            "      Redis     {}",
            dim(&format!("{command}   {lag:.1?} after the statement began"))
        );
        println!("                {}", cut(&self.redis_says(&command)));
    }

    fn redis_says(&self, command: &str) -> String {
        let mut words = command.split(' ');
        let mut cmd = redis::cmd(words.next().unwrap());
        cmd.arg(words.collect::<Vec<_>>());
        if command.starts_with("HGETALL") {
            let fields: Vec<(String, String)> = cmd.query(&mut self.mirror.redis.connect()).unwrap();
            let fields: Vec<String> = fields
                .iter()
                .map(|(name, value)| format!("{name}={value}"))
                .collect();
            return if fields.is_empty() {
                "no key".to_owned()
            } else {
                fields.join(" | ")
            };
        }
        match cmd.query::<redis::Value>(&mut self.mirror.redis.connect()) {
            Ok(redis::Value::Nil) => "no key".to_owned(),
            Ok(redis::Value::Int(n)) if command.starts_with("DBSIZE") => format!("{n} keys in all"),
            Ok(redis::Value::Int(0)) => "gone".to_owned(),
            Ok(redis::Value::BulkString(bytes)) => String::from_utf8_lossy(&bytes).into_owned(),
            other => format!("{other:?}"),
        }
    }

    fn wait(&self, redis: &mut Connection, target: Lsn) {
        let key = format!("walmirror:{{{}}}:progress", self.mirror.db.name);
        wait_for(DEADLINE, "the sink", || {
            self.mirror.sink(Sink::assert_running);
            let lsn: Option<String> = redis::cmd("HGET").arg(&key).arg("lsn").query(redis).unwrap();
            lsn.filter(|lsn| lsn.parse::<Lsn>().unwrap() >= target)
        });
    }

    /// pgbench, and how far Redis is behind while it runs.
    fn load(&self) {
        heading("Under load: pgbench -c 4 -T 5");
        let done = std::sync::atomic::AtomicBool::new(false);
        let (tps, mut lags) = std::thread::scope(|scope| {
            let sampler = scope.spawn(|| {
                let mut redis = self.mirror.redis.connect();
                let mut client = self.mirror.db.connect();
                let mut lags = Vec::new();
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    let row = client
                        .query_one("SELECT pg_current_wal_flush_lsn()::text", &[])
                        .unwrap();
                    let target: Lsn = row.get::<_, &str>(0).parse().unwrap();
                    let start = Instant::now();
                    self.wait(&mut redis, target);
                    // The last one may wait for the next keepalive: nobody writes any more.
                    if !done.load(std::sync::atomic::Ordering::Relaxed) {
                        lags.push(start.elapsed());
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
                lags
            });
            let end = Raise(&done);
            let output = pgbench(&self.mirror, &["-c", "4", "-j", "2", "-T", "5", "-n"]);
            drop(end);
            let tps = output
                .lines()
                .find_map(|line| line.strip_prefix("tps = "))
                .unwrap_or("?")
                .to_owned();
            (
                tps.split('.').next().unwrap_or("?").to_owned(),
                sampler.join().unwrap(),
            )
        });
        lags.sort();
        let at = |percent: usize| lags.get(lags.len() * percent / 100).copied().unwrap_or_default();
        println!(
            "  {tps} transactions/s; Redis had a committed LSN after {:.1?} (median), {:.1?} (99 %)",
            at(50),
            at(99)
        );
    }

    fn compare(&self) -> ExitCode {
        heading("Every row compared, every key accounted for");
        self.mirror.sync();
        let report = self.mirror.compare();
        for (table, rows) in &report.tables {
            println!("  {table:<28} {rows:>8} rows");
        }
        let seconds = self.start.elapsed().as_secs_f64();
        if report.equal() {
            println!(
                "\n  {} {} rows equal, no key too many. {seconds:.0} s in all.",
                bold("OK"),
                report.rows
            );
            ExitCode::SUCCESS
        } else {
            println!("\n  {} {report}", bold("DIFFERENT"));
            ExitCode::FAILURE
        }
    }

    fn stay(&self) -> ! {
        let report = self.mirror.settle_within(Duration::from_secs(120));
        let (pg, db) = (&self.mirror.db.pg, &self.mirror.db.name);
        let bin = pg.bin().display();
        heading(&format!(
            "{} rows are in Redis. Everything stays up until Ctrl-C",
            report.rows
        ));
        println!("  psql '{}'", pg.conninfo(db));
        println!("  redis-cli -p {}", self.mirror.redis.port());
        println!("\n  the stream, for people (creates a slot of its own, and drops it):");
        println!(
            "  {bin}/pg_recvlogical -d '{}' --slot look --create-slot --start -P walmirror -o format=json -f -",
            pg.conninfo(db)
        );
        println!(
            "  {bin}/pg_recvlogical -d '{}' --slot look --drop-slot",
            pg.conninfo(db)
        );
        println!("\n  a load:");
        println!("  {bin}/pgbench -n -c 4 -T 10 '{}'", pg.conninfo(db));
        loop {
            std::thread::park();
        }
    }
}

fn pgbench(mirror: &Mirror, args: &[&str]) -> String {
    let mut command: Command = mirror.db.pg.program("pgbench", &mirror.db.name);
    let output = command.args(args).output().expect("run pgbench");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn version(pg: &Pg) -> String {
    let row = pg
        .connect("postgres")
        .query_one("SELECT current_setting('server_version')", &[])
        .unwrap();
    row.get::<_, &str>(0).split(' ').next().unwrap().to_owned()
}

fn heading(text: &str) {
    println!("\n{}", bold(text));
}

fn bold(text: &str) -> String {
    style("1", text)
}

fn dim(text: &str) -> String {
    style("2", text)
}

/// Escape sequences only where somebody sees them.
fn style(code: &str, text: &str) -> String {
    use std::io::IsTerminal;
    if std::io::stdout().is_terminal() {
        format!("\x1b[{code}m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

fn cut(text: &str) -> String {
    let short: String = text.chars().take(96).collect();
    if short.len() < text.len() {
        format!("{short}…")
    } else {
        short
    }
}
