//! The stream for everybody: Postgres's own tools, and a reader in another language.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use walmirror_tests::{DEADLINE, Db, Mirror, Pg, Sink};

fn create_slot(db: &Db) {
    db.sql(&format!(
        "SELECT pg_create_logical_replication_slot('{}', 'walmirror')",
        db.name
    ));
}

fn database() -> Db {
    let db = Db::create(Pg::shared());
    db.sql(
        "CREATE TABLE users (id int PRIMARY KEY, name text, born date, doc text); CREATE TABLE quiet (id int PRIMARY KEY); \
         CREATE TABLE unseen (id int PRIMARY KEY); \
         SELECT walmirror.mirror('users', key => 'user:{id}'), walmirror.mirror('quiet', value => 'json')",
    );
    db
}

const CHANGES: &str = "INSERT INTO users VALUES (1, 'Ada \"Augusta\"', '1815-12-10', NULL), (2, 'Grace', '1906-12-09', repeat('x', 10)); \
     UPDATE users SET name = 'Ada' WHERE id = 1; UPDATE users SET id = 3 WHERE id = 2; DELETE FROM users WHERE id = 1; \
     INSERT INTO unseen VALUES (1); TRUNCATE quiet; INSERT INTO quiet VALUES (7)";

/// Each line of the text is a JSON object; returns them.
fn objects(text: &str) -> Vec<Value> {
    let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
    text.lines().filter(|line| !line.is_empty()).map(parse).collect()
}

fn kinds(objects: &[Value]) -> Vec<&str> {
    objects.iter().map(|o| o["kind"].as_str().unwrap()).collect()
}

fn assert_readable(objects: &[Value]) {
    let rows: Vec<&Value> = objects
        .iter()
        .filter(|o| ["insert", "update", "delete"].contains(&o["kind"].as_str().unwrap()))
        .collect();
    assert_eq!(rows[0]["table"], "public.users");
    assert_eq!(rows[0]["row"]["name"], "Ada \"Augusta\"");
    assert_eq!(rows[0]["row"]["born"], "1815-12-10");
    assert_eq!(rows[0]["row"]["doc"], Value::Null);
    assert_eq!(rows[2]["kind"], "update");
    assert_eq!(rows[3]["old_key"]["id"], 2);
    assert_eq!(rows[4]["kind"], "delete");
    assert_eq!(rows[4]["key"]["id"], 1);
    assert_eq!(rows[5]["table"], "public.quiet");
    assert_eq!(rows.len(), 6);
    assert!(kinds(objects).contains(&"truncate"));
    assert_eq!(
        kinds(objects).iter().filter(|k| **k == "begin").count(),
        kinds(objects).iter().filter(|k| **k == "commit").count()
    );
}

#[test]
fn pg_recvlogical_prints_json() {
    let db = database();
    let recvlogical = |args: &[&str]| {
        let output = db
            .pg
            .program("pg_recvlogical", &db.name)
            .args(["-d", &db.name, "-S", &db.name])
            .args(args)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    };
    recvlogical(&["--create-slot", "-P", "walmirror"]);
    db.sql(CHANGES);
    let end = db.lsn().to_string();
    let text = recvlogical(&["--start", "-o", "format=json", "-f", "-", "--endpos", &end]);
    println!("{text}");
    assert_readable(&objects(&text));
}

#[test]
fn peek_changes_is_readable() {
    let db = database();
    create_slot(&db);
    db.sql(CHANGES);
    let peek = |options: &str| {
        db.rows(&format!(
            "SELECT data FROM pg_logical_slot_peek_changes('{}', NULL, NULL{options})",
            db.name
        ))
        .into_iter()
        .map(|row| row[0].clone().unwrap())
        .collect::<Vec<_>>()
    };
    let lines = peek(", 'format', 'json'");
    assert_readable(&objects(&lines.join("\n")));
    let only = peek(", 'format', 'json', 'tables', 'public.qui*'");
    assert!(only.iter().all(|line| !line.contains("users")), "{only:?}");
    assert!(only.iter().any(|line| line.contains("\"row\"")), "{only:?}");
    // Peeking took nothing away.
    assert_eq!(peek(", 'format', 'json'"), lines);
}

#[test]
fn options_are_validated() {
    let db = database();
    create_slot(&db);
    for (options, word) in [
        ("'colour', 'red'", "colour"),
        ("'format', 'xml'", "xml"),
        ("'proto_version', '2'", "proto_version"),
        ("'batch_bytes', 'many'", "batch_bytes"),
        ("'batch_bytes', '-1'", "batch_bytes"),
        ("'tables', ''", "tables"),
        ("'origin', 'mars'", "origin"),
    ] {
        let error = db.error(&format!(
            "SELECT * FROM pg_logical_slot_peek_binary_changes('{}', NULL, NULL, {options})",
            db.name
        ));
        assert!(error.message().contains(word), "{error:?}");
        let listed = format!("{} {}", error.message(), error.hint().unwrap_or_default());
        assert!(
            listed.contains("format") && listed.contains("protobuf"),
            "{listed}"
        );
    }
    // Frames are bytes: the textual function must say so rather than print them.
    db.sql(CHANGES);
    let error = db.error(&format!(
        "SELECT * FROM pg_logical_slot_peek_changes('{}', NULL, NULL)",
        db.name
    ));
    println!("{} ({:?})", error.message(), error.hint());
}

