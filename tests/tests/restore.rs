//! Labels travel with a dump, and restores make what they rest on bit by bit.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::process::Stdio;

use walmirror_tests::{DEADLINE, Mirror, wait_for};

/// The labels travel with a dump, also one that leaves the key to the primary key, which is restored after it, and one whose table
/// has a unique constraint that is restored before its primary key, and those of partitioned tables, whose primary key is valid only
/// when each partition has its own, and one whose key and replica identity are a unique constraint that is restored after its primary key.
#[test]
fn pg_dump_carries_the_labels() {
    let m = Mirror::new();
    m.sql(
        "CREATE TABLE t (id int PRIMARY KEY, v text); SELECT walmirror.mirror('t', key => 'k:{id}', value => 'json'); INSERT INTO t VALUES (1, 'x'); \
         CREATE TABLE part (a int PRIMARY KEY, b int); CREATE TABLE whole (id int PRIMARY KEY, p part); SELECT walmirror.mirror('whole'); \
         CREATE TABLE keyless (id int PRIMARY KEY, email text UNIQUE); CREATE TABLE users (LIKE keyless INCLUDING ALL); \
         SECURITY LABEL FOR walmirror ON TABLE keyless IS '{\"mode\":\"mirror\"}'; SELECT walmirror.mirror('users'); \
         CREATE TABLE p (id int PRIMARY KEY, v text) PARTITION BY LIST (id); CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1); \
         CREATE TABLE p2 PARTITION OF p FOR VALUES IN (2) PARTITION BY LIST (id); CREATE TABLE p3 PARTITION OF p2 FOR VALUES IN (2); \
         CREATE TABLE q (id int PRIMARY KEY, v text) PARTITION BY LIST (id); CREATE TABLE q1 PARTITION OF q FOR VALUES IN (1); \
         CREATE TABLE empty (id int PRIMARY KEY) PARTITION BY LIST (id); SELECT walmirror.mirror('p'), walmirror.mirror('empty'); \
         SECURITY LABEL FOR walmirror ON TABLE q IS '{\"mode\":\"mirror\"}'; INSERT INTO p VALUES (1), (2); INSERT INTO q VALUES (1); \
         CREATE TABLE tags (id int PRIMARY KEY, tag text NOT NULL UNIQUE); ALTER TABLE tags REPLICA IDENTITY USING INDEX tags_tag_key; \
         ALTER TABLE tags CLUSTER ON tags_pkey; SELECT walmirror.mirror('tags', key => 'tags:{tag}')",
    );
    let copy = format!("{}_copy", m.db.name);
    m.sql(&format!("CREATE DATABASE {copy} TEMPLATE template0"));
    let dump = m.db.pg.program("pg_dump", &m.db.name).output().unwrap();
    assert!(dump.status.success(), "{}", String::from_utf8_lossy(&dump.stderr));
    let mut psql = m.db.pg.program("psql", &copy);
    let mut restore = psql
        .args(["-qXv", "ON_ERROR_STOP=1"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut restore.stdin.take().unwrap(), &dump.stdout).unwrap();
    assert!(restore.wait().unwrap().success());
    has_labels(&mut m.db.pg.connect(&copy));
    // Several sessions restore at once.
    let file = std::env::temp_dir().join(format!("wm-dump-{}-{copy}", std::process::id()));
    let mut dump = m.db.pg.program("pg_dump", &m.db.name);
    assert!(dump.args(["-Fc", "-f"]).arg(&file).status().unwrap().success());
    m.sql(&format!("DROP DATABASE {copy} WITH (FORCE)"));
    m.sql(&format!("CREATE DATABASE {copy} TEMPLATE template0"));
    let mut restore = m.db.pg.program("pg_restore", &copy);
    let restored = restore.args(["-ej4", "-d", &copy]).arg(&file).status();
    std::fs::remove_file(&file).unwrap();
    assert!(restored.unwrap().success());
    has_labels(&mut m.db.pg.connect(&copy));
}

fn has_labels(client: &mut postgres::Client) {
    let row = client
        .query_one(
            "SELECT relation::text, key, value FROM walmirror.mirrors WHERE relation = 't'::regclass",
            &[],
        )
        .unwrap();
    assert_eq!(
        (
            row.get::<_, &str>(0),
            row.get::<_, &str>(1),
            row.get::<_, &str>(2)
        ),
        ("t", "k:{id}", "json")
    );
    let mirrored = client
        .query_one(
            "SELECT count(*), count(*) FILTER (WHERE problem IS NULL) FROM walmirror.relations()",
            &[],
        )
        .unwrap();
    assert_eq!((mirrored.get::<_, i64>(0), mirrored.get::<_, i64>(1)), (8, 8));
}

/// A restore drops constraints and tables, and makes them anew, all in one transaction.
#[test]
fn labelled_tables_are_restored_in_place() {
    let m = Mirror::with(
        "CREATE TABLE t (id int PRIMARY KEY, v text UNIQUE); INSERT INTO t VALUES (1, 'a'); SELECT walmirror.mirror('t'); \
         CREATE TABLE u (id int PRIMARY KEY, v text NOT NULL UNIQUE); ALTER TABLE u REPLICA IDENTITY USING INDEX u_v_key; \
         INSERT INTO u VALUES (1, 'a'); SELECT walmirror.mirror('u', key => 'u:{v}')",
    );
    let file = std::env::temp_dir().join(format!("wm-dump-{}-{}", std::process::id(), m.db.name));
    let mut dump = m.db.pg.program("pg_dump", &m.db.name);
    assert!(dump.args(["-Fc", "-f"]).arg(&file).status().unwrap().success());
    m.sql("INSERT INTO t VALUES (2, 'b'); INSERT INTO u VALUES (2, 'b')");
    m.settle();
    // Without the extension: its slot is in use, and labels need it.
    let mut restore = m.db.pg.program("pg_restore", &m.db.name);
    let restored = restore
        .args([
            "--clean",
            "--single-transaction",
            "-n",
            "public",
            "-d",
            &m.db.name,
        ])
        .arg(&file)
        .status();
    std::fs::remove_file(&file).unwrap();
    assert!(restored.unwrap().success());
    m.settle();
    assert_eq!(m.redis.keys(), ["t:1", "u:a"]);
}

/// The primary key that a label leaves its key to comes as from a dump, while the stream is read: it is valid when the last partition
/// has its own, which is an ALTER INDEX.
#[test]
fn a_partitioned_table_gets_its_primary_key_bit_by_bit() {
    let m = Mirror::with("CREATE TABLE other (id int PRIMARY KEY); SELECT walmirror.mirror('other')");
    for statement in [
        "CREATE TABLE p (id int NOT NULL, v text) PARTITION BY LIST (id); CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1, 2, 3, 4)",
        "SECURITY LABEL FOR walmirror ON TABLE p IS '{\"mode\":\"mirror\"}'",
        "ALTER TABLE ONLY p ADD CONSTRAINT p_pkey PRIMARY KEY (id)",
        "ALTER TABLE ONLY p1 ADD CONSTRAINT p1_pkey PRIMARY KEY (id)",
        "INSERT INTO p VALUES (1)",
        "ALTER INDEX p_pkey ATTACH PARTITION p1_pkey",
    ] {
        m.sql(statement);
        m.sync();
    }
    m.sql("INSERT INTO p VALUES (2)");
    wait_for(DEADLINE, "the rows of p", || {
        (m.redis.keys() == ["p:1", "p:2"]).then_some(())
    });
}

/// Several sessions restore a partitioned table: its primary key may be valid before the unique constraint that is its key and replica
/// identity is. The story: what a dump has between the two was refused, and with the replica identity a partition's constraint went, which
/// is restored by the same command.
#[test]
fn a_partitioned_table_gets_its_primary_key_before_its_unique_key() {
    let m = Mirror::with("CREATE TABLE other (id int PRIMARY KEY); SELECT walmirror.mirror('other')");
    for statement in [
        "CREATE TABLE p (region int NOT NULL, id int NOT NULL, code int NOT NULL) PARTITION BY LIST (region)",
        "CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1); CREATE TABLE p2 PARTITION OF p FOR VALUES IN (2)",
        "SECURITY LABEL FOR walmirror ON TABLE p IS '{\"mode\":\"mirror\",\"key\":\"p:{region}:{code}\"}'",
        "INSERT INTO p VALUES (1, 1, 10), (2, 2, 20)",
        "ALTER TABLE ONLY p ADD CONSTRAINT p_pkey PRIMARY KEY (region, id)",
        "ALTER TABLE ONLY p ADD CONSTRAINT p_code UNIQUE (region, code)",
        "ALTER TABLE ONLY p REPLICA IDENTITY USING INDEX p_code",
        "ALTER TABLE ONLY p1 ADD CONSTRAINT p1_pkey PRIMARY KEY (region, id)",
        "ALTER TABLE ONLY p2 ADD CONSTRAINT p2_pkey PRIMARY KEY (region, id)",
        "ALTER INDEX p_pkey ATTACH PARTITION p1_pkey",
        "ALTER INDEX p_pkey ATTACH PARTITION p2_pkey",
        "ALTER TABLE ONLY p1 ADD CONSTRAINT p1_code UNIQUE (region, code); ALTER TABLE ONLY p1 REPLICA IDENTITY USING INDEX p1_code",
        "ALTER TABLE p ENABLE ROW LEVEL SECURITY; ALTER TABLE ONLY p1 DISABLE TRIGGER USER",
        "ALTER TABLE ONLY p2 ADD CONSTRAINT p2_code UNIQUE (region, code); ALTER TABLE ONLY p2 REPLICA IDENTITY USING INDEX p2_code",
        "ALTER INDEX p_code ATTACH PARTITION p1_code",
        "ALTER INDEX p_code ATTACH PARTITION p2_code",
    ] {
        m.sql(statement);
        m.sync();
    }
    m.settle();
    m.sql("INSERT INTO p VALUES (1, 3, 30); UPDATE p SET code = 11 WHERE id = 1; DELETE FROM p WHERE id = 2");
    m.check();
    assert_eq!(m.redis.keys(), ["p:1:11", "p:1:30"]);
    // Now that the label fits, nothing takes from it what it rests on.
    for identity in ["DEFAULT", "NOTHING", "USING INDEX p1_pkey"] {
        let error = m.db.error(&format!("ALTER TABLE p1 REPLICA IDENTITY {identity}"));
        assert!(
            error.message().contains("is not in the replica identity"),
            "{identity}: {error:?}"
        );
    }
    m.check();
}
