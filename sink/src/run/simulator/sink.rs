//! A session of the sink without its threads and sockets: the real planner, writer and trail, stepped by the schedule.
//! What `session`, `handshake`, `plan_loop`, `applier` and `receiver` add to them is written out here once more, step by step.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use walmirror_proto::Lsn;

use super::dice::Dice;
use super::link::{self, connect, lock};
use super::postgres::Postgres;
use super::redis::Broken;
use super::stream::Stream;
use super::table::NARROW;
use super::workers::{Pending, Tables};
use crate::backfill::Backfill;
use crate::config::Durability;
use crate::continuity::{Continuity, Last};
use crate::error::Error;
use crate::gate::Gate;
use crate::plan::RedisKeys;
use crate::progress::Progress;
use crate::redis::{Claim, Connection, Identity, Segment, Stored, Writer, begin_first, read_stored};
use crate::replication::{History, SlotInfo};
use crate::run::decide::{Decision, Found, Server, decide, still_fits};
use crate::run::durability::{Seen, Trail};
use crate::run::planning::{Limits, Planning, Start};
use crate::spool::Spool;

/// Segments that are on their way to Redis (AHEAD of plan_loop).
const AHEAD: usize = 3;

/// What does not change over a schedule.
pub(super) struct Setting {
    pub(super) keys: RedisKeys,
    pub(super) durability: Durability,
    pub(super) limits: Limits,
    pub(super) gate_bytes: usize,
    /// More keys than this are removed ahead of the transaction that they go with.
    pub(super) purge_keys: usize,
    pub(super) epoch: Instant,
}

/// What the server said when it was looked at.
struct Said {
    slot: Option<SlotInfo>,
    identity: Identity,
    history: History,
    end: Lsn,
}

impl Said {
    fn by(postgres: &Postgres, stored: &Stored, broken: Broken) -> Self {
        let slot = postgres.slot.map(|slot| SlotInfo {
            plugin: Some("walmirror".into()),
            database: Some("d".into()),
            confirmed_flush_lsn: Some(Lsn(slot.confirmed)),
            restart_lsn: Some(Lsn(slot.confirmed)),
            active: false,
            active_pid: None,
            wal_status: Some("reserved".into()),
            failover: Some(slot.failover || broken == Broken::AnyTimeline),
        });
        let (timeline, progress) = (postgres.timeline(), stored.progress.as_ref());
        let mirrored = progress
            .map(|progress| progress.timeline)
            .filter(|mirrored| *mirrored < timeline);
        let history = match (mirrored, broken) {
            (None, _) | (_, Broken::NoTimelines) => History::none(),
            (Some(mirrored), Broken::AnyTimeline) => {
                History::parse(&format!("{mirrored}\t{}\tnever\n", Lsn(u64::MAX))).unwrap()
            }
            (Some(_), _) => History::parse(&postgres.ancestors()).unwrap(),
        };
        Self {
            slot,
            identity: Identity {
                system_id: "1".into(),
                timeline,
                database: "d".into(),
            },
            history,
            end: Lsn(postgres.end),
        }
    }

    fn server(&self) -> Server<'_> {
        Server {
            slot: self.slot.as_ref(),
            identity: &self.identity,
            history: &self.history,
            end: self.end,
        }
    }
}

/// A session that has the slot, but not yet the right to write.
pub(super) struct Starting {
    redis: Connection,
    pub(super) stream: Option<Stream>,
    start: Lsn,
    /// What the server is asked to send.
    from: Lsn,
    fresh: Option<Lsn>,
    confirmed: Lsn,
    said: Said,
}

impl Starting {
    /// Whether the progress begins anew.
    pub(super) fn is_fresh(&self) -> bool {
        self.fresh.is_some()
    }
}

/// The first half of the handshake. The second is the reason, where Redis and the slot do not fit together.
pub(super) fn shake(
    setting: &Setting,
    server: &link::Shared,
    postgres: &mut Postgres,
    dice: &mut Dice,
    found: Option<&Found>,
) -> Result<(Starting, Option<String>), Error> {
    let mut redis = connect(server);
    let stored = read_stored(&mut redis, &setting.keys)?;
    let said = Said::by(postgres, &stored, lock(server).redis.broken);
    let mut gap = None;
    let decision = decide(stored.progress.as_ref(), &said.server(), found);
    let (start, fresh) = match decision {
        Decision::Resume(lsn) => (lsn, None),
        Decision::First(made) => {
            if made.is_none() {
                begin_first(&mut redis, &setting.keys, &said.identity)?;
            }
            let lsn = made.unwrap_or_else(|| Lsn(postgres.create_slot()));
            (lsn, Some(lsn))
        }
        Decision::Gap { why, slot } => {
            gap = Some(why);
            let lsn = slot.unwrap_or_else(|| {
                let position = stored.progress.as_ref().map_or(0, |progress| progress.lsn.0);
                postgres.outrun(position);
                Lsn(postgres.create_slot())
            });
            match &stored.progress {
                Some(progress) if lock(server).redis.broken == Broken::IgnoreGap => (progress.lsn, None),
                _ => (lsn, Some(lsn)),
            }
        }
    };
    if fresh.is_some() {
        redis = connect(server);
    }
    // The server never begins before what is confirmed. It begins at the start that was asked for; that it may send more
    // is what the skipping is for.
    let confirmed = postgres.slot.map_or(0, |slot| slot.confirmed);
    let resumed = stored.progress.as_ref().filter(|_| fresh.is_none());
    let from = resumed.map_or(start, Continuity::start).max(Lsn(confirmed));
    let sent = if dice.once_in(3) { confirmed } else { from.0 };
    let starting = Starting {
        redis,
        stream: Some(Stream::start(sent, lock(server).redis.broken)),
        start,
        from,
        fresh,
        confirmed: fresh
            .or(said.slot.as_ref().and_then(|slot| slot.confirmed_flush_lsn))
            .unwrap_or_default(),
        said,
    };
    Ok((starting, gap))
}

