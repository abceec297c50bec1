//! The extension as an object of the database: into which schema it goes, what it is made of, and who may call what.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::sync::Arc;

use walmirror_tests::{Db, Mirror, Pg, Signal};

/// Whoever owns the schema may write functions in it that are a better match than those of the extension: superusers would run them.
#[test]
fn the_extension_is_not_put_into_somebody_elses_schema() {
    let db = Db::create(Arc::new(Pg::start("")));
    db.sql(
        "CREATE ROLE mallory; CREATE ROLE installer SUPERUSER; CREATE ROLE other SUPERUSER; \
         DROP EXTENSION walmirror; DROP SCHEMA IF EXISTS walmirror; CREATE SCHEMA walmirror AUTHORIZATION mallory",
    );
    let install = "SET ROLE installer; CREATE EXTENSION walmirror";
    let error = db.error(install);
    assert!(error.message().contains("belongs to mallory"), "{error:?}");
    let hint = error.hint().unwrap();
    assert!(
        hint.contains("DROP SCHEMA walmirror CASCADE;") && !hint.contains("ALTER SCHEMA"),
        "{error:?}"
    );
    // That of a superuser may come out of a dump.
    for owner in ["installer", "other"] {
        db.sql(&format!("RESET ROLE; ALTER SCHEMA walmirror OWNER TO {owner}"));
        db.sql(install);
        db.sql("DROP EXTENSION walmirror; RESET ROLE; CREATE SCHEMA IF NOT EXISTS walmirror");
    }
    // None of its functions is called so that another could be a better match.
    db.sql(
        "DROP SCHEMA walmirror; CREATE EXTENSION walmirror; \
         CREATE FUNCTION walmirror.default_key(regclass) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RAISE 'hijacked'; END $$; \
         CREATE FUNCTION walmirror.set_label(regclass, bytea) RETURNS void LANGUAGE plpgsql AS $$ BEGIN RAISE 'hijacked'; END $$; \
         CREATE FUNCTION walmirror.announce(tbl oid, refresh bool) RETURNS void LANGUAGE plpgsql AS $$ BEGIN RAISE 'hijacked'; END $$; \
         CREATE FUNCTION walmirror.announce(tbl regclass, keep_keys bool) RETURNS void LANGUAGE plpgsql AS $$ BEGIN RAISE 'hijacked'; END $$; \
         CREATE FUNCTION walmirror.check_label(regclass) RETURNS void LANGUAGE plpgsql AS $$ BEGIN RAISE 'hijacked'; END $$; \
         CREATE TABLE t (id int PRIMARY KEY, v text UNIQUE); SELECT walmirror.mirror('t'); ALTER TABLE t ADD w text; \
         ALTER TABLE t DROP v; ALTER TABLE t ALTER w TYPE varchar; SELECT walmirror.cache('t'); SELECT walmirror.unmirror('t', keep_keys => true)",
    );
}

/// A restore goes on when CREATE SCHEMA fails, and gives the schema that was there to its own role. Operators in it once won over those
/// of pg_catalog in the view that superusers read: whoever had made the schema became one of them.
#[test]
fn the_extension_is_not_put_into_a_schema_that_was_filled_before() {
    let db = Db::create(Arc::new(Pg::start("")));
    db.sql("CREATE ROLE mallory; DROP EXTENSION walmirror; DROP SCHEMA IF EXISTS walmirror");
    let function =
        "CREATE FUNCTION walmirror.evil(numeric, bigint) RETURNS boolean LANGUAGE sql AS 'SELECT true'";
    let install = "ALTER SCHEMA walmirror OWNER TO postgres; CREATE EXTENSION walmirror";
    for (content, told) in [
        (function.to_owned(), "function walmirror.evil(numeric,bigint)"),
        (
            format!(
                "{function}; CREATE OPERATOR walmirror.<= (LEFTARG = numeric, RIGHTARG = bigint, FUNCTION = walmirror.evil)"
            ),
            "walmirror.evil(numeric,bigint)",
        ),
        ("CREATE TABLE walmirror.t ()".to_owned(), "table walmirror.t"),
        ("CREATE TYPE walmirror.oid AS (a int)".to_owned(), "walmirror.oid"),
        (
            "CREATE COLLATION walmirror.c FROM \"C\"".to_owned(),
            "walmirror.c",
        ),
    ] {
        db.sql("RESET ROLE; DROP SCHEMA IF EXISTS walmirror CASCADE; CREATE SCHEMA walmirror AUTHORIZATION mallory; SET ROLE mallory");
        db.sql(&content);
        db.sql("RESET ROLE");
        let error = db.error(install);
        assert!(
            error.message().contains("is not empty") && error.message().contains(told),
            "{content}: {error:?}"
        );
        assert!(
            error.hint().unwrap().contains("DROP SCHEMA walmirror CASCADE;"),
            "{error:?}"
        );
    }
    // Nor into one that somebody can still fill.
    for role in ["mallory", "PUBLIC"] {
        db.sql(&format!(
            "DROP SCHEMA IF EXISTS walmirror CASCADE; CREATE SCHEMA walmirror; GRANT CREATE ON SCHEMA walmirror TO {role}"
        ));
        let error = db.error(install);
        assert!(
            error.message().contains(&format!(
                "others may create something in schema walmirror: {role}"
            )),
            "{error:?}"
        );
        let hint = error.hint().unwrap();
        db.sql(hint.split(" and try again").next().unwrap());
        db.sql(install);
        db.sql("DROP EXTENSION walmirror");
    }
    db.sql("DROP SCHEMA IF EXISTS walmirror; ALTER DEFAULT PRIVILEGES GRANT CREATE ON SCHEMAS TO mallory");
    let error = db.error("CREATE EXTENSION walmirror");
    db.sql(error.hint().unwrap().split(" and try again").next().unwrap());
    db.sql("CREATE EXTENSION walmirror");
}

