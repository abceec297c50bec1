//! The beginning of a session: what Redis holds, and taking the right to write. A claim raises the epoch in the progress
//! hash; whoever claimed before finds its WATCH broken at the next EXEC and can never write again.

use std::collections::BTreeMap;

use prost::Message;
use redis::Value;
use walmirror_proto::{Lsn, pb};

use super::clients::{client_name, clients, require_own};
use super::connection::pairs;
use super::{Connection, unreadable};
use crate::continuity::Last;
use crate::error::{Class, Error};
use crate::plan::{Mapping, RedisKeys, Script, Scripts};
use crate::progress::{COMMIT_TS, FIRST, LAST, PART_FIELDS, PURGING, Progress, RESYNC};
use crate::replication::SystemInfo;
use crate::shell::{THE_USER, word};

/// What earlier sessions left.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stored {
    /// None: nobody has ever mirrored this slot here, or Redis lost it.
    pub progress: Option<Progress>,
    /// The relations that Redis is kept by.
    pub relations: BTreeMap<u32, pb::Relation>,
    /// The progress began anew in a database of Redis that holds no key of anybody: what is written from here on finds
    /// nothing in its way.
    pub nothing_else: bool,
}

/// Which server and database the stream comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The system identifier of the cluster.
    pub system_id: String,
    /// Its timeline.
    pub timeline: u32,
    /// The database.
    pub database: String,
}

impl From<SystemInfo> for Identity {
    fn from(system: SystemInfo) -> Self {
        Self {
            system_id: system.system_id,
            timeline: system.timeline,
            database: system.database.unwrap_or_default(),
        }
    }
}

/// The right to write.
#[derive(Debug)]
pub struct Claim {
    /// The connection that has it.
    pub connection: Connection,
    /// The epoch that the progress hash holds as long as nobody else claims.
    pub epoch: u64,
    /// The position that it holds since.
    pub lsn: Lsn,
    /// The loaded scripts.
    pub scripts: Scripts,
    /// What Redis held at that moment.
    pub stored: Stored,
}

/// Reads what earlier sessions left.
pub fn read_stored(connection: &mut Connection, keys: &RedisKeys) -> Result<Stored, Error> {
    let fields = hash(connection, &keys.progress)?;
    let progress = Progress::parse(
        fields
            .iter()
            .map(|(field, value)| (field.as_slice(), value.as_slice())),
    )
    .map_err(|error| damaged(&keys.progress, &error.to_string()))?;
    let mut relations = BTreeMap::new();
    for (oid, bytes) in hash(connection, &keys.relations)? {
        let oid = std::str::from_utf8(&oid).ok().and_then(|text| text.parse().ok());
        let relation = pb::Relation::decode(bytes.as_slice());
        let (Some(oid), Ok(relation)) = (oid, relation) else {
            return Err(damaged(&keys.relations, "a field cannot be read"));
        };
        Mapping::new(&relation).map_err(|error| damaged(&keys.relations, &error.to_string()))?;
        relations.insert(oid, relation);
    }
    Ok(Stored {
        progress,
        relations,
        nothing_else: false,
    })
}

/// Whether Redis holds no key but the slot's own. Keys that expired but were not removed yet count as keys.
fn holds_nothing_else(connection: &mut Connection, keys: &RedisKeys) -> Result<bool, Error> {
    let exists: [&[u8]; 5] = [
        b"EXISTS",
        &keys.progress,
        &keys.relations,
        &keys.pending,
        &keys.rejected,
    ];
    let own = connection.call("count the keys", &exists)?;
    Ok(connection.call("count the keys", &[b"DBSIZE"])? == own)
}

fn damaged(key: &[u8], why: &str) -> Error {
    let key = String::from_utf8_lossy(key);
    Error::redis(
        format!("the key {key} was changed by somebody else"),
        Class::Operator,
        why.to_owned(),
    )
    .next(format!(
        "redis-cli UNLINK '{key}'   # then walmirror mirrors everything anew"
    ))
}

