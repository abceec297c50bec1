//! Programs that do the same work as the sink: the consumer that people write by hand, and Debezium.

use std::process::{Command, Stdio};

use walmirror_tests::Redis;

use crate::bed::Bed;

/// A program that reads a slot and fills Redis until it sees the end mark behind a load.
pub struct Peer {
    /// The contestant's name.
    pub name: &'static str,
    /// What its slot is read with.
    pub plugin: &'static str,
    command: fn(&Bed, &Redis, &str) -> Result<Command, String>,
}

impl Peer {
    /// What to run, or why it cannot be had.
    pub fn command(&self, bed: &Bed, redis: &Redis, slot: &str) -> Result<Command, String> {
        (self.command)(bed, redis, slot)
    }
}

/// The first two are those of the end-to-end cases. For latency Debezium is there three times: it looks for changes every
/// so often (500 ms by default), and the shorter the interval, the more CPU it needs.
pub static PEERS: [Peer; 4] = [
    Peer {
        name: "hand-written",
        plugin: "wal2json",
        command: hand_written,
    },
    Peer {
        name: "Debezium",
        plugin: "pgoutput",
        command: |bed, redis, slot| debezium(bed, redis, slot, None),
    },
    Peer {
        name: "Debezium, poll 10 ms",
        plugin: "pgoutput",
        command: |bed, redis, slot| debezium(bed, redis, slot, Some(10)),
    },
    Peer {
        name: "Debezium, poll 1 ms",
        plugin: "pgoutput",
        command: |bed, redis, slot| debezium(bed, redis, slot, Some(1)),
    },
];

/// psycopg2, wal2json and redis-py; the error where these are not installed.
fn hand_written(bed: &Bed, redis: &Redis, slot: &str) -> Result<Command, String> {
    let python = std::env::var_os("WALMIRROR_BENCH_PYTHON").ok_or("psycopg2 or redis-py is not installed")?;
    bed.has_plugin("wal2json")?;
    let mut command = Command::new(python);
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/consumer.py"));
    command.args([&bed.db.pg.conninfo(&bed.db.name), &redis.port().to_string(), slot]);
    command.stdin(Stdio::null());
    Ok(command)
}

/// The variable with the class path of Debezium and its consumer, which deps.sh compiles.
pub const DEBEZIUM: &str = "WALMIRROR_BENCH_DEBEZIUM";

/// Debezium's engine with a consumer that pipelines into Redis, and why not where it cannot be had. The slot is one of
/// pgoutput; the publication `bench` must have been there before the load. Without `poll` its default (500 ms) holds.
fn debezium(bed: &Bed, redis: &Redis, slot: &str, poll: Option<u32>) -> Result<Command, String> {
    let classes = std::env::var_os(DEBEZIUM).ok_or("there is no JVM, or its jars could not be fetched")?;
    let tcp = bed.tcp.as_ref().ok_or("no loopback address was free")?;
    let mut command = Command::new("java");
    command
        // Without a limit the heap grows to gigabytes, and the run becomes no faster.
        .args(["-Xmx512m", "-Dlog4j2.level=ERROR", "-cp"])
        .arg(classes)
        .args([
            "Consumer",
            &tcp.address,
            &bed.db.name,
            &redis.port().to_string(),
            slot,
        ])
        .args(poll.map(|milliseconds| milliseconds.to_string()))
        .env("PGPASSWORD", &tcp.password)
        .stdin(Stdio::null());
    Ok(command)
}
