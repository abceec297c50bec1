//! What stands before the first record of a transaction, and in every frame of one that is still in progress.

use std::collections::{HashMap, HashSet};

use walmirror_proto::pb;
use walmirror_proto::writer::FrameWriter;

use super::relations::Relations;
use crate::ffi::output_plugin::full_xid;

/// A transaction that has committed.
#[derive(Debug, Clone, Copy, Default)]
pub struct Transaction {
    /// The top-level transaction id, without epoch.
    pub xid: u32,
    /// Where its commit record starts.
    pub commit_lsn: u64,
    /// Microseconds since 2000-01-01 UTC.
    pub commit_time: i64,
}

/// Whose changes come next. Nothing is written for a transaction before it touches a configured table.
#[derive(Default)]
pub(super) struct Opening {
    transaction: Transaction,
    /// Whether the Begin record of the transaction was written.
    begun: bool,
    /// The transaction in progress of which a part comes.
    part: Option<Part>,
    /// Transactions in progress of which something was sent, and which of their subtransactions that was (or they themselves).
    sent: HashMap<u32, HashSet<u32>>,
}

struct Part {
    xid: u32,
    /// Whose changes come next, as the frame says.
    sub_xid: Option<u32>,
}

impl Opening {
    /// A transaction that has committed comes.
    pub(super) fn begin(&mut self, transaction: Transaction) {
        self.transaction = transaction;
        self.begun = false;
        self.part = None;
    }

    /// The transaction is over; whether anything was written of it.
    pub(super) fn end(&mut self) -> bool {
        std::mem::take(&mut self.begun)
    }

    /// A part of a transaction in progress comes, or no more of it.
    pub(super) fn enter(&mut self, in_progress: Option<u32>) {
        self.part = in_progress.map(|xid| Part { xid, sub_xid: None });
    }

    /// Whether what comes is a part of a transaction in progress.
    pub(super) fn is_part(&self) -> bool {
        self.part.is_some()
    }

    /// A transaction in progress is over; returns what was sent of it.
    pub(super) fn forget(&mut self, xid: u32) -> Option<HashSet<u32>> {
        self.sent.remove(&xid)
    }

    /// A subtransaction of it is; whether anything was sent of that.
    pub(super) fn forget_part(&mut self, xid: u32, sub_xid: u32) -> bool {
        self.sent.get_mut(&xid).is_some_and(|sent| sent.remove(&sub_xid))
    }

    /// Writes what has to stand before a change of the transaction or subtransaction `sub_xid`.
    #[inline]
    pub(super) fn start(&mut self, frame: &mut FrameWriter, relations: &mut Relations, sub_xid: u32) {
        let Some(part) = &mut self.part else {
            if !self.begun {
                self.begun = true;
                frame.record(&self.transaction.into());
            }
            return;
        };
        if frame.is_empty() {
            relations.enter_frame();
            part.sub_xid = None;
        }
        if part.sub_xid != Some(sub_xid) {
            part.sub_xid = Some(sub_xid);
            self.sent.entry(part.xid).or_default().insert(sub_xid);
            let in_progress = pb::InProgress {
                xid: full_xid(part.xid),
                sub_xid: full_xid(sub_xid),
            };
            frame.record(&in_progress.into());
        }
    }
}

impl From<Transaction> for pb::Begin {
    fn from(transaction: Transaction) -> Self {
        Self {
            xid: full_xid(transaction.xid),
            commit_lsn: transaction.commit_lsn,
            commit_time: transaction.commit_time,
        }
    }
}

impl From<Transaction> for pb::Record {
    fn from(transaction: Transaction) -> Self {
        pb::Begin::from(transaction).into()
    }
}
