//! Where log lines go: standard error, as text for people or as JSON for machines.
//!
//! Set up once by `cli::main`. INVARIANT I8: nothing in this crate logs values of rows; keys, tables, LSNs and counts
//! are fine.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::time::SystemTime;

use crate::config::{LogFormat, LogLevel};

/// Sends log lines of this level and above to standard error. Only the first call of a process has an effect.
pub fn init(level: LogLevel, format: LogFormat) {
    // Other crates (TLS above all) speak only when something is wrong.
    let filter = EnvFilter::new(format!("warn,walmirror_sink={level},walmirror={level}"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false);
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr()) && std::env::var_os("NO_COLOR").is_none();
    // A second call finds a logger in place: the first one stays.
    let _ = match format {
        LogFormat::Text => builder.with_ansi(ansi).with_timer(SystemTime).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
}