pub(super) struct Session {
    pub(super) shared: Arc<crate::run::shared::Shared>,
    pub(super) backfill: Arc<Backfill>,
    planning: Planning,
    writer: Writer,
    trail: Trail,
    /// None: the server has ended it, and this side does not know yet.
    pub(super) stream: Option<Stream>,
    segments: VecDeque<Segment>,
    blocked: Option<Segment>,
    tables: Tables,
    pending: Pending,
    server: link::Shared,
    /// The Postgres that it streams from.
    incarnation: usize,
}

impl Session {
    /// The second half of the handshake.
    pub(super) fn claim(
        setting: &Setting,
        starting: Starting,
        server: &link::Shared,
        postgres: &mut Postgres,
    ) -> Result<Self, Error> {
        let Starting {
            redis,
            stream,
            start,
            from,
            fresh,
            confirmed,
            said,
        } = starting;
        let fits = |stored: &Stored| match fresh {
            Some(_) => Ok(()),
            None => still_fits(stored, start, &said.server()),
        };
        let mut claim = Claim::take(redis, &setting.keys, "s", &said.identity, fresh, fits)?;
        let broken = lock(server).redis.broken;
        if broken == Broken::ForgetPosition
            && let Some(progress) = &mut claim.stored.progress
        {
            progress.lsn = confirmed;
        }
        if broken == Broken::NoTaker {
            claim.stored.relations.remove(&NARROW);
        }
        let position = fresh
            .or(claim.stored.progress.as_ref().map(|progress| progress.lsn))
            .unwrap_or_default();
        let resumed = claim.stored.progress.as_ref().filter(|_| fresh.is_none());
        let continuity = match resumed {
            Some(progress) if broken == Broken::ForgetPurge => Continuity::of(
                &Progress {
                    purging: None,
                    ..progress.clone()
                },
                from,
            ),
            Some(progress) if broken != Broken::AnyHistory => Continuity::of(progress, from),
            _ => Continuity::proved(),
        };
        let last = resumed.and_then(|progress| progress.last);
        if !matches!(last, Some(Last::Commit(_))) && broken != Broken::NoLandmark {
            postgres.landmark();
        }
        let horizon = postgres.burn_xid();
        let applied = if continuity.is_proved() || broken == Broken::ConfirmUnproved {
            position
        } else {
            confirmed
        };
        let shared = Arc::new(crate::run::shared::Shared::new(applied));
        let backfill = Arc::new(Backfill::default());
        let marker_prefix = format!("s:{horizon}:");
        let planning = Planning::new(Start {
            keys: setting.keys.clone(),
            scripts: claim.scripts.clone(),
            stored: claim.stored.clone(),
            fresh,
            continuity,
            gate: Gate::new(setting.gate_bytes, horizon, horizon),
            marker_prefix: marker_prefix.clone(),
            slot: "s".to_owned(),
            limits: setting.limits,
            on_bad_row: crate::config::OnBadRow::Skip,
            spool: Spool::new(std::env::temp_dir()),
            backfill: Arc::clone(&backfill),
            shared: Arc::clone(&shared),
        })?;
        let mut writer = Writer::new(claim, setting.keys.clone())?;
        writer.set_atomic_purge_keys(setting.purge_keys);
        backfill.note_pending();
        Ok(Self {
            shared,
            tables: Tables::new(marker_prefix.clone(), broken),
            pending: Pending::new(marker_prefix, broken),
            backfill,
            planning,
            writer,
            trail: Trail::new(setting.durability, confirmed),
            stream,
            segments: VecDeque::new(),
            blocked: None,
            server: Arc::clone(server),
            incarnation: postgres.incarnation,
        })
    }

