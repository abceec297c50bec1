//! The command line: reads arguments, sets up logging and signals, runs one command, and turns its error into one
//! message and an exit code. `main.rs` calls [`main`]; the commands call into the rest of the library.

mod args;
mod backfill;
mod checks;
mod checks_acl;
mod checks_mirror;
mod checks_redis;
mod checks_server;
mod checks_slot;
mod checks_tables;
mod doctor;
mod init;
mod status;
mod verify;
mod wait;

use std::io::{ErrorKind, Write};
use std::time::Duration;

use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory, FromArgMatches};

use crate::config::{LogFormat, Options, RunConfig, RunOptions, scrub};
use crate::error::{Error, exit};
use crate::pq::{Connection, connect_failed};
use crate::shutdown::Shutdown;
use crate::{logging, tail};
use args::{Cli, Command};

/// What the binary does.
pub fn main() -> ! {
    crate::memory::give_back_large_blocks();
    std::panic::set_hook(Box::new(report_panic));
    // A panic of this thread ends like every internal error; those of other threads are noticed by who joins them.
    let code = std::panic::catch_unwind(run_command).unwrap_or(exit::INTERNAL);
    let _ = std::io::stdout().flush();
    // Not by way of exit(3): a thread may still be connecting, and what libpq's libraries clean up there (Kerberos' mutexes) it uses.
    signal_hook::low_level::exit(i32::from(code))
}

/// One line, and no backtrace. INVARIANT I8: without the panic's text, which may quote values (a slice out of range quotes
/// the string).
fn report_panic(panic: &std::panic::PanicHookInfo<'_>) {
    let place = panic.location().map(ToString::to_string).unwrap_or_default();
    tracing::error!("internal error at {place}: please report it, with the lines before this one");
}

fn run_command() -> u8 {
    let matches = match Cli::command().try_get_matches() {
        Ok(matches) => matches,
        // clap prints help and version as "errors", too, and knows which is which: exit code 0 or 2.
        Err(error) => error.exit(),
    };
    let cli = match Cli::from_arg_matches(&matches) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    let mut options = cli.options.clone();
    match start(cli.command, &matches, &mut options) {
        Ok(()) => exit::OK,
        Err(error) => {
            report(&error, &options);
            error.exit_code()
        }
    }
}

/// Runs the command. `options` gets what the file adds, so that an error is reported in the way that it asks for.
fn start(command: Command, matches: &ArgMatches, options: &mut Options) -> Result<(), Error> {
    let (command, run) = match command {
        Command::Run(run) => (None, run),
        command => (Some(command), RunOptions::default()),
    };
    let run = options.read_file(run)?;
    logging::init(
        options.log_level.unwrap_or_default(),
        options.log_format.unwrap_or_default(),
    );
    match command {
        None => run_mirror(RunConfig::new(options, run)?),
        Some(Command::Tail(mut tail)) => {
            tail.slot = options.slot.clone().filter(|_| is_flag(matches, "slot"));
            unless_nobody_reads(tail::run(&options.postgres()?, &tail, &Shutdown::install()?))
        }
        Some(Command::Completions { shell }) => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "walmirror", &mut script);
            unless_nobody_reads(std::io::stdout().write_all(&script).map_err(output_failed))
        }
        Some(command) => ask(command, options),
    }
}

/// Runs a command that somebody waits for, and that the first signal ends.
fn ask(command: Command, options: &Options) -> Result<(), Error> {
    let what = match command {
        Command::Backfill(_) => "stopped by a signal; the sink goes on with what it was asked for",
        _ => "stopped by a signal",
    };
    let given = options.clone();
    let shutdown = Shutdown::install_at_once(move |code| report(&Error::checks(what, code), &given))?;
    match command {
        Command::Init => init::run(options, &shutdown),
        Command::Doctor => doctor::run(options),
        Command::Status(status) => status::run(options, &status),
        Command::Wait(wait) => wait::run(options, &wait),
        Command::Verify(verify) => verify::run(options, &verify, &shutdown),
        Command::Backfill(backfill) => backfill::run(options, &backfill),
        Command::Run(_) | Command::Tail(_) | Command::Completions { .. } => {
            Err(Error::bug("this command has a way of its own"))
        }
    }
}

