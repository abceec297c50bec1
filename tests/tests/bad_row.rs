//! Rows that cannot be mirrored: the rest goes on, none of them is forgotten, and each is noted once.
//!
//! Where the sink is to stop instead: bad_row_stop.rs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::collections::HashMap;
use std::time::{Duration, Instant};

use rand::Rng;
use walmirror_tests::{DEADLINE, Db, Mirror, Pg, Sink, figure, free_address, rng, wait_for};

/// Stands in every value: no output may hold it.
const CANARY: &str = "canary-in-a-row";

fn mirror(setup: &str, args: &[&str]) -> Mirror {
    let m = Mirror::new();
    // The smallest that Redis takes.
    let _: String = m.redis.command("CONFIG SET proto-max-bulk-len 1048576");
    m.sql(setup);
    m.start_with(args);
    m
}

fn walmirror(m: &Mirror, command: &str) -> (i32, String) {
    let mut args: Vec<&str> = command.split_whitespace().collect();
    args.extend(["--log-level", "error"]);
    let (code, output) = m.run(&args);
    assert!(!output.contains(CANARY), "a value was printed");
    (code.unwrap(), output)
}

fn log(m: &Mirror) -> String {
    let log = m.sink(|sink| sink.output());
    assert!(!log.contains(CANARY), "a value was logged");
    log
}

/// A megabyte and more, compressed or not.
fn large() -> String {
    format!("'{CANARY}' || repeat('x', 1048576)")
}

#[test]
fn rows_larger_than_redis_takes_are_left_out_and_the_rest_flows() {
    let m = mirror(
        &format!(
            "CREATE TABLE h (id int PRIMARY KEY, v text, n int); CREATE TABLE j (LIKE h INCLUDING ALL); \
             CREATE TABLE s (LIKE h INCLUDING ALL); INSERT INTO h VALUES (1, 'small', 0), (2, {}, 0); \
             SELECT walmirror.mirror('h'), walmirror.mirror('j', value => 'json'), \
                    walmirror.mirror('s', value => 'string', columns => '{{v}}')",
            large()
        ),
        &[],
    );
    // The backfill leaves one out …
    m.filled();
    assert_eq!(m.notes(), 1);
    for table in ["h", "j", "s"] {
        let before = m.notes();
        m.sql(&format!(
            "INSERT INTO {table} VALUES (10, 'small', 0), (11, {}, 0), (12, 'small', 0); INSERT INTO {table} VALUES (13, 'small', 0)",
            large()
        ));
        m.sync();
        assert!(m.notes() > before, "{table}");
        // … and so does the stream. A key that held the row before goes, under its old name too. A row whose large value the
        // last update leaves alone is read again, and found to be too large again.
        m.sql(&format!(
            "UPDATE {table} SET v = {0} WHERE id = 10; UPDATE {table} SET id = 99, v = {0} WHERE id = 12; UPDATE {table} SET n = 1",
            large()
        ));
        m.sync();
        let left: Vec<String> = m.redis.keys();
        let left: Vec<&String> = left.iter().filter(|key| key.starts_with(table)).collect();
        let want: &[&str] = if table == "h" {
            &["h:1", "h:13"]
        } else {
            &[&format!("{table}:13")]
        };
        assert_eq!(left, want);
    }
    let (code, output) = walmirror(&m, "verify");
    assert_eq!(code, 1, "{output}");
    for key in ["h:2", "h:10", "h:11", "h:99", "j:99", "s:11"] {
        assert!(
            output.contains(&format!("  missing    {key}\n")),
            "{key}: {output}"
        );
    }
    let (code, output) = walmirror(&m, "status");
    assert_eq!(code, 0);
    assert!(
        output.contains("rows could not be mirrored") && output.contains("proto-max-bulk-len"),
        "{output}"
    );
    // Mended, they are there.
    for table in ["h", "j", "s"] {
        m.sql(&format!("UPDATE {table} SET v = 'small again'"));
    }
    m.settle();
    assert!(log(&m).contains("a row is not mirrored"));
}

