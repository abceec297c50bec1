//! Every shape of SELECT captures whole rows, and only rows that the query read.

use std::collections::BTreeSet;

use walmirror_tests::Mirror;

use crate::{assert_whole_rows, c_keys, empty, keys, session, setup, start, sync};

/// Shapes whose plan may read more rows of the table than the query returns, as a hash join does.
const MORE: [&str; 4] = ["inner join", "nested loop", "self-join", "EXISTS"];

#[test]
fn every_shape_of_select_captures_whole_rows() {
    let m = Mirror::new();
    setup(&m);
    start(&m);
    let mut s = session(&m);
    s.batch_execute("SET enable_indexonlyscan = off; PREPARE by_id(int) AS SELECT name FROM c WHERE id = $1")
        .unwrap();
    let grp = |grp: i32| c_keys((1..=60).filter(move |id| id % 10 == grp));
    let cases: Vec<(&str, &str, BTreeSet<String>)> = vec![
        ("equality", "SELECT * FROM c WHERE id = 1", c_keys([1])),
        ("one column only", "SELECT name FROM c WHERE id = 2", c_keys([2])),
        (
            "no column at all",
            "SELECT 1 FROM c WHERE id = 3 AND v <> ''",
            c_keys([3]),
        ),
        ("range", "SELECT v FROM c WHERE id BETWEEN 5 AND 8", c_keys(5..=8)),
        (
            "LIKE",
            "SELECT v FROM c WHERE name LIKE 'name 4_'",
            c_keys(40..=49),
        ),
        ("IN", "SELECT v FROM c WHERE id IN (1, 9, 17)", c_keys([1, 9, 17])),
        (
            "OR",
            "SELECT v FROM c WHERE id = 4 OR name = 'name 50'",
            c_keys([4, 50]),
        ),
        (
            "function in WHERE",
            "SELECT v FROM c WHERE length(name) = 6",
            c_keys(1..=9),
        ),
        ("no WHERE", "SELECT v FROM c", c_keys(1..=60)),
        (
            "bitmap scan",
            "SET enable_seqscan = off; SET enable_indexscan = off; SELECT v FROM c WHERE grp = 7; \
            RESET enable_seqscan; RESET enable_indexscan",
            grp(7),
        ),
        (
            "inner join",
            "SELECT o.id FROM o JOIN c ON c.id = o.c_id WHERE o.id IN (11, 12)",
            c_keys([11, 12]),
        ),
        (
            "nested loop",
            "SET enable_hashjoin = off; SET enable_mergejoin = off; \
            SELECT c.v FROM o JOIN c ON c.id = o.c_id WHERE o.id = 13; RESET enable_hashjoin; RESET enable_mergejoin",
            c_keys([13]),
        ),
        (
            "outer join",
            "SELECT o.id, c.v FROM o LEFT JOIN c ON c.id = o.c_id AND c.id = 14 WHERE o.id = 14",
            c_keys([14]),
        ),
        (
            "self-join",
            "SELECT a.v FROM c a JOIN c b ON b.id = a.id + 1 WHERE a.id = 15",
            c_keys([15, 16]),
        ),
        (
            "lateral",
            "SELECT x.v FROM o, LATERAL (SELECT v FROM c WHERE c.id = o.c_id OFFSET 0) x WHERE o.id = 18",
            c_keys([18]),
        ),
        (
            "correlated subquery",
            "SELECT (SELECT v FROM c WHERE c.id = o.c_id) FROM o WHERE o.id = 19",
            c_keys([19]),
        ),
        (
            "EXISTS",
            "SELECT 1 FROM o WHERE o.id = 20 AND EXISTS (SELECT 1 FROM c WHERE c.id = o.c_id AND c.v <> '')",
            c_keys([20]),
        ),
        (
            "scalar subquery",
            "SELECT (SELECT max(v) FROM c WHERE id = 21)",
            c_keys([21]),
        ),
        (
            "CTE",
            "WITH x AS MATERIALIZED (SELECT * FROM c WHERE id = 22) SELECT name FROM x",
            c_keys([22]),
        ),
        ("view", "SELECT name FROM c_view", grp(3)),
        (
            "UNION",
            "SELECT v FROM c WHERE id = 23 UNION SELECT v FROM c WHERE id = 24",
            c_keys([23, 24]),
        ),
        (
            "window function",
            "SELECT row_number() OVER (ORDER BY v) FROM c WHERE grp = 5",
            grp(5),
        ),
        ("aggregate", "SELECT count(v) FROM c WHERE grp = 6", grp(6)),
        (
            "ORDER BY, LIMIT",
            "SET enable_seqscan = off; SELECT v FROM c ORDER BY id DESC LIMIT 2; RESET enable_seqscan",
            c_keys([59, 60]),
        ),
        ("custom plan", "EXECUTE by_id(25)", c_keys([25])),
        (
            "generic plan",
            "SET plan_cache_mode = force_generic_plan; EXECUTE by_id(26); RESET plan_cache_mode",
            c_keys([26]),
        ),
        ("SQL function", "SELECT by_sql(27)", c_keys([27])),
        ("PL/pgSQL function", "SELECT by_plpgsql(28)", c_keys([28])),
        (
            "DO block",
            "DO $$ BEGIN PERFORM v FROM c WHERE id = 29; END $$",
            c_keys([29]),
        ),
        (
            "cursor",
            "BEGIN; DECLARE cur CURSOR FOR SELECT v FROM c WHERE id BETWEEN 30 AND 33 ORDER BY id; \
            FETCH 1 FROM cur; FETCH 1 FROM cur; CLOSE cur; COMMIT",
            c_keys([30, 31]),
        ),
        (
            "TABLESAMPLE",
            "SELECT v FROM c TABLESAMPLE bernoulli (100) WHERE id = 34",
            c_keys([34]),
        ),
        (
            "tid scan",
            "SELECT v FROM c WHERE ctid = (SELECT ctid FROM c WHERE id = 35 AND v <> '')",
            c_keys([35]),
        ),
        (
            "partitions",
            "SELECT v FROM p WHERE id = 5",
            BTreeSet::from(["p:5:5".to_owned()]),
        ),
        (
            "runtime pruning",
            "SELECT v FROM p WHERE r = (SELECT 16) AND id = 16",
            BTreeSet::from(["p:16:16".to_owned()]),
        ),
        (
            "serializable",
            "BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT v FROM c WHERE id = 36; COMMIT",
            c_keys([36]),
        ),
        (
            "read only",
            "BEGIN READ ONLY; SELECT v FROM c WHERE id = 37; COMMIT",
            c_keys([37]),
        ),
    ];
    for (shape, query, expected) in cases {
        empty(&m);
        s.batch_execute(query)
            .unwrap_or_else(|error| panic!("{shape}: {error}"));
        sync(&m);
        let found = keys(&m);
        if MORE.contains(&shape) {
            let lacks: Vec<_> = expected.difference(&found).collect();
            assert!(lacks.is_empty(), "{shape}: {found:?} lacks {lacks:?}");
        } else {
            assert_eq!(found, expected, "{shape}");
        }
        assert_whole_rows(&m);
    }
}

