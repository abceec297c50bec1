//! How the process gets its memory.

/// From how many bytes on a block is given back to the system as soon as it is free.
const GIVEN_BACK: libc::c_int = 128 * 1024;

/// To be called before there are threads. glibc raises its threshold (mallopt(3), M_MMAP_THRESHOLD) to the largest block that was ever freed:
/// from then on batches and chunks come from the heaps of the threads, which keep what is free between what is not. The sink held up to
/// twice as much as it used. A threshold that is set stays.
pub fn give_back_large_blocks() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes two numbers, keeps no pointer, and no other thread is in malloc's settings yet.
    unsafe {
        // It can only say no, and then all is as before.
        libc::mallopt(libc::M_MMAP_THRESHOLD, GIVEN_BACK);
    }
}
