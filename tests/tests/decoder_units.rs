//! The unit tests of those files of the decoder that need no server. The decoder is a library for Postgres: its functions are found in
//! the server's process only, so that no test binary of its own can be linked.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::fs;
use std::path::{Path, PathBuf};

#[path = "../../decoder/src/options.rs"]
#[allow(dead_code)]
mod options;
#[path = "../../decoder/src/capture/seen.rs"]
#[allow(dead_code)]
mod seen;

#[path = "../fuzz/refusal.rs"]
#[allow(dead_code)]
mod error;

/// The story: seven tests of the decoder were never compiled, and nobody noticed.
#[test]
fn each_file_of_the_decoder_with_tests_is_here() {
    let with_tests = files(Path::new("../decoder/src"), "#[cfg(test)]");
    let here = include_str!("decoder_units.rs");
    let missing: Vec<&PathBuf> = with_tests
        .iter()
        .filter(|path| !here.contains(&format!("#[path = \"../{}\"]", path.display())))
        .collect();
    assert!(with_tests.len() >= 2, "{with_tests:?}");
    assert!(missing.is_empty(), "their tests are never run: {missing:?}");
}

/// The files in a folder and below that contain this.
fn files(folder: &Path, text: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries
        .flat_map(|path| match path.is_dir() {
            true => files(&path, text),
            false => Vec::from_iter(fs::read_to_string(&path).unwrap().contains(text).then_some(path)),
        })
        .collect()
}
