//! The writer against a real Redis: fencing, refused commands, purges.

#![allow(clippy::unwrap_used, clippy::panic)]

mod ahead;
mod purges;
mod refused;

use redis::Value;
use walmirror_proto::Lsn;
use walmirror_proto::key::KeyTemplate;

use super::server::Server;
use super::*;
use crate::error::{Class, Error};
use crate::plan::{Batch, OpKind, Purge, RedisKeys};
use crate::progress::{Step, write_step};
use crate::transaction::Commit;

fn keys() -> RedisKeys {
    RedisKeys::new("s")
}

fn claim(server: &Server, start: Option<Lsn>) -> Writer {
    claim_on(server.connect(), start)
}

fn claim_on(connection: Connection, start: Option<Lsn>) -> Writer {
    let identity = Identity {
        system_id: "1".into(),
        timeline: 1,
        database: "d".into(),
    };
    let claim = Claim::take(connection, &keys(), "s", &identity, start, |_| Ok(())).unwrap();
    Writer::new(claim, keys()).unwrap()
}

/// A batch of one command for each key, and a step to this position.
fn segment(lsn: u64, commands: &[(&str, &[&str])]) -> Segment {
    let mut batch = Batch::new();
    Writer::open(batch.bookkeeping());
    for (number, (key, command)) in commands.iter().enumerate() {
        let mut op = batch.op(77, number as u64, OpKind::Whole, key.as_bytes());
        op.commands()
            .begin(command.len() + 2)
            .arg(command.first().unwrap().as_bytes());
        let rest = op.key(key.as_bytes());
        for arg in command.iter().skip(1).chain(&["x"]) {
            rest.arg(arg.as_bytes());
        }
    }
    let step = Step {
        lsn: Lsn(lsn),
        last: None,
        part: None,
        clear_part: false,
    };
    write_step(batch.bookkeeping(), &keys(), &step);
    Writer::close(batch.bookkeeping(), &keys());
    batch.seal();
    Segment {
        batch,
        opens: true,
        step: Some(step),
        ..Segment::default()
    }
}

fn set(lsn: u64, key: &str) -> Segment {
    segment(lsn, &[(key, &["SET"])])
}

/// The note of a row whose key "foreign" holds another type.
fn rejected() -> crate::rejected::Rejected {
    crate::rejected::Rejected {
        key: b"foreign".to_vec(),
        table: "public.t".into(),
        lsn: Lsn(2),
        reason: "why".into(),
    }
}

fn get(connection: &mut Connection, args: &[&str]) -> String {
    let args: Vec<&[u8]> = args.iter().map(|arg| arg.as_bytes()).collect();
    match connection.call("ask", &args).unwrap() {
        Value::BulkString(bytes) => String::from_utf8(bytes).unwrap(),
        other => format!("{other:?}"),
    }
}

const PROGRESS: &str = "walmirror:{s}:progress";

fn failed(writer: &mut Writer, segment: Segment) -> Error {
    writer.apply(segment, None, &|| false).unwrap_err()
}

#[test]
fn data_and_progress_arrive_together() {
    let Some(server) = Server::start() else { return };
    let mut writer = claim(&server, Some(Lsn(1)));
    for lsn in 2..5 {
        let applied = writer.apply(set(lsn, "a"), None, &|| false).unwrap().unwrap();
        assert_eq!(applied.step.lsn, Lsn(lsn));
    }
    let mut reader = server.connect();
    assert_eq!(
        (
            get(&mut reader, &["GET", "a"]),
            get(&mut reader, &["HGET", PROGRESS, "lsn"])
        ),
        ("x".into(), "0/4".into())
    );
    let stored = read_stored(&mut reader, &keys()).unwrap();
    assert_eq!(
        stored.progress.map(|progress| (progress.lsn, progress.epoch)),
        Some((Lsn(4), 2))
    );
}

