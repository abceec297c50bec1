//! A backlog that is worked off again and again: a loaded database, a Redis, and the state of both at the start of the load.
//!
//! The sink runs once on the empty table, so that slot and progress exist. Each round starts from copies of both.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use walmirror_tests::{Lsn, Redis, Sink};

use crate::bed::Bed;
use crate::rivals::{self, Run};

/// The slot that is read.
pub const SLOT: &str = "mirror";
/// The one that keeps its first position.
pub const ORIGIN: &str = "origin";

/// A backlog and everything needed to work it off again and again.
pub struct Backlog {
    /// The server.
    pub bed: Bed,
    /// The Redis that is filled.
    pub redis: Redis,
    /// The end of the load.
    pub end: Lsn,
    bookkeeping: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Backlog {
    /// Prepares a database, lets the sink see it once, and then loads it.
    pub fn make(settings: &str, prepare: impl FnOnce(&Bed), load: impl FnOnce(&Bed)) -> Backlog {
        let bed = Bed::start(settings);
        prepare(&bed);
        let redis = Redis::start_with(&["--enable-debug-command", "local"]);
        let mut backlog = Backlog {
            end: bed.end(),
            bed,
            redis,
            bookkeeping: BTreeMap::new(),
        };
        let arguments = backlog.arguments();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let (code, output) = Sink::run(&arguments, Duration::from_secs(120));
        assert_eq!(code, Some(0), "the sink on the loaded database:\n{output}");
        let mut connection = backlog.redis.connect();
        let keys: Vec<Vec<u8>> = redis::cmd("KEYS").arg("*").query(&mut connection).unwrap();
        for key in keys {
            let dump = redis::cmd("DUMP").arg(&key).query(&mut connection).unwrap();
            backlog.bookkeeping.insert(key, dump);
        }
        backlog.bed.copy_slot(SLOT, ORIGIN, "walmirror");
        load(&backlog.bed);
        backlog.end = backlog.bed.end();
        backlog
    }

    fn arguments(&self) -> Vec<String> {
        let (conninfo, url) = (self.bed.db.pg.conninfo(&self.bed.db.name), self.redis.url());
        let end = self.end.to_string();
        [
            "run",
            "--postgres",
            &conninfo,
            "--redis",
            &url,
            "--slot",
            SLOT,
            "--until-lsn",
            &end,
        ]
        .map(str::to_owned)
        .to_vec()
    }

    /// Redis and the slot as they were before the load.
    pub fn rewind(&self, plugin: &str) {
        let mut connection = self.redis.connect();
        redis::cmd("FLUSHALL").exec(&mut connection).unwrap();
        for (key, dump) in &self.bookkeeping {
            redis::cmd("RESTORE")
                .arg(key)
                .arg(0)
                .arg(dump)
                .exec(&mut connection)
                .unwrap();
        }
        self.bed.drop_slot(SLOT);
        self.bed.copy_slot(ORIGIN, SLOT, plugin);
    }

    /// Redis with nothing in it, and no slot: the sink will make one, and read the table.
    pub fn empty(&self) {
        redis::cmd("FLUSHALL").exec(&mut self.redis.connect()).unwrap();
        self.bed.drop_slot(SLOT);
    }

    /// The sink from where it stands to the end.
    pub fn run_sink(&self) -> Run {
        let arguments = self.arguments();
        let mut command: Command = Sink::command(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        rivals::run(&mut command, "walmirror", &self.bed, &self.redis, Some(SLOT))
    }

    /// The sink from the start of the load to the end.
    pub fn sink(&self) -> Run {
        self.rewind("walmirror");
        self.run_sink()
    }

    /// What Redis holds, but for the mirror's own keys: the same data, the same digest.
    pub fn digest(&self) -> String {
        let mut connection = self.redis.connect();
        let own: Vec<Vec<u8>> = redis::cmd("KEYS")
            .arg("walmirror:*")
            .query(&mut connection)
            .unwrap();
        if !own.is_empty() {
            redis::cmd("DEL").arg(own).exec(&mut connection).unwrap();
        }
        let digest: String = redis::cmd("DEBUG").arg("DIGEST").query(&mut connection).unwrap();
        let size: u64 = redis::cmd("DBSIZE").query(&mut connection).unwrap();
        let sample: redis::Value = match redis::cmd("GET").arg("bench:1").query(&mut connection) {
            Ok(value) => value,
            Err(_) => redis::cmd("HGETALL")
                .arg("bench:1")
                .query(&mut connection)
                .unwrap(),
        };
        format!("{size} keys, digest {digest}, bench:1 is {sample:?}")
    }
}
