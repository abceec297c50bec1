//! The frame of every fault test: a mirror whose two links can be broken, a load that goes on, somebody who looks all the
//! time, and what must be true in the end, whatever happened in between.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::Rng;
use rand::rngs::StdRng;

use crate::http::figure;
use crate::load::{Load, ROWS_MAX, tables};
use crate::logs::keeps_secret;
use crate::redis_server::free_port;
use crate::watch::{Looks, Watch};
use crate::{DEADLINE, Db, Lsn, Mirror, Pg, Proxy, Redis, Signal, Sink, rng, wait_for};

/// Each process of the sink stays below this, whatever waits on either side. Peaks of 16 to 53 MB were seen.
const MEMORY_MAX: u64 = 64 << 20;
/// So many files and sockets a sink has open where all is well, whatever it has been through. 20 were seen.
const OPEN_FILES_MAX: usize = 40;
/// How soon a marker that is written when all is well again must be in Redis: pauses between attempts are at most 6.25 s, who asks
/// nobody may wait 15 s for the answer, and a busy machine takes its time.
const RECOVERY: Duration = Duration::from_secs(45);

/// How soon it is overcome that everything was broken: the last pause between two attempts, and a handshake.
const SOON: Duration = Duration::from_secs(10);
/// The same where somebody waits for an answer of Redis, which he gives up after 15 s.
pub const SOON_AFTER_SILENCE: Duration = Duration::from_secs(25);
/// What a busy machine may add to either. With three of these tests on two processors a handshake of 20 ms was seen to take a
/// second, and there may be some of them, each after a pause.
const BUSY: Duration = Duration::from_secs(8);
/// How soon `/readyz` must say that Redis is not what Postgres is, also where nobody says anything: docs/operations.md.
const NOT_READY: Duration = Duration::from_secs(10);

/// What a scenario begins with.
pub struct Setup {
    /// The server; the shared one is for faults that it does not notice.
    pub pg: Arc<Pg>,
    /// Redis.
    pub redis: Redis,
    /// The role that the sink connects as.
    pub user: String,
    /// The user and password of the sink in Redis, like `mirror:secret@`.
    pub redis_login: String,
    /// Further arguments of the sink.
    pub args: Vec<String>,
    /// Variables of its environment.
    pub environment: Vec<(String, String)>,
    /// Writers, and their rest after a transaction.
    pub writers: (usize, Duration),
    /// The memory that no process of the sink may exceed.
    pub memory_max: u64,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            pg: Pg::shared(),
            redis: Redis::start(),
            user: "postgres".to_owned(),
            redis_login: String::new(),
            args: Vec::new(),
            environment: Vec::new(),
            writers: (2, Duration::from_millis(1)),
            memory_max: MEMORY_MAX,
        }
    }
}

impl Setup {
    /// A server of the scenario's own.
    pub fn alone(settings: &str) -> Setup {
        Setup {
            pg: Arc::new(Pg::start(settings)),
            ..Setup::default()
        }
    }

    /// Adds arguments of the sink.
    pub fn args(mut self, args: &[&str]) -> Setup {
        self.args.extend(args.iter().map(|&arg| arg.to_owned()));
        self
    }
}

/// A running scenario.
pub struct Scenario {
    /// The writers.
    pub load: Load,
    /// Who looks.
    pub watch: Watch,
    /// Servers and sink. Its own connections do not go over the links.
    pub m: Mirror,
    /// Between the sink and Redis.
    pub redis_link: Proxy,
    /// Between the sink and Postgres.
    pub pg_link: Proxy,
    /// The only source of chance.
    pub rng: StdRng,
    admin: u16,
    word: String,
    markers: i32,
    resyncs: bool,
    refreshes: bool,
    memory_max: u64,
    /// Rows that caches held when they were compared.
    pub cached: usize,
    /// The most files that a sink had open when all was well.
    open_files: usize,
}

