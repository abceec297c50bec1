//! How a mirror begins: `init` and then `run`, and `run` against what does not fit.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::time::{Duration, Instant};

use walmirror_tests::{DEADLINE, Db, Mirror, Mode, Pg, Proxy, Redis, Sink, Way, free_port, wait_for};

const TABLE: &str = "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT i, 'v' FROM generate_series(1, 500) i; \
    SELECT walmirror.mirror('t')";

#[test]
fn run_goes_on_from_where_init_began() {
    let m = Mirror::new();
    m.sql(TABLE);
    let (code, output) = m.run(&["init"]);
    assert_eq!(code, Some(0), "{output}");
    m.sql("INSERT INTO t VALUES (1000, 'between')");
    m.start_with(&["--on-gap", "fail"]);
    m.settle();
    let log = m.sink(|sink| sink.output());
    assert!(!log.contains("do not fit"), "{log}");
    // Again: the slot is there already, and nothing is begun anew.
    let before = m.progress();
    let (code, output) = m.run(&["init"]);
    assert_eq!(code, Some(0), "{output}");
    assert!(m.progress() >= before);
    m.check();
}

#[test]
fn an_emptied_redis_is_refused_or_filled_again() {
    let m = Mirror::with(TABLE);
    m.sink(Sink::terminate);
    let _: String = m.redis.command("FLUSHALL");
    let (code, output) = m.run(&["run", "--on-gap", "fail"]);
    assert_eq!(code, Some(6), "{output}");
    assert!(
        output.contains("no progress") && output.contains("--on-gap resync"),
        "{output}"
    );
    m.start();
    m.settle();
}

#[test]
fn a_redis_that_is_emptied_under_way_is_filled_again() {
    let m = Mirror::with(TABLE);
    for round in 0..3 {
        let _: String = m.redis.command("FLUSHALL");
        m.sql(&format!(
            "UPDATE t SET v = 'round {round}' WHERE id % 7 = 0; DELETE FROM t WHERE id = {round} + 1"
        ));
        m.settle();
    }
}

/// Somebody, or a bit that flipped, has changed what the sink keeps in Redis: `run` says which key to remove, and that brings all back,
/// keys without a row too.
#[test]
fn a_changed_key_of_the_sinks_own_is_removed_as_advised() {
    let m = Mirror::with(TABLE);
    let slot = format!("walmirror:{{{}}}", m.db.name);
    let ruin = [
        ("progress", format!("HSET {slot}:progress epoch 1s")),
        ("progress", format!("HSET {slot}:progress lsn 7")),
        ("progress", format!("HDEL {slot}:progress lsn")),
        ("progress", format!("SET {slot}:progress gone")),
        ("relations", format!("HSET {slot}:relations 7 bits")),
        ("relations", format!("HSET {slot}:relations x y")),
        ("relations", format!("SET {slot}:relations gone")),
    ];
    for (round, (key, command)) in ruin.into_iter().enumerate() {
        m.sink(Sink::terminate);
        let _: redis::Value = m.redis.command(&command);
        m.sql(&format!(
            "UPDATE t SET v = 'round {round}' WHERE id % 7 = 0; DELETE FROM t WHERE id = {round} + 1"
        ));
        let (code, output) = m.run(&["run"]);
        assert_eq!(code, Some(4), "{command}: {output}");
        let advised = output
            .split_once("UNLINK '")
            .and_then(|(_, rest)| rest.split_once('\''));
        assert_eq!(
            advised.map(|(key, _)| key),
            Some(format!("{slot}:{key}").as_str()),
            "{command}: {output}"
        );
        let _: u32 = m.redis.command(&format!("UNLINK {slot}:{key}"));
        let _: u32 = m.redis.command("HSET t:9999 v nobody's");
        m.start();
        m.settle();
    }
}

#[test]
fn a_slot_that_was_dropped_is_made_again_and_the_tables_with_it() {
    let m = Mirror::with(TABLE);
    m.sink(Sink::terminate);
    m.sql("SELECT pg_drop_replication_slot(current_database())");
    m.sql("UPDATE t SET v = 'unseen' WHERE id < 100; DELETE FROM t WHERE id > 400");
    m.start();
    m.settle();
}

