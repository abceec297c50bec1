//! Rows that cannot be mirrored: what `--on-bad-row skip` leaves behind, in a Redis stream of bounded length. Keys, tables and
//! reasons; INVARIANT I8: no values.

use redis::Value;
use walmirror_proto::Lsn;

use crate::error::Error;
use crate::plan::RedisKeys;
use crate::redis::{Connection, unreadable};
use crate::resp::Commands;
use crate::shown;

/// About so many notes are kept, the latest: no fewer.
pub const KEPT: u64 = 1000;
/// So many of the rows that one step leaves out are named in the log.
const LOGGED: usize = 10;

/// A row that is not mirrored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rejected {
    /// Its key, as far as that could be told. What is read back is cut where it is long.
    pub key: Vec<u8>,
    /// `schema.name`
    pub table: String,
    /// Where in the stream it was.
    pub lsn: Lsn,
    /// Why.
    pub reason: String,
}

impl Rejected {
    /// Appends the command that notes it. It belongs into the EXEC whose progress passes the row, so that each is noted
    /// once. A long key is cut: a thousand notes of megabytes would be gigabytes of Redis.
    pub fn write(&self, commands: &mut Commands, keys: &RedisKeys) {
        commands.command(&[
            b"XADD",
            &keys.rejected,
            b"MAXLEN",
            b"~",
            KEPT.to_string().as_bytes(),
            b"*",
            b"key",
            &shown::noted_key(&self.key),
            b"table",
            self.table.as_bytes(),
            b"lsn",
            self.lsn.to_string().as_bytes(),
            b"reason",
            self.reason.as_bytes(),
        ]);
    }

    /// One ERROR line.
    fn log(&self) {
        let key = shown::key(&self.key);
        tracing::error!(table = self.table, key = %key, lsn = %self.lsn, "a row is not mirrored: {}", self.reason);
    }

    /// The error that `--on-bad-row stop` ends with.
    pub fn into_error(self) -> Error {
        let key = shown::key(&self.key);
        Error::setup(format!(
            "the row with the key \"{key}\" of the table {} cannot be mirrored: {}",
            self.table, self.reason
        ))
        .at(self.lsn)
        .next("walmirror run --on-bad-row skip …   # goes on without the row, and notes its key")
    }
}

/// What the log is told of the rows that one step leaves out: a transaction may bring millions.
#[derive(Debug, Default)]
pub struct Told {
    rows: usize,
    lsn: Lsn,
}

impl Told {
    /// One more: its ERROR line, unless there were many.
    pub fn log(&mut self, rejected: &Rejected) {
        self.rows += 1;
        self.lsn = rejected.lsn;
        if self.rows <= LOGGED {
            rejected.log();
        }
    }

    /// The step is over: one line for those that were not named.
    pub fn end(&mut self) {
        let told = std::mem::take(self);
        if let Some(more) = told.rows.checked_sub(LOGGED).filter(|more| *more > 0) {
            tracing::error!(lsn = %told.lsn, next = "walmirror status", "{more} more rows are not mirrored");
        }
    }
}

/// How many notes there are, and the latest of them.
pub fn read(
    connection: &mut Connection,
    keys: &RedisKeys,
    latest: u32,
) -> Result<(u64, Vec<Rejected>), Error> {
    let what = "read what was rejected";
    let count = match connection.call(what, &[b"XLEN", &keys.rejected])? {
        Value::Int(count) => u64::try_from(count).unwrap_or(0),
        _ => 0,
    };
    if count == 0 {
        return Ok((0, Vec::new()));
    }
    let latest = latest.to_string();
    let command: [&[u8]; 6] = [
        b"XREVRANGE",
        &keys.rejected,
        b"+",
        b"-",
        b"COUNT",
        latest.as_bytes(),
    ];
    let Value::Array(entries) = connection.call(what, &command)? else {
        return Err(unreadable("XREVRANGE"));
    };
    Ok((count, entries.into_iter().filter_map(entry).collect()))
}

/// An entry is its id and a list of fields and values.
fn entry(entry: Value) -> Option<Rejected> {
    let Value::Array(parts) = entry else { return None };
    let Some(Value::Array(fields)) = parts.into_iter().nth(1) else {
        return None;
    };
    let mut rejected = Rejected::default();
    let mut fields = fields.into_iter();
    while let (Some(Value::BulkString(field)), Some(Value::BulkString(value))) =
        (fields.next(), fields.next())
    {
        let text = || String::from_utf8_lossy(&value).into_owned();
        match field.as_slice() {
            b"table" => rejected.table = text(),
            b"lsn" => rejected.lsn = text().parse().unwrap_or_default(),
            b"reason" => rejected.reason = text(),
            b"key" => rejected.key = value,
            _ => {}
        }
    }
    Some(rejected)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The story: a thousand notes of keys of megabytes were gigabytes of Redis.
    #[test]
    fn a_note_of_a_long_key_is_short_and_so_is_what_the_sink_ends_with() {
        let rejected = Rejected {
            key: vec![b'k'; 8 << 20],
            reason: "it is a test".to_owned(),
            ..Rejected::default()
        };
        let mut commands = Commands::new();
        rejected.write(&mut commands, &RedisKeys::new("s"));
        assert!(commands.len() < 2048, "{}", commands.len());
        let told = rejected.into_error().to_string();
        assert!(
            told.len() < 1024 && told.contains("… (8388608 bytes)"),
            "{}",
            told.len()
        );
    }
}
