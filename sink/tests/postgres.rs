//! `pq` and `replication` against a real server, with the plugin test_decoding.
//!
//! Runs where WALMIRROR_TEST_POSTGRES holds the connection string of a superuser on a server with `wal_level = logical`;
//! without it, the tests do nothing. They make and drop their own slots and tables.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs
)]

use std::time::{Duration, Instant};

use walmirror_proto::Lsn;
use walmirror_sink::pq::{Connection, Copied, ErrorKind, Waker, binary_fields};
use walmirror_sink::replication::{self, Event, Feedback, Stream};
use walmirror_sink::shutdown::Shutdown;
use walmirror_sink::{Class, Error};

const SECOND: Duration = Duration::from_secs(1);

/// The connection string; ends the test where there is none.
macro_rules! server {
    () => {
        match std::env::var("WALMIRROR_TEST_POSTGRES") {
            Ok(conninfo) => conninfo,
            Err(_) => {
                let forbidden = std::env::var("WALMIRROR_NO_SKIP").is_ok_and(|value| value == "1");
                assert!(
                    !forbidden,
                    "WALMIRROR_NO_SKIP=1, and WALMIRROR_TEST_POSTGRES is not set"
                );
                return;
            }
        }
    };
}

fn replication_connection(conninfo: &str) -> Connection {
    Connection::connect(conninfo, &[("replication", "database")]).unwrap()
}

/// A slot with test_decoding, dropped at the end of the test.
struct Slot {
    name: String,
    conninfo: String,
    start: Lsn,
}

impl Slot {
    fn new(conninfo: &str, name: &str) -> Self {
        let mut connection = replication_connection(conninfo);
        let start = replication::create_slot(&mut connection, name, "test_decoding", false).unwrap();
        Self {
            name: name.into(),
            conninfo: conninfo.into(),
            start,
        }
    }

    fn stream(&self) -> Stream {
        let options = [("include-xids", "0"), ("skip-empty-xacts", "1")];
        Stream::start(&self.conninfo, &self.name, Lsn::INVALID, &options, SECOND).unwrap()
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut connection = Connection::connect(&self.conninfo, &[]).unwrap();
        let deadline = Instant::now() + 10 * SECOND;
        while let Err(error) = replication::drop_slot(&mut connection, &self.name) {
            assert!(Instant::now() < deadline, "{error}");
        }
    }
}

fn text_frames(stream: &mut Stream, want: usize) -> Vec<String> {
    let deadline = Instant::now() + 20 * SECOND;
    let mut frames = Vec::new();
    while frames.len() < want {
        assert!(Instant::now() < deadline, "only {frames:?}");
        if let Event::Frame { bytes, .. } = stream.next(SECOND).unwrap() {
            frames.push(String::from_utf8(bytes.to_vec()).unwrap());
        }
    }
    frames
}

#[test]
fn queries_give_text_binary_and_null_values() {
    let conninfo = server!();
    let mut connection = Connection::connect(&conninfo, &[]).unwrap();
    assert!(connection.server_version() >= 140_000);
    let result = connection
        .query("SELECT $1::text || 'ß', NULL, 7::int4", &[Some("a".as_bytes())])
        .unwrap();
    let row = result.rows().next().unwrap();
    assert_eq!(
        (row.text(0), row.get(1), row.parse::<i32>(2)),
        (Some("aß"), None, Some(7))
    );
    assert_eq!(row.get(99), None);
    let result = connection
        .query_binary("SELECT '\\x0001ff'::bytea, 7::int4", &[])
        .unwrap();
    assert_eq!(result.get(0, 0), Some([0, 1, 255].as_slice()));
    assert_eq!(result.get(0, 1), Some([0, 0, 0, 7].as_slice()));
    assert_eq!(connection.simple("SELECT 1; SELECT 2, 3").unwrap().len(), 2);
    let error = connection.query("SELECT * FROM nowhere", &[]).err().unwrap();
    assert!(error.is("42P01"));
    assert_eq!(
        (error.class(), error.severity.as_deref()),
        (Class::Operator, Some("ERROR"))
    );
    assert!(
        connection.query("SELECT 1", &[]).is_ok(),
        "an error leaves the connection usable"
    );
}

