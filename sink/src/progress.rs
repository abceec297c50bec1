//! The progress hash: how far Redis is, who writes it, and where the backfills are. Written in the same MULTI/EXEC as the
//! data it speaks of (INVARIANT I2); read at the start of a session.

use std::collections::BTreeMap;

use walmirror_proto::Lsn;

use crate::continuity::Last;
use crate::plan::RedisKeys;
use crate::resp::Commands;
use crate::transaction::{Commit, Part};

/// Prefix of the fields that hold the backfill cursors.
const BACKFILL: &str = "backfill:";

/// The field that says when the last transaction was committed.
pub(crate) const COMMIT_TS: &str = "commit_ts";
/// The field that says which transaction was applied last.
pub(crate) const LAST: &str = "last_commit";
/// The field that says that everything has to be made anew.
pub(crate) const RESYNC: &str = "resync";
/// The field that says that what was begun anew is not whole yet.
pub(crate) const HEALING: &str = "healing";
/// The field that says that the first start is under way: there is no slot yet, or one of which nothing was streamed.
pub(crate) const FIRST: &str = "first_start";
/// The fields of a transaction that is applied in part.
pub(crate) const PART_FIELDS: [&[u8]; 4] = [
    b"part_xid",
    b"part_commit_lsn",
    b"part_records",
    PART_COMMIT.as_bytes(),
];
/// The one of them that an older version of this program does not know. It names the transaction, so that one that such a version has
/// left there is told from the one that it has written about since.
const PART_COMMIT: &str = "part_commit";
/// The field that says that keys are removed ahead of the transaction that they go with, and which one that is.
pub(crate) const PURGING: &[u8] = b"purging";

/// What the progress hash says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Every transaction that ends at or before this is in Redis.
    pub lsn: Lsn,
    /// When the last of them committed, as text; for people.
    pub commit_ts: Option<String>,
    /// Which one that was. None: an older version of this program wrote the hash.
    pub last: Option<Last>,
    /// Raised by every session; only the session that raised it last may write.
    pub epoch: u64,
    /// The system identifier of the Postgres cluster.
    pub system_id: String,
    /// Its timeline.
    pub timeline: u32,
    /// The database.
    pub database: String,
    /// The transaction behind `lsn` that is applied in part.
    pub part: Option<Part>,
    /// oid -> backfill cursor (JSON); see [`Self::cursor`].
    pub cursors: BTreeMap<u32, String>,
    /// Keys may be gone that go only with what is behind `lsn`.
    pub purging: Option<Purging>,
    /// Redis and the stream did not fit together, and the session that was to make everything anew has not begun to.
    pub resync: bool,
    /// It has begun to, and has not come to its end.
    pub healing: bool,
    /// The first start is under way: whatever slot there is was made by it, and nothing was streamed from that.
    pub first: bool,
}

/// Keys are being removed page by page, ahead of the EXEC that they go with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Purging {
    /// The last transaction that asks for it. None: the catalog did, or an older version of this program wrote this down.
    pub commit: Option<Commit>,
}

impl Purging {
    /// As the progress hash holds it: the transaction as in `last_commit`, or 1.
    pub(crate) fn encode(&self) -> String {
        self.commit
            .map_or_else(|| "1".to_owned(), |commit| Last::Commit(commit).encode())
    }

    fn parse(text: &str) -> Self {
        let commit = match Last::parse(text) {
            Some(Last::Commit(commit)) => Some(commit),
            _ => None,
        };
        Self { commit }
    }
}

/// The progress hash holds something that this program did not write.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("field \"{field}\" of the progress hash is missing or unreadable")]
pub struct ProgressError {
    /// Which field.
    pub field: &'static str,
}

impl Progress {
    /// The backfill cursor of a relation (JSON). None: its backfill has not begun, or is to begin anew.
    pub fn cursor(&self, relation: u32) -> Option<&str> {
        let cursor = self.cursors.get(&relation).filter(|_| !self.resync);
        cursor.map(String::as_str)
    }

