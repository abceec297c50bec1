//! What `doctor` and `status` tell, and which command they advise.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use walmirror_tests::{DEADLINE, Db, Dir, Mirror, Pg, Redis, Sink, full_disk, unread, wait_for};

const TABLE: &str = "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'v'); SELECT walmirror.mirror('t')";

/// The story: all was well, said doctor, where nobody streamed, and where everything was about to be mirrored anew.
#[test]
fn doctor_warns_of_a_gap_and_where_no_sink_streams() {
    let mirror = Mirror::with(TABLE);
    let doctor = || {
        let (code, output) = mirror.run(&["doctor"]);
        assert_eq!(code, Some(0), "{output}");
        output
    };
    wait_for(DEADLINE, "all to be well", || {
        doctor().ends_with("all is well\n").then_some(())
    });
    mirror.sink(Sink::terminate);
    let told = doctor();
    assert!(
        told.contains("WARN  sink                     nobody streams from the slot")
            && told.contains("ok    slot and Redis           they fit together"),
        "{told}"
    );
    let _: String = mirror.redis.command("FLUSHALL");
    let told = doctor();
    assert!(
        told.contains("WARN  slot and Redis           they do not fit together: the slot exists, but Redis has no progress"),
        "{told}"
    );
}

/// The story: all was well with a Redis that took no more writes, and no sink ran, said doctor of one that tried and tried.
#[test]
fn doctor_fails_with_a_redis_that_takes_no_writes() {
    let redis = Redis::start_with(&["--save", "3600 1000000", "--enable-protected-configs", "yes"]);
    let mirror = Mirror::between(Db::create(Pg::shared()), redis);
    mirror.sql(TABLE);
    mirror.start();
    mirror.settle();
    let doctor = |says: &str| {
        let (code, told) = mirror.run(&["doctor"]);
        assert_eq!(code, Some(4), "{told}");
        assert!(told.contains(says), "{told}");
    };
    let set = |name: &str, value: &str| {
        let _: String = mirror.redis.command(&format!("CONFIG SET {name} {value}"));
    };
    set("maxmemory", "1kb");
    doctor("FAIL  Redis memory             Redis refuses writes: it is full");
    set("maxmemory", "0");
    let dir = Dir::new("gone");
    let path = dir.path().join("dump");
    std::fs::create_dir_all(&path).unwrap();
    set("dir", &path.display().to_string());
    std::fs::remove_dir_all(&path).unwrap();
    let _: String = mirror.redis.command("BGSAVE");
    wait_for(DEADLINE, "the snapshot to fail", || {
        let info: String = mirror.redis.command("INFO persistence");
        info.contains("rdb_last_bgsave_status:err").then_some(())
    });
    doctor("FAIL  Redis persistence        Redis refuses writes: it could not save");
}

/// The story: a Redis that was busy with a script was a refusal to doctor, which advised its own help.
#[test]
fn doctor_ends_as_with_a_redis_that_is_away_where_it_is_busy() {
    let redis = Redis::start_with(&["--lua-time-limit", "100"]);
    let mirror = Mirror::between(Db::create(Pg::shared()), redis);
    let client = mirror.redis.client();
    let spinning = std::thread::spawn(move || {
        let mut connection = client.get_connection().unwrap();
        let _ = redis::cmd("EVAL")
            .arg("while true do end")
            .arg(0)
            .exec(&mut connection);
    });
    wait_for(DEADLINE, "Redis to be busy", || {
        redis::cmd("PING")
            .exec(&mut mirror.redis.client().get_connection().ok()?)
            .err()
    });
    let (code, told) = mirror.run(&["doctor"]);
    assert_eq!(code, Some(5), "{told}");
    let port = mirror.redis.port();
    assert!(
        told.contains(&format!("next: redis-cli -h 127.0.0.1 -p {port} SCRIPT KILL")),
        "{told}"
    );
    redis::cmd("SCRIPT")
        .arg("KILL")
        .exec(&mut mirror.redis.connect())
        .unwrap();
    spinning.join().unwrap();
}

