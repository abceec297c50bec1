//! `walmirror verify`: prints what the comparison found, and turns it into an exit code.

use serde_json::json;

use super::args::VerifyArgs;
use super::say;
use crate::config::Options;
use crate::error::Error;
use crate::shell::word;
use crate::shutdown::Shutdown;
use crate::verify::{self, Job, Outcome, Tally};

/// The exit code when something differs.
const DIFFERENT: u8 = 1;
/// The exit code when nobody can tell.
const UNKNOWN: u8 = 2;

/// Compares, prints, and fails with [`DIFFERENT`] or [`UNKNOWN`].
pub fn run(options: &Options, args: &VerifyArgs, shutdown: &Shutdown) -> Result<(), Error> {
    let job = Job {
        postgres: options.postgres()?,
        redis: options.redis()?,
        slot: options.slot().as_str().to_owned(),
        tables: args.table.clone(),
        sample: args.sample,
        repair: args.repair,
        timeout: args.timeout.0,
    };
    let outcome = verify::run(&job, shutdown).map_err(|error| match error {
        error @ Error::Config(_) => error,
        error => {
            let slot = &job.slot;
            let next = error
                .next_command()
                .map_or_else(|| format!("walmirror status --slot {slot}"), str::to_owned);
            Error::checks(
                format!("cannot tell whether Redis equals Postgres: {error}"),
                UNKNOWN,
            )
            .next(next)
        }
    })?;
    let printed = if args.json {
        say(as_json(&outcome))
    } else {
        print(&outcome)
    };
    // Whoever has not been told all has been told nothing, unless the exit code does.
    judge(&outcome.tables, args)?;
    printed.map_err(|error| Error::checks(error.to_string(), UNKNOWN))
}

fn judge(tables: &[Tally], args: &VerifyArgs) -> Result<(), Error> {
    let sum = |count: fn(&Tally) -> u64| tables.iter().map(count).sum::<u64>();
    let (left, unknown) = (sum(Tally::left), sum(|tally| tally.unknown));
    if left > 0 {
        let next = match (args.repair, args.table.as_slice()) {
            (false, _) => "walmirror verify --repair".to_owned(),
            (true, [table]) => format!("walmirror backfill --table {}", word(table)),
            (true, _) => "walmirror status   # tells whether rows were rejected".to_owned(),
        };
        return Err(Error::checks(format!("{left} keys differ"), DIFFERENT).next(next));
    }
    if unknown > 0 {
        let what = format!(
            "{unknown} keys could not be compared within {}: they change all the time, a transaction stays open, or their rows cannot be read",
            args.timeout
        );
        return Err(Error::checks(what, UNKNOWN).next("walmirror verify --timeout 5min"));
    }
    Ok(())
}

fn print(outcome: &Outcome) -> Result<(), Error> {
    for tally in &outcome.tables {
        say(line(tally))?;
        for (finding, key) in &tally.examples {
            say(format!("  {:<10} {key}", finding.name()))?;
        }
    }
    say(format!("compared from {} to {}", outcome.from, outcome.to))
}

fn line(tally: &Tally) -> String {
    let mut line = format!("{}: {} rows, {} keys", tally.table, tally.rows, tally.keys);
    let mut add = |count: u64, what: &str| {
        if count > 0 {
            line.push_str(&format!(", {count} {what}"));
        }
    };
    add(tally.missing, "missing");
    add(tally.extra, "extra");
    add(tally.different, "different");
    add(tally.repaired, "repaired");
    add(tally.unknown, "unknown");
    add(tally.without_key, "without a key (NULL)");
    add(tally.absent, "absent (their keys expire)");
    if tally.differences() == 0 && tally.unknown == 0 {
        line.push_str(": equal");
    }
    line
}

fn as_json(outcome: &Outcome) -> serde_json::Value {
    let table = |tally: &Tally| {
        let examples: Vec<_> = tally
            .examples
            .iter()
            .map(|(finding, key)| json!({"finding": finding.name(), "key": key}))
            .collect();
        json!({"table": tally.table, "cache": tally.is_cache, "rows": tally.rows, "keys": tally.keys, "missing": tally.missing,
               "extra": tally.extra, "different": tally.different, "repaired": tally.repaired, "unknown": tally.unknown,
               "without_key": tally.without_key, "absent": tally.absent, "examples": examples})
    };
    json!({"from_lsn": outcome.from.to_string(), "to_lsn": outcome.to.to_string(),
           "tables": outcome.tables.iter().map(table).collect::<Vec<_>>()})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Span;

    #[test]
    fn what_differs_counts_more_than_what_nobody_can_tell() {
        let args = VerifyArgs {
            table: Vec::new(),
            sample: None,
            repair: false,
            timeout: Span(std::time::Duration::from_secs(1)),
            json: false,
        };
        let code = |missing, repaired, unknown| {
            let tally = Tally {
                missing,
                repaired,
                unknown,
                ..Tally::default()
            };
            judge(&[Tally::default(), tally], &args).map_err(|error| error.exit_code())
        };
        assert_eq!(code(0, 0, 0), Ok(()));
        assert_eq!(code(2, 2, 0), Ok(()));
        assert_eq!(code(2, 1, 0), Err(DIFFERENT));
        assert_eq!(code(0, 0, 1), Err(UNKNOWN));
        assert_eq!(code(1, 0, 1), Err(DIFFERENT));
    }

    #[test]
    fn a_line_says_what_there_is() {
        let mut tally = Tally {
            table: "public.t".to_owned(),
            rows: 10,
            keys: 10,
            ..Tally::default()
        };
        assert_eq!(line(&tally), "public.t: 10 rows, 10 keys: equal");
        tally.missing = 2;
        tally.repaired = 2;
        assert_eq!(line(&tally), "public.t: 10 rows, 10 keys, 2 missing, 2 repaired");
    }
}