    /// Hands over what is planned, as far as there is room. True: the planner waits for the applier.
    fn hand_over(&mut self) -> bool {
        while self.segments.len() < AHEAD {
            match self.blocked.take().or_else(|| self.planning.next_segment()) {
                Some(segment) => self.segments.push_back(segment),
                None => return false,
            }
        }
        self.blocked = self.blocked.take().or_else(|| self.planning.next_segment());
        self.blocked.is_some()
    }

    /// The planner takes a frame. False: there is none, or it is busy.
    pub(super) fn frame(
        &mut self,
        postgres: &Postgres,
        dice: &mut Dice,
        records: u64,
    ) -> Result<bool, Error> {
        if self.hand_over() {
            return Ok(false);
        }
        if self.planning.is_replaying() {
            return self.planning.replay().map(|()| true);
        }
        match self
            .stream
            .as_mut()
            .and_then(|stream| stream.frame(postgres, dice, records))
        {
            Some(frame) => self.planning.frame(&frame, Lsn::INVALID).map(|()| true),
            None => Ok(false),
        }
    }

    pub(super) fn keepalive(&mut self, postgres: &Postgres) -> Result<(), Error> {
        if let (false, Some(stream)) = (self.hand_over(), &self.stream) {
            self.planning.keepalive(Lsn(stream.position(postgres)))?;
        }
        Ok(())
    }

    pub(super) fn piece(&mut self) -> Result<bool, Error> {
        if self.hand_over() || !self.planning.wants_piece() {
            return Ok(false);
        }
        self.planning.piece().map(|()| true)
    }

    /// What is complete goes out.
    pub(super) fn flush(&mut self) {
        self.planning.note_healed();
        if !self.hand_over() && (self.planning.is_dirty() || self.planning.is_advanced()) {
            self.planning.flush();
        }
        self.hand_over();
    }

    /// The applier takes a segment. None: there was none; Some(true): an EXEC was done.
    pub(super) fn apply(&mut self, now: Instant) -> Result<Option<bool>, Error> {
        self.hand_over();
        let Some(segment) = self.segments.pop_front() else {
            return Ok(None);
        };
        // As under load, where it is never idle.
        self.writer.ask_role();
        lock(&self.server).redis.writes = Some(self.incarnation);
        let applied = self.writer.apply(segment, self.segments.front(), &|| false);
        lock(&self.server).redis.writes = None;
        let applied = applied?;
        if let Some(applied) = &applied {
            self.shared.set_heard(now);
            if applied.pending {
                self.backfill.note_pending();
            }
            self.backfill.answer(applied.asked);
            self.shared.set_applied(applied.step.lsn);
        }
        Ok(Some(applied.is_some()))
    }

    /// An idle applier asks whether Redis is still there and its own, and whether it is safe.
    pub(super) fn check(&mut self, durability: Durability, now: Instant) -> Result<(), Error> {
        if self.writer.is_open() || !self.segments.is_empty() {
            return Ok(());
        }
        let applied = self.shared.applied();
        if durability == Durability::Aof && self.writer.wait_aof(1)? {
            self.shared.set_durable(applied);
        }
        self.writer.check()?;
        self.shared.set_heard(now);
        Ok(())
    }

    /// What the server is told now. None: the stream has ended.
    pub(super) fn feedback(&mut self, now: Instant) -> Option<u64> {
        self.stream.as_ref()?;
        Some(self.trail.feedback(self.seen(), now).flushed.0)
    }

    fn seen(&self) -> Seen {
        Seen {
            applied: self.shared.applied(),
            reported: self.shared.durable(),
            heard: self.shared.heard(),
        }
    }

    /// The end in good order: what is complete goes out, and the server is told.
    pub(super) fn stop(&mut self, now: Instant) -> Result<Option<u64>, Error> {
        while self.apply(now)?.is_some() {}
        self.flush();
        while self.apply(now)?.is_some() {}
        let last = self.trail.last(self.seen()).flushed.0;
        Ok(self.stream.is_some().then_some(last))
    }

    pub(super) fn work(
        &mut self,
        postgres: &mut Postgres,
        server: &link::Shared,
        dice: &mut Dice,
        table_worker: bool,
    ) -> Result<(), Error> {
        if table_worker {
            self.tables.step(
                &mut self.planning,
                &self.backfill,
                postgres,
                &lock(server).redis,
                dice,
            )
        } else {
            self.pending
                .step(&mut self.planning, &self.backfill, postgres, &lock(server).redis)
        }
    }

    pub(super) fn epoch(&self) -> u64 {
        self.writer.epoch()
    }

    /// Whether nothing is left to be done but what the stream brings.
    pub(super) fn is_idle(&self) -> bool {
        self.backfill.is_idle()
            && self.segments.is_empty()
            && self.blocked.is_none()
            && !self.planning.is_dirty()
            && !self.planning.is_replaying()
            && !self.planning.wants_piece()
    }
}

pub(super) fn at(setting: &Setting, milliseconds: u64) -> Instant {
    setting.epoch + Duration::from_millis(milliseconds)
}
