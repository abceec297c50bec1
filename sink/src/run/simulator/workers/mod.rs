//! The backfill's threads against the model of Postgres: what `fill`, `sweep`, `pending` and `worker` do, one step at a time.
//! A marker enters the WAL some time after its rows were read.

mod pending;
mod tables;

pub(super) use pending::Pending;
pub(super) use tables::Tables;

use std::sync::Arc;

use super::postgres::{Postgres, Wal};
use super::redis::Broken;
use crate::backfill::{Backfill, Chunk, Content, Cursor, Window};
use crate::error::Error;
use crate::gate::Snapshot;
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

    /// One with a window of its own.
    fn another(&self) -> Self {
        Self::new(self.marker_prefix.clone(), self.broken)
    }

    /// A snapshot that the gate will not refuse as a whole.
    fn snapshot(&self, postgres: &Postgres, backfill: &Backfill) -> Option<Snapshot> {
        let snapshot = postgres.snapshot();
        (!backfill.is_useless(&snapshot)).then_some(snapshot)
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
            permit: None,
        });
        let content = format!("{}{id}", self.marker_prefix).into_bytes();
        if self.broken == Broken::NoMarker {
            let mut frame = FrameWriter::new();
            frame.record(&pb::Marker { content, lsn: 0 }.into());
            return planning.frame(frame.as_bytes(), walmirror_proto::Lsn::INVALID);
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