impl Scenario {
    /// Everything up, mirrored and compared, and the load begun.
    pub fn start(name: &str, setup: Setup) -> Scenario {
        let mut rng = rng(name);
        let word = format!("canary{:08x}", rng.random::<u32>());
        let m = Mirror::between(Db::create(Arc::clone(&setup.pg)), setup.redis);
        m.sql(&tables(&word));
        let redis_link = Proxy::to_port(m.redis.port());
        redis_link.seed(rng.random());
        let pg_link = Proxy::to_socket(setup.pg.socket());
        pg_link.seed(rng.random());
        let conninfo = if setup.pg.has_standby() {
            // libpq asks the next host when nobody listens; the link would always listen.
            setup.pg.conninfo(&m.db.name)
        } else {
            format!(
                "host=127.0.0.1 port={} user={} dbname={}",
                pg_link.port(),
                setup.user,
                m.db.name
            )
        };
        let url = format!("redis://{}127.0.0.1:{}/0", setup.redis_login, redis_link.port());
        let admin = free_port();
        let address = format!("127.0.0.1:{admin}");
        let mut args: Vec<&str> = setup.args.iter().map(String::as_str).collect();
        args.extend(["--admin", &address]);
        m.start_at(&conninfo, &url, &args, &setup.environment);
        m.settle();
        let config = m.db.pg.config(&m.db.name);
        let watch = Watch::start(&config, &m.db.name, m.redis.port());
        let load = Load::start(&config, &mut rng, setup.writers.0, setup.writers.1);
        let scenario = Scenario {
            load,
            watch,
            m,
            redis_link,
            pg_link,
            rng,
            admin,
            word,
            markers: 0,
            resyncs: false,
            refreshes: false,
            memory_max: setup.memory_max,
            cached: 0,
            open_files: 0,
        };
        scenario.flow();
        scenario
    }

    /// Waits until changes get through: so many transactions of the load, and the position they were committed at.
    #[track_caller]
    pub fn flow(&self) {
        self.flow_within(RECOVERY);
    }

    #[track_caller]
    fn flow_within(&self, time: Duration) {
        let enough = self.load.committed() + 20;
        wait_for(DEADLINE, "the load to commit", || {
            (self.load.committed() >= enough).then_some(())
        });
        self.reach_lsn_within(self.m.db.lsn(), time);
    }

    /// All is well again from now on: changes get through as soon as they should.
    #[track_caller]
    pub fn recovers(&self) {
        self.recovers_within(SOON);
    }

    /// [`Scenario::recovers`] with another time.
    #[track_caller]
    pub fn recovers_within(&self, time: Duration) {
        let healed = Instant::now();
        self.flow_within(RECOVERY.max(time + BUSY));
        self.in_time(healed, time);
    }

    #[track_caller]
    fn in_time(&self, healed: Instant, time: Duration) {
        let took = healed.elapsed();
        assert!(
            took < time + BUSY,
            "it took {took:?} to recover, not {time:?}:\n{}",
            self.log()
        );
    }

    /// Waits until what is committed now is in Redis.
    #[track_caller]
    pub fn reach(&self) {
        let target = self.m.db.lsn();
        self.reach_lsn(target);
    }

    /// Waits until Redis is at this position. It may be away meanwhile.
    #[track_caller]
    pub fn reach_lsn(&self, target: Lsn) {
        self.reach_lsn_within(target, RECOVERY);
    }

    /// [`Scenario::reach_lsn`] with another time.
    #[track_caller]
    pub fn reach_lsn_within(&self, target: Lsn, time: Duration) {
        wait_for(time, format!("progress to reach {target}"), || {
            self.m.sink(Sink::assert_running);
            self.watch.assert_holds();
            self.progress().filter(|&lsn| lsn >= target)
        });
    }

    /// The position that Redis stands at; None also when it does not answer.
    pub fn progress(&self) -> Option<Lsn> {
        self.progress_in(&self.m.redis)
    }

    /// The same of a Redis that is not the sink's now.
    pub fn progress_in(&self, redis: &Redis) -> Option<Lsn> {
        let mut redis = redis
            .client()
            .get_connection_with_timeout(Duration::from_secs(1))
            .ok()?;
        redis.set_read_timeout(Some(Duration::from_secs(1))).ok()?;
        let key = format!("walmirror:{{{}}}:progress", self.m.db.name);
        let lsn: Option<String> = redis::cmd("HGET").arg(key).arg("lsn").query(&mut redis).ok()?;
        lsn?.parse().ok()
    }

    /// Waits until `/readyz` says that Redis is what Postgres says, or that it is not.
    #[track_caller]
    pub fn is_ready(&self, ready: bool) {
        let (status, deadline) = if ready {
            ("200", DEADLINE)
        } else {
            ("503", NOT_READY)
        };
        wait_for(deadline, format!("/readyz to say {status}"), || {
            self.m.sink(Sink::assert_running);
            (self.get("/readyz")?.split(' ').nth(1)? == status).then_some(())
        });
    }