    /// Reads the fields and values of HGETALL. None: there is no such hash.
    pub fn parse<'a>(
        fields: impl IntoIterator<Item = (&'a [u8], &'a [u8])>,
    ) -> Result<Option<Self>, ProgressError> {
        let fields: BTreeMap<&str, &str> = fields
            .into_iter()
            .filter_map(|(field, value)| {
                Some((std::str::from_utf8(field).ok()?, std::str::from_utf8(value).ok()?))
            })
            .collect();
        if fields.is_empty() {
            return Ok(None);
        }
        fn number<T: std::str::FromStr>(
            fields: &BTreeMap<&str, &str>,
            field: &'static str,
        ) -> Result<T, ProgressError> {
            fields
                .get(field)
                .and_then(|text| text.parse().ok())
                .ok_or(ProgressError { field })
        }
        let text = |field: &str| fields.get(field).map(|text| (*text).to_owned());
        let last = match fields.get(LAST) {
            Some(text) => Some(Last::parse(text).ok_or(ProgressError { field: LAST })?),
            None => None,
        };
        let commit_ts = text(COMMIT_TS);
        let part = if fields.contains_key("part_xid") {
            let (xid, commit_lsn) = (number(&fields, "part_xid")?, number(&fields, "part_commit_lsn")?);
            let commit_time = match fields.get(PART_COMMIT).and_then(|text| Last::parse(text)) {
                Some(Last::Commit(commit)) if (commit.xid, commit.lsn) == (xid, commit_lsn) => {
                    Some(commit.time)
                }
                _ => None,
            };
            Some(Part {
                xid,
                commit_lsn,
                commit_time,
                records: number(&fields, "part_records")?,
            })
        } else {
            None
        };
        let cursors = fields
            .iter()
            .filter_map(|(field, value)| {
                Some((field.strip_prefix(BACKFILL)?.parse().ok()?, (*value).to_owned()))
            })
            .collect();
        Ok(Some(Self {
            lsn: number(&fields, "lsn")?,
            last: last.filter(|last| is_current(last, commit_ts.as_deref())),
            commit_ts,
            epoch: number(&fields, "epoch")?,
            system_id: text("system_id").unwrap_or_default(),
            timeline: number(&fields, "timeline")?,
            database: text("database").unwrap_or_default(),
            part,
            cursors,
            purging: fields.get("purging").map(|text| Purging::parse(text)),
            resync: fields.contains_key(RESYNC),
            healing: fields.contains_key(HEALING),
            first: fields.contains_key(FIRST),
        }))
    }
}

/// A step forward, to be written with the data that it speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Every transaction that ends at or before this is in Redis once the step is applied.
    pub lsn: Lsn,
    /// The last of them. None: a keepalive moved the position.
    pub last: Option<Commit>,
    /// What is applied of the transaction behind `lsn`.
    pub part: Option<Part>,
    /// Whether the hash may hold a part from before, which is then over.
    pub clear_part: bool,
}

/// Appends the command that writes a step.
pub fn write_step(commands: &mut Commands, keys: &RedisKeys, step: &Step) {
    let mut fields: Vec<(&[u8], String)> = vec![(b"lsn", step.lsn.to_string())];
    if let Some(commit) = step.last {
        fields.push((COMMIT_TS.as_bytes(), timestamp(commit.time)));
        fields.push((LAST.as_bytes(), Last::Commit(commit).encode()));
    }
    if let Some(part) = step.part {
        fields.push((b"part_xid", part.xid.to_string()));
        fields.push((b"part_commit_lsn", part.commit_lsn.to_string()));
        fields.push((b"part_records", part.records.to_string()));
        if let Some(time) = part.commit_time {
            let commit = Commit {
                lsn: part.commit_lsn,
                xid: part.xid,
                time,
            };
            fields.push((PART_COMMIT.as_bytes(), Last::Commit(commit).encode()));
        }
    }
    commands
        .begin(2 + 2 * fields.len())
        .arg(b"HSET")
        .arg(&keys.progress);
    for (field, value) in &fields {
        commands.arg(field).arg(value.as_bytes());
    }
    if step.clear_part && step.part.is_none() {
        let mut command: Vec<&[u8]> = vec![b"HDEL", &keys.progress];
        command.extend(PART_FIELDS);
        commands.command(&command);
    }
}

/// Appends the command that says that everything is being made anew: every backfill has its new cursor in the same step.
pub fn write_resync_begun(commands: &mut Commands, keys: &RedisKeys) {
    commands.command(&[b"HDEL", &keys.progress, RESYNC.as_bytes()]);
    commands.command(&[b"HSET", &keys.progress, HEALING.as_bytes(), b"1"]);
}

/// Appends the command that says that everything is filled that was begun anew.
pub fn write_healed(commands: &mut Commands, keys: &RedisKeys) {
    commands.command(&[b"HDEL", &keys.progress, HEALING.as_bytes()]);
}

/// Appends the command that writes (or, with None, removes) a backfill cursor.
pub fn write_cursor(commands: &mut Commands, keys: &RedisKeys, relation: u32, cursor: Option<&str>) {
    let field = cursor_field(relation);
    match cursor {
        Some(cursor) => commands.command(&[b"HSET", &keys.progress, field.as_bytes(), cursor.as_bytes()]),
        None => commands.command(&[b"HDEL", &keys.progress, field.as_bytes()]),
    };
}

/// The field that holds the backfill cursor of a relation.
pub(crate) fn cursor_field(relation: u32) -> String {
    format!("{BACKFILL}{relation}")
}

/// An older version of this program, which does not know the field, has written behind it if the one for people says
/// another time.
fn is_current(last: &Last, commit_ts: Option<&str>) -> bool {
    match last {
        Last::NoneSince(_) => commit_ts.is_none(),
        Last::Commit(commit) => commit_ts == Some(timestamp(commit.time).as_str()),
    }
}

