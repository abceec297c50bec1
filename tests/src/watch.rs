//! What must hold at every moment of a fault, looked at all the time from outside.
//!
//! - INVARIANT I1: what the slot is confirmed to, read first, is never beyond what Redis says it has, read after.
//! - INVARIANT I4: the position does not go back within an epoch, nor the epoch.
//! - The accounts in Redis, read in one MULTI, are all there and always add up: transactions are whole (INVARIANT I2).
//! - No row goes back. Each of some items counts up and is always there, written by the stream alone or read again for its large value;
//!   rows of a cache count up as well, and come and go as SELECTs read them and writes remove them.
//!
//! A server that does not answer is not looked at. Where a fault makes Redis itself lose data, the test says so, and
//! what was lost is let go.

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use postgres::{Client, NoTls};
use redis::Connection;

use crate::load::{ACCOUNTS, COUNTED, SUM};
use crate::{DEADLINE, Lsn, wait_for};

/// How long a server that is stopped may keep a look at it.
const PATIENCE: Duration = Duration::from_secs(1);

/// The tables whose rows count up: one that is mirrored, and a cache.
const TABLES: [&str; 2] = ["item", "seen"];

#[derive(Default)]
struct State {
    stop: AtomicBool,
    lossy: AtomicBool,
    redis_port: AtomicU16,
    samples: AtomicU64,
    slot_samples: AtomicU64,
    /// How often a row was seen to have counted up, of each of [`TABLES`].
    steps: [AtomicU64; 2],
    broken: Mutex<Vec<String>>,
}

impl State {
    /// Compares the rows that count up with the highest that each was, whatever was not there meanwhile.
    fn count(&self, seen: &Seen, highest: &mut [Option<i64>], broken: &mut Vec<String>) {
        for (place, (count, highest)) in seen.counts.iter().zip(highest).enumerate() {
            let (table, id) = (place / COUNTED as usize, place % COUNTED as usize + 1);
            let key = format!("{}:{id}", TABLES[table]);
            match (*highest, *count) {
                (Some(before), Some(now)) if now < before => {
                    broken.push(format!("{key} went from {before} back to {now} at {}", seen.lsn));
                }
                (Some(before), Some(now)) if now > before => {
                    self.steps[table].fetch_add(1, Ordering::AcqRel);
                }
                (_, None) if TABLES[table] == "item" => {
                    broken.push(format!("{key} is not there at {}", seen.lsn));
                }
                _ => {}
            }
            *highest = (*highest).max(*count);
        }
    }
}

/// The thread that looks.
pub struct Watch {
    state: Arc<State>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Looks at this slot, which is named like its database.
    pub fn start(config: &postgres::Config, slot: &str, redis_port: u16) -> Watch {
        let state = Arc::new(State::default());
        state.redis_port.store(redis_port, Ordering::Release);
        let (shared, config, slot) = (Arc::clone(&state), config.clone(), slot.to_owned());
        let thread = thread::spawn(move || look(&shared, &config, &slot));
        Watch {
            state,
            thread: Some(thread),
        }
    }

    /// Redis may have lost something from here on: positions may go back, and accounts may be incomplete.
    pub fn may_lose(&self, lossy: bool) {
        self.state.lossy.store(lossy, Ordering::Release);
    }

    /// Another Redis is the one that counts.
    pub fn look_at(&self, redis_port: u16) {
        self.state.redis_port.store(redis_port, Ordering::Release);
    }

    /// Fails if something did not hold so far.
    #[track_caller]
    pub fn assert_holds(&self) {
        let broken = self.state.broken.lock().unwrap_or_else(|e| e.into_inner());
        assert!(broken.is_empty(), "{}", broken.join("\n"));
    }

    /// Waits until Redis was looked at once more, and once more together with the slot: a watch that sees nothing proves nothing.
    #[track_caller]
    pub fn assert_looks(&self) {
        let counts = || [&self.state.samples, &self.state.slot_samples].map(|n| n.load(Ordering::Acquire));
        let before = counts();
        wait_for(DEADLINE, "another look at the slot and at Redis", || {
            let now = counts();
            (now[0] > before[0] && now[1] > before[1]).then_some(())
        });
        self.assert_holds();
    }

    /// Ends, and says what it has seen.
    #[track_caller]
    pub fn stop(&mut self) -> Looks {
        self.state.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the watch");
        }
        self.assert_holds();
        let count = |count: &AtomicU64| count.load(Ordering::Acquire);
        Looks {
            redis: count(&self.state.samples),
            slot: count(&self.state.slot_samples),
            items: count(&self.state.steps[0]),
            cached: count(&self.state.steps[1]),
        }
    }
}

/// What a watch has seen.
#[derive(Debug)]
pub struct Looks {
    /// How often Redis was looked at.
    pub redis: u64,
    /// How often the slot just before it.
    pub slot: u64,
    /// How often a row of `item` had counted up.
    pub items: u64,
    /// How often a row of the cache `seen` had.
    pub cached: u64,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::Release);
    }
}

