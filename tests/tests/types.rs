//! Values of every built-in type family: what Redis holds is `column::text` and `to_jsonb(row)`, to the byte.
//!
//! The server's own output settings are set to be wrong for the contract (see the harness), so that nothing is right
//! by accident. Each value passes both ways: by backfill, and by the stream.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use walmirror_tests::{Db, Mirror, Pg};

/// A type and expressions for its values.
type Family = (&'static str, &'static [&'static str]);

const FAMILIES: &[Family] = &[
    ("smallint", &["0", "-32768", "32767", "NULL"]),
    ("integer", &["0", "-2147483648", "2147483647", "-1"]),
    (
        "bigint",
        &["0", "-9223372036854775808", "9223372036854775807", "10000000000"],
    ),
    (
        "numeric",
        &[
            "0",
            "0.00",
            "-0.5",
            "1.10",
            "'NaN'",
            "'Infinity'",
            "'-Infinity'",
            "'1e-1000'",
            "'123e500'",
            "999999999999999999",
            "9999999999999999999",
            "-999999999999999999.999999999999999999",
            "922337203685477580.7",
            "'9223372036854775808'",
            "'0.000000000000000001'",
            "'1e18'",
            "'1e-16383'",
            "100",
            "-1000000000000000000",
            "'-9223372036854775808'",
            "12345.678900",
        ],
    ),
    ("numeric(10,2)", &["0", "12345678.90", "-0.01", "'NaN'"]),
    (
        "real",
        &[
            "0",
            "'-0'",
            "'NaN'",
            "'Infinity'",
            "'-Infinity'",
            "0.1",
            "'1e-45'",
            "'3.4028235e38'",
            "1e10",
            "1e15",
            "1e-4",
            "1e-5",
            "16777216",
            "123456.789",
            "1e6",
            "1234567",
            "-2.5e-10",
        ],
    ),
    (
        "double precision",
        &[
            "0",
            "'-0'",
            "'NaN'",
            "'Infinity'",
            "'-Infinity'",
            "0.1",
            "'5e-324'",
            "'1.7976931348623157e308'",
            "1e15",
            "1e16",
            "123456789012345678",
            "1e-4",
            "1e-5",
            "0.30000000000000004",
            "1e300",
            "-1.5e-7",
            "1e14",
            "100",
            "1e21",
            "1e22",
        ],
    ),
    ("money", &["0", "-1.05", "'92233720368547758.07'", "'1234567.89'"]),
    ("boolean", &["true", "false"]),
    ("char(8)", &["''", "'abc'", "'  x  '", "'ünï'"]),
    ("\"char\"", &["'a'", "''", "'\\377'"]),
    ("varchar(100)", &["''", "'x '", "repeat('é', 100)"]),
    (
        "text",
        &[
            "''",
            "'plain'",
            "E'line\\nbreak\\ttab\\rreturn\\b\\f'",
            "'quote \" back \\ slash / '",
            "'\u{1F600} 漢字 ñ \u{202E}'",
            "chr(1) || chr(31) || chr(127) || chr(128) || chr(8232)",
            "repeat('long ', 50000)",
            "'<b>&amp;''</b>'",
            "'\\u0041'",
        ],
    ),
    ("name", &["'n'", "'a name with \"quotes\"'"]),
    (
        "bytea",
        &[
            "''",
            "'\\x00ff80'",
            "decode(repeat('deadbeef', 5000), 'hex')",
            "'\\x5c275c'",
        ],
    ),
    (
        "date",
        &[
            "'2026-01-31'",
            "'infinity'",
            "'-infinity'",
            "'0044-03-15 BC'",
            "'4713-01-01 BC'",
            "'5874897-12-31'",
            "'1999-12-31'",
            "'0001-01-01'",
            "'0001-12-31 BC'",
            "'2000-02-29'",
            "'10000-01-01'",
        ],
    ),
    (
        "time",
        &[
            "'00:00'",
            "'24:00:00'",
            "'12:34:56.789012'",
            "'23:59:59.999999'",
            "'01:02:03.1'",
        ],
    ),
    (
        "timetz",
        &[
            "'00:00+00'",
            "'12:34:56.5-15:59:59'",
            "'01:00+05:45'",
            "'24:00-08'",
        ],
    ),
    (
        "timestamp",
        &[
            "'2026-01-31 12:34:56.123456'",
            "'2026-01-31'",
            "'infinity'",
            "'-infinity'",
            "'4713-01-01 00:00:00 BC'",
            "'294276-12-31 23:59:59.999999'",
            "'0001-01-01'",
            "'0001-12-31 23:59:59.5 BC'",
            "'1999-12-31 23:59:59.9'",
            "'2000-01-01'",
            "'1970-01-01 00:00:00.000001'",
            "'10000-01-01 00:00:00'",
        ],
    ),
    (
        "timestamptz",
        &[
            "'2026-01-31 12:34:56.123456+05:45'",
            "'infinity'",
            "'-infinity'",
            "'4713-01-01 00:00:00+00 BC'",
            "'294276-12-31 23:59:59.999999+00'",
            "'1999-12-31 23:59:59.9+00'",
            "'2026-06-15 12:00:00+00'",
            "'0001-12-31 23:59:59.5+00 BC'",
            "'0099-05-05 00:00+00'",
        ],
    ),
    ("timestamp(0)", &["'2026-01-31 12:34:56.5'"]),
    (
        "interval",
        &[
            "'0'",
            "'1 year 2 mons -3 days 04:05:06.789'",
            "'-1 day +00:00:01'",
            "'178000000 years'",
            "'@ 1 month ago'",
            "'-00:00:00.000001'",
            "'1000000:00:00'",
        ],
    ),
    (
        "uuid",
        &[
            "'00000000-0000-0000-0000-000000000000'",
            "'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'",
        ],
    ),
    (
        "json",
        &[
            "'{\"b\": 1,   \"a\": [1, 2.50, null], \"a\": \"dup\"}'",
            "'\"str\\u00e9\"'",
            "'null'",
            "' [ ] '",
        ],
    ),
    (
        "jsonb",
        &[
            "'{\"b\": 1, \"a\": [1, 2.50, null, 1e3], \"aa\": {\"x\": \"\\\"\\\\\\n\"}}'",
            "'null'",
            "'[]'",
            "'\"\\u00e9\\u0001\"'",
            "'12345678901234567890.10'",
        ],
    ),
    ("jsonpath", &["'$.a[*] ? (@ > 1)'"]),
    (
        "integer[]",
        &["'{}'", "'{1,2,NULL}'", "'{{1,2},{3,4}}'", "'[2:3]={7,8}'"],
    ),
    (
        "text[]",
        &[
            "'{}'",
            "ARRAY['a', NULL, 'NULL', '', '\"', '\\', '{', ', ', 'é']",
            "ARRAY[['a','b'],['c','d']]",
        ],
    ),
    ("numeric[]", &["'{NaN,1.10,-0.00,NULL,Infinity}'"]),
    ("boolean[]", &["'{t,f,NULL}'"]),
    ("double precision[]", &["'{NaN,0.1,-0,1e300}'"]),
    (
        "timestamptz[]",
        &["ARRAY['2026-01-31 12:00+02'::timestamptz, 'infinity', NULL]"],
    ),
    ("bytea[]", &["ARRAY['\\x00ff'::bytea, '']"]),
    ("jsonb[]", &["ARRAY['{\"a\": 1}'::jsonb, 'null', NULL]"]),
    ("uuid[]", &["ARRAY['A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'::uuid]"]),
    ("interval[]", &["ARRAY['1 year 2 days'::interval, '-00:01']"]),
    ("date[]", &["ARRAY['2026-01-31'::date, '-infinity']"]),
    ("mood", &["'sad'", "'it''s \"ok\"'"]),
    ("mood[]", &["ARRAY['sad', NULL]::mood[]"]),
    (
        "pair",
        &["ROW(1, 'x')", "ROW(NULL, 'a \"q\" , (b)')", "ROW(2, NULL)"],
    ),
    ("pair[]", &["ARRAY[ROW(1, 'x')::pair, NULL]"]),
    ("nested", &["ROW(ROW(1, 'x'), '2026-01-31 12:00+00', '{1,2}')"]),
    ("positive", &["1", "2147483647"]),
    ("stamp", &["'2026-01-31 12:00+05'"]),
    ("shortdoc", &["'{\"a\": 1}'"]),
    ("int4range", &["'empty'", "'[1,10)'", "'(,5]'", "'[7,)'"]),
    ("numrange", &["'(1.10,2.20]'"]),
    (
        "tstzrange",
        &["'[2026-01-01 00:00+00,infinity]'", "'(,2026-01-01 12:00+05:45)'"],
    ),
    ("daterange", &["'[2026-01-01,2026-02-01)'"]),
    ("int8multirange", &["'{}'", "'{[1,3),[5,)}'"]),
    ("tsmultirange", &["'{[2026-01-01,2026-02-01)}'"]),
    (
        "inet",
        &["'10.0.0.1'", "'10.0.0.0/8'", "'::1'", "'2001:db8::/32'"],
    ),
    ("cidr", &["'10.0.0.0/8'", "'2001:db8::/32'", "'10.1.2.3/32'"]),
    ("macaddr", &["'08:00:2b:01:02:03'"]),
    ("macaddr8", &["'08:00:2b:01:02:03:04:05'"]),
    ("bit(5)", &["B'10101'"]),
    ("varbit", &["B''", "B'1'", "B'101010101010101'"]),
    ("point", &["'(1.5,-0)'", "'(NaN,Infinity)'"]),
    ("line", &["'{1,-1,0.1}'"]),
    ("lseg", &["'[(0,0),(1.1,2)]'"]),
    ("box", &["'(2,2),(0,0)'"]),
    ("path", &["'((0,0),(1,1))'", "'[(0,0),(1,1)]'"]),
    ("polygon", &["'((0,0),(1,1),(1,0))'"]),
    ("circle", &["'<(1,2),3.5>'"]),
    ("tsvector", &["'a:1A fat:2B,4C cat:5D'", "''"]),
    ("tsquery", &["'fat & (rat:*A | !cat)'"]),
    ("oid", &["0", "4294967295"]),
    ("regclass", &["'pg_class'", "'\"Weird Name\"'", "0"]),
    ("regtype", &["'int'", "'pair'"]),
    // Names and amounts inside of other types.
    ("classes[]", &["ARRAY['{pair,\"\\\"Weird Name\\\"\"}'::classes]"]),
    ("classrange", &["classrange('pair', 'pair', '[]')"]),
    (
        "classmultirange",
        &["classmultirange(classrange('pair', 'pair', '[]'))"],
    ),
    (
        "classranges[]",
        &["ARRAY[ARRAY[classrange('pair', NULL)]::classranges]"],
    ),
    ("moneyrange", &["'[1.5,1234567.89)'"]),
    ("regproc", &["'now'"]),
    ("regrole", &["'postgres'"]),
    ("xid8", &["'18446744073709551615'"]),
    ("xid", &["'4294967295'"]),
    ("tid", &["'(1,2)'"]),
    ("pg_lsn", &["'16/B374D848'"]),
    ("pg_snapshot", &["'10:20:10,14'"]),
];

/// Types that a server may lack: what makes them, and their values.
const OPTIONAL: &[(&str, Family)] = &[
    // From Postgres 15 on.
    (
        "SELECT 0::numeric(5,-3)",
        ("numeric(5,-3)", &["12345678", "499", "-1500"]),
    ),
    (
        "SELECT 0::numeric(3,5)",
        ("numeric(3,5)", &["0.00123", "-0.00001"]),
    ),
    (
        "SELECT '<a/>'::xml",
        ("xml", &["'<a b=\"c\">é &amp;</a>'", "'text <b/>'"]),
    ),
    (
        "CREATE EXTENSION hstore",
        ("hstore", &["'a=>1, \"b c\"=>NULL, \"q\\\"\"=>\"\"'", "''"]),
    ),
    ("SELECT 'a=>1'::hstore", ("hstore[]", &["ARRAY['a=>1'::hstore]"])),
    (
        "CREATE EXTENSION citext",
        ("citext", &["'MiXed'", "''", "'É \"'"]),
    ),
    ("CREATE EXTENSION ltree", ("ltree", &["'Top.Science'"])),
    ("CREATE EXTENSION cube", ("cube", &["'(1,2),(3,4.5)'"])),
    ("CREATE EXTENSION vector", ("vector(3)", &["'[1,2.5,-3e-7]'"])),
];

const SETUP: &str = "CREATE TYPE mood AS ENUM ('sad', 'it''s \"ok\"'); CREATE TYPE pair AS (n int, \"Text \"\"x\" text); \
     CREATE TYPE nested AS (p pair, at timestamptz, ns int[]); CREATE DOMAIN positive AS int CHECK (VALUE > 0); \
     CREATE DOMAIN stamp AS timestamptz; CREATE DOMAIN shortdoc AS jsonb; CREATE TABLE \"Weird Name\" (); \
     CREATE DOMAIN classes AS regclass[]; CREATE TYPE classrange AS RANGE (SUBTYPE = regclass, SUBTYPE_OPCLASS = oid_ops); \
     CREATE DOMAIN classranges AS classrange[]; CREATE TYPE moneyrange AS RANGE (SUBTYPE = money)";

fn families(db: &Db) -> Vec<Family> {
    let mut all = FAMILIES.to_vec();
    for (probe, family) in OPTIONAL {
        if db.connect().batch_execute(probe).is_ok() {
            all.push(*family);
        } else {
            println!("not on this server: {}", family.0);
        }
    }
    all
}

#[test]
fn every_family_as_hash_json_and_string() {
    let m = Mirror::new();
    m.sql(SETUP);
    let families = families(&m.db);
    let most = families.iter().map(|f| f.1.len()).max().unwrap();
    let columns: Vec<String> = families
        .iter()
        .enumerate()
        .map(|(i, f)| format!("c{i} {}", f.0))
        .collect();
    let row = |n: usize| {
        let values: Vec<&str> = families
            .iter()
            .map(|f| f.1.get(n).copied().unwrap_or("NULL"))
            .collect();
        values.join(", ")
    };
    m.sql(&format!(
        "CREATE TABLE h (id int PRIMARY KEY, {0}); CREATE TABLE j (id int PRIMARY KEY, {0}); \
         SELECT walmirror.mirror('h'), walmirror.mirror('j', value => 'json')",
        columns.join(", ")
    ));
    for (i, (kind, _)) in families.iter().enumerate() {
        m.sql(&format!(
            "CREATE TABLE s{i} (id int PRIMARY KEY, v {kind}); \
             SELECT walmirror.mirror('s{i}', value => 'string', columns => '{{v}}')"
        ));
    }
    let insert = |from: usize| {
        for n in 0..most {
            for table in ["h", "j"] {
                m.sql(&format!("INSERT INTO {table} VALUES ({}, {})", from + n, row(n)));
            }
        }
        for (i, (_, values)) in families.iter().enumerate() {
            let rows: Vec<String> = values
                .iter()
                .enumerate()
                .map(|(n, v)| format!("({}, {v})", from + n))
                .collect();
            m.sql(&format!("INSERT INTO s{i} VALUES {}", rows.join(", ")));
        }
    };
    insert(0);
    m.start();
    m.settle();
    insert(1000);
    m.check();
    m.sql("UPDATE h SET id = id + 5000 WHERE id < 1000; UPDATE j SET id = id + 5000 WHERE id < 1000");
    m.settle();
    // Every value becomes NULL.
    let nulls: Vec<String> = (0..families.len()).map(|i| format!("c{i} = NULL")).collect();
    m.sql(&format!("UPDATE h SET {0}; UPDATE j SET {0}", nulls.join(", ")));
    m.check();
}

/// The database has an encoding of its own; Redis has UTF-8.
#[test]
fn latin1_arrives_as_utf8() {
    let m = Mirror::of(Db::create_with(Pg::shared(), "ENCODING 'LATIN1' LOCALE 'C'"));
    m.sql(
        "CREATE TYPE maß AS ENUM ('klein', 'groß'); \
         CREATE TABLE größe (schlüssel text PRIMARY KEY, länge maß, text varchar, feld text[], dok jsonb, c char(4)); \
         SELECT walmirror.mirror('größe', key => 'grö:{schlüssel}'); \
         CREATE TABLE j (LIKE größe INCLUDING ALL); SELECT walmirror.mirror('j', value => 'json'); \
         INSERT INTO größe VALUES ('ä', 'groß', 'ÿ£¥', ARRAY['é', 'ß'], '{\"ö\": \"ü\"}', 'ñ')",
    );
    m.sql("INSERT INTO j SELECT * FROM größe");
    m.start();
    m.settle();
    m.sql("INSERT INTO größe VALUES ('àé', 'groß', repeat('é', 9000), NULL, NULL, 'x'), ('plain', 'klein', '', NULL, NULL, '')");
    m.sql("INSERT INTO j SELECT * FROM größe ON CONFLICT DO NOTHING; UPDATE größe SET schlüssel = 'ü' WHERE schlüssel = 'ä'");
    m.settle();
    assert_eq!(m.redis.hash("grö:ü")[0], ("c".into(), "ñ".into()));
    m.sql("DELETE FROM größe WHERE schlüssel = 'àé'; UPDATE größe SET länge = 'groß'");
    m.check();
}
