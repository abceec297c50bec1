//! The oracle: what Redis must hold, told by Postgres alone.
//!
//! Nothing here uses the product's code: keys and values are computed from the catalog view `walmirror.mirrors` and
//! from SQL under the settings of the value contract, and then *everything* in Redis is compared with them, so that a
//! key too many is found as well as a wrong one.

use std::collections::HashSet;
use std::fmt;

use postgres::Client;
use redis::{Connection, Value};

use crate::db::{Row, rows};

/// How many differences a report spells out.
const SHOWN: usize = 8;
/// Rows read and compared at a time.
const CHUNK: usize = 2_000;

/// The result of a comparison.
#[derive(Default)]
pub struct Report {
    /// Rows that Postgres has in mirrored tables (and that have a key).
    pub rows: usize,
    /// Rows by table, in the order of the table's name.
    pub tables: Vec<(String, usize)>,
    /// Rows that a cache holds.
    pub cached: usize,
    /// How many keys are missing, too many, or different.
    pub differences: usize,
    /// The first of them.
    pub shown: Vec<String>,
}

impl Report {
    /// Whether Redis is what it should be.
    pub fn equal(&self) -> bool {
        self.differences == 0
    }

    fn differ(&mut self, what: String) {
        self.differences += 1;
        if self.shown.len() < SHOWN {
            self.shown.push(what);
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} differences in {} rows", self.differences, self.rows)?;
        for line in &self.shown {
            writeln!(f, "  {line}")?;
        }
        Ok(())
    }
}

/// Compares all of Redis (but the mirror's own keys) with all mirrored and cached tables. What a cache does not hold is no difference.
pub fn compare(client: &mut Client, redis: &mut Connection) -> Report {
    client
        .batch_execute(
            "SET DateStyle = 'ISO'; SET TimeZone = 'UTC'; SET bytea_output = 'hex'; SET IntervalStyle = 'postgres'; \
             SET extra_float_digits = 1; SET lc_monetary = 'C'; SET walmirror.capture = off; SET search_path = ''",
        )
        .expect("settings");
    let mut report = Report::default();
    let mut expected = HashSet::new();
    for mirror in mirrors(client) {
        let before = report.rows;
        compare_table(client, redis, &mirror, &mut report, &mut expected);
        if !mirror.cached {
            report.tables.push((mirror.table, report.rows - before));
        }
    }
    find_extra_keys(redis, &expected, &mut report);
    report
}

struct Table {
    table: String,
    key: String,
    value: String,
    ttl: bool,
    cached: bool,
    /// The columns of the value, and whether these are all columns. Virtual generated columns (Postgres 18) never are
    /// part of it: no row holds them.
    columns: Vec<String>,
    whole: bool,
}

fn mirrors(client: &mut Client) -> Vec<Table> {
    // A label without a key takes the name of the table as it is now, and its primary key.
    let query = "SELECT relation, coalesce(key, (SELECT replace(replace(relname, '{', '{{'), '}', '}}') || string_agg(':{' || attname || '}', '' ORDER BY n) \
              FROM pg_catalog.pg_class r JOIN pg_catalog.pg_index i ON indrelid = r.oid AND indisprimary, unnest(indkey::int2[]) WITH ORDINALITY k(number, n) \
              JOIN pg_catalog.pg_attribute ON attnum = number WHERE r.oid = m.relation AND attrelid = r.oid GROUP BY relname)), value, ttl IS NOT NULL, columns IS NULL AND NOT c.virtual, c.names, mode = 'cache' \
         FROM walmirror.mirrors m, LATERAL ( \
           SELECT string_agg(encode(convert_to(attname, 'UTF8'), 'hex'), ',' ORDER BY attnum) \
                    FILTER (WHERE attgenerated <> 'v' AND (m.columns IS NULL OR attname::text = ANY (m.columns))) AS names, \
                  coalesce(bool_or(attgenerated = 'v'), false) AS virtual \
             FROM pg_catalog.pg_attribute \
            WHERE attrelid = m.relation AND attnum > 0 AND NOT attisdropped) c \
         ORDER BY relation::text";
    let parse = |row: Row| {
        let text = |i: usize| row[i].clone().unwrap_or_default();
        Table {
            table: text(0),
            key: text(1),
            value: text(2),
            ttl: text(3) == "t",
            columns: text(5).split(',').filter(|n| !n.is_empty()).map(unhex).collect(),
            whole: text(4) == "t",
            cached: text(6) == "t",
        }
    };
    rows(client, query).into_iter().map(parse).collect()
}