    /// For ten seconds from now on whatever fails is tried again, and not more often than its pauses say: 100 ms, and each twice as long.
    /// Nor does the sink spend its time otherwise. `link` is the one that attempts come through.
    #[track_caller]
    pub fn tries_seldom(&self, link: &Proxy) {
        let (seen, accepted, since) = (self.log().len(), link.accepted(), Instant::now());
        let spent = self.m.sink(|sink| sink.processor_time());
        wait_for(DEADLINE, "ten seconds of refusing", || {
            self.m.sink(Sink::assert_running);
            (since.elapsed() > Duration::from_secs(10)).then_some(())
        });
        let attempts = self.log()[seen..].matches("next_attempt_in").count();
        let accepted = link.accepted() - accepted;
        let spent = self.m.sink(|sink| sink.processor_time()) - spent;
        println!("{attempts} attempts, {accepted} connections, {spent:?} of processor time in ten seconds");
        // Seven of the shortest pauses are 8.5 s. libpq tries once with TLS and once without, and the admin server looks for itself.
        assert!(
            (1..=9).contains(&attempts),
            "{attempts} attempts:\n{}",
            self.log()
        );
        assert!(accepted <= 30, "{accepted} connections");
        assert!(spent < Duration::from_secs(2), "{spent:?} of processor time");
    }

