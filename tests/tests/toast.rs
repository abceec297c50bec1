//! Large values that an UPDATE leaves as they were: the WAL does not have them, and Redis must keep them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use redis::Connection;
use walmirror_tests::{DEADLINE, Mirror, Mode, Proxy, Raise, wait_for};

const TABLES: [&str; 3] = ["h", "j", "s"];

/// A table of each value kind; `doc` and `raw` are out of line.
fn setup(m: &Mirror, rows: u32) {
    for table in TABLES {
        m.sql(&format!(
            "CREATE TABLE {table} (id int PRIMARY KEY, n int DEFAULT 0, doc text, raw bytea, extra jsonb); \
             ALTER TABLE {table} ALTER doc SET STORAGE EXTERNAL, ALTER raw SET STORAGE EXTERNAL; \
             INSERT INTO {table} SELECT i, 0, repeat(md5(i::text), 200), convert_to(repeat(md5(i::text), 150), 'UTF8'), \
               jsonb_build_object('a', i, 'b', repeat('z', 20)) FROM generate_series(1, {rows}) i"
        ));
    }
    m.sql(
        "SELECT walmirror.mirror('h'), walmirror.mirror('j', value => 'json'), \
         walmirror.mirror('s', value => 'string', columns => '{doc}')",
    );
}

fn each(m: &Mirror, statement: &str) {
    for table in TABLES {
        m.sql(&statement.replace("{t}", table));
    }
}

#[test]
fn unchanged_values_stay() {
    let m = Mirror::new();
    setup(&m, 30);
    m.start();
    m.settle();
    for statement in [
        "UPDATE {t} SET n = n + 1",
        "UPDATE {t} SET n = n + 1 WHERE id = 3",
        "UPDATE {t} SET doc = 'short now' WHERE id = 4",
        "UPDATE {t} SET doc = repeat('longer ', 2000), n = 7 WHERE id = 4",
        "UPDATE {t} SET raw = NULL WHERE id = 5",
        "UPDATE {t} SET raw = decode(repeat('00ff', 4000), 'hex') WHERE id = 5",
        "UPDATE {t} SET n = NULL WHERE id BETWEEN 6 AND 9",
        "UPDATE {t} SET extra = NULL WHERE id BETWEEN 8 AND 12",
        "UPDATE {t} SET extra = (SELECT jsonb_object_agg(g, md5(g::text)) FROM generate_series(1, 1000) g) WHERE id = 13",
        "UPDATE {t} SET n = 13 WHERE id = 13",
        "BEGIN; INSERT INTO {t} VALUES (100, 0, repeat('abc', 3000), 'x', '{}'); UPDATE {t} SET n = 1 WHERE id = 100; \
           UPDATE {t} SET n = 2 WHERE id = 100; COMMIT",
        "BEGIN; UPDATE {t} SET doc = repeat('first', 1000) WHERE id = 14; UPDATE {t} SET n = 1 WHERE id = 14; \
           UPDATE {t} SET doc = repeat('second', 1000) WHERE id = 14; UPDATE {t} SET n = 2 WHERE id = 14; COMMIT",
        "BEGIN; SAVEPOINT a; UPDATE {t} SET doc = repeat('lost', 1000) WHERE id = 15; ROLLBACK TO a; \
           UPDATE {t} SET n = 5 WHERE id = 15; COMMIT",
        "BEGIN; DELETE FROM {t} WHERE id = 16; INSERT INTO {t} VALUES (16, 1, repeat('reborn', 1000)); \
           UPDATE {t} SET n = 2 WHERE id = 16; COMMIT",
    ] {
        each(&m, statement);
        m.settle();
    }
}

/// A key whose bytes are out of line themselves: an update that leaves it alone has it only in the old row.
#[test]
fn a_toasted_key() {
    let m = Mirror::with(
        "CREATE TABLE t (k text PRIMARY KEY, n int, doc text); \
         ALTER TABLE t ALTER k SET STORAGE EXTERNAL, ALTER doc SET STORAGE EXTERNAL; \
         SELECT walmirror.mirror('t'); \
         INSERT INTO t SELECT i || repeat('k', 2400), i, repeat(md5(i::text), 200) FROM generate_series(1, 5) i",
    );
    for statement in [
        "UPDATE t SET n = n + 1",
        "UPDATE t SET doc = 'x' WHERE n = 2",
        "UPDATE t SET k = 'moved' || k WHERE n = 3",
        "DELETE FROM t WHERE n = 4",
    ] {
        m.sql(statement);
        m.settle();
    }
}

