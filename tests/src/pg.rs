//! A private Postgres server.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use postgres::config::TargetSessionAttrs;
use postgres::{Client, NoTls};
use rustix::process::{Pid, kill_process};

use crate::{DEADLINE, Dir, Process, Signal, wait_for};

/// What every server gets. The output settings are chosen to be wrong for the value contract: nothing in Redis may
/// depend on them. Losing data in a crash of the machine does not matter here, so fsync is off. So little memory for decoding
/// makes a few hundred rows a large transaction, which comes while it is in progress or is spilled.
const SETTINGS: &str = "
listen_addresses = ''
port = 5432
fsync = off
full_page_writes = off
wal_level = logical
logical_decoding_work_mem = 64kB
max_wal_senders = 50
max_replication_slots = 100
max_prepared_transactions = 10
max_connections = 120
max_wal_size = 4GB
shared_buffers = 128MB
shared_preload_libraries = 'walmirror'
log_line_prefix = '%m [%p] %q%d '
TimeZone = 'Asia/Kathmandu'
DateStyle = 'SQL, DMY'
IntervalStyle = 'sql_standard'
extra_float_digits = 0
bytea_output = 'escape'
";

/// What stands in the log of a server of which a process has crashed.
const CRASHES: [&str; 3] = ["was terminated by signal", "PANIC:", "TRAP:"];

/// A server in a directory of its own, reachable over a Unix socket only.
pub struct Pg {
    process: Mutex<Option<Process>>,
    dir: Dir,
    bin: PathBuf,
    version: u32,
    standby: OnceLock<PathBuf>,
    may_crash: AtomicBool,
}

impl Pg {
    /// The server that the tests running at this moment share; the last one to drop it stops it.
    pub fn shared() -> Arc<Pg> {
        static SHARED: Mutex<Weak<Pg>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(|e| e.into_inner());
        shared.upgrade().unwrap_or_else(|| {
            let pg = Arc::new(Pg::start(""));
            *shared = Arc::downgrade(&pg);
            pg
        })
    }

    /// Starts a server with these lines added to its configuration.
    pub fn start(settings: &str) -> Pg {
        let pg = Pg::create(settings);
        pg.resume();
        pg
    }

    /// Starts a server whose cluster is not a copy of the others': it has a system identifier of its own.
    pub fn start_another_cluster(settings: &str) -> Pg {
        let pg = Pg::create(settings);
        let (data, made) = (pg.data(), pg.dir.path().join("made"));
        let configuration = fs::read_to_string(data.join("postgresql.conf")).unwrap();
        let mut command = pg.own_program("initdb");
        command.arg("-D").arg(&made);
        let options = [
            "--username=postgres",
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
        ];
        run(command.args(options));
        pg.replace_data(&made);
        fs::write(data.join("postgresql.conf"), configuration).unwrap();
        pg.resume();
        pg
    }

    /// Starts a server that has 32,768 transaction ids left: after 2^32 of them they begin anew.
    pub fn start_before_wraparound() -> Pg {
        let pg = Pg::create("autovacuum = off");
        // Whatever is not frozen may be 2^31 transactions old at most. These are the first ids of a page of the commit log, so
        // that the server makes the page.
        for next in [1 << 30, 1 << 31, 3 << 30, (1 << 32) - 32_768_u64] {
            run(pg
                .own_program("pg_resetwal")
                .arg(format!("--next-transaction-id={next}"))
                .arg(pg.data()));
            pg.resume();
            let allow = "UPDATE pg_database SET datallowconn = true WHERE datname = 'template0'";
            pg.connect("postgres").batch_execute(allow).unwrap();
            for database in ["postgres", "template1", "template0"] {
                pg.connect(database).batch_execute("VACUUM (FREEZE)").unwrap();
            }
            pg.stop(Signal::INT);
        }
        pg.resume();
        pg
    }

