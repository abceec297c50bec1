//! The `walmirror` binary. See [`walmirror_sink::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    walmirror_sink::cli::main()
}