/// A Postgres timestamp as timestamptz prints it.
pub(crate) fn timestamp(micros: i64) -> String {
    let mut text = Vec::new();
    walmirror_proto::row::Datum::Timestamptz(micros).write_text(&mut text);
    String::from_utf8_lossy(&text).into_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::resp::tests::parse;

    /// Applies HSET and HDEL of the progress key to fields, as Redis would.
    fn apply(commands: &Commands, fields: &mut BTreeMap<Vec<u8>, Vec<u8>>) {
        for command in parse(commands.as_bytes()) {
            let (name, args) = (command.first().unwrap(), command.get(2..).unwrap());
            match name.as_slice() {
                b"HSET" => fields.extend(
                    args.chunks(2)
                        .map(|pair| (pair.first().unwrap().clone(), pair.last().unwrap().clone())),
                ),
                _ => fields.retain(|field, _| !args.contains(field)),
            }
        }
    }

    fn read(fields: &BTreeMap<Vec<u8>, Vec<u8>>) -> Result<Option<Progress>, ProgressError> {
        Progress::parse(
            fields
                .iter()
                .map(|(field, value)| (field.as_slice(), value.as_slice())),
        )
    }

    #[test]
    fn steps_read_back() {
        let keys = RedisKeys::new("s");
        let mut fields = BTreeMap::new();
        assert_eq!(read(&fields), Ok(None));
        for (field, value) in [
            ("epoch", "3"),
            ("system_id", "77"),
            ("timeline", "1"),
            ("database", "d"),
        ] {
            fields.insert(field.as_bytes().to_vec(), value.as_bytes().to_vec());
        }
        assert_eq!(read(&fields), Err(ProgressError { field: "lsn" }));

        let last = Commit {
            lsn: Lsn(8),
            xid: 7,
            time: 0,
        };
        let part = Part {
            xid: 9,
            commit_lsn: Lsn(0x1_0000_0020),
            commit_time: Some(-3),
            records: 5,
        };
        let mut commands = Commands::new();
        write_step(
            &mut commands,
            &keys,
            &Step {
                lsn: Lsn(16),
                last: Some(last),
                part: Some(part),
                clear_part: false,
            },
        );
        write_cursor(&mut commands, &keys, 42, Some("{}"));
        apply(&commands, &mut fields);
        let progress = read(&fields).unwrap().unwrap();
        assert_eq!(
            (progress.lsn, progress.part, progress.epoch),
            (Lsn(16), Some(part), 3)
        );
        // What an older version has left there says nothing.
        let mut older = fields.clone();
        older.insert(b"part_xid".to_vec(), b"10".to_vec());
        let part_of = |fields: &BTreeMap<_, _>| read(fields).unwrap().unwrap().part.unwrap();
        assert_eq!(part_of(&older).commit_time, None);
        assert_eq!(progress.commit_ts.as_deref(), Some("2000-01-01 00:00:00+00"));
        assert_eq!(progress.last, Some(Last::Commit(last)));
        assert_eq!(progress.cursors, BTreeMap::from([(42, "{}".to_owned())]));

        commands.clear();
        write_step(
            &mut commands,
            &keys,
            &Step {
                lsn: Lsn(17),
                last: None,
                part: None,
                clear_part: true,
            },
        );
        write_cursor(&mut commands, &keys, 42, None);
        apply(&commands, &mut fields);
        let progress = read(&fields).unwrap().unwrap();
        assert_eq!(
            (progress.lsn, progress.part, progress.cursors.len()),
            (Lsn(17), None, 0)
        );
        assert_eq!(progress.last, Some(Last::Commit(last)));
    }

    #[test]
    fn the_last_transaction_is_known_unless_an_older_version_wrote_behind_it() {
        let mut fields = BTreeMap::from([("lsn", "0/11"), ("epoch", "3"), ("timeline", "1")]);
        let read = |fields: &BTreeMap<&str, &str>| {
            let fields = fields
                .iter()
                .map(|(field, value)| (field.as_bytes(), value.as_bytes()));
            Progress::parse(fields).map(|progress| progress.unwrap().last)
        };
        assert_eq!(read(&fields), Ok(None));
        fields.insert(LAST, "0/10");
        assert_eq!(read(&fields), Ok(Some(Last::NoneSince(Lsn(16)))));
        fields.insert("commit_ts", "2000-01-01 00:00:02+00");
        assert_eq!(read(&fields), Ok(None));
        fields.remove("commit_ts");
        let last = Last::Commit(Commit {
            lsn: Lsn(16),
            xid: 7,
            time: 1_000_000,
        });
        let text = last.encode();
        assert_eq!(text, "0/10 7 1000000");
        fields.insert(LAST, &text);
        assert_eq!(read(&fields), Ok(None));
        fields.insert("commit_ts", "2000-01-01 00:00:01+00");
        assert_eq!(read(&fields), Ok(Some(last)));
        fields.insert("commit_ts", "2000-01-01 00:00:02+00");
        assert_eq!(read(&fields), Ok(None));
        for text in ["", "x", "0/10 7", "0/10 7 x"] {
            fields.insert(LAST, text);
            assert_eq!(read(&fields), Err(ProgressError { field: LAST }), "{text:?}");
        }
    }
}
