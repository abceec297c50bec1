//! Processes of the server that get no more memory: an ERROR, or a row that is not captured. Where Rust finds no memory by itself the
//! process ends, and Postgres ends all others with it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::os::unix::fs::MetadataExt;
use std::process::Command;

use walmirror_tests::{DEADLINE, Mirror, wait_for};

/// Lets a process have so many bytes more than it has; `None`: as many as it likes.
fn limit(pid: u32, more: Option<u64>) {
    let process = std::fs::metadata(format!("/proc/{pid}")).unwrap();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let size = status
        .lines()
        .find_map(|line| line.strip_prefix("VmSize:"))
        .unwrap();
    let has: u64 = size.trim().trim_end_matches(" kB").parse().unwrap();
    let limit = more.map_or("unlimited".to_owned(), |more| (has * 1024 + more).to_string());
    let mut command = Command::new("prlimit");
    if rustix::process::getuid().is_root() {
        // Root in a container may not do that to a process of somebody else.
        command = Command::new("setpriv");
        command.args([
            format!("--reuid={}", process.uid()),
            format!("--regid={}", process.gid()),
        ]);
        command.args(["--clear-groups", "prlimit"]);
    }
    let output = command
        .args([format!("--pid={pid}"), format!("--as={limit}:")])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn a_row_that_there_is_no_memory_for_is_not_captured() {
    let m = Mirror::alone("");
    m.sql(
        "CREATE TABLE c (id int PRIMARY KEY, v text); ALTER TABLE c ALTER v SET STORAGE EXTERNAL; SELECT walmirror.cache('c', key => 'c:{id}'); \
         INSERT INTO c VALUES (1, repeat('x', 60000000))",
    );
    m.start();
    m.outlast_announced();
    let mut reader = m.db.connect();
    reader
        .batch_execute("SET walmirror.capture_max_bytes = '256MB'; SET walmirror.capture_interval = 0; SELECT * FROM c WHERE id = 0")
        .unwrap();
    let pid: i32 = reader.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
    let pid = u32::try_from(pid).unwrap();
    // The value is fetched, put into a row, into a batch of rows and into a message: each of them may be the one that fails.
    for more in (40..=400).step_by(20) {
        limit(pid, Some(more << 20));
        let row = reader.query("SELECT v IS NULL FROM c WHERE id = 1", &[]);
        assert!(row.is_ok(), "{more} MB: {row:?}");
    }
    limit(pid, None);
    let failed =
        m.db.value("SELECT value FROM walmirror.capture_stats WHERE counter = 'skipped_failed'");
    assert!(failed.parse::<u32>().unwrap() >= 6, "{failed} rows");
    wait_for(DEADLINE, "the row", || {
        reader.query("SELECT v IS NULL FROM c WHERE id = 1", &[]).unwrap();
        (m.redis.command::<usize>("HSTRLEN c:1 v") == 60_000_000).then_some(())
    });
}

/// Anybody may write a marker, and the slot comes by it again and again.
#[test]
fn a_message_that_there_is_no_memory_for_ends_the_walsender_alone() {
    let m = Mirror::alone("");
    m.sql("CREATE TABLE t (id int PRIMARY KEY, v text); SELECT walmirror.mirror('t')");
    m.start();
    m.settle();
    let pid = m.db.value("SELECT pid FROM pg_stat_replication");
    // Postgres takes the record from the WAL, in two copies; there is no room for the plugin's.
    limit(pid.parse().unwrap(), Some(250 << 20));
    m.sql("SELECT pg_logical_emit_message(false, 'walmirror.marker', repeat('x', 100000000)); INSERT INTO t VALUES (1, 'a')");
    m.settle();
    let log = m.db.pg.log();
    assert!(
        log.contains("no memory for 100000000 bytes"),
        "nobody had to say so"
    );
}