    /// What the sink's admin server answers, head and all; None where it does not.
    pub fn get(&self, path: &str) -> Option<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.admin)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).ok()?;
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        Some(answer).filter(|answer| !answer.is_empty())
    }

    /// The figure of this name in `/metrics`.
    #[track_caller]
    pub fn figure(&self, name: &str) -> f64 {
        let address = format!("127.0.0.1:{}", self.admin);
        wait_for(DEADLINE, format!("the figure {name}"), || figure(&address, name))
    }

    /// How many rows the sink's process was sent again, and skipped because Redis had them: each time that it begins to stream, at most those
    /// of the last transaction that was applied, however much is not confirmed.
    #[track_caller]
    pub fn repeats(&self) -> usize {
        let skipped = self.figure("walmirror_rows_skipped_total{reason=\"already_applied\"}") as usize;
        let log = self.log();
        let process = log.rsplit("walmirror starts").next().unwrap_or_default();
        let sessions = process.matches(" streaming slot=").count();
        assert!(sessions > 0, "{log}");
        assert!(
            skipped <= sessions * ROWS_MAX,
            "{skipped} rows were skipped in {sessions} sessions"
        );
        skipped
    }

    /// Waits for a line of the sink's log that is new since `seen` bytes of it.
    #[track_caller]
    pub fn said(&self, what: &str, seen: usize) {
        wait_for(DEADLINE, format!("the sink to say {what:?}"), || {
            self.m.sink(Sink::assert_running);
            self.log().get(seen..)?.contains(what).then_some(())
        });
    }

    /// Waits for an ERROR line that is new since `seen` bytes of the log, has this in it, and names the next command.
    #[track_caller]
    pub fn said_what_to_do(&self, what: &str, seen: usize) {
        wait_for(
            DEADLINE,
            format!("an ERROR with {what:?} and the next command"),
            || {
                self.m.sink(Sink::assert_running);
                let log = self.log();
                let mut lines = log.get(seen..)?.lines();
                lines
                    .any(|line| {
                        let signs = [" ERROR ", what, " next="];
                        signs.iter().all(|sign| line.contains(sign)) && !line.contains(" next=\"\"")
                    })
                    .then_some(())
            },
        );
    }

    /// What the sink has logged.
    pub fn log(&self) -> String {
        self.m.sink(|sink| sink.output())
    }

    /// From the sink's next session on, either side of the stream is given up after this long a silence.
    pub fn silence(&self, time: &str) {
        self.m.sql(&format!(
            "ALTER DATABASE {} SET wal_sender_timeout = '{time}'",
            self.m.db.name
        ));
        self.kill_sink();
        self.flow();
    }

    /// The process that serves the stream.
    pub fn walsender(&self) -> i32 {
        wait_for(DEADLINE, "a walsender", || {
            let query = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = current_database()";
            self.m.db.value(query).parse().ok()
        })
    }

    /// SIGKILL, and a new start.
    pub fn kill_sink(&self) {
        self.m.sink(|sink| {
            sink.assert_running();
            sink.kill();
        });
        self.restart_sink();
    }

    /// Starts a sink that has ended, and waits until it listens to signals.
    pub fn restart_sink(&self) {
        let seen = self.log().len();
        self.m.sink(Sink::restart);
        self.said("walmirror starts", seen);
    }

    /// Ends Redis the way that a power failure does: what was appended since its file had this length is not there.
    #[track_caller]
    pub fn lose_the_tail(&mut self, length: u64) {
        self.watch.may_lose(true);
        self.m.redis.stop(Signal::KILL);
        let file = File::options()
            .write(true)
            .open(self.m.redis.append_only_file())
            .unwrap();
        assert!(file.metadata().unwrap().len() > length, "nothing was appended");
        file.set_len(length).unwrap();
        self.m.redis.resume();
    }

    /// From here on Redis may have lost data, and tables may be backfilled anew: only the end counts.
    pub fn resyncs(&mut self) {
        self.resyncs = true;
        self.watch.may_lose(true);
    }

    /// A table is read anew, as after DDL, and the LSN does not speak of that: who compares next gives it time.
    pub fn refreshes(&mut self) {
        self.refreshes = true;
    }

    /// The load has rested, all is well again, and Redis equals Postgres. Says how long that took.
    #[track_caller]
    pub fn converge(&mut self) -> Duration {
        let healed = Instant::now();
        // A commit that came between the last look at the server and the comparison would be a difference.
        self.load.rest();
        self.markers += 1;
        let marker = self.markers;
        self.m
            .sql(&format!("INSERT INTO marker SELECT {marker}, word FROM secret"));
        self.reach();
        let took = healed.elapsed();
        if self.resyncs {
            self.cached += self.m.settle().cached;
            self.watch.may_lose(false);
            self.resyncs = false;
        } else {
            if !self.refreshes {
                self.is_ready(true);
            }
            self.in_time(healed, SOON);
            let report = if self.refreshes {
                self.m.settle()
            } else {
                self.m.check()
            };
            self.cached += report.cached;
        }
        self.refreshes = false;
        self.is_ready(true);
        let open_files = self.m.sink(|sink| sink.open_files());
        assert!(
            open_files < OPEN_FILES_MAX,
            "the sink has {open_files} files open"
        );
        self.open_files = self.open_files.max(open_files);
        let key = format!("marker:{marker}");
        assert_eq!(self.m.redis.hash(&key).len(), 2, "{key}");
        self.watch.assert_looks();
        self.load.resume();
        took
    }

    /// The end of every scenario. `allowed`: a warning or an error in the log must have one of these in it. Returns what was looked at.
    #[track_caller]
    pub fn finish(mut self, allowed: &[&str]) -> Looks {
        let took = self.converge();
        let committed = self.load.committed();
        self.load.stop();
        self.m.settle();
        let looks = self.watch.stop();
        let memory = self.m.sink(|sink| sink.memory_max());
        println!(
            "recovered in {took:?}; {committed} transactions, {} rows of caches compared, {looks:?}, {} connections to Redis, {} to Postgres, \
             {} MB and {} files at most",
            self.cached,
            self.redis_link.accepted(),
            self.pg_link.accepted(),
            memory >> 20,
            self.open_files
        );
        assert!(
            memory > 0 && memory < self.memory_max,
            "the sink took {memory} bytes"
        );
        let metrics = wait_for(DEADLINE, "the metrics", || {
            self.get("/metrics").filter(|text| text.contains("\nwalmirror_"))
        });
        self.keeps_secret("the metrics", &metrics);
        let status = self.m.sink(|sink| {
            sink.signal(Signal::TERM);
            sink.wait(Duration::from_secs(20))
        });
        assert_eq!(status.code(), Some(0), "{}", self.log());
        self.check_logs(allowed);
        looks
    }

    /// [`Mirror::check_logs`].
    #[track_caller]
    pub fn check_logs(&self, allowed: &[&str]) {
        self.m.check_logs(allowed, &self.word);
    }

    /// INVARIANT I8, on all sides: no value of a row is in what somebody printed.
    #[track_caller]
    pub fn keeps_secret(&self, whose: &str, text: &str) {
        keeps_secret(whose, text, &self.word);
    }
}
