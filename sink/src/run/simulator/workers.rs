//! The backfill's threads against the model of Postgres: what `fill`, `sweep`, `pending` and `worker` do, one step at a time.
//! A marker enters the WAL some time after its rows were read.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::dice::Dice;
use super::postgres::{IDS, OIDS, Postgres, Wal};
use super::redis::{Broken, Redis};
use super::table::{Definition, Id};
use crate::backfill::{Backfill, Chunk, Content, Cursor, PackedRows, Stage, Task, Window};
use crate::error::Error;
use crate::gate::Snapshot;
use crate::plan::Purge;
use crate::run::planning::Planning;
use walmirror_proto::pb;
use walmirror_proto::writer::FrameWriter;

/// Hands chunks to the planner and writes their markers.
struct Courier {
    marker_prefix: String,
    broken: Broken,
    window: Arc<Window>,
}

impl Courier {
    fn new(marker_prefix: String, broken: Broken) -> Self {
        Self {
            marker_prefix,
            broken,
            window: Arc::new(Window::default()),
        }
    }

    /// A snapshot that the gate will not refuse as a whole.
    fn snapshot(&self, postgres: &Postgres, backfill: &Backfill) -> Option<Snapshot> {
        let snapshot = postgres.snapshot();
        (!snapshot.may_miss_below(backfill.horizon())).then_some(snapshot)
    }

    #[allow(clippy::too_many_arguments)]
    fn submit(
        &self,
        planning: &mut Planning,
        backfill: &Backfill,
        postgres: &mut Postgres,
        (relation, generation): (u32, u64),
        snapshot: Snapshot,
        content: Content,
        cursor: Option<Cursor>,
    ) -> Result<(), Error> {
        let id = backfill.marker();
        self.window.sent();
        let window = Arc::clone(&self.window);
        planning.chunk(Chunk {
            id,
            relation,
            generation,
            snapshot,
            content,
            cursor,
            window,
        });
        let content = format!("{}{id}", self.marker_prefix).into_bytes();
        if self.broken == Broken::NoMarker {
            let mut frame = FrameWriter::new();
            frame.record(&pb::Marker { content, lsn: 0 }.into());
            return planning.frame(frame.as_bytes());
        }
        postgres.message(|lsn| Wal::Marker { lsn, content });
        postgres.burn_xid();
        Ok(())
    }

    /// The snapshot that comes with what was read now in `snapshot`.
    fn claimed(&self, postgres: &Postgres, snapshot: Snapshot) -> Snapshot {
        if self.broken == Broken::GateByLsn {
            postgres.snapshot_by_lsn()
        } else {
            snapshot
        }
    }
}

enum State {
    Idle,
    /// Until every transaction up to this one is over.
    Outlast(u64, Next),
    Fill(u32, Task, Cursor),
    /// Read, and its marker not yet written.
    Read(u32, Task, Snapshot, Content, Cursor),
    Sweep(u32, Task, VecDeque<Vec<u8>>),
    Absent(u32, Task, VecDeque<Vec<u8>>, Snapshot, Vec<Vec<u8>>),
}

enum Next {
    Reconcile,
    Fill(u32, Task),
    Sweep(u32, Task),
}

/// The worker that reads tables and looks for keys without rows.
pub(super) struct Tables {
    courier: Courier,
    state: State,
}

impl Tables {
    pub(super) fn new(marker_prefix: String, broken: Broken) -> Self {
        Self {
            courier: Courier::new(marker_prefix, broken),
            state: State::Idle,
        }
    }