/// What Redis says in one atomic step.
struct Seen {
    lsn: Lsn,
    epoch: u64,
    balances: Vec<Option<i64>>,
    /// `n` of the rows that count up, table by table.
    counts: Vec<Option<i64>>,
}

fn look(state: &State, config: &postgres::Config, slot: &str) {
    let (mut client, mut redis): (Option<Client>, Option<(u16, Connection)>) = (None, None);
    let mut last: Option<(u64, Lsn)> = None;
    let mut highest = [None; TABLES.len() * COUNTED as usize];
    while !state.stop.load(Ordering::Acquire) {
        thread::sleep(Duration::from_millis(4));
        let lossy = state.lossy.load(Ordering::Acquire);
        // First the slot, then Redis: what was confirmed before must be there after.
        let confirmed = confirmed(&mut client, config, slot);
        let port = state.redis_port.load(Ordering::Acquire);
        let Some(seen) = seen(&mut redis, port, slot) else {
            continue;
        };
        // A loss that began while this was read counts as well.
        if lossy || state.lossy.load(Ordering::Acquire) {
            last = None;
            highest.fill(None);
            continue;
        }
        let mut broken = Vec::new();
        if let Some(confirmed) = confirmed.filter(|&confirmed| confirmed > seen.lsn) {
            broken.push(format!(
                "the slot is confirmed to {confirmed}, Redis is at {}",
                seen.lsn
            ));
        }
        if let Some((epoch, lsn)) = last
            && (seen.epoch < epoch || seen.lsn < lsn)
        {
            broken.push(format!(
                "progress went from {lsn} in epoch {epoch} to {} in epoch {}",
                seen.lsn, seen.epoch
            ));
        }
        last = Some((seen.epoch, seen.lsn));
        let sum: i64 = seen.balances.iter().flatten().sum();
        if let Some(id) = seen.balances.iter().position(Option::is_none) {
            broken.push(format!("account {id} is not there at {}", seen.lsn));
        } else if sum != SUM {
            broken.push(format!("the accounts add up to {sum} at {}", seen.lsn));
        }
        state.count(&seen, &mut highest, &mut broken);
        state.samples.fetch_add(1, Ordering::AcqRel);
        if confirmed.is_some() {
            state.slot_samples.fetch_add(1, Ordering::AcqRel);
        }
        let mut all = state.broken.lock().unwrap_or_else(|e| e.into_inner());
        if all.len() < 10 {
            all.extend(broken);
        }
    }
}

fn confirmed(client: &mut Option<Client>, config: &postgres::Config, slot: &str) -> Option<Lsn> {
    if client.as_ref().is_none_or(Client::is_closed) {
        *client = config.connect(NoTls).ok();
    }
    let query = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = $1";
    match client.as_mut()?.query_opt(query, &[&slot]) {
        Ok(row) => row?.get::<_, Option<String>>(0)?.parse().ok(),
        Err(_) => {
            *client = None;
            None
        }
    }
}

fn seen(redis: &mut Option<(u16, Connection)>, port: u16, slot: &str) -> Option<Seen> {
    if redis.as_ref().is_none_or(|(old, _)| *old != port) {
        let client = redis::Client::open(format!("redis://127.0.0.1:{port}/0")).ok()?;
        let connection = client.get_connection_with_timeout(PATIENCE).ok()?;
        connection.set_read_timeout(Some(PATIENCE)).ok()?;
        *redis = Some((port, connection));
    }
    let (_, connection) = redis.as_mut()?;
    let mut pipe = redis::pipe();
    pipe.atomic()
        .cmd("HMGET")
        .arg(format!("walmirror:{{{slot}}}:progress"))
        .arg("lsn")
        .arg("epoch");
    for id in 0..ACCOUNTS {
        pipe.cmd("HGET").arg(format!("account:{id}")).arg("balance");
    }
    for table in TABLES {
        for id in 1..=COUNTED {
            pipe.cmd("HGET").arg(format!("{table}:{id}")).arg("n");
        }
    }
    let reply: Result<Vec<redis::Value>, _> = pipe.query(connection);
    let Ok(reply) = reply else {
        *redis = None;
        return None;
    };
    let (progress, rows) = reply.split_first()?;
    let (balances, counts) = rows.split_at_checked(ACCOUNTS as usize)?;
    let numbers = |values: &[redis::Value]| {
        let number = |value| redis::from_redis_value_ref(value).unwrap_or(None);
        values.iter().map(number).collect()
    };
    let (lsn, epoch): (Option<String>, Option<u64>) = redis::from_redis_value_ref(progress).ok()?;
    Some(Seen {
        lsn: lsn?.parse().ok()?,
        epoch: epoch?,
        balances: numbers(balances),
        counts: numbers(counts),
    })
}
