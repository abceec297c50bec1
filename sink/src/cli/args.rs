//! The arguments of every command, and the texts of `--help`.

use std::str::FromStr;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use walmirror_proto::Lsn;

use crate::config::{Options, RunOptions, Span};
use crate::tail::TailArgs;

/// Keeps Redis equal to PostgreSQL.
#[derive(Debug, Parser)]
#[command(
    name = "walmirror",
    version,
    max_term_width = 110,
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = "\
A first mirror, in four steps:
  psql mydb -c \"CREATE EXTENSION walmirror\" -c \"SELECT walmirror.mirror('users')\"
  walmirror doctor --postgres dbname=mydb --redis redis://localhost:6379
  walmirror run    --postgres dbname=mydb --redis redis://localhost:6379
  redis-cli HGETALL users:1

Every flag can also be a variable (--on-gap: WALMIRROR_ON_GAP) or a key of the file that
--config names (on-gap = \"fail\"). A flag wins over a variable, a variable over the file.

Exit codes: 0 done, 1 internal error, 2 usage or configuration, 3 Postgres refuses,
4 Redis refuses, 5 unreachable, 6 gap, 7 timeout."
)]
pub struct Cli {
    #[command(flatten)]
    pub options: Options,
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Mirror: create the slot, backfill and stream, until stopped.
    #[command(after_help = "\
Example:
  walmirror run --postgres 'host=db1,db2 dbname=shop' --redis rediss://cache:6379/0

Creates the slot and backfills the tables when they are missing, reconnects to either side,
and goes on where it stopped. SIGTERM, SIGINT and SIGHUP stop it in good order: exit code 0,
everything acknowledged that was applied.")]
    Run(RunOptions),

    /// Check everything, create the slot, and say what to do next.
    #[command(after_help = "\
Example:
  walmirror init --postgres dbname=shop --redis redis://localhost:6379

From the moment that the slot exists, Postgres keeps WAL for it: start `walmirror run` soon,
or drop it with SELECT pg_drop_replication_slot('walmirror').")]
    Init,

    /// Check both servers: one line a check, with the next command where something is wrong.
    #[command(after_help = "\
Example:
  walmirror doctor --postgres dbname=shop --redis redis://localhost:6379

Changes nothing. Without --redis only Postgres is checked, without --postgres only Redis.
The exit code is 0 if nothing FAILs (a WARN does not count), 3 if something has to be done
at Postgres, 4 if only at Redis, 5 if a server did not answer.")]
    Doctor,

    /// Show how far the mirror is.
    #[command(after_help = "\
Examples:
  walmirror status --postgres dbname=shop --redis redis://localhost:6379
  walmirror status --postgres dbname=shop --redis redis://localhost:6379 --json | jq .lag_bytes")]
    Status(StatusArgs),

    /// Wait until everything before an LSN is in Redis.
    #[command(after_help = "\
Examples:
  walmirror wait --redis redis://localhost:6379 --lsn 16/B374D848 --timeout 5s
  walmirror wait --postgres dbname=shop --redis redis://localhost:6379 --lsn current

`--lsn current` asks Postgres, and covers every commit before. The exit code is 7 when the
time is over.")]
    Wait(WaitArgs),

    /// Compare Postgres with Redis while both are in use.
    #[command(after_help = "\
Examples:
  walmirror verify --postgres dbname=shop --redis redis://localhost:6379
  walmirror verify --table orders --repair
  walmirror verify --sample 10000

Compares every row with its key and looks for keys without a row, at one position of the stream
although writes go on; what is on its way is no difference. Prints names of keys, never values.
With --repair the running sink reads again what differs. The exit code is 0 if all is equal (or
was repaired), 1 if something differs, 2 if that could not be told: no sink runs, or a server
does not answer.")]
    Verify(VerifyArgs),