    pub(super) fn step(
        &mut self,
        planning: &mut Planning,
        backfill: &Backfill,
        postgres: &mut Postgres,
        redis: &Redis,
        dice: &mut Dice,
    ) -> Result<(), Error> {
        let window = Arc::clone(&self.courier.window);
        let is_over =
            |relation, task: &Task| window.is_stale() || !backfill.is_current(relation, task.generation);
        let state = std::mem::replace(&mut self.state, State::Idle);
        self.state = match state {
            State::Idle if window.outstanding() > 0 => State::Idle,
            State::Idle => {
                window.reset(|| true);
                let next = match backfill.next_task() {
                    _ if !backfill.is_reconciled() => Next::Reconcile,
                    Some((relation, task)) if task.cursor.stage == Stage::Fill => Next::Fill(relation, task),
                    Some((relation, task)) => Next::Sweep(relation, task),
                    None => return Ok(()),
                };
                State::Outlast(postgres.burn_xid(), next)
            }
            State::Outlast(newest, next) if postgres.oldest_running() <= newest => {
                State::Outlast(newest, next)
            }
            State::Outlast(_, Next::Reconcile) => {
                let snapshot = postgres.snapshot();
                let labels = OIDS.iter().filter_map(|oid| postgres.label(*oid, &snapshot));
                let catalog = labels.map(|definition| definition.relation(0)).collect();
                let content = Content::Catalog(catalog);
                self.courier.submit(
                    planning,
                    backfill,
                    postgres,
                    (0, 0),
                    Snapshot::default(),
                    content,
                    None,
                )?;
                State::Idle
            }
            State::Outlast(_, Next::Fill(relation, task)) => {
                let cursor = task.cursor.clone();
                State::Fill(relation, task, cursor)
            }
            State::Outlast(_, Next::Sweep(relation, task)) => {
                State::Sweep(relation, task, redis.data.keys().cloned().collect())
            }
            State::Fill(relation, task, _) if is_over(relation, &task) => State::Idle,
            State::Fill(relation, task, cursor)
                if window.outstanding() > 1 || postgres.is_locked(relation) =>
            {
                State::Fill(relation, task, cursor)
            }
            State::Fill(relation, task, cursor) => match self.courier.snapshot(postgres, backfill) {
                None => State::Fill(relation, task, cursor),
                Some(snapshot) => match postgres.label(relation, &snapshot) {
                    None => State::Idle,
                    Some(label) => self.read(postgres, relation, task, cursor, snapshot, &label, dice),
                },
            },
            State::Read(relation, task, snapshot, content, cursor) => {
                let (target, next) = ((relation, task.generation), cursor.clone());
                self.courier.submit(
                    planning,
                    backfill,
                    postgres,
                    target,
                    snapshot,
                    content,
                    Some(cursor),
                )?;
                if next.stage != Stage::Fill {
                    State::Idle
                } else {
                    State::Fill(relation, task, next)
                }
            }
            State::Sweep(relation, task, _) if is_over(relation, &task) => State::Idle,
            State::Sweep(relation, task, keys)
                if window.outstanding() > 1 || postgres.is_locked(relation) =>
            {
                State::Sweep(relation, task, keys)
            }
            State::Sweep(relation, task, keys) if keys.is_empty() => {
                let (snapshot, done) = (postgres.snapshot(), Cursor::done(task.cursor.fingerprint));
                let target = (relation, task.generation);
                self.courier.submit(
                    planning,
                    backfill,
                    postgres,
                    target,
                    snapshot,
                    Content::Absent(vec![]),
                    Some(done),
                )?;
                State::Idle
            }
            State::Sweep(relation, task, mut keys) => match self.courier.snapshot(postgres, backfill) {
                None => State::Sweep(relation, task, keys),
                Some(snapshot) => {
                    let page: Vec<_> = keys.drain(..keys.len().min(4)).collect();
                    let absent = absent(postgres, backfill, relation, &task, &snapshot, page);
                    let snapshot = self.courier.claimed(postgres, snapshot);
                    State::Absent(relation, task, keys, snapshot, absent)
                }
            },
            State::Absent(relation, task, keys, snapshot, absent) => {
                let target = (relation, task.generation);
                self.courier.submit(
                    planning,
                    backfill,
                    postgres,
                    target,
                    snapshot,
                    Content::Absent(absent),
                    None,
                )?;
                State::Sweep(relation, task, keys)
            }
        };
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn read(
        &self,
        postgres: &Postgres,
        relation: u32,
        task: Task,
        cursor: Cursor,
        snapshot: Snapshot,
        label: &Definition,
        dice: &mut Dice,
    ) -> State {
        let mut rows = PackedRows::default();
        let mut next = cursor;
        let until = (next.block + 1 + dice.roll(3) as u32).min(u32::from(IDS));
        let is_last = next.block >= u32::from(IDS);
        while next.block < until {
            if let Some(row) = postgres.row(relation, next.block as Id, &snapshot) {
                rows.push(&label.pack(&row));
            }
            next.block += 1;
        }
        if is_last {
            next = next.filled();
        }
        let snapshot = self.courier.claimed(postgres, snapshot);
        State::Read(relation, task, snapshot, Content::Rows(rows), next)
    }
}

/// Those of the keys that belong to the table and have no row.
fn absent(
    postgres: &Postgres,
    backfill: &Backfill,
    relation: u32,
    task: &Task,
    snapshot: &Snapshot,
    mut keys: Vec<Vec<u8>>,
) -> Vec<Vec<u8>> {
    let others = backfill.other_templates(relation);
    let own = Purge::new(relation, &task.mapping.template, &others);
    let old = task.cursor.old_keys.iter().map(|key| key.parse_template());
    let retired: Vec<Purge> = old
        .map(|template| Purge::retired(relation, &template, &others))
        .collect();
    keys.retain(|key| match own.match_key(key) {
        Some(values) => row_of(&values).is_none_or(|id| postgres.row(relation, id, snapshot).is_none()),
        None => retired.iter().any(|purge| purge.match_key(key).is_some()),
    });
    keys
}

trait ParseTemplate {
    fn parse_template(&self) -> walmirror_proto::key::KeyTemplate;
}

impl ParseTemplate for String {
    fn parse_template(&self) -> walmirror_proto::key::KeyTemplate {
        walmirror_proto::key::KeyTemplate::parse(self).unwrap()
    }
}

fn row_of(values: &[Vec<u8>]) -> Option<Id> {
    std::str::from_utf8(values.first()?).ok()?.parse().ok()
}

/// The worker that reads pending keys again.
pub(super) struct Pending {
    courier: Courier,
    read: Option<((u32, u64), Snapshot, Content)>,
}

impl Pending {
    pub(super) fn new(marker_prefix: String, broken: Broken) -> Self {
        Self {
            courier: Courier::new(marker_prefix, broken),
            read: None,
        }
    }

