//! The rows and definitions of the model's tables, how they look on the wire, and what Redis must hold for them.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use walmirror_proto::pb::{self, Column, Encoding, Mode, OnWrite, ValueKind};
use walmirror_proto::writer::TupleBuilder;

use super::redis::Stored;

pub(super) type Id = u8;

/// The table whose key is of two columns, hi and lo, in the place of id: where its row gets another id, often one of them changes.
const SPLIT: u32 = 102;
/// How many ids have the same hi.
const IN_HI: Id = 3;
/// The table whose keys others could make too, because its template is more specific.
pub(super) const NARROW: u32 = 104;
/// The table that has what the keys of others begin with when they have it no longer: as if one of them had been dropped, and made anew.
pub(super) const NEXT: u32 = 105;
/// What the ids of the tables that it takes keys from look like: those from `TAKEN` to `TAKEN` + 2 can be its keys, that of the last is
/// longer than a key may be.
const TAKEN: Id = 3;
const LONG: Id = 6;
pub(super) const KEY_BYTES: usize = 100;
/// What it begins its keys with, and how it is mirrored.
pub(super) const TAKING: [(&str, Mode); 7] = [
    ("a0:x:", Mode::Mirror),
    ("a1:x:", Mode::Mirror),
    ("a0:x:", Mode::Cache),
    ("b0:1:", Mode::Mirror),
    ("b1:1:", Mode::Cache),
    ("c0:x:", Mode::Mirror),
    ("d:", Mode::Mirror),
];

/// A row of columns id text, v int, big text (which may be TOASTed). Every write gives `v` a value of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) id: Id,
    pub(super) v: u64,
    pub(super) big: Option<String>,
}

/// A version of a table and its label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Definition {
    pub(super) oid: u32,
    pub(super) fingerprint: u64,
    pub(super) prefix: String,
    pub(super) mode: Mode,
    pub(super) value: ValueKind,
    pub(super) on_write: OnWrite,
    /// How often its values were renamed (ALTER TYPE): each is printed in another way then, and no fingerprint tells.
    pub(super) renames: u64,
}

impl Definition {
    pub(super) fn relation(&self, index: u32) -> pb::Relation {
        let column = |name: &str, encoding: Encoding, in_value| Column {
            name: name.into(),
            encoding: encoding.into(),
            in_value,
            ..Column::default()
        };
        let all = self.value != ValueKind::String;
        pb::Relation {
            index,
            oid: self.oid,
            schema: "public".into(),
            name: format!("t{}", self.oid),
            mode: self.mode.into(),
            value: self.value.into(),
            on_write: self.on_write.into(),
            key: format!(
                "{}{}",
                self.prefix,
                if self.is_split() { "{hi}:{lo}" } else { "{id}" }
            ),
            fingerprint: self.fingerprint,
            columns: (name(self.oid, 0)
                .parts
                .iter()
                .map(|(name, _)| column(name, Encoding::Text, all)))
            .chain([
                column("v", Encoding::Int, all),
                column("big", Encoding::Text, true),
            ])
            .collect(),
            ..pb::Relation::default()
        }
    }

    fn is_split(&self) -> bool {
        self.oid == SPLIT
    }

    /// Whether its keys may have been those of another table, in a history that is lost perhaps.
    pub(super) fn is_shared(&self) -> bool {
        self.oid != SPLIT && self.oid != NARROW
    }

    /// Whether Redis takes the key of this row.
    pub(super) fn is_short(&self, id: Id) -> bool {
        self.prefix.len() + name(self.oid, id).joined.len() <= KEY_BYTES
    }

    /// Whether a key that this label can make is that of a table whose keys begin with `other`, which is more specific. What comes behind
    /// is no matter in this model.
    pub(super) fn is_taken_by(&self, other: &str, key: &[u8]) -> bool {
        other.len() > self.prefix.len() && key.starts_with(other.as_bytes())
    }

    /// Whether such a table could take the key.
    pub(super) fn may_be_taken(&self, key: &[u8]) -> bool {
        TAKING.iter().any(|(other, _)| self.is_taken_by(other, key))
    }

    /// The big column as it is printed.
    fn big(&self, row: &Row) -> Option<String> {
        let big = row.big.as_ref()?;
        Some(match self.renames {
            0 => big.clone(),
            renames => format!("{big}~{renames}"),
        })
    }

