//! `walmirror tail`: the stream, printed for people. Reads a slot of its own making or an existing one, and leaves it
//! where it is, unless `--consume` says that printed is done.

mod print;
mod value;

use std::io::{BufWriter, StdoutLock, Write};
use std::time::Duration;

use clap::Args;
use walmirror_proto::Lsn;

use crate::config::{Conninfo, SlotName};
use crate::error::Error;
use crate::pq::{Connection, connect_failed};
use crate::replication::{self, Event, Feedback, Stream, slot::PLUGIN};
use crate::shutdown::Shutdown;
pub use print::{Seen, TextPrinter, json_position};

/// Also where the connection string has another one, which is the sink's then: what is printed and confirmed counts as applied for whoever
/// has that name in synchronous_standby_names.
const NAME: &str = "walmirror tail";
/// How often the server hears from us when nothing happens.
const STATUS_INTERVAL: Duration = Duration::from_secs(5);
/// How long the server may take to answer until the stream begins, where that takes it a moment.
const ANSWER: Duration = Duration::from_secs(60);
/// How long to wait for the server to end the stream.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// The arguments of `tail`. The slot is the flag `--slot` only: a `run` that shares environment or file has its own.
#[derive(Args, Debug, Default)]
pub struct TailArgs {
    /// Start at this LSN. A slot never starts before the position that was confirmed last.
    #[arg(long, value_name = "LSN")]
    pub start: Option<Lsn>,

    /// Stop, with exit code 0, once everything before this LSN is printed.
    #[arg(long, value_name = "LSN")]
    pub until_lsn: Option<Lsn>,

    /// Confirm what was printed, so that the slot moves on and Postgres may drop the WAL. Never on the slot of a running
    /// mirror.
    #[arg(long, requires = "slot")]
    pub consume: bool,

    /// One JSON object a record, as the plugin makes them with format=json.
    #[arg(long)]
    pub json: bool,

    /// Only these tables: comma-separated patterns like public.*
    #[arg(long, value_name = "PATTERNS")]
    pub tables: Option<String>,

    /// Print long values whole.
    #[arg(long)]
    pub full: bool,

    /// The slot; None makes a temporary one.
    #[arg(skip)]
    pub slot: Option<SlotName>,
}

/// Prints until the end, a signal, or `--until-lsn`.
pub fn run(conninfo: &Conninfo, args: &TailArgs, shutdown: &Shutdown) -> Result<(), Error> {
    let mut stream = match open(conninfo, args, shutdown) {
        // Whoever stops it while it waits for the slot has got what he wanted.
        Err(_) if shutdown.requested() => return Ok(()),
        stream => stream?,
    };
    shutdown.subscribe(&stream.waker());
    let mut out = BufWriter::new(std::io::stdout().lock());
    let printed = print_all(&mut stream, args, shutdown, &mut out);
    out.flush().map_err(output_failed)?;
    printed?;
    stream.close(CLOSE_TIMEOUT).map(drop)
}

/// Connects, makes or checks the slot, and starts to stream.
fn open(conninfo: &Conninfo, args: &TailArgs, shutdown: &Shutdown) -> Result<Stream, Error> {
    let extra = [("replication", "database"), ("application_name", NAME)];
    let mut connection = Connection::connect_interrupted_with(conninfo.expose(), &extra, shutdown.waker()?)
        .map_err(connect_failed)?;
    connection.answer_within(Some(ANSWER));
    let slot = match &args.slot {
        Some(slot) => check_slot(&mut connection, slot, args.start)?.to_owned(),
        None => {
            let slot = format!("walmirror_tail_{}", std::process::id());
            tracing::info!(
                slot,
                "creating a temporary slot: this waits for all transactions that run now"
            );
            connection
                .make_patient(conninfo.expose(), ANSWER)
                .map_err(|error| Error::postgres("cannot tell the process of the connection", error))?;
            let start = replication::create_slot(&mut connection, &slot, PLUGIN, true)?;
            connection.answer_within(Some(ANSWER));
            tracing::info!(slot, %start, "streaming what commits from now on");
            slot
        }
    };
    let mut options = vec![
        ("proto_version", "1"),
        ("format", if args.json { "json" } else { "protobuf" }),
    ];
    if let Some(tables) = &args.tables {
        options.push(("tables", tables));
    }
    Stream::start_on(
        connection,
        &slot,
        args.start.unwrap_or(Lsn::INVALID),
        &options,
        STATUS_INTERVAL,
    )
}

