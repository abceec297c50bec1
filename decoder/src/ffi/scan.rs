//! Scans of cached tables: every one gets a wrapper around its ExecProcNode. When the node has returned a tuple, its scan
//! slot holds the whole row, whatever columns, joins or conditions the query has. Index-only scans have no whole row and
//! are left alone.

use std::cell::Cell;
use std::ffi::c_void;

use pgrx::pg_sys;
use pgrx::prelude::*;

use super::datum::Row;
use super::executor::with_session;
use super::local::Local;
use super::unguarded;
use crate::capture::session::Next;

/// A node's function (`ExecProcNodeMtd`).
pub type ExecProcNode =
    unsafe extern "C-unwind" fn(node: *mut pg_sys::PlanState) -> *mut pg_sys::TupleTableSlot;

/// Wraps the scans of cached tables in a query that was told to the session just now.
///
/// # Safety
/// `root` must be the plan state of a started query.
pub(super) unsafe fn wrap(root: *mut pg_sys::PlanState) {
    // SAFETY: by the caller's promise.
    if unsafe { is_leaf(root) } {
        // SAFETY: a leaf is a scan.
        return unsafe { wrap_scan(root) };
    }
    let mut scans = Scans::default();
    // SAFETY: the root is valid. `visit` holds nothing that would have to be dropped and cannot unwind; what
    // planstate_tree_walker raises (a tree too deep for the stack) passes over it to the guard.
    unsafe {
        let scans = (&raw mut scans).cast();
        pg_sys::submodules::ffi::pg_guard_ffi_boundary(|| visit(root, scans));
    }
    for node in scans.nodes {
        // SAFETY: the nodes are scans, see `Scans::add`.
        unsafe { wrap_scan(node) }
    }
}

/// Wraps a scan if its table is cached.
///
/// # Safety
/// `node` must be a scan of a started query.
unsafe fn wrap_scan(node: *mut pg_sys::PlanState) {
    // SAFETY: the relation of a scan is open while the query runs; a custom scan may have none.
    unsafe {
        let relation = (*node.cast::<pg_sys::ScanState>()).ss_currentRelation;
        let (false, Some(original)) = (relation.is_null(), (*node).ExecProcNodeReal) else {
            return;
        };
        let table = u32::from((*relation).rd_id);
        let wrap = with_session(|session| {
            let captures = session.captures(table);
            if captures {
                session.attach(node as usize, original, table);
            }
            captures
        });
        if wrap == Some(true) {
            unguarded::ExecSetExecProcNode(node, wrapper);
        }
    }
}

/// Whether a node is a scan that has no nodes below or beside it; most queries of an application are a single such scan.
///
/// # Safety
/// `node` must be a plan state.
unsafe fn is_leaf(node: *mut pg_sys::PlanState) -> bool {
    // SAFETY: by the caller's promise. A node that is no scan may have children of its own kind (Append), so only scans count.
    unsafe {
        matches!(
            (*node).type_,
            pg_sys::NodeTag::T_SeqScanState | pg_sys::NodeTag::T_IndexScanState
        ) && (*node).lefttree.is_null()
            && (*node).righttree.is_null()
            && (*node).initPlan.is_null()
            && (*node).subPlan.is_null()
    }
}

/// The scans of a plan that have whole rows.
#[derive(Default)]
struct Scans {
    nodes: Vec<*mut pg_sys::PlanState>,
}

impl Scans {
    /// # Safety
    /// `node` must be a plan state.
    unsafe fn add(&mut self, node: *mut pg_sys::PlanState) {
        use pg_sys::NodeTag::{
            T_BitmapHeapScanState, T_IndexScanState, T_SampleScanState, T_SeqScanState, T_TidRangeScanState,
            T_TidScanState,
        };
        // SAFETY: by the caller's promise.
        unsafe {
            if matches!(
                (*node).type_,
                T_SeqScanState
                    | T_SampleScanState
                    | T_IndexScanState
                    | T_BitmapHeapScanState
                    | T_TidScanState
                    | T_TidRangeScanState
            ) {
                self.nodes.push(node);
            }
        }
    }
}

/// Notes this node if it is a scan, and visits those below it.
unsafe extern "C-unwind" fn visit(node: *mut pg_sys::PlanState, scans: *mut c_void) -> bool {
    if node.is_null() {
        return false;
    }
    // SAFETY: planstate_tree_walker passes a node of the tree and the argument as it came.
    unsafe {
        (*scans.cast::<Scans>()).add(node);
        walk(node, scans)
    }
}

