//! What kind of Redis this is: a mirror needs a master that is no cluster, and that evicts nothing. Asked at the start of a session, before
//! anything is made anywhere, and by `doctor`.

use std::sync::Once;

use redis::Value;

use super::connection::{Connection, pairs, setting};
use crate::error::{Class, Error};

/// Why a Redis Cluster is refused, and the next command.
pub const CLUSTER: (&str, &str) = (
    "this is a Redis Cluster, which is not supported yet",
    "redis-cli INFO cluster   # give the URL of a single Redis",
);

/// Why a replica is no place for a mirror, and the next command.
pub const REPLICA: (&str, &str) = (
    "it is a replica, which takes no writes, or loses them again",
    "redis-cli INFO replication   # give the URL of the master",
);

/// Refuses a cluster, and has the sink wait for a replica to be promoted: what that holds may be on its way still. HELLO tells it, which
/// every login may ask; a Redis that does not know it is taken to be a single master, and that is said once.
pub fn require_master(connection: &mut Connection) -> Result<(), Error> {
    static SAID: Once = Once::new();
    let told = connection.ask(&[b"HELLO"])?;
    let is_unknown =
        |text: &str| text.contains("unknown command") || text.contains("wrong number of arguments");
    if matches!(&told, Value::ServerError(reply) if reply.details().is_some_and(is_unknown)) {
        SAID.call_once(|| {
            tracing::warn!(
                next = "walmirror doctor",
                "Redis does not know HELLO, so whether it is a master is not known: it is older than 6.2, or something stands in between"
            );
        });
    }
    judge_role(told)
}

/// The same from the answer to HELLO. A replica may be told to take writes (`replica-read-only no`): what it says of itself is then all
/// that tells it from a master.
pub(super) fn judge_role(told: Value) -> Result<(), Error> {
    let told = pairs(told);
    let field = |name: &str| {
        told.iter().find_map(|(field, value)| match (field, value) {
            (Value::BulkString(field), Value::BulkString(value)) if field == name.as_bytes() => {
                Some(value.as_slice())
            }
            _ => None,
        })
    };
    let what = "cannot mirror into this Redis";
    if field("mode") == Some(b"cluster") {
        let (why, next) = CLUSTER;
        return Err(Error::redis(what, Class::Operator, why).next(next));
    }
    if field("role").is_some_and(|role| role != b"master") {
        return Err(Error::redis(what, Class::Retry, format!("READONLY {}", REPLICA.0)).next(REPLICA.1));
    }
    Ok(())
}

/// What names this process among all servers that are or were at its address. None where the login may not ask.
pub fn run_id(connection: &mut Connection) -> Result<Option<String>, Error> {
    let text = info(connection, b"server")?;
    Ok(line(&text, "run_id"))
}

/// A section of INFO; empty where the login may not ask.
fn info(connection: &mut Connection, section: &[u8]) -> Result<String, Error> {
    Ok(match connection.ask(&[b"INFO", section])? {
        Value::BulkString(text) => String::from_utf8_lossy(&text).into_owned(),
        // What RESP3 calls a text.
        Value::VerbatimString { text, .. } => text,
        _ => String::new(),
    })
}

fn line(info: &str, name: &str) -> Option<String> {
    let mut lines = info.lines();
    lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::to_owned))
}

/// The policy by which Redis removes keys when it is full, if it does. None also where the login may not ask: neither INFO nor CONFIG,
/// which who rents a Redis often may not.
pub fn eviction(connection: &mut Connection) -> Result<Option<String>, Error> {
    let text = info(connection, b"memory")?;
    let (limit, policy) = match (line(&text, "maxmemory"), line(&text, "maxmemory_policy")) {
        (Some(limit), Some(policy)) => (Some(limit), Some(policy)),
        _ => (
            setting(connection, "maxmemory")?,
            setting(connection, "maxmemory-policy")?,
        ),
    };
    Ok(match (limit, policy) {
        (Some(limit), Some(policy)) if evicts(&limit, &policy) => Some(policy),
        _ => None,
    })
}

/// A mirror that loses keys to eviction is no mirror, and neither is a progress key that was evicted.
pub fn evicts(limit: &str, policy: &str) -> bool {
    limit != "0" && policy != "noeviction"
}
