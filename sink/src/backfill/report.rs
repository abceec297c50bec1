//! Tells a person how a backfill (or `verify`) goes: a progress bar on a terminal, log lines otherwise.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// How often a log line is written.
const LOG_EVERY: Duration = Duration::from_secs(5);

pub(crate) struct Report {
    doing: &'static str,
    table: String,
    bar: Option<ProgressBar>,
    total_blocks: u64,
    blocks: u64,
    rows: u64,
    rows_before: u64,
    started: Instant,
    logged: Instant,
}

impl Report {
    /// The reading of a table of so many blocks begins; `rows_before` were read by an earlier session.
    pub(crate) fn start(doing: &'static str, table: &str, total_blocks: u64, rows_before: u64) -> Self {
        let bar = (std::io::stderr().is_terminal() && total_blocks > 0).then(|| {
            let bar = ProgressBar::new(total_blocks);
            let style = ProgressStyle::with_template("{prefix} {bar:32} {percent:>3}% {msg} {eta}");
            if let Ok(style) = style {
                bar.set_style(style);
            }
            bar.set_prefix(format!("{doing} {table}"));
            bar
        });
        tracing::info!(
            table,
            blocks = total_blocks,
            resumed = rows_before > 0,
            "{doing} begins"
        );
        let now = Instant::now();
        Self {
            doing,
            table: table.to_owned(),
            bar,
            total_blocks,
            blocks: 0,
            rows: 0,
            rows_before,
            started: now,
            logged: now,
        }
    }

    /// So many more blocks and rows were read.
    pub(crate) fn add(&mut self, blocks: u32, rows: u64) {
        self.blocks += u64::from(blocks);
        self.rows += rows;
        match &self.bar {
            Some(bar) => {
                bar.set_position(self.blocks.min(self.total_blocks));
                bar.set_message(format!("{} rows, {}/s", self.rows, self.rows_per_s()));
            }
            None if self.logged.elapsed() >= LOG_EVERY => {
                self.logged = Instant::now();
                let percent = self.blocks.min(self.total_blocks) * 100 / self.total_blocks.max(1);
                tracing::info!(
                    table = self.table,
                    percent,
                    rows = self.rows,
                    rows_per_s = self.rows_per_s(),
                    "{} goes on",
                    self.doing
                );
            }
            None => {}
        }
    }

    /// Everything is read and planned.
    pub(crate) fn finish(self, message: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let seconds = self.started.elapsed().as_secs_f64();
        let rows = self.rows + self.rows_before;
        tracing::info!(
            table = self.table,
            rows,
            rows_per_s = self.rows_per_s(),
            seconds,
            "{message}"
        );
    }

    fn rows_per_s(&self) -> u64 {
        (self.rows as f64 / self.started.elapsed().as_secs_f64().max(0.001)) as u64
    }
}
