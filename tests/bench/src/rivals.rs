//! Runs what fills Redis, and makes what the sink's limit is: `redis-cli --pipe`, which is as fast as Redis itself takes
//! ready-made commands.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use walmirror_tests::Redis;

use crate::bed::Bed;
use crate::meter::{Usage, Watch};

/// A program that is to fill Redis, and what it took.
pub struct Run {
    /// Wall time.
    pub seconds: f64,
    /// What the program used.
    pub client: Usage,
    /// What the walsender used, where there is one.
    pub walsender: Option<Usage>,
    /// CPU seconds of Redis.
    pub redis: f64,
    /// How many EXECs Redis did.
    pub execs: u64,
}

/// Runs a program to its end. With `slot`, it reads from this slot.
pub fn run(command: &mut Command, what: &str, bed: &Bed, redis: &Redis, slot: Option<&str>) -> Run {
    let redis_pid = redis_pid(redis);
    let before = crate::meter::cpu_seconds(redis_pid).unwrap();
    let execs_before = execs(redis);
    let log = bed.db.pg.data().with_file_name("client.log");
    let output = File::create(&log).unwrap();
    command.stdout(output.try_clone().unwrap()).stderr(output);
    let start = Instant::now();
    let mut child = command.spawn().unwrap_or_else(|e| panic!("{what}: {e}"));
    let client = Watch::start(child.id());
    let walsender = slot.and_then(|slot| bed.walsender(slot, || child.try_wait().unwrap().is_some()));
    let walsender = walsender.map(Watch::start);
    // The watch needs its last look at a process that is not yet reaped, so the end is taken from the watch.
    let client = client.until_gone();
    let seconds = start.elapsed().as_secs_f64();
    let status = child.wait().unwrap();
    assert!(
        status.success(),
        "{what}: {status}\n{}",
        std::fs::read_to_string(&log).unwrap_or_default()
    );
    let walsender = walsender.map(Watch::until_gone);
    let after = crate::meter::cpu_seconds(redis_pid).unwrap();
    Run {
        seconds,
        client,
        walsender,
        redis: after - before,
        execs: execs(redis) - execs_before,
    }
}

fn execs(redis: &Redis) -> u64 {
    let info: String = redis.command("INFO commandstats");
    let line = info
        .lines()
        .find_map(|line| line.strip_prefix("cmdstat_exec:calls="));
    line.and_then(|line| line.split(',').next()?.parse().ok())
        .unwrap_or(0)
}

/// The process of a Redis.
pub fn redis_pid(redis: &Redis) -> u32 {
    let info: String = redis.command("INFO server");
    let line = info.lines().find_map(|line| line.strip_prefix("process_id:"));
    line.and_then(|pid| pid.trim().parse().ok())
        .expect("the process of Redis")
}

/// `redis-cli --pipe < file`.
pub fn pipe(file: &Path, redis: &Redis) -> Command {
    let mut command = Command::new("redis-cli");
    command
        .args(["-p", &redis.port().to_string(), "--pipe"])
        .stdin(File::open(file).unwrap());
    command
}

/// The same commands between MULTI and EXEC: a transaction that Redis applies as one.
pub fn in_multi(commands: &Path) -> PathBuf {
    let path = commands.with_extension("multi");
    let mut file = File::create(&path).unwrap();
    write_command(&mut file, "MULTI", &[]);
    std::io::copy(&mut File::open(commands).unwrap(), &mut file).unwrap();
    write_command(&mut file, "EXEC", &[]);
    path
}

/// How ready-made commands are put together.
#[derive(Clone, Copy)]
pub enum Shape {
    /// HSET key field value …
    Hset,
    /// SET key value
    Set,
    /// MSET of so many.
    Mset(usize),
}

/// Writes the commands that make Redis hold the result of a query: its first column is the key; then come fields and
/// values (HSET), or the value. The values are Postgres's own text, so what these commands make is what must be.
pub fn ready_made(bed: &Bed, query: &str, shape: Shape, name: &str) -> PathBuf {
    let path = bed.db.pg.data().with_file_name(name);
    let mut file = BufWriter::new(File::create(&path).unwrap());
    let mut client = bed.db.connect();
    let rows = client
        .copy_out(&format!("COPY ({query}) TO STDOUT"))
        .unwrap_or_else(|e| panic!("{query}: {e:?}"));
    let mut batch: Vec<Vec<u8>> = Vec::new();
    let mut full = 0;
    for line in BufReader::with_capacity(1 << 20, rows).split(b'\n') {
        let line = line.unwrap();
        // COPY escapes backslashes and control characters, which these rows do not have.
        assert!(
            !line.contains(&b'\\'),
            "a value that COPY escapes: {}",
            String::from_utf8_lossy(&line)
        );
        batch.extend(line.split(|&b| b == b'\t').map(<[u8]>::to_vec));
        full += 1;
        if full == shape.rows() {
            write_command(&mut file, shape.command(), &batch);
            batch.clear();
            full = 0;
        }
    }
    if !batch.is_empty() {
        write_command(&mut file, shape.command(), &batch);
    }
    file.flush().unwrap();
    path
}

impl Shape {
    fn rows(self) -> usize {
        match self {
            Shape::Mset(rows) => rows,
            _ => 1,
        }
    }

    fn command(self) -> &'static str {
        match self {
            Shape::Hset => "HSET",
            Shape::Set => "SET",
            Shape::Mset(_) => "MSET",
        }
    }
}

/// Appends a command as RESP.
pub fn write_command(file: &mut impl Write, command: &str, arguments: &[Vec<u8>]) {
    write!(
        file,
        "*{}\r\n${}\r\n{command}\r\n",
        arguments.len() + 1,
        command.len()
    )
    .unwrap();
    for argument in arguments {
        write!(file, "${}\r\n", argument.len()).unwrap();
        file.write_all(argument).unwrap();
        file.write_all(b"\r\n").unwrap();
    }
}
