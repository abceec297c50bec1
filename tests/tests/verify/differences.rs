//! What differs is found, named and mended; what is on its way is no difference.

use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::Duration;

use walmirror_tests::{DEADLINE, Db, Mirror, Sink, full_disk, unread, wait_for};

use crate::{CANARY, assert_equal, many_kinds, redis, walmirror, while_writing};

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The story: `walmirror verify | head -1` ended with 0 where a key differed, and with a full disk for its output it was told as a difference.
#[test]
fn what_verify_comes_to_does_not_depend_on_who_reads_it() {
    let m = Mirror::with(
        "CREATE TABLE t (id int PRIMARY KEY); SELECT walmirror.mirror('t'); INSERT INTO t SELECT generate_series(1, 10)",
    );
    let ends = |command: &str, stdout: Stdio, wanted: i32| {
        let (code, said) = Sink::run_into(&m.arguments(&[command]), stdout);
        assert_eq!(code, Some(wanted), "{command}: {said}");
        said
    };
    ends("verify", unread(), 0);
    redis(&m, &["DEL", "t:1"]);
    for stdout in [unread(), full_disk()] {
        let said = ends("verify", stdout, 1);
        assert!(said.contains("1 keys differ"), "{said}");
    }
    ends("backfill", unread(), 0);
    let said = ends("verify", full_disk(), 2);
    assert!(said.contains("cannot write to standard output"), "{said}");
}

#[test]
fn a_mirror_under_pgbench_is_equal_every_time() {
    let m = Mirror::alone("");
    let pgbench = |args: &[&str]| {
        let mut command = m.db.pg.program("pgbench", &m.db.name);
        command.args(args).stdout(Stdio::null()).stderr(Stdio::null());
        command
    };
    assert!(pgbench(&["-i", "-s", "2", "-q"]).status().unwrap().success());
    m.sql("ALTER TABLE pgbench_history ADD id bigserial PRIMARY KEY");
    for table in ["accounts", "branches", "tellers", "history"] {
        m.sql(&format!("SELECT walmirror.mirror('pgbench_{table}')"));
    }
    m.start();
    m.settle_within(Duration::from_secs(120));
    let mut load = Running(
        pgbench(&["-c", "4", "-j", "2", "-T", "600", "-n"])
            .spawn()
            .unwrap(),
    );
    for _ in 0..4 {
        let output = assert_equal(&m, &["verify"]);
        // An update that moves a row to another block moves it out of what was read, or into it once more.
        let (_, accounts) = output.split_once("pgbench_accounts: ").unwrap();
        let rows: u64 = accounts.split_whitespace().next().unwrap().parse().unwrap();
        assert!(rows > 190_000, "{output}");
    }
    assert!(load.0.try_wait().unwrap().is_none(), "pgbench has ended early");
}

/// Two clients insert, delete and change the same few rows as fast as they can, a third one moves rows to other keys.
#[test]
fn rows_that_come_and_go_are_no_differences() {
    let m = Mirror::with(
        "CREATE TABLE t (id int PRIMARY KEY, n int, v text); SELECT walmirror.mirror('t', value => 'json'); \
         INSERT INTO t SELECT i, 0, 'v' FROM generate_series(1, 2000) i; \
         CREATE TABLE hot (id int PRIMARY KEY, n int); SELECT walmirror.mirror('hot'); INSERT INTO hot VALUES (1, 0)",
    );
    let load = [
        "INSERT INTO t SELECT i, 1, 'a' FROM generate_series(5000, 5020) i ON CONFLICT DO NOTHING; \
         DELETE FROM t WHERE id BETWEEN 5000 AND 5010",
        "DELETE FROM t WHERE id BETWEEN 5000 AND 5020; INSERT INTO t VALUES (5003, 2, 'b') ON CONFLICT DO NOTHING",
        "UPDATE hot SET n = n + 1; UPDATE t SET n = 1 - n WHERE id < 20",
        "UPDATE t SET id = id + 10000 WHERE id BETWEEN 100 AND 110; UPDATE t SET id = id - 10000 WHERE id > 10000",
    ];
    while_writing(&m, &load, || {
        for _ in 0..6 {
            assert_equal(&m, &["verify"]);
        }
    });
}

