//! Tables that are filled while others write, read, rename, lock and compact them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use walmirror_tests::{DEADLINE, Mirror, Mode, Proxy, Raise, Sink, Way, wait_for};

#[test]
fn a_table_mirrored_under_load() {
    let m = Mirror::new();
    m.sql("CREATE TABLE first (id int PRIMARY KEY); SELECT walmirror.mirror('first')");
    m.sql("CREATE TABLE t (id int PRIMARY KEY, n int, note text); INSERT INTO t SELECT i, 0, 'x' FROM generate_series(1, 30000) i");
    m.start();
    m.settle();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _end = Raise(&done);
        for worker in 0..2u32 {
            let (m, done) = (&m, &done);
            scope.spawn(move || {
                let mut client = m.db.connect();
                let mut i = worker;
                while !done.load(Ordering::Relaxed) {
                    i += 2;
                    let id = i * 37 % 30_000 + 1;
                    let sql = match i % 5 {
                        0 => format!("DELETE FROM t WHERE id = {id}"),
                        1 => format!(
                            "INSERT INTO t VALUES ({id}, {i}) ON CONFLICT (id) DO UPDATE SET n = excluded.n"
                        ),
                        2 => format!("UPDATE t SET id = id + 50000 WHERE id = {id}"),
                        _ => format!("UPDATE t SET n = n + 1 WHERE id = {id}"),
                    };
                    let _ = client.batch_execute(&sql);
                }
            });
        }
        for label in ["", ", value => 'json'", ", key => 'u:{id}', columns => '{n}'"] {
            m.sql(&format!("SELECT walmirror.mirror('t'{label})"));
            m.sync();
        }
    });
    m.settle();
}

/// The story: each table waited anew for all transactions that ran when its turn came, so beside long ones that overlap, thousands of
/// tables took hours.
#[test]
fn a_table_waits_only_for_who_was_writing_when_it_was_announced() {
    let m = Mirror::with("CREATE TABLE other (id int PRIMARY KEY)");
    let mut before = m.db.connect();
    before
        .batch_execute("BEGIN; INSERT INTO other VALUES (1)")
        .unwrap();
    for table in ["a", "b", "c"] {
        m.sql(&format!("CREATE TABLE {table} (id int PRIMARY KEY); INSERT INTO {table} VALUES (1); SELECT walmirror.mirror('{table}')"));
    }
    m.know_announced();
    let mut behind = m.db.connect();
    behind
        .batch_execute("BEGIN; INSERT INTO other VALUES (2)")
        .unwrap();
    assert!(m.redis.keys().is_empty());
    before.batch_execute("COMMIT").unwrap();
    wait_for(DEADLINE, "the tables", || {
        m.sink(Sink::assert_running);
        (m.redis.keys().len() == 3).then_some(())
    });
    // This one waits, and nobody else does.
    m.sql("CREATE TABLE d (id int PRIMARY KEY); INSERT INTO d VALUES (1); SELECT walmirror.mirror('d')");
    m.know_announced();
    let mut last = m.db.connect();
    last.batch_execute("BEGIN; INSERT INTO other VALUES (3)").unwrap();
    assert_eq!(m.redis.keys().len(), 3);
    behind.batch_execute("COMMIT").unwrap();
    wait_for(DEADLINE, "the last table", || {
        (m.redis.keys().len() == 4).then_some(())
    });
    last.batch_execute("COMMIT").unwrap();
    m.settle();
}