/// The server moves a start before the confirmed position forward without a word.
fn check_slot<'a>(
    connection: &mut Connection,
    slot: &'a SlotName,
    start: Option<Lsn>,
) -> Result<&'a str, Error> {
    let Some(info) = replication::slot_info(connection, slot)? else {
        let others = replication::slots_there(connection);
        return Err(Error::setup(format!("there is no slot {slot}{others}"))
            .next(format!("walmirror init --slot {slot}")));
    };
    let plugin = info.plugin.as_deref().unwrap_or("none: it is a physical slot");
    if plugin != PLUGIN {
        return Err(
            Error::setup(format!("the slot {slot} is not walmirror's (plugin {plugin})"))
                .next("walmirror tail   # without --slot, through a temporary slot"),
        );
    }
    if let (Some(start), Some(confirmed)) = (start, info.confirmed_flush_lsn)
        && start < confirmed
    {
        tracing::warn!(%start, %confirmed, "the slot has been confirmed beyond --start: streaming from there");
    }
    Ok(slot)
}

fn print_all(
    stream: &mut Stream,
    args: &TailArgs,
    shutdown: &Shutdown,
    out: &mut BufWriter<StdoutLock<'_>>,
) -> Result<(), Error> {
    let mut printer = TextPrinter::new(args.full);
    let mut text = Vec::new();
    while !shutdown.requested() {
        // Everything that has arrived is printed before anybody waits.
        let event = match stream.next(Duration::ZERO)? {
            Event::Timeout => {
                out.flush().map_err(output_failed)?;
                stream.next(STATUS_INTERVAL)?
            }
            event => event,
        };
        let seen = match event {
            Event::Frame { wal_start, bytes, .. } => {
                text.clear();
                let seen = if args.json {
                    text.extend_from_slice(&bytes);
                    json_position(&bytes)
                } else {
                    printer
                        .frame(&bytes, &mut text)
                        .map_err(|error| broken(error, wal_start))?
                };
                // A transaction never shares a frame with the one before it.
                if seen
                    .begins
                    .is_some_and(|begins| args.until_lsn.is_some_and(|until| begins >= until))
                {
                    return Ok(());
                }
                if text.last().is_some_and(|byte| *byte != b'\n') {
                    text.push(b'\n');
                }
                out.write_all(&text).map_err(output_failed)?;
                seen
            }
            Event::Keepalive { wal_end, .. } => Seen {
                begins: None,
                done: Some(wal_end),
            },
            Event::End => return Ok(()),
            Event::Timeout | Event::Woken => Seen::default(),
        };
        if let Some(done) = seen.done
            && args.consume
        {
            out.flush().map_err(output_failed)?;
            stream.feedback(
                Feedback {
                    written: done,
                    flushed: done,
                    applied: done,
                },
                false,
            )?;
        }
        if seen
            .done
            .is_some_and(|done| args.until_lsn.is_some_and(|until| done >= until))
        {
            return Ok(());
        }
    }
    Ok(())
}

fn broken(error: walmirror_proto::frame::WireError, lsn: Lsn) -> Error {
    Error::stream("a frame cannot be read", error).at(lsn).next(
        "walmirror tail --json   # and compare `walmirror --version` with the extension: \\dx walmirror",
    )
}

fn output_failed(error: std::io::Error) -> Error {
    Error::io("cannot write to standard output", error)
}
