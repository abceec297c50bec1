//! INVARIANT I5: which definitions of tables stand in the stream already, and under which index.

use std::collections::HashMap;

use walmirror_proto::pb::{self, Kind};
use walmirror_proto::writer::FrameWriter;

use crate::plan::{self, Plan};

/// The relations that the client was told of.
#[derive(Default)]
pub(super) struct Relations {
    /// `index - 1` by the oid of the labelled table.
    by_oid: HashMap<u32, usize>,
    /// The identity of the definition that was sent last, by `index - 1`.
    sent: Vec<Option<u64>>,
}

impl Relations {
    /// The index of a table, which stays with it for the life of the connection.
    pub(super) fn index(&mut self, oid: u32) -> u32 {
        let next = self.sent.len();
        let at = *self.by_oid.entry(oid).or_insert(next);
        if at == next {
            self.sent.push(None);
        }
        u32::try_from(at + 1).unwrap_or(u32::MAX)
    }

    /// Writes the table's definition unless it stands in the stream already; returns its index.
    #[inline]
    pub(super) fn define(&mut self, plan: &mut Plan, frame: &mut FrameWriter) -> u32 {
        let known = plan
            .index
            .and_then(|index| self.sent.get(index as usize - 1).copied());
        if let (Some(index), Some(Some(identity))) = (plan.index, known)
            && identity == plan.identity
        {
            return index;
        }
        let index = self.index(plan.relation.oid);
        plan.index = Some(index);
        let at = index as usize - 1;
        if self.sent.get(at).copied().flatten() != Some(plan.identity) {
            let relation = pb::Relation {
                index,
                ..plan.relation.clone()
            };
            frame.record(&pb::Record {
                kind: Kind::Relation as i32,
                relation_def: Some(relation),
                ..Default::default()
            });
            if let Some(sent) = self.sent.get_mut(at) {
                *sent = Some(plan.identity);
            }
        }
        index
    }

    pub(super) fn sent_now(&mut self, index: u32, relation: &pb::Relation) {
        if let Some(sent) = self.sent.get_mut(index as usize - 1) {
            *sent = Some(plan::identity(relation));
        }
    }
}
