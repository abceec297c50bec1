//! A table that is compared: how its rows look in Redis, how they are found, and what was found out about them.

use std::collections::BTreeMap;

use prost::Message;
use walmirror_proto::key::KeyTemplate;
use walmirror_proto::pb::{self, Mode};
use walmirror_proto::row::TupleRef;

use super::Tally;
use super::content::{Content, Shape};
use crate::backfill::Catalog;
use crate::backfill::catalog::Misfit;
use crate::backfill::lookup::Lookup;
use crate::backfill::sql::Sql;
use crate::error::{Error, Source};
use crate::plan::{Keyed, Mapping, Purge, RedisKeys};
use crate::redis::{Connection, read_stored, value_limit};
use crate::shell::word;

/// One of them.
pub(super) struct Table {
    pub(super) oid: u32,
    pub(super) name: String,
    pub(super) fingerprint: u64,
    pub(super) mapping: Mapping,
    pub(super) lookup: Lookup,
    /// The keys that are its own.
    pub(super) own: Purge,
    pub(super) tally: Tally,
    shape: Shape,
    /// Redis takes no longer key.
    key_bytes: usize,
}

impl Table {
    /// All labelled tables, as the catalog has them. The version that Redis is kept by has to be the same. `names`: those that are
    /// to be compared, whose labels have to fit; none: all.
    pub(super) fn all(
        sql: &mut Sql,
        redis: &mut Connection,
        slot: &str,
        names: &[String],
    ) -> Result<Vec<Self>, Error> {
        let stored = read_stored(redis, &RedisKeys::new(slot))?;
        if stored.progress.is_none() {
            return Err(Error::gap(format!(
                "nothing can be compared: Redis has no progress of the slot {slot}"
            ))
            .next(format!(
                "walmirror status --slot {slot}   # is it the slot of the mirror, and the Redis, and the database of it, that its sink writes to?"
            )));
        }
        let catalog = Catalog::read(sql, 0)?;
        let is_asked_for =
            |misfit: &&Misfit| names.is_empty() || names.iter().any(|name| is_named(&misfit.table, name));
        if let Some(misfit) = catalog.misfits.iter().find(is_asked_for) {
            return Err(misfit.error());
        }
        if let Some((_, table)) = catalog.locked.first() {
            return Err(Error::timeout(format!("the table {table} is locked"))
                .next("walmirror verify --timeout 5min"));
        }
        let relations: BTreeMap<u32, pb::Relation> = catalog
            .relations
            .into_iter()
            .map(|relation| (relation.oid, relation))
            .collect();
        // The keys of a label that does not fit stay as Redis has them.
        let unfit = catalog.misfits.iter();
        let unfit = unfit.filter_map(|misfit| stored.relations.get_key_value(&misfit.oid));
        let templates: BTreeMap<u32, KeyTemplate> = relations
            .iter()
            .chain(unfit)
            .filter_map(|(oid, relation)| Some((*oid, KeyTemplate::parse(&relation.key).ok()?)))
            .collect();
        let mut tables = Vec::new();
        let key_bytes = value_limit(redis)?;
        for (oid, relation) in &relations {
            let others = templates.iter().filter(|(other, _)| *other != oid);
            let others = others.map(|(_, template)| template);
            tables.extend(Self::new(sql, relation, others, key_bytes)?);
        }
        Ok(tables)
    }