#[test]
fn parallel_plans_capture_right_rows_or_none() {
    let m = Mirror::new();
    m.sql(
        "CREATE TABLE c (id int PRIMARY KEY, grp int, name text, v text); \
         INSERT INTO c SELECT i, i % 10, 'name ' || i, repeat('v', 100) FROM generate_series(1, 20000) i; \
         SELECT walmirror.cache('c')",
    );
    m.sql("ANALYZE c");
    start(&m);
    let mut s = session(&m);
    s.batch_execute(
        "SET max_parallel_workers_per_gather = 2; SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; \
         SET min_parallel_table_scan_size = 0; SET walmirror.capture_max_rows = 100000",
    )
    .unwrap();
    let plan: Vec<String> = s
        .query("EXPLAIN (COSTS OFF) SELECT count(v) FROM c WHERE grp = 1", &[])
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert!(
        plan.iter().any(|line| line.contains("Parallel Seq Scan")),
        "{plan:?}"
    );
    let count: i64 = s
        .query_one("SELECT count(v) FROM c WHERE grp = 1", &[])
        .unwrap()
        .get(0);
    assert_eq!(count, 2000);
    sync(&m);
    let found = keys(&m);
    assert!(
        found.is_subset(&c_keys((1..=20000).filter(|id| id % 10 == 1))),
        "{} keys",
        found.len()
    );
}

