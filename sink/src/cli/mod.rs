//! The command line.

use std::process::ExitCode;

/// What `main` does.
pub fn main() -> ExitCode {
    ExitCode::SUCCESS
}
