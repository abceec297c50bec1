//! How a running sink is, over all its sessions: what `/readyz` and `/metrics` tell. Sessions write it, the admin server
//! reads it; nobody waits for anybody.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use walmirror_proto::Lsn;

use super::metrics::Metrics;

/// Seconds between 1970 and 2000, where Postgres counts from.
const POSTGRES_EPOCH_SECONDS: i64 = 946_684_800;
/// Redis is asked every second at least, and the server every half; silence of so long is an absence.
pub const SILENCE: Duration = Duration::from_secs(5);

/// The state of the process.
#[derive(Debug, Default)]
pub struct Health {
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Sessions that began.
    pub sessions: AtomicU64,
    /// Sessions that failed and were tried again.
    pub retries: AtomicU64,
    /// Gaps that were found.
    pub gaps: AtomicU64,
    /// Whether a session streams now.
    streaming: AtomicBool,
    /// Whether a gap (or the first start) is being healed.
    healing: AtomicBool,
    /// Whether it is not known yet that the stream is of the history that Redis mirrors.
    unproved: AtomicBool,
    /// Whether rows wait to be read again.
    pub(super) pending: AtomicBool,
    /// Tables, and those of them that are not filled and checked yet.
    pub(super) tables: AtomicU64,
    pub(super) tables_due: AtomicU64,
    applied: AtomicU64,
    confirmed: AtomicU64,
    server_end: AtomicU64,
    /// Bytes of transactions in progress that are kept.
    spooled: AtomicU64,
    /// Whether they could not be kept: then they are asked for when they have committed.
    cannot_spool: AtomicBool,
    /// Of the last commit that is applied: microseconds since 2000-01-01 UTC; 0: none yet.
    commit_time: AtomicI64,
    /// A look at the end of the WAL that Redis has not reached, as far as is known; and when Redis last had what such a look had found.
    look: Mutex<Option<(Lsn, Instant)>>,
    current: Mutex<Option<Instant>>,
    /// Milliseconds on the clock of [`since`].
    stream_heard: AtomicU64,
    redis_heard: AtomicU64,
}

/// What a session begins with.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Began {
    /// Everything is made anew.
    pub(super) fresh: bool,
    /// An earlier session, perhaps of another process, has begun that and not ended it.
    pub(super) healing: bool,
    /// The stream is known to be of the history that Redis mirrors.
    pub(super) proved: bool,
    /// Everything before this is in Redis.
    pub(super) applied: Lsn,
    /// When the last transaction of that committed, as in [`Health::note_applied`].
    pub(super) commit_time: Option<i64>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Milliseconds since the process first asked.
fn since() -> u64 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    u64::try_from(START.elapsed().as_millis()).unwrap_or(u64::MAX)
}

impl Health {
    pub(super) fn began(&self, began: Began) {
        self.sessions.fetch_add(1, Ordering::Relaxed);
        self.unproved.store(!began.proved, Ordering::Release);
        if began.fresh {
            self.gaps.fetch_add(1, Ordering::Relaxed);
            // It may be another server, or an earlier state of it, whose WAL ends before that of the one that was there.
            self.server_end.store(began.applied.0, Ordering::Release);
            *lock(&self.look) = None;
        }
        if began.fresh || began.healing {
            self.healing.store(true, Ordering::Release);
        }
        self.note_applied(began.applied, began.commit_time);
        self.note_stream(None);
        self.note_redis();
        self.streaming.store(true, Ordering::Release);
    }

    pub(super) fn ended(&self) {
        if self.streaming.load(Ordering::Acquire) && self.lag_bytes() == 0 {
            *lock(&self.current) = Some(Instant::now());
        }
        self.streaming.store(false, Ordering::Release);
        self.note_spool(0);
    }

    pub(super) fn note_spool(&self, bytes: u64) {
        self.spooled.store(bytes, Ordering::Relaxed);
    }

    /// Bytes of transactions in progress that are kept.
    pub fn spooled(&self) -> u64 {
        self.spooled.load(Ordering::Relaxed)
    }

    pub(super) fn note_cannot_spool(&self) {
        self.cannot_spool.store(true, Ordering::Relaxed);
    }

    pub(super) fn can_spool(&self) -> bool {
        !self.cannot_spool.load(Ordering::Relaxed)
    }

