//! The plan of a table: which columns to send, and how to read and encode each.
//!
//! Made by [`Plan::build`] from the table's label and columns, as of the snapshot in force. A partition has a plan of its
//! own (its columns may stand in another order) with the relation of the table that carries the label.

use pgrx::pg_sys;
use prost::Message;
use walmirror_proto::key::KeyTemplate;
use walmirror_proto::pb;
use xxhash_rust::xxh3::xxh3_64;

use crate::error::Refusal;
use crate::ffi::catalog_types;
use crate::ffi::datum::Row;
use crate::ffi::function::Function;
use crate::ffi::memory::Context;
use crate::ffi::relation::{self, Column, Rel};
use crate::ffi::row_types;
use crate::ffi::session::Needs;
use crate::ffi::{text, value};
use crate::label::{Label, Value};
use types::Form;

pub mod types;

/// How to encode the rows of one table.
pub struct Plan {
    /// What readers of the stream are told; `index` is 0.
    pub relation: pb::Relation,
    /// One for each column of `relation`, in the same order.
    pub fields: Vec<Field>,
    /// A hash of `relation`: another value, another definition to send.
    pub identity: u64,
    /// Which settings the functions that read its columns depend on.
    pub needs: Needs,
    /// The row types whose columns these functions look up.
    row_types: Vec<pg_sys::Oid>,
    /// How the stream of this session names the table, once it was met.
    pub index: Option<u32>,
    /// Whether the WAL tells which key a row had before it was changed. Labels are refused where it does not, and so is DDL that
    /// would break it.
    pub identified: bool,
    /// Holds what the functions cache.
    context: Context,
}

/// Who sees to it that a key tells rows apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unique {
    /// A plan without it is refused.
    Required,
    /// The caller.
    Elsewhere,
}

/// One column of the stream.
pub struct Field {
    /// Where the value stands in this table's (or partition's) tuples.
    pub position: usize,
    /// How to read it.
    pub read: Read,
    /// Whether the key template names it.
    pub in_key: bool,
}

/// How to read a value and encode it.
pub enum Read {
    Bool,
    Int2,
    Int4,
    Int8,
    Oid,
    Float4,
    Float8,
    /// With the output function, for what does not fit 18 digits.
    Numeric(Function),
    Date,
    /// timestamp and timestamptz.
    Timestamp,
    Uuid,
    Bytea,
    /// The bytes of a varlena are the text.
    Text,
    /// char(n): a cast to text drops the padding.
    Blanked,
    /// `name`.
    Name,
    /// By the type's output function.
    Output {
        function: Function,
        varlena: bool,
    },
    /// By the type's cast function to text.
    Cast {
        function: Function,
        varlena: bool,
    },
    /// By to_jsonb, as text.
    Json {
        to_jsonb: Function,
        out: Function,
        varlena: bool,
    },
}

impl Plan {
    /// The plan of a table; `None` if neither it nor a table that it is a partition of has a label.
    ///
    /// `historic` tells that this runs in a decoding callback. `parent` is the memory context to live in.
    pub fn build(table: &Rel, historic: bool, parent: Context) -> Result<Option<Self>, Refusal> {
        let Some((root, label)) = labelled(table, historic) else {
            return Ok(None);
        };
        let root = root.as_ref().unwrap_or(table);
        let label = Label::parse(&label)?;
        // A label may be there before what its key rests on, as in a restore, and nobody can tell whether that is still to come.
        Self::resolve(table, root, &label, parent, Unique::Required).map(Some)
    }

    /// The plan that a table would have with this label, once its key is unique.
    pub fn for_label(table: &Rel, label: &Label, parent: Context) -> Result<Self, Refusal> {
        Self::resolve(table, table, label, parent, Unique::Elsewhere)
    }