/// # Safety
/// `node` must be a plan state.
unsafe fn walk(node: *mut pg_sys::PlanState, context: *mut c_void) -> bool {
    unsafe extern "C-unwind" {
        #[cfg_attr(
            not(any(feature = "pg14", feature = "pg15")),
            link_name = "planstate_tree_walker_impl"
        )]
        fn planstate_tree_walker(
            node: *mut pg_sys::PlanState,
            walker: unsafe extern "C-unwind" fn(*mut pg_sys::PlanState, *mut c_void) -> bool,
            context: *mut c_void,
        ) -> bool;
    }
    // SAFETY: by the caller's promise; visits the node's children. Who called `visit` first guards.
    unsafe { planstate_tree_walker(node, visit, context) }
}

/// The node that ran last, and its own function: most queries have one such node.
static LAST: Local<Cell<(*mut pg_sys::PlanState, ExecProcNode)>> =
    Local::new(Cell::new((std::ptr::null_mut(), wrapper)));

/// A query is over, so the addresses of its nodes may come again.
pub(super) fn forget() {
    LAST.get().set((std::ptr::null_mut(), wrapper));
}

/// Runs in place of a scan node: the node itself, and then capture of the row that it returned.
unsafe extern "C-unwind" fn wrapper(node: *mut pg_sys::PlanState) -> *mut pg_sys::TupleTableSlot {
    // SAFETY: the original function of this very node.
    unsafe {
        let last = LAST.get().get();
        let original = if last.0 == node {
            last.1
        } else {
            let original = original(node);
            LAST.get().set((node, original));
            original
        };
        let slot = original(node);
        if !slot.is_null() && (*slot).tts_flags & pg_sys::TTS_FLAG_EMPTY as u16 == 0 {
            returned(node, original);
        }
        slot
    }
}

/// The function that runs a wrapped node when nobody captures.
#[pg_guard]
unsafe extern "C-unwind" fn original(node: *mut pg_sys::PlanState) -> ExecProcNode {
    match with_session(|session| session.scan(node as usize)).flatten() {
        Some(scan) => scan.original,
        // The wrapper stands only on nodes that were attached, and those are known as long as the query lives.
        None => error!("walmirror: a captured scan is unknown"),
    }
}

/// A wrapped node has returned a row.
#[pg_guard]
unsafe extern "C-unwind" fn returned(node: *mut pg_sys::PlanState, original: ExecProcNode) {
    // SAFETY: a wrapped node is a ScanState.
    unsafe {
        let source = ScanSlot {
            slot: (*node.cast::<pg_sys::ScanState>()).ss_ScanTupleSlot,
            _node: std::marker::PhantomData,
        };
        if !source.is_filled() {
            return;
        }
        if with_session(|session| session.row(node as usize, &source)) == Some(Next::Stop) {
            unguarded::ExecSetExecProcNode(node, original);
        }
    }
}

/// The scan slot of a node that has just returned a row.
pub struct ScanSlot<'a> {
    slot: *mut pg_sys::TupleTableSlot,
    _node: std::marker::PhantomData<&'a ()>,
}

impl ScanSlot<'_> {
    /// Whether it holds a row of the table. In minor releases before May 2025 a bitmap scan that only counts leaves the page
    /// alone and the slot full of NULLs; such a slot has no place (ExecStoreAllNullTuple).
    fn is_filled(&self) -> bool {
        // SAFETY: the slot of a started node is NULL or valid.
        unsafe {
            !self.slot.is_null()
                && (*self.slot).tts_flags & pg_sys::TTS_FLAG_EMPTY as u16 == 0
                && (*self.slot).tts_tid.ip_posid != 0
        }
    }

    /// Block and offset of the row version.
    pub fn place(&self) -> (u32, u16) {
        // SAFETY: a filled slot of a table scan has the row's place.
        unsafe {
            let place = (*self.slot).tts_tid;
            (
                u32::from(place.ip_blkid.bi_hi) << 16 | u32::from(place.ip_blkid.bi_lo),
                place.ip_posid,
            )
        }
    }

    /// Takes the row apart (`slot_getsomeattrs`), TOASTed values as they are.
    pub fn read(&self, row: &mut Row) {
        // SAFETY: a filled slot; after slot_getsomeattrs_int its arrays hold as many items as its descriptor has columns.
        unsafe {
            let columns = (*(*self.slot).tts_tupleDescriptor).natts;
            if i32::from((*self.slot).tts_nvalid) < columns {
                pg_sys::slot_getsomeattrs_int(self.slot, columns);
            }
            let columns = usize::try_from(columns).unwrap_or(0);
            row.copy(
                std::slice::from_raw_parts((*self.slot).tts_values, columns),
                std::slice::from_raw_parts((*self.slot).tts_isnull, columns),
            );
        }
    }
}