/// The story: doctor printed FAIL, and below it that all was well, with exit code 0.
#[test]
fn doctor_fails_with_a_damaged_progress_key() {
    let mirror = Mirror::with(TABLE);
    mirror.sink(Sink::terminate);
    let key = format!("walmirror:{{{}}}:progress", mirror.db.name);
    let _: i64 = mirror.redis.command(&format!("HSET {key} lsn garbage"));
    let (code, told) = mirror.run(&["doctor"]);
    assert_eq!(code, Some(4), "{told}");
    assert!(
        told.contains("FAIL  ") && told.contains("UNLINK") && !told.contains("all is well"),
        "{told}"
    );
}

/// The story: `walmirror init | head -1` made no slot, and `walmirror doctor | head -1` found nothing to fail, with exit code 0.
#[test]
fn a_command_does_its_work_though_nobody_reads_what_it_says() {
    let mirror = Mirror::new();
    mirror.sql(TABLE);
    let ends = |command: &str, stdout, wanted: i32| {
        let (code, said) = Sink::run_into(&mirror.arguments(&[command]), stdout);
        assert_eq!(code, Some(wanted), "{command}: {said}");
    };
    let slots = || {
        mirror
            .db
            .value("SELECT count(*) FROM pg_replication_slots WHERE slot_name = current_database()")
    };
    // Who cannot be told the next command has not begun.
    ends("init", full_disk(), 1);
    assert_eq!(slots(), "0");
    ends("init", unread(), 0);
    assert_eq!(slots(), "1");
    ends("doctor", unread(), 0);
    ends("status", unread(), 0);
    let key = format!("walmirror:{{{}}}:progress", mirror.db.name);
    let _: i64 = mirror.redis.command(&format!("HSET {key} lsn garbage"));
    for stdout in [unread(), full_disk()] {
        ends("doctor", stdout, 4);
    }
    ends("status", unread(), 4);
}

/// The story: `walmirror tail --consume` had the name of the sink, so that a COMMIT which waited for that returned when the row was printed. Two
/// sinks with one name are no better.
#[test]
fn two_of_one_name_among_the_synchronous_standbys_are_told_of() {
    let mirror = Mirror::alone("");
    mirror.sql(TABLE);
    mirror.start();
    mirror.settle();
    mirror.sql(
        "SET synchronous_commit = local; SELECT pg_create_logical_replication_slot('tailed', 'walmirror')",
    );
    mirror.db.pg.configure("synchronous_standby_names = 'walmirror'");
    mirror.db.pg.reload();
    // As where the connection string of the sink is in the environment.
    let conninfo = format!(
        "{} application_name=walmirror",
        mirror.db.pg.conninfo(&mirror.db.name)
    );
    let mut tail = Sink::start(&["tail", "--postgres", &conninfo, "--slot", "tailed", "--consume"]);
    let streams = |wanted: &[&str]| {
        wait_for(DEADLINE, format!("streams of {wanted:?}"), || {
            let query = "SELECT coalesce(string_agg(application_name || ' ' || sync_priority, ', ' ORDER BY application_name), '') \
                         FROM pg_stat_replication WHERE state = 'streaming'";
            (mirror.db.value(query) == wanted.join(", ")).then_some(())
        });
    };
    streams(&["walmirror 1", "walmirror tail 0"]);
    let doctor = || {
        let (code, told) = mirror.run(&["doctor"]);
        assert_eq!(code, Some(0), "{told}");
        told
    };
    let told = doctor();
    assert!(told.contains("ok    synchronous standbys"), "{told}");
    assert!(tail.terminate().success(), "{}", tail.output());
    let url = mirror.redis.url().replace("/0", "/1");
    let second = [
        "run",
        "--postgres",
        &conninfo,
        "--redis",
        &url,
        "--slot",
        "second",
    ];
    let mut second = Sink::start(&second);
    streams(&["walmirror 1", "walmirror 1"]);
    let told = doctor();
    let both = format!(
        "2 have the application name walmirror: the slots {}, second",
        mirror.db.name
    );
    assert!(
        told.contains("WARN  synchronous standbys") && told.contains(&both),
        "{told}"
    );
    assert!(
        told.contains("next: walmirror run --postgres '… application_name="),
        "{told}"
    );
    // Who does not see them is not told that there are none.
    mirror.sql("CREATE ROLE blind LOGIN REPLICATION");
    let conninfo = format!("{} user=blind", mirror.db.pg.conninfo(&mirror.db.name));
    let (_, told) = Sink::run(
        &["doctor", "--postgres", &conninfo, "--slot", &mirror.db.name],
        DEADLINE,
    );
    assert!(
        told.contains("next: GRANT pg_read_all_stats TO \"blind\";"),
        "{told}"
    );
    assert!(second.terminate().success(), "{}", second.output());
    streams(&["walmirror 1"]);
    assert!(doctor().contains("ok    synchronous standbys"));
}

