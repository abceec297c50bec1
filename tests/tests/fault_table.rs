//! docs/consistency.md ends with the table of all faults; every test that it names is there.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::fs;
use std::path::{Path, PathBuf};

/// `file::name` is a test of this folder, `path/of/file::name` one of the workspace.
fn file(name: &str) -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = if name.contains('/') {
        here.join("..")
    } else {
        here.join("tests")
    };
    folder.join(format!("{name}.rs"))
}

/// Whether the source has a function of this name that is run as a test.
fn is_test(source: &str, name: &str) -> bool {
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    let found = |&i: &usize| lines[i].starts_with(&format!("fn {name}("));
    (0..lines.len()).filter(found).any(|i| {
        let above = lines[..i].iter().rev();
        above
            .take_while(|line| line.starts_with("#[") || line.starts_with("//"))
            .any(|line| *line == "#[test]")
    })
}

#[test]
fn every_fault_has_a_test_or_says_why_not() {
    let docs =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/consistency.md")).unwrap();
    let table = docs.split("## The fault matrix").nth(1).expect("the table");
    let mut number = 0;
    let mut problems = Vec::new();
    for row in table
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| # "))
    {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        number += 1;
        assert_eq!(cells.len(), 4, "{row}");
        assert_eq!(cells[0], number.to_string(), "{row}");
        let mut named = 0;
        // Every other piece stands between backticks.
        for test in cells[3].split('`').skip(1).step_by(2) {
            let Some((place, name)) = test.split_once("::") else {
                if test.contains('/') {
                    problems.push(format!("{number}: {test} names no test"));
                }
                continue;
            };
            named += 1;
            let source = fs::read_to_string(file(place)).unwrap_or_default();
            if !is_test(&source, name) {
                problems.push(format!("{number}: there is no test {test}"));
            }
        }
        if named == 0 && !cells[3].contains("not tested: ") {
            problems.push(format!("{number}: no test is named, and no reason either"));
        }
    }
    assert_eq!(number, 41);
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}