    /// Makes the data directory only.
    pub fn create(settings: &str) -> Pg {
        let bin = PathBuf::from(env("WALMIRROR_PG_BIN"));
        let dir = Dir::new("pg");
        let data = dir.path().join("data");
        // As root, -p keeps the owner of the template, who will run the server.
        run(Command::new("cp")
            .arg("-a")
            .arg(env("WALMIRROR_PG_TEMPLATE"))
            .arg(&data));
        let owner = fs::metadata(&data).expect("the copied template");
        std::os::unix::fs::chown(dir.path(), Some(owner.uid()), Some(owner.gid())).unwrap();
        let version = fs::read_to_string(data.join("PG_VERSION"))
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        let pg = Pg {
            process: Mutex::new(None),
            dir,
            bin,
            version,
            standby: OnceLock::new(),
            may_crash: AtomicBool::new(false),
        };
        pg.configure(SETTINGS);
        pg.configure(&format!("unix_socket_directories = '{}'", pg.host()));
        if pg.knows("output_plugin_libraries") {
            pg.configure("output_plugin_libraries = 'pgoutput, test_decoding, walmirror'");
        }
        pg.configure(settings);
        pg
    }

    /// Adds lines to postgresql.conf; they take effect with [`Pg::reload`] or the next start.
    pub fn configure(&self, settings: &str) {
        let file = self.data().join("postgresql.conf");
        let mut text = fs::read_to_string(&file).unwrap();
        text.push('\n');
        text.push_str(settings);
        text.push('\n');
        fs::write(file, text).unwrap();
    }

    /// Replaces pg_hba.conf.
    pub fn set_hba(&self, lines: &str) {
        fs::write(self.data().join("pg_hba.conf"), lines).unwrap();
    }

    /// Copies the data directory of a server that is stopped.
    pub fn copy_data(&self) -> PathBuf {
        let copy = self.dir.path().join("copy");
        assert!(!copy.exists(), "the copy before this one was not put back");
        run(Command::new("cp").arg("-a").arg(self.data()).arg(&copy));
        copy
    }

    /// Takes a base backup of the running server, made ready to be a standby of nobody.
    pub fn base_backup(&self) -> PathBuf {
        let backup = self.dir.path().join("backup");
        run(self
            .program("pg_basebackup", "postgres")
            .args(["--checkpoint=fast", "--wal-method=stream", "--no-sync", "-D"])
            .arg(&backup));
        fs::write(backup.join("standby.signal"), "").unwrap();
        let owner = fs::metadata(self.data()).unwrap();
        run(Command::new("chown")
            .arg("-R")
            .arg(format!("{}:{}", owner.uid(), owner.gid()))
            .arg(&backup));
        backup
    }

    /// From the next start on the server, which is stopped, has this data directory.
    pub fn replace_data(&self, with: &Path) {
        assert!(
            self.process.lock().unwrap_or_else(|e| e.into_inner()).is_none(),
            "running"
        );
        fs::remove_dir_all(self.data()).unwrap();
        fs::rename(with, self.data()).unwrap();
    }

    /// Stops all processes of the server, until what this returns is dropped.
    pub fn freeze(&self) -> Frozen {
        let mut frozen = Frozen(Vec::new());
        // First the one that makes others.
        frozen.stop(self.pid());
        self.children().into_iter().for_each(|pid| frozen.stop(pid));
        frozen
    }

