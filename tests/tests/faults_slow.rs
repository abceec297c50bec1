//! The links between the sink and its two servers are slow, and bring everything, in pieces or late. That costs time and nothing else, until
//! a link is so slow that it cannot be told from a silent one.
//!
//! Links that break are in faults_network.rs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::time::{Duration, Instant};

use walmirror_tests::{
    DEADLINE, Mirror, Mode, POSTGRES_AWAY, Proxy, REDIS_AWAY, SOON_AFTER_SILENCE, Scenario, Setup, Sink, Way,
    wait_for,
};

/// A link that is silent is given up after so long; a busy machine takes its time.
const GIVEN_UP: Duration = Duration::from_secs(15);
const BUSY: Duration = Duration::from_secs(8);

/// Every byte may come alone.
#[test]
fn split_at_every_byte() {
    let s = Scenario::start("split_at_every_byte", Setup::default());
    for link in [&s.redis_link, &s.pg_link] {
        for piece in [1, 7] {
            link.set_both(Mode::Split(piece));
            s.flow();
        }
        link.heal();
    }
    s.finish(&[]);
}

/// A link that is slow, far away, or both, costs time and nothing else: no connection is given up.
#[test]
fn slow_links() {
    let s = Scenario::start(
        "slow_links",
        Setup {
            writers: (1, Duration::from_millis(20)),
            ..Setup::default()
        },
    );
    for link in [&s.redis_link, &s.pg_link] {
        link.set_both(Mode::Delay(20, 30));
        s.flow();
        // 64 kbit/s towards the sink, or from it.
        let way = if std::ptr::eq(link, &s.pg_link) {
            Way::ToClient
        } else {
            Way::ToServer
        };
        s.load.rest();
        s.reach();
        link.heal();
        link.set(way, Mode::Throttle(8_000));
        s.m.sql("UPDATE doc SET body = body || part");
        s.reach();
        link.heal();
        s.load.resume();
    }
    // No connection was given up: that would be a warning.
    s.finish(&[]);
}

/// One byte a second towards the sink, for longer than it waits for a silent server: each byte says that the server is there, however
/// long the whole answer takes.
fn drips_to_the_sink(name: &str, link: fn(&Scenario) -> &Proxy) {
    let s = Scenario::start(name, Setup::default());
    s.silence("3s");
    // The answer to HELLO, which an idle session asks for, and a keepalive have more bytes than come in this time.
    s.load.rest();
    s.reach();
    // Whoever reads tables has connected: a connection that is being made is given up after 10 s.
    s.is_ready(true);
    let (seen, passed) = (s.log().len(), link(&s).passed(Way::ToClient));
    link(&s).set(Way::ToClient, Mode::Throttle(1));
    let dripping = Instant::now();
    s.load.resume();
    s.is_ready(false);
    wait_for(DEADLINE, "the link to drip for long", || {
        s.m.sink(Sink::assert_running);
        (dripping.elapsed() > GIVEN_UP + Duration::from_secs(5)).then_some(())
    });
    s.is_ready(false);
    let passed = link(&s).passed(Way::ToClient) - passed;
    assert!(passed > GIVEN_UP.as_secs(), "only {passed} bytes have dripped");
    link(&s).heal();
    s.recovers();
    let log = s.log();
    assert!(!log[seen..].contains(" streaming slot="), "{log}");
    // No connection was given up: that would be a warning.
    s.finish(&[]);
}

#[test]
fn what_drips_from_redis_is_waited_for() {
    drips_to_the_sink("what_drips_from_redis_is_waited_for", |s| &s.redis_link);
}

#[test]
fn what_drips_from_postgres_is_waited_for() {
    drips_to_the_sink("what_drips_from_postgres_is_waited_for", |s| &s.pg_link);
}

/// One byte a second from the sink: a server answers whole questions, so it is as if it were silent. What dripped of a batch is not
/// applied, nor what is still on its way when a new session has begun.
#[test]
fn what_drips_from_the_sink_is_given_up() {
    let s = Scenario::start("what_drips_from_the_sink_is_given_up", Setup::default());
    let silence = Duration::from_secs(3);
    s.silence("3s");
    // A question of 15 bytes, as MULTI is, may just be answered.
    let links = [
        (&s.redis_link, "no answer within 15 s", GIVEN_UP * 2),
        (&s.pg_link, "the server is silent", silence),
    ];
    for (link, given_up, time) in links {
        let seen = s.log().len();
        link.set(Way::ToServer, Mode::Throttle(1));
        let dripping = Instant::now();
        s.is_ready(false);
        s.said(given_up, seen);
        assert!(dripping.elapsed() < time + BUSY, "{:?}", dripping.elapsed());
        link.heal();
        // The session after it may have begun, and what it has asked drips.
        s.recovers_within(SOON_AFTER_SILENCE);
    }
    s.finish(&[&REDIS_AWAY[..], &POSTGRES_AWAY, &["the server is silent"]].concat());
}

