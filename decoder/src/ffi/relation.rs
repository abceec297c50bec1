//! Relations and what the catalogs say of them. In a decoding callback every look-up happens under the historic
//! snapshot, so it answers as of the WAL position that is being decoded.

use std::ffi::c_int;
use std::marker::PhantomData;

use pgrx::{PgTupleDesc, pg_sys};

use super::text;

/// The name under which labels are set: `SECURITY LABEL FOR walmirror`.
pub const PROVIDER: &std::ffi::CStr = c"walmirror";

/// An open relation of the relation cache.
pub struct Rel {
    raw: pg_sys::Relation,
    close: Close,
}

enum Close {
    /// Somebody else holds it open.
    No,
    Reference,
    Lock,
}

/// A table's column. Dropped ones do not appear.
#[derive(Debug, Clone)]
pub struct Column {
    /// 0-based position in tuples.
    pub position: usize,
    pub name: String,
    pub type_oid: pg_sys::Oid,
    /// PostgreSQL 18: computed when read, so that no tuple holds it.
    pub is_virtual: bool,
}

impl Rel {
    /// Wraps a relation that a callback was given.
    ///
    /// # Safety
    /// `raw` must stay open while the result is used.
    pub unsafe fn borrowed(raw: pg_sys::Relation) -> Self {
        Self {
            raw,
            close: Close::No,
        }
    }

    /// Opens a relation as the decoder does: from the relation cache, without a lock (`RelationIdGetRelation`). `None` if
    /// there is none.
    pub fn open_historic(oid: pg_sys::Oid) -> Option<Self> {
        // SAFETY: allowed wherever there is a snapshot for catalog look-ups, as there is in change callbacks.
        let raw = unsafe { pg_sys::RelationIdGetRelation(oid) };
        (!raw.is_null()).then(|| Self {
            raw,
            close: Close::Reference,
        })
    }

    /// Opens a relation with an AccessShareLock (`try_relation_open`), as SQL functions do. `None` if there is none.
    pub fn open(oid: pg_sys::Oid) -> Option<Self> {
        // SAFETY: within a transaction, as every SQL function is.
        let raw = unsafe { pg_sys::try_relation_open(oid, pg_sys::AccessShareLock as pg_sys::LOCKMODE) };
        (!raw.is_null()).then(|| Self {
            raw,
            close: Close::Lock,
        })
    }

    /// The same, but `None` also if the lock is not to be had at once (`ConditionalLockRelationOid`).
    pub fn open_at_once(oid: pg_sys::Oid) -> Option<Self> {
        let lock = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
        // SAFETY: within a transaction, as every query is. The lock that is held when the relation is opened is released with
        // it, or here if there is none.
        unsafe {
            if !pg_sys::ConditionalLockRelationOid(oid, lock) {
                return None;
            }
            let raw = pg_sys::try_relation_open(oid, pg_sys::NoLock as pg_sys::LOCKMODE);
            if raw.is_null() {
                pg_sys::UnlockRelationOid(oid, lock);
                return None;
            }
            Some(Self {
                raw,
                close: Close::Lock,
            })
        }
    }

    /// Opens a relation with an AccessShareLock where nobody is in the way, and without a lock where somebody changes it: then
    /// it is as it was before that change. For event triggers, whose session holds locks that others wait for.
    pub fn open_now(oid: pg_sys::Oid) -> Option<Self> {
        Self::open_at_once(oid).or_else(|| Self::open_historic(oid))
    }

    /// `pg_class.oid`.
    pub fn oid(&self) -> pg_sys::Oid {
        // SAFETY: raw is an open relation.
        unsafe { (*self.raw).rd_id }
    }

    fn form(&self) -> &pg_sys::FormData_pg_class {
        // SAFETY: rd_rel of an open relation is never NULL.
        unsafe { &*(*self.raw).rd_rel }
    }

    /// `pg_class.relname`.
    pub fn name(&self) -> String {
        // SAFETY: a NameData is NUL-terminated.
        unsafe { text::string(self.form().relname.data.as_ptr()) }.unwrap_or_default()
    }

    /// The schema's name (`get_namespace_name`).
    pub fn schema(&self) -> String {
        // SAFETY: returns NULL or a palloc'd C string.
        unsafe { text::string(pg_sys::get_namespace_name(self.form().relnamespace)) }.unwrap_or_default()
    }

    /// `pg_class.relispartition`.
    pub fn is_partition(&self) -> bool {
        self.form().relispartition
    }

