//! A column of a key, and how its values are compared with texts that stand in keys. What the owner of its type wrote is not run by that: it
//! would run as the sink.

use super::super::sql::Sql;
use crate::error::Error;
use crate::pq::quote_identifier;

/// What is tried here.
pub(super) const LOOK: &str = "cannot look at the key columns of a table";

/// With -1 the type has its name without a length: "character" would mean one character. And its operator = may be in the
/// schema of an extension, where the search path does not lead. A domain is looked through: there may be no operator for
/// it (over an enum), and its CHECK is of no concern to who only compares. Nor is a cast to text or from it that somebody wrote in
/// SQL: the row encoder takes what the type prints, and the type reads that.
const STATEMENT: &str = "WITH RECURSIVE kinds (oid) AS ( \
        SELECT atttypid FROM pg_attribute WHERE attrelid = $1::oid AND attname = $2 AND NOT attisdropped \
        UNION SELECT t.typbasetype FROM kinds k JOIN pg_type t ON t.oid = k.oid WHERE t.typtype = 'd'), \
    written (source, target) AS (SELECT a.castsource, a.casttarget FROM pg_cast a JOIN pg_proc f ON f.oid = a.castfunc \
        JOIN pg_language l ON l.oid = f.prolang WHERE l.lanname NOT IN ('internal', 'c')), \
    operator (schema) AS (SELECT p.oprnamespace FROM kinds k \
        JOIN pg_opclass c ON c.opcintype = k.oid AND c.opcdefault JOIN pg_am m ON m.oid = c.opcmethod AND m.amname = 'btree' \
        JOIN pg_amop o ON o.amopfamily = c.opcfamily AND o.amopstrategy = 3 AND o.amoplefttype = k.oid AND o.amoprighttype = k.oid \
        JOIN pg_operator p ON p.oid = o.amopopr AND p.oprname = '=' LIMIT 1) \
    SELECT format_type(b.oid, -1), (SELECT quote_ident(n.nspname) FROM operator o JOIN pg_namespace n ON n.oid = o.schema), \
        (SELECT count(*) FROM kinds) > 1, \
        EXISTS (SELECT FROM kinds k JOIN written w ON w.source = k.oid AND w.target = 'text'::regtype), \
        EXISTS (SELECT FROM written w WHERE w.source = 'text'::regtype AND w.target = b.oid), \
        t.typarray <> 0 AND t.typdelim = ',', \
        (SELECT string_agg(quote_ident(n.nspname), ', ') FROM pg_namespace n \
            WHERE (n.oid = t.typnamespace OR n.oid IN (SELECT schema FROM operator)) AND NOT has_schema_privilege(n.oid, 'USAGE')) \
    FROM kinds b JOIN pg_type t ON t.oid = b.oid WHERE t.typtype <> 'd'";

/// One of them.
pub(super) struct Column {
    /// Quoted.
    name: String,
    /// Its type, or what that is a domain over.
    kind: String,
    /// Where the operator = of that is.
    schema: String,
    is_domain: bool,
    /// Somebody wrote a cast to text, or from it, in SQL.
    has_cast_to_text: bool,
    has_cast_from_text: bool,
    /// There are arrays of the type that look like those of text.
    has_array: bool,
    /// Schemas that this role may not use, though the type or its operator is there: quoted, with commas.
    pub(super) closed: Option<String>,
}

impl Column {
    /// Looks at a column of a table. None: it is gone.
    pub(super) fn look(sql: &mut Sql, oid: &str, name: &str) -> Result<Option<Self>, Error> {
        let result = sql.query(LOOK, STATEMENT, &[Some(oid.as_bytes()), Some(name.as_bytes())])?;
        let is = |column| result.text(0, column) == Some("t");
        Ok(result.text(0, 0).map(|kind| Self {
            name: quote_identifier(name),
            kind: kind.to_owned(),
            schema: result.text(0, 1).unwrap_or("pg_catalog").to_owned(),
            is_domain: is(2),
            has_cast_to_text: is(3),
            has_cast_from_text: is(4),
            has_array: is(5),
            closed: result.text(0, 6).map(str::to_owned),
        }))
    }

    /// Its value of the table `t`, as text.
    pub(super) fn text(&self) -> String {
        let name = &self.name;
        if self.has_cast_to_text {
            format!("format('%s', t.{name})")
        } else {
            format!("t.{name}::text")
        }
    }

    /// The array of values that are looked for, and what joins them as `k.v<index>`.
    pub(super) fn join(&self, index: usize) -> (String, String) {
        let Self {
            name, kind, schema, ..
        } = self;
        let value = if self.is_domain {
            format!("t.{name}::{kind}")
        } else {
            format!("t.{name}")
        };
        let number = index + 1;
        let texts = format!("${number}::text[]");
        match (self.has_cast_from_text, self.has_array) {
            (false, _) => (texts, format!("{value} OPERATOR({schema}.=) k.v{index}::{kind}")),
            // A parameter is read as what it is said to be.
            (true, true) => (
                format!("${number}::{kind}[]"),
                format!("{value} OPERATOR({schema}.=) k.v{index}"),
            ),
            // By no index.
            (true, false) => (texts, format!("({}) COLLATE \"C\" = k.v{index}", self.text())),
        }
    }

    pub(super) fn shape(&self) -> Shape {
        Shape::of(&self.kind)
    }
}

/// What the values of a column look like, as far as that rules out readings of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    Uuid,
    Integer,
    Any,
}

impl Shape {
    pub(super) fn of(kind: &str) -> Self {
        match kind {
            "uuid" => Self::Uuid,
            "smallint" | "integer" | "bigint" => Self::Integer,
            _ => Self::Any,
        }
    }

    pub(super) fn takes(self, value: &[u8]) -> bool {
        match self {
            Self::Uuid => {
                value.len() == 36 && value.iter().all(|byte| byte.is_ascii_hexdigit() || *byte == b'-')
            }
            Self::Integer => {
                let digits = value.strip_prefix(b"-").unwrap_or(value);
                !digits.is_empty() && digits.iter().all(u8::is_ascii_digit)
            }
            Self::Any => true,
        }
    }
}
