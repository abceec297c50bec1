//! The first signal ends each command, also while a server that it needs is silent: it takes the connection, and says nothing. The second
//! one ends a sink that waits for such a server.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use walmirror_tests::{DEADLINE, Db, Mirror, Pg, Redis, Signal, Sink, wait_for};

/// A command may take so long to end: that is far less than the five seconds or more for which it would wait for an answer.
const SOON: Duration = Duration::from_secs(4);

/// Takes connections, reads nothing, and never answers.
struct Silent(TcpListener);

impl Silent {
    fn new() -> Silent {
        Silent(TcpListener::bind("127.0.0.1:0").unwrap())
    }

    fn port(&self) -> u16 {
        self.0.local_addr().unwrap().port()
    }

    fn postgres(&self) -> String {
        format!("host=127.0.0.1 port={} dbname=x user=x", self.port())
    }

    fn redis(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port())
    }
}

/// Starts the command, has it connect, sends the signal: the exit code, and what was printed.
fn ended_by(signal: Signal, silent: &Silent, args: &[&str]) -> (Option<i32>, String) {
    let mut sink = Sink::start(args);
    let _connection: (TcpStream, _) = silent.0.accept().unwrap();
    let asked = Instant::now();
    sink.signal(signal);
    let status = sink.wait(DEADLINE);
    let (took, output) = (asked.elapsed(), sink.output());
    assert!(took < SOON, "{args:?} took {took:?}: {output}");
    (status.code(), output)
}

/// The commands that somebody waits for, and what each is called with.
const COMMANDS: [&[&str]; 6] = [
    &["doctor"],
    &["status"],
    &["init"],
    &["verify"],
    &["backfill"],
    &["wait"],
];

#[test]
fn while_postgres_is_silent() {
    let (silent, redis) = (Silent::new(), Redis::start());
    let servers = ["--postgres", &silent.postgres(), "--redis", &redis.url()];
    for command in COMMANDS {
        for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130)] {
            let args = [command, &servers].concat();
            let (ended, output) = ended_by(signal, &silent, &args);
            assert_eq!(ended, Some(code), "{args:?}: {output}");
            assert!(output.contains("stopped by a signal"), "{args:?}: {output}");
        }
    }
    // Both are meant to be ended by a signal.
    for args in [
        &[&["tail"], &servers[..2]].concat(),
        &[&["run"], &servers[..]].concat(),
    ] {
        let (ended, output) = ended_by(Signal::TERM, &silent, args);
        assert_eq!(ended, Some(0), "{args:?}: {output}");
    }
}

#[test]
fn while_redis_is_silent() {
    let silent = Silent::new();
    let db = Db::create(Pg::shared());
    let postgres = db.pg.conninfo(&db.name);
    let servers = [
        "--postgres",
        &postgres,
        "--redis",
        &silent.redis(),
        "--slot",
        &db.name,
    ];
    for command in COMMANDS {
        let args = [command, &servers].concat();
        let (ended, output) = ended_by(Signal::TERM, &silent, &args);
        assert_eq!(ended, Some(143), "{args:?}: {output}");
    }
    let (ended, output) = ended_by(Signal::TERM, &silent, &[&["run"], &servers[..]].concat());
    assert_eq!(ended, Some(0), "{output}");
}

/// The server goes on making a slot that nobody waits for, so this is put in order first.
#[test]
fn while_the_slot_is_being_made() {
    let (db, redis) = (Db::create(Pg::shared()), Redis::start());
    let mut other = db.connect();
    let mut open = other.transaction().unwrap();
    open.execute("SELECT pg_current_xact_id()", &[]).unwrap();
    let postgres = db.pg.conninfo(&db.name);
    let args = [
        "init",
        "--postgres",
        &postgres,
        "--redis",
        &redis.url(),
        "--slot",
        &db.name,
    ];
    let mut sink = Sink::start(&args);
    let making = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'CREATE_REPLICATION_SLOT%'";
    let count = || db.rows(making).len();
    wait_for(DEADLINE, "the slot to be waited for", || {
        (count() == 1).then_some(())
    });
    sink.signal(Signal::TERM);
    let status = sink.wait(SOON);
    let output = sink.output();
    assert_eq!(status.code(), Some(143), "{output}");
    assert!(
        output.contains("before the slot") && output.contains("next: walmirror init"),
        "{output}"
    );
    wait_for(SOON, "the server to give it up", || (count() == 0).then_some(()));
    assert!(
        db.rows("SELECT FROM pg_replication_slots WHERE slot_name = current_database()")
            .is_empty()
    );
}

/// Somebody does not want to wait for a server that says nothing: the second signal, whichever it is, ends the sink at once. Nothing is
/// lost by that.
#[test]
fn the_second_one_ends_a_sink_at_once() {
    let mut m = Mirror::with("CREATE TABLE t (id int PRIMARY KEY); SELECT walmirror.mirror('t')");
    // A table that was not filled when the sink ended would be filled by the next one, whatever the position says.
    m.filled();
    let pairs = [
        (Signal::TERM, Signal::HUP, 129),
        (Signal::HUP, Signal::INT, 130),
        (Signal::INT, Signal::TERM, 143),
        (Signal::TERM, Signal::TERM, 143),
    ];
    let mut seen = 0;
    for (id, (first, second, code)) in pairs.into_iter().enumerate() {
        let said = |m: &Mirror, what: &str| {
            wait_for(DEADLINE, format!("the sink to say {what:?}"), || {
                let log = m.sink(|sink| sink.output());
                log.get(seen..)?.contains(what).then_some(())
            });
        };
        // Redis may have everything already from the sink before. The signal is for one that streams.
        said(&m, " streaming ");
        m.redis.signal(Signal::STOP);
        m.sql(&format!("INSERT INTO t VALUES ({id})"));
        m.sink(|sink| sink.signal(first));
        said(&m, "stopping: ");
        let (asked, status) = (Instant::now(), {
            m.sink(|sink| sink.signal(second));
            m.sink(|sink| sink.wait(DEADLINE))
        });
        let (took, log) = (asked.elapsed(), m.sink(|sink| sink.output()));
        assert_eq!(status.code(), Some(code), "{first:?}, {second:?}: {log}");
        // After the first one alone it is three seconds.
        assert!(took < Duration::from_secs(2), "{took:?}: {log}");
        m.redis.signal(Signal::CONT);
        seen = log.len();
        m.sink(Sink::restart);
        m.check();
    }
}

/// Whoever has started it logs out.
#[test]
fn under_nohup_sighup_ends_nothing() {
    let m = Mirror::new();
    m.sql("CREATE TABLE t (id int PRIMARY KEY); SELECT walmirror.mirror('t')");
    let mut sink = Sink::start_by("nohup", &m.arguments(&["run"]));
    let flows = |sink: &mut Sink| {
        m.sql("INSERT INTO t SELECT count(*) FROM t");
        let target = m.db.lsn();
        wait_for(DEADLINE, "the row to be in Redis", || {
            sink.assert_running();
            m.progress().filter(|&lsn| lsn >= target)
        });
    };
    flows(&mut sink);
    sink.signal(Signal::HUP);
    flows(&mut sink);
    let status = sink.terminate();
    let log = sink.output();
    // Not the second one, and the first that was heard.
    assert_eq!(status.code(), Some(0), "{log}");
    let stopping: Vec<&str> = log.lines().filter(|line| line.contains("stopping: ")).collect();
    assert!(stopping.len() == 1 && stopping[0].contains("signal=15"), "{log}");
}
