//! A private Redis for tests: a socket in a temporary directory, no port, no persistence. Skipped (with a word on
//! stderr) where there is no redis-server to run.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::config::RedisUrl;
use crate::redis::Connection;

/// A running server; dropped, it ends.
pub(crate) struct Server {
    child: Child,
    directory: tempfile::TempDir,
}

impl Server {
    /// Starts a server, if there is one installed.
    pub(crate) fn start() -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("redis.sock");
        let executable = std::env::var_os("WALMIRROR_REDIS_SERVER");
        let spawned = Command::new(executable.unwrap_or_else(|| "redis-server".into()))
            .args([
                "--port",
                "0",
                "--save",
                "",
                "--appendonly",
                "no",
                "--loglevel",
                "warning",
            ])
            .arg("--unixsocket")
            .arg(&socket)
            .arg("--dir")
            .arg(directory.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let Ok(child) = spawned else {
            let forbidden = std::env::var("WALMIRROR_NO_SKIP").is_ok_and(|value| value == "1");
            assert!(!forbidden, "WALMIRROR_NO_SKIP=1, and there is no redis-server");
            eprintln!("skipped: no redis-server here");
            return None;
        };
        let server = Self { child, directory };
        let deadline = Instant::now() + Duration::from_secs(10);
        while Connection::connect(&server.url()).is_err() {
            assert!(Instant::now() < deadline, "redis-server does not answer");
            std::thread::sleep(Duration::from_millis(5));
        }
        Some(server)
    }

    pub(crate) fn url(&self) -> RedisUrl {
        self.url_with("")
    }

    /// With parameters, such as `?db=1`.
    pub(crate) fn url_with(&self, parameters: &str) -> RedisUrl {
        format!(
            "redis+unix://{}{parameters}",
            self.directory.path().join("redis.sock").display()
        )
        .parse()
        .unwrap()
    }

    pub(crate) fn connect(&self) -> Connection {
        Connection::connect(&self.url()).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
