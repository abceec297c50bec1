//! Memory contexts.

use std::ffi::CStr;

use pgrx::pg_sys;

/// A memory context that lives until it is deleted here or with its parent. Copying copies the handle.
///
/// There is deliberately no `Drop`: after an ERROR Postgres frees contexts by itself, parents together with children.
#[derive(Debug, Clone, Copy)]
pub struct Context(pg_sys::MemoryContext);

impl Context {
    /// Wraps a context that Postgres made.
    ///
    /// # Safety
    /// `raw` must be a valid memory context that outlives every use of this handle.
    pub unsafe fn from_raw(raw: pg_sys::MemoryContext) -> Self {
        Self(raw)
    }

    /// The context that lives as long as the backend (`TopMemoryContext`).
    pub fn top() -> Self {
        // SAFETY: TopMemoryContext is set before any extension code runs and is never changed.
        Self(unsafe { pg_sys::TopMemoryContext })
    }

    /// The context that is current: what is made in it goes with a row, a query or a statement.
    pub fn current() -> Self {
        // SAFETY: this single-threaded backend's own variable, which is always set.
        Self(unsafe { pg_sys::CurrentMemoryContext })
    }

    /// Puts the context under another one (`MemoryContextSetParent`), with which it lives from then on.
    pub fn move_to(self, parent: Self) {
        // SAFETY: both are valid, and the parent is not below this one.
        unsafe { pg_sys::MemoryContextSetParent(self.0, parent.0) }
    }

    /// A new context under this one (`AllocSetContextCreate`, small sizes: most hold a few FmgrInfos or one row).
    pub fn child(self, name: &'static CStr) -> Self {
        // SAFETY: self is a valid parent, and the name is a constant, as AllocSetContextCreate demands.
        Self(unsafe {
            pg_sys::AllocSetContextCreateInternal(self.0, name.as_ptr(), 0, 1024, 8 * 1024 * 1024)
        })
    }

    /// Frees all that was allocated in the context (`MemoryContextReset`).
    pub fn reset(self) {
        // SAFETY: the context is valid; who calls this keeps no reference into it. One that nothing was allocated in since is
        // left alone, as MemoryContextReset does, without the guard of the call.
        unsafe {
            if !(*self.0).isReset {
                pg_sys::MemoryContextReset(self.0)
            }
        }
    }

    /// Deletes the context (`MemoryContextDelete`).
    pub fn delete(self) {
        // SAFETY: the context is valid, and the handle's owner gives it up.
        unsafe { pg_sys::MemoryContextDelete(self.0) }
    }

    /// Makes this the current context until the guard is dropped.
    pub fn enter(self) -> Entered {
        // SAFETY: CurrentMemoryContext is this single-threaded backend's own variable; self is valid.
        let previous =
            unsafe { std::mem::replace(&mut *std::ptr::addr_of_mut!(pg_sys::CurrentMemoryContext), self.0) };
        Entered { previous }
    }

    /// The C pointer, for calls that take a context.
    pub(super) fn raw(self) -> pg_sys::MemoryContext {
        self.0
    }
}

/// Restores the previous current context when dropped.
pub struct Entered {
    previous: pg_sys::MemoryContext,
}

impl Drop for Entered {
    fn drop(&mut self) {
        // SAFETY: the previous context encloses this scope, so it is still valid, also while an ERROR unwinds.
        unsafe { pg_sys::CurrentMemoryContext = self.previous };
    }
}
