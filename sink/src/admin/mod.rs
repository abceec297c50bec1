//! The admin server of `run --admin`: `/healthz` (the process lives), `/readyz` (Redis is what Postgres says) and `/metrics`
//! for Prometheus. One thread answers, another looks at the servers now and then; neither is waited for. Without `--admin` the second
//! is there all the same, less often: the log warns of what the slot keeps.

mod metrics;
mod sample;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tiny_http::{Header, Method, Request, Response, Server};

use crate::config::RunConfig;
use crate::error::Error;
use crate::run::Health;
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
        let stopped = Arc::clone(&admin.stopped);
        admin.spawn("admin samples", move || {
            while !stopped.load(Ordering::Acquire) {
                sampler.look(&stopped);
                std::thread::sleep(TICK);
            }
        })?;
        Ok(admin)
    }

    fn listen(
        &mut self,
        address: SocketAddr,
        health: &Arc<Health>,
        sampler: &Arc<Sampler>,
    ) -> Result<(), Error> {
        let server = Server::http(address)
            .map_err(|error| Error::config(format!("cannot listen on --admin {address}: {error}")))?;
        tracing::info!(address = %server.server_addr(), "the admin server listens");
        let (health, samples, stopped) = (Arc::clone(health), Arc::clone(sampler), Arc::clone(&self.stopped));
        self.spawn("admin", move || {
            while !stopped.load(Ordering::Acquire) {
                if let Ok(Some(request)) = server.recv_timeout(TICK) {
                    answer(request, &health, &samples);
                }
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

fn answer(request: Request, health: &Health, sampler: &Sampler) {
    let path = request.url().split('?').next().unwrap_or_default();
    let (status, text) = match (request.method(), path) {
        (Method::Get | Method::Head, "/healthz") => (200, "alive\n".to_owned()),
        (Method::Get | Method::Head, "/readyz") => match health.ready() {
            Ok(()) => (200, "ready\n".to_owned()),
            Err(why) => (503, format!("not ready: {why}\n")),
        },
        (Method::Get | Method::Head, "/metrics") => match metrics::text(health, sampler.last()) {
            Ok(text) => (200, text),
            Err(error) => (500, format!("{error}\n")),
        },
        (Method::Get | Method::Head, _) => (404, "/healthz, /readyz, /metrics\n".to_owned()),
        _ => (405, "GET only\n".to_owned()),
    };
    let kind = if path == "/metrics" && status == 200 {
        metrics::CONTENT_TYPE
    } else {
        "text/plain; charset=utf-8"
    };
    let mut response = Response::from_string(text).with_status_code(status);
    if let Ok(header) = Header::from_bytes("Content-Type", kind) {
        response = response.with_header(header);
    }
    // Whoever asked may be gone.
    let _ = request.respond(response);
}