#[test]
fn who_lost_the_claim_writes_nothing() {
    let Some(server) = Server::start() else { return };
    let mut old = claim(&server, Some(Lsn(1)));
    // Without a name the newer one cannot end its connection: only the epoch stands between them.
    old.rename_for_test();
    let mut new = claim(&server, None);
    let error = failed(&mut old, set(2, "a"));
    assert_eq!(error.class(), Class::Retry, "{error}");
    assert!(error.to_string().contains("another walmirror"), "{error}");
    assert_eq!(get(&mut server.connect(), &["EXISTS", "a"]), "int(0)");
    assert!(new.apply(set(2, "b"), None, &|| false).unwrap().is_some());
}

/// The story: Redis lost its tail and the connection stayed. A look at the epoch alone let an idle session confirm what was lost.
#[test]
fn an_idle_session_notices_that_redis_went_back() {
    let Some(server) = Server::start() else { return };
    let mut reader = server.connect();
    let mut writer = claim(&server, Some(Lsn(1)));
    writer.check().unwrap();
    writer.apply(set(2, "a"), None, &|| false).unwrap();
    writer.check().unwrap();
    assert_eq!(writer.wait_replicas(0, 1).unwrap(), 0);
    get(&mut reader, &["HSET", PROGRESS, "lsn", "0/1"]);
    for error in [
        writer.check().unwrap_err(),
        writer.wait_replicas(0, 1).unwrap_err(),
        failed(&mut writer, set(3, "b")),
    ] {
        assert_eq!(error.class(), Class::Retry, "{error}");
        assert!(error.to_string().contains("went back"), "{error}");
    }
    // The next one goes on from what it finds.
    let mut writer = claim(&server, None);
    writer.check().unwrap();
    get(&mut reader, &["HSET", PROGRESS, "lsn", "0/0"]);
    assert!(writer.check().is_err());
}

#[test]
fn a_takeover_ends_the_older_connection() {
    let Some(server) = Server::start() else { return };
    let mut old = claim(&server, Some(Lsn(1)));
    let _new = claim(&server, None);
    assert_eq!(failed(&mut old, set(2, "a")).class(), Class::Retry);
    assert_eq!(get(&mut server.connect(), &["EXISTS", "a"]), "int(0)");
}

#[test]
fn an_emptied_redis_is_noticed_before_anything_is_written() {
    let Some(server) = Server::start() else { return };
    let mut writer = claim(&server, Some(Lsn(1)));
    get(&mut server.connect(), &["FLUSHALL"]);
    assert_eq!(failed(&mut writer, set(2, "a")).class(), Class::Retry);
    assert_eq!(get(&mut server.connect(), &["DBSIZE"]), "int(0)");
}

#[test]
fn a_resync_begins_anew_but_the_epoch_goes_on() {
    let Some(server) = Server::start() else { return };
    let mut writer = claim(&server, Some(Lsn(1)));
    writer.apply(set(9, "a"), None, &|| false).unwrap();
    let mut reader = server.connect();
    get(&mut reader, &["HSET", PROGRESS, "backfill:5", "{}"]);
    drop(claim(&server, Some(Lsn(3))));
    let progress = read_stored(&mut reader, &keys()).unwrap().progress.unwrap();
    // The cursor stays for the old key templates that it knows; that it does not count is said beside it.
    assert_eq!((progress.lsn, progress.epoch, progress.resync), (Lsn(3), 3, true));
    assert_eq!(progress.cursors.len(), 1);
}

/// Found by the simulator: a claim on a Redis that was emptied a moment before left an epoch without a position, and no
/// session could begin with that.
#[test]
fn a_claim_on_a_redis_that_was_emptied_writes_nothing() {
    let Some(server) = Server::start() else { return };
    drop(claim(&server, Some(Lsn(1))));
    let mut reader = server.connect();
    reader.call("empty", &[b"FLUSHALL"]).unwrap();
    let identity = Identity::default();
    let error = Claim::take(server.connect(), &keys(), "s", &identity, None, |_| Ok(())).unwrap_err();
    assert_eq!(error.class(), Class::Retry);
    assert!(read_stored(&mut reader, &keys()).unwrap().progress.is_none());
}

