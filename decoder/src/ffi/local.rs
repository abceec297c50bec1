//! State of a backend.

/// A variable of this process. A backend has one thread, so it needs neither a lock nor the look-up of a thread-local
/// variable, which from a shared library is a call.
pub struct Local<T>(T);

// SAFETY: only the main thread of a backend runs code of this library (pgrx's guards check it, and it starts no threads).
unsafe impl<T> Sync for Local<T> {}

impl<T> Local<T> {
    /// The variable with its first value.
    pub const fn new(value: T) -> Self {
        Self(value)
    }

    /// The variable.
    pub fn get(&self) -> &T {
        &self.0
    }
}