    /// Stops a process of the server whose title has this in it, until what this returns is dropped.
    pub fn freeze_process(&self, title: &str) -> Frozen {
        let mut frozen = Frozen(Vec::new());
        let is_it = |pid: &u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(title)
        };
        self.children()
            .into_iter()
            .filter(is_it)
            .for_each(|pid| frozen.stop(pid));
        assert!(!frozen.0.is_empty(), "no process is a {title}");
        frozen
    }

    /// The processes that the postmaster has made.
    fn children(&self) -> Vec<u32> {
        let postmaster = self.pid().to_string();
        let mut children = Vec::new();
        for process in fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            // Behind the name, which may have anything in it: the state, and the parent.
            let stat = fs::read_to_string(process.path().join("stat")).unwrap_or_default();
            let parent = stat
                .rsplit(')')
                .next()
                .and_then(|rest| rest.split_whitespace().nth(1));
            if parent == Some(postmaster.as_str()) {
                children.push(pid);
            }
        }
        children
    }

    /// Makes the server read its configuration again.
    pub fn reload(&self) {
        self.process
            .lock()
            .unwrap()
            .as_mut()
            .expect("running")
            .signal(Signal::HUP);
    }

    /// Whether this minor version has the parameter (setting an unknown one keeps a server from starting).
    pub fn knows(&self, parameter: &str) -> bool {
        self.own_program("postgres")
            .arg("-C")
            .arg(parameter)
            .arg("-D")
            .arg(self.data())
            .output()
            .expect("run postgres -C")
            .status
            .success()
    }

    /// One of the server's own programs, run as the user that owns the data directory.
    fn own_program(&self, name: &str) -> Command {
        let mut command = Command::new("setpriv");
        if let Some(user) = server_user() {
            let gid = fs::metadata(self.data()).unwrap().gid();
            command.args([
                &format!("--reuid={user}"),
                &format!("--regid={gid}"),
                "--clear-groups",
            ]);
        }
        command.arg(self.bin.join(name)).current_dir("/");
        command
    }

    /// Starts the server (again) and waits until it answers.
    pub fn resume(&self) {
        let mut process = self.process.lock().unwrap();
        assert!(process.is_none(), "already running");
        let mut command = Command::new(self.bin.join("postgres"));
        command
            .arg("-D")
            .arg(self.data())
            .env_remove("LANG")
            .env("LC_ALL", "C");
        let log = self.dir.path().join("log");
        let user = server_user();
        let start = || {
            let before = std::fs::metadata(&log).map_or(0, |file| file.len() as usize);
            (
                before,
                Process::start("postgres", &log, user.as_deref(), &command),
            )
        };
        let (mut before, mut server) = start();
        wait_for(DEADLINE, "Postgres to start", || {
            if server.exited().is_some() {
                // The children of a postmaster that was killed take a moment to notice, and may write to the log meanwhile.
                let output = server.output();
                let old = output
                    .get(before..)
                    .is_some_and(|new| new.contains("is still in use"));
                assert!(old, "Postgres ended:\n{output}");
                (before, server) = start();
            }
            self.config("postgres").connect(NoTls).ok()
        });
        *process = Some(server);
    }

    /// Stops the server: `INT` is the fast, `QUIT` the immediate shutdown, `KILL` a crash.
    pub fn stop(&self, signal: Signal) {
        let mut process = self.process.lock().unwrap().take().expect("running");
        process.signal(signal);
        process.wait(DEADLINE);
    }

    /// Stops and starts the server.
    pub fn restart(&self, signal: Signal) {
        self.stop(signal);
        self.resume();
    }

    /// The major version.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The directory of the Unix socket.
    pub fn host(&self) -> String {
        self.dir.path().display().to_string()
    }

    /// The Unix socket itself.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join(".s.PGSQL.5432")
    }

    /// The process id of the postmaster.
    pub fn pid(&self) -> u32 {
        self.process
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .as_ref()
            .expect("running")
            .pid()
    }

    /// From here on every connection looks for whichever of the two is the primary. The process, the data directory and the
    /// log stay those of this one.
    pub fn fails_over_to(&self, standby: &Pg) {
        let set = self.standby.set(standby.dir.path().to_owned());
        set.expect("one standby at most");
    }

    /// What names it, and the standby if there is one, in a connection string of libpq.
    fn hosts(&self) -> String {
        match self.standby.get() {
            None => format!("host={} port=5432", self.host()),
            Some(standby) => format!(
                "host={},{} port=5432 target_session_attrs=read-write",
                self.host(),
                standby.display()
            ),
        }
    }

    /// Whether it has a standby that connections know of.
    pub fn has_standby(&self) -> bool {
        self.standby.get().is_some()
    }

    /// The data directory.
    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// What the server logged.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.dir.path().join("log")).unwrap_or_default()).into_owned()
    }

    /// The test ends processes of the server itself, so that its log may speak of processes that were killed.
    pub fn may_crash(&self) {
        self.may_crash.store(true, Ordering::Release);
    }

    /// No process of the server has ended in a way that only a defect of the library explains: each would take all sessions with
    /// it, and the sink alone would show no more than a reconnect.
    #[track_caller]
    pub fn assert_unharmed(&self) {
        if self.may_crash.load(Ordering::Acquire) {
            return;
        }
        let log = self.log();
        let crash = log
            .lines()
            .find(|line| CRASHES.iter().any(|sign| line.contains(sign)));
        assert_eq!(crash, None, "in the log of Postgres");
    }

    /// A libpq connection string for a database.
    pub fn conninfo(&self, database: &str) -> String {
        format!("{} user=postgres dbname={database}", self.hosts())
    }

    /// The same for the `postgres` crate.
    pub fn config(&self, database: &str) -> postgres::Config {
        let mut config = Client::configure();
        config
            .host_path(self.dir.path())
            .port(5432)
            .user("postgres")
            .dbname(database);
        config.connect_timeout(Duration::from_secs(10));
        if let Some(standby) = self.standby.get() {
            config
                .host_path(standby)
                .target_session_attrs(TargetSessionAttrs::ReadWrite);
        }
        config
    }

    /// A connection.
    pub fn connect(&self, database: &str) -> Client {
        self.config(database)
            .connect(NoTls)
            .unwrap_or_else(|e| panic!("connect to {database}: {e}"))
    }

    /// One of the server's own programs (psql, pgbench, pg_recvlogical), set up to connect to it.
    pub fn program(&self, name: &str, database: &str) -> Command {
        let mut command = Command::new(self.bin.join(name));
        command
            .env("PGHOST", self.host())
            .env("PGPORT", "5432")
            .env("PGUSER", "postgres");
        command.env("PGDATABASE", database).env_remove("PGSERVICE");
        command
    }

    /// Whether the server has this extension to offer.
    pub fn offers(&self, extension: &str) -> bool {
        let query = "SELECT FROM pg_available_extensions WHERE name = $1";
        !self
            .connect("postgres")
            .query(query, &[&extension])
            .unwrap()
            .is_empty()
    }

    /// Where its programs are.
    pub fn bin(&self) -> &Path {
        &self.bin
    }
}

/// Processes that are stopped, and go on when it is dropped.
pub struct Frozen(Vec<Pid>);

impl Frozen {
    fn stop(&mut self, pid: u32) {
        let pid = Pid::from_raw(pid as i32).unwrap();
        // One that has ended by itself is no matter.
        if kill_process(pid, Signal::STOP).is_ok() {
            self.0.push(pid);
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for pid in self.0.drain(..) {
            let _ = kill_process(pid, Signal::CONT);
        }
    }
}

impl Drop for Pg {
    fn drop(&mut self) {
        let process = self.process.get_mut().unwrap_or_else(|e| e.into_inner());
        if let Some(server) = process {
            server.signal(Signal::QUIT);
            server.wait(DEADLINE);
        }
        if !std::thread::panicking() {
            self.assert_unharmed();
        }
    }
}

/// The user to run the server as; none when the tests themselves are unprivileged.
fn server_user() -> Option<String> {
    rustix::process::getuid()
        .is_root()
        .then(|| env("WALMIRROR_PG_USER"))
}

fn env(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run the tests with `make test`"))
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}