/// A master was made a replica under `--durability replicas=N`: the sink ended with an internal error instead of waiting for the next master.
#[test]
fn who_waits_for_replicas_on_a_replica_tries_again() {
    let Some(server) = Server::start() else { return };
    let mut writer = claim(&server, Some(Lsn(1)));
    get(&mut server.connect(), &["REPLICAOF", "127.0.0.1", "1"]);
    let error = writer.wait_replicas(1, 1).unwrap_err();
    assert_eq!(error.class(), Class::Retry, "{error}");
}

/// A replica answers whatever only reads, so an idle session went on counting as durable what a demoted master was about to lose.
#[test]
fn a_check_is_refused_by_who_takes_no_writes() {
    let Some(server) = Server::start() else { return };
    let mut reader = server.connect();
    let faults: [(&str, &[&str], &[&str]); 3] = [
        (
            "READONLY",
            &["REPLICAOF", "127.0.0.1", "1"],
            &["REPLICAOF", "NO", "ONE"],
        ),
        // One that takes them, as the server is told below.
        (
            "it is a replica",
            &["REPLICAOF", "127.0.0.1", "1"],
            &["REPLICAOF", "NO", "ONE"],
        ),
        (
            "NOREPLICAS",
            &["CONFIG", "SET", "min-replicas-to-write", "1"],
            &["CONFIG", "SET", "min-replicas-to-write", "0"],
        ),
    ];
    for (number, (code, cause, mend)) in (1..).zip(faults) {
        let mut writer = claim(&server, (number == 1).then_some(Lsn(1)));
        writer.check().unwrap();
        if code == "it is a replica" {
            get(&mut reader, &["CONFIG", "SET", "replica-read-only", "no"]);
        }
        get(&mut reader, cause);
        let error = writer.check().unwrap_err();
        assert_eq!(error.class(), Class::Retry, "{error}");
        assert!(error.to_string().contains(code), "{error}");
        get(&mut reader, mend);
    }
}

#[test]
fn a_check_changes_nothing() {
    let Some(server) = Server::start() else { return };
    let mut writer = claim(&server, Some(Lsn(1)));
    let mut reader = server.connect();
    get(&mut reader, &["CONFIG", "SET", "appendonly", "yes"]);
    writer.apply(set(2, "a"), None, &|| false).unwrap();
    let mut changes = || {
        let info = get(&mut reader, &["INFO", "persistence"]);
        let field = |name: &str| {
            let line = info.lines().find(|line| line.starts_with(name));
            line.unwrap_or_else(|| panic!("{name}: {info}")).to_owned()
        };
        [field("rdb_changes_since_last_save:"), field("aof_current_size:")]
    };
    let before = changes();
    for _ in 0..20 {
        writer.check().unwrap();
    }
    assert_eq!(changes(), before);
    // It breaks neither its own WATCH nor that of anybody else.
    let mut watcher = server.connect();
    get(&mut watcher, &["WATCH", PROGRESS]);
    writer.check().unwrap();
    get(&mut watcher, &["MULTI"]);
    get(&mut watcher, &["PING"]);
    assert!(get(&mut watcher, &["EXEC"]).contains("PONG"));
    assert!(writer.apply(set(3, "b"), None, &|| false).unwrap().is_some());
}

/// The same slot name in two databases of one Redis is two mirrors. Each start of one ended a connection of the other.
#[test]
fn a_claim_leaves_sinks_on_other_databases_alone() {
    let Some(server) = Server::start() else { return };
    let connect = || Connection::connect(&server.url_with("?db=1")).unwrap();
    let mut other = claim_on(connect(), Some(Lsn(1)));
    drop(claim(&server, Some(Lsn(1))));
    drop(claim(&server, None));
    assert!(other.apply(set(2, "a"), None, &|| false).unwrap().is_some());
    let _new = claim_on(connect(), None);
    assert_eq!(failed(&mut other, set(3, "b")).class(), Class::Retry);
}