/// Whatever stands in the schema by then: no name of the script is looked up in it.
#[test]
fn the_extension_is_made_of_what_is_in_pg_catalog() {
    let db = Db::create(Arc::new(Pg::start("")));
    db.sql(
        "DROP EXTENSION walmirror; CREATE TABLE paths (tag text, path text); \
         CREATE FUNCTION note() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN \
         INSERT INTO public.paths VALUES (tg_tag, pg_catalog.current_setting('search_path')); END $$; \
         CREATE EVENT TRIGGER note ON ddl_command_start WHEN TAG IN ('CREATE FUNCTION', 'CREATE VIEW') EXECUTE FUNCTION note(); \
         CREATE EXTENSION walmirror",
    );
    assert_eq!(
        db.value(
            "SELECT string_agg(DISTINCT tag || ' ' || path, '; ' ORDER BY tag || ' ' || path) FROM paths"
        ),
        "CREATE FUNCTION pg_catalog, pg_temp; CREATE VIEW pg_catalog, pg_temp"
    );
    // Bodies are looked up when they run.
    assert_eq!(
        db.value(
            "SELECT string_agg(p.proname, ', ') FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang \
             WHERE p.pronamespace = 'walmirror'::regnamespace AND l.lanname IN ('sql', 'plpgsql') \
             AND p.proconfig IS DISTINCT FROM ARRAY['search_path=pg_catalog, pg_temp']"
        ),
        ""
    );
}

/// Labels are checked in every database of a server that has the library, also where nobody made the extension: there anybody could write
/// the function that gave the key of a label without one, and it ran as whoever set the next label.
#[test]
fn a_label_is_checked_without_the_functions_of_the_extension() {
    let db = Db::create(Arc::new(Pg::start("")));
    db.sql(
        "DROP EXTENSION walmirror; DROP SCHEMA IF EXISTS walmirror; CREATE SCHEMA walmirror; CREATE TABLE bait (id int PRIMARY KEY, v text); \
         CREATE FUNCTION walmirror.default_key(oid) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RAISE 'hijacked'; END $$; \
         SECURITY LABEL FOR walmirror ON TABLE bait IS '{\"mode\":\"mirror\"}'; CREATE TABLE t (id int PRIMARY KEY)",
    );
    db.sql("SECURITY LABEL FOR walmirror ON TABLE t IS '{\"mode\":\"mirror\",\"key\":\"t:{id}\"}'");
    db.sql("SECURITY LABEL FOR walmirror ON TABLE t IS '{\"mode\":\"mirror\"}'");
    // The key that such a label means counts all the same.
    db.sql(
        "DROP SCHEMA walmirror CASCADE; CREATE EXTENSION walmirror; CREATE TABLE \"o{d}d\" (b int, a text, PRIMARY KEY (a, b) INCLUDE (c), c int); \
         SECURITY LABEL FOR walmirror ON TABLE \"o{d}d\" IS '{\"mode\":\"mirror\"}'; \
         CREATE TABLE other (a text, b int, PRIMARY KEY (a, b))",
    );
    let error = db.error("SELECT walmirror.mirror('other', key => 'o{{d}}d:{a}:{b}')");
    assert!(error.message().contains("would write the same keys"), "{error:?}");
    assert_eq!(
        db.value("SELECT walmirror.default_key('\"o{d}d\"'::regclass)"),
        "o{{d}}d:{a}:{b}"
    );
}

