//! Stored values that are damaged: their rows are left out and noted, and the rest is mirrored.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use walmirror_tests::{DEADLINE, Mirror, Signal, Sink, wait_for};

/// The chunks of this stored value of a table are gone, as after a fault of a disk.
fn damage(m: &Mirror, table: &str, value: u32) {
    let toast = m.db.value(&format!(
        "SELECT reltoastrelid::regclass FROM pg_class WHERE relname = '{table}'"
    ));
    let chunk = format!("(SELECT chunk_id FROM {toast} GROUP BY 1 ORDER BY 1 OFFSET {value} LIMIT 1)");
    let kind = |kind: &str| format!("UPDATE pg_class SET relkind = '{kind}' WHERE oid = '{toast}'::regclass");
    m.sql(&format!(
        "{}; DELETE FROM {toast} WHERE chunk_id = {chunk}; {}",
        kind("r"),
        kind("t")
    ));
    // A chunk that is deleted is read until it is gone.
    m.sql(&format!("VACUUM {table}"));
}

#[test]
fn a_damaged_row_is_left_out_and_noted_and_the_rest_is_mirrored() {
    let m = Mirror::new();
    m.sql(
        "CREATE TABLE t (id int PRIMARY KEY, v text); ALTER TABLE t ALTER v SET STORAGE EXTERNAL; \
         INSERT INTO t SELECT i, repeat('x', 5000) FROM generate_series(1, 9) i; \
         CREATE TABLE z (id int PRIMARY KEY); INSERT INTO z VALUES (1); SELECT walmirror.mirror('t'), walmirror.mirror('z')",
    );
    damage(&m, "t", 4);
    let _: String = m.redis.command("SET t:5 old");
    m.start();
    wait_for(DEADLINE, "the rest", || {
        m.sink(Sink::assert_running);
        (m.redis.keys().len() == 9 && m.redis.keys().contains(&"z:1".to_owned())).then_some(())
    });
    assert!(!m.redis.keys().contains(&"t:5".to_owned()));
    let log = m.sink(|sink| sink.output());
    assert!(
        log.contains("WHERE ctid = '(0,5)'") && log.contains("damaged"),
        "{log}"
    );
    assert_eq!(m.notes(), 1);
    // The story: what nobody can compare was equal to `verify`.
    let _: String = m.redis.command("SET t:5 old");
    for args in [
        ["verify", "--table", "t"].as_slice(),
        &["verify", "--sample", "5"],
    ] {
        let (code, output) = m.run(args);
        assert_eq!(code, Some(2), "{output}");
        assert!(output.contains("  unknown    t:5\n"), "{output}");
    }
    // As the sink leaves it.
    let _: i64 = m.redis.command("DEL t:5");
    let (code, output) = m.run(&["verify"]);
    assert_eq!(code, Some(0), "{output}");
    assert!(output.contains("public.t: 9 rows, 8 keys: equal"), "{output}");
}

/// Overwrites bytes of a row on the disk, from so many bytes behind a word of it on, which a compressed value follows.
fn overwrite(file: &std::path::Path, word: &str, behind: usize, bytes: &[u8]) {
    let mut data = std::fs::read(file).unwrap();
    let at = data
        .windows(word.len())
        .position(|window| window == word.as_bytes())
        .unwrap();
    let value = (at + word.len()).next_multiple_of(4) + behind;
    data[value..value + bytes.len()].copy_from_slice(bytes);
    std::fs::write(file, data).unwrap();
}

/// The story: an UPDATE takes along what it leaves alone as it is stored, and what could not be decompressed ended the stream, at each start.
#[test]
fn a_damaged_compressed_value_is_left_out_and_the_rest_is_mirrored() {
    // Where pages have checksums, these would say so first.
    let m = Mirror::alone("ignore_checksum_failure = on");
    m.sql(
        "CREATE TABLE t (id int PRIMARY KEY, n int, word text, v text); CREATE TABLE j (id int PRIMARY KEY, n int, word text, v jsonb); \
         INSERT INTO t SELECT i, 0, 'word-' || i, repeat('x', 3000) FROM generate_series(1, 3) i; \
         INSERT INTO j SELECT i, 0, 'word-' || i, to_jsonb(repeat('x', 3000)) FROM generate_series(1, 2) i; \
         SELECT walmirror.mirror('t'), walmirror.mirror('j')",
    );
    m.start();
    m.settle();
    let file = |table: &str| {
        m.db.pg
            .data()
            .join(m.db.value(&format!("SELECT pg_relation_filepath('{table}')")))
    };
    let (t, j) = (file("t"), file("j"));
    m.db.pg.stop(Signal::INT);
    // What is compressed stands behind two words of four bytes; the second says how long it is.
    overwrite(&t, "word-1", 8, &[0xff; 8]);
    overwrite(&t, "word-2", 4, &[0xff, 0xff, 0xff, 0x3f]);
    overwrite(&j, "word-1", 8, &[0xff; 8]);
    m.db.pg.resume();
    m.db.reconnect();
    m.sql("UPDATE t SET n = 1; UPDATE j SET n = 1");
    m.sync();
    assert_eq!(m.redis.keys(), ["j:2", "t:3"], "{}", m.sink(|sink| sink.output()));
    assert_eq!(m.notes(), 3);
    assert!(m.redis.hash("t:3").contains(&("n".to_owned(), "1".to_owned())));
}

/// The story: it was when the row could not be read, and ran as the sink.
#[test]
fn a_cast_to_text_that_somebody_wrote_is_no_part_of_the_key_of_a_damaged_row() {
    let m = Mirror::new();
    m.sql(
        "CREATE TYPE color AS ENUM ('r', 'g'); \
         CREATE FUNCTION color_text(color) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RAISE LOG 'the cast runs'; RETURN 'no key'; END $$; \
         CREATE CAST (color AS text) WITH FUNCTION color_text(color); \
         CREATE TABLE paint (c color PRIMARY KEY, v text); ALTER TABLE paint ALTER v SET STORAGE EXTERNAL; \
         INSERT INTO paint VALUES ('r', repeat('x', 5000)), ('g', repeat('x', 5000)); SELECT walmirror.mirror('paint')",
    );
    damage(&m, "paint", 1);
    let _: i64 = m.redis.command("HSET paint:g v old");
    let logged = m.db.pg.log().len();
    m.start();
    m.complete(1);
    let mut keys = m.redis.keys();
    keys.retain(|key| key.starts_with("paint:"));
    assert_eq!(keys, ["paint:r"]);
    let log = m.db.pg.log().split_off(logged);
    assert!(!log.contains("the cast runs"), "{log}");
}