    /// Whether it can have rows of its own or partitions that do: `relkind` r or p.
    pub fn is_table(&self) -> bool {
        matches!(self.form().relkind as u8, b'r' | b'p')
    }

    /// Whether only its partitions have rows: `relkind` p.
    pub fn is_partitioned(&self) -> bool {
        self.form().relkind as u8 == b'p'
    }

    /// The type of its rows.
    pub fn descriptor(&self) -> TupleDesc<'_> {
        // SAFETY: rd_att of an open relation is never NULL and lives as long as the relation stays open.
        let raw = unsafe { (*self.raw).rd_att };
        TupleDesc {
            raw,
            _relation: PhantomData,
        }
    }

    /// The columns, in order.
    pub fn columns(&self) -> Vec<Column> {
        // SAFETY: the descriptor is valid; the wrapper only reads it and does not take over its reference count.
        let descriptor = unsafe { PgTupleDesc::from_pg_unchecked(self.descriptor().raw) };
        let mut columns = Vec::with_capacity(descriptor.len());
        for position in 0..descriptor.len() {
            let Some(attribute) = descriptor
                .get(position)
                .filter(|attribute| !attribute.attisdropped)
            else {
                continue;
            };
            columns.push(Column {
                position,
                // SAFETY: a NameData is NUL-terminated.
                name: unsafe { text::string(attribute.attname.data.as_ptr()) }.unwrap_or_default(),
                type_oid: attribute.atttypid,
                is_virtual: attribute.attgenerated as u8 == b'v',
            });
        }
        columns
    }

    /// The names of the primary key's columns, in the key's order; empty if there is none.
    pub fn primary_key(&self) -> Vec<String> {
        // SAFETY: raw is open; RelationGetIndexList fills rd_pkindex in, and its list is palloc'd.
        let index = unsafe {
            pg_sys::RelationGetIndexList(self.raw);
            (*self.raw).rd_pkindex
        };
        // PostgreSQL 18 names one that is not valid yet too, as that of a partitioned table whose partitions lack theirs.
        let counts = index != pg_sys::InvalidOid
            && Self::open_historic(index).is_some_and(|index| {
                // SAFETY: rd_index of an open index is never NULL.
                unsafe { (*(*index.raw).rd_index).indisvalid && (*(*index.raw).rd_index).indimmediate }
            });
        if counts {
            self.columns_of(index)
        } else {
            Vec::new()
        }
    }

    /// Whether the WAL of an UPDATE that changes one of these columns, and of a DELETE, holds them as they were: the replica
    /// identity (`ExtractReplicaIdentity`).
    pub fn identifies(&self, columns: &[String]) -> bool {
        if self.form().relreplident as u8 == b'f' {
            return true;
        }
        // SAFETY: raw is open.
        let index = unsafe { pg_sys::RelationGetReplicaIndex(self.raw) };
        let known = self.columns_of(index);
        columns.iter().all(|column| known.contains(column))
    }

    /// Whether these columns tell rows apart: they hold all columns of some unique index that is valid, checked at once, and neither
    /// partial nor on expressions.
    pub fn is_unique(&self, columns: &[String]) -> bool {
        // SAFETY: raw is open; the list is palloc'd.
        let indexes = oid_list(|| unsafe { pg_sys::RelationGetIndexList(self.raw) });
        indexes.into_iter().any(|oid| {
            let counts = Self::open_historic(oid).is_some_and(|index| {
                // SAFETY: rd_index and rd_indextuple of an open index are never NULL, and indkey holds indnatts items, of which
                // expressions are 0.
                unsafe {
                    let form = &*(*index.raw).rd_index;
                    let keys = usize::try_from(form.indnkeyatts).unwrap_or(0);
                    form.indisunique
                        && form.indisvalid
                        && form.indimmediate
                        && form
                            .indkey
                            .values
                            .as_slice(keys)
                            .iter()
                            .all(|number| *number != 0)
                        && pg_sys::heap_attisnull(
                            (*index.raw).rd_indextuple,
                            pg_sys::Anum_pg_index_indpred as c_int,
                            std::ptr::null_mut(),
                        )
                }
            });
            counts && self.columns_of(oid).iter().all(|column| columns.contains(column))
        })
    }

    /// The names of an index' key columns, in order; empty if there is no such index.
    fn columns_of(&self, index: pg_sys::Oid) -> Vec<String> {
        if index == pg_sys::InvalidOid {
            return Vec::new();
        }
        let Some(index) = Self::open_historic(index) else {
            return Vec::new();
        };
        let columns = self.columns();
        // SAFETY: rd_index of an open index is never NULL, and indkey holds indnatts items.
        let numbers = unsafe {
            let form = (*index.raw).rd_index;
            let keys = usize::try_from((*form).indnkeyatts).unwrap_or(0);
            (*form).indkey.values.as_slice(keys).to_vec()
        };
        numbers
            .into_iter()
            .filter_map(|number| {
                let position = usize::try_from(number).ok()?.checked_sub(1)?;
                columns
                    .iter()
                    .find(|column| column.position == position)
                    .map(|column| column.name.clone())
            })
            .collect()
    }

    /// The table's own label.
    pub fn label(&self) -> Option<String> {
        label_of(self.oid())
    }
}