    fn new<'t>(
        sql: &mut Sql,
        relation: &pb::Relation,
        others: impl Iterator<Item = &'t KeyTemplate>,
        key_bytes: usize,
    ) -> Result<Option<Self>, Error> {
        let mapping = Mapping::new(relation)
            .map_err(|error| Error::stream("the definition of a table cannot be used", error))?;
        let Some(lookup) = Lookup::new(sql, &mapping)? else {
            return Ok(None);
        };
        let tally = Tally {
            table: mapping.table.clone(),
            is_cache: mapping.mode == Mode::Cache,
            expires: mapping.ttl.is_some(),
            ..Tally::default()
        };
        Ok(Some(Self {
            oid: relation.oid,
            name: mapping.table.clone(),
            fingerprint: relation.fingerprint,
            own: Purge::new(relation.oid, &mapping.template, others),
            shape: Shape::new(relation, &mapping),
            lookup,
            mapping,
            tally,
            key_bytes,
        }))
    }

    pub(super) fn is_cache(&self) -> bool {
        self.mapping.mode == Mode::Cache
    }

    /// Whether a row may be without its key.
    pub(super) fn may_be_absent(&self) -> bool {
        self.is_cache() || self.mapping.ttl.is_some()
    }

    pub(super) fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The key of a row in the form of `walmirror.pack`, and what it should hold. None: it has no key.
    pub(super) fn row(&self, packed: &[u8], text: &mut Vec<u8>) -> Result<Option<(Vec<u8>, Content)>, Error> {
        let unreadable = |why: Source| Error::stream(format!("a row of {} cannot be read", self.name), why);
        let Some((fingerprint, tuple)) = packed.split_first_chunk::<8>() else {
            return Err(unreadable("it has too few bytes".into()));
        };
        if u64::from_be_bytes(*fingerprint) != self.fingerprint {
            return Err(self.changed());
        }
        let tuple = TupleRef::parse(tuple).map_err(|error| unreadable(error.into()))?;
        let row = self
            .mapping
            .datums(&tuple)
            .map_err(|error| unreadable(error.into()))?;
        let mut key = Vec::new();
        let keyed = self
            .mapping
            .key(&row, &mut key)
            .map_err(|error| unreadable(error.into()))?;
        // Redis would close the connection over a key that is too long.
        if keyed != Keyed::Yes || key.len() > self.key_bytes {
            return Ok(None);
        }
        // A row that cannot be encoded has no key in Redis.
        let expected = if tuple.has_unchanged() {
            Content::Absent
        } else {
            self.shape.expected(&self.mapping, &row, text)
        };
        Ok(Some((key, expected)))
    }

    /// Whether the table is what it was when its definition was read.
    pub(super) fn is_same(&self, sql: &mut Sql) -> Result<bool, Error> {
        let (what, oid) = ("cannot look at a mirrored table", self.oid.to_string());
        let statement = "SELECT walmirror.relation($1::oid)";
        let found = match sql.query_binary(what, statement, &[Some(oid.as_bytes())]) {
            Err(error) if error.is_of_a_changed_table() => return Ok(false),
            found => found?,
        };
        let found = found.get(0, 0).map(pb::Relation::decode);
        Ok(found.is_some_and(|found| found.is_ok_and(|found| found.fingerprint == self.fingerprint)))
    }

    /// The error for a table that is no longer what it was.
    pub(super) fn changed(&self) -> Error {
        Error::timeout(format!(
            "the definition of the table {} changed while it was compared",
            self.name
        ))
        .next(format!("walmirror verify --table {}", word(&self.name)))
    }
}

/// Takes those of the tables that are named, as `name` or `schema.name`; all, if none is.
pub(super) fn choose(tables: Vec<Table>, names: &[String]) -> Result<Vec<Table>, Error> {
    let known: Vec<String> = tables.iter().map(|table| table.name.clone()).collect();
    for name in names {
        resolve(&known, name, "verify")?;
    }
    let is_chosen = |table: &Table| names.is_empty() || names.iter().any(|name| is_named(&table.name, name));
    Ok(tables.into_iter().filter(is_chosen).collect())
}

/// So many names are told to who gave one that is none of them.
const TOLD: usize = 5;

/// The one table that a name means to this command.
pub(crate) fn resolve<'k>(known: &'k [String], name: &str, command: &str) -> Result<&'k String, Error> {
    let mut matching = known.iter().filter(|table| is_named(table, name));
    match (matching.next(), matching.next()) {
        (Some(table), None) => Ok(table),
        (None, _) => {
            let mut some: Vec<&str> = known.iter().take(TOLD).map(String::as_str).collect();
            if known.len() > TOLD {
                some.push("…");
            }
            let known = if some.is_empty() {
                "nothing".to_owned()
            } else {
                some.join(", ")
            };
            Err(
                Error::config(format!("the table {name:?} is not mirrored; what is: {known}"))
                    .next("walmirror status   # lists all; SELECT walmirror.mirror('…') in psql adds one"),
            )
        }
        (Some(one), Some(other)) => Err(Error::config(format!(
            "there is more than one table {name:?}: {one}, {other}"
        ))
        .next(format!("walmirror {command} --table {}", word(one)))),
    }
}

/// The name may be quoted as in SQL.
fn is_named(table: &str, name: &str) -> bool {
    let short = table.split_once('.').map(|(_, short)| short);
    let is = |name: &str| table == name || short == Some(name);
    is(name) || (name.contains('"') && is(&unquoted(name)))
}

/// `a."b ""c"""` as `a.b "c"`.
fn unquoted(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    let (mut chars, mut is_inside) = (name.chars().peekable(), false);
    while let Some(char) = chars.next() {
        match char {
            '"' if is_inside && chars.peek() == Some(&'"') => out.extend(chars.next()),
            '"' => is_inside = !is_inside,
            _ => out.push(char),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_name_may_leave_the_schema_out() {
        let known = ["public.users", "shop.users", "shop.orders"].map(str::to_owned);
        assert_eq!(resolve(&known, "orders", "verify").unwrap(), "shop.orders");
        assert_eq!(resolve(&known, "shop.users", "verify").unwrap(), "shop.users");
        assert_eq!(
            resolve(&known, "\"shop\".\"users\"", "verify").unwrap(),
            "shop.users"
        );
        assert_eq!(unquoted("a.\"b \"\"c\"\"\""), "a.b \"c\"");
        assert!(
            resolve(&known, "users", "verify")
                .unwrap_err()
                .to_string()
                .contains("more than one")
        );
        assert!(
            resolve(&known, "nobody", "verify")
                .unwrap_err()
                .to_string()
                .contains("not mirrored")
        );
    }
}
