//! Applies batches: MULTI, commands, progress, EXEC, and behind it WATCH and HMGET for the next one, all in one write. The
//! fence therefore costs no round trip. The commands of the next batch follow at once (`writer/ahead.rs`); only its EXEC waits for
//! the answer. Owned by the applying thread.
//!
//! INVARIANT I2: data and progress go in one EXEC. INVARIANT I4: an EXEC succeeds only if the progress key was not
//! touched since this session's epoch was seen in it, so a session that lost its claim writes nothing. Nor does one whose Redis lost what
//! it had written: a Redis may go back while the connection stays, so its position is looked at as well.

mod ahead;
mod purge;
mod refused;

use redis::{ServerError, Value};
use walmirror_proto::Lsn;

use super::connection::{Answers, setting};
use super::error::{class_of, reply_error, unreadable};
use super::role::judge_role;
use super::{Claim, Connection};
use crate::config::OnBadRow;
use crate::error::{Class, Error};
use crate::plan::{Batch, PENDING_REPLY, Purge, RedisKeys, Scripts};
use crate::progress::RESYNC;
use crate::progress::{Purging, Step};
use crate::resp::Commands;
use crate::transaction::Commit;

use ahead::Ahead;
use refused::Refusals;

/// A field that the progress hash never has. Removing it is refused wherever a write is, and is none: it breaks no WATCH, and goes to
/// no replica and no append-only file.
const NO_FIELD: &[u8] = b"-";
/// The command that opens a transaction.
const MULTI: &[u8] = b"*1\r\n$5\r\nMULTI\r\n";

/// A stretch of one MULTI: usually all of it. A large transaction takes several, so that it is never whole in memory.
#[derive(Debug, Default)]
pub struct Segment {
    /// Commands; the first is MULTI if `opens`, the last three are those of [`Writer::close`] if `step` is there.
    pub batch: Batch,
    /// Whether it begins with MULTI.
    pub opens: bool,
    /// Whether it notes keys as pending by itself; a patch may do so as well.
    pub pending: bool,
    /// Keys to remove before anything else; only where it begins with MULTI.
    pub purges: Vec<Purge>,
    /// The last transaction that asks for one of them.
    pub purging: Purging,
    /// What is applied once the EXEC at its end succeeds.
    pub step: Option<Step>,
    /// The last question of a worker ([`crate::backfill::Backfill::asked`]) that this EXEC answers.
    pub asked: u64,
}

/// A key that Redis refused to write because it holds another type.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refused {
    /// The key.
    pub key: Vec<u8>,
    /// pg_class.oid of its table.
    pub relation: u32,
}

/// What an EXEC did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    /// The step that is now in Redis.
    pub step: Step,
    /// Whether keys were noted as pending.
    pub pending: bool,
    /// The last question that is answered by this.
    pub asked: u64,
    /// Keys of another type, which stay as they are: only where such rows are skipped.
    pub refused: Vec<Refused>,
}

/// Names tables by their oid.
struct Tables(Box<dyn Fn(u32) -> Option<String> + Send>);

impl std::fmt::Debug for Tables {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tables")
    }
}

/// The writing connection.
#[derive(Debug)]
pub struct Writer {
    connection: Connection,
    keys: RedisKeys,
    scripts: Scripts,
    epoch: u64,
    /// The position that was written last.
    lsn: Lsn,
    /// The segments of the MULTI that is open, kept until its EXEC has answered, so that a refused command can be named.
    open: Vec<Segment>,
    /// Commands that this writer put before those of the first segment.
    prefix: usize,
    /// Commands of the open MULTI that Redis has answered.
    queued: usize,
    /// The first that it did not queue, and its number.
    not_queued: Option<(usize, ServerError)>,
    tables: Tables,
    /// What was sent of the segment that comes next.
    ahead: Option<Ahead>,
    /// The transaction that the progress names as the one that keys are removed for.
    purging: Option<Commit>,
    /// A purge of at most so many keys is atomic with its transaction.
    atomic_purge_keys: usize,
    on_bad_row: OnBadRow,
    /// The next EXEC is followed by HELLO.
    asks_role: bool,
    /// The answer to that is still to be read, behind those to WATCH and HMGET.
    awaits_role: bool,
}

impl Writer {
    /// Begins to write with the right that was claimed.
    pub fn new(claim: Claim, keys: RedisKeys) -> Result<Self, Error> {
        let Claim {
            connection,
            epoch,
            lsn,
            scripts,
            stored,
        } = claim;
        let purging = stored.progress.and_then(|progress| progress.purging?.commit);
        let mut writer = Self {
            connection,
            keys,
            scripts,
            epoch,
            lsn,
            open: Vec::new(),
            prefix: 0,
            queued: 0,
            not_queued: None,
            tables: Tables(Box::new(|_| None)),
            ahead: None,
            purging,
            atomic_purge_keys: purge::ATOMIC_KEYS,
            on_bad_row: OnBadRow::Stop,
            asks_role: false,
            awaits_role: false,
        };
        writer.check()?;
        Ok(writer)
    }

