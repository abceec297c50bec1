//! A file system that is soon full.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A small file system of its own.
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    /// Mounts it; None where this user may not.
    pub fn mount(path: &Path, size: &str) -> Option<Tmpfs> {
        let mount = |args: &[&str]| {
            Command::new("mount")
                .args(args)
                .arg(path)
                .stderr(Stdio::null())
                .status()
        };
        let option = format!("size={size}");
        mount(&["-t", "tmpfs", "-o", &option, "tmpfs"])
            .is_ok_and(|status| status.success())
            .then(|| Tmpfs(path.to_owned()))
    }

    /// Gives it more room.
    pub fn resize(&self, size: &str) {
        let status = Command::new("mount")
            .args(["-o", &format!("remount,size={size}")])
            .arg(&self.0)
            .status()
            .unwrap();
        assert!(status.success());
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily: whoever still uses it does not keep it.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
