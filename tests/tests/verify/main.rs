//! `walmirror verify` and `walmirror backfill`: every true difference is found and mended while writes go on, and nothing
//! that is merely on its way is called one.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod backfill;
mod differences;
mod progress;
mod unknown;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use postgres::error::SqlState;
use walmirror_tests::{Mirror, Raise, Sink};

/// Stands in every value: no output may hold it.
pub const CANARY: &str = "canary-in-a-row";

/// Runs a command against both servers: its exit code and what it printed.
pub fn walmirror(m: &Mirror, args: &[&str]) -> (i32, String) {
    let all = [args, &["--log-level", "warn"][..]].concat();
    let (code, output) = Sink::run(&m.arguments(&all), Duration::from_secs(120));
    println!("{args:?}: {code:?}\n{output}");
    assert!(!output.contains(CANARY), "a value was printed");
    (code.expect("an exit code"), output)
}

/// Runs a command that must find nothing, or mend it: what it printed.
#[track_caller]
pub fn assert_equal(m: &Mirror, args: &[&str]) -> String {
    let (code, output) = walmirror(m, args);
    assert_eq!(code, 0, "{output}");
    output
}

/// Somebody else's command in Redis.
pub fn redis(m: &Mirror, words: &[&str]) {
    let mut command = redis::cmd(words[0]);
    command.arg(&words[1..]).exec(&mut m.redis.connect()).unwrap();
}

/// Runs statements again and again in threads of their own while `f` runs.
pub fn while_writing<T>(m: &Mirror, statements: &[&str], f: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for statement in statements {
            let mut client = m.db.connect();
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    match client.batch_execute(statement) {
                        // Loads that meet in the same rows may do so in any order.
                        Err(error) if error.code() == Some(&SqlState::T_R_DEADLOCK_DETECTED) => {}
                        result => result.unwrap(),
                    }
                }
            });
        }
        let _end = Raise(&stop);
        f()
    })
}

/// All value kinds, a composite key, an expiring table, a partitioned one; rows up to 1000 are left alone by the load.
pub fn many_kinds() -> Mirror {
    let m = Mirror::with(&format!(
        "CREATE TABLE h (id int PRIMARY KEY, v text, n int); CREATE TABLE j (a text, b int, v text, n int, PRIMARY KEY (a, b)); \
         CREATE TABLE s (id int PRIMARY KEY, v text); CREATE TABLE e (id int PRIMARY KEY, v text); \
         CREATE TABLE p (id int PRIMARY KEY, v text, n int) PARTITION BY RANGE (id); \
         CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (1000); \
         CREATE TABLE p2 PARTITION OF p FOR VALUES FROM (1000) TO (100000); \
         INSERT INTO h SELECT i, '{CANARY} ' || i, 0 FROM generate_series(1, 5000) i; \
         INSERT INTO j SELECT 'x:' || i, i, '{CANARY} ' || i, 0 FROM generate_series(1, 5000) i; \
         INSERT INTO s SELECT i, '{CANARY} ' || i FROM generate_series(1, 5000) i; INSERT INTO s VALUES (90000, NULL); \
         INSERT INTO e SELECT id, v FROM s WHERE id <= 100; INSERT INTO p SELECT * FROM h; \
         SELECT walmirror.mirror('h'), walmirror.mirror('j', value => 'json'), \
                walmirror.mirror('s', value => 'string', columns => '{{v}}'), \
                walmirror.mirror('e', ttl => '1 day'), walmirror.mirror('p', key => 'part/{{id}}')"
    ));
    m.settle();
    m
}
