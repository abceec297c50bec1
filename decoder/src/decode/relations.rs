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
    /// By `index - 1`.
    sent: Vec<Sent>,
    /// The number of the frame that is written, if it holds changes of a transaction in progress.
    frame: Option<u64>,
    frames: u64,
}

/// Which definition was sent last: its identity.
#[derive(Default, Clone, Copy)]
struct Sent {
    /// In the order of commits.
    committed: Option<u64>,
    /// In a frame of a transaction in progress: the frame's number too, since such a definition serves that frame alone.
    in_progress: Option<(u64, u64)>,
}

impl Relations {
    /// The index of a table, which stays with it for the life of the connection.
    pub(super) fn index(&mut self, oid: u32) -> u32 {
        let next = self.sent.len();
        let at = *self.by_oid.entry(oid).or_insert(next);
        if at == next {
            self.sent.push(Sent::default());
        }
        u32::try_from(at + 1).unwrap_or(u32::MAX)
    }

    /// A frame of a transaction in progress begins: what is defined from here on is defined for it alone.
    pub(super) fn enter_frame(&mut self) {
        self.frames += 1;
        self.frame = Some(self.frames);
    }

    /// What comes next is in the order of commits.
    pub(super) fn leave_frame(&mut self) {
        self.frame = None;
    }

    /// Writes the table's definition unless it stands in the stream already; returns its index.
    #[inline]
    pub(super) fn define(&mut self, plan: &mut Plan, frame: &mut FrameWriter) -> u32 {
        if let Some(index) = plan.index
            && self.holds(index, plan.identity)
        {
            return index;
        }
        let index = self.index(plan.relation.oid);
        plan.index = Some(index);
        if !self.holds(index, plan.identity) {
            let relation = pb::Relation {
                index,
                ..plan.relation.clone()
            };
            frame.record(&pb::Record {
                kind: Kind::Relation as i32,
                relation_def: Some(relation),
                ..Default::default()
            });
            self.note(index, plan.identity);
        }
        index
    }

    pub(super) fn sent_now(&mut self, index: u32, relation: &pb::Relation) {
        self.note(index, plan::identity(relation));
    }

    #[inline]
    fn holds(&self, index: u32, identity: u64) -> bool {
        self.sent
            .get(index as usize - 1)
            .is_some_and(|sent| match self.frame {
                None => sent.committed == Some(identity),
                Some(frame) => sent.in_progress == Some((frame, identity)),
            })
    }

    fn note(&mut self, index: u32, identity: u64) {
        if let Some(sent) = self.sent.get_mut(index as usize - 1) {
            match self.frame {
                None => sent.committed = Some(identity),
                Some(frame) => sent.in_progress = Some((frame, identity)),
            }
        }
    }
}