/// The story: Redis closed the connection over such a key, each time that it came, and nothing flowed any more.
#[test]
fn a_row_whose_key_is_longer_than_redis_takes_is_noted_and_the_rest_flows() {
    let m = mirror(
        "CREATE TABLE t (id int PRIMARY KEY, v text, n int); ALTER TABLE t REPLICA IDENTITY FULL; \
         INSERT INTO t VALUES (1, 'v', 0), (2, repeat('x', 1048576), 0); SELECT walmirror.mirror('t', key => 't:{id}:{v}', columns => '{id,n}')",
        &[],
    );
    m.filled();
    assert_eq!(m.notes(), 1);
    m.sql("UPDATE t SET n = 1; INSERT INTO t VALUES (3, 'v', 0)");
    m.sync();
    assert_eq!(m.notes(), 2);
    m.sql("UPDATE t SET v = repeat('y', 1048576) WHERE id = 1; DELETE FROM t WHERE id = 2");
    m.sync();
    assert_eq!(m.notes(), 3);
    assert_eq!(m.redis.keys(), ["t:3:v"]);
    let (code, output) = walmirror(&m, "verify");
    assert_eq!(code, 0, "{output}");
    m.sql("UPDATE t SET v = 'w' WHERE id = 1");
    m.settle();
    assert_eq!(m.redis.keys(), ["t:1:w", "t:3:v"]);
}

/// It would overwrite what the sink knows of itself, and no sink could go on.
#[test]
fn a_row_with_a_bookkeeping_key_is_noted_and_the_rest_flows() {
    let m = mirror(
        "CREATE TABLE t (token text PRIMARY KEY, lsn text, epoch text); SELECT walmirror.mirror('t', key => 'w{token}')",
        &[],
    );
    m.filled();
    let own = format!("almirror:{{{}}}", m.db.name);
    m.sql(&format!("INSERT INTO t VALUES ('{own}:progress', '0/1', '99'), ('{own}:pending', 'x', 'y'), ('free', 'x', 'y')"));
    m.sync();
    assert_eq!(m.notes(), 2);
    // Read again, it is refused again.
    m.sql("UPDATE t SET epoch = '98'; DELETE FROM t WHERE token LIKE '%:pending'; ALTER TABLE t ADD n int DEFAULT 1");
    m.filled();
    m.sync();
    assert_eq!(m.notes(), 5);
    let (code, output) = walmirror(&m, "verify");
    assert_eq!(code, 0, "{output}");
    m.sql("UPDATE t SET token = 'mended' WHERE token LIKE '%:progress'");
    m.sync();
    let mut keys = m.redis.keys();
    keys.retain(|key| !key.starts_with("walmirror:"));
    assert_eq!(keys, ["wfree", "wmended"]);
    m.settle();
}

/// The story: it took the place of the other table's row, its DELETE removed that, and `verify --repair` and the stream took turns.
#[test]
fn a_row_with_a_key_of_a_more_specific_table_is_noted_and_the_rest_flows() {
    let m = mirror(
        "CREATE TABLE wide (id text PRIMARY KEY, v text); CREATE TABLE narrow (id int PRIMARY KEY, v text, n int); \
         INSERT INTO wide VALUES ('a:1', 'wide'), ('a', 'wide'); INSERT INTO narrow VALUES (1, 'narrow', 0), (2, 'narrow', 0); \
         SELECT walmirror.mirror('wide', key => 'u:{id}'), walmirror.mirror('narrow', key => 'u:a:{id}')",
        &[],
    );
    m.filled();
    assert_eq!(m.notes(), 1);
    m.sql(
        "INSERT INTO wide VALUES ('a:2', 'wide'), ('a:3', 'wide'), ('b', 'wide'); UPDATE wide SET v = 'w' WHERE id = 'a:1'; \
         UPDATE wide SET id = 'a:4' WHERE id = 'a'; DELETE FROM wide WHERE id IN ('a:2', 'a:4')",
    );
    m.sync();
    assert_eq!(m.notes(), 5);
    let v = |key: &str| {
        m.redis
            .hash(key)
            .into_iter()
            .find(|(field, _)| field == "v")
            .map(|(_, v)| v)
    };
    assert_eq!(m.redis.keys(), ["u:a:1", "u:a:2", "u:b"]);
    for key in ["u:a:1", "u:a:2"] {
        assert_eq!(v(key).as_deref(), Some("narrow"));
    }
    // It is told that two rows are not mirrored, and nothing can repair that, nor spoils anything.
    let (code, output) = walmirror(&m, "verify --repair");
    assert_eq!(code, 1, "{output}");
    assert!(
        output.contains("  different  u:a:1\n") && output.contains("  missing    u:a:3\n"),
        "{output}"
    );
    assert_eq!(v("u:a:1").as_deref(), Some("narrow"));
    let (_, output) = walmirror(&m, "status");
    assert!(output.contains("one of the table public.narrow"), "{output}");
    // Mended, they are there; and where the other table is gone, its keys are this one's again.
    m.sql("UPDATE wide SET id = 'c' WHERE id = 'a:1'; UPDATE wide SET id = 'd' WHERE id = 'a:3'");
    m.settle();
    m.sql("INSERT INTO wide VALUES ('a:1', 'wide')");
    m.sync();
    m.sql("SELECT walmirror.unmirror('narrow')");
    m.settle();
    assert_eq!(v("u:a:1").as_deref(), Some("wide"));
}

