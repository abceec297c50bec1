//! Transactions that came while they were in progress: kept until they commit, then planned as if they came only now.

use walmirror_proto::Lsn;
use walmirror_proto::pb;

use super::{Definition, Planning};
use crate::error::Error;
use crate::spool::Frames;

/// A transaction that has committed and whose frames are planned one by one.
pub(super) struct Replay {
    frames: Frames,
    commit: pb::Commit,
    /// What a frame is read into.
    frame: Vec<u8>,
    /// The definitions of the stream. The frames bring their own, which may be older, with the same indexes.
    outside: Vec<Option<Definition>>,
}

impl Replay {
    pub(super) fn is_rolled_back(&self, sub_xid: u64) -> bool {
        self.frames.is_rolled_back(sub_xid)
    }

    pub(super) fn outside(&self) -> &[Option<Definition>] {
        &self.outside
    }
}

impl Planning {
    /// Keeps a frame of a transaction in progress.
    pub(super) fn keep(&mut self, xid: u64, frame: &[u8]) -> Result<(), Error> {
        let kept = self.spool.append(xid, frame);
        self.shared.health.note_spool(self.spool.bytes());
        kept.map_err(|error| self.not_spooled(error))
    }

    /// A transaction in progress was rolled back, or a subtransaction of it.
    pub(super) fn rollback(&mut self, rollback: &pb::Rollback) {
        self.spool.roll_back(rollback.xid, rollback.sub_xid);
        self.shared.health.note_spool(self.spool.bytes());
    }

    /// A transaction that was in progress has committed: [`Planning::replay`] is next.
    pub(super) fn late_commit(&mut self, late: pb::LateCommit) -> Result<(), Error> {
        let (Some(begin), Some(commit)) = (late.begin, late.commit) else {
            return Err(self.broken("LATE_COMMIT", "it does not say what commits"));
        };
        let frames = self.spool.take(begin.xid);
        let Some(frames) = frames.map_err(|error| self.not_spooled(error))? else {
            return Err(self.broken(
                "LATE_COMMIT",
                format!("nothing came of the transaction {}", begin.xid),
            ));
        };
        self.begin("LATE_COMMIT", &begin)?;
        self.replay = Some(Replay {
            frames,
            commit,
            frame: Vec::new(),
            outside: std::mem::take(&mut self.definitions),
        });
        Ok(())
    }

    /// Whether [`Planning::replay`] has to be called before anything else comes in.
    pub(in crate::run) fn is_replaying(&self) -> bool {
        self.replay.is_some()
    }

    /// Plans the next frame of a transaction that was in progress, or its end.
    pub(in crate::run) fn replay(&mut self) -> Result<(), Error> {
        let Some(mut replay) = self.replay.take() else {
            return Ok(());
        };
        let mut frame = std::mem::take(&mut replay.frame);
        // What nothing is to be planned of need not be read.
        let read = (!self.transactions.is_skipped() || self.is_unknown())
            && replay
                .frames
                .next(&mut frame)
                .map_err(|error| self.not_spooled(error))?;
        if read {
            self.replay = Some(replay);
            let planned = self.records(&frame, Lsn::INVALID);
            if let Some(replay) = &mut self.replay {
                replay.frame = frame;
            }
            return planned;
        }
        self.definitions = replay.outside;
        self.restate();
        self.shared.health.note_spool(self.spool.bytes());
        self.commit(&replay.commit)
    }

    fn not_spooled(&self, error: std::io::Error) -> Error {
        Error::spool("a transaction in progress cannot be kept", error).at(self.lsn)
    }
}