/// Where two beginnings are at the same position, so are their epochs, and what the first one had sent already could still arrive.
#[test]
fn a_takeover_in_an_emptied_redis_ends_a_connection_of_the_same_epoch() {
    let Some(server) = Server::start() else { return };
    let mut old = claim(&server, Some(Lsn(1)));
    get(&mut server.connect(), &["FLUSHALL"]);
    let new = claim(&server, Some(Lsn(1)));
    assert_eq!(old.epoch(), new.epoch());
    let error = old.check().unwrap_err();
    assert!(error.to_string().contains("broke"), "{error}");
}

/// The story: when Redis was emptied the epochs began at 1 again. A purge knows whose turn it is by the epoch alone, and one that woke up
/// after that removed what another sink had written since.
#[test]
fn an_epoch_of_before_redis_was_emptied_does_not_come_again() {
    let Some(server) = Server::start() else { return };
    let old = claim(&server, Some(Lsn(1)));
    get(&mut server.connect(), &["FLUSHALL"]);
    let new = claim(&server, Some(Lsn(100)));
    assert!(new.epoch() > old.epoch(), "{} and {}", new.epoch(), old.epoch());
}

/// RESP3 has maps and texts where RESP2 has arrays and strings: limits were not read, and older connections not found.
#[test]
fn everything_is_the_same_in_resp3() {
    let Some(server) = Server::start() else { return };
    let connect = || Connection::connect(&server.url_with("?protocol=resp3")).unwrap();
    let mut reader = connect();
    get(&mut reader, &["CONFIG", "SET", "proto-max-bulk-len", "2097152"]);
    assert_eq!(value_limit(&mut reader).unwrap(), 2_097_152);
    get(&mut reader, &["CONFIG", "SET", "appendfsync", "no"]);
    let mut old = claim_on(connect(), Some(Lsn(1)));
    assert!(old.never_syncs().unwrap());
    assert!(old.apply(set(2, "a"), None, &|| false).unwrap().is_some());
    let mut new = claim_on(connect(), None);
    let error = failed(&mut old, set(3, "a"));
    assert!(error.to_string().contains("broke"), "{error}");
    assert!(new.apply(set(3, "a"), None, &|| false).unwrap().is_some());
    new.check().unwrap();
    assert!(run_id(&mut reader).unwrap().is_some());
    let mut scan = Scan::of_prefix(b"a");
    assert_eq!(scan.page(&mut reader).unwrap(), Some(vec![b"a".to_vec()]));
    let stored = read_stored(&mut reader, &keys()).unwrap().progress.unwrap();
    assert_eq!((stored.lsn, stored.epoch), (Lsn(3), 3));
    // A login that may not ask is taken to have the default, and that is said.
    get(&mut reader, &["ACL", "SETUSER", "default", "-config"]);
    assert_eq!(value_limit(&mut reader).unwrap(), crate::plan::VALUE_BYTES);
}

#[test]
fn a_replica_is_waited_for_and_an_eviction_policy_is_told() {
    let Some(server) = Server::start() else { return };
    let mut reader = server.connect();
    require_master(&mut reader).unwrap();
    get(&mut reader, &["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"]);
    assert_eq!(eviction(&mut reader).unwrap(), None);
    get(&mut reader, &["CONFIG", "SET", "maxmemory", "1gb"]);
    assert_eq!(eviction(&mut reader).unwrap().as_deref(), Some("allkeys-lru"));
    // Who rents a Redis may not ask for settings, and has it evict more often than others.
    for refused in ["-config", "-info"] {
        let right = if refused == "-info" { "+config" } else { "+info" };
        get(&mut reader, &["ACL", "SETUSER", "default", refused, right]);
        assert_eq!(
            eviction(&mut reader).unwrap().as_deref(),
            Some("allkeys-lru"),
            "{refused}"
        );
    }
    get(&mut reader, &["REPLICAOF", "127.0.0.1", "1"]);
    assert_eq!(require_master(&mut reader).unwrap_err().class(), Class::Retry);
}