#[test]
fn a_row_that_cannot_be_encoded_is_noted() {
    let m = mirror(
        "CREATE TABLE t (id int PRIMARY KEY, doc json); SELECT walmirror.mirror('t', value => 'json')",
        &[],
    );
    m.filled();
    m.sql(&format!(
        r#"INSERT INTO t VALUES (1, '{{}}'), (2, '{{"{CANARY}": "\u0000"}}'), (3, '{{}}')"#
    ));
    m.sync();
    assert_eq!(m.redis.keys(), ["t:1", "t:3"]);
    assert_eq!(m.notes(), 1);
    let (code, output) = walmirror(&m, "status --json");
    assert_eq!(code, 0);
    let status: serde_json::Value = serde_json::from_str(&output).unwrap();
    let rejected = &status["rejected"];
    assert_eq!(rejected["count"], 1);
    assert_eq!(rejected["latest"][0]["key"], "t:2");
    assert_eq!(rejected["latest"][0]["table"], "public.t");
    log(&m);
}

/// What a value can do to the decoder: errors of conversions and of type functions, also those that name no SQLSTATE, and more bytes
/// than a write of the output plugin takes. Each concerns its row alone, in the stream and in a backfill.
#[test]
fn no_value_ends_the_stream() {
    // Its first four bytes are the oid of a type, as range_out reads them; it is none of ranges.
    const NO_RANGE: &str = r"\x1900000000000000";
    let m = Mirror::of(Db::create_with(Pg::shared(), "ENCODING 'WIN1252' LOCALE 'C'"));
    m.sql(&format!(
        "CREATE TYPE wrong; \
         CREATE FUNCTION wrong_in(cstring) RETURNS wrong LANGUAGE internal IMMUTABLE STRICT AS 'byteain'; \
         CREATE FUNCTION wrong_out(wrong) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT AS 'range_out'; \
         CREATE TYPE wrong (INPUT = wrong_in, OUTPUT = wrong_out); \
         CREATE TABLE before (id text PRIMARY KEY, v text, w wrong); \
         INSERT INTO before VALUES ('1', 'v'), ('2', chr(129)), (chr(129), 'v'), ('5', 'v'); INSERT INTO before VALUES ('3', NULL, '{NO_RANGE}'); \
         CREATE TABLE t (LIKE before INCLUDING ALL); \
         CREATE TABLE large (id int PRIMARY KEY, a text, b text, c text); \
         SELECT walmirror.mirror('before'), walmirror.mirror('t'), walmirror.mirror('large')"
    ));
    m.start();
    m.filled();
    assert_eq!(m.redis.keys(), ["before:1", "before:5"]);
    assert_eq!(m.notes(), 2, "a row of the backfill without a key has no note");
    m.sql(&format!(
        "INSERT INTO t VALUES ('0', 'v'), ('2', 'v'), ('3', 'v'), ('4', 'v'), ('5', 'v'); \
         UPDATE t SET v = chr(129) WHERE id = '2'; UPDATE t SET w = '{NO_RANGE}' WHERE id = '3'; \
         UPDATE t SET id = chr(129) WHERE id = '4'; INSERT INTO t VALUES ('6', 'v')"
    ));
    m.sync();
    assert_eq!(m.redis.keys(), ["before:1", "before:5", "t:0", "t:5", "t:6"]);
    assert_eq!(m.notes(), 5);
    m.sql(
        "CREATE TABLE part AS SELECT repeat('x', 400000000) AS v; INSERT INTO large VALUES (1, 'v', 'v', 'v'); \
         INSERT INTO large SELECT 2, a.v, b.v, c.v FROM part a, part b, part c; INSERT INTO large VALUES (3, 'v', 'v', 'v')",
    );
    m.sync();
    assert_eq!(m.notes(), 6);
    assert_eq!(
        m.redis
            .keys()
            .iter()
            .filter(|key| key.starts_with("large"))
            .count(),
        2
    );
    let (code, output) = walmirror(&m, "status --json");
    assert_eq!(code, 0);
    for reason in [
        "22P05 untranslatable_character",
        "XX000 internal_error",
        "less than 1 GB at once",
    ] {
        assert!(output.contains(reason), "{reason}: {output}");
    }
    log(&m);
}