    /// What to do about keys of another type; without a word the writer stops.
    pub fn set_on_bad_row(&mut self, policy: OnBadRow) {
        self.on_bad_row = policy;
    }

    /// Who knows the names of tables.
    pub fn set_tables(&mut self, name: impl Fn(u32) -> Option<String> + Send + 'static) {
        self.tables = Tables(Box::new(name));
    }

    /// Begins a segment.
    pub fn open(commands: &mut Commands) {
        commands.append(MULTI, 1);
    }

    /// Ends the last segment of a MULTI; the progress has to stand before.
    pub fn close(commands: &mut Commands, keys: &RedisKeys) {
        commands.command(&[b"EXEC"]);
        watch(commands, keys);
    }

    /// Sends a segment and checks every reply. Some: its EXEC was done. `next` is what comes next, if that is known; it has to be
    /// the segment of the next call. `stopped` ends a long purge early.
    pub fn apply(
        &mut self,
        segment: Segment,
        next: Option<&Segment>,
        stopped: &dyn Fn() -> bool,
    ) -> Result<Option<Applied>, Error> {
        let ahead = self.ahead.take();
        if segment.opens {
            self.queued = 0;
        }
        let bytes = segment.batch.commands().as_bytes();
        let mut begun = ahead.map_or(0, |ahead| ahead.bytes);
        let mut answers_multi = segment.opens;
        if segment.opens && !segment.purges.is_empty() {
            let commands = self.purge(&segment, stopped)?;
            self.connection.send(commands.as_bytes())?;
            self.expect_ok("MULTI")?;
            self.prefix = commands.count() - 1;
            self.expect_queued(self.prefix)?;
            // The MULTI of the purge stands for that of the segment.
            (begun, answers_multi) = (MULTI.len(), false);
        }
        match bytes.get(begun..) {
            // All of it was sent ahead.
            None | Some([]) => {}
            Some(rest) => self.connection.send(rest)?,
        }
        self.awaits_role = segment.step.is_some() && std::mem::take(&mut self.asks_role);
        if self.awaits_role {
            let mut commands = Commands::new();
            commands.command(&[b"HELLO"]);
            self.connection.send(commands.as_bytes())?;
        }
        if let Some(next) = next.filter(|next| next.opens || !segment.opens) {
            self.send_ahead(next)?;
        }
        let expected = segment
            .batch
            .commands()
            .count()
            .saturating_sub(usize::from(segment.opens));
        if answers_multi {
            self.expect_multi(expected + usize::from(self.awaits_role))?;
        }
        let (step, asked) = (segment.step, segment.asked);
        self.open.push(segment);
        let Some(step) = step else {
            self.expect_queued(expected)?;
            return Ok(None);
        };
        self.expect_queued(expected.saturating_sub(3))?;
        let reply = self.connection.receive()?;
        let (mut pending, refused) = self.check_exec(reply, step)?;
        pending |= self.open.iter().any(|segment| segment.pending);
        self.open.clear();
        self.prefix = 0;
        self.check_behind()?;
        Ok(Some(Applied {
            step,
            pending,
            asked,
            refused,
        }))
    }

    /// The epoch that this writer claimed.
    #[cfg(test)]
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Purges of more keys than this are done page by page.
    #[cfg(test)]
    pub(crate) fn set_atomic_purge_keys(&mut self, keys: usize) {
        self.atomic_purge_keys = keys;
    }

    /// Takes the name away by which a newer session would find this connection.
    #[cfg(test)]
    pub(crate) fn rename_for_test(&mut self) {
        let _ = self
            .connection
            .call("rename", &[b"CLIENT", b"SETNAME", b"nobody"]);
    }

    /// Counts the replies of its connection.
    pub fn answers(&self) -> Answers {
        self.connection.answers()
    }

    /// Whether a MULTI is open.
    pub fn is_open(&self) -> bool {
        !self.open.is_empty()
    }

    /// Queues a command that changes nothing behind a MULTI whose rest is not there yet: Redis closes a connection that says nothing for
    /// its `timeout`, and so do balancers. It is one that a session needs the right to anyway: one that is refused would end the MULTI.
    pub fn keep_alive(&mut self) -> Result<(), Error> {
        let mut batch = Batch::new();
        batch
            .bookkeeping()
            .command(&[b"HGET", &self.keys.progress, b"epoch"]);
        let segment = Segment {
            batch,
            ..Segment::default()
        };
        self.apply(segment, None, &|| false).map(|_| ())
    }

