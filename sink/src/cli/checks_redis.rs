//! The checks of `doctor` and `init` on the Redis side.

use std::collections::HashMap;

use ::redis::Value;

use super::checks::{Check, Outcome, from_error};
use super::{checks_acl, connect_replication};
use crate::config::{Conninfo, RedisUrl, SlotName};
use crate::error::{Class, Error};
use crate::plan::RedisKeys;
use crate::redis::{self, CLUSTER, Connection, Other, REPLICA, evicts};
use crate::replication;

/// Connects, and gives the next command where that fails.
pub fn connect(url: &RedisUrl) -> Result<Connection, Error> {
    Connection::connect(url).map_err(|error| {
        let hint = if error.class() == Class::Access {
            "   # the user and password that work there belong into --redis"
        } else {
            ""
        };
        error.next(format!("{} PING{hint}", url.redis_cli()))
    })
}

/// Runs every check; with `postgres`, also whether it is that server's mirror. `templates`: of the keys that are to be written.
/// `begins`: what follows makes a beginning there.
pub fn redis(
    url: &RedisUrl,
    slot: &SlotName,
    templates: &[String],
    postgres: Option<&Conninfo>,
    begins: bool,
) -> Result<Vec<Check>, Error> {
    let mut connection = connect(url)?;
    let mut checks = match connection.call("read INFO", &[b"INFO"]) {
        Ok(reply) => {
            let stops = redis::setting(&mut connection, "stop-writes-on-bgsave-error")?;
            let saves = redis::setting(&mut connection, "save")?;
            let stops = stops.map(|stops| stops == "yes" && saves.as_deref() != Some(""));
            server(url, &info(&reply), stops)
        }
        // The sink itself does not need it.
        Err(error) if error.to_string().contains("NOPERM") => {
            let unknown = Check {
                name: "Redis",
                outcome: Outcome::Note(
                    format!("version and memory cannot be looked at: {error}"),
                    error.next_command().map(str::to_owned),
                ),
            };
            let role = match redis::require_master(&mut connection) {
                Ok(()) => Check {
                    name: "Redis role",
                    outcome: Outcome::Ok("master".into()),
                },
                Err(error) => from_error("Redis role", &error),
            };
            vec![unknown, role]
        }
        // It is busy, or reads its file.
        Err(error) if error.class() == Class::Retry => {
            return Err(error.next(format!("{} PING", url.redis_cli())));
        }
        // A connection without a password may be made and yet not be allowed anything.
        Err(error) => return Ok(vec![from_error("Redis", &error)]),
    };
    checks.push(Check {
        name: "Redis rights",
        outcome: checks_acl::rights(&mut connection, slot, templates),
    });
    checks.push(bookkeeping(&mut connection, slot));
    let other = postgres.and_then(|conninfo| other(&mut connection, slot, conninfo));
    checks.extend(other.map(|other| Check {
        name: "Redis mirror",
        outcome: of_another(&other, url, slot, begins),
    }));
    Ok(checks)
}

/// What INFO says of the server. `stops`: whether it takes no writes while it cannot save, where it tells.
fn server(url: &RedisUrl, info: &HashMap<String, String>, stops: Option<bool>) -> Vec<Check> {
    let get = |name: &str| info.get(name).map(String::as_str).unwrap_or_default();
    let number = |name: &str| get(name).parse::<u64>().unwrap_or(0);
    // As Redis counts it: what waits for replicas and for the append-only file is not of the limit.
    let used = number("used_memory").saturating_sub(number("mem_not_counted_for_evict"));
    vec![
        Check {
            name: "Redis",
            outcome: version(url, get("redis_version")),
        },
        Check {
            name: "Redis role",
            outcome: role(get("role"), get("redis_mode")),
        },
        Check {
            name: "Redis memory",
            outcome: memory(get("maxmemory"), get("maxmemory_policy"), used),
        },
        Check {
            name: "Redis persistence",
            outcome: persistence(
                get("aof_enabled") == "1",
                get("aof_last_write_status"),
                get("rdb_last_bgsave_status"),
                stops,
            ),
        },
    ]
}

