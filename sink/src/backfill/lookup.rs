//! Reads rows by their keys: which keys of a page have a row (the sweep), and what the rows of pending keys are. Keys come
//! from Redis, where anybody can write, so a value may not even be one of its column's type.

use std::collections::{BTreeMap, HashSet};

use super::sql::{Snapshots, Sql, explain};
use crate::error::Error;
use crate::gate::Snapshot;
use crate::plan::{Mapping, is_text};
use crate::pq::{PqError, QueryResult, quote_identifier};

/// How to find the rows of a table by the values of its key template.
pub(crate) struct Lookup {
    table: String,
    /// The FROM and WHERE clauses; `$1`, `$2`, … are arrays of texts, one for each placeholder.
    from: String,
    /// The placeholders' columns as text.
    columns: String,
    placeholders: usize,
}

/// A key and the values of its placeholders.
pub(crate) type ParsedKey = (Vec<u8>, Vec<Vec<u8>>);

/// Takes the answer for some of the keys; None: their values are not of their columns' types.
type Take<'t> = dyn FnMut(Snapshot, Vec<ParsedKey>, Option<&QueryResult>) -> Result<(), Error> + 't;

/// A snapshot, and for each key that was asked for whether (and as what) it has a row.
pub(crate) struct Found<T> {
    pub(crate) snapshot: Snapshot,
    pub(crate) keys: Vec<(Vec<u8>, Option<T>)>,
}

impl Lookup {
    /// Prepares for a table. None: the table or a column is gone, which the stream will say as well.
    pub(crate) fn new(sql: &mut Sql, mapping: &Mapping) -> Result<Option<Self>, Error> {
        let oid = mapping.oid.to_string();
        let names = mapping.template.placeholders();
        let what = "cannot look at the key columns of a table";
        let statement = "SELECT format('%I.%I', n.nspname, c.relname), c.relkind = 'p' FROM pg_class c \
                         JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = $1::oid";
        let result = sql.query(what, statement, &[Some(oid.as_bytes())])?;
        let Some((name, partitioned)) = result
            .rows()
            .next()
            .and_then(|row| Some((row.text(0)?.to_owned(), row.text(1)? == "t")))
        else {
            return Ok(None);
        };
        let (mut arrays, mut joins, mut columns) = (Vec::new(), Vec::new(), Vec::new());
        for (index, column) in names.iter().enumerate() {
            // With -1 the type has its name without a length: "character" would mean one character.
            // And its operator = may be in the schema of an extension, where the search path does not lead.
            let statement = "WITH RECURSIVE kinds (oid) AS ( \
                                 SELECT atttypid FROM pg_attribute WHERE attrelid = $1::oid AND attname = $2 AND NOT attisdropped \
                                 UNION SELECT t.typbasetype FROM kinds k JOIN pg_type t ON t.oid = k.oid WHERE t.typtype = 'd') \
                             SELECT format_type(a.atttypid, -1), (SELECT quote_ident(n.nspname) FROM kinds k \
                                 JOIN pg_opclass c ON c.opcintype = k.oid AND c.opcdefault JOIN pg_am m ON m.oid = c.opcmethod AND m.amname = 'btree' \
                                 JOIN pg_amop o ON o.amopfamily = c.opcfamily AND o.amopstrategy = 3 AND o.amoplefttype = k.oid AND o.amoprighttype = k.oid \
                                 JOIN pg_operator p ON p.oid = o.amopopr AND p.oprname = '=' JOIN pg_namespace n ON n.oid = p.oprnamespace LIMIT 1) \
                             FROM pg_attribute a WHERE a.attrelid = $1::oid AND a.attname = $2 AND NOT a.attisdropped";
            let result = sql.query(what, statement, &[Some(oid.as_bytes()), Some(column.as_bytes())])?;
            let Some(kind) = result.text(0, 0) else {
                return Ok(None);
            };
            let schema = result.text(0, 1).unwrap_or("pg_catalog");
            let quoted = quote_identifier(column);
            arrays.push(format!("${}::text[]", index + 1));
            joins.push(format!("t.{quoted} OPERATOR({schema}.=) k.v{index}::{kind}"));
            columns.push(format!("t.{quoted}::text"));
        }
        let aliases: Vec<String> = (0..names.len()).map(|index| format!("v{index}")).collect();
        let only = if partitioned { "" } else { "ONLY " };
        let from = format!(
            "FROM unnest({}) AS k({}) JOIN {only}{name} t ON {}",
            arrays.join(", "),
            aliases.join(", "),
            joins.join(" AND ")
        );
        Ok(Some(Self {
            table: mapping.table.clone(),
            from,
            columns: columns.join(", "),
            placeholders: names.len(),
        }))
    }