#[test]
fn rows_that_are_too_many_bytes_are_not_read() {
    let conninfo = server!();
    let mut connection = Connection::connect(&conninfo, &[]).unwrap();
    let mut read = |rows: &str, most: usize| {
        let sql = "SELECT convert_to(repeat('x', 1000), 'UTF8') FROM (SELECT generate_series(1, $1::int)) s";
        let found = connection.query_binary_up_to(sql, &[Some(rows.as_bytes())], most);
        found.map(|found| {
            found.map(|rows| {
                rows.iter()
                    .map(|row| row.get(0, 0).unwrap().len())
                    .collect::<Vec<_>>()
            })
        })
    };
    assert_eq!(read("3", 3000).unwrap(), Some(vec![1000; 3]));
    // Cancelled: this would take minutes.
    assert_eq!(read("100000000", 3000).unwrap(), None);
    assert_eq!(read("1", 10).unwrap(), Some(vec![1000]));
    assert_eq!(read("0", 10).unwrap(), Some(vec![]));
    assert!(read("x", 10).err().unwrap().is("22P02"));
    assert_eq!(read("2", usize::MAX).unwrap(), Some(vec![1000; 2]));
}

#[test]
fn a_copy_gives_its_rows_and_can_be_left_in_the_middle() {
    let conninfo = server!();
    let mut connection = Connection::connect(&conninfo, &[]).unwrap();
    let sql = "COPY (SELECT decode(lpad(to_hex(i), 8, '0'), 'hex') FROM generate_series(1, 1000) i) TO STDOUT (FORMAT binary)";
    let mut seen = Vec::new();
    for message in connection.copy_out(sql).unwrap() {
        let message = message.unwrap();
        if let Some(mut fields) = binary_fields(&message) {
            seen.push(u32::from_be_bytes(
                fields.next().unwrap().unwrap().unwrap().try_into().unwrap(),
            ));
        }
    }
    assert_eq!(seen, (1..=1000).collect::<Vec<u32>>());

    let started = Instant::now();
    let endless = "COPY (SELECT generate_series(1, 1000000000)) TO STDOUT";
    assert_eq!(
        connection
            .copy_out(endless)
            .unwrap()
            .take(10)
            .map(Result::unwrap)
            .count(),
        10
    );
    assert!(started.elapsed() < 5 * SECOND);
    assert_eq!(connection.query("SELECT 42", &[]).unwrap().text(0, 0), Some("42"));

    let failing = "COPY (SELECT 1 / (5 - i) FROM generate_series(1, 9) i) TO STDOUT";
    let last = connection.copy_out(failing).unwrap().last().unwrap();
    assert!(last.unwrap_err().is("22012"));
    assert!(
        connection
            .copy_out("COPY nowhere TO STDOUT")
            .err()
            .unwrap()
            .is("42P01")
    );
    assert!(connection.copy_out("SELECT 1").is_err());
    assert_eq!(connection.query("SELECT 42", &[]).unwrap().text(0, 0), Some("42"));
}

#[test]
fn a_shutdown_interrupts_a_long_query() {
    let conninfo = server!();
    let shutdown = Shutdown::manual();
    let mut connection = Connection::connect(&conninfo, &[]).unwrap();
    connection.interrupt_with(shutdown.waker().unwrap());
    assert!(connection.query("SELECT 1", &[]).is_ok());
    let started = Instant::now();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        shutdown.request();
    });
    let error = connection.query("SELECT pg_sleep(600)", &[]).err().unwrap();
    assert!(error.is("57014"), "{error}");
    assert!(started.elapsed() < 5 * SECOND);
    thread.join().unwrap();
}