#[test]
fn a_row_that_a_filter_keeps_back_is_not_captured() {
    let m = Mirror::new();
    setup(&m);
    m.sql(
        "CREATE ROLE reader_of_some LOGIN; GRANT SELECT ON c TO reader_of_some; ALTER TABLE c ENABLE ROW LEVEL SECURITY; \
         CREATE POLICY few ON c FOR SELECT TO reader_of_some USING (grp = 1)",
    );
    start(&m);
    let mut s = session(&m);
    s.batch_execute("SET ROLE reader_of_some; SELECT v FROM c; RESET ROLE")
        .unwrap();
    sync(&m);
    assert_eq!(keys(&m), c_keys([1, 11, 21, 31, 41, 51]));
    m.sql("DROP OWNED BY reader_of_some; DROP ROLE reader_of_some");
}

/// How the session that reads has values printed is its own business.
#[test]
fn settings_of_the_session_do_not_count() {
    let m = Mirror::new();
    m.sql(
        "CREATE TYPE held AS (price money, kind regtype); \
         CREATE TABLE c (id int PRIMARY KEY, day timestamptz, price money, kind regtype, self regclass, held held, list date[]); \
         INSERT INTO c VALUES (1, '2026-11-23 12:00+00', '1234.5', 'text[]', 'c', ('-1', 'c'), '{2026-11-23}'); \
         SELECT walmirror.cache('c')",
    );
    start(&m);
    session(&m)
        .batch_execute(
            "SET DateStyle = 'German'; SET TimeZone = 'Asia/Kathmandu'; SET quote_all_identifiers = on; SET lc_monetary = 'C.utf8'; \
             SET search_path = public; SELECT * FROM c WHERE id = 1",
        )
        .unwrap();
    sync(&m);
    let found = m.redis.hash("c:1");
    let expected = [
        ("day", "2026-11-23 12:00:00+00"),
        ("held", "(-$1.00,public.c)"),
        ("id", "1"),
        ("kind", "text[]"),
        ("list", "{2026-11-23}"),
        ("price", "$1,234.50"),
        ("self", "public.c"),
    ];
    let expected: Vec<(String, String)> = expected
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    assert_eq!(found, expected);
    let (code, output) = m.run(&["verify"]);
    assert_eq!(code, Some(0), "{output}");
}

/// A set-returning function in SQL asks its query for one row at a time. Each once was a message of its own.
#[test]
fn the_rows_of_a_function_in_sql_come_together() {
    let m = Mirror::alone("");
    setup(&m);
    m.sql("CREATE FUNCTION all_of_c() RETURNS SETOF text LANGUAGE sql AS 'SELECT v FROM c'");
    start(&m);
    let mut s = session(&m);
    s.batch_execute("SELECT all_of_c() LIMIT 3").unwrap();
    sync(&m);
    assert_eq!(keys(&m), c_keys(1..=3));
    let messages = || -> i64 {
        let messages = "SELECT value FROM walmirror.capture_stats WHERE counter = 'messages_emitted'";
        m.db.value(messages).parse().unwrap()
    };
    let before = messages();
    s.batch_execute("SELECT all_of_c()").unwrap();
    let written = messages() - before;
    assert!(written < 30, "{written} messages of 60 rows");
    sync(&m);
    assert_eq!(keys(&m), c_keys(1..=60));
    // Read slowly, they do not wait for each other.
    empty(&m);
    let before = messages();
    s.batch_execute("SELECT all_of_c(), pg_sleep(0.02) LIMIT 3")
        .unwrap();
    assert!(messages() - before >= 2);
}