/// Each star made it take many times as long, in which nobody could end the session.
#[test]
fn a_pattern_of_many_stars_takes_no_time() {
    let db = database();
    create_slot(&db);
    let name = "a".repeat(60);
    db.sql(&format!(
        "CREATE TABLE {name} (id int PRIMARY KEY); SELECT walmirror.mirror('{name}'); INSERT INTO {name} VALUES (1)"
    ));
    let inserts = |tables: &str| {
        db.value(&format!(
            "SELECT count(*) FROM pg_logical_slot_peek_changes('{}', NULL, NULL, 'format', 'json', 'tables', '{tables}') \
             WHERE data LIKE '%\"insert\"%'",
            db.name
        ))
    };
    let started = std::time::Instant::now();
    assert_eq!(inserts(&format!("{}b", "*a".repeat(8))), "0");
    assert_eq!(inserts(&"*a".repeat(8)), "1");
    assert!(started.elapsed().as_secs() < 30, "{:?}", started.elapsed());
}

/// A label that does not fit its table is told to those who want that table.
#[test]
fn errors_of_tables_that_were_not_asked_for_are_left_out() {
    let db = database();
    create_slot(&db);
    db.sql(
        "CREATE TABLE whole (id int PRIMARY KEY, v text) PARTITION BY LIST (id); CREATE TABLE part PARTITION OF whole DEFAULT; \
         SELECT walmirror.mirror('whole', columns => '{v}'); ALTER EVENT TRIGGER walmirror_ddl_command_end DISABLE; \
         ALTER TABLE whole RENAME v TO w; ALTER EVENT TRIGGER walmirror_ddl_command_end ENABLE ALWAYS",
    );
    db.sql("INSERT INTO whole VALUES (1); TRUNCATE part");
    let errors = |tables: &str| {
        db.value(&format!(
            "SELECT count(*) FROM pg_logical_slot_peek_changes('{}', NULL, NULL, 'format', 'json', 'tables', '{tables}') \
             WHERE data LIKE '%\"error\"%'",
            db.name
        ))
    };
    // Rows appear under the table that has the label.
    assert_eq!(errors("public.whole"), "1");
    assert_eq!(errors("*"), "1");
    assert_eq!(errors("quiet,part"), "0");
}

/// What is announced makes the sink read the table anew, which takes long where it is large.
#[test]
fn a_new_value_of_an_enum_announces_nothing() {
    let db = database();
    db.sql(
        "CREATE TYPE kind AS ENUM ('x'); CREATE TABLE k (id int PRIMARY KEY, v kind[]); SELECT walmirror.mirror('k')",
    );
    create_slot(&db);
    let announced = || {
        db.value(&format!(
            "SELECT count(*) FROM pg_logical_slot_get_changes('{}', NULL, NULL, 'format', 'json') WHERE data LIKE '%\"relation\"%'",
            db.name
        ))
    };
    db.sql("ALTER TYPE kind ADD VALUE 'z'");
    db.sql("ALTER TYPE kind ADD VALUE 'y' BEFORE 'z'");
    db.sql("ALTER TYPE kind ADD VALUE IF NOT EXISTS 'y'");
    assert_eq!(announced(), "0");
    db.sql("ALTER TYPE kind RENAME VALUE 'x' TO 'w'");
    assert_eq!(announced(), "1");
    db.sql("BEGIN; ALTER TYPE kind ADD VALUE 'v'; ALTER TYPE kind RENAME VALUE 'y' TO 'u'; COMMIT");
    assert_eq!(announced(), "1");
}

#[test]
fn changes_of_other_origins_can_be_left_out() {
    let db = database();
    create_slot(&db);
    let origin = format!("origin_{}", db.name);
    db.sql(&format!("SELECT pg_replication_origin_create('{origin}')"));
    db.sql("INSERT INTO quiet VALUES (1)");
    db.sql(&format!("SELECT pg_replication_origin_session_setup('{origin}')"));
    db.sql("INSERT INTO quiet VALUES (2)");
    db.sql("SELECT pg_replication_origin_session_reset()");
    let inserts = |options: &str| {
        let query = format!(
            "SELECT count(*) FROM pg_logical_slot_peek_changes('{}', NULL, NULL, 'format', 'json'{options}) WHERE data LIKE '%\"insert\"%'",
            db.name
        );
        db.value(&query)
    };
    assert_eq!(inserts(""), "2");
    assert_eq!(inserts(", 'origin', 'none'"), "1");
    db.sql(&format!("SELECT pg_replication_origin_drop('{origin}')"));
}