/// The story: doctor asked for SELECT on the labelled table alone, and said that all was well while a partition or a schema could not
/// be read; and `backfill` waited for such a table for ever.
#[test]
fn tables_that_the_sink_may_not_read_are_told_of_with_what_helps() {
    let mirror = Mirror::new();
    let role = format!("reader_{}", mirror.db.name);
    mirror.sql(&format!(
        "CREATE ROLE {role} LOGIN REPLICATION; CREATE SCHEMA \"My Shop\"; \
         CREATE TABLE \"My Shop\".orders (id int PRIMARY KEY); INSERT INTO \"My Shop\".orders VALUES (1); \
         CREATE TABLE p (id int PRIMARY KEY) PARTITION BY RANGE (id); \
         CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10); INSERT INTO p VALUES (1); \
         CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1); \
         SELECT walmirror.mirror('\"My Shop\".orders'), walmirror.mirror('p'), walmirror.mirror('t'); \
         GRANT SELECT ON \"My Shop\".orders, p, t TO {role}; GRANT pg_read_all_settings TO {role}"
    ));
    let conninfo = format!("{} user={role}", mirror.db.pg.conninfo(&mirror.db.name));
    let url = mirror.redis.url();
    mirror.start_at(&conninfo, &url, &[], &[]);
    let walmirror = |args: &[&str]| {
        let servers = [
            "--postgres",
            &conninfo,
            "--redis",
            &url,
            "--slot",
            &mirror.db.name,
        ];
        Sink::run(&[args, &servers].concat(), DEADLINE)
    };
    let next =
        format!("next: GRANT USAGE ON SCHEMA \"My Shop\" TO {role}; GRANT SELECT ON public.p1 TO {role};\n");
    let says = |(code, told): (Option<i32>, String), wanted: i32, words: &[&str]| {
        assert_eq!(code, Some(wanted), "{told}");
        assert!(words.iter().all(|word| told.contains(word)), "{words:?}: {told}");
    };
    let both = ["may not read \"My Shop\".orders, public.p1,", &next];
    says(walmirror(&["doctor"]), 3, &both);
    let log = || mirror.sink(|sink| sink.output());
    wait_for(DEADLINE, "the log to say what helps", || {
        let log = log();
        let usage = format!("GRANT USAGE ON SCHEMA \"My Shop\" TO {role};");
        let usage = [usage.clone(), usage.replace('"', "\\\"")];
        let select = format!("GRANT SELECT ON public.p1 TO {role};");
        (usage.iter().any(|usage| log.contains(usage)) && log.contains(&select)).then_some(())
    });
    // The role of the sink counts, not that of whoever asks.
    says(mirror.run(&["backfill"]), 3, &both);
    wait_for(DEADLINE, "t to be filled", || {
        (mirror.redis.keys() == ["t:1"]).then_some(())
    });
    says(
        walmirror(&["backfill", "--table", "t"]),
        0,
        &["public.t: filled again"],
    );
    mirror.sql(&format!("GRANT USAGE ON SCHEMA \"My Shop\" TO {role}"));
    let p1 = format!("next: GRANT SELECT ON public.p1 TO {role};\n");
    says(walmirror(&["doctor"]), 3, &["may not read public.p1,", &p1]);
    mirror.sql(&format!("GRANT SELECT ON p1 TO {role}"));
    wait_for(DEADLINE, "all to be well", || {
        let (code, told) = walmirror(&["doctor"]);
        assert_eq!(code, Some(0), "{told}");
        told.ends_with("all is well\n").then_some(())
    });
    mirror.settle();
}