/// The story: the stream was a minute behind, and a backfill moved two chunks, or one table, in each minute. And a table that took hours to
/// be read had all others wait for its end.
#[test]
fn tables_are_read_in_turns_also_where_the_stream_is_behind() {
    let m = Mirror::with("CREATE TABLE other (id int PRIMARY KEY)");
    let mut before = m.db.connect();
    before
        .batch_execute("BEGIN; INSERT INTO other VALUES (1)")
        .unwrap();
    for (table, rows) in [("a", 4_000), ("b", 40_000), ("c", 1)] {
        m.sql(&format!(
            "CREATE TABLE {table} (id int PRIMARY KEY, v text); SELECT walmirror.mirror('{table}'); \
             INSERT INTO {table} SELECT i, repeat(md5(i::text), 32) FROM generate_series(1, {rows}) i"
        ));
    }
    m.know_announced();
    m.sync();
    // Those were written by the stream. What they are filled with is more than the sink holds.
    let slot = "FROM pg_replication_slots WHERE slot_name = current_database()";
    let walsender = m.db.value(&format!("SELECT active_pid {slot}"));
    let signal = |signal: &str| {
        let status = std::process::Command::new("kill")
            .args([signal, &walsender])
            .status();
        assert!(status.unwrap().success());
    };
    signal("-STOP");
    before.batch_execute("COMMIT").unwrap();
    for table in ["a", "b", "c"] {
        wait_for(DEADLINE, format!("the table {table} to be begun"), || {
            m.sink(Sink::assert_running);
            let begun = format!("backfill begins table=\"public.{table}\"");
            m.sink(|sink| sink.output()).contains(&begun).then_some(())
        });
    }
    signal("-CONT");
    wait_for(DEADLINE, "the tables to be complete", || {
        let log = m.sink(|sink| sink.output());
        (log.matches("the keys of the table are complete").count() == 3).then_some(())
    });
    m.check();
    let memory = m.sink(Sink::memory_max);
    assert!(memory < 64 << 20, "the sink took {memory} bytes");
    println!("the sink took {} MiB", memory >> 20);
}

/// The story: a link to Redis was full of changes of more keys than the gate remembers, and each chunk of a backfill was dropped, as a few of
/// them were let go of before all of its rows were planned. So a table was not filled before the load had ended.
#[test]
fn a_table_is_filled_while_redis_is_the_bottleneck() {
    const KEYS: usize = 300_000;
    let m = Mirror::new();
    m.sql(&format!(
        "CREATE TABLE busy (id int PRIMARY KEY, n int); INSERT INTO busy SELECT i, 0 FROM generate_series(1, {KEYS}) i; \
         SELECT walmirror.mirror('busy'); CREATE TABLE t (id int PRIMARY KEY, v text); \
         INSERT INTO t SELECT i, repeat(md5(i::text), 3) FROM generate_series(1, 20000) i"
    ));
    let link = Proxy::to_port(m.redis.port());
    let url = format!("redis://127.0.0.1:{}", link.port());
    m.start_at(&m.db.pg.conninfo(&m.db.name), &url, &[], &[]);
    let said = |text: &str| {
        wait_for(DEADLINE, format!("{text:?} to be said"), || {
            m.sink(Sink::assert_running);
            m.sink(|sink| sink.output()).contains(text).then_some(())
        });
    };
    said("the keys of the table are complete");
    link.set(Way::ToServer, Mode::Throttle(4_000_000));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _end = Raise(&done);
        // The stream is behind all the time, and never far.
        scope.spawn(|| {
            let (mut client, mut keys) = (m.db.connect(), (0..KEYS).step_by(1000).cycle());
            while !done.load(Ordering::Relaxed) {
                if m.db.lsn().0.saturating_sub(m.progress().unwrap().0) > 8 << 20 {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                }
                let first = keys.next().unwrap();
                let update = format!("UPDATE busy SET n = n + 1 WHERE id > {first} AND id <= {first} + 1000");
                client.batch_execute(&update).unwrap();
            }
        });
        m.sql("SELECT walmirror.mirror('t')");
        said("backfill has read the table table=\"public.t\"");
    });
    link.heal();
    m.settle();
}

/// A table has another name, another table has its name, or there is none any more, and the backfill reads on by the name that it had.
#[test]
fn tables_are_renamed_and_dropped_while_they_are_filled() {
    let m = Mirror::with("");
    let fill = |name: &str| {
        m.sql(&format!(
            "CREATE TABLE {name} (id int PRIMARY KEY, v text); \
             INSERT INTO {name} SELECT i, repeat(md5(i::text), 4) FROM generate_series(1, 150000) i; SELECT walmirror.mirror('{name}')"
        ));
    };
    fill("big");
    for _ in 0..20 {
        m.sql("ALTER TABLE big RENAME TO other");
        m.sql("ALTER TABLE other RENAME TO big");
    }
    fill("gone");
    m.sql("DROP TABLE gone");
    fill("swapped");
    m.sql("BEGIN; ALTER TABLE swapped RENAME TO old; CREATE TABLE swapped (LIKE old INCLUDING ALL); COMMIT");
    m.settle();
    m.check();
    assert_eq!(m.redis.keys().len(), 300_000);
}