/// The key is gone when such an update arrives: the row is read again, and never appears in part.
#[test]
fn an_evicted_row_comes_back_whole() {
    let m = Mirror::new();
    setup(&m, 20);
    m.start();
    m.settle();
    for table in TABLES {
        for id in 1..=20 {
            let _: i64 = m.redis.command(&format!("DEL {table}:{id}"));
        }
    }
    watched(&m, 20, || {
        each(&m, "UPDATE {t} SET n = n + 1");
        m.settle();
        // Changed before the row was read again.
        for table in TABLES {
            for id in 1..=20 {
                let _: i64 = m.redis.command(&format!("DEL {table}:{id}"));
            }
        }
        each(&m, "UPDATE {t} SET n = n + 1 WHERE id < 10");
        each(
            &m,
            "UPDATE {t} SET id = id + 100 WHERE id < 5; DELETE FROM {t} WHERE id = 6",
        );
        each(
            &m,
            "UPDATE {t} SET doc = 'whole', raw = '', extra = '{}' WHERE id >= 10",
        );
        m.settle();
    });
}

/// The story: so many rows were read again at once, whatever their size, and each of them was in memory three times. A sink that was killed for
/// that came to the same rows again.
#[test]
fn large_rows_are_read_again_one_by_one() {
    const ROWS: usize = 16;
    let m = Mirror::with(&format!(
        "CREATE TABLE large (id int PRIMARY KEY, n int, doc text); ALTER TABLE large ALTER doc SET STORAGE EXTERNAL; \
         SELECT walmirror.mirror('large'); \
         INSERT INTO large SELECT i, 0, repeat(md5(i::text), 4 << 15) FROM generate_series(1, {ROWS}) i"
    ));
    let keys = || m.redis.keys().into_iter().filter(|key| key.starts_with("large:"));
    for key in keys() {
        m.redis.command::<()>(&format!("UNLINK {key}"));
    }
    let (_, before) = m.sink(|sink| sink.memory());
    m.sql("UPDATE large SET n = 1");
    m.sync();
    wait_for(DEADLINE, "the rows", || (keys().count() == ROWS).then_some(()));
    let (_, peak) = m.sink(|sink| sink.memory());
    assert!(peak < before + (64 << 20), "{} MB", peak >> 20);
    m.settle();
}

/// The story: a transaction that was open when a session began held up every key that was to be read again until it ended, for days where
/// it was prepared and forgotten.
#[test]
fn a_row_comes_back_beside_a_transaction_that_is_older_than_the_session() {
    let m = Mirror::alone("");
    setup(&m, 5);
    m.start();
    m.settle();
    m.sql("CREATE TABLE other (id int PRIMARY KEY)");
    m.sql("BEGIN; INSERT INTO other VALUES (1); PREPARE TRANSACTION 'old'");
    m.sink(|sink| {
        sink.terminate();
        sink.restart();
    });
    m.sync();
    for table in TABLES {
        let _: i64 = m.redis.command(&format!("DEL {table}:3"));
    }
    each(&m, "UPDATE {t} SET n = n + 1 WHERE id = 3");
    m.settle();
    m.sql("COMMIT PREPARED 'old'");
    m.settle();
}