    pub(super) fn step(
        &mut self,
        planning: &mut Planning,
        backfill: &Backfill,
        postgres: &mut Postgres,
        redis: &Redis,
    ) -> Result<(), Error> {
        if let Some((target, snapshot, content)) = self.read.take() {
            return self
                .courier
                .submit(planning, backfill, postgres, target, snapshot, content, None);
        }
        if !backfill.has_pending() || self.courier.window.outstanding() > 0 {
            return Ok(());
        }
        self.courier.window.reset(|| true);
        let mut pages: BTreeMap<u32, Vec<Vec<u8>>> = BTreeMap::new();
        for (key, oid) in redis.pending() {
            let oid = String::from_utf8_lossy(oid).parse().unwrap_or(0);
            pages.entry(oid).or_default().push(key.clone());
        }
        if pages.is_empty() {
            backfill.clear_pending();
        }
        for (relation, keys) in pages {
            let Some(task) = backfill.task(relation) else {
                let content = Content::Orphans(keys);
                self.courier.submit(
                    planning,
                    backfill,
                    postgres,
                    (relation, 0),
                    Snapshot::default(),
                    content,
                    None,
                )?;
                continue;
            };
            let own = Purge::new(
                relation,
                &task.mapping.template,
                &backfill.other_templates(relation),
            );
            let (own, foreign): (Vec<_>, Vec<_>) =
                keys.into_iter().partition(|key| own.match_key(key).is_some());
            let target = (relation, task.generation);
            if !foreign.is_empty() {
                let content = Content::Orphans(foreign);
                self.courier.submit(
                    planning,
                    backfill,
                    postgres,
                    target,
                    Snapshot::default(),
                    content,
                    None,
                )?;
            }
            let Some(snapshot) = self
                .courier
                .snapshot(postgres, backfill)
                .filter(|_| !postgres.is_locked(relation))
            else {
                continue;
            };
            let Some(label) = postgres.label(relation, &snapshot).filter(|_| !own.is_empty()) else {
                continue;
            };
            let rows = own.into_iter().map(|key| {
                let values = task.mapping.template.match_key(&key).unwrap_or_default();
                let row = row_of(&values).and_then(|id| postgres.row(relation, id, &snapshot));
                (key, row.map(|row| label.pack(&row)))
            });
            let content = Content::Keys(rows.collect());
            let snapshot = self.courier.claimed(postgres, snapshot);
            self.read = Some((target, snapshot, content));
            break;
        }
        Ok(())
    }
}
