//! Connections of sinks, as CLIENT LIST shows them: whoever has taken the right to write has named its connection by slot and epoch.

use redis::Value;

use super::{Connection, Identity, Stored, unreadable};
use crate::error::{Class, Error};

/// A sink that lives says something every second. One that is silent for longer is frozen, or its machine is gone and Redis does not know.
const SILENCE_S: u64 = 30;

/// A connection that a sink writes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Client {
    /// Redis' number of it.
    pub(super) id: u64,
    /// What it has claimed.
    pub(super) epoch: u64,
    /// So many seconds ago it sent something.
    idle_s: u64,
}

/// Whose mirror Redis holds, where it is that of another cluster or database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Other {
    /// Which, for a person.
    pub name: String,
    /// Its sink is connected: both want to be here.
    pub is_connected: bool,
}

/// Looks whether Redis holds the mirror of another cluster or database under this slot name. Where nobody writes it any more it was
/// replaced. Where somebody does, each would take the right to write from the other for ever.
pub fn other_cluster(
    connection: &mut Connection,
    slot: &str,
    identity: &Identity,
    stored: &Stored,
) -> Result<Option<Other>, Error> {
    let differs = |progress: &&crate::progress::Progress| {
        (&progress.system_id, &progress.database) != (&identity.system_id, &identity.database)
    };
    let Some(progress) = stored.progress.as_ref().filter(differs) else {
        return Ok(None);
    };
    let clients = match clients(connection, slot) {
        Ok(clients) => clients,
        Err(error) if error.class() == Class::Retry => return Err(error),
        // A login that may not look.
        Err(_) => Vec::new(),
    };
    let is_writer = |client: &Client| client.epoch == progress.epoch && client.idle_s < SILENCE_S;
    Ok(Some(Other {
        name: format!(
            "the database {:?} of the cluster with system identifier {}",
            progress.database, progress.system_id
        ),
        is_connected: clients.iter().any(is_writer),
    }))
}

/// Refuses to take what the sink of another cluster is writing at this moment.
pub fn require_own(
    connection: &mut Connection,
    slot: &str,
    identity: &Identity,
    stored: &Stored,
) -> Result<(), Error> {
    match other_cluster(connection, slot, identity, stored)? {
        Some(other) if other.is_connected => Err(Error::redis(
            "another cluster's sink mirrors into this Redis under this slot name",
            Class::Access,
            format!("it is that of {}", other.name),
        )
        .next("walmirror run --slot <another name> …   # or another Redis database: redis://host:6379/1")),
        _ => Ok(()),
    }
}

/// The name of a connection that claimed this epoch.
pub(super) fn client_name(slot: &str, epoch: u64) -> String {
    format!("walmirror:{slot}:{epoch}")
}

/// The other connections that have claimed this slot, in the same database of Redis: another one is another mirror.
pub(super) fn clients(connection: &mut Connection, slot: &str) -> Result<Vec<Client>, Error> {
    let what = "list the connections";
    let Value::Int(own) = connection.call(what, &[b"CLIENT", b"ID"])? else {
        return Err(unreadable("CLIENT ID"));
    };
    let list = match connection.call(what, &[b"CLIENT", b"LIST"])? {
        Value::BulkString(list) => String::from_utf8_lossy(&list).into_owned(),
        // What RESP3 calls a text.
        Value::VerbatimString { text, .. } => text,
        _ => return Err(unreadable("CLIENT LIST")),
    };
    Ok(parse(&list, &own.to_string(), slot))
}

fn parse(list: &str, own: &str, slot: &str) -> Vec<Client> {
    let database = list
        .lines()
        .find(|line| field(line, "id") == Some(own))
        .and_then(|line| field(line, "db"));
    let prefix = format!("walmirror:{slot}:");
    let client = |line: &str| {
        Some(Client {
            id: field(line, "id")?.parse().ok()?,
            epoch: field(line, "name")?.strip_prefix(&prefix)?.parse().ok()?,
            idle_s: field(line, "idle")
                .and_then(|idle| idle.parse().ok())
                .unwrap_or_default(),
        })
    };
    list.lines()
        .filter(|line| field(line, "id") != Some(own) && field(line, "db") == database)
        .filter_map(client)
        .collect()
}

fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    line.split(' ')
        .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_sinks_of_the_slot_are_those_in_the_same_database() {
        let list = "id=3 addr=a:1 name=walmirror:s:7 age=9 idle=0 db=1 cmd=client|list\n\
                    id=4 addr=a:2 name=walmirror:s:7 age=9 idle=2 db=1 cmd=hget\n\
                    id=5 addr=a:3 name=walmirror:s:6 age=9 idle=2 db=0 cmd=hget\n\
                    id=6 addr=a:4 name=walmirror:other:6 age=9 idle=2 db=1 cmd=hget\n\
                    id=7 addr=a:5 name= age=9 idle=2 db=1 cmd=ping\n";
        let clients = parse(list, "3", "s");
        assert_eq!(
            clients,
            [Client {
                id: 4,
                epoch: 7,
                idle_s: 2
            }]
        );
    }
}