/// Whose mirror it is, if it is another one's. What cannot be looked at has a check of its own.
fn other(connection: &mut Connection, slot: &SlotName, conninfo: &Conninfo) -> Option<Other> {
    let stored = redis::read_stored(connection, &RedisKeys::new(slot.as_str())).ok()?;
    let mut postgres = connect_replication(conninfo.expose()).ok()?;
    let identity = replication::identify_system(&mut postgres).ok()?.into();
    redis::other_cluster(connection, slot.as_str(), &identity, &stored).ok()?
}

fn of_another(other: &Other, url: &RedisUrl, slot: &SlotName, begins: bool) -> Outcome {
    let key = RedisKeys::new(slot.as_str()).progress;
    let unlink = url.complete(&format!("redis-cli UNLINK '{}'", String::from_utf8_lossy(&key)));
    let name = &other.name;
    match (other.is_connected, begins) {
        (true, _) => Outcome::Fail(
            format!("the sink of {name} mirrors into it under this slot name"),
            "walmirror … --slot <another name>   # or another Redis database: redis://host:6379/1".into(),
        ),
        (false, true) => Outcome::Fail(
            format!("it holds the mirror of {name} under this slot name"),
            format!("walmirror … --slot <another name>   # or, if that one is gone: {unlink}"),
        ),
        (false, false) => Outcome::Warn(
            format!("it holds the mirror of {name} under this slot name: `run` makes everything anew"),
            "walmirror … --slot <another name>   # if that one is still in use".into(),
        ),
    }
}

fn version(url: &RedisUrl, version: &str) -> Outcome {
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().ok());
    match (numbers.next().flatten(), numbers.next().flatten()) {
        (Some(major), Some(minor)) if (major, minor) < (6, 2) => Outcome::Fail(
            format!("Redis {version} at {url}: too old"),
            "redis-server --version   # walmirror needs Redis 6.2 or later, or Valkey".into(),
        ),
        _ => Outcome::Ok(format!("Redis {version} at {url}")),
    }
}

fn role(role: &str, mode: &str) -> Outcome {
    match (role, mode) {
        (_, "cluster") => Outcome::Fail(CLUSTER.0.into(), CLUSTER.1.into()),
        ("slave", _) => Outcome::Fail(REPLICA.0.into(), REPLICA.1.into()),
        _ => Outcome::Ok("master".into()),
    }
}

fn memory(limit: &str, policy: &str, used: u64) -> Outcome {
    if evicts(limit, policy) {
        return Outcome::Fail(
            format!("maxmemory-policy is {policy}: Redis would evict mirrored rows, or the progress key"),
            "redis-cli CONFIG SET maxmemory-policy noeviction".into(),
        );
    }
    let next = "redis-cli CONFIG SET maxmemory 4gb   # what the machine can spare; 0: no limit";
    let bytes = limit.parse().unwrap_or(0);
    if bytes > 0 && used >= bytes {
        return Outcome::Fail(
            format!("Redis refuses writes: it is full, used_memory {used} of maxmemory {bytes}"),
            next.into(),
        );
    }
    if bytes > 0 && used >= bytes / 10 * 9 {
        return Outcome::Warn(
            format!("Redis is almost full, used_memory {used} of maxmemory {bytes}: then it refuses writes"),
            next.into(),
        );
    }
    Outcome::Ok(format!("maxmemory {limit}, policy {policy}"))
}

