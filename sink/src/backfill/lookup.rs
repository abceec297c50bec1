//! Reads rows by their keys: which keys of a page have a row (the sweep), and what the rows of pending keys are. Keys come
//! from Redis, where anybody can write, so a value may not even be one of its column's type.

mod column;
mod query;

use std::collections::{BTreeMap, HashMap, HashSet};

use walmirror_proto::key::Readings;

use super::sql::{Snapshots, Sql};
use crate::error::Error;
use crate::gate::Snapshot;
use crate::plan::{Keyed, Mapping, is_text};
use crate::pq::{ErrorKind, PqError, QueryResult, quote_literal};
use column::{Column, Shape};
use query::{Query, Way};

/// How to find the rows of a table by the values of its key template.
pub(crate) struct Lookup {
    table: String,
    /// Schema and name, quoted, behind ONLY where it has no partitions.
    source: String,
    /// The same without that.
    name: String,
    /// The FROM clause; `$1`, `$2`, … are arrays, one for each placeholder.
    by_values: Way,
    /// The same for keys that can be read in too many ways: `$1` is an array of keys, and each row is rendered, so it reads all of
    /// the table.
    by_key: Way,
    /// The placeholders' columns as text.
    columns: String,
    /// What values they can have.
    shapes: Vec<Shape>,
}

/// A key and the values of its placeholders.
pub(crate) type ParsedKey = (Vec<u8>, Vec<Vec<u8>>);

/// Rows that are read at once should be no more than about so many bytes (INVARIANT I7).
const ROWS_BYTES: usize = 1024 * 1024;