/// The story: the server's error was taken for a missing library, and the sink stopped.
#[test]
fn a_slot_whose_wal_was_removed_is_made_again_and_the_tables_with_it() {
    let m = Mirror::alone("");
    m.sql(TABLE);
    m.start();
    m.settle();
    m.sink(Sink::terminate);
    m.sql("UPDATE t SET v = 'unseen' WHERE id < 100; DELETE FROM t WHERE id > 400");
    let slot = "FROM pg_replication_slots WHERE slot_name = current_database()";
    let segment = m.db.value(&format!("SELECT pg_walfile_name(restart_lsn) {slot}"));
    m.sql("SELECT pg_switch_wal()");
    m.sql("INSERT INTO t VALUES (1000, 'in the next segment')");
    std::fs::remove_file(m.db.pg.data().join("pg_wal").join(segment)).unwrap();
    // The slot does not know it.
    assert_eq!(m.db.value(&format!("SELECT wal_status {slot}")), "reserved");
    let (code, output) = m.run(&["run", "--on-gap", "fail"]);
    assert_eq!(code, Some(6), "{output}");
    assert!(
        output.contains("has already been removed") && output.contains("--on-gap resync"),
        "{output}"
    );
    m.start();
    m.settle();
    m.sql("INSERT INTO t VALUES (1001, 'behind it')");
    m.check();
}

/// The first sink is gone: the second brings all that was written.
fn takes_over(m: &Mirror, second: &mut Sink) {
    let target = m.db.lsn();
    wait_for(DEADLINE, format!("the second sink to reach {target}"), || {
        second.assert_running();
        m.progress().filter(|&lsn| lsn >= target)
    });
    let report = m.compare();
    assert!(report.equal(), "{report}");
}

#[test]
fn a_second_sink_waits_and_takes_over_when_the_first_is_gone() {
    let m = Mirror::with(TABLE);
    let mut second = m.second_sink();
    m.sql("INSERT INTO t VALUES (1000, 'by the first')");
    m.check();
    second.assert_running();
    m.sink(Sink::kill);
    m.sql("INSERT INTO t VALUES (1001, 'by the second')");
    takes_over(&m, &mut second);
    m.sink(Sink::restart);
    second.kill();
    m.sql("INSERT INTO t VALUES (1002, 'by the first again')");
    m.check();
}

/// The story: it looked at the slot after it had read the progress. What the first one confirmed in between was taken for a gap: with
/// `--on-gap fail` it ended with exit code 6, else it would have made everything anew when it got the slot.
#[test]
fn a_second_sink_that_is_far_from_postgres_finds_no_gap() {
    let m = Mirror::new();
    m.sql(TABLE);
    m.start_with(&["--durability", "memory=0"]);
    m.settle();
    let link = Proxy::to_socket(m.db.pg.socket());
    link.set_both(Mode::Delay(50, 1));
    let conninfo = format!(
        "host=127.0.0.1 port={} user=postgres dbname={}",
        link.port(),
        m.db.name
    );
    let mut args = m.arguments(&["run", "--on-gap", "fail"]);
    let own = m.db.pg.conninfo(&m.db.name);
    args.iter_mut()
        .filter(|arg| **arg == own)
        .for_each(|arg| *arg = conninfo.clone());
    let mut second = Sink::start(&args);
    let started = Instant::now();
    let mut ids = 1000..;
    while started.elapsed() < Duration::from_secs(10) {
        m.sql(&format!("INSERT INTO t VALUES ({}, 'v')", ids.next().unwrap()));
        second.assert_running();
    }
    let log = second.output();
    assert!(
        log.contains("is active for PID") && !log.contains("do not fit"),
        "{log}"
    );
    m.sink(Sink::kill);
    takes_over(&m, &mut second);
}

/// The story: the second of two first starts looked for the slot before the first one had made it, and at Redis after that had begun to
/// stream. A slot that is gone is a gap: with `--on-gap fail` it ended with exit code 6, and nothing was wrong.
#[test]
fn the_slower_of_two_first_starts_finds_no_gap() {
    let m = Mirror::new();
    m.sql(TABLE);
    let link = Proxy::to_port(m.redis.port());
    link.set_both(Mode::Delay(500, 1));
    let (own, slow) = (m.redis.url(), format!("redis://127.0.0.1:{}/0", link.port()));
    let mut args = m.arguments(&["run", "--on-gap", "fail"]);
    args.iter_mut()
        .filter(|arg| **arg == own)
        .for_each(|arg| *arg = slow.clone());
    let mut second = Sink::start(&args);
    wait_for(DEADLINE, "the second sink to have looked for the slot", || {
        let asked = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'walmirror' \
                     AND query LIKE '%pg_replication_slots WHERE slot_name%'";
        (m.db.value(asked) != "0").then_some(())
    });
    // What it asks Redis next waits for the first one.
    link.set(Way::ToServer, Mode::BlackHole);
    m.start_with(&["--on-gap", "fail"]);
    m.settle();
    link.heal();
    wait_for(DEADLINE, "the second sink to wait for the slot", || {
        second.assert_running();
        second.output().contains("is active for PID").then_some(())
    });
    let log = second.output();
    assert!(
        log.contains("changed while this session began") && !log.contains("do not fit"),
        "{log}"
    );
    m.sink(Sink::kill);
    takes_over(&m, &mut second);
}

