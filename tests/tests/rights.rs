//! What the sink's role may not do on Postgres: it is told with the GRANT that helps, and holds up nothing else.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use walmirror_tests::{DEADLINE, Mirror, Sink, wait_for};

/// The others are filled and followed meanwhile, and it follows when it can be read.
#[test]
fn a_table_that_may_not_be_read_holds_up_no_other() {
    let m = Mirror::new();
    let role = format!("{}_sink", m.db.name);
    m.sql(&format!(
        "CREATE TABLE secret (id int PRIMARY KEY, v text); CREATE TABLE z (id int PRIMARY KEY, v text); \
         INSERT INTO secret VALUES (1, 'x'); INSERT INTO z VALUES (1, 'x'); \
         SELECT walmirror.mirror('secret'), walmirror.mirror('z'); \
         CREATE ROLE {role} LOGIN REPLICATION; GRANT SELECT ON z TO {role}"
    ));
    let conninfo = m.conninfo_as(&role);
    m.start_at(&conninfo, &m.redis.url(), &[], &[]);
    let log = || m.sink(|sink| sink.output());
    let next = format!("GRANT SELECT ON public.secret TO {role};");
    wait_for(DEADLINE, "an ERROR line with the grant", || {
        m.sink(Sink::assert_running);
        log().contains(&next).then_some(())
    });
    m.sql("INSERT INTO z VALUES (2, 'y'); INSERT INTO secret VALUES (2, 'y')");
    wait_for(DEADLINE, "the other table", || {
        (m.redis.keys() == ["secret:2", "z:1", "z:2"]).then_some(())
    });
    assert_eq!(log().matches("streaming slot=").count(), 1, "{}", log());
    m.sql(&format!("GRANT SELECT ON secret TO {role}"));
    m.settle();
    assert_eq!(log().matches("streaming slot=").count(), 1, "{}", log());
    m.sql(&format!("REVOKE ALL ON secret, z FROM {role}"));
}

/// The story: rows could be read, and their keys could not be looked for; the right that was said to be missing was another one, and `doctor`
/// found none.
#[test]
fn a_key_type_that_may_not_be_used_is_told_with_its_schema() {
    let m = Mirror::new();
    let role = format!("{}_sink", m.db.name);
    m.sql(&format!(
        "CREATE SCHEMA types; CREATE TYPE types.mood AS ENUM ('sad', 'happy'); CREATE DOMAIN any_mood AS types.mood; \
         CREATE TABLE t (k any_mood PRIMARY KEY, n int); CREATE TABLE z (id int PRIMARY KEY, mood types.mood); \
         INSERT INTO t VALUES ('sad', 1); INSERT INTO z VALUES (1, 'sad'); SELECT walmirror.mirror('t'), walmirror.mirror('z'); \
         CREATE ROLE {role} LOGIN REPLICATION; GRANT SELECT ON t, z TO {role}"
    ));
    for key in ["t:happy", "z:2"] {
        let _: String = m.redis.command(&format!("SET {key} junk"));
    }
    let conninfo = m.conninfo_as(&role);
    m.start_at(&conninfo, &m.redis.url(), &[], &[]);
    m.complete(1);
    let grant = format!("GRANT USAGE ON SCHEMA types TO {role};");
    let log = || m.sink(|sink| sink.output());
    wait_for(DEADLINE, "an ERROR line with the grant", || {
        log().contains(&grant).then_some(())
    });
    let doctor = || m.run_as(&role, &["doctor"]).1;
    let said = doctor();
    assert!(
        said.contains(&grant) && !said.contains("ON SCHEMA public"),
        "{said}"
    );
    m.sql(&grant);
    m.complete(2);
    m.settle();
    assert!(!doctor().contains("ON SCHEMA"), "{}", doctor());
    assert_eq!(log().matches("streaming slot=").count(), 1, "{}", log());
    m.sql(&format!("DROP OWNED BY {role}"));
}

/// The story: docs/operations.md advises to take the right from everybody; who forgot to give it to the sink was told to grant SELECT.
#[test]
fn a_sink_that_may_write_no_messages_is_told_so() {
    let m = Mirror::new();
    let role = format!("{}_sink", m.db.name);
    m.sql(&format!(
        "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1); SELECT walmirror.mirror('t'); \
         CREATE ROLE {role} LOGIN REPLICATION; GRANT SELECT ON t TO {role}; \
         DO $$ DECLARE f regprocedure; BEGIN FOR f IN SELECT oid FROM pg_proc WHERE proname = 'pg_logical_emit_message' LOOP \
            EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', f); END LOOP; END $$"
    ));
    let grant = |output: &str| {
        let next = output
            .lines()
            .find_map(|line| Some(line.split_once("next: DO ")?.1.to_owned()));
        format!(
            "DO {}",
            next.unwrap_or_else(|| panic!("no such command in {output}"))
        )
    };
    let (code, output) = m.run_as(&role, &["doctor"]);
    assert_eq!(code, Some(3), "{output}");
    let command = grant(&output);
    let (code, output) = m.run_as(&role, &["run"]);
    assert_eq!(code, Some(3), "{output}");
    assert_eq!(grant(&output), command);
    m.sql(&command);
    m.start_at(&m.conninfo_as(&role), &m.redis.url(), &[], &[]);
    m.settle();
    m.sql(&format!("DROP OWNED BY {role}"));
}