/// VACUUM FULL and CLUSTER move rows to blocks that were read already, and say so nowhere.
#[test]
fn a_table_is_compacted_while_it_is_filled() {
    let m = Mirror::with("");
    m.sql(
        "CREATE TABLE big (id int PRIMARY KEY, v text); \
         INSERT INTO big SELECT i, repeat(md5(i::text), 4) FROM generate_series(1, 300000) i; DELETE FROM big WHERE id <= 200000",
    );
    m.sql("SELECT walmirror.mirror('big')");
    for _ in 0..3 {
        m.sql("VACUUM FULL big");
    }
    m.settle();
    m.check();
    assert_eq!(m.redis.keys().len(), 100_000);
}

/// The story: when the catalog was to be compared, a table that somebody had locked, and any transaction that was running, held up all that is
/// read of others.
#[test]
fn a_locked_table_holds_up_itself_alone() {
    let m = Mirror::with(
        "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE other (id int PRIMARY KEY); \
         INSERT INTO a VALUES (1); INSERT INTO t VALUES (1, 'v'); SELECT walmirror.mirror('a'), walmirror.mirror('t')",
    );
    m.settle();
    let begin = |sql: &str| {
        let mut client = m.db.connect();
        client.batch_execute(&format!("BEGIN; {sql}")).unwrap();
        client
    };
    let mut before = begin("INSERT INTO other VALUES (1)");
    m.sql("CREATE TABLE b (id int PRIMARY KEY); INSERT INTO b VALUES (1); SELECT walmirror.mirror('b')");
    m.know_announced();
    let mut lock_b = begin("LOCK TABLE b");
    before.batch_execute("COMMIT").unwrap();
    let mut lock_a = begin("LOCK TABLE a");
    m.sql(
        "ALTER EVENT TRIGGER walmirror_ddl_command_end DISABLE; ALTER TABLE t ADD w int; \
         ALTER EVENT TRIGGER walmirror_ddl_command_end ENABLE ALWAYS; INSERT INTO t VALUES (2, 'v', 2)",
    );
    m.sync();
    let is_told = |table: &str| {
        wait_for(DEADLINE, "the sink to tell of the lock", || {
            let told = |line: &str| line.contains("the table is locked") && line.contains(table);
            m.sink(|sink| sink.output().lines().any(told)).then_some(())
        });
    };
    is_told("public.b");
    is_told("public.a");
    lock_b.batch_execute("ROLLBACK").unwrap();
    wait_for(DEADLINE, "the table that is no longer locked", || {
        m.redis.keys().contains(&"b:1".to_owned()).then_some(())
    });
    m.sink(|sink| assert!(!sink.output().contains("does not fit it")));
    lock_a.batch_execute("ROLLBACK").unwrap();
    m.settle();
}

/// The story: an ALTER TABLE that waits for a long SELECT was taken for one that may be committing, so that no label was looked at as long as it
/// waited, and it was not told of as the one that all who come later wait for.
#[test]
fn who_waits_for_a_lock_holds_up_that_table_alone() {
    let m = Mirror::with(
        "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE t (id int PRIMARY KEY, v text); \
         INSERT INTO a VALUES (1); INSERT INTO t VALUES (1, 'v'); SELECT walmirror.mirror('a'), walmirror.mirror('t')",
    );
    m.settle();
    m.sink(Sink::kill);
    let seen = m.sink(|sink| sink.output()).len();
    std::thread::scope(|scope| {
        let mut reader = m.db.connect();
        reader.batch_execute("BEGIN; SELECT FROM a").unwrap();
        let mut locker = m.db.connect();
        scope.spawn(move || locker.batch_execute("BEGIN; LOCK TABLE a; COMMIT").unwrap());
        wait_for(DEADLINE, "the lock to be waited for", || {
            let waits = "SELECT count(*) FROM pg_locks WHERE relation = 'a'::regclass AND NOT granted";
            (m.db.value(waits) == "1").then_some(())
        });
        // Only the catalog tells of this one.
        m.sql(
            "ALTER EVENT TRIGGER walmirror_ddl_command_end DISABLE; ALTER TABLE t ADD w int DEFAULT 7; \
             ALTER EVENT TRIGGER walmirror_ddl_command_end ENABLE ALWAYS",
        );
        m.sink(Sink::restart);
        let log = || m.sink(|sink| sink.output()).split_off(seen);
        // Its rows wait for all that ran then.
        let is_begun = |line: &str| line.contains("mirroring a table") && line.contains("public.t");
        wait_for(DEADLINE, "the other table to be begun anew", || {
            log().lines().any(is_begun).then_some(())
        });
        let log = log();
        let told = log.lines().find(|line| line.contains("the table is locked"));
        assert!(
            told.is_some_and(|line| line.contains("public.a") && line.contains("state active")),
            "{log}"
        );
        reader.batch_execute("COMMIT").unwrap();
    });
    m.settle();
}