/// Whoever is silent because he works is let work, in a query, in a COPY before its first row, and while a lock is waited for.
#[test]
fn a_query_that_works_may_take_as_long_as_it_likes() {
    let conninfo = server!();
    let mut connection = Connection::connect(&conninfo, &[]).unwrap();
    connection.look_after(&conninfo, SECOND / 10).unwrap();
    connection.query("SELECT pg_sleep(7)", &[]).unwrap();
    let rows = connection
        .copy_out("COPY (SELECT pg_sleep(2)) TO STDOUT (FORMAT binary)")
        .unwrap();
    assert!(rows.map(Result::unwrap).count() >= 1);
    let mut other = Connection::connect(&conninfo, &[]).unwrap();
    other.simple("SELECT pg_advisory_lock(4711)").unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(7 * SECOND);
            other.simple("SELECT pg_advisory_unlock(4711)").unwrap();
        });
        connection.query("SELECT pg_advisory_lock(4711)", &[]).unwrap();
    });
    // A walsender that waits for a transaction.
    other.simple("BEGIN; SELECT pg_current_xact_id()").unwrap();
    let mut replication = replication_connection(&conninfo);
    replication.look_after(&conninfo, SECOND / 10).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(7 * SECOND);
            other.simple("COMMIT").unwrap();
        });
        let slot = "CREATE_REPLICATION_SLOT patient TEMPORARY LOGICAL test_decoding";
        replication.simple(slot).unwrap();
    });
}

#[test]
fn changes_arrive_in_frames_and_feedback_moves_the_slot() {
    let conninfo = server!();
    let slot = Slot::new(&conninfo, "wm_test_frames");
    let mut sql = Connection::connect(&conninfo, &[]).unwrap();
    sql.simple(
        "DROP TABLE IF EXISTS public.wm_frames; CREATE TABLE public.wm_frames (id int PRIMARY KEY, t text)",
    )
    .unwrap();
    sql.simple("INSERT INTO public.wm_frames VALUES (1, 'ä')")
        .unwrap();
    let mut stream = slot.stream();
    let frames = text_frames(&mut stream, 3);
    assert_eq!(frames[0], "BEGIN");
    assert!(
        frames[1].contains("table public.wm_frames: INSERT: id[integer]:1 t[text]:'ä'"),
        "{}",
        frames[1]
    );

    let here: Lsn = sql
        .query("SELECT pg_current_wal_lsn()", &[])
        .unwrap()
        .text(0, 0)
        .unwrap()
        .parse()
        .unwrap();
    assert!(here > slot.start);
    stream
        .feedback(
            Feedback {
                written: here,
                flushed: here,
                applied: here,
            },
            true,
        )
        .unwrap();
    let deadline = Instant::now() + 10 * SECOND;
    loop {
        let _ = stream.next(Duration::from_millis(50)).unwrap();
        let info = replication::slot_info(&mut sql, "wm_test_frames")
            .unwrap()
            .unwrap();
        assert_eq!(
            (info.plugin.as_deref(), info.active),
            (Some("test_decoding"), true)
        );
        if info.confirmed_flush_lsn == Some(here) {
            break;
        }
        assert!(Instant::now() < deadline, "{info:?}");
    }
    stream.close(5 * SECOND).unwrap();
    // The slot is free at once.
    let stream = slot.stream();
    stream.close(5 * SECOND).unwrap();
    sql.simple("DROP TABLE public.wm_frames").unwrap();
}

#[test]
fn a_waker_interrupts_next_and_hold() {
    let conninfo = server!();
    let slot = Slot::new(&conninfo, "wm_test_waker");
    let mut stream = slot.stream();
    let waker: Waker = stream.waker();
    let started = Instant::now();
    waker.wake();
    while !matches!(stream.next(60 * SECOND).unwrap(), Event::Woken) {}
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        waker.wake();
    });
    assert!(stream.hold(60 * SECOND).unwrap());
    thread.join().unwrap();
    assert!(!stream.hold(Duration::from_millis(20)).unwrap());
    assert!(started.elapsed() < 10 * SECOND);
}

