//! Whether a label fits its table. Everything that would make the mirror wrong is refused here, with what to do instead.

use pgrx::pg_sys;
use pgrx::prelude::*;
use walmirror_proto::key::KeyTemplate;

use crate::error::Refusal;
use crate::ffi::catalog_query;
use crate::ffi::labels;
use crate::ffi::memory::Context;
use crate::ffi::relation::{self, Rel};
use crate::label::{Label, Mode};
use crate::plan::{self, Plan};

mod taken;

use taken::Taken;

/// How much has to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Check {
    /// Everything.
    Strict,
    /// A table that has no primary key and no unique index for its key yet passes for now: pg_restore sets labels first, then
    /// creates unique constraints and the primary key, by name.
    Restoring,
    /// What makes the key unique may still be missing: the table was altered, as pg_restore does between its primary key and that, too.
    /// What an ALTER drops or defers is for [`super::part_dropped`], and no other takes it away. A table that never gets it is not
    /// mirrored (`Plan::build`).
    Altered,
    /// So may the replica identity: something was added to the table that may become it.
    Adding,
    /// Everything, when this index is gone.
    Without(pg_sys::Oid),
}

impl Check {
    /// The index that does not count; InvalidOid, which is NULL in a query, for none.
    fn gone(self) -> pg_sys::Oid {
        match self {
            Check::Without(index) => index,
            Check::Strict | Check::Restoring | Check::Altered | Check::Adding => pg_sys::InvalidOid,
        }
    }
}

/// Checks a label that is being set. The table has to be locked: what the label's keys wait for comes after that. Who changes a
/// partition is waited for, as the event triggers of their DDL do not see this label.
pub fn claim(table: pg_sys::Oid, label: &Label, check: Check) -> Result<(), Refusal> {
    if Rel::open_now(table).is_some_and(|relation| relation.is_partitioned()) {
        relation::lock_partitions(table);
    }
    let Some((key, template)) = check_table(table, label, check)? else {
        return Ok(());
    };
    // Equal skeletons have it in common, and so have templates that tie.
    labels::lock_keys(&format!("{} {:?}", template.prefix(), template.specificity()));
    let taken = check_other_templates(table, &key, &template)?;
    taken.iter().take(taken::TOLD).try_for_each(Taken::tell)
}

/// Checks a label that is there already. Its keys are its own, so that this waits for nobody: DDL on two partitions may well be of
/// two transactions.
pub fn validate(table: pg_sys::Oid, label: &Label, check: Check) -> Result<(), Refusal> {
    let Some((key, template)) = check_table(table, label, check)? else {
        return Ok(());
    };
    check_other_templates(table, &key, &template).map(drop)
}

/// Checks a label against the table's kind, columns, unique keys and replica identity; returns its key template. There is none
/// yet while a table is restored whose label leaves the key to the primary key; until that is there the decoder calls it broken.
pub fn check_table(
    table: pg_sys::Oid,
    label: &Label,
    check: Check,
) -> Result<Option<(String, KeyTemplate)>, Refusal> {
    check_kind(table)?;
    let relation = Rel::open_now(table).ok_or_else(|| {
        Refusal::object(
            format!("there is no table with oid {}", u32::from(table)),
            "Name an existing table.",
        )
    })?;
    let name = relation.name();
    let may_lack_key = matches!(check, Check::Restoring | Check::Altered | Check::Adding);
    if may_lack_key && label.key.is_none() && relation.primary_key().is_empty() {
        check_partitions(table, &relation)?;
        return Ok(None);
    }
    // Column names, the template's syntax and the value kind are the plan's to judge.
    let plan = Plan::for_label(&relation, label, Context::top())?;
    let key = plan.relation.key.clone();
    plan.release();
    let template =
        KeyTemplate::parse(&key).map_err(|error| Refusal::invalid(error.to_string(), "user:{id}"))?;
    check_options(label, &key, &template)?;
    check_partitions(table, &relation)?;
    let unique = check_unique(table, &name, template.placeholders(), check.gone());
    match (check, unique) {
        (Check::Restoring | Check::Altered | Check::Adding, Err(_)) if relation.primary_key().is_empty() => {}
        (Check::Altered | Check::Adding, Err(refusal)) => {
            // It may be so for a moment only, or for good.
            warning!(
                "table \"{name}\" is not mirrored until its label fits: {}",
                refusal.message
            );
        }
        (Check::Adding, Ok(())) => {}
        (_, unique) => {
            unique?;
            check_replica_identity(table, &relation, template.placeholders(), check.gone())?;
        }
    }
    Ok(Some((key, template)))
}

