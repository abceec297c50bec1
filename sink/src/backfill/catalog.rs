//! What the catalog of Postgres says of the labelled tables.

use prost::Message;
use walmirror_proto::pb;

use super::sql::{Sql, explain};
use crate::error::Error;
use crate::pq::{Connection, quote_identifier, quote_literal};

/// All labelled tables.
#[derive(Debug, Default)]
pub struct Catalog {
    /// Their definitions, as of now.
    pub relations: Vec<pb::Relation>,
    /// Those of which there is none.
    pub misfits: Vec<Misfit>,
    /// Those that somebody had locked: oid, and schema and name.
    pub locked: Vec<(u32, String)>,
    /// How many times it was wanted before it was read ([`super::Backfill::wishes`]).
    pub wishes: u64,
}

/// A table that its label does not fit any more: DDL that does this is refused, unless event triggers are off.
#[derive(Debug)]
pub struct Misfit {
    /// pg_class.oid.
    pub oid: u32,
    /// Its schema and name.
    pub table: String,
    /// The same as SQL writes it.
    quoted: String,
    /// Why.
    pub problem: String,
}

impl Misfit {
    /// What is wrong, and what to do about it.
    pub fn error(&self) -> Error {
        let Self {
            table,
            quoted,
            problem,
            ..
        } = self;
        let quoted = quote_literal(quoted);
        Error::config(format!(
            "the label of the table {table} does not fit it: {problem}"
        ))
        .next(format!(
            "SELECT walmirror.unmirror({quoted});   -- and walmirror.mirror() with what it has now"
        ))
    }
}

impl Catalog {
    /// Reads `walmirror.relations()`, which waits for each table as long as `lock_timeout` says.
    pub(crate) fn read(sql: &mut Sql, wishes: u64) -> Result<Self, Error> {
        Ok(Self {
            wishes,
            ..Self::read_from(&mut sql.connection)?
        })
    }

    /// The same for whoever has a connection without the settings of a backfill.
    pub(crate) fn read_from(connection: &mut Connection) -> Result<Self, Error> {
        let statement = "SELECT relation, oidsend(oid), (SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                         WHERE c.oid = r.oid), problem, \
                         (SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = r.oid) FROM walmirror.relations() r";
        let result = connection.query_binary(statement, &[]).map_err(|error| {
            let role = quote_identifier(&connection.target().user);
            explain("cannot list the mirrored tables", &role, error)
        })?;
        let mut catalog = Self::default();
        for row in result.rows() {
            if let Some(bytes) = row.get(0) {
                let relation = pb::Relation::decode(bytes)
                    .map_err(|error| Error::stream("walmirror.relations() cannot be read", error))?;
                catalog.relations.push(relation);
                continue;
            }
            let Some(oid) = row.get(1).and_then(|bytes| bytes.first_chunk()) else {
                continue;
            };
            let oid = u32::from_be_bytes(*oid);
            let table = row.text(2).unwrap_or_default().to_owned();
            match row.text(3) {
                Some(problem) => catalog.misfits.push(Misfit {
                    oid,
                    table,
                    quoted: row.text(4).unwrap_or_default().to_owned(),
                    problem: problem.to_owned(),
                }),
                None => catalog.locked.push((oid, table)),
            }
        }
        Ok(catalog)
    }
}
