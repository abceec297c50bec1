//! `walmirror.pack(record)`: a row of a labelled table as the stream would carry it, for backfill and verify.

use std::cell::RefCell;

use pgrx::pg_sys;
use pgrx::prelude::*;
use walmirror_proto::writer::{self, TupleBuilder};

use super::datum::{Row, Tuple};
use super::failure;
use super::memory::Context;
use super::relation::Rel;
use super::session::TextSession;
use crate::encode::{self, Columns};
use crate::error::Refusal;
use crate::tables::{Table, Tables};

/// What one session's calls share.
struct Packer {
    tables: Tables,
    row: Row,
    tuple: TupleBuilder,
    bytes: Vec<u8>,
    context: Context,
    /// The table of the last call, by its row type.
    last: Option<(pg_sys::Oid, pg_sys::Oid)>,
}

thread_local! {
    static PACKER: RefCell<Option<Packer>> = const { RefCell::new(None) };
}

/// The version-1 calling convention's record (PG_FUNCTION_INFO_V1).
#[unsafe(no_mangle)]
pub extern "C" fn pg_finfo_walmirror_pack() -> &'static pg_sys::Pg_finfo_record {
    const V1: pg_sys::Pg_finfo_record = pg_sys::Pg_finfo_record { api_version: 1 };
    &V1
}

/// `pack(record) RETURNS bytea`, strict: the fingerprint of the table's definition, 8 bytes, most significant first, and
/// the row as a Tuple message. Of a row that cannot be encoded only the key is told, the rest as unchanged, with a WARNING; where that
/// goes for its key, all is NULL.
///
/// # Safety
/// Called by the function manager with one non-NULL argument of a composite type.
#[unsafe(no_mangle)]
#[pg_guard]
pub unsafe extern "C-unwind" fn walmirror_pack(call: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    // SAFETY: a strict function of one argument; a record is a varlena whose content starts with a HeapTupleHeader.
    let (row_type, mut tuple) = unsafe {
        let argument = (*call)
            .args
            .as_slice(1)
            .first()
            .map_or(pg_sys::Datum::null(), |argument| argument.value);
        let header = pg_sys::pg_detoast_datum(argument.cast_mut_ptr()).cast::<pg_sys::HeapTupleHeaderData>();
        let length = header.cast::<u32>().read_unaligned() >> 2;
        let tuple = pg_sys::HeapTupleData {
            t_len: length,
            t_data: header,
            ..Default::default()
        };
        ((*header).t_choice.t_datum.datum_typeid, tuple)
    };
    PACKER.with_borrow_mut(|packer| {
        let packer = packer.get_or_insert_with(Packer::new);
        // SAFETY: the tuple lives on this stack frame and points into the argument.
        let Some(tuple) = (unsafe { Tuple::from_raw(&raw mut tuple) }) else {
            return pg_sys::Datum::null();
        };
        match packer.pack(row_type, tuple) {
            Ok(()) => {
                let packed = bytea(&packer.bytes);
                packer.tuple.clear();
                writer::empty(&mut packer.bytes);
                packed
            }
            Err(refusal) => refusal.raise(),
        }
    })
}

impl Packer {
    fn new() -> Self {
        super::hooks::register_callbacks();
        let context = Context::top().child(c"walmirror pack");
        Self {
            tables: Tables::new(context, false),
            row: Row::default(),
            tuple: TupleBuilder::new(),
            bytes: Vec::new(),
            context: context.child(c"walmirror row"),
            last: None,
        }
    }

    fn pack(&mut self, row_type: pg_sys::Oid, tuple: Tuple) -> Result<(), Refusal> {
        let table = match self.last {
            Some((last, table)) if last == row_type => table,
            _ => {
                // SAFETY: a syscache look-up.
                let table = unsafe { pg_sys::get_typ_typrelid(row_type) };
                self.last = Some((row_type, table));
                table
            }
        };
        let not_a_table = || {
            Refusal::invalid(
                "walmirror.pack() takes the row of a mirrored table",
                "SELECT walmirror.pack(t.*) FROM users t",
            )
        };
        let table = Rel::open(table).ok_or_else(not_a_table)?;
        let plan = match self.tables.get(&table) {
            Table::Configured(plan) => plan,
            Table::Broken(refusal) => {
                return Err(Refusal::object(refusal.message.clone(), refusal.hint.clone()));
            }
            Table::Unconfigured => {
                return Err(Refusal::object(
                    format!("table \"{}\" is not mirrored", table.name()),
                    "SELECT walmirror.mirror('table') configures it.",
                ));
            }
        };
        self.row.deform(tuple, &table.descriptor());
        let result = {
            let _entered = self.context.enter();
            let _session = TextSession::enter(plan.needs);
            encode::encode(plan, &self.row, None, Columns::All, &mut self.tuple).or_else(|error| {
                warning!("walmirror: table \"{}\": {}", table.name(), error.reason);
                encode::encode(plan, &self.row, None, Columns::KeyOnly, &mut self.tuple)
            })
        };
        self.context.reset();
        if result.is_err() {
            self.tuple.clear();
            plan.fields.iter().for_each(|_| self.tuple.null());
        }
        writer::empty(&mut self.bytes);
        let fingerprint = plan.relation.fingerprint.to_be_bytes();
        let length = fingerprint.len() + self.tuple.encoded_len();
        if self.bytes.try_reserve_exact(length).is_err() {
            failure::out_of_memory(length);
        }
        self.bytes.extend_from_slice(&fingerprint);
        self.tuple.write_tuple(&mut self.bytes);
        Ok(())
    }
}

/// A bytea in the current memory context.
fn bytea(bytes: &[u8]) -> pg_sys::Datum {
    let length = bytes.len() + 4;
    // SAFETY: palloc returns at least `length` bytes, or raises an error for more than 1 GB; the 4-byte header is the
    // length shifted by two (SET_VARSIZE).
    unsafe {
        let start = pg_sys::palloc(length).cast::<u8>();
        start.cast::<u32>().write_unaligned((length as u32) << 2);
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), start.add(4), bytes.len());
        pg_sys::Datum::from(start)
    }
}
