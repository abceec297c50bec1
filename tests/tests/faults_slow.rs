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
    DEADLINE, Mode, POSTGRES_AWAY, Proxy, REDIS_AWAY, SOON_AFTER_SILENCE, Scenario, Setup, Sink, Way,
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