// The server ends a stream whose reader is silent for wal_sender_timeout. A reader that may not read, because Redis is
// slow, has to stay connected all the same.
#[test]
fn a_held_stream_is_kept_alive_by_status_updates() {
    let conninfo = server!();
    let _slot = Slot::new(&conninfo, "wm_test_hold");
    let mut sql = Connection::connect(&conninfo, &[]).unwrap();
    sql.simple("DROP TABLE IF EXISTS public.wm_hold; CREATE TABLE public.wm_hold (id int, t text)")
        .unwrap();
    sql.simple("INSERT INTO public.wm_hold SELECT i, repeat('x', 200) FROM generate_series(1, 100000) i")
        .unwrap();
    let conninfo_short = format!("{conninfo} options='-c wal_sender_timeout=1s'");
    let mut stream = Stream::start(
        &conninfo_short,
        "wm_test_hold",
        Lsn::INVALID,
        &[],
        Duration::from_millis(200),
    )
    .unwrap();
    assert!(matches!(
        stream.next(5 * SECOND).unwrap(),
        Event::Frame { .. } | Event::Keepalive { .. }
    ));
    stream.hold(4 * SECOND).unwrap();
    let mut rows = 0;
    let deadline = Instant::now() + 60 * SECOND;
    while rows < 100_000 {
        assert!(Instant::now() < deadline);
        if let Event::Frame { bytes, .. } = stream.next(SECOND).unwrap() {
            rows += usize::from(bytes.starts_with(b"table public.wm_hold: INSERT"));
        }
    }
    // The same, idle: keepalives that want a reply get one.
    let until = Instant::now() + 3 * SECOND;
    while Instant::now() < until {
        assert!(!matches!(
            stream.next(Duration::from_millis(500)).unwrap(),
            Event::End
        ));
    }
    sql.simple("DROP TABLE public.wm_hold").unwrap();
}