/// Takes the answer for some of the keys; None: their values are not of their columns' types. False: that is enough.
type Take<'t> = dyn FnMut(Snapshot, Vec<ParsedKey>, Option<&[QueryResult]>) -> Result<bool, Error> + 't;

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
        let statement = "SELECT format('%I.%I', n.nspname, c.relname), c.relkind = 'p' FROM pg_class c \
                         JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = $1::oid";
        let result = sql.query(column::LOOK, statement, &[Some(oid.as_bytes())])?;
        let Some((name, partitioned)) = result
            .rows()
            .next()
            .and_then(|row| Some((row.text(0)?.to_owned(), row.text(1)? == "t")))
        else {
            return Ok(None);
        };
        let (mut arrays, mut joins, mut columns) = (Vec::new(), Vec::new(), Vec::new());
        let mut shapes = Vec::new();
        for (index, name) in names.iter().enumerate() {
            let Some(column) = Column::look(sql, &oid, name)? else {
                return Ok(None);
            };
            if let Some(schemas) = &column.closed {
                return Err(denied(sql, &mapping.table, schemas));
            }
            let (array, join) = column.join(index);
            arrays.push(array);
            joins.push(join);
            columns.push(column.text());
            shapes.push(column.shape());
        }
        let aliases: Vec<String> = (0..names.len()).map(|index| format!("v{index}")).collect();
        let source = if partitioned {
            name.clone()
        } else {
            format!("ONLY {name}")
        };
        let from = format!(
            "FROM unnest({}) AS k({}) JOIN {source} t ON {}",
            arrays.join(", "),
            aliases.join(", "),
            joins.join(" AND ")
        );
        // In the column's own collation a part that is to be replaced could not be looked for, or be found where it is not.
        let expression = mapping.template.expression(
            |index| {
                format!(
                    "({}) COLLATE \"C\"",
                    columns.get(index).map_or("", String::as_str)
                )
            },
            quote_literal,
        );
        let by_key = format!(
            "FROM unnest($1::text[]) AS k(key) JOIN {source} t ON ({expression}) COLLATE \"C\" = k.key"
        );
        Ok(Some(Self {
            table: mapping.table.clone(),
            source,
            name,
            by_values: Way {
                from,
                arrays: names.len(),
                takes_any_text: false,
            },
            by_key: Way {
                from: by_key,
                arrays: 1,
                takes_any_text: true,
            },
            columns: columns.join(", "),
            shapes,
        }))
    }

    /// The columns of the key as text, of a table `t`: whoever wrote a cast to text has it neither run nor believed.
    pub(super) fn columns(&self) -> &str {
        &self.columns
    }

    /// Which of the keys have a row. A row counts for the key that it renders to, so `users:007` is no key of row 7.
    pub(crate) fn present(
        &self,
        snapshots: &dyn Snapshots,
        sql: &mut Sql,
        mapping: &Mapping,
        keys: Vec<ParsedKey>,
    ) -> Result<Vec<Found<()>>, Error> {
        let asked = self.asked(mapping, keys, sql.any_bytes);
        let mut found = Vec::new();
        for (way, keys) in [(&self.by_values, asked.by_values), (&self.by_key, asked.by_key)] {
            let query = Query::new(way, &self.columns, None);
            self.bisect(snapshots, sql, query, keys, &mut |snapshot, keys, result| {
                let mut rendered: HashSet<Vec<u8>> = HashSet::new();
                for row in result.into_iter().flatten().flat_map(QueryResult::rows) {
                    let mut key = Vec::new();
                    let value = |placeholder: usize, out: &mut Vec<u8>| {
                        out.extend_from_slice(row.get(placeholder).unwrap_or_default())
                    };
                    if mapping.template.render(value, &mut key).is_ok() {
                        rendered.insert(key);
                    }
                }
                let keys = keys.into_iter().map(|(key, _)| {
                    let is_present = rendered.contains(&key);
                    (key, is_present.then_some(()))
                });
                found.push(Found {
                    snapshot,
                    keys: keys.collect(),
                });
                Ok(true)
            })?;
        }
        Ok(one_answer_a_key(mapping, found))
    }

    /// The packed rows of the first of the keys, of as many as can be read at once; the other keys stay there.
    pub(crate) fn rows(
        &self,
        snapshots: &dyn Snapshots,
        sql: &mut Sql,
        mapping: &Mapping,
        keys: &mut Vec<ParsedKey>,
    ) -> Result<Vec<Found<Vec<u8>>>, Error> {
        as_many(keys, |keys, most| {
            self.rows_up_to(snapshots, sql, mapping, keys, most)
        })
    }

    /// The same for keys that rows were seen to have. Where a value that was read from such a key is refused by its own type, all
    /// rows are rendered to find the one.
    pub(crate) fn rows_of_rows(
        &self,
        snapshots: &dyn Snapshots,
        sql: &mut Sql,
        mapping: &Mapping,
        keys: &mut Vec<ParsedKey>,
    ) -> Result<Vec<Found<Vec<u8>>>, Error> {
        as_many(keys, |keys, most| {
            let mut refused = Vec::new();
            let found = self.read(snapshots, sql, mapping, keys, most, &mut |_, keys| {
                // Without values.
                refused.extend(keys.into_iter().map(|(key, _)| (key, Vec::new())));
            })?;
            let Some(mut found) = found else { return Ok(None) };
            if !refused.is_empty() {
                match self.rows_up_to(snapshots, sql, mapping, refused, most)? {
                    Some(others) => found.extend(others),
                    None => return Ok(None),
                }
            }
            Ok(Some(one_answer_a_key(mapping, found)))
        })
    }

    /// None: they are more than so many bytes.
    fn rows_up_to(
        &self,
        snapshots: &dyn Snapshots,
        sql: &mut Sql,
        mapping: &Mapping,
        keys: Vec<ParsedKey>,
        most: usize,
    ) -> Result<Option<Vec<Found<Vec<u8>>>>, Error> {
        let mut unasked = Vec::new();
        let found = self.read(snapshots, sql, mapping, keys, most, &mut |snapshot, keys| {
            let keys = keys.into_iter().map(|(key, _)| (key, None)).collect();
            unasked.push(Found { snapshot, keys });
        })?;
        Ok(found.map(|mut found| {
            found.extend(unasked);
            one_answer_a_key(mapping, found)
        }))
    }

    fn read(
        &self,
        snapshots: &dyn Snapshots,
        sql: &mut Sql,
        mapping: &Mapping,
        keys: Vec<ParsedKey>,
        most: usize,
        refused: &mut dyn FnMut(Snapshot, Vec<ParsedKey>),
    ) -> Result<Option<Vec<Found<Vec<u8>>>>, Error> {
        let asked = self.asked(mapping, keys, sql.any_bytes);
        let (mut found, mut bytes) = (Vec::new(), 0_usize);
        for (way, keys) in [(&self.by_values, asked.by_values), (&self.by_key, asked.by_key)] {
            let query = Query::new(way, "walmirror.pack(t.*)", Some(most));
            let is_all = self.bisect(snapshots, sql, query, keys, &mut |snapshot, keys, result| {
                let Some(result) = result else {
                    refused(snapshot, keys);
                    return Ok(true);
                };
                let rows = by_key(
                    mapping,
                    result.iter().flat_map(QueryResult::rows).map(|row| row.get(0)),
                );
                let rows = rows.ok_or_else(|| self.changed())?;
                bytes += rows.values().map(Vec::len).sum::<usize>();
                let keys = keys.into_iter().map(|(key, _)| {
                    // The same key may have been asked for twice.
                    let row = rows.get(&key).cloned();
                    (key, row)
                });
                found.push(Found {
                    snapshot,
                    keys: keys.collect(),
                });
                Ok(bytes <= most)
            })?;
            if !is_all {
                return Ok(None);
            }
        }
        Ok(Some(found))
    }

    /// A key that may be read in several ways is looked for in each of them: only one can be that of its row. Where there are too
    /// many, or its values are not known, rows are rendered instead.
    fn asked(&self, mapping: &Mapping, keys: Vec<ParsedKey>, any_bytes: bool) -> Asked {
        let mut asked = Asked::default();
        let shapes = &self.shapes;
        let accepts = |place: usize, value: &[u8]| shapes.get(place).is_none_or(|shape| shape.takes(value));
        for (key, first) in keys {
            let mut readings = Readings {
                is_cut_short: first.len() != shapes.len(),
                all: Vec::new(),
            };
            if !readings.is_cut_short && mapping.template.is_ambiguous() {
                readings = mapping.template.match_all(&key, &accepts);
                readings.all.retain(|values| is_text(values, any_bytes));
            }
            if readings.is_cut_short && is_text(std::slice::from_ref(&key), any_bytes) {
                asked.by_key.push((key.clone(), vec![key]));
                continue;
            }
            if readings.all.is_empty() {
                readings.all.push(first);
            }
            asked
                .by_values
                .extend(readings.all.into_iter().map(|values| (key.clone(), values)));
        }
        asked
    }

    /// Runs the query for the keys. Where the server refuses one of their values, the halves are tried by themselves; a single key
    /// that fails has no row. False: the rows are too many bytes.
    fn bisect(
        &self,
        snapshots: &dyn Snapshots,
        sql: &mut Sql,
        mut query: Query,
        mut keys: Vec<ParsedKey>,
        take: &mut Take<'_>,
    ) -> Result<bool, Error> {
        if keys.is_empty() {
            return Ok(true);
        }
        let Some(snapshot) = snapshots.begin(sql, &self.table, Some(&self.source))? else {
            return Ok(true);
        };
        let result = query.run(sql, &keys);
        sql.end()?;
        match result {
            Ok(Some(result)) => take(snapshot, keys, Some(&result)),
            Ok(None) => Ok(false),
            Err(error) if query.is_of_a_value(&error) => {
                // What has nothing to do with values fails without any as well: the table or a column is gone, a right is lacking.
                if !std::mem::replace(&mut query.is_sound, true) {
                    query.run(sql, &[]).map_err(|error| self.error(sql, error))?;
                }
                if keys.len() == 1 {
                    return take(snapshot, keys, None);
                }
                let half = keys.split_off(keys.len() / 2);
                Ok(self.bisect(snapshots, sql, query.clone(), keys, take)?
                    && self.bisect(snapshots, sql, query, half, take)?)
            }
            Err(error) => Err(self.error(sql, error)),
        }
    }

    /// Its rows are of another version than was asked for: what they say of keys is of no use.
    fn changed(&self) -> Error {
        let error = PqError {
            sqlstate: Some("55000".to_owned()),
            ..PqError::new(ErrorKind::Server, "its definition has changed")
        };
        Error::postgres(format!("cannot look for rows of the table {}", self.table), error)
    }

    fn error(&self, sql: &Sql, error: PqError) -> Error {
        let what = format!("cannot look for rows of the table {}", self.table);
        sql.explain_table(what, &self.name, error)
    }
}