    pub(super) fn key(&self, id: Id) -> Vec<u8> {
        [self.prefix.as_bytes(), name(self.oid, id).joined.as_bytes()].concat()
    }

    /// What Redis holds for the row; None: no key.
    pub(super) fn stored(&self, row: Option<&Row>) -> Option<Stored> {
        let row = row.filter(|row| self.is_short(row.id))?;
        match self.value {
            ValueKind::Hash => {
                let mut fields = BTreeMap::from([(b"v".to_vec(), row.v.to_string().into_bytes())]);
                let parts = name(self.oid, row.id).parts.iter();
                fields
                    .extend(parts.map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec())));
                fields.extend(self.big(row).map(|big| (b"big".to_vec(), big.into_bytes())));
                Some(Stored::Hash(fields))
            }
            ValueKind::String => Some(Stored::Text(self.big(row)?.into_bytes())),
            ValueKind::Json => {
                let big = self
                    .big(row)
                    .map_or("null".to_owned(), |big| format!("\"{big}\""));
                let parts = name(self.oid, row.id).parts.iter();
                let parts: String = parts
                    .map(|(name, value)| format!("\"{name}\": \"{value}\", "))
                    .collect();
                let text = format!("{{\"v\": {}, {parts}\"big\": {big}}}", row.v);
                Some(Stored::Text(text.into_bytes()))
            }
        }
    }

    /// What `walmirror.pack` makes of a row.
    pub(super) fn pack(&self, row: &Row) -> Vec<u8> {
        let mut bytes = self.fingerprint.to_be_bytes().to_vec();
        tuple(self, row, false).write_tuple(&mut bytes);
        bytes
    }
}

/// The row as the decoder writes it; `unchanged`: without the big column.
pub(super) fn tuple(definition: &Definition, row: &Row, unchanged: bool) -> TupleBuilder {
    let mut tuple = TupleBuilder::new();
    for (_, value) in &name(definition.oid, row.id).parts {
        tuple.text(value.as_bytes());
    }
    tuple.int(row.v as i64);
    match definition.big(row) {
        _ if unchanged => tuple.unchanged(),
        Some(big) => tuple.text(big.as_bytes()),
        None => tuple.null(),
    }
    tuple
}

/// The key columns only.
pub(super) fn key_tuple(definition: &Definition, id: Id) -> TupleBuilder {
    let mut tuple = TupleBuilder::new();
    for (_, value) in &name(definition.oid, id).parts {
        tuple.text(value.as_bytes());
    }
    tuple.null();
    tuple.null();
    tuple
}

/// What a row is called: the columns of its key and their values, and these as they stand in a key.
struct Name {
    parts: Vec<(&'static str, String)>,
    joined: String,
}

/// Made once: the simulator asks for them all the time. A mix of two ids may be one that no row has.
static NAMES: LazyLock<BTreeMap<u32, Vec<Name>>> = LazyLock::new(|| {
    let ids = 0..IN_HI * IN_HI;
    let names = |oid| ids.clone().map(|id| named(oid, id)).collect();
    super::postgres::OIDS
        .into_iter()
        .map(|oid| (oid, names(oid)))
        .collect()
});

fn name(oid: u32, id: Id) -> &'static Name {
    &NAMES[&oid][usize::from(id)]
}

fn named(oid: u32, id: Id) -> Name {
    let parts = match (oid, id) {
        (SPLIT, _) => vec![("hi", (id / IN_HI).to_string()), ("lo", (id % IN_HI).to_string())],
        (NARROW, _) | (_, ..TAKEN) => vec![("id", id.to_string())],
        (_, LONG) => vec![("id", "l".repeat(KEY_BYTES))],
        _ => vec![("id", format!("x:{}", id - TAKEN))],
    };
    let values: Vec<_> = parts.iter().map(|(_, value)| value.as_str()).collect();
    let joined = values.join(":");
    Name { parts, joined }
}

/// The row that a key is of, by what the template of the table's key found in it.
pub(super) fn row_of(oid: u32, values: &[Vec<u8>]) -> Option<Id> {
    let is_of = |id: &Id| {
        let parts = name(oid, *id).parts.iter();
        parts.map(|(_, value)| value.as_bytes()).eq(values)
    };
    (0..super::postgres::IDS).find(is_of)
}

/// An id with the hi of one and the lo of another.
pub(super) fn mixed(hi: Id, lo: Id) -> Id {
    hi / IN_HI * IN_HI + lo % IN_HI
}
