//! One change into one record of the frame: what is encoded of the old row and of the new one, and what is left of a row
//! that cannot be encoded.

use walmirror_proto::key::KeyTemplate;
use walmirror_proto::pb::{self, Kind};
use walmirror_proto::row::{self, Datum, TupleRef};
use walmirror_proto::writer::{FrameWriter, TupleBuilder};

use super::Change;
use crate::encode::{self, Columns, EncodeError};
use crate::ffi::datum::Row;
use crate::ffi::failure;
use crate::ffi::memory::Context;
use crate::ffi::relation::Rel;
use crate::ffi::session::TextSession;
use crate::ffi::value::LARGE_BYTES;
use crate::plan::Plan;

/// What a change is encoded in; reused from row to row.
pub(super) struct Buffers {
    context: Context,
    new_row: Row,
    old_row: Row,
    new: TupleBuilder,
    old_key: TupleBuilder,
    new_key: TupleBuilder,
}

impl Buffers {
    /// Buffers whose memory for the values of a row is a child of `context`.
    pub(super) fn new(context: Context) -> Self {
        Self {
            context: context.child(c"walmirror row"),
            new_row: Row::default(),
            old_row: Row::default(),
            new: TupleBuilder::new(),
            old_key: TupleBuilder::new(),
            new_key: TupleBuilder::new(),
        }
    }

    /// Encodes a change and appends its record to the frame.
    pub(super) fn write(
        &mut self,
        plan: &mut Plan,
        table: &Rel,
        change: Change,
        index: u32,
        frame: &mut FrameWriter,
    ) -> Result<(), EncodeError> {
        let descriptor = table.descriptor();
        let entered = self.context.enter();
        let session = TextSession::enter(plan.needs);
        plan.know_row_types();
        let result = match change {
            Change::Insert(new) => {
                self.new_row.deform(new, &descriptor);
                encode::encode(plan, &self.new_row, None, Columns::All, &mut self.new)
                    .map(|()| append(frame, Kind::Insert, index, &self.new, None))
            }
            Change::Delete(old) => {
                self.old_row.deform(old, &descriptor);
                encode::encode(plan, &self.old_row, None, Columns::Key, &mut self.old_key)
                    .map(|()| append(frame, Kind::Delete, index, &self.old_key, None))
            }
            Change::Lost => Ok(()),
            Change::Update { old: None, new } => {
                self.new_row.deform(new, &descriptor);
                encode::encode(plan, &self.new_row, None, Columns::All, &mut self.new)
                    .map(|()| append(frame, Kind::Update, index, &self.new, None))
            }
            Change::Update { old: Some(old), new } => {
                self.new_row.deform(new, &descriptor);
                self.old_row.deform(old, &descriptor);
                self.encode_update(plan).map(|moved| {
                    append(
                        frame,
                        Kind::Update,
                        index,
                        &self.new,
                        moved.then_some(&self.old_key),
                    )
                })
            }
        };
        drop(session);
        drop(entered);
        self.context.reset();
        // A large row gives back what it took.
        self.new.clear();
        result
    }

    /// Encodes an update whose old row, or old key, is known; tells whether the key changed.
    fn encode_update(&mut self, plan: &mut Plan) -> Result<bool, EncodeError> {
        encode::encode(
            plan,
            &self.new_row,
            Some(&self.old_row),
            Columns::All,
            &mut self.new,
        )?;
        encode::encode(plan, &self.old_row, None, Columns::Key, &mut self.old_key)?;
        encode::encode(
            plan,
            &self.new_row,
            Some(&self.old_row),
            Columns::Key,
            &mut self.new_key,
        )?;
        Ok(self.old_key != self.new_key)
    }

    /// Deletes the keys of a row that could not be encoded: where it would be, and where it was.
    pub(super) fn write_deletes(
        &mut self,
        plan: &mut Plan,
        change: Change,
        index: u32,
        frame: &mut FrameWriter,
    ) {
        let entered = self.context.enter();
        let session = TextSession::enter(plan.needs);
        if let Change::Update { old: Some(_), .. } = change
            && encode::encode(plan, &self.old_row, None, Columns::Key, &mut self.old_key).is_ok()
        {
            frame.row(Kind::Delete, index, &self.old_key, None);
        }
        let (row, old) = match change {
            Change::Delete(_) => (&self.old_row, None),
            Change::Update { old: Some(_), .. } => (&self.new_row, Some(&self.old_row)),
            Change::Insert(_) | Change::Update { old: None, .. } | Change::Lost => (&self.new_row, None),
        };
        if encode::encode(plan, row, old, Columns::Key, &mut self.new_key).is_ok() {
            frame.row(Kind::Delete, index, &self.new_key, None);
        }
        drop(session);
        drop(entered);
        self.context.reset();
    }

    /// The key of a row that could not be encoded, as far as it can be told; for the Error record.
    pub(super) fn key_text(&mut self, plan: &mut Plan, change: Change) -> String {
        let row = if matches!(change, Change::Delete(_)) {
            &self.old_row
        } else {
            &self.new_row
        };
        let _entered = self.context.enter();
        let _session = TextSession::enter(plan.needs);
        if encode::encode(plan, row, None, Columns::Key, &mut self.new_key).is_err() {
            return String::new();
        }
        let mut tuple = Vec::new();
        self.new_key.write_tuple(&mut tuple);
        render_key(&plan.relation, &tuple).unwrap_or_default()
    }
}

/// Appends a row to the frame. Room for a large one is made first.
#[inline]
fn append(
    frame: &mut FrameWriter,
    kind: Kind,
    index: u32,
    new: &TupleBuilder,
    old_key: Option<&TupleBuilder>,
) {
    if new.text_bytes() >= LARGE_BYTES && frame.try_reserve(new, old_key).is_err() {
        failure::out_of_memory(new.encoded_len());
    }
    frame.row(kind, index, new, old_key);
}

/// The key of an encoded row; `None` if it has none.
fn render_key(relation: &pb::Relation, tuple: &[u8]) -> Option<String> {
    let template = KeyTemplate::parse(&relation.key).ok()?;
    let encodings = row::encodings(relation).ok()?;
    let values: Vec<Datum<'_>> = TupleRef::parse(tuple)
        .ok()?
        .datums(&encodings)
        .collect::<Result<_, _>>()
        .ok()?;
    let columns: Vec<Datum<'_>> = template
        .placeholders()
        .iter()
        .map(|name| key_column(relation, &values, name))
        .collect::<Option<_>>()?;
    if columns
        .iter()
        .any(|value| matches!(value, Datum::Null | Datum::Unchanged))
    {
        return None;
    }
    let mut key = Vec::new();
    template
        .render(
            |at, out| {
                if let Some(value) = columns.get(at) {
                    value.write_text(out)
                }
            },
            &mut key,
        )
        .ok()?;
    Some(String::from_utf8_lossy(&key).into_owned())
}

/// The value that the key takes for a column: the one that is there for the key alone, if there is one.
fn key_column<'a>(relation: &pb::Relation, values: &[Datum<'a>], name: &str) -> Option<Datum<'a>> {
    let named = || {
        relation
            .columns
            .iter()
            .zip(values)
            .filter(|(column, _)| column.name == name)
    };
    named()
        .find(|(column, _)| !column.in_value)
        .or_else(|| named().next())
        .map(|(_, value)| *value)
}