    fn resolve(
        table: &Rel,
        root: &Rel,
        label: &Label,
        parent: Context,
        unique: Unique,
    ) -> Result<Self, Refusal> {
        let name = root.name();
        let key = match &label.key {
            Some(key) => key.clone(),
            None => default_key(&name, &root.primary_key()).ok_or_else(|| {
                Refusal::object(
                    format!("table \"{name}\" has no primary key"),
                    "Add a primary key, or name a key template in the label.",
                )
            })?,
        };
        let template = KeyTemplate::parse(&key)
            .map_err(|error| Refusal::invalid(format!("key template \"{key}\": {error}"), KEY_HINT))?;
        let columns: Vec<Column> = root
            .columns()
            .into_iter()
            .filter(|column| !column.is_virtual)
            .collect();
        check_names(&name, &columns, template.placeholders(), label)?;
        check_types(&name, &columns, label)?;
        if unique == Unique::Required && !root.is_unique(template.placeholders()) {
            return Err(not_unique(&name, template.placeholders()));
        }

        let positions = table.columns();
        let mut places = Vec::with_capacity(columns.len());
        for column in &columns {
            let own = positions
                .iter()
                .find(|own| own.name == column.name)
                .ok_or_else(|| {
                    Refusal::object(
                        format!("partition \"{}\" has no column \"{}\"", table.name(), column.name),
                        "Detach it or add the column.",
                    )
                })?;
            places.push(own.position);
        }

        // An ERROR in what follows frees it with what is current; `parent` may live as long as the session.
        let context = Context::current().child(c"walmirror plan");
        let mut plan = Self {
            relation: pb::Relation {
                index: 0,
                oid: u32::from(root.oid()),
                schema: root.schema(),
                mode: pb::Mode::from(label.mode) as i32,
                value: pb::ValueKind::from(label.value) as i32,
                key,
                ttl_ms: label.ttl_ms.unwrap_or(0),
                on_write: pb::OnWrite::from(label.on_write) as i32,
                capture: label.capture,
                name,
                ..Default::default()
            },
            fields: Vec::with_capacity(columns.len()),
            identity: 0,
            needs: Needs::Nothing,
            row_types: Vec::new(),
            index: None,
            identified: table.is_partitioned() || table.identifies(template.placeholders()),
            context,
        };
        for (column, position) in columns.iter().zip(places) {
            let in_key = template.placeholders().contains(&column.name);
            let in_value = label
                .columns
                .as_ref()
                .is_none_or(|names| names.contains(&column.name));
            plan.add_column(column, position, in_key, in_value, label.value);
        }
        plan.seal();
        context.move_to(parent);
        Ok(plan)
    }

    /// Whether encoding a row takes nothing but the row: no function of a type, no TOAST table, no other encoding.
    pub fn reads_only(&self, row: &Row) -> bool {
        let toasted = |field: &Field| value::is_toasted(&field.read, row, field.position);
        self.needs == Needs::Nothing && text::is_sent_plain() && !self.fields.iter().any(toasted)
    }

    /// Sees to it that no function which reads a value waits for a lock on a row type. For decoding callbacks.
    pub fn know_row_types(&self) {
        self.row_types.iter().copied().for_each(row_types::know);
    }

    /// The same for a query that reads the table. `false` where somebody has a row type locked.
    pub fn know_row_types_at_once(&self) -> bool {
        self.row_types.iter().copied().all(row_types::know_at_once)
    }

    /// Fetches the TOASTed values of a row that a query read. `false` if one is larger than `max_bytes`.
    pub fn fetch_toasted(&self, row: &mut Row, max_bytes: usize) -> bool {
        self.fields
            .iter()
            .all(|field| value::fetch_toasted(&field.read, row, field.position, max_bytes))
    }

    /// A column of the value whose JSON differs from its text stands twice when the key needs the text.
    fn add_column(&mut self, column: &Column, position: usize, in_key: bool, in_value: bool, value: Value) {
        let json = value == Value::Json && types::json_differs(column.type_oid);
        if in_value && json {
            self.add_field(column, position, false, true, Form::Json);
        }
        if in_key && (json || !in_value) {
            self.add_field(column, position, true, false, Form::Text);
        } else if in_value && !json {
            self.add_field(column, position, in_key, true, Form::Text);
        }
    }

    fn add_field(&mut self, column: &Column, position: usize, in_key: bool, in_value: bool, form: Form) {
        let (encoding, read) = types::reading(column.type_oid, form, self.context);
        if matches!(read, Read::Output { .. } | Read::Cast { .. } | Read::Json { .. }) {
            self.needs = self.needs.max(types::needs(column.type_oid));
            for row_type in types::row_types(column.type_oid) {
                if !self.row_types.contains(&row_type) {
                    self.row_types.push(row_type);
                }
            }
        }
        self.relation.columns.push(pb::Column {
            name: column.name.clone(),
            type_oid: u32::from(column.type_oid),
            encoding: encoding as i32,
            in_value,
        });
        self.fields.push(Field {
            position,
            read,
            in_key,
        });
    }

    /// Computes the hashes. The fingerprint leaves out the table's name and schema: a rename changes no key or value.
    fn seal(&mut self) {
        let nameless = pb::Relation {
            schema: String::new(),
            name: String::new(),
            ..self.relation.clone()
        };
        self.relation.fingerprint = xxh3_64(&nameless.encode_to_vec());
        self.identity = identity(&self.relation);
    }