/// Event triggers run as the extension's owner, who once had to own each table that was altered: when they were a superuser no more, all
/// DDL of others was refused.
#[test]
fn ddl_goes_on_when_the_owner_of_the_extension_is_no_superuser_any_more() {
    let m = Mirror::on(Arc::new(Pg::start("")));
    m.sql(
        "CREATE ROLE boss SUPERUSER; CREATE ROLE app; DROP EXTENSION walmirror; DROP SCHEMA IF EXISTS walmirror; \
         SET ROLE boss; CREATE EXTENSION walmirror; RESET ROLE; CREATE SCHEMA s AUTHORIZATION app; SET ROLE app; \
         CREATE TABLE s.t (id int PRIMARY KEY, v text UNIQUE); INSERT INTO s.t VALUES (1, 'v'); SELECT walmirror.mirror('s.t'); \
         CREATE TABLE s.p (id int PRIMARY KEY) PARTITION BY LIST (id); CREATE TABLE s.p1 PARTITION OF s.p FOR VALUES IN (1); \
         SELECT walmirror.mirror('s.p'); CREATE TABLE s.gone (id int PRIMARY KEY); SELECT walmirror.mirror('s.gone'); RESET ROLE",
    );
    m.start();
    m.settle();
    m.sql("ALTER ROLE boss NOSUPERUSER");
    for statement in [
        "ALTER TABLE s.t ADD n int DEFAULT 5",
        "ALTER TABLE s.t ALTER n TYPE text",
        "ALTER TABLE s.t DROP v",
        "ALTER TABLE s.t DROP n, ADD n int DEFAULT 6",
        "BEGIN; ALTER TABLE s.t DROP CONSTRAINT t_pkey; ALTER TABLE s.t ADD PRIMARY KEY (id); COMMIT",
        "CREATE TABLE s.p2 PARTITION OF s.p FOR VALUES IN (2); INSERT INTO s.p VALUES (1), (2)",
        "ALTER TABLE s.p DETACH PARTITION s.p1",
        "DROP TABLE s.gone",
        "SELECT walmirror.unmirror('s.p'), walmirror.cache('s.t'), walmirror.mirror('s.t')",
    ] {
        println!("{statement}");
        m.sql(&format!("SET ROLE app; {statement}; RESET ROLE"));
        m.settle();
    }
    let error = m.db.error("SET ROLE app; ALTER TABLE s.t DROP CONSTRAINT t_pkey");
    assert!(error.message().contains("would break"), "{error:?}");
}

/// Anybody could once have every session look at any table anew, pg_class too, with an error in the middle of the commit on a standby; and
/// later those could whom ALTER DEFAULT PRIVILEGES lets call all functions.
#[test]
fn what_event_triggers_call_is_not_for_everybody() {
    let db = Db::create(Arc::new(Pg::start("")));
    db.sql(
        "CREATE ROLE other; ALTER DEFAULT PRIVILEGES GRANT EXECUTE ON FUNCTIONS TO other WITH GRANT OPTION; \
         DROP EXTENSION walmirror; CREATE EXTENSION walmirror; \
         CREATE TABLE t (id int PRIMARY KEY); SELECT walmirror.mirror('t'); CREATE TABLE plain (id int); \
         CREATE VIEW calls AS SELECT unnest(ARRAY['invalidate(%s)', 'check_label(%s, false)', 'check_at_commit(%s)', 'announce_ddl(%s, true)']) AS call",
    );
    let calls: Vec<String> = db
        .rows("SELECT call FROM calls")
        .into_iter()
        .map(|row| format!("SELECT walmirror.{}", row[0].clone().unwrap()))
        .collect();
    for call in &calls {
        for table in ["t", "pg_class", "plain"] {
            let call = call.replace("%s", &format!("'{table}'::regclass"));
            let error = db.error(&format!("SET ROLE other; {call}"));
            assert_eq!(error.code().code(), "42501", "{call}: {error:?}");
            db.sql(&format!("RESET ROLE; {call}"));
        }
        let call = call.replace("%s", "'t'::regclass");
        let error = db.error(&format!("BEGIN READ ONLY; {call}"));
        assert!(
            error.message().contains("in a read-only transaction"),
            "{call}: {error:?}"
        );
    }
    std::fs::write(db.pg.data().join("standby.signal"), "").unwrap();
    db.pg.restart(Signal::INT);
    db.reconnect();
    for call in calls
        .iter()
        .map(String::as_str)
        .chain(["SELECT walmirror.announce(%s)"])
    {
        let call = call.replace("%s", "'t'::regclass");
        let error = db.error(&call);
        assert!(error.message().contains("during recovery"), "{call}: {error:?}");
    }
}
