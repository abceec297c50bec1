//! A transaction is rolled back while its changes are decoded: from then on Postgres lets nobody read catalogs in its name, and
//! ends its part of the stream with an error of its own that the output plugin has to let pass.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::io::Read;
use std::process::Stdio;

use walmirror_tests::{DEADLINE, Db, Pg, wait_for};

/// What fills every buffer between the walsender and a client that does not read.
const ROWS_THAT_BLOCK: u32 = 60_000;

#[test]
fn what_is_rolled_back_while_it_is_decoded_is_no_bad_row() {
    let db = Db::create(Pg::start("").into());
    db.sql(
        "CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE TABLE t (id int PRIMARY KEY, m mood, v text); \
         SELECT walmirror.mirror('t')",
    );
    db.sql("SELECT pg_create_logical_replication_slot('s', 'walmirror')");
    let mut client = db
        .pg
        .program("pg_recvlogical", &db.name)
        .args(["-d", &db.name, "--slot", "s", "--start", "--no-loop", "-f", "-"])
        .args(["--fsync-interval", "0", "-o", "streaming=on"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The first row has the walsender know the table. Nobody reads the pipe, so at some point nothing more is decoded.
    let mut other = db.connect();
    db.sql("INSERT INTO t VALUES (0, 'sad', '')");
    let mut writer = db.connect();
    let fill = format!(
        "INSERT INTO t SELECT i, 'sad', repeat('x', 100) FROM generate_series(1, {ROWS_THAT_BLOCK}) i"
    );
    writer.batch_execute(&format!("BEGIN; {fill}")).unwrap();
    // The look at the name of the other value is what meets the rollback.
    writer
        .batch_execute(
            "INSERT INTO t SELECT i, 'ok', repeat('x', 100) FROM generate_series(100001, 101000) i",
        )
        .unwrap();
    db.sql("SELECT pg_logical_emit_message(true, 'flush', '')");
    wait_for(DEADLINE, "the walsender to wait for its client", || {
        let waits = "SELECT FROM pg_stat_activity WHERE backend_type = 'walsender' AND wait_event = 'WalSenderWriteData'";
        let sent = "SELECT FROM pg_stat_replication WHERE sent_lsn < pg_current_wal_flush_lsn() - 1000000";
        let is_stuck = |sql: &str, client: &mut postgres::Client| !client.query(sql, &[]).unwrap().is_empty();
        (is_stuck(waits, &mut other) && is_stuck(sent, &mut other)).then_some(())
    });
    writer.batch_execute("ROLLBACK").unwrap();
    db.sql("INSERT INTO t VALUES (7, 'ok', 'the end')");

    let mut stdout = client.stdout.take().unwrap();
    let reader = std::thread::spawn(move || {
        let (mut stream, mut buffer) = (Vec::new(), [0; 65_536]);
        while !holds(&stream[stream.len().saturating_sub(100_000)..], b"the end") {
            match stdout.read(&mut buffer) {
                Ok(count @ 1..) => stream.extend_from_slice(&buffer[..count]),
                _ => break,
            }
        }
        stream
    });
    wait_for(DEADLINE, "the stream to get to its end", || {
        (reader.is_finished() || client.try_wait().unwrap().is_some()).then_some(())
    });
    let _ = client.kill();
    let told = client.wait_with_output().unwrap();
    let stream = reader.join().unwrap();
    assert_eq!(String::from_utf8_lossy(&told.stderr), "");
    assert!(holds(&stream, b"the end"), "the stream ended early");
    println!("{} bytes came", stream.len());
    // The reason that a record of a bad row would give.
    assert!(
        !holds(&stream, b"transaction_rollback"),
        "a row of the transaction is called bad"
    );
}

fn holds(stream: &[u8], text: &[u8]) -> bool {
    stream.windows(text.len()).any(|window| window == text)
}