    /// The stream is of the history that Redis mirrors.
    pub(super) fn proved(&self) {
        self.unproved.store(false, Ordering::Release);
    }

    /// Everything is filled that was to be.
    pub(super) fn healed(&self) {
        self.healing.store(false, Ordering::Release);
    }

    /// The server said something; perhaps how far its WAL is.
    pub(super) fn note_stream(&self, wal_end: Option<Lsn>) {
        self.stream_heard.store(since(), Ordering::Release);
        if let Some(lsn) = wal_end {
            self.server_end.fetch_max(lsn.0, Ordering::AcqRel);
        }
    }

    /// Somebody else asked the server where its WAL ends: that goes on where no session streams.
    pub fn note_wal_end(&self, lsn: Lsn) {
        self.server_end.fetch_max(lsn.0, Ordering::AcqRel);
        let mut look = lock(&self.look);
        if look.is_none_or(|look| self.has_reached(look)) {
            *look = Some((lsn, Instant::now()));
        }
    }

    /// Whether Redis has what was seen by a look: then it is as old as that at most.
    fn has_reached(&self, (lsn, at): (Lsn, Instant)) -> bool {
        let reached = self.applied() >= lsn;
        if reached {
            let mut current = lock(&self.current);
            *current = (*current).max(Some(at));
        }
        reached
    }

    pub(super) fn note_redis(&self) {
        self.redis_heard.store(since(), Ordering::Release);
    }

    pub(super) fn note_applied(&self, lsn: Lsn, commit_time: Option<i64>) {
        self.applied.store(lsn.0, Ordering::Release);
        if let Some(time) = commit_time {
            self.commit_time.store(time, Ordering::Release);
        }
    }

    pub(super) fn note_confirmed(&self, lsn: Lsn) {
        self.confirmed.store(lsn.0, Ordering::Release);
    }

    /// Everything before this is in Redis.
    pub fn applied(&self) -> Lsn {
        Lsn(self.applied.load(Ordering::Acquire))
    }

    /// Everything before this the server may forget.
    pub fn confirmed(&self) -> Lsn {
        Lsn(self.confirmed.load(Ordering::Acquire))
    }

    /// Bytes of WAL that the server has and Redis has not; 0 before a session has told what Redis has.
    pub fn lag_bytes(&self) -> u64 {
        match self.applied() {
            Lsn::INVALID => 0,
            applied => self.server_end.load(Ordering::Acquire).saturating_sub(applied.0),
        }
    }

