//! The admin server of `run --admin`: `/healthz` (the process lives), `/readyz` (Redis is what Postgres says) and `/metrics`
//! for Prometheus. One thread answers, two others look at Postgres and at Redis now and then; none is waited for. Without `--admin` the one
//! for Postgres is there all the same, less often: the log warns of what the slot keeps.

mod http;
mod metrics;
mod sample;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::config::RunConfig;
use crate::error::Error;
use crate::run::Health;
use http::Answer;
use sample::Sampler;

/// How often the threads look whether they should end.
const TICK: Duration = Duration::from_millis(200);

/// The running threads; they end when it is dropped.
#[derive(Debug)]
pub struct Admin {
    stopped: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Admin {
    /// Looks at the servers from now on; where there is an address, listens and answers.
    pub fn start(config: &RunConfig, health: &Arc<Health>) -> Result<Self, Error> {
        let sampler = Arc::new(Sampler::new(config, health));
        let mut admin = Self {
            stopped: Arc::default(),
            threads: Vec::new(),
        };
        if let Some(address) = config.admin {
            admin.listen(address, health, &sampler)?;
        }
        let looks = Arc::clone(&sampler);
        admin.repeat("admin samples", move || looks.look_at_postgres())?;
        if config.admin.is_some() {
            admin.repeat("admin pending", move || sampler.look_at_redis())?;
        }
        Ok(admin)
    }

    fn listen(
        &mut self,
        address: SocketAddr,
        health: &Arc<Health>,
        sampler: &Arc<Sampler>,
    ) -> Result<(), Error> {
        let cannot = |error: io::Error| Error::config(format!("cannot listen on --admin {address}: {error}"));
        let (runtime, listener) = http::listen(address).map_err(cannot)?;
        tracing::info!(address = %listener.local_addr().map_err(cannot)?, "the admin server listens");
        let (health, samples, stopped) = (Arc::clone(health), Arc::clone(sampler), Arc::clone(&self.stopped));
        let page: Arc<http::Page> = Arc::new(move |path| answer(path, &health, &samples));
        self.spawn("admin", move || http::serve(&runtime, &listener, &stopped, &page))
    }

    /// Does it again and again until the end.
    fn repeat(&mut self, name: &str, work: impl Fn() + Send + 'static) -> Result<(), Error> {
        let stopped = Arc::clone(&self.stopped);
        self.spawn(name, move || {
            while !stopped.load(Ordering::Acquire) {
                work();
                std::thread::sleep(TICK);
            }
        })
    }

    fn spawn(&mut self, name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), Error> {
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(work);
        let thread = thread.map_err(|error| Error::io(format!("cannot start the thread {name}"), error))?;
        self.threads.push(thread);
        Ok(())
    }
}

impl Drop for Admin {
    fn drop(&mut self) {
        // The threads end by themselves; the process does not wait for a server that one of them asks.
        self.stopped.store(true, Ordering::Release);
    }
}

fn answer(path: Option<&str>, health: &Health, sampler: &Sampler) -> Answer {
    let mut kind = "text/plain; charset=utf-8";
    let (status, text) = match path {
        Some("/healthz") => (200, "alive\n".to_owned()),
        Some("/readyz") => match health.ready() {
            Ok(()) => (200, "ready\n".to_owned()),
            Err(why) => (503, format!("not ready: {why}\n")),
        },
        Some("/metrics") => match metrics::text(health, sampler.last()) {
            Ok(text) => {
                kind = metrics::CONTENT_TYPE;
                (200, text)
            }
            Err(error) => (500, format!("{error}\n")),
        },
        Some(_) => (404, "/healthz, /readyz, /metrics\n".to_owned()),
        None => (405, "GET only\n".to_owned()),
    };
    Answer { status, kind, text }
}
