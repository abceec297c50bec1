//! Control groups: processes that get only so much memory or time.

use std::fs;
use std::path::{Path, PathBuf};

/// A group of its own.
pub struct Cgroup {
    path: PathBuf,
    unified: bool,
}

/// What it limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// Memory that its processes take once they are in it.
    Memory,
    /// Time on processors.
    Cpu,
}

impl Cgroup {
    /// Makes one, in whichever version of control groups the kernel has; None where this user may not.
    pub fn create(resource: Resource) -> Option<Cgroup> {
        let root = Path::new("/sys/fs/cgroup");
        let name = format!("walmirror-test-{}-{resource:?}", std::process::id());
        let controller = match resource {
            Resource::Memory => "memory",
            Resource::Cpu => "cpu",
        };
        let unified = root.join("cgroup.controllers").exists();
        let path = if unified {
            fs::write(root.join("cgroup.subtree_control"), format!("+{controller}")).ok()?;
            root.join(name)
        } else {
            root.join(controller).join(name)
        };
        fs::create_dir(&path).ok()?;
        Some(Cgroup { path, unified })
    }

    /// Takes a process in.
    pub fn add(&self, pid: u32) {
        self.set("cgroup.procs", pid);
    }

    /// Limits memory to so many bytes.
    pub fn limit_memory(&self, bytes: u64) {
        let file = if self.unified {
            "memory.max"
        } else {
            "memory.limit_in_bytes"
        };
        self.set(file, bytes);
    }

    /// Limits time to so many thousandths of one processor.
    pub fn limit_cpu(&self, thousandths: u32) {
        const PERIOD: u32 = 100_000;
        let quota = PERIOD / 1000 * thousandths;
        if self.unified {
            self.set("cpu.max", format!("{quota} {PERIOD}"));
        } else {
            self.set("cpu.cfs_period_us", PERIOD);
            self.set("cpu.cfs_quota_us", quota);
        }
    }

    /// How often its processes had to wait because their time was used up.
    pub fn throttled(&self) -> u64 {
        let text = fs::read_to_string(self.path.join("cpu.stat")).unwrap();
        let count = text.lines().find_map(|line| line.strip_prefix("nr_throttled "));
        count.expect("a count").parse().unwrap()
    }

    fn set(&self, file: &str, value: impl ToString) {
        let value = value.to_string();
        fs::write(self.path.join(file), &value).unwrap_or_else(|e| panic!("{file} = {value}: {e}"));
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A group with processes stays, so they go back to where they came from.
        if let (Ok(pids), Some(parent)) = (
            fs::read_to_string(self.path.join("cgroup.procs")),
            self.path.parent(),
        ) {
            for pid in pids.lines() {
                let _ = fs::write(parent.join("cgroup.procs"), pid);
            }
        }
        let _ = fs::remove_dir(&self.path);
    }
}