/// A mirror behind two links, which have nothing on them but it.
fn behind_links(m: &Mirror, args: &[&str]) -> (Proxy, Proxy) {
    let redis = Proxy::to_port(m.redis.port());
    let pg = Proxy::to_socket(m.db.pg.socket());
    let conninfo = format!(
        "host=127.0.0.1 port={} user=postgres dbname={}",
        pg.port(),
        m.db.name
    );
    let url = format!("redis://127.0.0.1:{}/0", redis.port());
    m.start_at(&conninfo, &url, args, &[]);
    m.settle();
    (redis, pg)
}

/// No session but the first one.
#[track_caller]
fn one_session(m: &Mirror) {
    let log = m.sink(|sink| sink.output());
    assert_eq!(log.matches("streaming slot=").count(), 1, "{log}");
}

/// The story: values that stand side by side came in one command of up to 128, which Redis answers when it has all of it. Over a slow link
/// that was longer than an answer is waited for, and the next session sent the same again, for good.
#[test]
fn many_values_get_through_a_slow_link() {
    let m = Mirror::new();
    m.sql("CREATE TABLE t (id int PRIMARY KEY, v text); SELECT walmirror.mirror('t', value => 'json')");
    let (redis, _pg) = behind_links(&m, &[]);
    redis.set(Way::ToServer, Mode::Throttle(8_000));
    m.sql("INSERT INTO t SELECT i, repeat(md5(i::text), 50) FROM generate_series(1, 130) i");
    m.sync_within(2 * DEADLINE);
    one_session(&m);
    redis.heal();
    m.check();
}

/// The story: a part of a large transaction was queued, the rest came slowly, and Redis closed the connection, on which nothing was said
/// for its `timeout`. The next session fared no better.
#[test]
fn redis_hears_of_a_transaction_that_comes_slowly() {
    let m = Mirror::new();
    m.sql("CREATE TABLE t (id int PRIMARY KEY, v text); SELECT walmirror.mirror('t')");
    let (_redis, pg) = behind_links(&m, &["--batch-bytes", "65536", "--streaming", "off"]);
    let _: String = m.redis.command("CONFIG SET timeout 2");
    // Of what a login may not do, nothing is needed for this.
    let _: String = m.redis.command("ACL SETUSER default -ping");
    pg.set(Way::ToClient, Mode::Throttle(15_000));
    m.sql("INSERT INTO t SELECT i, repeat(md5(i::text), 32) FROM generate_series(1, 250) i");
    m.sync_within(2 * DEADLINE);
    one_session(&m);
    pg.heal();
    m.check();
}

/// The story: while its queue is full the sink reads nothing, so it does not hear that Postgres asks whether it is there. It has to say so
/// by itself, whatever `--status-interval` says.
#[test]
fn postgres_hears_from_a_sink_that_reads_nothing() {
    let m = Mirror::alone("wal_sender_timeout = 2s");
    m.sql("CREATE TABLE t (id int PRIMARY KEY, v text); SELECT walmirror.mirror('t')");
    let (_redis, pg) = behind_links(&m, &["--status-interval", "1h", "--streaming", "off"]);
    m.sql("INSERT INTO t SELECT i, 'v' FROM generate_series(1, 10) i");
    m.sync();
    let mut redis = m.redis.connect();
    let _: String = redis::cmd("CLIENT")
        .arg("PAUSE")
        .arg(9_000)
        .arg("WRITE")
        .query(&mut redis)
        .unwrap();
    m.sql("INSERT INTO t SELECT i, repeat('v', 1000) FROM generate_series(100, 40000) i");
    wait_for(DEADLINE, "the sink to read no more", || {
        let before = pg.passed(Way::ToClient);
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(300) && pg.passed(Way::ToClient) < before + 1_000 {
            std::thread::yield_now();
        }
        (before > 8_000_000 && pg.passed(Way::ToClient) < before + 1_000).then_some(())
    });
    m.sync();
    one_session(&m);
    m.check();
}