/// The type of a column of the key is in a schema that the role may not use. Reading the table takes no such right.
fn denied(sql: &Sql, table: &str, schemas: &str) -> Error {
    let error = PqError {
        sqlstate: Some("42501".to_owned()),
        ..PqError::new(
            ErrorKind::Server,
            format!("the type of a key column is in the schema {schemas}, which the role may not use"),
        )
    };
    let role = sql.role();
    Error::postgres(format!("cannot look for rows of the table {table}"), error)
        .next(format!("GRANT USAGE ON SCHEMA {schemas} TO {role};"))
}

/// Reads for as many of the first keys as come to no more than so many bytes, or for one, and takes these out.
fn as_many<T>(
    keys: &mut Vec<ParsedKey>,
    mut read: impl FnMut(Vec<ParsedKey>, usize) -> Result<Option<T>, Error>,
) -> Result<T, Error> {
    let mut count = keys.len();
    loop {
        let most = if count > 1 { ROWS_BYTES } else { usize::MAX };
        let first = keys.iter().take(count).cloned().collect();
        match read(first, most)? {
            Some(found) => {
                keys.drain(..count);
                return Ok(found);
            }
            None => count = (count / 2).max(1),
        }
    }
}

/// How keys are asked for.
#[derive(Default)]
struct Asked {
    by_values: Vec<ParsedKey>,
    /// Their only value is the key itself.
    by_key: Vec<ParsedKey>,
}

