//! SQL regression: each tests/sql/*.sql is run by psql in a database of its own, and must print what the .out file beside
//! it says. `UPDATE=1 make test ARGS='-p walmirror-tests --test sql'` writes the .out files anew; read the diff.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::fs;
use std::path::Path;

use walmirror_tests::{Db, Pg};

#[test]
fn sql_files_print_what_is_expected() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("sql");
    let mut scripts: Vec<_> = fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    scripts.retain(|path| path.extension().is_some_and(|e| e == "sql"));
    scripts.sort();
    assert!(!scripts.is_empty());
    let mut wrong = Vec::new();
    for script in scripts {
        let got = run(&script);
        let expected = script.with_extension("out");
        if std::env::var_os("UPDATE").is_some() {
            fs::write(&expected, &got).unwrap();
        }
        let wanted = fs::read_to_string(&expected).unwrap_or_default();
        if got != wanted {
            let line = got.lines().zip(wanted.lines()).position(|(a, b)| a != b);
            let line = line.unwrap_or_else(|| got.lines().count().min(wanted.lines().count()));
            wrong.push(format!(
                "{} line {}:\n  got      {:?}\n  expected {:?}",
                expected.display(),
                line + 1,
                got.lines().nth(line),
                wanted.lines().nth(line)
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn run(script: &Path) -> String {
    let db = Db::create(Pg::shared());
    let mut psql = db.pg.program("psql", &db.name);
    // One stream, so that errors stand where they happen; the slot has to have a name of its own.
    psql.args([
        "-X",
        "-a",
        "-q",
        "-v",
        "VERBOSITY=default",
        "-v",
        &format!("slot={}", db.name),
    ]);
    psql.arg("-f")
        .arg(script.file_name().unwrap())
        .current_dir(script.parent().unwrap());
    let mut shell = std::process::Command::new("sh");
    shell
        .args(["-c", "exec \"$@\" 2>&1", "sh"])
        .arg(psql.get_program())
        .args(psql.get_args());
    for (name, value) in psql.get_envs() {
        if let Some(value) = value {
            shell.env(name, value);
        }
    }
    let output = shell.current_dir(script.parent().unwrap()).output().unwrap();
    // Lines of errors begin with the file and the line; CONTEXT differs between versions.
    let text = String::from_utf8(output.stdout).unwrap();
    let lines = text.lines().map(|line| match line.split_once(": ") {
        Some((place, rest)) if place.starts_with("psql:") => rest.trim_start(),
        _ => line,
    });
    lines.map(|line| format!("{line}\n")).collect()
}