/// The story: where the database has a lock_timeout, the making of the slot was given up after that, again and again: under transactions
/// that last longer and overlap, nothing ever began.
#[test]
fn a_lock_timeout_does_not_end_the_making_of_a_slot() {
    let m = Mirror::new();
    m.sql(TABLE);
    m.sql(&format!(
        "ALTER DATABASE {} SET lock_timeout = '200ms'",
        m.db.name
    ));
    let mut writer = m.db.connect();
    let mut open = writer.transaction().unwrap();
    open.batch_execute("INSERT INTO t VALUES (1000, 'v')").unwrap();
    m.start();
    let waits = |sink: &mut Sink| sink.output().contains("making the slot waits").then_some(());
    wait_for(DEADLINE, "the sink to say whom it waits for", || m.sink(waits));
    open.commit().unwrap();
    m.settle();
    let log = m.sink(|sink| sink.output());
    assert!(!log.contains("lock timeout"), "{log}");
}

/// The story: both found the slot gone, one made it, and the other one ended with exit code 3, as there was one already. Once in some sixty
/// rounds it came to that.
#[test]
fn two_sinks_that_find_the_slot_gone_at_once_stay() {
    let m = Mirror::with(TABLE);
    let mut second = m.second_sink();
    let slot = &m.db.name;
    for id in 1000..1008 {
        let active =
            format!("FROM pg_replication_slots WHERE slot_name = '{slot}' AND active_pid IS NOT NULL");
        wait_for(DEADLINE, "the slot to be dropped", || {
            m.sql(&format!("SELECT pg_terminate_backend(active_pid) {active}"));
            let dropped = format!("SELECT pg_drop_replication_slot('{slot}')");
            m.db.connect().batch_execute(&dropped).ok()
        });
        m.sql(&format!("INSERT INTO t VALUES ({id}, 'v')"));
        let target = m.db.lsn();
        wait_for(DEADLINE, format!("one of the sinks to reach {target}"), || {
            second.assert_running();
            m.sink(Sink::assert_running);
            m.progress().filter(|&lsn| lsn >= target)
        });
    }
    m.settle();
}

/// A single key fits a cluster, and so did the first claim: the slot was made, tables were reported filled, and the first batch with
/// rows ended it. Now it is refused before anything is made anywhere.
#[test]
fn a_redis_cluster_is_refused_before_a_slot_is_made() {
    // By itself it would take a port that nobody has looked at.
    let bus = free_port().to_string();
    let redis = Redis::start_with(&["--cluster-enabled", "yes", "--cluster-port", &bus]);
    let m = Mirror::between(Db::create(Pg::shared()), redis);
    m.sql(TABLE);
    // Nobody serves its slots: that heals.
    let (code, output) = m.run(&["run", "--once"]);
    assert_eq!(code, Some(5), "{output}");
    assert!(output.contains("CLUSTERDOWN"), "{output}");
    let _: String = m.redis.command("CLUSTER ADDSLOTSRANGE 0 16383");
    wait_for(DEADLINE, "the cluster to be up", || {
        let info: String = m.redis.command("CLUSTER INFO");
        info.contains("cluster_state:ok").then_some(())
    });
    let (code, output) = m.run(&["run"]);
    assert_eq!(code, Some(4), "{output}");
    assert!(
        output.contains("this is a Redis Cluster") && output.contains("next: "),
        "{output}"
    );
    let slots = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = current_database()";
    assert_eq!(m.db.value(slots), "0");
    assert_eq!(m.redis.command::<i64>("DBSIZE"), 0);
}

#[test]
fn an_eviction_policy_is_said_at_the_start() {
    let redis = Redis::start_with(&["--maxmemory", "1gb", "--maxmemory-policy", "allkeys-lru"]);
    let m = Mirror::between(Db::create(Pg::shared()), redis);
    m.sql(TABLE);
    m.start();
    m.settle();
    let log = m.sink(|sink| sink.output());
    assert_eq!(log.matches("maxmemory-policy is allkeys-lru").count(), 1, "{log}");
}

