//! What only the servers know: where the WAL ends, how much of it the slot keeps, and how many keys Redis has noted. Looked at every few seconds
//! on connections of its own, so that a scrape never waits. Where nobody scrapes, only what the log warns of is looked at, and less often.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use redis::Value;

use crate::config::RunConfig;
use crate::error::Error;
use crate::plan::RedisKeys;
use crate::pq;
use crate::redis::Connection;
use crate::replication::{Retained, flushed, retained};
use crate::run::Health;

/// How often the servers are asked …
const EVERY: Duration = Duration::from_secs(5);
/// … and where nobody asks for figures.
const EVERY_UNASKED: Duration = Duration::from_secs(30);
/// How often the log says the same again.
const WARN_EVERY: Duration = Duration::from_secs(600);
/// How long Postgres may take.
const ANSWER: Duration = Duration::from_secs(5);

/// What was seen last; None where nothing could be.
#[derive(Clone, Debug, Default)]
pub(super) struct Sample {
    pub(super) retained: Option<Retained>,
    /// Keys to be read again.
    pub(super) pending: Option<u64>,
}

/// When one of the two was looked at, and what was seen.
#[derive(Debug)]
struct Looked<T>(Mutex<(Option<Instant>, Option<T>)>);

impl<T> Default for Looked<T> {
    fn default() -> Self {
        Self(Mutex::new((None, None)))
    }
}

impl<T: Clone> Looked<T> {
    fn lock(&self) -> MutexGuard<'_, (Option<Instant>, Option<T>)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_due(&self, every: Duration) -> bool {
        self.lock().0.is_none_or(|at| at.elapsed() >= every)
    }

    fn set(&self, seen: Option<T>) {
        *self.lock() = (Some(Instant::now()), seen);
    }

    fn last(&self) -> Option<T> {
        self.lock().1.clone()
    }
}

#[derive(Debug)]
pub(super) struct Sampler {
    config: RunConfig,
    keys: RedisKeys,
    health: Arc<Health>,
    retained: Looked<Retained>,
    pending: Looked<u64>,
    warned: Mutex<Option<Instant>>,
}

impl Sampler {
    pub(super) fn new(config: &RunConfig, health: &Arc<Health>) -> Self {
        // A process that soon ends is not worth another connection, but for figures that somebody may ask for at once.
        let looked = config.admin.is_none().then(Instant::now);
        Self {
            health: Arc::clone(health),
            config: config.clone(),
            keys: RedisKeys::new(config.slot.as_str()),
            retained: Looked(Mutex::new((looked, None))),
            pending: Looked::default(),
            warned: Mutex::default(),
        }
    }

    pub(super) fn last(&self) -> Sample {
        Sample {
            retained: self.retained.last(),
            pending: self.pending.last(),
        }
    }

    /// Looks at Postgres, if it is time to.
    pub(super) fn look_at_postgres(&self) {
        if !self.retained.is_due(self.every()) {
            return;
        }
        let retained = self.ask_postgres().unwrap_or_else(|error| {
            tracing::debug!("what the slot keeps could not be looked at: {error}");
            None
        });
        if let Some(retained) = &retained {
            self.warn(retained);
        }
        self.retained.set(retained);
    }

    /// Looks at Redis, if it is time to. A thread of its own does it: a Redis that is silent keeps it for long.
    pub(super) fn look_at_redis(&self) {
        if self.pending.is_due(self.every()) {
            self.pending.set(self.ask_redis().ok());
        }
    }

    fn every(&self) -> Duration {
        match self.config.admin {
            Some(_) => EVERY,
            None => EVERY_UNASKED,
        }
    }

    fn ask_postgres(&self) -> Result<Option<Retained>, Error> {
        let extra = [("fallback_application_name", "walmirror admin")];
        let mut connection = pq::Connection::connect(self.config.postgres.expose(), &extra)
            .map_err(|error| Error::postgres("cannot connect to Postgres", error))?;
        connection.answer_within(Some(ANSWER));
        if let Some(lsn) = flushed(&mut connection)? {
            self.health.note_wal_end(lsn);
        }
        retained(&mut connection, self.config.slot.as_str())
    }

    fn ask_redis(&self) -> Result<u64, Error> {
        let mut connection = Connection::connect(&self.config.redis)?;
        match connection.call("count the pending keys", &[b"HLEN", &self.keys.pending])? {
            Value::Int(count) => Ok(u64::try_from(count).unwrap_or(0)),
            _ => Ok(0),
        }
    }

    fn warn(&self, retained: &Retained) {
        let Some(what) = retained.warning() else { return };
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        if warned.is_none_or(|at| at.elapsed() >= WARN_EVERY) {
            *warned = Some(Instant::now());
            tracing::warn!(
                slot = self.config.slot.as_str(),
                next = what.next,
                "{}",
                what.text
            );
        }
    }
}