impl Drop for Rel {
    fn drop(&mut self) {
        // SAFETY: raw was opened by the call that matches this one. After an ERROR Postgres releases it by itself
        // (resource owner), and unwinding through this frame releases it first, which is as good.
        unsafe {
            match self.close {
                Close::No => {}
                Close::Reference => pg_sys::RelationClose(self.raw),
                Close::Lock => pg_sys::relation_close(self.raw, pg_sys::AccessShareLock as pg_sys::LOCKMODE),
            }
        }
    }
}

/// The descriptor of a relation's rows.
pub struct TupleDesc<'a> {
    raw: pg_sys::TupleDesc,
    _relation: PhantomData<&'a Rel>,
}

impl TupleDesc<'_> {
    /// How many columns tuples have, dropped ones included.
    pub fn len(&self) -> usize {
        // SAFETY: the descriptor is valid while the relation is open.
        usize::try_from(unsafe { (*self.raw).natts }).unwrap_or(0)
    }

    pub(super) fn raw(&self) -> pg_sys::TupleDesc {
        self.raw
    }
}

/// The label of a table (`GetSecurityLabel`).
pub fn label_of(table: pg_sys::Oid) -> Option<String> {
    let address = pg_sys::ObjectAddress {
        classId: pg_sys::RelationRelationId,
        objectId: table,
        objectSubId: 0,
    };
    // SAFETY: a catalog scan; returns NULL or a palloc'd C string.
    unsafe { text::string(pg_sys::GetSecurityLabel(&address, PROVIDER.as_ptr())) }
}

/// Takes the lock of SECURITY LABEL on a table, to the end of the transaction (`ExecSecLabelStmt`).
pub fn lock_to_label(table: pg_sys::Oid) {
    // SAFETY: within a transaction; an oid that is no table's may be locked too.
    unsafe { pg_sys::LockRelationOid(table, pg_sys::ShareUpdateExclusiveLock as pg_sys::LOCKMODE) }
}

/// The type of the rows of a table; InvalidOid if there is no such table.
pub fn row_type(table: pg_sys::Oid) -> pg_sys::Oid {
    // SAFETY: a syscache look-up.
    unsafe { pg_sys::get_rel_type_id(table) }
}

/// Whether there is a relation of this oid, as far as this session has heard.
pub fn exists(oid: pg_sys::Oid) -> bool {
    // SAFETY: a syscache look-up.
    unsafe { pg_sys::get_rel_relkind(oid) != 0 }
}

/// Whether a table has partitions; false if there is no such table.
pub fn is_partitioned(table: pg_sys::Oid) -> bool {
    // SAFETY: a syscache look-up.
    unsafe { pg_sys::get_rel_relkind(table) == pg_sys::RELKIND_PARTITIONED_TABLE as std::ffi::c_char }
}

/// Whether other tables may inherit from a table, or it has to do with partitions; false if there is no such table.
pub fn has_kin(table: pg_sys::Oid) -> bool {
    // SAFETY: a syscache look-up; the tuple is released below, and its form is read in between.
    unsafe {
        let tuple = pg_sys::SearchSysCache1(
            pg_sys::SysCacheIdentifier::RELOID as c_int,
            pg_sys::Datum::from(table),
        );
        if tuple.is_null() {
            return false;
        }
        let form = &*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_class>();
        let has_kin = form.relhassubclass || form.relispartition || form.relkind as u8 == b'p';
        pg_sys::ReleaseSysCache(tuple);
        has_kin
    }
}

/// The table whose label holds for a table: its own, or the nearest that it is a partition of.
pub fn labelled(table: pg_sys::Oid) -> Option<pg_sys::Oid> {
    // SAFETY: a syscache look-up; false for what does not exist.
    let is_partition = unsafe { pg_sys::get_rel_relispartition(table) };
    let others = if is_partition {
        ancestors(table)
    } else {
        Vec::new()
    };
    std::iter::once(table)
        .chain(others)
        .find(|table| label_of(*table).is_some())
}

