//! Rows that a SELECT read, on their way through the gate. Dropping any of them is safe, so whatever speaks against one
//! drops it; each reason is counted.

use std::sync::Arc;

use walmirror_proto::Lsn;
use walmirror_proto::frame::CaptureRef;
use walmirror_proto::pb::{self, Mode};

use super::super::metrics::add;
use super::Planning;
use crate::error::Error;
use crate::gate::{Snapshot, Verdict};
use crate::plan::{Keyed, Trust};

/// Whether SELECTs of a table fill Redis.
fn is_captured(relation: &pb::Relation) -> bool {
    relation.mode() == Mode::Cache || relation.capture
}

impl Planning {
    /// INVARIANT I10: through the gate. `start`: where it was noted in the WAL.
    pub(super) fn capture(&mut self, capture: &CaptureRef<'_>, start: Lsn) -> Result<(), Error> {
        if self.is_before(start) {
            return Ok(());
        }
        self.pass(start)?;
        let dropped = &self.shared.metrics.captures_dropped;
        // Nobody reads rows of other tables for this: a message that says so is not the extension's.
        let registered = self.registry.get(capture.oid);
        let Some(registered) = registered.filter(|registered| is_captured(&registered.relation)) else {
            add(&dropped.unknown_table, capture.rows().count() as u64);
            return Ok(());
        };
        if registered.relation.fingerprint != capture.fingerprint {
            add(&dropped.other_version, capture.rows().count() as u64);
            return Ok(());
        }
        let snapshot = Snapshot::from(&capture.snapshot);
        // A transaction that was in progress when the table was announced: what it wrote is not in the stream, so the gate cannot know.
        if snapshot.may_miss_below(registered.horizon()) {
            add(&dropped.forgotten, capture.rows().count() as u64);
            return Ok(());
        }
        let mapping = Arc::clone(&registered.mapping);
        for tuple in capture.rows() {
            let dropped = &self.shared.metrics.captures_dropped;
            // Anybody may write such messages: one that makes no row is none of our business.
            let Ok(row) = mapping.datums(&tuple) else {
                add(&dropped.not_encoded, 1);
                continue;
            };
            let Ok(keyed) = self.planner.read_key(&mapping, &row) else {
                add(&dropped.not_encoded, 1);
                continue;
            };
            if keyed != Keyed::Yes {
                add(&dropped.no_key, 1);
                continue;
            }
            let hash = self.gate.hash(self.planner.key());
            if tuple.has_unchanged() {
                add(&dropped.not_encoded, 1);
                continue;
            }
            match self.gate.admit(capture.oid, hash, &snapshot) {
                Verdict::Admit if self.planner.is_too_large(&mapping, &row) => add(&dropped.too_large, 1),
                Verdict::Admit => {
                    add(&self.shared.metrics.read_admitted, 1);
                    self.planner
                        .read_row(self.assembly.batch(), &mapping, Trust::Refreshing, &row, hash);
                    self.dirty = true;
                }
                Verdict::Changed => add(&dropped.changed, 1),
                Verdict::Forgotten => add(&dropped.forgotten, 1),
            }
        }
        Ok(())
    }
}