/// What one row should look like in Redis.
enum Expected {
    Hash(Vec<(String, String)>),
    Text(String),
    Absent,
}

fn compare_table(
    client: &mut Client,
    redis: &mut Connection,
    table: &Table,
    report: &mut Report,
    expected: &mut HashSet<Vec<u8>>,
) {
    let template = parse_template(&table.key);
    let placeholders: Vec<&str> = template.iter().filter_map(Part::column).collect();
    let mut select: Vec<String> = placeholders
        .iter()
        .map(|c| format!("t.{}::text", quote(c)))
        .collect();
    if table.value == "json" {
        let columns: Vec<String> = table.columns.iter().map(|c| format!("t.{}", quote(c))).collect();
        select.push(if table.whole {
            "to_jsonb(t)::text".to_owned()
        } else {
            format!(
                "(SELECT to_jsonb(s)::text FROM (SELECT {}) s)",
                columns.join(", ")
            )
        });
    } else {
        select.extend(table.columns.iter().map(|c| format!("t.{}::text", quote(c))));
    }
    let query = format!("SELECT {} FROM {} t", select.join(", "), table.table);
    client
        .batch_execute(&format!("BEGIN; DECLARE c NO SCROLL CURSOR FOR {query}"))
        .expect("cursor");
    loop {
        let chunk = rows(client, &format!("FETCH {CHUNK} FROM c"));
        if chunk.is_empty() {
            break;
        }
        let wanted: Vec<(Vec<u8>, Expected)> = chunk
            .into_iter()
            .filter_map(|row| row_in_redis(table, &template, placeholders.len(), row))
            .collect();
        if !table.cached {
            report.rows += wanted.len();
        }
        compare_rows(redis, table, &wanted, report);
        for (key, value) in wanted {
            if !matches!(value, Expected::Absent) && !expected.insert(key.clone()) {
                report.differ(format!("two rows have the key {}", show(&key)));
            }
        }
    }
    client.batch_execute("COMMIT").expect("commit");
}

/// The key and the value of a row; none when a column of the key is NULL.
fn row_in_redis(table: &Table, template: &[Part], keys: usize, mut row: Row) -> Option<(Vec<u8>, Expected)> {
    let values = row.split_off(keys);
    let mut key = String::new();
    let mut next = row.into_iter();
    for part in template {
        match part {
            Part::Text(text) => key.push_str(text),
            Part::Column(_) => {
                let value = next.next().flatten()?;
                if keys > 1 {
                    key.push_str(&value.replace('%', "%25").replace(':', "%3A"));
                } else {
                    key.push_str(&value);
                }
            }
        }
    }
    let value = if table.value == "hash" {
        let fields = table.columns.iter().zip(values);
        let mut fields: Vec<_> = fields
            .filter_map(|(name, value)| Some((name.clone(), value?)))
            .collect();
        fields.sort();
        // Redis has no empty hash.
        if fields.is_empty() {
            Expected::Absent
        } else {
            Expected::Hash(fields)
        }
    } else {
        values
            .into_iter()
            .next()
            .flatten()
            .map_or(Expected::Absent, Expected::Text)
    };
    Some((key.into_bytes(), value))
}

fn compare_rows(redis: &mut Connection, table: &Table, rows: &[(Vec<u8>, Expected)], report: &mut Report) {
    let mut pipe = redis::pipe();
    for (key, value) in rows {
        match value {
            Expected::Hash(_) => pipe.cmd("HGETALL").arg(key),
            Expected::Text(_) => pipe.cmd("GET").arg(key),
            Expected::Absent => pipe.cmd("TYPE").arg(key),
        };
        pipe.cmd("PTTL").arg(key);
    }
    pipe.ignore_errors();
    let replies: Vec<redis::RedisResult<Value>> = pipe.query(redis).expect("read the keys");
    for ((key, value), reply) in rows.iter().zip(replies.chunks(2)) {
        let [got, ttl] = reply else {
            unreachable!("two replies a key")
        };
        let problem = match got {
            Ok(got) => value_problem(value, got),
            Err(e) => Some(e.to_string()),
        };
        let is_absent = matches!(ttl, Ok(Value::Int(-2)));
        if table.cached {
            if is_absent {
                continue;
            }
            report.cached += 1;
        }
        let expires = matches!(ttl, Ok(Value::Int(ms)) if *ms >= 0);
        if let Some(problem) = problem {
            report.differ(format!("{} {}: {problem}", table.table, show(key)));
        } else if !matches!(value, Expected::Absent) && expires != table.ttl {
            report.differ(format!(
                "{} {}: expires is {expires}, should be {}",
                table.table,
                show(key),
                table.ttl
            ));
        }
    }
}

