//! Waiting with a deadline, and LSNs as the tests compare them (deliberately not the product's own type).

use std::fmt::{self, Display};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long anything that should take a moment may take on a busy machine before the test fails.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Calls `probe` until it returns something; panics with `what` when that takes longer than `deadline`.
pub fn wait_for<T>(deadline: Duration, what: impl Display, mut probe: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(value) = probe() {
            return value;
        }
        assert!(start.elapsed() < deadline, "waited {deadline:?} for {what}");
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Raises a flag when it is dropped. Threads that go on until then end also where the test fails, and not when the disk is full.
pub struct Raise<'f>(pub &'f AtomicBool);

impl Drop for Raise<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// A position in the WAL.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Lsn(pub u64);

impl FromStr for Lsn {
    type Err = String;

    fn from_str(text: &str) -> Result<Lsn, String> {
        let parse = |half: &str| u64::from_str_radix(half, 16).map_err(|e| format!("LSN {text:?}: {e}"));
        let (high, low) = text
            .split_once('/')
            .ok_or_else(|| format!("LSN {text:?} has no slash"))?;
        Ok(Lsn(parse(high)? << 32 | parse(low)?))
    }
}

impl Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Display::fmt(self, f)
    }
}