/// A COMMIT that waits for a standby is in the stream, and in Redis, long before snapshots see it.
#[test]
fn a_commit_that_waits_for_a_standby_is_no_difference() {
    let m = Mirror::alone("");
    m.sql(
        "CREATE TABLE t (id int PRIMARY KEY, v int); SELECT walmirror.mirror('t'); \
         INSERT INTO t SELECT i, 0 FROM generate_series(1, 100) i",
    );
    m.start();
    m.settle();
    // What is applied counts as flushed two seconds later, so each of these commits stays invisible for that long.
    m.db.pg.configure("synchronous_standby_names = 'walmirror'");
    m.db.pg.reload();
    wait_for(DEADLINE, "the sink to be the standby", || {
        let state = m.db.value("SELECT sync_state FROM pg_stat_replication");
        (state == "sync").then_some(())
    });
    let load = [
        "UPDATE t SET v = v + 1 WHERE id < 50",
        "INSERT INTO t VALUES (1000, 0); DELETE FROM t WHERE id = 1000; UPDATE t SET v = v + 1 WHERE id > 50",
    ];
    while_writing(&m, &load, || {
        for _ in 0..4 {
            assert_equal(&m, &["verify"]);
        }
    });
}

const LOAD: [&str; 3] = [
    "UPDATE h SET n = n + 1 WHERE id > 1000 AND id % 97 = n % 97; UPDATE p SET n = n + 1 WHERE id = 1500 + n % 100",
    "UPDATE j SET n = n + 1 WHERE b = 1001 + (random() * 3000)::int; \
     DELETE FROM s WHERE id = 1001 + (random() * 3000)::int; INSERT INTO s VALUES (1500, 'back') ON CONFLICT DO NOTHING",
    "INSERT INTO h VALUES (70000, 'new', 0); DELETE FROM h WHERE id = 70000; DELETE FROM p WHERE id = 70000; \
     INSERT INTO p VALUES (70000, 'new', 0)",
];

