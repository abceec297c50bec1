//! Whatever is wrong ends (or, where it may heal, retries visibly) with one message that names the object and the next
//! command to type, and with the exit code that docs/operations.md lists. Never with a backtrace.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::time::Duration;

use walmirror_tests::{Db, Mirror, Pg, Redis, Signal, Sink, wait_for};

const USAGE: i32 = 2;
const POSTGRES: i32 = 3;
const REDIS: i32 = 4;
const UNREACHABLE: i32 = 5;

/// Runs the sink to its end; checks the exit code, and that the output has the words and no trace of a panic.
#[track_caller]
fn refused(args: &[&str], code: i32, words: &[&str]) {
    let (exit, output) = Sink::run(args, Duration::from_secs(40));
    println!("$ walmirror {}\n{output}", args.join(" "));
    assert_eq!(exit, Some(code), "{output}");
    for word in words {
        assert!(
            output.to_lowercase().contains(&word.to_lowercase()),
            "{word:?} is missing in:\n{output}"
        );
    }
    sane(&output);
}

#[track_caller]
fn sane(output: &str) {
    for word in ["panicked", "RUST_BACKTRACE", "stack backtrace", "unwrap()"] {
        assert!(!output.contains(word), "{word:?} in:\n{output}");
    }
}

fn setup() -> (Db, Redis, String, String) {
    let db = Db::create(Pg::shared());
    db.sql("CREATE TABLE t (id int PRIMARY KEY); SELECT walmirror.mirror('t')");
    let redis = Redis::start();
    let (conninfo, url) = (db.pg.conninfo(&db.name), redis.url());
    (db, redis, conninfo, url)
}

#[test]
fn the_command_line() {
    let (_db, _redis, pg, url) = setup();
    let run = |more: &[&str], words: &[&str]| {
        let mut args = vec!["run", "--postgres", &pg, "--redis", &url];
        args.extend(more);
        refused(&args, USAGE, words);
    };
    refused(&["run"], USAGE, &["--postgres"]);
    refused(&["run", "--postgres", &pg], USAGE, &["--redis"]);
    refused(&["fly"], USAGE, &["fly"]);
    run(&["--colour", "red"], &["--colour"]);
    run(&["--until-lsn", "yesterday"], &["yesterday", "16/B374D848"]);
    run(&["--until-lsn", "16B374D848"], &["16B374D848"]);
    run(&["--until-lsn", "0/123456789"], &["0/123456789"]);
    run(&["--slot", "Bad Slot"], &["Bad Slot"]);
    refused(
        &["run", "--postgres", &pg, "--redis", "localhost:6379"],
        USAGE,
        &["redis://"],
    );
    refused(
        &["run", "--postgres", &pg, "--redis", "http://localhost"],
        USAGE,
        &["redis://"],
    );
    refused(
        &["run", "--postgres", &pg, "--redis", "redis://localhost:99999"],
        USAGE,
        &["redis"],
    );
    refused(
        &["run", "--postgres", "host=x colour=red", "--redis", &url],
        USAGE,
        &["colour"],
    );
    refused(
        &["run", "--postgres", "postgres://x:y:z/", "--redis", &url],
        USAGE,
        &["postgres"],
    );
}

#[test]
fn nobody_there() {
    let (_db, _redis, pg, url) = setup();
    let short = ["--connect-timeout", "2s"];
    let mut args = vec!["run", "--postgres", "host=/nonexistent dbname=x", "--redis", &url];
    args.extend(short);
    refused(&args, UNREACHABLE, &["/nonexistent"]);
    let mut args = vec!["run", "--postgres", &pg, "--redis", "redis://127.0.0.1:1/0"];
    args.extend(short);
    refused(&args, UNREACHABLE, &["127.0.0.1:1"]);
}

#[test]
fn redis_that_comes_later_is_waited_for() {
    let mut m = Mirror::new();
    m.sql("CREATE TABLE t (id int PRIMARY KEY); SELECT walmirror.mirror('t'); INSERT INTO t VALUES (1)");
    m.redis.stop(walmirror_tests::Signal::KILL);
    m.start();
    wait_for(Duration::from_secs(20), "a line about Redis", || {
        m.sink(Sink::assert_running);
        let output = m.sink(|sink| sink.output());
        output.contains("127.0.0.1").then_some(())
    });
    m.redis.resume();
    m.settle();
    sane(&m.sink(|sink| sink.output()));
}