/// The story: all was well, said doctor, while nothing of a table was in Redis; and `backfill` did not say that nothing moved.
#[test]
fn a_table_that_is_not_filled_is_told_of() {
    let mirror = Mirror::with(TABLE);
    let mut blocker = mirror.db.connect();
    let mut running = blocker.transaction().unwrap();
    running.execute("SELECT pg_current_xact_id()", &[]).unwrap();
    let mut backfill = Sink::start(&mirror.arguments(&["backfill"]));
    wait_for(DEADLINE, "backfill to say that nothing moves", || {
        backfill.assert_running();
        backfill
            .output()
            .contains("public.t: the sink has not got further for 10 s")
            .then_some(())
    });
    let (code, told) = mirror.run(&["doctor"]);
    assert_eq!(code, Some(0), "{told}");
    assert!(
        told.contains("WARN  filled tables            1 not filled yet: public.t"),
        "{told}"
    );
    running.rollback().unwrap();
    assert!(backfill.wait(DEADLINE).success(), "{}", backfill.output());
    let (_, told) = mirror.run(&["doctor"]);
    assert!(told.contains("ok    filled tables"), "{told}");
}

/// The story: with another database of Redis, requests were sent before it was told that there is no mirror.
#[test]
fn a_backfill_with_another_redis_asks_for_nothing() {
    let mirror = Mirror::with(TABLE);
    let conninfo = mirror.db.pg.conninfo(&mirror.db.name);
    let url = mirror.redis.url().replace("/0", "/1");
    let slot = &mirror.db.name;
    let args = [
        "backfill",
        "--postgres",
        &conninfo,
        "--redis",
        &url,
        "--slot",
        slot,
    ];
    let (code, told) = Sink::run(&args, DEADLINE);
    assert_eq!(code, Some(3), "{told}");
    assert!(
        told.contains("Redis has no progress of the slot") && told.contains(&format!("--slot {slot}")),
        "{told}"
    );
}