fn run_mirror(config: RunConfig) -> Result<(), Error> {
    let shutdown = Shutdown::install()?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        postgres = %config.postgres,
        redis = %config.redis,
        slot = %config.slot,
        durability = %config.durability,
        "walmirror starts"
    );
    crate::run::run(&config, &shutdown)
}

/// Whether an option of the command line itself, not of the environment, set this.
fn is_flag(matches: &ArgMatches, name: &str) -> bool {
    let here = matches.value_source(name) == Some(ValueSource::CommandLine);
    here || matches
        .subcommand()
        .is_some_and(|(_, sub)| sub.value_source(name) == Some(ValueSource::CommandLine))
}

/// The one message that a failed command ends with. Other libraries' texts may repeat a connection string.
fn report(error: &Error, given: &Options) {
    let secrets = [
        given
            .postgres
            .as_ref()
            .map(|conninfo| conninfo.expose())
            .unwrap_or_default(),
        given.redis.as_ref().map(|url| url.expose()).unwrap_or_default(),
    ];
    let clean = |text: String| secrets.iter().fold(text, |text, secret| scrub(&text, secret));
    let message = clean(error.to_string());
    let next = error
        .next_command()
        .map(|next| {
            let url = given.redis.as_ref();
            url.map_or_else(|| clean(next.to_owned()), |url| clean(url.complete(next)))
        })
        .or_else(|| next_command(error, given));
    let code = error.exit_code();
    if given.log_format == Some(LogFormat::Json) {
        // Does nothing, unless the error came before there was a logger.
        logging::init(given.log_level.unwrap_or_default(), LogFormat::Json);
        tracing::error!(
            exit_code = code,
            next = next.as_deref().unwrap_or_default(),
            "{message}"
        );
        return;
    }
    let mut stderr = std::io::stderr().lock();
    let _ = writeln!(stderr, "error: {message}");
    if let Some(next) = next {
        let _ = writeln!(stderr, "  next: {next}");
    }
}

/// The next command for an error whose place has none of its own.
fn next_command(error: &Error, given: &Options) -> Option<String> {
    match error {
        Error::Redis(..) => given
            .redis
            .as_ref()
            .map(|url| format!("{} PING", url.redis_cli())),
        Error::Postgres(..) | Error::Setup(_) | Error::Unreachable(..) => {
            Some(format!("walmirror doctor --slot {}", given.slot()))
        }
        _ => None,
    }
}

/// How long Postgres may take to answer somebody who waits for it.
const ANSWER: Duration = Duration::from_secs(60);

/// Connects for a command that somebody waits for. Who looks what holds up a mirror must not be held up by the same lock.
fn connect_postgres(conninfo: &str) -> Result<Connection, Error> {
    let mut connection = Connection::connect(conninfo, &[]).map_err(connect_failed)?;
    connection.answer_within(Some(ANSWER));
    connection
        .simple("SET lock_timeout = '200ms'")
        .map_err(|error| Error::postgres("cannot set lock_timeout", error))?;
    Ok(connection)
}

/// The same for a replication connection. Its name is not that of a stream, which COMMIT may wait for.
fn connect_replication(conninfo: &str) -> Result<Connection, Error> {
    let extra = [
        ("replication", "database"),
        ("application_name", "walmirror command"),
    ];
    let mut connection = Connection::connect(conninfo, &extra).map_err(connect_failed)?;
    connection.answer_within(Some(ANSWER));
    Ok(connection)
}

/// Writes a line to standard output. A command that says what it does goes on where whoever read that has left: `walmirror verify | head -1`.
fn say(line: impl std::fmt::Display) -> Result<(), Error> {
    unless_nobody_reads(writeln!(std::io::stdout(), "{line}").map_err(output_failed))
}

/// Where whoever read the output has left, that is the end of what only prints: `walmirror tail | head`.
fn unless_nobody_reads(printed: Result<(), Error>) -> Result<(), Error> {
    match printed {
        Err(Error::Io(_, source)) if source.kind() == ErrorKind::BrokenPipe => Ok(()),
        printed => printed,
    }
}

fn output_failed(error: std::io::Error) -> Error {
    Error::io("cannot write to standard output", error)
}