/// Puts their answers together. The oldest of their snapshots holds for all of them.
fn one_answer_a_key<T>(mapping: &Mapping, found: Vec<Found<T>>) -> Vec<Found<T>> {
    if !mapping.template.is_ambiguous() {
        return found;
    }
    let mut keys: BTreeMap<Vec<u8>, Option<T>> = BTreeMap::new();
    let mut oldest: Option<Snapshot> = None;
    for Found {
        snapshot,
        keys: answers,
    } in found
    {
        if oldest.as_ref().is_none_or(|oldest| snapshot.is_before(oldest)) {
            oldest = Some(snapshot);
        }
        for (key, row) in answers {
            let known = keys.entry(key).or_default();
            *known = known.take().or(row);
        }
    }
    let keys = keys.into_iter().collect();
    oldest
        .map(|snapshot| Found { snapshot, keys })
        .into_iter()
        .collect()
}

/// Packed rows by their keys. None: one is of another version of the table, or it has no label any more.
fn by_key<'r>(
    mapping: &Mapping,
    rows: impl Iterator<Item = Option<&'r [u8]>>,
) -> Option<HashMap<Vec<u8>, Vec<u8>>> {
    let mut all = HashMap::new();
    for packed in rows {
        let packed = packed?;
        let (fingerprint, tuple) = packed.split_first_chunk::<8>()?;
        if u64::from_be_bytes(*fingerprint) != mapping.fingerprint {
            return None;
        }
        let tuple = walmirror_proto::row::TupleRef::parse(tuple).ok()?;
        let row = mapping.datums(&tuple).ok()?;
        let mut key = Vec::new();
        if mapping.key(&row, &mut key).ok()? == Keyed::Yes {
            all.insert(key, packed.to_vec());
        }
    }
    Some(all)
}

#[cfg(test)]
mod tests;