    /// Which of the keys have a row. A row counts for the key that it renders to, so `users:007` is no key of row 7.
    pub(crate) fn present(
        &self,
        snapshots: &dyn Snapshots,
        sql: &mut Sql,
        mapping: &Mapping,
        keys: Vec<ParsedKey>,
    ) -> Result<Vec<Found<()>>, Error> {
        let statement = format!("SELECT {} {}", self.columns, self.from);
        let keys = all_readings(mapping, keys, sql.any_bytes);
        let mut found = Vec::new();
        self.bisect(
            snapshots,
            sql,
            &statement,
            false,
            keys,
            &mut |snapshot, keys, result| {
                let mut rendered: HashSet<Vec<u8>> = HashSet::new();
                for row in result.into_iter().flat_map(QueryResult::rows) {
                    let mut key = Vec::new();
                    let value = |placeholder: usize, out: &mut Vec<u8>| {
                        out.extend_from_slice(row.get(placeholder).unwrap_or_default())
                    };
                    if mapping.template.render(value, &mut key).is_ok() {
                        rendered.insert(key);
                    }
                }
                let keys = keys
                    .into_iter()
                    .map(|(key, _)| {
                        if rendered.contains(&key) {
                            (key, Some(()))
                        } else {
                            (key, None)
                        }
                    })
                    .collect();
                found.push(Found { snapshot, keys });
                Ok(())
            },
        )?;
        Ok(one_answer_a_key(mapping, found))
    }

    /// The packed rows of the keys.
    pub(crate) fn rows(
        &self,
        snapshots: &dyn Snapshots,
        sql: &mut Sql,
        mapping: &Mapping,
        keys: Vec<ParsedKey>,
    ) -> Result<Vec<Found<Vec<u8>>>, Error> {
        let statement = format!("SELECT walmirror.pack(t.*) {}", self.from);
        let keys = all_readings(mapping, keys, sql.any_bytes);
        let mut found = Vec::new();
        self.bisect(
            snapshots,
            sql,
            &statement,
            true,
            keys,
            &mut |snapshot, keys, result| {
                let mut rows: std::collections::HashMap<Vec<u8>, Vec<u8>> = std::collections::HashMap::new();
                for packed in result
                    .into_iter()
                    .flat_map(QueryResult::rows)
                    .filter_map(|row| row.get(0))
                {
                    if let Some(key) = key_of(mapping, packed) {
                        rows.insert(key, packed.to_vec());
                    }
                }
                let keys = keys
                    .into_iter()
                    .map(|(key, _)| {
                        // The same key may have been asked for twice.
                        let row = rows.get(&key).cloned();
                        (key, row)
                    })
                    .collect();
                found.push(Found { snapshot, keys });
                Ok(())
            },
        )?;
        Ok(one_answer_a_key(mapping, found))
    }

    /// Runs the statement for the keys. Where a value is not one of its column's type, the halves are tried by
    /// themselves; a single key that fails has no row.
    fn bisect(
        &self,
        snapshots: &dyn Snapshots,
        sql: &mut Sql,
        statement: &str,
        binary: bool,
        mut keys: Vec<ParsedKey>,
        take: &mut Take<'_>,
    ) -> Result<(), Error> {
        let Some(snapshot) = snapshots.begin(sql, &self.table)? else {
            return Ok(());
        };
        let arrays: Vec<Vec<u8>> = (0..self.placeholders)
            .map(|index| array(keys.iter().map(|(_, values)| values.get(index))))
            .collect();
        let params: Vec<Option<&[u8]>> = arrays.iter().map(|array| Some(array.as_slice())).collect();
        let result = if binary {
            sql.connection.query_binary(statement, &params)
        } else {
            sql.connection.query(statement, &params)
        };
        sql.end()?;
        match result {
            Ok(result) => take(snapshot, keys, Some(&result)),
            Err(error) if is_bad_value(&error) && keys.len() > 1 => {
                let half = keys.split_off(keys.len() / 2);
                self.bisect(snapshots, sql, statement, binary, keys, take)?;
                self.bisect(snapshots, sql, statement, binary, half, take)
            }
            Err(error) if is_bad_value(&error) => take(snapshot, keys, None),
            Err(error) => Err(explain(
                format!("cannot look for rows of the table {}", self.table),
                error,
            )),
        }
    }
}