/// Whether this database has the extension (`get_extension_oid`).
pub fn has_extension() -> bool {
    // SAFETY: a catalog look-up; InvalidOid if there is none.
    unsafe { pg_sys::get_extension_oid(PROVIDER.as_ptr(), true) != pg_sys::InvalidOid }
}

/// Whether the current role may do what the owner of a table may.
pub fn is_owned(table: pg_sys::Oid) -> bool {
    // SAFETY: within a transaction, as every SQL function is; syscache look-ups, and an error that Postgres reports for a table that
    // does not exist.
    unsafe {
        let role = pg_sys::GetUserId();
        #[cfg(any(feature = "pg14", feature = "pg15"))]
        return pg_sys::pg_class_ownercheck(table, role);
        #[cfg(not(any(feature = "pg14", feature = "pg15")))]
        pg_sys::object_ownercheck(pg_sys::RelationRelationId, table, role)
    }
}

/// The table of an index; InvalidOid for what is no index (`IndexGetRelation`).
pub fn of_index(index: pg_sys::Oid) -> pg_sys::Oid {
    // SAFETY: a syscache look-up.
    unsafe { pg_sys::IndexGetRelation(index, true) }
}

/// The partitioned tables that a partition belongs to, the nearest first (`get_partition_ancestors`).
pub fn ancestors(partition: pg_sys::Oid) -> Vec<pg_sys::Oid> {
    oid_list(|| {
        // SAFETY: catalog scans; returns a palloc'd list of oids.
        unsafe { pg_sys::submodules::ffi::pg_guard_ffi_boundary(|| get_partition_ancestors(partition)) }
    })
}

/// A partitioned table with all its partitions, at any depth; a plain table with nothing else (`find_all_inheritors`).
pub fn with_partitions(table: pg_sys::Oid) -> Vec<pg_sys::Oid> {
    inheritors(table, pg_sys::NoLock)
}

/// Waits until nobody changes a partition of the table, at any depth, and has later changes wait for the end of this transaction.
/// The table itself has to be locked: as by all who lock both, the partitions come after it.
pub fn lock_partitions(table: pg_sys::Oid) {
    inheritors(table, pg_sys::AccessShareLock);
}

fn inheritors(table: pg_sys::Oid, lock: u32) -> Vec<pg_sys::Oid> {
    oid_list(|| {
        // SAFETY: catalog scans, and locks that the end of the transaction releases; returns a palloc'd list of oids.
        unsafe {
            pg_sys::submodules::ffi::pg_guard_ffi_boundary(|| {
                find_all_inheritors(table, lock as pg_sys::LOCKMODE, std::ptr::null_mut())
            })
        }
    })
}

/// Makes every session, and every decoder at this point of the WAL, look at the table anew
/// (`CacheInvalidateRelcacheByRelid`).
pub fn invalidate(table: pg_sys::Oid) {
    // SAFETY: within a transaction; a table that does not exist is an error that Postgres reports.
    unsafe { pg_sys::CacheInvalidateRelcacheByRelid(table) }
}

/// Refuses on a standby, and in a transaction that is read-only, what the commit would write to the WAL: there an error comes too late
/// (`PreventCommandDuringRecovery`, `PreventCommandIfReadOnly`).
pub fn require_writable(command: &'static std::ffi::CStr) {
    // SAFETY: within a transaction; both only report an error, in which the command stands.
    unsafe {
        pg_sys::PreventCommandDuringRecovery(command.as_ptr());
        pg_sys::PreventCommandIfReadOnly(command.as_ptr());
    }
}

fn oid_list(list: impl FnOnce() -> *mut pg_sys::List) -> Vec<pg_sys::Oid> {
    let list = list();
    if list.is_null() {
        return Vec::new();
    }
    // SAFETY: a List of oids holds `length` cells whose oid_value is set.
    unsafe {
        let length = usize::try_from((*list).length).unwrap_or(0);
        std::slice::from_raw_parts((*list).elements, length)
            .iter()
            .map(|cell| cell.oid_value)
            .collect()
    }
}

unsafe extern "C-unwind" {
    // catalog/partition.h and catalog/pg_inherits.h; pgrx has no bindings for them.
    fn get_partition_ancestors(relid: pg_sys::Oid) -> *mut pg_sys::List;
    fn find_all_inheritors(
        parent: pg_sys::Oid,
        lockmode: pg_sys::LOCKMODE,
        parents: *mut *mut pg_sys::List,
    ) -> *mut pg_sys::List;
}
