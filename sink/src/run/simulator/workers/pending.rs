//! The worker that reads pending keys again and takes horizons.

use std::collections::BTreeMap;

use super::super::postgres::Postgres;
use super::super::redis::{Broken, Redis};
use super::super::table::row_of;
use super::Courier;
use crate::backfill::{Backfill, Content};
use crate::error::Error;
use crate::gate::Snapshot;
use crate::plan::Belongs;
use crate::run::planning::Planning;

/// The worker that reads pending keys again and takes horizons.
pub(in crate::run::simulator) struct Pending {
    courier: Courier,
    read: Option<((u32, u64), Snapshot, Content)>,
    /// How often it has read: what the planner is told of it may be late.
    reads: usize,
    /// It has a window of its own, and waits for nothing.
    horizons: Courier,
    horizon: Option<Content>,
}

impl Pending {
    pub(in crate::run::simulator) fn new(marker_prefix: String, broken: Broken) -> Self {
        Self {
            courier: Courier::new(marker_prefix.clone(), broken),
            read: None,
            reads: 0,
            horizons: Courier::new(marker_prefix, broken),
            horizon: None,
        }
    }

    pub(in crate::run::simulator) fn step(
        &mut self,
        planning: &mut Planning,
        backfill: &Backfill,
        postgres: &mut Postgres,
        redis: &Redis,
    ) -> Result<(), Error> {
        if let Some(horizon) = self.horizon.take() {
            let (nowhere, nothing) = ((0, 0), Snapshot::default());
            return self
                .horizons
                .submit(planning, backfill, postgres, nowhere, nothing, horizon, None);
        }
        let tables = backfill.without_horizon();
        if !tables.is_empty() && self.horizons.window.outstanding() == 0 {
            let horizon = match self.horizons.broken {
                Broken::NoHorizon => 0,
                _ => postgres.burn_xid(),
            };
            self.horizon = Some(Content::Horizon(horizon, tables));
            return Ok(());
        }
        if let Some((target, snapshot, content)) = self.read.take() {
            if let (true, Content::Keys(keys)) = (self.is_told_late(), &content) {
                let keys: Vec<_> = keys.iter().map(|(key, _)| key.clone()).collect();
                planning.reread(target.0, &keys);
            }
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
            planning.reread_over();
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
            let owned = backfill.owned(relation, &task.mapping.template, &[]);
            let is_own = |key: &Vec<u8>| owned.noted(key) != Belongs::Elsewhere;
            let (own, foreign): (Vec<_>, Vec<_>) = keys.into_iter().partition(is_own);
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
            if postgres.is_locked(relation) {
                continue;
            }
            self.reads += 1;
            if !self.is_told_late() {
                planning.reread(relation, &own);
            }
            let snapshot = postgres.snapshot();
            let Some(label) = postgres.label(relation, &snapshot).filter(|_| !own.is_empty()) else {
                continue;
            };
            let rows = own.into_iter().map(|key| {
                let values = task.mapping.template.match_key(&key).unwrap_or_default();
                let row = row_of(relation, &values).and_then(|id| postgres.row(relation, id, &snapshot));
                (key, row.map(|row| label.pack(&row)))
            });
            let content = Content::Keys(rows.collect());
            let snapshot = self.courier.claimed(postgres, snapshot);
            self.read = Some((target, snapshot, content));
            break;
        }
        Ok(())
    }

    fn is_told_late(&self) -> bool {
        self.reads.is_multiple_of(3)
    }
}