/// The story: it was told as an internal error, and a sink whose user lost the right ended instead of waiting for it.
#[test]
fn a_login_that_may_not_select_its_database_is_told_which_rights_it_needs() {
    let Some(server) = Server::start() else { return };
    get(&mut server.connect(), &["ACL", "SETUSER", "default", "-select"]);
    let error = Connection::connect(&server.url_with("?db=1")).unwrap_err();
    assert_eq!((error.class(), error.exit_code()), (Class::Access, 4), "{error}");
    let next = error.next_command().unwrap_or_default();
    assert!(next.contains("ACL SETUSER"), "{next}");
}

/// The rights that an error names as the next command are all that a sink needs.
#[test]
fn the_rights_that_are_recommended_are_enough() {
    let Some(server) = Server::start() else { return };
    // As a shell reads it, behind the name of the user.
    let command = rights_command("u").replace('\'', "");
    let words = command.split(' ').skip(4);
    // The settings are nice to know, and no more.
    let rights: Vec<&str> = words.filter(|word| !word.starts_with("+config")).collect();
    let user = [&["ACL", "SETUSER", "default", "resetkeys", "-@all"], &rights[..]].concat();
    get(&mut server.connect(), &user);
    // Redis 6.2 has SELECT and WAIT in other categories than later versions.
    let mut elsewhere = Connection::connect(&server.url_with("?db=1")).unwrap();
    get(&mut elsewhere, &["WAIT", "0", "1"]);
    let mut connection = server.connect();
    require_master(&mut connection).unwrap();
    assert_eq!(eviction(&mut connection).unwrap(), None);
    let mut old = claim_on(connection, Some(Lsn(1)));
    assert!(old.apply(set(2, "a"), None, &|| false).unwrap().is_some());
    old.check().unwrap();
    let _new = claim(&server, None);
    let error = old.check().unwrap_err();
    assert!(!error.to_string().contains("NOPERM"), "{error}");
}

/// Staging and production under one slot name: each resync took the right to write from the other, for ever.
#[test]
fn the_sink_of_another_cluster_is_left_alone_as_long_as_it_is_connected() {
    let Some(server) = Server::start() else { return };
    let mut production = claim(&server, Some(Lsn(1)));
    let of = |system_id: &str, database: &str| Identity {
        system_id: system_id.into(),
        timeline: 1,
        database: database.into(),
    };
    for staging in [of("2", "d"), of("1", "e")] {
        let take = || Claim::take(server.connect(), &keys(), "s", &staging, Some(Lsn(5)), |_| Ok(()));
        let error = take().unwrap_err();
        assert_eq!((error.class(), error.exit_code()), (Class::Access, 4), "{error}");
        assert!(error.heals_later() && error.next_command().is_some(), "{error}");
        assert!(error.to_string().contains("another cluster's sink"), "{error}");
    }
    assert!(production.apply(set(2, "a"), None, &|| false).unwrap().is_some());
    drop(production);
    // Its end may not have been noticed yet.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    let staging = of("2", "d");
    while let Err(error) = Claim::take(server.connect(), &keys(), "s", &staging, Some(Lsn(5)), |_| Ok(())) {
        assert!(std::time::Instant::now() < deadline, "{error}");
    }
}

/// The story: a definition of which one bit was another one was an internal error.
#[test]
fn a_stored_definition_that_is_of_no_use_is_told_with_its_key() {
    use prost::Message;

    let Some(server) = Server::start() else { return };
    let mut reader = server.connect();
    let relation = walmirror_proto::pb::Relation {
        key: "t:{ie}".into(),
        ..Default::default()
    };
    let fields: [&[u8]; 4] = [
        b"HSET",
        b"walmirror:{s}:relations",
        b"7",
        &relation.encode_to_vec(),
    ];
    reader.call("store", &fields).unwrap();
    let error = read_stored(&mut reader, &keys()).unwrap_err();
    assert_eq!(error.class(), Class::Operator, "{error}");
    let text = error.to_string();
    assert!(
        text.starts_with("the key walmirror:{s}:relations was changed by somebody else: "),
        "{error}"
    );
    let next = error.next_command().unwrap_or_default();
    assert!(next.starts_with("redis-cli UNLINK"), "{next}");
}