/// Whether Redis can write its files: where it cannot, it takes no more writes, or what it holds is gone when it ends.
fn persistence(appends: bool, appended: &str, saved: &str, stops: Option<bool>) -> Outcome {
    let next = "redis-cli CONFIG GET dir   # is there room, and may Redis write there? Its log tells";
    if appends && appended == "err" {
        return Outcome::Fail(
            "Redis refuses writes: it cannot write its append-only file (aof_last_write_status err)".into(),
            next.into(),
        );
    }
    if saved == "err" {
        let next = format!("{next}; then BGSAVE");
        return match stops {
            Some(true) => Outcome::Fail(
                "Redis refuses writes: it could not save its last snapshot (rdb_last_bgsave_status err)".into(),
                next,
            ),
            Some(false) => Outcome::Warn(
                "Redis could not save its last snapshot (rdb_last_bgsave_status err)".into(),
                next,
            ),
            None => Outcome::Warn(
                "Redis could not save its last snapshot (rdb_last_bgsave_status err): it refuses writes where stop-writes-on-bgsave-error is yes"
                    .into(),
                next,
            ),
        };
    }
    Outcome::Ok(
        if appends {
            "append-only file"
        } else {
            "snapshots, or none"
        }
        .into(),
    )
}

fn bookkeeping(connection: &mut Connection, slot: &SlotName) -> Check {
    let name = "Redis progress key";
    let key = RedisKeys::new(slot).progress;
    let shown = String::from_utf8_lossy(&key).into_owned();
    match connection.call("look at the progress key", &[b"TYPE", &key]) {
        Ok(Value::SimpleString(kind)) if kind == "hash" => Check {
            name,
            outcome: Outcome::Ok(shown),
        },
        Ok(Value::SimpleString(kind)) if kind == "none" => Check {
            name,
            outcome: Outcome::Ok(format!("{shown}: not there yet")),
        },
        Ok(_) => Check {
            name,
            outcome: Outcome::Fail(
                format!("{shown} is no hash: somebody else uses it"),
                format!("redis-cli UNLINK '{shown}'"),
            ),
        },
        Err(error) => from_error(name, &error),
    }
}

/// The fields of INFO.
fn info(reply: &Value) -> HashMap<String, String> {
    let text = match reply {
        Value::BulkString(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        Value::VerbatimString { text, .. } => text.clone(),
        _ => String::new(),
    };
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eviction_cluster_replica_and_old_versions_fail() {
        let failed = |outcome| matches!(outcome, Outcome::Fail(..));
        assert!(failed(memory("1000", "allkeys-lru", 0)));
        assert!(!failed(memory("0", "allkeys-lru", 5000)));
        assert!(!failed(memory("1000", "noeviction", 899)));
        assert!(failed(role("master", "cluster")));
        assert!(failed(role("slave", "standalone")));
        assert!(!failed(role("master", "standalone")));
        let failed = |text| {
            matches!(
                version(&"redis://localhost".parse().unwrap(), text),
                Outcome::Fail(..)
            )
        };
        for (text, is_old) in [
            ("5.0.14", true),
            ("6.0.16", true),
            ("6.2.0", false),
            ("10.0.1", false),
            ("unstable", false),
        ] {
            assert_eq!(failed(text), is_old, "{text}");
        }
    }

    #[test]
    fn a_redis_that_takes_no_writes_fails() {
        let full = |used| memory("1000", "noeviction", used);
        assert!(matches!(full(1000), Outcome::Fail(text, _) if text.contains("refuses writes")));
        assert!(matches!(full(900), Outcome::Warn(..)));
        let fails = |outcome| matches!(outcome, Outcome::Fail(text, _) if text.contains("refuses writes"));
        assert!(fails(persistence(true, "err", "ok", Some(true))));
        assert!(!fails(persistence(false, "err", "ok", Some(true))));
        assert!(fails(persistence(false, "ok", "err", Some(true))));
        for stops in [Some(false), None] {
            let outcome = persistence(true, "ok", "err", stops);
            assert!(matches!(outcome, Outcome::Warn(..)), "{stops:?}");
        }
        assert_eq!(
            persistence(true, "ok", "ok", None),
            Outcome::Ok("append-only file".into())
        );
    }

    #[test]
    fn info_is_read_line_by_line() {
        let fields = info(&Value::BulkString(
            b"# Server\r\nredis_version:7.0.15\r\nos:a:b\r\n".to_vec(),
        ));
        assert_eq!(fields.get("redis_version").map(String::as_str), Some("7.0.15"));
        assert_eq!(fields.get("os").map(String::as_str), Some("a:b"));
    }
}