/// Redis 6.0 and some proxies do not know HELLO. Nothing was said, and a replica that takes writes was written to.
#[test]
fn a_redis_that_does_not_say_what_it_is_is_told_of_once() {
    let redis = Redis::start_with(&["--rename-command", "HELLO", ""]);
    let m = Mirror::between(Db::create(Pg::shared()), redis);
    m.sql(TABLE);
    m.start();
    m.settle();
    let log = m.sink(|sink| sink.output());
    assert_eq!(log.matches("does not know HELLO").count(), 1, "{log}");
}

/// A mirror whose slot cannot be made yet because a transaction is open, and that transaction. Nothing may be a gap.
fn while_the_slot_is_made() -> (Mirror, postgres::Client) {
    let m = Mirror::new();
    m.sql(TABLE);
    let mut open = m.db.connect();
    open.batch_execute("BEGIN; SELECT pg_current_xact_id()").unwrap();
    m.start_with(&["--on-gap", "fail"]);
    let waits = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = current_database() AND confirmed_flush_lsn IS NULL";
    wait_for(DEADLINE, "the slot to wait for the transaction", || {
        (m.db.value(waits) == "1").then_some(())
    });
    (m, open)
}

/// The connection to Redis was the first thing made, and idled until the slot was there: Redis had ended it, the claim failed, and the
/// next session found a slot without progress.
#[test]
fn a_first_start_outlives_its_connection_to_redis() {
    let (m, mut open) = while_the_slot_is_made();
    let _: i64 = m.redis.command("CLIENT KILL TYPE normal");
    open.batch_execute("COMMIT").unwrap();
    m.settle();
    let log = m.sink(|sink| sink.output());
    assert!(!log.contains("WARN"), "{log}");
}

/// The server goes on making the slot for a sink that was killed, and leaves it there, or notices and drops it: that depends on what it
/// waits for just then.
#[test]
fn a_first_start_that_is_killed_goes_on() {
    let (m, mut open) = while_the_slot_is_made();
    m.sink(Sink::kill);
    let seen = m.sink(|sink| sink.output().len());
    m.sink(Sink::restart);
    wait_for(DEADLINE, "the next sink to wait", || {
        let log = m.sink(|sink| sink.output()).split_off(seen);
        let signs = ["is still being made", "making the slot waits for a transaction"];
        signs.iter().any(|sign| log.contains(sign)).then_some(())
    });
    open.batch_execute("COMMIT").unwrap();
    m.settle();
}

/// Staging and production, each with a slot of the default name, and one Redis: each start made everything anew and ended the connection
/// of the other, which did the same, for ever.
#[test]
fn a_second_cluster_under_the_same_name_leaves_the_first_alone() {
    let production = Mirror::with(TABLE);
    let staging = Db::create(std::sync::Arc::new(Pg::start("")));
    staging.sql("CREATE TABLE other (id int PRIMARY KEY); SELECT walmirror.mirror('other'); INSERT INTO other VALUES (1)");
    let (conninfo, url) = (staging.pg.conninfo(&staging.name), production.redis.url());
    let arguments = |command| {
        let servers = [
            "--postgres",
            &conninfo,
            "--redis",
            &url,
            "--slot",
            &production.db.name,
        ];
        [&[command][..], &servers]
            .concat()
            .iter()
            .map(|&arg| arg.to_owned())
            .collect::<Vec<_>>()
    };
    for (command, says) in [
        ("run", "another cluster's sink mirrors into this Redis"),
        ("init", "mirrors into it under this slot name"),
        ("doctor", "mirrors into it under this slot name"),
    ] {
        let (code, output) = Sink::run(&arguments(command), DEADLINE);
        assert_eq!(code, Some(4), "{output}");
        assert!(output.contains(says) && output.contains("--slot"), "{output}");
    }
    assert_eq!(staging.value("SELECT count(*) FROM pg_replication_slots"), "0");
    production.sql("INSERT INTO t VALUES (1000, 'still here')");
    production.check();
    let log = production.sink(|sink| sink.output());
    assert!(!log.contains("WARN"), "{log}");
    // Where nobody is connected the database was replaced, and `run` makes everything anew; `init` is no place for that.
    production.sink(Sink::terminate);
    let (code, output) = Sink::run(&arguments("init"), DEADLINE);
    assert_eq!(code, Some(4), "{output}");
    assert!(output.contains("UNLINK"), "{output}");
    let mut sink = Sink::start(&arguments("run"));
    wait_for(DEADLINE, "staging to be mirrored", || {
        sink.assert_running();
        (production.redis.keys() == ["other:1"]).then_some(())
    });
    let (code, output) = production.run(&["run"]);
    assert_eq!(code, Some(4), "{output}");
}