/// 10,000 years: Redis counts milliseconds since 1970 in 63 bits.
const TTL_MS_MAX: u64 = 10_000 * 365 * 86_400_000;

fn check_options(label: &Label, key: &str, template: &KeyTemplate) -> Result<(), Refusal> {
    if !template.has_own_space() {
        return Err(Refusal::invalid(
            format!(
                "key template \"{key}\" has no text of its own, so that keys of others in Redis would be taken for keys without a row, and removed"
            ),
            "Begin it with a name: key => 'user:{id}'.",
        ));
    }
    if template.skeleton().starts_with("walmirror:") {
        return Err(Refusal::invalid(
            "keys that start with walmirror: are walmirror's own",
            "Choose another prefix: key => 'user:{id}'.",
        ));
    }
    let columns = label.columns.as_deref().unwrap_or_default();
    if let Some(twice) = columns
        .iter()
        .enumerate()
        .find(|(at, name)| columns.iter().take(*at).any(|other| other == *name))
    {
        return Err(Refusal::invalid(
            format!("\"columns\" names column \"{}\" twice", twice.1),
            "Name each column once.",
        ));
    }
    if label.ttl_ms == Some(0) {
        return Err(Refusal::invalid(
            "ttl has to be longer than zero",
            "Leave ttl out for keys that never expire, or write ttl => '1 day'.",
        ));
    }
    if label.ttl_ms.is_some_and(|ttl| ttl > TTL_MS_MAX) {
        return Err(Refusal::invalid(
            "ttl has to be 10,000 years at most",
            "Leave ttl out for keys that never expire.",
        ));
    }
    if label.mode == Mode::Mirror && label.on_write != crate::label::OnWrite::Refresh {
        return Err(Refusal::invalid(
            "on_write is an option of cached tables",
            "A mirror always writes. SELECT walmirror.cache(…, on_write => …) caches on demand.",
        ));
    }
    Ok(())
}

/// Only ordinary and partitioned tables whose changes are in the WAL can be mirrored.
fn check_kind(table: pg_sys::Oid) -> Result<(), Refusal> {
    let row = query(
        "SELECT c.oid::regclass::text AS name, c.relkind::text AS kind, c.relpersistence::text AS persistence,
                c.oid < '16384'::pg_catalog.oid OR n.nspname IN ('pg_catalog', 'information_schema') AS system, c.relispartition AS partition
         FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = $1",
        &[table],
    )?;
    let Some(row) = row.into_iter().next() else {
        return Err(Refusal::object(
            format!("there is no table with oid {}", u32::from(table)),
            "Name an existing table.",
        ));
    };
    let text = |at: usize| row.get(at).cloned().flatten().unwrap_or_default();
    let (name, kind, persistence) = (text(0), text(1), text(2));
    if text(3) == "t" {
        return Err(Refusal::object(
            format!("\"{name}\" is a system table"),
            "Mirror a table of your own.",
        ));
    }
    match kind.as_str() {
        "r" | "p" => {}
        "v" => {
            return Err(Refusal::object(
                format!("\"{name}\" is a view"),
                "A view has no changes of its own in the WAL: mirror the tables under it.",
            ));
        }
        "m" => {
            return Err(Refusal::object(
                format!("\"{name}\" is a materialized view"),
                "Its refreshes are not in the logical stream: mirror the tables under it.",
            ));
        }
        "f" => {
            return Err(Refusal::object(
                format!("\"{name}\" is a foreign table"),
                "Its rows are not in this server's WAL: mirror the table on the server that holds it.",
            ));
        }
        _ => {
            return Err(Refusal::object(
                format!("\"{name}\" is not a table"),
                "Name an ordinary or a partitioned table.",
            ));
        }
    }
    match persistence.as_str() {
        "u" => Err(Refusal::object(
            format!("\"{name}\" is an unlogged table"),
            format!("Its changes are not in the WAL. ALTER TABLE {name} SET LOGGED; and try again."),
        )),
        "t" => Err(Refusal::object(
            format!("\"{name}\" is a temporary table"),
            "Its changes are not in the WAL: mirror a permanent table.",
        )),
        _ if text(4) == "t" => Err(Refusal::object(
            format!("\"{name}\" is a partition"),
            "Mirror the partitioned table that it belongs to: rows appear under the parent, whichever partition they live in.",
        )),
        _ => Ok(()),
    }
}