    /// Gives up a MULTI of which only a part was sent.
    pub fn abandon(&mut self) -> Result<(), Error> {
        if self.is_open() {
            self.open.clear();
            self.connection.call("give up a batch", &[b"DISCARD"])?;
        }
        Ok(())
    }

    /// Asks again whether this session is still the one that may write: an idle session notices this way that Redis
    /// went away, was emptied, belongs to somebody else, or is no master any more (INVARIANT I1). A replica answers what only reads, and
    /// will lose what its new master never had; so one command is one that writes, and changes nothing. One that takes writes says what it is.
    pub fn check(&mut self) -> Result<(), Error> {
        let mut commands = Commands::new();
        commands.command(&[b"HELLO"]);
        commands.command(&[b"HDEL", &self.keys.progress, NO_FIELD]);
        watch(&mut commands, &self.keys);
        self.connection.send(commands.as_bytes())?;
        let told = self.connection.receive()?;
        match self.connection.receive()? {
            Value::Int(_) => {}
            Value::ServerError(reply) => return Err(reply_error("Redis takes no writes", &reply)),
            _ => return Err(unreadable("HDEL")),
        }
        judge_role(told)?;
        self.check_watch()
    }

    /// Has the next EXEC followed by the question whether this is a master: a session that is never idle is not checked otherwise.
    pub fn ask_role(&mut self) {
        self.asks_role = true;
    }

    /// How many replicas have acknowledged everything so far. `count` of them are waited for, at most so long.
    pub fn wait_replicas(&mut self, count: u32, timeout_ms: u64) -> Result<i64, Error> {
        let (count_text, timeout) = (count.to_string(), timeout_ms.to_string());
        let reply = self.wait(
            "wait for replicas",
            &[b"WAIT", count_text.as_bytes(), timeout.as_bytes()],
        )?;
        match reply {
            Value::Int(acknowledged) => Ok(acknowledged),
            _ => Err(unreadable("WAIT")),
        }
    }

    /// Whether the append-only file holds everything so far, waited for at most so long.
    pub fn wait_aof(&mut self, timeout_ms: u64) -> Result<bool, Error> {
        let timeout = timeout_ms.to_string();
        let reply = self
            .wait(
                "wait for the append-only file",
                &[b"WAITAOF", b"1", b"0", timeout.as_bytes()],
            )
            .map_err(|error| {
                error.next("walmirror run --durability memory   # or Redis 7.2 or later with appendonly yes")
            })?;
        Ok(matches!(reply, Value::Array(counts) if matches!(counts.first(), Some(Value::Int(1..)))))
    }

    /// What is waited for is all that Redis has: behind it stands the question whether that is what was written.
    fn wait(&mut self, what: &str, command: &[&[u8]]) -> Result<Value, Error> {
        self.retract()?;
        let mut commands = Commands::new();
        commands.command(command);
        watch(&mut commands, &self.keys);
        self.connection.send(commands.as_bytes())?;
        match self.connection.receive()? {
            Value::ServerError(reply) => Err(reply_error(format!("Redis refuses: cannot {what}"), &reply)),
            reply => self.check_watch().map(|()| reply),
        }
    }

    /// Whether Redis never tells the disk to keep what it appends. Where it does not say, it is taken to do so.
    pub fn never_syncs(&mut self) -> Result<bool, Error> {
        Ok(setting(&mut self.connection, "appendfsync")?.as_deref() == Some("no"))
    }

    fn expect_ok(&mut self, command: &str) -> Result<(), Error> {
        match self.connection.receive()? {
            Value::Okay => Ok(()),
            Value::ServerError(reply) => Err(reply_error(format!("Redis refuses {command}"), &reply)),
            _ => Err(unreadable(command)),
        }
    }

    /// Reads the reply to a MULTI behind which so many commands were sent. Where it is refused, as somebody takes rights away, each of them is
    /// done by itself or refused, so that the position, a cursor or a note may say what is not so: everything is to be made anew.
    fn expect_multi(&mut self, behind: usize) -> Result<(), Error> {
        let reply = match self.connection.receive()? {
            Value::Okay => return Ok(()),
            Value::ServerError(reply) => reply,
            _ => return Err(unreadable("MULTI")),
        };
        if reply.code() != "NOPERM" {
            // Whatever else refuses this has refused what is behind it.
            return Err(reply_error("Redis refuses MULTI", &reply));
        }
        let ahead = self.ahead.take().map_or(0, |ahead| ahead.sent);
        let mut commands = Commands::new();
        commands.command(&[b"HSET", &self.keys.progress, RESYNC.as_bytes(), b"1"]);
        self.connection.send(commands.as_bytes())?;
        for _ in 0..=behind + ahead {
            self.connection.receive()?;
        }
        Err(reply_error("Redis refuses MULTI", &reply))
    }

