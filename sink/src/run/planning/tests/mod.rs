//! Frames in, commands out: what the planner makes of the stream, read back from the RESP that it would send. Here is what
//! the tests make frames, chunks and planners with.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod captures;
mod catalog;
mod chunks;
mod claims;
mod horizon;
mod in_progress;
mod nothing;
mod purges;
mod rereads;
mod stream;
mod tables;

use std::collections::BTreeMap;

use walmirror_proto::pb::{self, Column, Encoding, Kind};
use walmirror_proto::writer::{FrameWriter, TupleBuilder};

use super::*;
use crate::backfill::{Content, Cursor, PackedRows, Window};
use crate::gate::Snapshot;
use crate::resp::tests::parse;

pub(super) const OID: u32 = 500;

pub(super) fn relation(fingerprint: u64, key: &str) -> pb::Relation {
    let column = |name: &str| Column {
        name: name.into(),
        encoding: Encoding::Text.into(),
        in_value: true,
        ..Column::default()
    };
    pb::Relation {
        index: 1,
        oid: OID,
        schema: "public".into(),
        name: "t".into(),
        key: key.into(),
        fingerprint,
        columns: vec![column("id"), column("v")],
        ..pb::Relation::default()
    }
}

fn cache(fingerprint: u64, key: &str) -> pb::Relation {
    pb::Relation {
        mode: pb::Mode::Cache.into(),
        on_write: pb::OnWrite::Populate.into(),
        ..relation(fingerprint, key)
    }
}

/// All that were writing when the table was announced are over.
fn fenced(cursor: Cursor) -> Cursor {
    Cursor {
        horizon: Some(1),
        ..cursor
    }
}

pub(super) fn settled() -> Stored {
    let progress = Progress {
        lsn: Lsn(10),
        cursors: BTreeMap::from([(OID, fenced(Cursor::done(1)).to_json())]),
        ..Progress::default()
    };
    Stored {
        progress: Some(progress),
        relations: BTreeMap::from([(OID, relation(1, "t:{id}"))]),
        ..Stored::default()
    }
}

pub(super) fn planning(stored: Stored, batch_bytes: usize, transaction_bytes: usize) -> Planning {
    Planning::new(Start {
        keys: RedisKeys::new("s"),
        scripts: Scripts::default(),
        fresh: None,
        continuity: Continuity::proved(),
        stored,
        gate: Gate::new(1 << 16, 100, 0),
        slot: "s".to_owned(),
        marker_prefix: "m:".into(),
        limits: Limits {
            batch_bytes,
            transaction_bytes,
            value_bytes: crate::plan::VALUE_BYTES,
        },
        on_bad_row: crate::config::OnBadRow::Skip,
        spool: Spool::new(std::env::temp_dir()),
        backfill: Arc::new(Backfill::default()),
        shared: Arc::new(Shared::default()),
    })
    .unwrap()
}

/// Builds one frame.
#[derive(Default)]
pub(super) struct Frame(FrameWriter);

impl Frame {
    pub(super) fn begin(mut self, xid: u64, commit_lsn: u64) -> Self {
        self.0.record(
            &pb::Begin {
                xid,
                commit_lsn,
                commit_time: 0,
            }
            .into(),
        );
        self
    }

    pub(super) fn relation(mut self, relation: pb::Relation) -> Self {
        self.0.record(&relation.into());
        self
    }

    pub(super) fn record(mut self, record: impl Into<pb::Record>) -> Self {
        self.0.record(&record.into());
        self
    }

    pub(super) fn row(mut self, kind: Kind, id: &str, v: Option<&str>) -> Self {
        self.0.row(kind, 1, &tuple(id, v), None);
        self
    }

    pub(super) fn commit(mut self, end_lsn: u64) -> Self {
        self.0.record(&pb::Commit { end_lsn }.into());
        self
    }

    pub(super) fn feed(self, planning: &mut Planning) {
        planning.frame(self.0.as_bytes(), Lsn::INVALID).unwrap();
    }

    pub(super) fn fails(self, planning: &mut Planning) -> Error {
        planning.frame(self.0.as_bytes(), Lsn::INVALID).unwrap_err()
    }
}

pub(super) fn packed(fingerprint: u64, id: &str, v: &str) -> Vec<u8> {
    packed_row(fingerprint, id, Some(v))
}

fn packed_row(fingerprint: u64, id: &str, v: Option<&str>) -> Vec<u8> {
    let mut bytes = fingerprint.to_be_bytes().to_vec();
    tuple(id, v).write_tuple(&mut bytes);
    bytes
}

fn tuple(id: &str, v: Option<&str>) -> TupleBuilder {
    let mut tuple = TupleBuilder::new();
    tuple.text(id.as_bytes());
    match v {
        Some(v) => tuple.text(v.as_bytes()),
        None => tuple.null(),
    }
    tuple
}

fn lines(segment: &Segment) -> Vec<String> {
    let line = |command: &Vec<Vec<u8>>| {
        command
            .iter()
            .map(|arg| String::from_utf8_lossy(arg).into_owned())
            .collect::<Vec<_>>()
            .join(" ")
    };
    parse(segment.batch.commands().as_bytes())
        .iter()
        .map(line)
        .collect()
}

/// Everything that would go to Redis now, without the frame of a MULTI.
pub(super) fn flushed(planning: &mut Planning) -> Vec<String> {
    if planning.is_dirty() || planning.is_advanced() {
        planning.flush();
    }
    let mut all = Vec::new();
    while let Some(segment) = planning.next_segment() {
        all.extend(lines(&segment));
    }
    all.retain(|line| {
        !["MULTI", "EXEC"].contains(&line.as_str())
            && !line.starts_with("WATCH")
            && !line.starts_with("HMGET")
    });
    all
}

pub(super) fn chunk(
    planning: &Planning,
    id: u64,
    content: Content,
    cursor: Option<Cursor>,
    window: &Arc<Window>,
) -> Chunk {
    let generation = planning
        .registry
        .get(OID)
        .map_or(0, |registered| registered.generation);
    window.sent();
    Chunk {
        id,
        relation: OID,
        generation,
        snapshot: Snapshot::new(105, 105, vec![]),
        content,
        cursor,
        window: Arc::clone(window),
        permit: None,
    }
}

pub(super) fn rows(rows: &[Vec<u8>]) -> Content {
    let mut content = PackedRows::default();
    rows.iter().for_each(|row| content.push(row));
    Content::Rows(content)
}