impl Claim {
    /// Takes the right to write, and ends the connections of whoever had it. With `start`, the progress begins anew at
    /// this position (first start, or resync after a gap); otherwise it goes on from what is stored, if that `fits`: nothing
    /// is written before it has been asked, nor if what is stored changes after.
    pub fn take(
        mut connection: Connection,
        keys: &RedisKeys,
        slot: &str,
        identity: &Identity,
        start: Option<Lsn>,
        fits: impl FnOnce(&Stored) -> Result<(), Error>,
    ) -> Result<Self, Error> {
        let scripts = load_scripts(&mut connection)?;
        connection.call("watch the progress key", &[b"WATCH", &keys.progress])?;
        let mut stored = read_stored(&mut connection, keys)?;
        stored.nothing_else =
            start.is_some() && stored.relations.is_empty() && holds_nothing_else(&mut connection, keys)?;
        if start.is_none() && stored.progress.is_none() {
            // An epoch without a position would be a progress hash that no session can begin with.
            return Err(Error::redis(
                "cannot claim the progress key",
                Class::Retry,
                "it was there a moment ago: Redis was emptied meanwhile",
            ));
        }
        require_own(&mut connection, slot, identity, &stored)?;
        fits(&stored)?;
        // Where nobody has claimed yet it begins behind a position, and positions only rise: so also after Redis was emptied it is none that
        // somebody had before, whose purge may still be under way.
        let before = match &stored.progress {
            Some(progress) if !progress.first => progress.epoch,
            _ => start.map_or(0, |lsn| lsn.0),
        };
        let epoch = before.saturating_add(1);
        let held = stored.progress.as_ref().map(|progress| progress.lsn);
        let lsn = start.or(held).unwrap_or_default();
        let mut fields: Vec<(&str, String)> = vec![
            ("epoch", epoch.to_string()),
            ("system_id", identity.system_id.clone()),
            ("timeline", identity.timeline.to_string()),
            ("database", identity.database.clone()),
        ];
        connection.call("begin", &[b"MULTI"])?;
        if let Some(lsn) = start {
            // The part of the old life goes; the epoch goes on rising (INVARIANT I4). The cursors stay for what they know of old
            // key templates: that everything begins anew is noted, so that it does even if this session ends before it has
            // written its first batch.
            let mut command: Vec<&[u8]> = vec![b"HDEL", &keys.progress];
            command.extend(PART_FIELDS);
            command.push(PURGING);
            command.push(COMMIT_TS.as_bytes());
            command.push(FIRST.as_bytes());
            connection.call("reset the progress", &command)?;
            fields.push(("lsn", lsn.to_string()));
            fields.push((LAST, Last::NoneSince(lsn).encode()));
            fields.push((RESYNC, "1".to_owned()));
        }
        let mut command: Vec<&[u8]> = vec![b"HSET", &keys.progress];
        command.extend(
            fields
                .iter()
                .flat_map(|(field, value)| [field.as_bytes(), value.as_bytes()]),
        );
        connection.call("claim the progress", &command)?;
        if connection.call("claim the progress", &[b"EXEC"])? == Value::Nil {
            return Err(Error::redis(
                "cannot claim the progress key",
                Class::Retry,
                "another walmirror claimed it at the same time",
            ));
        }
        if let Some(progress) = stored.progress.as_mut().filter(|_| start.is_some()) {
            progress.purging = None;
        }
        kill_older(&mut connection, slot, epoch);
        Ok(Self {
            connection,
            epoch,
            lsn,
            scripts,
            stored,
        })
    }
}

/// Notes, before a slot is made, that the first start is under way: making it may take as long as the longest transaction runs, and
/// whatever ends the start meanwhile, the next one knows what it finds as its own. True: there was nothing, and now there is the note,
/// or there was one.
pub fn begin_first(
    connection: &mut Connection,
    keys: &RedisKeys,
    identity: &Identity,
) -> Result<bool, Error> {
    let what = "note that the first start is under way";
    connection.call(what, &[b"WATCH", &keys.progress])?;
    if let Some(progress) = read_stored(connection, keys)?.progress {
        return Ok(progress.first);
    }
    let timeline = identity.timeline.to_string();
    let lsn = Lsn::INVALID.to_string();
    let command: [&[u8]; 14] = [
        b"HSET",
        &keys.progress,
        b"epoch",
        b"0",
        b"system_id",
        identity.system_id.as_bytes(),
        b"timeline",
        timeline.as_bytes(),
        b"database",
        identity.database.as_bytes(),
        b"lsn",
        lsn.as_bytes(),
        FIRST.as_bytes(),
        b"1",
    ];
    connection.call(what, &[b"MULTI"])?;
    connection.call(what, &command)?;
    match connection.call(what, &[b"EXEC"])? {
        Value::Nil => Err(Error::redis(
            format!("cannot {what}"),
            Class::Retry,
            "another walmirror began at the same time",
        )),
        _ => Ok(true),
    }
}

fn load_scripts(connection: &mut Connection) -> Result<Scripts, Error> {
    let mut hashes: [Vec<u8>; Script::ALL.len()] = Default::default();
    for (hash, script) in hashes.iter_mut().zip(Script::ALL) {
        let source = script.source();
        match connection.call("load a script", &[b"SCRIPT", b"LOAD", source.as_bytes()])? {
            Value::BulkString(name) => *hash = name,
            _ => return Err(unreadable("SCRIPT LOAD")),
        }
    }
    Ok(Scripts::new(hashes))
}

/// Closes the window in which a command that an older session has sent already could still arrive. The epoch fences it
/// off anyway, so a Redis that does not allow this is fine, but the older sink notices only with its next batch. Epochs begin
/// anew when Redis is emptied, so that of another connection may be the same, if both began at one position.
fn kill_older(connection: &mut Connection, slot: &str, epoch: u64) {
    let name = client_name(slot, epoch);
    let _ = connection.call("name the connection", &[b"CLIENT", b"SETNAME", name.as_bytes()]);
    let Ok(clients) = clients(connection, slot) else {
        return;
    };
    for client in clients.iter().filter(|client| client.epoch <= epoch) {
        tracing::info!(epoch, "ending the Redis connection of an older walmirror");
        let id = client.id.to_string();
        let killed = connection.call("end a connection", &[b"CLIENT", b"KILL", b"ID", id.as_bytes()]);
        if let Err(error) = killed
            && error.class() == Class::Access
        {
            let next = format!("redis-cli ACL SETUSER {} '+client|kill'", word(THE_USER));
            tracing::warn!(
                epoch,
                next = connection.complete(&next),
                "the connection of an older walmirror stays: {error}. What it still writes is refused, as the right to write is this one's"
            );
            return;
        }
    }
}

/// The fields and values of a hash.
type Fields = Vec<(Vec<u8>, Vec<u8>)>;

fn hash(connection: &mut Connection, key: &[u8]) -> Result<Fields, Error> {
    let reply = connection.call(
        &format!("read {}", String::from_utf8_lossy(key)),
        &[b"HGETALL", key],
    )?;
    if !matches!(reply, Value::Array(_) | Value::Map(_)) {
        return Err(unreadable("HGETALL"));
    }
    let bytes = |(field, value)| match (field, value) {
        (Value::BulkString(field), Value::BulkString(value)) => Some((field, value)),
        _ => None,
    };
    Ok(pairs(reply).into_iter().filter_map(bytes).collect())
}
