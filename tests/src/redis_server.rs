//! A private Redis server.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use redis::{Connection, FromRedisValue};

use crate::{DEADLINE, Dir, Process, Signal, wait_for};

/// A port that is free now, below those that the kernel gives to clients: one of these could be taken while the server is
/// down.
pub fn free_port() -> u16 {
    std::iter::repeat_with(|| rand::random_range(12_000..32_000))
        .find(|&port| TcpListener::bind(("127.0.0.1", port)).is_ok())
        .expect("it does not end")
}

/// The server's executable: WALMIRROR_REDIS_SERVER names another Redis, or Valkey.
fn executable() -> String {
    std::env::var("WALMIRROR_REDIS_SERVER").unwrap_or_else(|_| "redis-server".to_owned())
}

/// A Redis on a free port of the loopback interface, that persists nothing unless told.
pub struct Redis {
    process: Option<Process>,
    dir: Dir,
    port: u16,
    options: Vec<String>,
}

impl Redis {
    /// Starts a server.
    pub fn start() -> Redis {
        Redis::start_with(&[])
    }

    /// Starts a server with further options, such as `&["--requirepass", "x"]`.
    pub fn start_with(options: &[&str]) -> Redis {
        Redis::try_start_with(options).unwrap_or_else(|output| panic!("Redis ended:\n{output}"))
    }

    /// The same, for options that not every server takes; else what it said before it ended.
    pub fn try_start_with(options: &[&str]) -> Result<Redis, String> {
        let port = free_port();
        let options = options.iter().map(|&o| o.to_owned()).collect();
        let mut redis = Redis {
            process: None,
            dir: Dir::new("redis"),
            port,
            options,
        };
        redis.try_resume()?;
        Ok(redis)
    }

    /// Starts the server (again), on the same port.
    pub fn resume(&mut self) {
        self.try_resume()
            .unwrap_or_else(|output| panic!("Redis ended:\n{output}"));
    }

    fn try_resume(&mut self) -> Result<(), String> {
        let mut command = Command::new(executable());
        command.args([
            "--port",
            &self.port.to_string(),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--loglevel",
            "warning",
        ]);
        command.arg("--dir").arg(self.dir.path()).args(&self.options);
        let mut server = Process::start("redis", &self.dir.path().join("log"), None, &command);
        wait_for(DEADLINE, "Redis to start", || {
            if server.exited().is_some() {
                return Some(Err(server.output()));
            }
            let mut connection = self.client().get_connection().ok()?;
            // With a password set the answer is an error, but it is an answer.
            match redis::cmd("PING").query::<String>(&mut connection) {
                Err(e) if e.is_io_error() || e.code() == Some("LOADING") => None,
                _ => Some(Ok(())),
            }
        })?;
        self.process = Some(server);
        Ok(())
    }

    /// Ends the server with a signal: `TERM` saves what its options say, `KILL` does not.
    pub fn stop(&mut self, signal: Signal) {
        let mut server = self.process.take().expect("running");
        server.signal(signal);
        server.wait(DEADLINE);
    }

    /// A replica of this server, once it has everything.
    pub fn replica(&self) -> Redis {
        let replica = Redis::start_with(&["--replicaof", &format!("127.0.0.1 {}", self.port)]);
        wait_for(DEADLINE, "the replica to have everything", || {
            replica
                .command::<String>("INFO replication")
                .contains("master_link_status:up")
                .then_some(())
        });
        replica
    }

    /// What the server logged, in all its lives.
    pub fn log(&self) -> String {
        let log = std::fs::read(self.dir.path().join("log")).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    /// Options for the next start.
    pub fn set_options(&mut self, options: &[&str]) {
        self.options = options.iter().map(|&o| o.to_owned()).collect();
    }

    /// Has a script keep it busy until somebody kills that.
    pub fn keep_busy(&self) {
        let client = self.client();
        std::thread::spawn(move || {
            let mut connection = client.get_connection().unwrap();
            let _ = redis::cmd("EVAL")
                .arg("while true do end")
                .arg(0)
                .exec(&mut connection);
        });
    }

    /// Sends the server a signal that does not end it: SIGSTOP, SIGCONT.
    pub fn signal(&mut self, signal: Signal) {
        self.process.as_mut().expect("running").signal(signal);
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The file that it appends to, with `--appendonly yes`: the last one that its manifest names.
    pub fn append_only_file(&self) -> PathBuf {
        let dir = self.dir().join("appendonlydir");
        let manifest = std::fs::read_to_string(dir.join("appendonly.aof.manifest")).unwrap_or_default();
        let last = manifest
            .lines()
            .rfind(|line| line.ends_with("type i"))
            .and_then(|line| line.split(' ').nth(1));
        dir.join(last.expect("a file that it appends to"))
    }

    /// Whether it knows the command.
    pub fn knows(&self, command: &str) -> bool {
        let known: Vec<redis::Value> = self.command(&format!("COMMAND INFO {command}"));
        !matches!(known.first(), None | Some(redis::Value::Nil))
    }

    /// The URL of its database 0.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/0", self.port)
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A client for a connection with options of its own.
    pub fn client(&self) -> redis::Client {
        redis::Client::open(self.url()).unwrap()
    }

    /// A connection.
    pub fn connect(&self) -> Connection {
        self.client()
            .get_connection()
            .unwrap_or_else(|e| panic!("connect to Redis: {e}"))
    }

    /// Runs one command; its words are separated by blanks.
    #[track_caller]
    pub fn command<T: FromRedisValue>(&self, words: &str) -> T {
        let mut words = words.split_whitespace();
        let mut command = redis::cmd(words.next().expect("a command"));
        for word in words {
            command.arg(word);
        }
        command
            .query(&mut self.connect())
            .unwrap_or_else(|e| panic!("Redis: {e}"))
    }

    /// The fields of a hash, sorted.
    pub fn hash(&self, key: &str) -> Vec<(String, String)> {
        let mut fields: Vec<(String, String)> = redis::cmd("HGETALL")
            .arg(key)
            .query(&mut self.connect())
            .unwrap_or_else(|e| panic!("{key}: {e}"));
        fields.sort();
        fields
    }

    /// A string value.
    pub fn get(&self, key: &str) -> Option<String> {
        redis::cmd("GET")
            .arg(key)
            .query(&mut self.connect())
            .unwrap_or_else(|e| panic!("{key}: {e}"))
    }

    /// All there is, the mirror's own keys too, byte for byte. A key that expires meanwhile is left out.
    pub fn dump(&self) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let mut redis = self.connect();
        let keys: Vec<Vec<u8>> = redis::cmd("KEYS").arg("*").query(&mut redis).unwrap();
        keys.into_iter()
            .filter_map(|key| {
                let dump: Option<Vec<u8>> = redis::cmd("DUMP").arg(&key).query(&mut redis).unwrap();
                dump.map(|dump| (key, dump))
            })
            .collect()
    }

    /// All keys but the mirror's own, sorted.
    pub fn keys(&self) -> Vec<String> {
        let mut keys: Vec<String> = redis::cmd("KEYS").arg("*").query(&mut self.connect()).unwrap();
        keys.retain(|key| !key.starts_with("walmirror:{"));
        keys.sort();
        keys
    }
}
