//! Puts commands together into segments: a batch that holds whole transactions and is one MULTI, or pieces of a large one.

use crate::plan::{Batch, Purge, RedisKeys};
use crate::progress::{Purging, Step, write_step};
use crate::redis::{Segment, Writer};
use crate::transaction::Commit;

/// The segment that is being built, and what is known of the MULTI that it belongs to.
#[derive(Debug)]
pub(super) struct Assembly {
    keys: RedisKeys,
    batch: Batch,
    purges: Vec<Purge>,
    purging: Purging,
    /// This segment begins with MULTI.
    opens: bool,
    /// It notes keys as pending.
    pending: bool,
    /// Segments of the same MULTI were handed out before.
    continues: bool,
    /// Their weight.
    before: usize,
}

impl Assembly {
    pub(super) fn new(keys: RedisKeys) -> Self {
        Self {
            keys,
            batch: Batch::new(),
            purges: Vec::new(),
            purging: Purging::default(),
            opens: false,
            pending: false,
            continues: false,
            before: 0,
        }
    }

    /// Where commands go; begins a MULTI if none is open.
    pub(super) fn batch(&mut self) -> &mut Batch {
        if !self.opens && !self.continues {
            self.opens = true;
            Writer::open(self.batch.bookkeeping());
        }
        &mut self.batch
    }

    /// Keys to be removed, because the transaction `commit` wants it. Only before [`Self::is_split`] is true: then the MULTI has begun
    /// in Redis already.
    pub(super) fn purge(&mut self, purge: Purge, commit: Option<Commit>) {
        self.batch()
            .unlink_written(|writer, key| purge.takes_written(writer, key));
        self.purging.commit = commit.or(self.purging.commit);
        if !self.purges.contains(&purge) {
            self.purges.push(purge);
        }
    }

    /// What is written notes keys as pending: whoever reads them again is told once they are in Redis, because a look
    /// before would find nothing.
    pub(super) fn note_pending(&mut self) {
        self.pending = true;
    }

    /// Whether a part of the MULTI was handed out.
    pub(super) fn is_split(&self) -> bool {
        self.continues
    }

    /// The weight of what is not handed out yet.
    pub(super) fn weight(&self) -> usize {
        self.batch.weight()
    }

    /// The weight of the whole MULTI.
    pub(super) fn total_weight(&self) -> usize {
        self.before + self.batch.weight()
    }

    /// Hands out what there is; the MULTI stays open.
    pub(super) fn split(&mut self) -> Segment {
        self.batch();
        self.before = self.total_weight();
        self.continues = true;
        self.take(None)
    }

    /// Ends the MULTI with this step of the progress; `asked` by a worker before this.
    pub(super) fn close(&mut self, step: Step, asked: u64) -> Segment {
        self.batch();
        write_step(self.batch.bookkeeping(), &self.keys, &step);
        Writer::close(self.batch.bookkeeping(), &self.keys);
        self.before = 0;
        self.continues = false;
        Segment {
            asked,
            ..self.take(Some(step))
        }
    }

    fn take(&mut self, step: Option<Step>) -> Segment {
        let mut batch = std::mem::take(&mut self.batch);
        batch.seal();
        Segment {
            batch,
            opens: std::mem::take(&mut self.opens),
            pending: std::mem::take(&mut self.pending),
            purges: std::mem::take(&mut self.purges),
            purging: std::mem::take(&mut self.purging),
            step,
            asked: 0,
        }
    }
}