    fn expect_queued(&mut self, count: usize) -> Result<(), Error> {
        for _ in 0..count {
            match self.connection.receive()? {
                Value::SimpleString(text) if text == "QUEUED" => {}
                Value::ServerError(reply) => drop(self.not_queued.get_or_insert((self.queued, reply))),
                _ => return Err(unreadable("a command inside of a MULTI")),
            }
            self.queued += 1;
        }
        Ok(())
    }

    /// Checks every element of the EXEC: whether a patch noted its key as pending, and which keys were refused and may be.
    fn check_exec(&mut self, reply: Value, step: Step) -> Result<(bool, Vec<Refused>), Error> {
        let elements = match reply {
            Value::Array(elements) => elements,
            // The WATCH was broken; the epoch tells by whom, or the position.
            Value::Nil => return Err(self.check_watch().err().unwrap_or_else(|| touched(&self.keys))),
            Value::ServerError(reply) => {
                return Err(match self.not_queued.take() {
                    Some((command, cause)) => self.unqueued(command, &cause),
                    None => reply_error(refused::NOTHING_APPLIED, &reply),
                }
                .at(step.lsn));
            }
            _ => return Err(unreadable("EXEC").at(step.lsn)),
        };
        self.lsn = step.lsn;
        let mut pending = false;
        let mut refused: Option<Refusals> = None;
        for (command, element) in elements.into_iter().enumerate() {
            match element {
                Value::SimpleString(text) => pending |= text == PENDING_REPLY,
                Value::ServerError(reply) => Refusals::add(&mut refused, command, reply),
                _ => {}
            }
        }
        let Some(refused) = refused else {
            return Ok((pending, Vec::new()));
        };
        match self.skipped(&refused) {
            Some(skipped) => Ok((pending, skipped)),
            None => Err(self.refused(&refused, step)),
        }
    }

    /// Reads the replies to WATCH and HMGET: this session must still be the one that may write, and Redis hold what it wrote.
    fn check_watch(&mut self) -> Result<(), Error> {
        self.expect_ok("WATCH")?;
        let fields = match self.connection.receive()? {
            Value::Array(fields) => fields,
            Value::ServerError(reply) => return Err(reply_error("cannot read the epoch", &reply)),
            _ => return Err(unreadable("HMGET")),
        };
        match fields.as_slice() {
            [Value::BulkString(epoch), lsn] if epoch == self.epoch.to_string().as_bytes() => {
                let lsn = match lsn {
                    Value::BulkString(lsn) => String::from_utf8_lossy(lsn),
                    _ => "nothing".into(),
                };
                match lsn.parse() {
                    Ok(held) if self.lsn == held => Ok(()),
                    _ => Err(self.went_back(&lsn)),
                }
            }
            [Value::BulkString(epoch), _] => Err(self.fenced(Some(epoch))),
            [Value::Nil, _] => Err(Error::redis(
                "Redis lost the progress key",
                Class::Retry,
                "it was emptied, or the key was evicted or removed",
            )),
            _ => Err(unreadable("HMGET")),
        }
    }

    /// Reads all that follows the reply to an EXEC.
    fn check_behind(&mut self) -> Result<(), Error> {
        self.check_watch()?;
        if std::mem::take(&mut self.awaits_role) {
            judge_role(self.connection.receive()?)?;
        }
        Ok(())
    }

    /// Nobody else writes the position while the epoch is this session's. The next one finds out what Redis holds.
    fn went_back(&self, lsn: &str) -> Error {
        let text = format!("the position was {}, and now it is {lsn}", self.lsn);
        Error::redis("Redis went back", Class::Retry, text)
    }

    fn fenced(&self, other: Option<&[u8]>) -> Error {
        let other = other.map_or_else(
            || "a later one".to_owned(),
            |epoch| String::from_utf8_lossy(epoch).into_owned(),
        );
        let text = format!(
            "this one has epoch {}, Redis belongs to epoch {other}",
            self.epoch
        );
        // The next session waits for the slot, as any second sink does: that is what keeps two of them from taking it in turns.
        Error::redis("another walmirror has taken over this slot", Class::Retry, text)
            .next("redis-cli CLIENT LIST   # the connection named walmirror:<slot>:<epoch> shows where the other one runs")
    }
}

fn touched(keys: &RedisKeys) -> Error {
    let what = format!(
        "somebody changed the key {} during a batch, which was not applied",
        String::from_utf8_lossy(&keys.progress)
    );
    Error::redis(what, class_of("TRYAGAIN", None), "the WATCH was broken")
}

fn watch(commands: &mut Commands, keys: &RedisKeys) {
    commands.command(&[b"WATCH", &keys.progress]);
    commands.command(&[b"HMGET", &keys.progress, b"epoch", b"lsn"]);
}