/// A partition's rows appear under the nearest table that has a label, and have to be in the WAL.
fn check_partitions(table: pg_sys::Oid, relation: &Rel) -> Result<(), Refusal> {
    let partitions = partitions(table, relation);
    let labelled = partitions
        .iter()
        .find(|partition| relation::label_of(**partition).is_some());
    if let Some(partition) = labelled {
        let name =
            single(query("SELECT $1::oid::regclass::text AS name", &[*partition])?).unwrap_or_default();
        return Err(Refusal::object(
            format!("partition \"{name}\" has a label of its own"),
            format!("SELECT walmirror.unmirror('{name}'); and try again."),
        ));
    }
    if partitions.is_empty() {
        return Ok(());
    }
    let outside = query(
        &format!(
            "SELECT c.oid::regclass::text AS name, c.relkind::text AS kind
         FROM pg_catalog.unnest('{{{}}}'::oid[]) l(oid) JOIN pg_catalog.pg_class c ON c.oid = l.oid
         WHERE c.relkind = 'f' OR c.relkind <> 'p' AND c.relpersistence = 'u'",
            list(partitions)
        ),
        &[],
    )?;
    let Some(partition) = outside.into_iter().next() else {
        return Ok(());
    };
    let text = |at: usize| partition.get(at).cloned().flatten().unwrap_or_default();
    let name = text(0);
    if text(1) == "f" {
        return Err(Refusal::object(
            format!("partition \"{name}\" is a foreign table"),
            "Its rows are not in this server's WAL: detach it.",
        ));
    }
    Err(Refusal::object(
        format!("partition \"{name}\" is unlogged"),
        format!("Its changes are not in the WAL. ALTER TABLE {name} SET LOGGED;"),
    ))
}

/// Oids for an array in a query. No text of a caller: numbers.
fn list(oids: impl IntoIterator<Item = pg_sys::Oid>) -> String {
    let numbers: Vec<String> = oids.into_iter().map(|oid| u32::from(oid).to_string()).collect();
    numbers.join(",")
}

/// The partitions at any depth, without a lock: their DDL, in another session, is not to be waited for.
fn partitions(table: pg_sys::Oid, relation: &Rel) -> Vec<pg_sys::Oid> {
    if !relation.is_partitioned() {
        return Vec::new();
    }
    let mut all = relation::with_partitions(table);
    all.retain(|oid| *oid != table);
    all
}

/// The key has to tell rows apart: it must name all columns of some unique index that is checked at once.
fn check_unique(table: pg_sys::Oid, name: &str, key: &[String], gone: pg_sys::Oid) -> Result<(), Refusal> {
    let indexes = query(
        "SELECT (SELECT pg_catalog.string_agg(a.attname::text, E'\\x01' ORDER BY k.ord) FROM pg_catalog.unnest(i.indkey::int2[]) WITH ORDINALITY k(attnum, ord)
                 JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum WHERE k.ord <= i.indnkeyatts) AS columns
         FROM pg_catalog.pg_index i
         WHERE i.indrelid = $1 AND i.indisunique AND i.indisvalid AND i.indimmediate AND i.indpred IS NULL AND i.indexprs IS NULL
           AND i.indexrelid IS DISTINCT FROM $2",
        &[table, gone],
    )?;
    let unique = indexes
        .iter()
        .filter_map(|row| row.first().cloned().flatten())
        .any(|columns| {
            columns
                .split('\u{1}')
                .all(|column| key.iter().any(|named| named == column))
        });
    if unique {
        return Ok(());
    }
    Err(plan::not_unique(name, key))
}