    /// How old Redis is at most: since the last applied commit, or since a look at the server that it has reached, whichever is later. 0
    /// while a session streams and there is nothing more to be applied.
    pub fn lag_seconds(&self) -> f64 {
        if self.lag_bytes() == 0 && self.streaming.load(Ordering::Acquire) {
            return 0.0;
        }
        if let Some(look) = *lock(&self.look) {
            self.has_reached(look);
        }
        let looked = lock(&self.current).map(|at| at.elapsed().as_secs_f64());
        let committed = self.commit_time.load(Ordering::Acquire);
        let committed = (committed != 0).then(|| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let committed = POSTGRES_EPOCH_SECONDS as f64 + committed as f64 / 1e6;
            (now.as_secs_f64() - committed).max(0.0)
        });
        let ages = looked.into_iter().chain(committed);
        ages.reduce(f64::min).unwrap_or(0.0)
    }

    /// How many tables there are, how many of them are not complete, and whether keys wait to be read again.
    pub fn backfill(&self) -> (u64, u64, bool) {
        let (tables, due) = (&self.tables, &self.tables_due);
        let pending = self.pending.load(Ordering::Relaxed);
        (
            tables.load(Ordering::Relaxed),
            due.load(Ordering::Relaxed),
            pending,
        )
    }

    /// Whether a reader of Redis finds there what Postgres says. Err: why not.
    pub fn ready(&self) -> Result<(), String> {
        let silent = |heard: &AtomicU64, who: &str| {
            let quiet = Duration::from_millis(since().saturating_sub(heard.load(Ordering::Acquire)));
            (quiet > SILENCE).then(|| format!("{who} said nothing for {} s", quiet.as_secs()))
        };
        if !self.streaming.load(Ordering::Acquire) {
            return Err("no session streams: Postgres or Redis is away, see the log".to_owned());
        }
        if let Some(why) =
            silent(&self.stream_heard, "Postgres").or_else(|| silent(&self.redis_heard, "Redis"))
        {
            return Err(why);
        }
        if self.unproved.load(Ordering::Acquire) {
            return Err("the stream has not reached what Redis has".to_owned());
        }
        if self.healing.load(Ordering::Acquire) {
            return Err("a gap is being healed: tables are filled anew".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proved(applied: u64) -> Began {
        Began {
            proved: true,
            applied: Lsn(applied),
            ..Began::default()
        }
    }

    #[test]
    fn it_is_ready_while_a_session_streams_and_nothing_is_healed() {
        let health = Health::default();
        assert!(health.ready().is_err());
        health.began(Began {
            fresh: true,
            ..proved(5)
        });
        assert!(health.ready().is_err_and(|why| why.contains("gap")));
        health.healed();
        assert_eq!(health.ready(), Ok(()));
        health.ended();
        assert!(health.ready().is_err());
    }

    #[test]
    fn what_an_earlier_process_began_to_heal_is_not_ready_and_no_new_gap() {
        let health = Health::default();
        health.began(Began {
            healing: true,
            ..proved(5)
        });
        assert!(health.ready().is_err_and(|why| why.contains("gap")));
        assert_eq!(health.gaps.load(Ordering::Relaxed), 0);
        health.healed();
        assert_eq!(health.ready(), Ok(()));
    }

    #[test]
    fn it_is_not_ready_before_the_history_is_known() {
        let health = Health::default();
        health.began(Began::default());
        assert!(health.ready().is_err_and(|why| why.contains("reached")));
        health.proved();
        assert_eq!(health.ready(), Ok(()));
    }

    #[test]
    fn lag_is_what_the_server_has_more() {
        let health = Health::default();
        health.began(proved(5));
        health.note_stream(Some(Lsn(105)));
        health.note_applied(Lsn(25), Some(1));
        assert_eq!(health.lag_bytes(), 80);
        assert!(health.lag_seconds() > 1e8);
        health.note_applied(Lsn(105), None);
        assert_eq!((health.lag_bytes(), health.lag_seconds()), (0, 0.0));
    }

    /// The story: where another cluster took the place of one with more WAL, or that was put back, the lag was what the old one had more, for
    /// as long as the process lived.
    #[test]
    fn what_another_server_had_more_is_no_lag() {
        let health = Health::default();
        health.began(proved(5_000));
        health.note_wal_end(Lsn(9_000));
        health.ended();
        health.began(Began {
            fresh: true,
            ..proved(100)
        });
        assert_eq!((health.lag_bytes(), health.lag_seconds()), (0, 0.0));
        health.note_wal_end(Lsn(130));
        assert_eq!(health.lag_bytes(), 30);
    }

    /// The story: while nobody streamed, the lag stood still, or was 0.
    #[test]
    fn lag_grows_while_no_session_streams() {
        let health = Health::default();
        assert_eq!(health.lag_seconds(), 0.0);
        health.note_wal_end(Lsn(50));
        assert_eq!((health.lag_bytes(), health.lag_seconds()), (0, 0.0));
        // What the progress says is known before anything is applied.
        health.began(Began {
            commit_time: Some(1),
            ..proved(5)
        });
        assert!(health.lag_bytes() == 45 && health.lag_seconds() > 1e8);
        health.note_applied(Lsn(60), None);
        assert_eq!((health.lag_bytes(), health.lag_seconds()), (0, 0.0));
        health.ended();
        std::thread::sleep(Duration::from_millis(2));
        let lag = health.lag_seconds();
        assert!(lag > 0.001 && lag < 60.0, "{lag}");
        health.note_wal_end(Lsn(100));
        assert_eq!(health.lag_bytes(), 40);
        assert!(health.lag_seconds() >= lag);
    }

    /// A database in which nothing is written, on a server where much is.
    #[test]
    fn the_age_of_an_old_commit_is_no_lag_where_redis_had_what_was_there_a_moment_ago() {
        let health = Health::default();
        health.began(Began {
            commit_time: Some(1),
            ..proved(5)
        });
        health.note_wal_end(Lsn(50));
        health.note_applied(Lsn(50), None);
        health.note_wal_end(Lsn(100));
        health.note_stream(Some(Lsn(110)));
        assert!(health.lag_bytes() == 60 && health.lag_seconds() < 60.0);
    }
}