/// Python, with code that protoc generated from walmirror.proto.
#[test]
fn another_language_reads_the_stream() {
    let db = database();
    create_slot(&db);
    db.sql(CHANGES);
    let frames: Vec<String> = db
        .rows(&format!(
            "SELECT encode(data, 'hex') FROM pg_logical_slot_get_binary_changes('{}', NULL, NULL)",
            db.name
        ))
        .into_iter()
        .map(|row| row[0].clone().unwrap())
        .collect();
    assert!(!frames.is_empty());
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let dir = walmirror_tests::Dir::new("py");
    let protoc = Command::new("protoc")
        .arg(format!("--python_out={}", dir.path().display()))
        .arg(format!("-I{}", top.join("proto").display()))
        .arg("walmirror.proto")
        .output()
        .unwrap();
    assert!(
        protoc.status.success(),
        "{}",
        String::from_utf8_lossy(&protoc.stderr)
    );
    let hex = dir.path().join("frames.hex");
    std::fs::write(&hex, frames.join("\n")).unwrap();
    // Debian's Python, which python3-protobuf belongs to, whatever else stands first in PATH.
    let output = Command::new("/usr/bin/python3")
        .arg(top.join("proto/examples/read_stream.py"))
        .arg(dir.path())
        .stdin(std::fs::File::open(&hex).unwrap())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let rows = objects(&text);
    assert_eq!(
        kinds(&rows),
        ["INSERT", "INSERT", "UPDATE", "UPDATE", "DELETE", "INSERT"]
    );
    assert_eq!(rows[0]["row"]["name"], "Ada \"Augusta\"");
    assert_eq!(rows[1]["row"]["born"], "1906-12-09");
    assert_eq!(rows[3]["old_key"]["id"], 2);
    assert_eq!(rows[5]["table"], "public.quiet");
}

/// `walmirror tail` shows the stream to people, and takes nothing from anybody.
#[test]
fn tail_prints_the_stream() {
    let m = Mirror::of(database());
    let conninfo = m.db.pg.conninfo(&m.db.name);
    let mut tail = Sink::start(&["tail", "--postgres", &conninfo]);
    let seen = walmirror_tests::wait_for(walmirror_tests::DEADLINE, "tail to print the row", || {
        tail.assert_running();
        m.sql("INSERT INTO users VALUES (1, 'Ada', '1815-12-10') ON CONFLICT (id) DO UPDATE SET name = excluded.name");
        let output = tail.output();
        (output.contains("users") && output.contains("Ada")).then_some(output)
    });
    println!("{seen}");
    assert_eq!(tail.terminate().code(), Some(0));
}

/// A client that has enough says CopyDone, and the server answers with its own, after which no data may come.
#[test]
fn no_data_comes_after_the_end_of_the_copy() {
    let db = Db::create(Pg::shared());
    db.sql("CREATE TABLE t (id int PRIMARY KEY, v text); SELECT walmirror.mirror('t')");
    create_slot(&db);
    db.sql("DO $$ BEGIN FOR i IN 1..40000 LOOP INSERT INTO t VALUES (i, repeat('v', 30)); COMMIT; END LOOP; END $$");
    for round in 0..30 {
        let mut stream = UnixStream::connect(db.pg.socket()).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let startup = format!(
            "\0\u{3}\0\0user\0postgres\0database\0{}\0replication\0database\0\0",
            db.name
        );
        say(&mut stream, None, startup.as_bytes());
        while hear(&mut stream).0 != b'Z' {}
        let start = format!("START_REPLICATION SLOT {} LOGICAL 0/0\0", db.name);
        say(&mut stream, Some(b'Q'), start.as_bytes());
        for _ in 0..1 + round * 7 {
            while hear(&mut stream).0 != b'd' {}
        }
        say(&mut stream, Some(b'c'), b"");
        while hear(&mut stream).0 != b'c' {}
        let mut after = String::new();
        while !after.ends_with('Z') {
            after.push(char::from(hear(&mut stream).0));
        }
        assert!(!after.contains('d'), "round {round}: {after}");
    }
}

/// Sends a message of the protocol; the first one has no kind.
fn say(stream: &mut UnixStream, kind: Option<u8>, body: &[u8]) {
    let length = u32::try_from(body.len() + 4).unwrap().to_be_bytes();
    let message: Vec<u8> = kind
        .into_iter()
        .chain(length)
        .chain(body.iter().copied())
        .collect();
    stream.write_all(&message).unwrap();
}

/// The kind of the next message, and its body.
fn hear(stream: &mut UnixStream) -> (u8, Vec<u8>) {
    let mut head = [0; 5];
    stream.read_exact(&mut head).unwrap();
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
    let mut body = vec![0; length as usize - 4];
    stream.read_exact(&mut body).unwrap();
    assert_ne!(head[0], b'E', "{}", String::from_utf8_lossy(&body));
    (head[0], body)
}