/// DDL that takes the key out of the replica identity is refused, by event triggers. Where somebody has turned these off, a DELETE
/// does not tell its key, nor an UPDATE the one that the row had.
#[test]
fn a_change_without_its_key_has_the_table_compared_anew() {
    let m = mirror(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT i, 'v' FROM generate_series(1, 100) i; \
         SELECT walmirror.mirror('t')",
        &[],
    );
    m.filled();
    m.sql(
        "ALTER EVENT TRIGGER walmirror_ddl_command_end DISABLE; ALTER TABLE t REPLICA IDENTITY NOTHING; \
         INSERT INTO t VALUES (101, 'v')",
    );
    m.settle();
    assert_eq!(m.notes(), 0);
    m.sql("DELETE FROM t WHERE id <= 10");
    m.settle();
    assert_eq!(m.notes(), 1);
    m.sql("BEGIN; UPDATE t SET id = -id WHERE id <= 50; UPDATE t SET v = 'w' WHERE id > 90; COMMIT");
    m.settle();
    assert_eq!(m.notes(), 2);
    let log = log(&m);
    assert!(log.contains("not in the replica identity"), "{log}");
    // Set right, it is as before.
    m.sql("ALTER TABLE t REPLICA IDENTITY DEFAULT; DELETE FROM t WHERE id > 95");
    m.settle();
    assert_eq!(m.notes(), 2);
}

/// The keys of a cache go with such a change, not only when the table has been compared, which waits for whoever is writing.
#[test]
fn a_change_without_its_key_empties_a_cache() {
    let m = mirror(
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT i, 'v' FROM generate_series(1, 100) i; \
         SELECT walmirror.cache('t', on_write => 'populate')",
        &[],
    );
    m.filled();
    m.sync();
    m.outlast_announced();
    m.sql("UPDATE t SET v = 'w' WHERE id <= 10");
    m.sync();
    assert_eq!(m.redis.keys().len(), 10);
    let mut writer = m.db.connect();
    writer
        .batch_execute("BEGIN; SELECT pg_current_xact_id()")
        .unwrap();
    m.sql(
        "ALTER EVENT TRIGGER walmirror_ddl_command_end DISABLE; ALTER TABLE t REPLICA IDENTITY NOTHING; \
         DELETE FROM t WHERE id = 5",
    );
    m.sync();
    assert_eq!(m.redis.keys(), Vec::<String>::new());
    assert_eq!(m.notes(), 1);
    writer.batch_execute("COMMIT").unwrap();
    m.sql("ALTER TABLE t REPLICA IDENTITY DEFAULT; ALTER EVENT TRIGGER walmirror_ddl_command_end ENABLE");
    m.settle();
}

#[test]
fn a_key_of_another_type_stays_and_is_noted() {
    let m = mirror(
        "CREATE TABLE t (id int PRIMARY KEY, v text); SELECT walmirror.mirror('t')",
        &[],
    );
    // A backfill replaces what it finds.
    m.filled();
    let _: String = m.redis.command("SET t:5 foreign");
    m.sql("INSERT INTO t SELECT i, 'v' FROM generate_series(1, 10) i");
    m.sql("INSERT INTO t VALUES (11, 'v')");
    m.sync();
    wait_for(DEADLINE, "the note", || (m.notes() == 1).then_some(()));
    assert_eq!(m.redis.get("t:5").as_deref(), Some("foreign"));
    assert_eq!(m.redis.keys().len(), 11);
    assert!(log(&m).contains("WRONGTYPE"));
    let (code, output) = walmirror(&m, "verify");
    assert_eq!(code, 1);
    assert!(output.contains("different  t:5\n"), "{output}");
    // The template's keys are the mirror's: whoever asks for it gets them.
    let (code, output) = walmirror(&m, "verify --repair");
    assert_eq!(code, 0, "{output}");
    m.check();
}

