//! Cache mode: what SELECTs bring into Redis, what they do not, and what writes then do.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod announced;
mod flushed;
mod follow;
mod limits;
mod shapes;

use std::collections::BTreeSet;

use postgres::Client;
use walmirror_tests::{DEADLINE, Mirror, wait_for};

/// Captures at once again, so that every query of a test counts.
pub const ALWAYS: &str = "SET walmirror.capture_interval = 0";

/// `c`, cached, 60 rows of which every tenth has grp 0; `p`, partitioned, cached; `o`, not cached.
pub fn setup(m: &Mirror) {
    m.sql(
        "CREATE TABLE c (id int PRIMARY KEY, grp int, name text, v text); \
         INSERT INTO c SELECT i, i % 10, 'name ' || i, repeat('v', 100) FROM generate_series(1, 60) i; \
         CREATE INDEX ON c (grp); \
         CREATE TABLE o (id int PRIMARY KEY, c_id int); INSERT INTO o SELECT i, i FROM generate_series(1, 60) i; \
         CREATE TABLE p (id int, r int, v text, PRIMARY KEY (id, r)) PARTITION BY RANGE (r); \
         CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10); \
         CREATE TABLE p2 PARTITION OF p FOR VALUES FROM (10) TO (20); \
         INSERT INTO p SELECT i, i % 20, 'v' || i FROM generate_series(1, 40) i; \
         CREATE VIEW c_view AS SELECT name, v FROM c WHERE grp = 3; \
         CREATE FUNCTION by_sql(int) RETURNS text LANGUAGE sql STABLE AS 'SELECT v FROM c WHERE id = $1'; \
         CREATE FUNCTION by_plpgsql(int) RETURNS text LANGUAGE plpgsql AS \
           $$ DECLARE r text; BEGIN SELECT v INTO r FROM c WHERE id = $1; RETURN r; END $$",
    );
    m.sql("SELECT walmirror.cache('c'), walmirror.cache('p')");
    m.sql("ANALYZE c, o, p");
}

/// Starts the sink and waits until it knows the labelled tables: what is captured before that is left out.
pub fn start(m: &Mirror) {
    m.start();
    let labelled: i64 =
        m.db.value("SELECT count(*) FROM walmirror.mirrors")
            .parse()
            .unwrap();
    wait_for(DEADLINE, "the sink to know its tables", || {
        let known: i64 = m
            .redis
            .command(&format!("HLEN walmirror:{{{}}}:relations", m.db.name));
        (known == labelled).then_some(())
    });
    m.outlast_announced();
}

/// Everything that was captured so far is in Redis afterwards (the commit of something written flushes what stands before), and what is
/// captured from now on will be.
pub fn sync(m: &Mirror) {
    apply(m);
    m.outlast_announced();
}

/// [`sync`] while somebody is writing since before a table was announced: what is captured is left out.
pub fn apply(m: &Mirror) {
    m.sql("SELECT pg_logical_emit_message(true, 'test', '')");
    m.sync();
    m.know_announced();
}

/// The keys that are not walmirror's own.
pub fn keys(m: &Mirror) -> BTreeSet<String> {
    m.redis.keys().into_iter().collect()
}

/// Removes them, behind the sink's back.
pub fn empty(m: &Mirror) {
    for key in m.redis.keys() {
        let _: i64 = redis::cmd("DEL").arg(key).query(&mut m.redis.connect()).unwrap();
    }
}

/// A session that captures every row it reads.
pub fn session(m: &Mirror) -> Client {
    let mut session = m.db.connect();
    session.batch_execute(ALWAYS).unwrap();
    session
}

/// The keys of rows of `c`.
pub fn c_keys(ids: impl IntoIterator<Item = i32>) -> BTreeSet<String> {
    ids.into_iter().map(|id| format!("c:{id}")).collect()
}

/// Every cached row is whole: all of its columns, as Postgres prints them.
pub fn assert_whole_rows(m: &Mirror) {
    for key in m.redis.keys() {
        let Some(id) = key.strip_prefix("c:") else {
            continue;
        };
        let row =
            m.db.rows(&format!("SELECT id, grp, name, v FROM c WHERE id = {id}"));
        let columns = ["id", "grp", "name", "v"];
        let mut expected: Vec<(String, String)> = columns
            .iter()
            .zip(&row[0])
            .map(|(name, value)| ((*name).to_owned(), value.clone().unwrap()))
            .collect();
        expected.sort();
        assert_eq!(m.redis.hash(&key), expected, "{key}");
    }
}
