//! The tables and the loads.

use std::process::Command;

use crate::bed::Bed;

/// The table that most is measured on: seven columns of the usual types.
pub const TABLE: &str = "
CREATE TABLE bench (id bigint PRIMARY KEY, name text NOT NULL, email text, age int, balance numeric(12,2), active bool,
                    created timestamptz);
";

/// How a row of it is made from `i`.
pub const ROW: &str = "i, 'user name ' || i, 'user' || i || '@example.com', (i % 100)::int, (i % 100000) * 1.37, i % 2 = 0, \
                       '2026-01-01 00:00+00'::timestamptz + i * interval '1.234567 s'";

/// W1: so many rows in one INSERT.
pub fn insert(bed: &Bed, rows: u64) {
    bed.db.sql(&format!(
        "INSERT INTO bench SELECT {ROW} FROM generate_series(1, {rows}) i"
    ));
}

/// W2: so many one-row updates in their own transactions.
pub fn update(bed: &Bed, rows: u64, updates: u64) {
    let script = format!(
        "\\set id random(1, {rows})\nUPDATE bench SET age = age + 1, balance = balance + 0.01 WHERE id = :id;\n"
    );
    let clients = 4;
    let output = pgbench(
        bed,
        &script,
        &[
            "-c",
            "4",
            "-j",
            "2",
            "-M",
            "prepared",
            "-t",
            &(updates / clients).to_string(),
        ],
    );
    assert!(output.contains("number of failed transactions: 0"), "{output}");
}

/// So many one-row inserts in their own transactions; the rows are those of W1.
pub fn insert_one_by_one(bed: &Bed, rows: u64) {
    bed.db.sql("CREATE SEQUENCE ids CACHE 100");
    let script = format!("INSERT INTO bench SELECT {ROW} FROM (SELECT nextval('ids') AS i) one;\n");
    let each = (rows / 4).to_string();
    let arguments = ["-c", "4", "-j", "2", "-M", "prepared", "-t", &each];
    pgbench(bed, &script, &arguments);
}

/// Runs pgbench with a script, without waiting for the WAL to be on disk.
pub fn pgbench(bed: &Bed, script: &str, args: &[&str]) -> String {
    let file = bed.db.pg.data().with_file_name("script.sql");
    std::fs::write(&file, script).unwrap();
    let mut command: Command = bed.db.pg.program("pgbench", &bed.db.name);
    command
        .args(["-n", "-f"])
        .arg(&file)
        .args(args)
        .env("PGOPTIONS", "-c synchronous_commit=off");
    let output = command.output().expect("run pgbench");
    assert!(
        output.status.success(),
        "pgbench: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}