/// The old row in the WAL of an UPDATE or DELETE has to hold the key's columns, in each partition.
fn check_replica_identity(
    table: pg_sys::Oid,
    relation: &Rel,
    key: &[String],
    gone: pg_sys::Oid,
) -> Result<(), Refusal> {
    let tables = list(std::iter::once(table).chain(partitions(table, relation)));
    let leaves = query(
        &format!("SELECT l.oid::regclass::text AS name, c.relreplident::text AS identity,
                (SELECT pg_catalog.string_agg(a.attname::text, E'\\x01') FROM pg_catalog.pg_index i
                 CROSS JOIN pg_catalog.unnest(i.indkey::int2[]) WITH ORDINALITY k(attnum, ord)
                 JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
                 WHERE i.indrelid = l.oid AND k.ord <= i.indnkeyatts AND i.indisvalid AND i.indimmediate AND i.indexrelid IS DISTINCT FROM $1
                   AND CASE c.relreplident WHEN 'd' THEN i.indisprimary ELSE i.indisreplident END) AS columns
         FROM pg_catalog.unnest('{{{tables}}}'::oid[]) l(oid)
         JOIN pg_catalog.pg_class c ON c.oid = l.oid AND c.relkind <> 'p'"),
        &[gone],
    )?;
    for leaf in leaves {
        let text = |at: usize| leaf.get(at).cloned().flatten().unwrap_or_default();
        let name = text(0);
        let new_partition = if relation.is_partitioned() {
            " A new partition: CREATE TABLE it alone, set its replica identity, and ALTER TABLE … ATTACH PARTITION."
        } else {
            ""
        };
        let columns = text(2);
        let missing = key
            .iter()
            .find(|column| !columns.split('\u{1}').any(|known| known == column.as_str()));
        match (text(1).as_str(), missing) {
            ("f", _) | ("d" | "i", None) => {}
            (_, missing) => {
                let column = missing.or_else(|| key.first()).cloned().unwrap_or_default();
                return Err(Refusal::object(
                    format!(
                        "column \"{column}\" of the key is not in the replica identity of table \"{name}\""
                    ),
                    format!(
                        "Without it the WAL of an UPDATE or DELETE does not tell which key was meant. Use the primary key's columns in the key, or \
                         ALTER TABLE {name} REPLICA IDENTITY USING INDEX … (or FULL).{new_partition}"
                    ),
                ));
            }
        }
    }
    Ok(())
}

/// Two tables may not write the same keys. The others are not opened: DDL on one of them, in another session, is not to be
/// waited for.
fn check_other_templates(
    table: pg_sys::Oid,
    key: &str,
    template: &KeyTemplate,
) -> Result<Vec<Taken>, Refusal> {
    let (mut taken, mut is_known) = (Vec::new(), false);
    for (other, label) in labels::all() {
        let theirs = Label::parse(&label).ok().and_then(|label| label.key);
        let theirs = match theirs {
            Some(key) => key,
            None => default_key_of(other)?.unwrap_or_default(),
        };
        if other == table {
            is_known = theirs == key;
            continue;
        }
        let Ok(parsed) = KeyTemplate::parse(&theirs) else {
            continue;
        };
        if parsed.ties_with(template) {
            return Err(tie(table, key, other, &theirs)?);
        }
        if parsed.skeleton() == template.skeleton() {
            let name = name_of(other)?;
            return Err(Refusal::new(
                PgSqlErrorCode::ERRCODE_DUPLICATE_OBJECT,
                format!(
                    "key template \"{key}\" would write the same keys as \"{theirs}\" of table \"{name}\""
                ),
                "Choose another prefix: key => 'schema.table:{id}'.",
            ));
        }
        let (own, others) = ((table, key.to_owned()), (other, theirs));
        if template.takes_from(&parsed) {
            taken.push(Taken {
                by: own,
                from: others,
            });
        } else if parsed.takes_from(template) {
            taken.push(Taken {
                by: others,
                from: own,
            });
        }
    }
    // A label that is set again with the key that it has changes nothing of this.
    taken.retain(|_| !is_known);
    Ok(taken)
}

/// The key template of a table whose label leaves it to the primary key. Not by `walmirror.default_key`: labels are also set in databases
/// that do not have the extension, where a function of that name is anybody's.
fn default_key_of(table: pg_sys::Oid) -> Result<Option<String>, Refusal> {
    let rows = query(
        "SELECT c.relname::text AS name,
                (SELECT pg_catalog.string_agg(a.attname::text, E'\\x01' ORDER BY k.ord) FROM pg_catalog.unnest(i.indkey::int2[]) WITH ORDINALITY k(attnum, ord)
                 JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum WHERE k.ord <= i.indnkeyatts) AS columns
         FROM pg_catalog.pg_class c JOIN pg_catalog.pg_index i ON i.indrelid = c.oid AND i.indisprimary WHERE c.oid = $1",
        &[table],
    )?;
    let Some([Some(name), Some(columns)]) = rows.first().map(Vec::as_slice) else {
        return Ok(None);
    };
    let columns: Vec<String> = columns.split('\u{1}').map(str::to_owned).collect();
    Ok(plan::default_key(name, &columns))
}

/// The error for two templates that some rows could have the same key by.
fn tie(table: pg_sys::Oid, key: &str, other: pg_sys::Oid, theirs: &str) -> Result<Refusal, Refusal> {
    let (own, other) = (name_of(table)?, name_of(other)?);
    Ok(Refusal::new(
        PgSqlErrorCode::ERRCODE_DUPLICATE_OBJECT,
        format!(
            "key template \"{key}\" of table \"{own}\" could make a key that \"{theirs}\" of table \"{other}\" makes too"
        ),
        "Choose another key, with another prefix: key => 'schema.table:{id}'.",
    ))
}

/// The name of a table, as SQL writes it.
fn name_of(table: pg_sys::Oid) -> Result<String, Refusal> {
    query("SELECT $1::oid::regclass::text AS name", &[table]).map(|rows| single(rows).unwrap_or_default())
}

/// The one value that a query returned.
fn single(rows: Vec<Texts>) -> Option<String> {
    rows.into_iter().flatten().flatten().next()
}

/// A row of text columns; booleans are "t" and "f".
type Texts = Vec<Option<String>>;

/// Runs a catalog query whose parameters are oids, and returns its columns as text. Each row travels as JSON in UTF-8, because
/// names in other database encodings are no Rust strings.
fn query(sql: &str, oids: &[pg_sys::Oid]) -> Result<Vec<Texts>, Refusal> {
    let failed = |error: String| {
        Refusal::new(
            PgSqlErrorCode::ERRCODE_INTERNAL_ERROR,
            format!("walmirror could not read the catalogs: {error}"),
            "Report this.",
        )
    };
    let wrapped = format!(
        "SELECT pg_catalog.convert_to(pg_catalog.row_to_json(r)::pg_catalog.text, 'UTF8') FROM ({sql}) r"
    );
    let mut texts = Vec::new();
    for json in catalog_query::rows(&wrapped, oids).map_err(failed)? {
        let object: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(&json).map_err(|error| failed(error.to_string()))?;
        texts.push(object.into_iter().map(|(_, value)| text(value)).collect());
    }
    Ok(texts)
}

fn text(value: serde_json::Value) -> Option<String> {
    match value {
        serde_json::Value::Null => None,
        serde_json::Value::Bool(value) => Some(if value { "t" } else { "f" }.to_owned()),
        serde_json::Value::String(text) => Some(text),
        other => Some(other.to_string()),
    }
}