#[test]
fn every_kind_of_difference_is_found_named_and_repaired_while_writes_go_on() {
    let m = many_kinds();
    while_writing(&m, &LOAD, || {
        assert_equal(&m, &["verify"]);
        let wrong: [(&str, &str, &[&str]); 18] = [
            ("missing", "h:1", &["DEL", "h:1"]),
            ("different", "h:2", &["HSET", "h:2", "v", "y"]),
            ("different", "h:3", &["HSET", "h:3", "extra", CANARY]),
            ("different", "h:4", &["HDEL", "h:4", "n"]),
            ("different", "h:5", &["SET", "h:5", "another type"]),
            ("different", "h:6", &["EXPIRE", "h:6", "1000"]),
            ("extra", "h:99999", &["HSET", "h:99999", "id", "99999"]),
            ("extra", "h:007", &["HSET", "h:007", "id", "7"]),
            ("extra", "h:no number", &["SET", "h:no number", "x"]),
            ("missing", "j:x%3A1:1", &["DEL", "j:x%3A1:1"]),
            ("different", "j:x%3A2:2", &["SET", "j:x%3A2:2", "{}"]),
            ("extra", "j:x%3A3:4", &["SET", "j:x%3A3:4", "{}"]),
            ("different", "s:1", &["SET", "s:1", "y"]),
            ("different", "s:2", &["LPUSH", "s:2", "y"]),
            ("extra", "s:90000", &["SET", "s:90000", "the row has NULL"]),
            ("different", "e:1", &["PERSIST", "e:1"]),
            ("missing", "part/1", &["DEL", "part/1"]),
            ("different", "part/2", &["HSET", "part/2", "n", "7"]),
        ];
        for (_, key, command) in wrong {
            if command[0] == "LPUSH" {
                redis(&m, &["DEL", key]);
            }
            redis(&m, command);
        }
        // It may have expired, so this is none.
        redis(&m, &["DEL", "e:2"]);
        let (code, output) = walmirror(&m, &["verify"]);
        assert_eq!(code, 1, "{output}");
        for (finding, key, _) in wrong {
            assert!(
                output.contains(&format!("  {finding:<10} {key}\n")),
                "{finding} {key}"
            );
        }
        assert!(output.contains("18 keys differ"), "{output}");
        assert!(output.contains("public.e: 100 rows"), "{output}");
        assert!(output.contains("1 absent (their keys expire)"), "{output}");
        let (code, output) = walmirror(&m, &["verify", "--table", "public.s"]);
        assert_eq!(code, 1, "{output}");
        assert!(
            output.contains("3 keys differ") && !output.contains("h:1"),
            "{output}"
        );
        let (code, output) = walmirror(&m, &["verify", "--repair", "--json"]);
        assert_eq!(code, 0, "{output}");
        assert!(output.contains(r#""key":"h:007""#), "{output}");
        let output = assert_equal(&m, &["verify"]);
        assert!(
            !output.contains("missing") && !output.contains("extra"),
            "{output}"
        );
    });
    redis(&m, &["HSET", "e:2", "id", "2"]);
    assert_equal(&m, &["verify", "--repair"]);
    m.settle();
}

/// A transaction that stays open does not keep the truth from being told; one that was prepared may have committed.
#[test]
fn an_open_transaction_does_not_hide_a_difference() {
    let m = many_kinds();
    let mut open = m.db.connect();
    open.batch_execute("BEGIN; UPDATE h SET n = -1 WHERE id = 10; INSERT INTO h VALUES (80000, 'open', 0)")
        .unwrap();
    assert_equal(&m, &["verify"]);
    redis(&m, &["DEL", "h:10"]);
    redis(&m, &["HSET", "h:80000", "id", "80000"]);
    let (code, output) = walmirror(&m, &["verify", "--table", "h"]);
    assert_eq!(code, 1, "{output}");
    assert!(output.contains("missing    h:10\n") && output.contains("extra      h:80000\n"));
    open.batch_execute("COMMIT").unwrap();
    assert_equal(&m, &["verify", "--table", "h", "--repair"]);
    m.settle();
}

#[test]
fn a_cache_must_hold_nothing_wrong_but_need_not_hold_anything() {
    let m = Mirror::new();
    m.sql(
        "CREATE TABLE c (id int PRIMARY KEY, v text); INSERT INTO c SELECT i, 'v' || i FROM generate_series(1, 100) i; \
         SELECT walmirror.cache('c')",
    );
    m.start();
    let mut client = m.db.connect();
    client
        .batch_execute("SET walmirror.capture_interval = 0")
        .unwrap();
    wait_for(DEADLINE, "the cache to be filled", || {
        client
            .batch_execute("SELECT * FROM c WHERE id <= 50; SELECT pg_logical_emit_message(true, 'test', '')")
            .unwrap();
        (m.redis.keys().len() >= 50).then_some(())
    });
    let output = assert_equal(&m, &["verify"]);
    assert!(output.contains(" keys: equal"), "{output}");
    redis(&m, &["DEL", "c:1"]);
    assert_equal(&m, &["verify"]);
    redis(&m, &["HSET", "c:2", "v", "stale"]);
    redis(&m, &["HSET", "c:777", "v", "no such row"]);
    let (code, output) = walmirror(&m, &["verify"]);
    assert_eq!(code, 1, "{output}");
    assert!(output.contains("different  c:2\n") && output.contains("extra      c:777\n"));
    assert_equal(&m, &["verify", "--repair"]);
    assert_eq!(m.redis.hash("c:2")[1], ("v".into(), "v2".into()));
    assert!(m.redis.hash("c:777").is_empty());
}

#[test]
fn a_sample_finds_what_is_widely_wrong() {
    let m = Mirror::with(
        "CREATE TABLE t (id int PRIMARY KEY, v text); SELECT walmirror.mirror('t'); \
         INSERT INTO t SELECT i, repeat('v', 100) FROM generate_series(1, 20000) i",
    );
    let output = assert_equal(&m, &["verify", "--sample", "500"]);
    let rows: u64 = output
        .split_whitespace()
        .nth(1)
        .and_then(|number| number.parse().ok())
        .unwrap();
    assert!((500..1000).contains(&rows), "{output}");
    assert!(output.contains(" rows, 500 keys: equal"), "{output}");
    redis(
        &m,
        &[
            "EVAL",
            "for i = 1, 20000, 2 do redis.call('HSET', 't:' .. i, 'v', 'x') end return 1",
            "0",
        ],
    );
    let (code, output) = walmirror(&m, &["verify", "--sample", "500"]);
    assert_eq!(code, 1, "{output}");
    // A whole table is mended faster by a backfill.
    assert_equal(&m, &["backfill", "--table", "t"]);
    assert_equal(&m, &["verify"]);
    m.check();
}

/// What is held at a time does not depend on the size of the table. `WALMIRROR_VERIFY_ROWS` makes it larger.
#[test]
fn memory_is_bounded() {
    let rows: u64 = std::env::var("WALMIRROR_VERIFY_ROWS").map_or(200_000, |text| text.parse().unwrap());
    let m = Mirror::new();
    m.sql(&format!(
        "CREATE TABLE t (id int PRIMARY KEY, a int, v text); SELECT walmirror.mirror('t'); \
         INSERT INTO t SELECT i, i, repeat(md5(i::text), 3) FROM generate_series(1, {rows}) i"
    ));
    m.start();
    m.settle_within(Duration::from_secs(120 + rows / 20_000));
    let started = std::time::Instant::now();
    let (code, highest_kib) = verify_watched(&m);
    assert_eq!(code, Some(0));
    println!("{rows} rows: {highest_kib} KiB at most, {:?}", started.elapsed());
    assert!((1000..48 * 1024).contains(&highest_kib), "{highest_kib} KiB");
}

/// Runs it: its exit code, and the most memory that it had.
fn verify_watched(m: &Mirror) -> (Option<i32>, u64) {
    let args = m.arguments(&["verify"]);
    let mut child = Sink::command(&args).stdout(Stdio::null()).spawn().unwrap();
    let mut highest_kib = 0;
    loop {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        if let Some(kib) = line.and_then(|line| line.split_whitespace().next()) {
            highest_kib = highest_kib.max(kib.parse::<u64>().unwrap());
        }
        if let Some(status) = child.try_wait().unwrap() {
            return (status.code(), highest_kib);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The story: what differed was proven by an EXEC that read up to 500 values again, and its answer was held whole.
#[test]
fn memory_is_bounded_where_large_values_differ() {
    let m = Mirror::with("CREATE TABLE t (id int PRIMARY KEY, v text); SELECT walmirror.mirror('t')");
    m.settle();
    let value = "x".repeat(2_000_000);
    for id in 1..=100 {
        redis(&m, &["HSET", &format!("t:{id}"), "v", &value]);
    }
    let (code, highest_kib) = verify_watched(&m);
    assert_eq!(code, Some(1));
    println!("{highest_kib} KiB at most");
    assert!((1000..64 * 1024).contains(&highest_kib), "{highest_kib} KiB");
}

/// Somebody has forgotten a prepared transaction, here or in another database of the server: what it did is not committed, so it keeps
/// nothing from being proven.
#[test]
fn an_old_prepared_transaction_keeps_nothing_from_being_proven() {
    let m = Mirror::with(
        "CREATE TABLE t (id int PRIMARY KEY, v int); SELECT walmirror.mirror('t'); INSERT INTO t VALUES (1, 1), (2, 2)",
    );
    let other = Db::create(Arc::clone(&m.db.pg));
    other.sql("CREATE TABLE t (id int PRIMARY KEY, v int)");
    for (db, wrong) in [(&m.db, "7"), (&other, "8")] {
        let name = format!("{}_forgotten", db.name);
        db.connect()
            .batch_execute(&format!(
                "BEGIN; INSERT INTO t VALUES (3, 3); PREPARE TRANSACTION '{name}'"
            ))
            .unwrap();
        redis(&m, &["HSET", "t:1", "v", wrong]);
        let (code, output) = walmirror(&m, &["verify", "--timeout", "5s"]);
        db.connect()
            .batch_execute(&format!("ROLLBACK PREPARED '{name}'"))
            .unwrap();
        assert_eq!(code, 1, "{output}");
    }
}

/// The story: who applies a subscription says that he is idle while he is at a COMMIT PREPARED that waits for a standby, so what this
/// transaction did was in Redis, invisible, and called a key without a row.
#[test]
fn a_commit_prepared_of_a_subscription_is_no_difference() {
    let m = Mirror::alone("");
    if m.db.pg.version() < 15 {
        println!("no subscription takes prepared transactions before 15");
        return;
    }
    m.sql("CREATE TABLE t (id int PRIMARY KEY); SELECT walmirror.mirror('t')");
    m.start();
    m.sync();
    // This waits for the end of the backfill.
    assert_equal(&m, &["verify"]);
    let source = Db::create(Arc::clone(&m.db.pg));
    source.sql("CREATE TABLE t (id int PRIMARY KEY); CREATE PUBLICATION p FOR TABLE t");
    source.sql("SELECT pg_create_logical_replication_slot('subscription', 'pgoutput', false, true)");
    let conninfo = m.db.pg.conninfo(&source.name);
    m.sql(&format!(
        "CREATE SUBSCRIPTION s CONNECTION '{conninfo}' PUBLICATION p WITH (create_slot = false, slot_name = 'subscription', \
         copy_data = false, two_phase = true, synchronous_commit = 'on')"
    ));
    source.sql("SET synchronous_commit = local; BEGIN; INSERT INTO t VALUES (1); PREPARE TRANSACTION 'one'");
    wait_for(DEADLINE, "the subscription to have it prepared", || {
        let prepared = "SELECT count(*) FROM pg_prepared_xacts WHERE gid LIKE 'pg_gid%' AND database = current_database()";
        (m.db.value(prepared) == "1").then_some(())
    });
    // Nobody is that standby.
    m.db.pg.configure("synchronous_standby_names = 'nobody'");
    m.db.pg.reload();
    source.commits_wait();
    source.sql("COMMIT PREPARED 'one'");
    wait_for(DEADLINE, "the row to be in Redis", || {
        (!m.redis.hash("t:1").is_empty()).then_some(())
    });
    assert_eq!(m.db.value("SELECT count(*) FROM t"), "0");
    let (code, output) = walmirror(&m, &["verify", "--timeout", "3s"]);
    assert_eq!(code, 2, "{output}");
    m.db.pg.configure("synchronous_standby_names = ''");
    m.db.pg.reload();
    assert_equal(&m, &["verify"]);
    m.sql("DROP SUBSCRIPTION s");
}

/// The story: what `verify --repair` asks for came to a mirror that had just been announced. A transaction had changed the row before that,
/// which is not in the stream, and what was read without it stood in Redis when it had committed.
#[test]
fn what_is_read_again_is_no_older_than_what_was_committed() {
    let m = Mirror::with("CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t VALUES (1, 1), (2, 1)");
    m.sync();
    let writes = |sql: &str| {
        let mut client = m.db.connect();
        client.batch_execute(&format!("BEGIN; {sql}")).unwrap();
        client
    };
    let mut one = writes("UPDATE t SET v = 2 WHERE id = 1");
    let mut other = writes("UPDATE t SET v = 2 WHERE id = 2");
    m.sql("SELECT walmirror.mirror('t')");
    m.know_announced();
    let slot = &m.db.name;
    m.sql(&format!(
        "SELECT pg_logical_emit_message(false, 'walmirror.marker', format('{slot}:reread:%s:3:t:13:t:2', 't'::regclass::oid))"
    ));
    m.sync();
    // Who takes horizons is who reads pending keys.
    m.sql("CREATE TABLE behind (id int PRIMARY KEY); SELECT walmirror.mirror('behind')");
    m.know_announced();
    one.batch_execute("COMMIT").unwrap();
    m.sync();
    // The fill waits for the other one.
    let v = m.redis.hash("t:1").into_iter().find(|(field, _)| field == "v");
    assert!(v.is_none_or(|(_, v)| v == "2"), "a row of before the commit");
    other.batch_execute("COMMIT").unwrap();
    m.settle();
    assert_equal(&m, &["verify"]);
}