/// The story: a row that changed more often than its marker took to come down the stream was read again and again, and its key was not
/// there for as long as that went on.
#[test]
fn a_row_that_changes_all_the_time_comes_back() {
    let m = Mirror::new();
    setup(&m, 5);
    let link = Proxy::to_socket(m.db.pg.socket());
    let conninfo = format!(
        "host=127.0.0.1 port={} user=postgres dbname={}",
        link.port(),
        m.db.name
    );
    m.start_at(&conninfo, &m.redis.url(), &[], &[]);
    m.settle();
    // Longer than any row stays as it is.
    link.set_both(Mode::Delay(50, 1));
    let done = AtomicBool::new(false);
    watched(&m, 5, || {
        std::thread::scope(|scope| {
            let _end = Raise(&done);
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    each(&m, "UPDATE {t} SET n = n + 1 WHERE id = 3");
                    // A hundred times a second is often enough, and leaves the processors to the others.
                    std::thread::sleep(Duration::from_millis(5));
                }
            });
            for _ in 0..3 {
                for table in TABLES {
                    let _: i64 = m.redis.command(&format!("DEL {table}:3"));
                }
                let all = || (m.redis.keys().len() == 15).then_some(());
                wait_for(DEADLINE, "the keys to be back", all);
            }
        });
    });
    link.heal();
    m.settle();
}

#[test]
fn an_expired_row_comes_back_whole() {
    let m = Mirror::with(
        "CREATE TABLE h (id int PRIMARY KEY, n int, doc text); ALTER TABLE h ALTER doc SET STORAGE EXTERNAL; \
         SELECT walmirror.mirror('h', ttl => '1 hour'); \
         INSERT INTO h SELECT i, 0, repeat(md5(i::text), 200) FROM generate_series(1, 10) i",
    );
    for id in 1..=10 {
        let _: i64 = m.redis.command(&format!("PEXPIRE h:{id} 1"));
    }
    wait_for(DEADLINE, "keys to expire", || {
        m.redis.keys().is_empty().then_some(())
    });
    m.sql("UPDATE h SET n = 1");
    m.settle();
}

/// Updates without the large value meet rows that the backfill has not brought yet.
#[test]
fn updates_meet_a_running_backfill() {
    let m = Mirror::new();
    setup(&m, 1500);
    let done = AtomicBool::new(false);
    watched(&m, 1500, || {
        std::thread::scope(|scope| {
            let _end = Raise(&done);
            m.start();
            for worker in 0..2 {
                let (m, db, done) = (&m, &m.db, &done);
                scope.spawn(move || {
                    let mut client = db.connect();
                    let mut id = worker * 749;
                    for round in 1.. {
                        if done.load(Ordering::Relaxed) {
                            return;
                        }
                        // At the pace of Redis: a marker that is farther and farther behind in the stream is never there.
                        if round % 100 == 0 {
                            m.sync();
                        }
                        id = (id + 37) % 1500 + 1;
                        for table in TABLES {
                            client
                                .batch_execute(&format!("UPDATE {table} SET n = n + 1 WHERE id = {id}"))
                                .unwrap();
                        }
                    }
                });
            }
            let start = Instant::now();
            // As long as it takes for all keys to be there, and a little load after that.
            let all = || (m.redis.keys().len() == 4_500).then_some(());
            wait_for(DEADLINE, "the backfill", all);
            println!("backfilled in {:?}", start.elapsed());
            m.sync();
        });
        m.settle();
    });
}

/// Runs `work` while another thread looks for hashes of `h` that lack a field.
fn watched(m: &Mirror, rows: u32, work: impl FnOnce()) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut redis = m.redis.connect();
            let mut seen = 0;
            while !done.load(Ordering::Relaxed) {
                seen += look(&mut redis, rows);
                // A thousand looks a second, and the rest of a processor for those that are looked at.
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(seen > 0, "nobody looked at a row");
        });
        let end = Raise(&done);
        work();
        drop(end);
        watcher.join().unwrap();
    });
}

fn look(redis: &mut Connection, rows: u32) -> usize {
    let mut pipe = redis::pipe();
    let ids: Vec<u32> = (0..50).map(|_| rand::random_range(1..=rows)).collect();
    for id in &ids {
        pipe.cmd("HKEYS").arg(format!("h:{id}"));
    }
    let replies: Vec<Vec<String>> = pipe.query(redis).unwrap();
    for (id, fields) in ids.iter().zip(&replies) {
        let whole = fields.is_empty() || fields.iter().any(|f| f == "doc");
        assert!(whole, "h:{id} appeared without its large column: {fields:?}");
    }
    replies.iter().filter(|fields| !fields.is_empty()).count()
}