    /// Have the running sink read tables again.
    #[command(after_help = "\
Examples:
  walmirror backfill --postgres dbname=shop --redis redis://localhost:6379
  walmirror backfill --table orders

Online: each key is the old or the new row meanwhile, and keys without a row go at the end.
Cached tables have nothing to be filled with. Ctrl-C ends the waiting, not the backfill.")]
    Backfill(BackfillArgs),

    /// Print the stream for people.
    #[command(after_help = "\
Examples:
  walmirror tail --postgres dbname=shop
  walmirror tail --postgres dbname=shop --slot audit --consume
  walmirror tail --postgres dbname=shop --json | jq 'select(.kind == \"delete\")'

Without --slot it shows what happens from now on, through a temporary slot. A slot that is
not consumed stays where it is: the next tail prints the same again.")]
    Tail(TailArgs),

    /// Print a script that completes commands and flags in your shell.
    #[command(after_help = "\
Example:
  walmirror completions bash > /etc/bash_completion.d/walmirror")]
    Completions {
        /// For which shell.
        shell: Shell,
    },
}

/// The arguments of `status`.
#[derive(Args, Debug)]
pub struct StatusArgs {
    /// One JSON object instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// The arguments of `wait`.
#[derive(Args, Debug)]
pub struct WaitArgs {
    /// The position to wait for: an LSN like 16/B374D848, or `current` for where Postgres is now.
    #[arg(long, value_name = "LSN", default_value = "current")]
    pub lsn: Position,
    /// How long to wait at most; 0: for ever.
    #[arg(long, value_name = "TIME", default_value = "30s")]
    pub timeout: Span,
}

/// The arguments of `verify`.
#[derive(Args, Clone, Debug)]
pub struct VerifyArgs {
    /// Only this table, as NAME or SCHEMA.NAME; may be given several times. [default: all]
    #[arg(long, value_name = "TABLE")]
    pub table: Vec<String>,
    /// Compare only about so many rows and keys of each table, chosen at random.
    #[arg(long, value_name = "N")]
    pub sample: Option<u64>,
    /// Have the running sink read again what differs.
    #[arg(long)]
    pub repair: bool,
    /// How long to wait for the sink, and for a key that changes all the time.
    #[arg(long, value_name = "TIME", default_value = "30s")]
    pub timeout: Span,
    /// One JSON object instead of lines.
    #[arg(long)]
    pub json: bool,
}

/// The arguments of `backfill`.
#[derive(Args, Clone, Debug)]
pub struct BackfillArgs {
    /// Only this table, as NAME or SCHEMA.NAME; may be given several times. [default: all]
    #[arg(long, value_name = "TABLE")]
    pub table: Vec<String>,
    /// How long the sink may take to begin; 0: do not wait for the backfill at all.
    #[arg(long, value_name = "TIME", default_value = "30s")]
    pub timeout: Span,
}

/// An LSN, or where Postgres is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Position {
    /// Where Postgres is now.
    Current,
    /// This LSN.
    At(Lsn),
}

impl FromStr for Position {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "current" => Ok(Self::Current),
            _ => text
                .parse()
                .map(Self::At)
                .map_err(|error: walmirror_proto::lsn::ParseLsnError| format!("{error}, or `current`")),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_fit_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_teaches_with_an_example() {
        for command in Cli::command().get_subcommands() {
            let help = command
                .get_after_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            assert!(
                help.contains(&format!("walmirror {}", command.get_name())),
                "{}",
                command.get_name()
            );
        }
    }

    #[test]
    fn wrong_arguments_name_what_is_wrong() {
        for (arguments, want) in [
            (["run", "--until-lsn", "nonsense"].as_slice(), "nonsense"),
            (&["run", "--no-such-option"], "--no-such-option"),
            (&["wait", "--lsn", "1-2"], "1-2"),
            (&["run", "--slot", "Bad Name"], "a-z, 0-9 and _"),
            (&["run", "--durability", "disk"], "replicas=1"),
        ] {
            let error = Cli::try_parse_from(std::iter::once(&"walmirror").chain(arguments)).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(want), "{error}");
        }
    }
}