#[test]
fn redis_with_a_password() {
    let (_db, _redis, pg, _) = setup();
    let redis = Redis::start_with(&["--requirepass", "sesame"]);
    refused(
        &["run", "--postgres", &pg, "--redis", &redis.url()],
        REDIS,
        &["password"],
    );
    let wrong = format!("redis://:wrong-guess@127.0.0.1:{}/0", redis.port());
    let (exit, output) = Sink::run(
        &["run", "--postgres", &pg, "--redis", &wrong],
        Duration::from_secs(30),
    );
    assert_eq!(exit, Some(REDIS), "{output}");
    assert!(!output.contains("wrong-guess"), "the password is in:\n{output}");
    let right = format!("redis://:sesame@127.0.0.1:{}/0", redis.port());
    let mut sink = Sink::start(&["run", "--postgres", &pg, "--redis", &right]);
    wait_for(Duration::from_secs(20), "progress", || {
        sink.assert_running();
        let mut connection = redis::Client::open(right.as_str())
            .unwrap()
            .get_connection()
            .unwrap();
        let exists: bool = redis::cmd("EXISTS")
            .arg("walmirror:{walmirror}:progress")
            .query(&mut connection)
            .unwrap();
        exists.then_some(())
    });
    assert_eq!(sink.terminate().code(), Some(0));
}

#[test]
fn slots() {
    let (db, _redis, pg, url) = setup();
    let name = format!("{}_other", db.name);
    db.sql(&format!(
        "SELECT pg_create_logical_replication_slot('{name}', 'pgoutput')"
    ));
    refused(
        &["run", "--postgres", &pg, "--redis", &url, "--slot", &name],
        POSTGRES,
        &[&name, "pgoutput, not to walmirror"],
    );
    // The story: it was shown as one that nobody streams from.
    let (code, output) = Sink::run(
        &["status", "--postgres", &pg, "--slot", &name],
        Duration::from_secs(40),
    );
    assert_eq!(code, Some(0), "{output}");
    let says = format!("the slot {name} belongs to the plugin pgoutput");
    assert!(
        output.contains(&says) && !output.contains("confirmed"),
        "{output}"
    );
    let args = ["status", "--json", "--postgres", &pg, "--slot", &name];
    let (_, output) = Sink::run(&args, Duration::from_secs(40));
    assert!(
        output.contains(&format!("\"slot_problem\":\"{says}\"")),
        "{output}"
    );
    let physical = format!("{}_physical", db.name);
    db.sql(&format!(
        "SELECT pg_create_physical_replication_slot('{physical}')"
    ));
    refused(
        &["run", "--postgres", &pg, "--redis", &url, "--slot", &physical],
        POSTGRES,
        &[&format!("the slot \"{physical}\" is a physical slot\n")],
    );
    // A slot of another database.
    let elsewhere = Db::create(Pg::shared());
    let there = format!("{}_there", elsewhere.name);
    elsewhere.sql(&format!(
        "SELECT pg_create_logical_replication_slot('{there}', 'walmirror')"
    ));
    refused(
        &["run", "--postgres", &pg, "--redis", &url, "--slot", &there],
        POSTGRES,
        &[&there, &elsewhere.name],
    );
    refused(
        &["tail", "--postgres", &pg, "--slot", "no_such_slot"],
        POSTGRES,
        &["no_such_slot"],
    );
    db.sql(&format!("SELECT pg_drop_replication_slot('{name}'), pg_drop_replication_slot('{physical}'), pg_drop_replication_slot('{there}')"));
}

#[test]
fn databases() {
    let (db, _redis, _, url) = setup();
    let missing = db.pg.conninfo("no_such_database");
    refused(
        &["run", "--postgres", &missing, "--redis", &url],
        POSTGRES,
        &["no_such_database"],
    );
    let plain = format!("{}_plain", db.name);
    let create = format!("dbname={plain}\" -c 'CREATE EXTENSION walmirror'   # as a superuser\n");
    db.sql(&format!("CREATE DATABASE {plain} TEMPLATE template0"));
    refused(
        &["run", "--postgres", &db.pg.conninfo(&plain), "--redis", &url],
        POSTGRES,
        &[&create],
    );
    refused(
        &["doctor", "--postgres", &db.pg.conninfo(&plain)],
        POSTGRES,
        &[&create],
    );
}