/// The story: doctor looked at nothing that the user's rights forbid, and failed with the rights that it had advised itself.
#[test]
fn doctor_asks_for_the_rights_of_the_user_and_passes_with_those_it_advises() {
    let mirror = Mirror::new();
    mirror.sql(TABLE);
    let conninfo = mirror.db.pg.conninfo(&mirror.db.name);
    let url = format!("redis://u:geheim@127.0.0.1:{}/0", mirror.redis.port());
    let doctor = |rights: &str| {
        let _: String = mirror
            .redis
            .command(&format!("ACL SETUSER u reset on >geheim {rights}"));
        let args = [
            "doctor",
            "--postgres",
            &conninfo,
            "--redis",
            &url,
            "--slot",
            &mirror.db.name,
        ];
        Sink::run(&args, DEADLINE)
    };
    let (code, told) = doctor("~* +@all -xadd");
    assert_eq!(code, Some(4), "{told}");
    assert!(
        told.contains("FAIL  Redis rights             the user u may not: XADD walmirror:{"),
        "{told}"
    );
    let advice = told
        .split("ACL SETUSER u ")
        .nth(1)
        .unwrap()
        .lines()
        .next()
        .unwrap();
    // A shell would read it as a pipe, and give all of CONFIG.
    assert!(
        advice.contains("'~*'") && advice.ends_with("'+config|get'"),
        "{advice}"
    );
    let advice = &advice.replace('\'', "");
    let (code, told) = doctor("~walmirror:* +@all");
    assert_eq!(code, Some(4), "{told}");
    assert!(told.contains("HSET t:1"), "{told}");
    let (code, told) = doctor("~* +@all -info");
    assert_eq!(code, Some(0), "{told}");
    assert!(told.contains("note  Redis "), "{told}");
    let (code, told) = doctor(&format!("{advice} +acl|whoami +acl|dryrun"));
    assert_eq!(code, Some(0), "{told}");
    assert!(told.contains("the user u may do what the sink does"), "{told}");
    let (code, told) = doctor(advice);
    assert_eq!(code, Some(0), "{told}");
    assert!(told.ends_with("all is well\n"), "{told}");
    // And it is enough for the sink.
    mirror.start_at(&conninfo, &url, &[], &[]);
    mirror.settle();
}

/// A slot that SQL made is none that a standby keeps, unless one asks for it (Postgres 17).
#[test]
fn doctor_tells_of_a_slot_that_a_promotion_would_lose() {
    let mirror = Mirror::alone("");
    let version = mirror.db.pg.version();
    if version < 17 {
        println!("not on this version: Postgres {version} has no failover slots");
        return;
    }
    let doctor = || mirror.run(&["doctor"]).1;
    mirror.sql("SELECT pg_create_logical_replication_slot(current_database(), 'walmirror')");
    let told = doctor();
    assert!(
        told.contains("no failover slot: after a promotion it is gone"),
        "{told}"
    );
    // What it says to type is what helps.
    let next = told.split("psql \"").nth(1).unwrap();
    let (target, rest) = next.split_once("\" -c '").unwrap();
    let (command, _) = rest.split_once('\'').unwrap();
    let done = mirror
        .db
        .pg
        .program("psql", &mirror.db.name)
        .args([target, "-c", command])
        .output()
        .unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let told = doctor();
    assert!(told.contains(", failover slot\n"), "{told}");
}

/// The story: status told of 1000 rows where there had been many more.
#[test]
fn status_counts_no_notes_that_are_gone() {
    let mirror = Mirror::with(TABLE);
    let note = "for _ = 1, ARGV[1] do redis.call('XADD', KEYS[1], '*', 'key', 'k', 'table', 't', 'lsn', '0/1', 'reason', 'r') end";
    for (notes, told) in [
        (999, "rejected     999 rows"),
        (1, "rejected     at least 1000 rows"),
    ] {
        redis::cmd("EVAL")
            .arg(note)
            .arg(1)
            .arg(format!("walmirror:{{{}}}:rejected", mirror.db.name))
            .arg(notes)
            .exec(&mut mirror.redis.connect())
            .unwrap();
        let (code, output) = mirror.run(&["status"]);
        assert_eq!(code, Some(0), "{output}");
        assert!(output.contains(told), "{output}");
    }
}

/// The story: who wanted to know what holds up a mirror waited for the same lock, for as long as it was held.
#[test]
fn a_locked_table_holds_up_neither_doctor_nor_status() {
    let mirror = Mirror::with(TABLE);
    mirror.settle();
    let mut holder = mirror.db.connect();
    holder.batch_execute("BEGIN; LOCK TABLE t").unwrap();
    for (command, told) in [("doctor", "the table public.t is locked"), ("status", "t:{id}")] {
        let (code, output) = mirror.run(&[command]);
        assert_eq!(code, Some(0), "{command}: {output}");
        assert!(output.contains(told), "{output}");
    }
}