fn value_problem(expected: &Expected, got: &Value) -> Option<String> {
    match (expected, got) {
        (Expected::Absent, Value::SimpleString(kind)) if kind == "none" => None,
        (Expected::Absent, other) => Some(format!("should be absent, is {other:?}")),
        (Expected::Text(text), Value::BulkString(bytes)) if bytes == text.as_bytes() => None,
        (Expected::Text(text), Value::BulkString(bytes)) => Some(format!(
            "Postgres {} Redis {}",
            show(text.as_bytes()),
            show(bytes)
        )),
        (Expected::Text(_), Value::Nil) => Some("missing".to_owned()),
        (Expected::Hash(fields), got) => {
            let mut pairs: Vec<(String, String)> = match redis::from_redis_value_ref(got) {
                Ok(pairs) => pairs,
                Err(e) => return Some(e.to_string()),
            };
            pairs.sort();
            hash_problem(fields, &pairs)
        }
        (_, other) => Some(format!("unexpected {other:?}")),
    }
}

fn hash_problem(expected: &[(String, String)], got: &[(String, String)]) -> Option<String> {
    if expected == got {
        return None;
    }
    if got.is_empty() {
        return Some("missing".to_owned());
    }
    let only = |a: &[(String, String)], b: &[(String, String)]| {
        let only: Vec<String> = a
            .iter()
            .filter(|pair| !b.contains(pair))
            .take(4)
            .map(|(name, value)| format!("{name}={}", show(value.as_bytes())))
            .collect();
        only.join(" ")
    };
    Some(format!(
        "Postgres [{}] Redis [{}]",
        only(expected, got),
        only(got, expected)
    ))
}

fn find_extra_keys(redis: &mut Connection, expected: &HashSet<Vec<u8>>, report: &mut Report) {
    let mut cursor = 0u64;
    loop {
        let (next, keys): (u64, Vec<Vec<u8>>) = redis::cmd("SCAN")
            .arg(cursor)
            .arg("COUNT")
            .arg(5_000)
            .query(redis)
            .expect("scan");
        for key in keys {
            if !key.starts_with(b"walmirror:{") && !expected.contains(&key) {
                report.differ(format!("no row has the key {}", show(&key)));
            }
        }
        cursor = next;
        if cursor == 0 {
            return;
        }
    }
}

#[derive(Debug)]
enum Part {
    Text(String),
    Column(String),
}

impl Part {
    fn column(&self) -> Option<&str> {
        match self {
            Part::Column(name) => Some(name),
            Part::Text(_) => None,
        }
    }
}

/// `user:{id}` with `{{` and `}}` for literal braces.
fn parse_template(template: &str) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut text = String::new();
    let mut chars = template.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '{' | '}' if chars.peek() == Some(&c) => {
                chars.next();
                text.push(c);
            }
            '{' => {
                parts.push(Part::Text(std::mem::take(&mut text)));
                parts.push(Part::Column(chars.by_ref().take_while(|&c| c != '}').collect()));
            }
            c => text.push(c),
        }
    }
    parts.push(Part::Text(text));
    parts
}

fn quote(identifier: &str) -> String {
    format!("\"{}\"", identifier.replace('"', "\"\""))
}

fn unhex(hex: &str) -> String {
    let bytes = (0..hex.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap())
        .collect();
    String::from_utf8(bytes).unwrap()
}

/// A value, cut to a readable length.
fn show(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut short: String = text.chars().take(120).collect();
    if short.len() < text.len() {
        short.push_str(&format!("… ({} bytes)", bytes.len()));
    }
    format!("{short:?}")
}
