//! Captured rows at the end of the WAL.

use walmirror_tests::{DEADLINE, Mirror, Signal, wait_for};

use crate::{c_keys, keys, session, start};

/// The story: one fast stop in a hundred did not end. Where the last record was a large one, the walsender's position stayed before it although it
/// was sent, and Postgres waited for a confirmation of just that position.
#[test]
fn a_fast_stop_ends_where_a_large_row_was_captured_last() {
    let m = Mirror::alone("autovacuum = off");
    m.sql(
        "CREATE TABLE c (id int PRIMARY KEY, v text); \
         INSERT INTO c SELECT i, repeat('v', 1100) FROM generate_series(1, 61) i; SELECT walmirror.cache('c')",
    );
    start(&m);
    // Both are there when it reads on.
    let walsender = m.db.pg.freeze_process("START_REPLICATION");
    let mut s = session(&m);
    // A small record, and one of more than 64 KiB.
    for which in ["id = 1", "id > 1"] {
        s.batch_execute(&format!("SELECT * FROM c WHERE {which}"))
            .unwrap();
    }
    wait_for(DEADLINE, "both to be flushed", || {
        let is_flushed = "SELECT pg_current_wal_flush_lsn() = pg_current_wal_insert_lsn()";
        (m.db.value(is_flushed) == "t").then_some(())
    });
    drop(walsender);
    wait_for(DEADLINE, "the rows", || {
        (keys(&m) == c_keys(1..=61)).then_some(())
    });
    m.db.pg.stop(Signal::INT);
    m.db.pg.resume();
}