#[test]
fn roles_and_passwords() {
    let pg = Pg::start("");
    pg.set_hba("local all postgres trust\nlocal all,replication all scram-sha-256\n");
    pg.reload();
    let db = Db::create(std::sync::Arc::new(pg));
    db.sql("CREATE ROLE plain LOGIN PASSWORD 'right'; CREATE TABLE t (id int PRIMARY KEY); SELECT walmirror.mirror('t')");
    let redis = Redis::start();
    let url = redis.url();
    let conninfo = |user: &str, password: &str| {
        format!(
            "host={} dbname={} user={user} password={password}",
            db.pg.host(),
            db.name
        )
    };
    refused(
        &["run", "--postgres", &conninfo("plain", "right"), "--redis", &url],
        POSTGRES,
        &["REPLICATION", "plain"],
    );
    refused(
        &[
            "run",
            "--postgres",
            &conninfo("plain", "wrong-guess"),
            "--redis",
            &url,
        ],
        POSTGRES,
        &["plain"],
    );
    let (_, output) = Sink::run(
        &[
            "run",
            "--postgres",
            &conninfo("plain", "wrong-guess"),
            "--redis",
            &url,
        ],
        Duration::from_secs(30),
    );
    assert!(!output.contains("wrong-guess"), "the password is in:\n{output}");
    refused(
        &["run", "--postgres", &conninfo("nobody", "x"), "--redis", &url],
        POSTGRES,
        &["nobody"],
    );
    db.sql("ALTER ROLE plain NOLOGIN");
    refused(
        &["doctor", "--postgres", &conninfo("plain", "right")],
        POSTGRES,
        &["next: ALTER ROLE \"plain\" LOGIN;"],
    );
}

/// The story: what one server has to say was not shown where the other is down; and `wait` took a damaged key for a bug.
#[test]
fn status_shows_the_side_that_answers_and_a_damaged_key_is_told_of() {
    let (db, mut redis, pg, url) = setup();
    let run = |args: &[&str]| {
        let servers = ["--postgres", &pg, "--redis", &url, "--slot", &db.name];
        let (code, output) = Sink::run(&[args, &servers].concat(), Duration::from_secs(40));
        sane(&output);
        (code, output)
    };
    let key = format!("walmirror:{{{}}}:progress", db.name);
    let _: i64 = redis.command(&format!("HSET {key} lsn garbage"));
    let (code, output) = run(&["wait", "--lsn", "0/1"]);
    assert_eq!(code, Some(REDIS), "{output}");
    assert!(output.contains(&format!("UNLINK '{key}'")), "{output}");
    let (code, output) = run(&["status"]);
    assert_eq!(code, Some(REDIS), "{output}");
    assert!(
        output.contains("not there") && output.contains("UNLINK"),
        "{output}"
    );
    let _: String = redis.command(&format!("SET {key} x"));
    let (code, output) = run(&["status"]);
    assert_eq!(code, Some(REDIS), "{output}");
    let port = redis.port();
    assert!(
        output.contains(&format!("next: redis-cli -h 127.0.0.1 -p {port} TYPE '{key}'")),
        "{output}"
    );
    let _: i64 = redis.command(&format!("DEL {key}"));
    redis.stop(Signal::TERM);
    for args in [&["status"][..], &["status", "--json"]] {
        let (code, output) = run(args);
        assert_eq!(code, Some(UNREACHABLE), "{output}");
        assert!(
            output.contains("slot") && output.contains("error: cannot connect to Redis"),
            "{output}"
        );
    }
    redis.resume();
    let args = [
        "status",
        "--postgres",
        "host=/nowhere",
        "--redis",
        &url,
        "--slot",
        &db.name,
    ];
    let (code, output) = Sink::run(&args, Duration::from_secs(40));
    assert_eq!(code, Some(UNREACHABLE), "{output}");
    assert!(
        output.contains("pending      0 rows") && output.contains("error: cannot connect to Postgres"),
        "{output}"
    );
}

#[test]
fn a_server_that_is_not_set_up() {
    let redis = Redis::start();
    let url = redis.url();

    let db = Db::create(std::sync::Arc::new(Pg::start("wal_level = replica")));
    refused(
        &["run", "--postgres", &db.pg.conninfo(&db.name), "--redis", &url],
        POSTGRES,
        &["wal_level"],
    );

    let db = Db::create(std::sync::Arc::new(Pg::start("max_replication_slots = 1")));
    db.sql("SELECT pg_create_physical_replication_slot('the_only_one')");
    refused(
        &["run", "--postgres", &db.pg.conninfo(&db.name), "--redis", &url],
        POSTGRES,
        &["max_replication_slots"],
    );

    // The library is there but not preloaded: the extension can be made, a mirror cannot.
    let pg = Pg::start("shared_preload_libraries = ''");
    let db = Db::create(std::sync::Arc::new(pg));
    db.sql("CREATE TABLE t (id int PRIMARY KEY)");
    let error = db.error("SELECT walmirror.mirror('t')");
    assert!(error.message().contains("shared_preload_libraries"), "{error:?}");
    assert!(error.hint().is_some(), "{error:?}");
    refused(
        &["run", "--postgres", &db.pg.conninfo(&db.name), "--redis", &url],
        POSTGRES,
        &["shared_preload_libraries"],
    );
}

