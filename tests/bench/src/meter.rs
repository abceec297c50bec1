//! CPU time and memory of a process, read from /proc until the process is gone: a walsender cannot be asked afterwards.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// What a process used.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// User and system time in seconds.
    pub cpu: f64,
    /// The most private (anonymous) memory seen, in bytes. Shared buffers do not count.
    pub private: u64,
    /// The highest resident set the kernel saw, in bytes (`VmHWM`).
    pub resident: u64,
}

impl Usage {
    /// The state of a process now; None when there is no such process any more.
    pub fn of(pid: u32) -> Option<Usage> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        Some(Usage {
            cpu: cpu_seconds(pid)?,
            private: field("RssAnon:")? * 1024,
            resident: field("VmHWM:")? * 1024,
        })
    }
}

/// The scheduler counts nanoseconds per thread, `stat` ticks of 10 ms per process: a process of one thread is measured
/// by the first, others by the second, because threads may have ended.
pub fn cpu_seconds(pid: u32) -> Option<f64> {
    if fs::read_dir(format!("/proc/{pid}/task")).ok()?.count() == 1 {
        let text = fs::read_to_string(format!("/proc/{pid}/schedstat")).ok()?;
        let nanoseconds: f64 = text.split_whitespace().next()?.parse().ok()?;
        return Some(nanoseconds / 1e9);
    }
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name may contain blanks; it ends at the last parenthesis.
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut ticks = fields
        .split(' ')
        .skip(11)
        .map_while(|field| field.parse::<f64>().ok());
    Some((ticks.next()? + ticks.next()?) / 100.0)
}

/// Watches a process from another thread.
pub struct Watch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Usage>,
}

impl Watch {
    /// Starts to watch.
    pub fn start(pid: u32) -> Watch {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut most = Usage::default();
            while let Some(now) = Usage::of(pid) {
                // A process that is ending has no memory any more.
                most.cpu = most.cpu.max(now.cpu);
                most.private = most.private.max(now.private);
                most.resident = most.resident.max(now.resident);
                if seen.load(Ordering::Relaxed) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(4));
            }
            most
        });
        Watch { stop, thread }
    }

    /// Waits for the end of the process and says what it used.
    pub fn until_gone(self) -> Usage {
        self.thread.join().unwrap()
    }

    /// Stops watching and says what the process used until now.
    pub fn stop(self) -> Usage {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}
