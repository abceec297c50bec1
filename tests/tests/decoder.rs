//! The output plugin inside of a server that must not suffer from it: a row that cannot be encoded does not stop the stream, and
//! memory does not grow. Failures of the plugin itself are in decoder_failures.rs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::sync::Arc;

use walmirror_tests::{DEADLINE, Db, Mirror, Pg, wait_for};

#[test]
fn a_row_that_cannot_be_encoded_is_told_and_the_rest_flows() {
    let m = Mirror::new();
    // to_jsonb refuses a json value with an escaped NUL.
    m.sql("CREATE TABLE t (id int PRIMARY KEY, doc json); SELECT walmirror.mirror('t', value => 'json')");
    m.start();
    m.settle();
    m.sql(r#"INSERT INTO t VALUES (1, '{"a": 1}'), (2, '{"canary": "\u0000"}'), (3, '{"a": 3}')"#);
    m.sql("INSERT INTO t VALUES (4, '{}')");
    m.sync();
    assert_eq!(m.redis.keys(), ["t:1", "t:3", "t:4"]);
    let log = m.sink(|sink| sink.output());
    let line = log
        .lines()
        .find(|line| line.contains("ERROR"))
        .expect("an ERROR line");
    assert!(
        line.contains("public.t") && line.contains("column \"doc\"") && !line.contains("canary"),
        "{line}"
    );
    // A row that becomes one takes its key away, and the old one when the key changed too.
    m.sql(r#"UPDATE t SET doc = '{"canary": "\u0000"}' WHERE id = 1; UPDATE t SET id = 33, doc = '{"canary": "\u0000"}' WHERE id = 3"#);
    m.sync();
    assert_eq!(m.redis.keys(), ["t:4"]);
    m.sql("DELETE FROM t WHERE id IN (1, 2, 33)");
    m.check();
}

#[test]
fn a_backfill_goes_past_a_row_that_cannot_be_encoded() {
    let m = Mirror::new();
    m.sql(
        "CREATE TABLE t (id int PRIMARY KEY, doc json); INSERT INTO t SELECT i, '{}' FROM generate_series(1, 1000) i; \
         SELECT walmirror.mirror('t', value => 'json')",
    );
    m.sql(r#"UPDATE t SET doc = '{"canary": "\u0000"}' WHERE id = 500"#);
    m.start();
    wait_for(DEADLINE, "the other rows", || {
        (m.redis.keys().len() == 999).then_some(())
    });
    assert!(!m.redis.keys().contains(&"t:500".to_owned()));
    let log = m.sink(|sink| sink.output());
    assert!(
        log.contains("public.t") && log.contains("could not be encoded") && !log.contains("canary"),
        "{log}"
    );
    m.sql("UPDATE t SET doc = '[]' WHERE id = 500");
    m.check();
}

#[test]
fn memory_does_not_grow_with_the_stream() {
    let pg = Arc::new(Pg::start("max_wal_size = 4GB"));
    let db = Db::create(pg);
    db.sql(
        "CREATE TABLE t (id int PRIMARY KEY, a text[], b jsonb, c numeric, d text, e interval); \
         SELECT walmirror.mirror('t', value => 'json')",
    );
    db.sql("SELECT pg_create_logical_replication_slot(current_database(), 'walmirror')");
    db.sql("INSERT INTO t SELECT i, ARRAY['a', 'b'], '{\"x\": [1, 2]}', 1e30 + i, repeat('x', 50), '1 day' FROM generate_series(1, 100000) i");
    let mut session = db.connect();
    let pid: i32 = session.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
    let peek = "SELECT count(*) FROM pg_logical_slot_peek_binary_changes(current_database(), NULL, NULL)";
    session.batch_execute(peek).unwrap();
    let before = resident_kb(pid);
    // Fifty are five million changes, in half a minute; MEMORY_ROUNDS sets another number.
    let rounds = std::env::var("MEMORY_ROUNDS").map_or(50, |text| text.parse().expect("a number"));
    for _ in 0..rounds {
        session.batch_execute(peek).unwrap();
    }
    let grown = resident_kb(pid) - before;
    assert!(
        grown < 8 * 1024,
        "{grown} kB more after {rounds} times 100,000 rows"
    );
    db.sql("SELECT pg_drop_replication_slot(current_database())");
}

/// What the plugin says of a table that its label does not fit was made anew for each row, in memory that the transaction held to its
/// end: 110 bytes a row.
#[test]
fn memory_does_not_grow_with_the_rows_of_a_table_that_its_label_does_not_fit() {
    // A few million show it well; BROKEN_ROWS sets another number.
    let rows = std::env::var("BROKEN_ROWS").map_or(400_000, |text| text.parse::<u32>().expect("a number"));
    let pg = Arc::new(Pg::start("max_wal_size = 4GB\nlogical_decoding_work_mem = 1MB"));
    let db = Db::create(pg);
    db.sql(
        "CREATE TABLE t (a int, b int); SECURITY LABEL FOR walmirror ON TABLE t IS '{\"mode\":\"mirror\"}'",
    );
    db.sql("SELECT pg_create_logical_replication_slot(current_database(), 'walmirror')");
    let mut session = db.connect();
    let pid: i32 = session.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
    let peek = "SELECT data FROM pg_logical_slot_peek_changes(current_database(), NULL, NULL, 'format', 'json') WHERE data LIKE '%\"error\"%'";
    let mut highest_kb = |rows: u32| {
        db.sql(&format!(
            "INSERT INTO t SELECT i, i FROM generate_series(1, {rows}) i"
        ));
        let (told, highest) = std::thread::scope(|scope| {
            let reading = scope.spawn(|| session.query(peek, &[]).unwrap().len());
            let mut highest = 0;
            while !reading.is_finished() {
                highest = highest.max(resident_kb(pid));
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
            (reading.join().unwrap(), highest)
        });
        db.sql("SELECT pg_replication_slot_advance(current_database(), pg_current_wal_lsn())");
        // Once a transaction.
        assert_eq!(told, 1);
        highest
    };
    highest_kb(50_000);
    let before = resident_kb(pid);
    let grown = highest_kb(rows) - before;
    println!("{grown} kB more for {rows} rows");
    assert!(grown < 8 * 1024, "{grown} kB more for {rows} rows");
    db.sql("SELECT pg_drop_replication_slot(current_database())");
}

/// The memory of a process that is no file's and not shared.
fn resident_kb(pid: i32) -> i64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse::<i64>().unwrap()
}

/// `to_jsonb` calls the function of a cast to json for what stands within arrays and rows, and anybody may write such a cast for
/// a type of their own. The rows are read by others: a SELECT, a backfill, a walsender. So a table owner once became a superuser
/// as soon as a superuser read their table.
#[test]
fn no_function_of_a_type_owner_runs_when_others_read_a_value() {
    let db = Db::create(Arc::new(Pg::start("")));
    db.sql("CREATE ROLE mallory; GRANT CREATE ON SCHEMA public TO mallory");
    let mut mallory = db.connect();
    let cast = "CREATE CAST (mood AS json) WITH FUNCTION mood_json(mood)";
    mallory
        .batch_execute(&format!(
            "SET SESSION AUTHORIZATION mallory; CREATE TYPE mood AS ENUM ('a', 'b'); \
             CREATE FUNCTION mood_json(mood) RETURNS json LANGUAGE plpgsql AS \
             $$ BEGIN EXECUTE 'ALTER ROLE mallory SUPERUSER'; RETURN '\"ran\"'; END $$; {cast}; \
             CREATE DOMAIN moods AS mood[]; CREATE TYPE within AS (i int, m mood); CREATE TYPE deep AS (w within[])"
        ))
        .unwrap();
    let is_superuser = || db.value("SELECT rolsuper FROM pg_roles WHERE rolname = 'mallory'");

    // A label that would lead there is refused.
    for (at, kind) in ["mood[]", "moods", "moods[]", "within", "within[]", "deep"]
        .iter()
        .enumerate()
    {
        mallory
            .batch_execute(&format!("CREATE TABLE t{at} (id int PRIMARY KEY, v {kind})"))
            .unwrap();
        let label = format!("SELECT walmirror.mirror('t{at}', value => 'json')");
        let error = mallory.batch_execute(&label).expect_err(kind);
        let error = error.as_db_error().unwrap();
        assert!(
            error.message().contains("whose cast to json is not written in C") && error.hint().is_some(),
            "{kind}: {error:?}"
        );
        mallory
            .batch_execute(&format!(
                "SELECT walmirror.mirror('t{at}', value => 'json', columns => '{{id}}'); \
                 SELECT walmirror.unmirror('t{at}'); SELECT walmirror.mirror('t{at}')"
            ))
            .unwrap();
    }
    // By itself the value is a string of its text, which takes no cast.
    mallory
        .batch_execute(
            "CREATE TABLE plain (id int PRIMARY KEY, v mood); SELECT walmirror.cache('plain', value => 'json'); \
             INSERT INTO plain VALUES (1, 'a')",
        )
        .unwrap();

    // The cast comes after the label, and no table changes with it.
    mallory
        .batch_execute(
            "DROP CAST (mood AS json); CREATE TABLE t (id int PRIMARY KEY, v mood[]); SELECT walmirror.cache('t', value => 'json')",
        )
        .unwrap();
    db.sql("SELECT pg_create_logical_replication_slot(current_database(), 'walmirror')");
    let mut reader = db.connect();
    let read = "SET walmirror.capture_interval = 0; SELECT * FROM t; SELECT * FROM plain";
    let pack = "SELECT walmirror.pack(t.*) FROM t";
    let captured =
        || db.value("SELECT value::int FROM walmirror.capture_stats WHERE counter = 'rows_emitted'");
    let stream = || {
        db.value(
            "SELECT string_agg(data, ' ') FROM pg_logical_slot_peek_changes(current_database(), NULL, NULL, 'format', 'json')",
        )
    };
    mallory.batch_execute("INSERT INTO t VALUES (1, '{a}')").unwrap();
    reader.batch_execute(read).unwrap();
    reader.batch_execute(pack).unwrap();
    assert_eq!(captured(), "3");
    mallory
        .batch_execute(&format!("{cast}; INSERT INTO t VALUES (2, '{{b}}')"))
        .unwrap();
    reader.batch_execute(read).unwrap();
    assert_eq!(captured(), "4");
    let error = reader.batch_execute(pack).expect_err("packed");
    let error = error.as_db_error().unwrap();
    assert!(error.message().contains("whose cast to json"), "{error:?}");
    let told = stream();
    assert!(
        told.contains("whose cast to json") && !told.contains("\"ran"),
        "{told}"
    );
    assert_eq!(is_superuser(), "f");

    // Without the cast it fits again.
    mallory.batch_execute("DROP CAST (mood AS json)").unwrap();
    reader.batch_execute(read).unwrap();
    assert_eq!(captured(), "7");

    // A cast that is written in C counts; its function is replaced behind the plan's back.
    db.sql(&format!(
        "DROP TABLE plain; DROP FUNCTION mood_json(mood); CREATE FUNCTION mood_json(mood) RETURNS json LANGUAGE internal AS 'textin'; \
         ALTER FUNCTION mood_json(mood) OWNER TO mallory; {cast}; UPDATE t SET v = '{{}}'"
    ));
    let read = "SELECT * FROM t";
    reader.batch_execute(read).unwrap();
    reader.batch_execute(pack).unwrap();
    assert_eq!(captured(), "11");
    mallory
        .batch_execute(
            "CREATE OR REPLACE FUNCTION mood_json(mood) RETURNS json LANGUAGE plpgsql AS \
             $$ BEGIN EXECUTE 'ALTER ROLE mallory SUPERUSER'; RETURN '\"ran\"'; END $$; UPDATE t SET v = '{a}'",
        )
        .unwrap();
    reader.batch_execute(read).unwrap();
    reader.batch_execute(pack).unwrap();
    assert!(!stream().contains("\"ran"));
    assert_eq!((captured().as_str(), is_superuser().as_str()), ("11", "f"));
}

/// Such a function is refused when Postgres has become the user that it runs as, with the settings that it asks for. The error of a
/// value is caught, and a session once went on as that user.
#[test]
fn a_refused_function_leaves_user_and_settings_as_they_were() {
    let db = Db::create(Arc::new(Pg::start("")));
    db.sql(
        "CREATE ROLE mallory; GRANT CREATE ON SCHEMA public TO mallory; \
         CREATE FUNCTION audit_json(anyelement) RETURNS json LANGUAGE plpgsql SECURITY DEFINER \
         SET search_path = elsewhere SET intervalstyle = 'iso_8601' AS $$ BEGIN RETURN '1'; END $$",
    );
    let mallory = || {
        let mut client = db.connect();
        client.batch_execute("SET SESSION AUTHORIZATION mallory").unwrap();
        client
    };
    let (mut reader, mut ddl, mut caster) = (mallory(), mallory(), mallory());
    ddl.batch_execute(
        "CREATE TYPE comp AS (x int); CREATE TYPE mood AS ENUM ('a', 'b'); \
         CREATE TABLE t (id interval PRIMARY KEY, c comp, m mood[]); INSERT INTO t VALUES ('1 day 02:00', ROW(1), '{a,b}'); \
         SELECT walmirror.mirror('t', value => 'json')",
    )
    .unwrap();
    ddl.batch_execute("BEGIN; ALTER TYPE comp ADD ATTRIBUTE y int")
        .unwrap();
    // The table is planned, then the value of `c` waits for its type; the cast comes meanwhile.
    let reading = std::thread::spawn(move || {
        let session =
            "SELECT concat_ws(' ', current_user, current_setting('search_path'), '1 day 02:00'::interval)";
        let before: String = reader.query_one(session, &[]).unwrap().get(0);
        let row = reader
            .query_one("SELECT walmirror.pack(t.*) FROM t", &[])
            .unwrap();
        let after: String = reader.query_one(session, &[]).unwrap().get(0);
        (before, row.get::<_, Vec<u8>>(0), after)
    });
    wait_for(DEADLINE, "the reader to wait", || {
        let waits =
            db.value("SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'comp'::regclass");
        (waits == "1").then_some(())
    });
    caster
        .batch_execute("CREATE CAST (mood AS json) WITH FUNCTION audit_json(anyelement)")
        .unwrap();
    ddl.batch_execute("ROLLBACK").unwrap();
    let (before, row, after) = reading.join().unwrap();
    assert_eq!(before, "mallory \"$user\", public 1 2:00:00");
    assert_eq!(after, before);
    // The key was made after that, as text of the value contract.
    let row = String::from_utf8_lossy(&row).into_owned();
    assert!(row.contains("1 day 02:00:00"), "{row:?}");
}

/// A function that fails leaves references behind, here to a row type, which were given back with the transaction at the earliest:
/// with a warning each, and a slower search for the next.
#[test]
fn values_that_fail_leave_no_references_behind() {
    let m = Mirror::alone("");
    m.sql(
        "CREATE TYPE part AS (x int, j json); CREATE TABLE t (id int PRIMARY KEY, p part); \
         SELECT walmirror.mirror('t', value => 'json', capture => true)",
    );
    m.sql("SELECT pg_create_logical_replication_slot('t', 'walmirror')");
    m.sql("INSERT INTO t SELECT i, ROW(i, '{\"a\":\"\\u0000\"}')::part FROM generate_series(1, 100) i");
    m.sql("SELECT walmirror.pack(t) FROM t");
    m.sql("SELECT count(*) FROM pg_logical_slot_peek_changes('t', NULL, NULL, 'format', 'json')");
    m.sql("SELECT count(p) FROM t");
    let log = m.db.pg.log();
    assert!(log.contains("untranslatable_character"), "{log}");
    assert!(!log.contains("reference leak"), "{log}");
}
