//! What the environment and the command line ask for.

use std::path::PathBuf;

/// How to measure.
#[derive(Clone)]
pub struct Options {
    /// The cases to run; empty: all.
    pub cases: Vec<String>,
    /// A tenth of the rows.
    pub quick: bool,
    /// 10 M rows as well.
    pub long: bool,
    /// How often everything is repeated.
    pub rounds: usize,
    /// Where the results go.
    pub out: PathBuf,
}

impl Options {
    /// Reads `QUICK`, `LONG`, `ROUNDS`, `OUT`, and the names of cases from the arguments.
    pub fn from_environment() -> Options {
        let set = |name| std::env::var(name).is_ok_and(|value| !value.is_empty() && value != "0");
        let rounds = std::env::var("ROUNDS")
            .ok()
            .and_then(|n| n.parse().ok())
            .unwrap_or(3);
        Options {
            cases: std::env::args().skip(1).filter(|arg| !arg.is_empty()).collect(),
            quick: set("QUICK"),
            long: set("LONG"),
            rounds: rounds.max(3),
            out: std::env::var_os("OUT").map_or_else(|| PathBuf::from("target/bench"), PathBuf::from),
        }
    }

    /// Whether a case, or a part of one (`e2e-hash`), is asked for.
    pub fn wants(&self, name: &str) -> bool {
        let within =
            |whole: &str, part: &str| part.strip_prefix(whole).is_some_and(|rest| rest.starts_with('-'));
        self.cases.is_empty()
            || self
                .cases
                .iter()
                .any(|case| case == name || within(case, name) || within(name, case))
    }

    /// So many rows, or a tenth of them.
    pub fn rows(&self, full: u64) -> u64 {
        if self.quick { full / 10 } else { full }
    }
}