    /// Frees what the plan holds in Postgres' memory. Not a destructor: after an ERROR Postgres has freed it already.
    pub fn release(self) {
        self.context.delete();
    }
}

/// A hash of a table's definition, with its name.
pub fn identity(relation: &pb::Relation) -> u64 {
    xxh3_64(&relation.encode_to_vec())
}

/// The label that holds for a table, and the table that carries it if it is another one.
fn labelled(table: &Rel, historic: bool) -> Option<(Option<Rel>, String)> {
    if !table.is_table() {
        return None;
    }
    if let Some(label) = table.label() {
        return Some((None, label));
    }
    if !table.is_partition() {
        return None;
    }
    let (root, label) = relation::ancestors(table.oid())
        .into_iter()
        .find_map(|oid| relation::label_of(oid).map(|label| (oid, label)))?;
    let root = if historic {
        Rel::open_historic(root)
    } else {
        Rel::open(root)
    };
    root.map(|root| (Some(root), label))
}

/// `<table>:{pk}`, `<table>:{pk1}:{pk2}`; `None` without a primary key.
pub fn default_key(table: &str, primary_key: &[String]) -> Option<String> {
    if primary_key.is_empty() {
        return None;
    }
    let mut key = table.replace('{', "{{").replace('}', "}}");
    for column in primary_key {
        key.push_str(":{");
        key.push_str(column);
        key.push('}');
    }
    Some(key)
}

fn check_names(
    table: &str,
    columns: &[Column],
    placeholders: &[String],
    label: &Label,
) -> Result<(), Refusal> {
    let missing = |name: &String| !columns.iter().any(|column| &column.name == name);
    if let Some(name) = placeholders.iter().find(|name| missing(name)) {
        return Err(Refusal::new(
            pgrx::PgSqlErrorCode::ERRCODE_UNDEFINED_COLUMN,
            format!("the key template names column \"{name}\", which table \"{table}\" does not have"),
            KEY_HINT,
        ));
    }
    let named = label.columns.as_deref().unwrap_or_default();
    if let Some(name) = named.iter().find(|name| missing(name)) {
        return Err(Refusal::new(
            pgrx::PgSqlErrorCode::ERRCODE_UNDEFINED_COLUMN,
            format!("\"columns\" names column \"{name}\", which table \"{table}\" does not store"),
            "Name columns of the table, exactly as \\d shows them; virtual generated columns are not stored.",
        ));
    }
    let values = if label.columns.is_some() {
        named.len()
    } else {
        columns.len()
    };
    if label.value == Value::String && values != 1 {
        return Err(Refusal::invalid(
            format!("value \"string\" takes exactly one column, but {values} are to be mirrored"),
            "Name the one column: columns => '{data}'. For several columns take value => 'hash' or 'json'.",
        ));
    }
    if values == 0 {
        return Err(Refusal::invalid(
            format!("no column of table \"{table}\" is to be mirrored"),
            "Name at least one column.",
        ));
    }
    Ok(())
}

/// The refusal of a key that several rows could have.
pub fn not_unique(table: &str, key: &[String]) -> Refusal {
    Refusal::object(
        format!(
            "the key of table \"{table}\" is not unique: no unique index consists of the columns that the key template names ({})",
            key.join(", ")
        ),
        "Name all columns of the primary key, or of a unique index that is not deferrable, partial or on expressions; add one if there is none.",
    )
}

/// No function that a user wrote may make the JSON of a value: it would run as whoever reads the row.
fn check_types(table: &str, columns: &[Column], label: &Label) -> Result<(), Refusal> {
    if label.value != Value::Json {
        return Ok(());
    }
    let named = |column: &&Column| {
        let names = label.columns.as_ref();
        names.is_none_or(|names| names.contains(&column.name))
    };
    for column in columns.iter().filter(named) {
        if let Some(inner) = types::users_json(column.type_oid) {
            let inner = catalog_types::name(inner);
            return Err(Refusal::object(
                format!(
                    "column \"{}\" of table \"{table}\" holds values of type {inner}, whose cast to json is not written in C",
                    column.name
                ),
                format!(
                    "Its function would run as whoever reads the table. DROP CAST ({inner} AS json); or leave the column out by columns => …, or take value => 'hash'."
                ),
            ));
        }
    }
    Ok(())
}

const KEY_HINT: &str =
    "A key template is text with {column} placeholders, like user:{id}; write {{ and }} for braces.";

/// The oid as pgrx writes it.
pub fn oid(number: u32) -> pg_sys::Oid {
    pg_sys::Oid::from(number)
}