/// However many of one transaction are refused, each is counted, those between them are written, and the latest thousand or so are noted.
#[test]
fn thousands_of_keys_of_another_type_do_not_hold_up_the_rest() {
    let address = free_address();
    let m = mirror(
        "CREATE TABLE t (id int PRIMARY KEY, v text); SELECT walmirror.mirror('t')",
        &["--on-bad-row", "skip", "--admin", &address],
    );
    m.filled();
    let fill = "for i = 1, 30000, 2 do redis.call('SET', 't:' .. i, 'foreign') end return 'ok'";
    let filled: String = redis::cmd("EVAL")
        .arg(fill)
        .arg(0)
        .query(&mut m.redis.connect())
        .unwrap();
    assert_eq!(filled, "ok");
    m.sql("INSERT INTO t SELECT i, 'v' FROM generate_series(1, 30000) i");
    m.sync();
    assert_eq!(m.redis.keys().len(), 30_000);
    assert_eq!(m.redis.hash("t:30000")[1], ("v".into(), "v".into()));
    // They are noted behind the EXEC, and told before that.
    let latest = format!("XREVRANGE walmirror:{{{}}}:rejected + - COUNT 1", m.db.name);
    wait_for(DEADLINE, "the last note", || {
        let latest: Vec<(String, HashMap<String, String>)> = m.redis.command(&latest);
        (latest.first()?.1["key"] == "t:29999").then_some(())
    });
    let kept = m.notes();
    assert!((1000..1200).contains(&kept), "{kept} notes are kept");
    let counted = figure(&address, "walmirror_rejected_total");
    assert_eq!(counted, Some(15_000.0));
    let log = log(&m);
    assert!(log.contains("14990 more rows are not mirrored"), "{log}");
    m.sink(Sink::assert_running);
}

/// The story: each of the rows of a transaction was a line of the log.
#[test]
fn of_thousands_of_bad_rows_the_log_names_some() {
    let m = mirror(
        "CREATE TABLE t (id text PRIMARY KEY); SELECT walmirror.mirror('t', key => 'user:{id}'); \
         CREATE TABLE admins (id int PRIMARY KEY); SELECT walmirror.mirror('admins', key => 'user:admin:{id}')",
        &["--on-bad-row", "skip"],
    );
    m.filled();
    m.sql("INSERT INTO t SELECT 'admin:' || i FROM generate_series(1, 20000) i");
    m.sql("INSERT INTO t VALUES ('admin:last')");
    m.sync();
    let log = log(&m);
    let named = log.matches("a row is not mirrored").count();
    assert!((10..1000).contains(&named), "{named} rows are named");
    assert!(log.contains("more rows are not mirrored") && log.contains("user:admin:last"));
}

/// The EXEC is done and says that a key was refused, and before that could be noted the sink is gone. Here Redis refuses the note,
/// which leaves the same behind.
#[test]
fn a_refused_key_whose_note_was_lost_is_found_by_verify() {
    let m = mirror(
        "CREATE TABLE t (id int PRIMARY KEY, v text); SELECT walmirror.mirror('t')",
        &[],
    );
    // A backfill replaces what it finds.
    m.filled();
    let _: String = m.redis.command("SET t:5 foreign");
    let _: String = m.redis.command("ACL SETUSER default -xadd");
    m.sql("INSERT INTO t SELECT i, 'v' FROM generate_series(1, 10) i");
    wait_for(DEADLINE, "the sink to fail", || {
        m.sink(|sink| sink.output().contains("NOPERM")).then_some(())
    });
    let _: String = m.redis.command("ACL SETUSER default +xadd");
    m.sync();
    assert_eq!(m.notes(), 0);
    let (code, output) = walmirror(&m, "verify");
    assert_eq!(code, 1, "{output}");
    assert!(output.contains("different  t:5\n"), "{output}");
    let (code, output) = walmirror(&m, "verify --repair");
    assert_eq!(code, 0, "{output}");
    m.check();
}

/// A note is in the EXEC whose progress passes the row: neither lost nor written twice, whenever the sink dies.
#[test]
fn each_bad_row_is_noted_once_whenever_the_sink_is_killed() {
    let mut rng = rng("bad rows");
    let m = mirror(
        "CREATE TABLE t (id int PRIMARY KEY, doc json); SELECT walmirror.mirror('t', value => 'json')",
        &["--batch-bytes", "4KiB", "--transaction-bytes", "8KiB"],
    );
    m.filled();
    let mut bad = 0;
    for round in 0..6 {
        let (from, to) = (round * 1000, round * 1000 + 600);
        m.sql(&format!(
            "INSERT INTO t SELECT i, CASE WHEN i % 20 = 0 THEN '{{\"a\": \"\\u0000\"}}' ELSE '{{\"a\": \"some text\"}}' END::json \
             FROM generate_series({from}, {to}) i"
        ));
        bad += 31;
        let until = Instant::now() + Duration::from_micros(rng.random_range(0..20_000));
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        m.sink(Sink::kill);
        m.sink(Sink::restart);
    }
    m.sync();
    assert_eq!(m.notes(), bad);
    assert_eq!(m.redis.keys().len(), 6 * 601 - bad as usize);
}