/// From the minor versions of CVE-2026-6471 on, a plugin must be listed.
#[test]
fn a_plugin_that_is_not_listed() {
    let pg = Pg::create("");
    if !pg.knows("output_plugin_libraries") {
        println!("this server has no output_plugin_libraries");
        return;
    }
    pg.configure("output_plugin_libraries = 'pgoutput'");
    pg.resume();
    let db = Db::create(std::sync::Arc::new(pg));
    let redis = Redis::start();
    refused(
        &[
            "run",
            "--postgres",
            &db.pg.conninfo(&db.name),
            "--redis",
            &redis.url(),
        ],
        POSTGRES,
        &["output_plugin_libraries", "ALTER SYSTEM"],
    );
}

/// The story: who slipped in the name of a slot, a table or a database was told to make it, or to look for it.
#[test]
fn a_slip_in_a_name_is_told_with_the_names_there_are() {
    let m = Mirror::with(
        "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE u (id int PRIMARY KEY); SELECT walmirror.mirror('t')",
    );
    m.settle();
    let (postgres, url) = (m.db.pg.conninfo(&m.db.name), m.redis.url());
    let there = format!("walmirror's slots of this database: {}", m.db.name);
    let of = |command: &[&'static str], slot: &'static str| {
        let servers = ["--postgres", &postgres, "--redis", &url, "--slot", slot];
        let args: Vec<String> = [command, &servers]
            .concat()
            .iter()
            .map(ToString::to_string)
            .collect();
        args
    };
    for (command, code) in [("doctor", 0), ("status", 0), ("backfill", POSTGRES)] {
        let args = of(&[command], "slip");
        refused(
            &args.iter().map(String::as_str).collect::<Vec<_>>(),
            code,
            &[&there],
        );
    }
    refused(
        &["tail", "--postgres", &postgres, "--slot", "slip"],
        POSTGRES,
        &[&there],
    );
    for command in ["verify", "backfill"] {
        let (code, output) = m.run(&[command, "--table", "u"]);
        assert_eq!(code, Some(USAGE), "{output}");
        assert!(
            output.contains("\"u\" is not mirrored; what is: public.t"),
            "{output}"
        );
    }
    let other = m.db.pg.conninfo("slip");
    refused(
        &["status", "--postgres", &other],
        POSTGRES,
        &["\"slip\" does not exist", " -l "],
    );
    refused(
        &["status", "--redis", "redis://localhost:6379/zero"],
        USAGE,
        &["the number of the database"],
    );
}

/// What anybody made in a schema of the role's search_path ran as the role of the sink, and of who typed a command.
#[test]
fn nothing_of_the_roles_search_path_is_run() {
    let m = Mirror::with(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'v'); SELECT walmirror.mirror('t')",
    );
    for (operator, left, right, result) in [
        ("=", "name", "name", "bool"),
        ("=", "name", "text", "bool"),
        ("=", "oid", "oid", "bool"),
        ("=", "oid", "regclass", "bool"),
        ("=", "text", "text", "bool"),
        ("=", "\"char\"", "\"char\"", "bool"),
        ("<=", "numeric", "int8", "bool"),
        ("||", "name", "text", "text"),
        ("||", "name", "name", "text"),
    ] {
        m.sql(&format!(
            "CREATE OR REPLACE FUNCTION public.evil_{result}({left}, {right}) RETURNS {result} LANGUAGE plpgsql AS $$ BEGIN RAISE 'hijacked'; END $$; \
             CREATE OPERATOR public.{operator} (LEFTARG = {left}, RIGHTARG = {right}, FUNCTION = public.evil_{result})",
        ));
    }
    m.sql(
        "CREATE FUNCTION public.format(text, VARIADIC name[]) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RAISE 'hijacked'; END $$; \
         DO $$ BEGIN EXECUTE pg_catalog.format('ALTER DATABASE %I SET search_path = public, pg_catalog', pg_catalog.current_database()); END $$",
    );
    m.sink(|sink| {
        sink.kill();
        sink.restart();
    });
    m.settle();
    for command in [
        &["status"][..],
        &["doctor"],
        &["verify"],
        &["backfill", "--table", "t"],
    ] {
        let (code, output) = m.run(command);
        assert!(!output.contains("hijacked"), "{command:?}: {output}");
        assert_eq!(code, Some(0), "{command:?}: {output}");
    }
    assert!(!m.sink(|sink| sink.output()).contains("hijacked"));
}
