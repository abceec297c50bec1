//! Values of a row: deformed tuples and what their datums hold.

use std::slice;

use pgrx::pg_sys;

use super::relation::TupleDesc;

/// One value as Postgres passes it: a number, or a pointer to more.
#[derive(Debug, Clone, Copy)]
pub struct Raw(pg_sys::Datum);

/// A variable-length value (`struct varlena`).
pub enum Varlena<'a> {
    /// The value's bytes, without header, where they stand.
    Inline(&'a [u8]),
    /// A TOASTed value that the change left alone; it is not in the WAL.
    Unchanged,
    /// Compressed, or assembled from TOAST chunks: [`Raw::detoast`] makes it plain.
    Packed,
}

/// A heap tuple that the reorder buffer or an executor owns.
#[derive(Clone, Copy)]
pub struct Tuple(pg_sys::HeapTuple);

impl Tuple {
    /// Wraps a tuple; `None` for NULL.
    ///
    /// # Safety
    /// `raw` must be NULL or a heap tuple that stays valid, unchanged, for every use of the result.
    pub unsafe fn from_raw(raw: pg_sys::HeapTuple) -> Option<Self> {
        (!raw.is_null()).then_some(Self(raw))
    }
}

/// The columns of one tuple, taken apart. The vectors are reused from row to row.
#[derive(Default)]
pub struct Row {
    values: Vec<pg_sys::Datum>,
    nulls: Vec<bool>,
}

impl Row {
    /// Takes a tuple apart (`heap_deform_tuple`): one call for all columns. Columns that were added after the tuple was
    /// written get their default (`getmissingattr`).
    pub fn deform(&mut self, tuple: Tuple, descriptor: &TupleDesc<'_>) {
        let columns = descriptor.len();
        self.values.resize(columns, pg_sys::Datum::null());
        self.nulls.resize(columns, true);
        // SAFETY: the tuple is valid (Tuple::from_raw) and of this descriptor's relation, and both arrays hold as many
        // items as the descriptor has columns, which is what heap_deform_tuple fills in.
        unsafe {
            pg_sys::heap_deform_tuple(
                tuple.0,
                descriptor.raw(),
                self.values.as_mut_ptr(),
                self.nulls.as_mut_ptr(),
            )
        }
    }

    /// Takes over values that an executor slot has taken apart.
    pub(super) fn copy(&mut self, values: &[pg_sys::Datum], nulls: &[bool]) {
        self.values.clear();
        self.values.extend_from_slice(values);
        self.nulls.clear();
        self.nulls.extend_from_slice(nulls);
    }

    /// Puts another value in place of a column's.
    pub(super) fn set(&mut self, column: usize, value: Raw) {
        if let Some(place) = self.values.get_mut(column) {
            *place = value.0;
        }
    }

    /// The value of a column (0-based); `None` for NULL.
    #[inline]
    pub fn get(&self, column: usize) -> Option<Raw> {
        match (self.nulls.get(column), self.values.get(column)) {
            (Some(false), Some(&value)) => Some(Raw(value)),
            _ => None,
        }
    }
}

impl Raw {
    /// The word itself, for by-value types: truncate it to the type's width.
    #[inline]
    pub fn word(self) -> usize {
        self.0.value()
    }

    /// The datum, for a function call.
    pub(super) fn datum(self) -> pg_sys::Datum {
        self.0
    }

    /// The bytes of a fixed-length by-reference value (uuid: 16, name: 64).
    ///
    /// # Safety
    /// The value must be of a by-reference type of at least `length` bytes, in a tuple that outlives `'a`.
    #[inline]
    pub unsafe fn fixed<'a>(self, length: usize) -> &'a [u8] {
        // SAFETY: by the caller's promise the datum points to `length` bytes.
        unsafe { slice::from_raw_parts(self.0.cast_mut_ptr::<u8>(), length) }
    }

    /// The bytes of a variable-length value, as far as they stand there plainly (the varlena headers of postgres.h).
    ///
    /// # Safety
    /// The value must be of a type with typlen -1, in a tuple that outlives `'a`.
    #[inline]
    pub unsafe fn varlena<'a>(self) -> Varlena<'a> {
        // SAFETY: the datum points to a varlena, which is at least one byte long; what is read further is within the
        // length that its header tells.
        unsafe {
            let start = self.0.cast_mut_ptr::<u8>();
            let first = *start;
            if first & 0x01 == 0x01 {
                if first == 0x01 {
                    // VARATT_IS_EXTERNAL: on disk means that the change did not touch it.
                    return if u32::from(*start.add(1)) == pg_sys::vartag_external::VARTAG_ONDISK {
                        Varlena::Unchanged
                    } else {
                        Varlena::Packed
                    };
                }
                let length = usize::from(first >> 1);
                return Varlena::Inline(slice::from_raw_parts(start.add(1), length.saturating_sub(1)));
            }
            if first & 0x03 == 0x02 {
                return Varlena::Packed;
            }
            let length = (start.cast::<u32>().read_unaligned() >> 2) as usize;
            Varlena::Inline(slice::from_raw_parts(start.add(4), length.saturating_sub(4)))
        }
    }

    /// A packed value made plain (`pg_detoast_datum_packed`), in the current memory context.
    ///
    /// # Safety
    /// As for [`Raw::varlena`], and the value must not be [`Varlena::Unchanged`]: its chunks may be gone. `'a` must not
    /// outlive the current memory context's contents.
    pub unsafe fn detoast<'a>(self) -> &'a [u8] {
        // SAFETY: by the caller's promise; detoasting returns a plain varlena.
        unsafe {
            match self.detoasted().varlena() {
                Varlena::Inline(bytes) => bytes,
                Varlena::Unchanged | Varlena::Packed => &[],
            }
        }
    }

    /// The same as a value.
    ///
    /// # Safety
    /// As for [`Raw::detoast`].
    pub unsafe fn detoasted(self) -> Self {
        // SAFETY: the datum is a varlena that is not on disk.
        let plain = unsafe { pg_sys::pg_detoast_datum_packed(self.0.cast_mut_ptr()) };
        Self(pg_sys::Datum::from(plain))
    }
}

impl From<pg_sys::Datum> for Raw {
    fn from(datum: pg_sys::Datum) -> Self {
        Self(datum)
    }
}