/// A key that may be read in several ways is looked for in each of them: only one can be that of its row.
fn all_readings(mapping: &Mapping, keys: Vec<ParsedKey>, any_bytes: bool) -> Vec<ParsedKey> {
    if !mapping.template.is_ambiguous() {
        return keys;
    }
    let readings = |(key, first): ParsedKey| {
        let mut all = mapping.template.match_all(&key);
        all.retain(|values| is_text(values, any_bytes));
        if all.is_empty() {
            all.push(first);
        }
        all.into_iter().map(move |values| (key.clone(), values))
    };
    keys.into_iter().flat_map(readings).collect()
}

/// Puts their answers together. What was asked first has the oldest snapshot, which holds for all of them.
fn one_answer_a_key<T>(mapping: &Mapping, found: Vec<Found<T>>) -> Vec<Found<T>> {
    if !mapping.template.is_ambiguous() {
        return found;
    }
    let mut keys: BTreeMap<Vec<u8>, Option<T>> = BTreeMap::new();
    let mut first = None;
    for Found {
        snapshot,
        keys: answers,
    } in found
    {
        first.get_or_insert(snapshot);
        for (key, row) in answers {
            let known = keys.entry(key).or_default();
            *known = known.take().or(row);
        }
    }
    let keys = keys.into_iter().collect();
    first
        .map(|snapshot| Found { snapshot, keys })
        .into_iter()
        .collect()
}

/// A value that its type does not take: class 22 (data exception), 23 (a domain's constraint), and what some input functions say
/// instead; or a row that cannot be read, and so cannot be mirrored.
fn is_bad_value(error: &PqError) -> bool {
    error.sqlstate.as_deref().is_some_and(|state| {
        state.starts_with("22")
            || state.starts_with("23")
            || matches!(state, "42704" | "42601" | "0A000" | "54000" | "P0001")
    }) || super::fill::is_too_large(error)
}

/// The key of a packed row.
pub(crate) fn key_of(mapping: &Mapping, packed: &[u8]) -> Option<Vec<u8>> {
    let tuple = walmirror_proto::row::TupleRef::parse(packed.get(8..)?).ok()?;
    let mut key = Vec::new();
    let row = mapping.datums(&tuple).ok()?;
    mapping.key(&row, &mut key).ok()?.then_some(key)
}

/// A text[] literal.
fn array<'v>(values: impl Iterator<Item = Option<&'v Vec<u8>>>) -> Vec<u8> {
    let mut out = vec![b'{'];
    for (index, value) in values.enumerate() {
        if index > 0 {
            out.push(b',');
        }
        out.push(b'"');
        for &byte in value.map_or(&[][..], Vec::as_slice) {
            if matches!(byte, b'"' | b'\\') {
                out.push(b'\\');
            }
            out.push(byte);
        }
        out.push(b'"');
    }
    out.push(b'}');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_are_quoted() {
        let values = [
            b"a".to_vec(),
            b"b\"\\,{}".to_vec(),
            b"".to_vec(),
            b"NULL".to_vec(),
        ];
        assert_eq!(array(values.iter().map(Some)), br#"{"a","b\"\\,{}","","NULL"}"#);
        assert_eq!(array(std::iter::empty()), b"{}");
    }

    #[test]
    fn bad_values_are_told_from_real_errors() {
        let error = |state: &str| PqError {
            sqlstate: Some(state.to_owned()),
            ..PqError::new(crate::pq::ErrorKind::Server, "x")
        };
        assert!(is_bad_value(&error("22P02")) && is_bad_value(&error("22003")));
        assert!(!is_bad_value(&error("42501")) && !is_bad_value(&error("57P01")));
        assert!(
            is_text(&[b"x".to_vec()], false) && !is_text(&[vec![0]], true) && !is_text(&[vec![0xff]], false)
        );
    }
}