/// Commits wait for no standby any more, also where the test fails.
struct LetGo<'m>(&'m Mirror);

impl<'m> LetGo<'m> {
    /// Until this goes, they wait for one that there is not.
    fn later(m: &'m Mirror) -> Self {
        m.db.pg.configure("synchronous_standby_names = 'nobody'");
        m.db.pg.reload();
        let end = Self(m);
        m.db.commits_wait();
        end
    }
}

impl Drop for LetGo<'_> {
    fn drop(&mut self) {
        self.0.db.pg.configure("synchronous_standby_names = ''");
        self.0.db.pg.reload();
    }
}

/// The story: a large transaction was applied while its COMMIT waited for a standby, so it stood in every snapshot, and the gate had let go
/// of it. A table that was read then was called complete without a single key, and all of it was read again and again by its keys.
#[test]
fn a_table_is_not_complete_while_a_large_commit_waits_for_a_standby() {
    let m = Mirror::alone("");
    m.sql(
        "CREATE TABLE other (id int PRIMARY KEY); CREATE TABLE t (id int PRIMARY KEY); SELECT walmirror.mirror('t'); \
         CREATE TABLE c (id int PRIMARY KEY); INSERT INTO c SELECT generate_series(1, 500)",
    );
    m.start();
    m.settle();
    let mut before = m.db.connect();
    before
        .batch_execute("SET synchronous_commit = local; BEGIN; INSERT INTO other VALUES (1)")
        .unwrap();
    m.sql("SELECT walmirror.mirror('c')");
    m.know_announced();
    let end = LetGo::later(&m);
    std::thread::scope(|scope| {
        scope.spawn(|| m.sql("INSERT INTO t SELECT generate_series(1, 200000)"));
        let _end = end;
        wait_for(DEADLINE, "the rows whose commit waits", || {
            m.redis.command::<bool>("EXISTS t:200000").then_some(())
        });
        // A snapshot ends behind the last transaction that is over.
        let mut later = m.db.connect();
        later
            .batch_execute("SET synchronous_commit = local; SELECT pg_current_xact_id()")
            .unwrap();
        // Now the table may be read.
        before.batch_execute("COMMIT").unwrap();
        wait_for(DEADLINE, "the sink to say for whom it waits", || {
            let output = m.sink(|sink| sink.output());
            output
                .contains("the transactions that the gate has forgotten")
                .then_some(())
        });
        let output = m.sink(|sink| sink.output());
        let is_complete = |line: &str| line.contains("complete") && line.contains("public.c");
        assert!(!output.lines().any(is_complete), "{output}");
        assert!(!m.redis.keys().iter().any(|key| key.starts_with("c:")));
        let pending = format!("walmirror:{{{}}}:pending", m.db.name);
        assert!(m.redis.hash(&pending).is_empty());
    });
    m.settle();
}

/// The story: it was the last transaction that had begun, and a snapshot does not list who is behind the last that is over. So the catalog
/// was looked at too early, and the table was taken for one that had lost its label, for good.
#[test]
fn a_label_counts_whose_commit_waits_for_a_standby() {
    let m = Mirror::alone("");
    m.sql("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 100)");
    m.start();
    m.settle();
    let end = LetGo::later(&m);
    std::thread::scope(|scope| {
        scope.spawn(|| m.sql("SELECT walmirror.mirror('t')"));
        let end = end;
        let said = |text: &str| {
            wait_for(DEADLINE, format!("{text:?} to be said"), || {
                let output = m.sink(|sink| sink.output());
                assert!(!output.contains("no longer mirrored"), "{output}");
                output.contains(text).then_some(())
            });
        };
        said("mirroring a table table=\"public.t\"");
        said("the list of mirrored tables waits for a transaction that may be committing");
        drop(end);
    });
    m.settle();
    let log = m.sink(|sink| sink.output());
    assert!(!log.contains("no longer mirrored"), "{log}");
}