#[test]
fn a_terminated_walsender_is_worth_another_try() {
    let conninfo = server!();
    let slot = Slot::new(&conninfo, "wm_test_kill");
    let mut stream = slot.stream();
    let mut sql = Connection::connect(&conninfo, &[]).unwrap();
    sql.simple(
        "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = 'wm_test_kill'",
    )
    .unwrap();
    let error = loop {
        match stream.next(SECOND) {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(error.class(), Class::Retry, "{error}");
    let Error::Postgres(_, source) = &error else {
        panic!("{error}")
    };
    assert!(
        source.is("57P01") || source.kind == ErrorKind::Connection,
        "{error}"
    );
}

#[test]
fn a_busy_a_missing_and_a_doubled_slot_are_told_apart() {
    let conninfo = server!();
    let slot = Slot::new(&conninfo, "wm_test_busy");
    let _stream = slot.stream();
    let start = |name: &str| {
        Stream::start(&conninfo, name, Lsn::INVALID, &[], SECOND)
            .err()
            .unwrap()
    };
    let busy = start("wm_test_busy");
    assert_eq!(busy.class(), Class::Retry, "{busy}");
    let missing = start("wm_test_missing");
    assert_eq!(
        (missing.class(), missing.exit_code()),
        (Class::Operator, 3),
        "{missing}"
    );
    assert_eq!(
        missing.next_command(),
        Some("walmirror init --slot wm_test_missing")
    );
    let mut connection = replication_connection(&conninfo);
    let doubled =
        replication::create_slot(&mut connection, "wm_test_busy", "test_decoding", false).unwrap_err();
    assert_eq!(doubled.class(), Class::Operator, "{doubled}");
    let unlisted =
        replication::create_slot(&mut connection, "wm_test_x", "no_such_plugin", false).unwrap_err();
    // An administrator mends it, on the server: a sink that runs waits for that.
    assert_eq!(unlisted.class(), Class::Access, "{unlisted}");
    assert!(unlisted.next_command().is_some(), "{unlisted}");
    assert!(
        replication::slot_info(&mut connection, "wm_test_missing")
            .unwrap()
            .is_none()
    );
    let system = replication::identify_system(&mut connection).unwrap();
    assert!(system.system_id.parse::<u64>().is_ok() && system.timeline >= 1 && system.database.is_some());
}

#[test]
fn refused_connections_say_why() {
    let conninfo = server!();
    let fail = |extra: &str| {
        Connection::connect(&format!("{conninfo} {extra}"), &[])
            .err()
            .unwrap()
    };
    let error = fail("dbname=no_such_database");
    assert!(error.is("3D000"), "{error:?}");
    let error = fail("user=no_such_role");
    assert_eq!(error.class(), Class::Access, "{error:?}");
    let error = fail("host=/nowhere");
    assert_eq!(
        (error.kind, error.class()),
        (ErrorKind::Connection, Class::Retry),
        "{error:?}"
    );
    let error = fail("sslmode=perhaps");
    assert_eq!(
        (error.kind, error.class()),
        (ErrorKind::Settings, Class::Operator),
        "{error:?}"
    );
    let error = Connection::connect("host=x pass word=geheim", &[]).err().unwrap();
    assert_eq!(error.kind, ErrorKind::Settings, "{error:?}");
    assert!(!error.to_string().contains("geheim"));
    let error = Connection::connect("postgresql://u:ge heim@[h/db", &[])
        .err()
        .unwrap();
    assert_eq!(error.kind, ErrorKind::Settings, "{error:?}");
    assert!(!error.to_string().contains("heim"), "{error}");
    // Two hosts, the first of which cannot be reached.
    let started = Instant::now();
    let host = Connection::connect(&conninfo, &[])
        .unwrap()
        .query("SHOW unix_socket_directories", &[])
        .unwrap();
    let hosts = format!("host=/nowhere,{}", host.text(0, 0).unwrap());
    assert!(Connection::connect(&format!("{conninfo} {hosts}"), &[]).is_ok());
    assert!(started.elapsed() < 5 * SECOND);
}

/// The story: a silent host in a list was waited for twice, the second time in a way that no signal ended.
#[test]
fn a_silent_host_is_paid_for_once_and_the_wait_can_be_ended() {
    let conninfo = server!();
    // The kernel takes connections for it, and nobody answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    let host = Connection::connect(&conninfo, &[])
        .unwrap()
        .query("SHOW unix_socket_directories", &[])
        .unwrap();
    let list = format!(
        "{conninfo} host=127.0.0.1,{} port={port},5432 connect_timeout=2",
        host.text(0, 0).unwrap()
    );
    let started = Instant::now();
    let mut connection = Connection::connect(&list, &[]).unwrap();
    let took = started.elapsed();
    assert!(took >= 2 * SECOND && took < 4 * SECOND, "{took:?}");
    assert!(connection.query("SELECT 1", &[]).is_ok());

    let alone = format!("{conninfo} host=127.0.0.1 port={port} connect_timeout=2");
    let error = Connection::connect(&alone, &[]).err().unwrap();
    assert_eq!(
        (error.kind, error.message.as_str()),
        (ErrorKind::Connection, "no answer from \"127.0.0.1\" in time")
    );
    let refused = format!("{conninfo} host=127.0.0.1,/nowhere port={port},5432 connect_timeout=2");
    let error = Connection::connect(&refused, &[]).err().unwrap().to_string();
    assert!(
        error.contains("/nowhere") && error.contains("no answer from \"127.0.0.1\""),
        "{error}"
    );

    let waker = Waker::new().unwrap();
    let started = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(100));
            waker.wake();
        });
        let patient = format!("{alone} connect_timeout=60");
        let error = Connection::connect_interrupted_with(&patient, &[], waker.clone());
        assert!(error.err().unwrap().message.contains("interrupted"));
    });
    assert!(started.elapsed() < 30 * SECOND);
}

#[test]
fn a_copy_both_times_out_when_nothing_comes() {
    let conninfo = server!();
    let mut connection = replication_connection(&conninfo);
    replication::create_slot(&mut connection, "wm_test_temporary", "test_decoding", true).unwrap();
    connection
        .start_copy_both("START_REPLICATION SLOT wm_test_temporary LOGICAL 0/0")
        .unwrap();
    let mut timeouts = 0;
    while timeouts < 3 {
        if let Copied::Timeout = connection
            .poll_copy_data(Duration::from_millis(20), None)
            .unwrap()
        {
            timeouts += 1;
        }
    }
}
