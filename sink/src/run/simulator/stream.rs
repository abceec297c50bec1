//! The decoder's side of the stream: the WAL from a position on as frames, cut at random records.

use std::collections::BTreeMap;
use std::sync::Arc;

use prost::Message;
use walmirror_proto::pb;
use walmirror_proto::writer::{FrameWriter, TupleBuilder};

use super::dice::Dice;
use super::in_progress::Early;
use super::postgres::{Postgres, Record, Wal};
use super::redis::Broken;
use super::table::{Definition, key_tuple, mixed, tuple};
use crate::gate::Snapshot;

#[derive(Debug)]
pub(super) struct Stream {
    /// Transactions whose commit record starts before this are not sent.
    pub(super) from: u64,
    /// The next entry of the WAL, and how much of it was sent: 0 nothing, 1 BEGIN, 2 the first record, …
    pub(super) entry: usize,
    pub(super) sent: usize,
    /// oid -> index, and the fingerprint that was sent last.
    pub(super) known: BTreeMap<u32, (u32, u64)>,
    /// Transactions of which something was sent while they were in progress.
    pub(super) early: Early,
    broken: Broken,
}

impl Stream {
    pub(super) fn start(from: u64, broken: Broken) -> Self {
        Self {
            from,
            entry: 0,
            sent: 0,
            known: BTreeMap::new(),
            early: Early::default(),
            broken,
        }
    }

    /// Everything before this was sent.
    pub(super) fn position(&self, postgres: &Postgres) -> u64 {
        match postgres.wal.get(self.entry) {
            Some(Wal::Commit { lsn, .. } | Wal::Marker { lsn, .. } | Wal::Capture { lsn, .. }) => *lsn,
            None => postgres.end,
        }
    }

    pub(super) fn is_at_end(&self, postgres: &Postgres) -> bool {
        self.entry >= postgres.wal.len()
    }

    /// The next frame, of at most so many records.
    pub(super) fn frame(&mut self, postgres: &Postgres, dice: &mut Dice, records: u64) -> Option<Vec<u8>> {
        if let Some(frame) = self.early(postgres, dice, records) {
            return Some(frame);
        }
        let mut frame = FrameWriter::new();
        for _ in 0..=dice.roll(records) {
            if !self.record(postgres, &mut frame) {
                break;
            }
        }
        (!frame.is_empty()).then(|| frame.as_bytes().to_vec())
    }

    fn record(&mut self, postgres: &Postgres, frame: &mut FrameWriter) -> bool {
        let Some(entry) = postgres.wal.get(self.entry) else {
            return false;
        };
        match entry {
            Wal::Commit {
                xid,
                lsn,
                end,
                time,
                records,
            } => {
                if self.early.holds(*xid) {
                    return false;
                }
                if *lsn < self.from || records.is_empty() {
                    self.next();
                    return true;
                }
                match self.sent.checked_sub(1).map(|index| records.get(index)) {
                    None => {
                        let begin = pb::Begin {
                            xid: *xid,
                            commit_lsn: *lsn,
                            commit_time: *time as i64,
                        };
                        frame.record(&begin.into());
                        self.sent = 1;
                    }
                    Some(Some(record)) => {
                        self.change(record, frame);
                        self.sent += 1;
                    }
                    Some(None) => {
                        frame.record(&pb::Commit { end_lsn: *end }.into());
                        self.next();
                    }
                }
            }
            Wal::Marker { lsn, content } => {
                if *lsn >= self.from {
                    frame.record(
                        &pb::Marker {
                            content: content.clone(),
                            lsn: *lsn,
                        }
                        .into(),
                    );
                }
                self.next();
            }
            Wal::Capture {
                lsn,
                definition,
                snapshot,
                rows,
            } => {
                if *lsn >= self.from {
                    let capture = pb::Capture {
                        oid: definition.oid,
                        fingerprint: definition.fingerprint,
                        snapshot: Some(wire_snapshot(snapshot)),
                        rows: rows
                            .iter()
                            .map(|row| wire_tuple(&tuple(definition, row, false)))
                            .collect(),
                    };
                    frame.record(&capture.into());
                }
                self.next();
            }
        }
        true
    }

    pub(super) fn next(&mut self) {
        self.entry += 1;
        self.sent = 0;
    }

    pub(super) fn change(&mut self, record: &Record, frame: &mut FrameWriter) {
        match record {
            Record::Row {
                definition,
                kind,
                row,
                unchanged,
                old,
            } => {
                let index = self.index(definition, frame);
                let new = if *kind == pb::Kind::Delete {
                    key_tuple(definition, row.id)
                } else {
                    tuple(definition, row, *unchanged)
                };
                let old = old.map(|old| match self.broken {
                    Broken::HalfKey => mixed(old, row.id),
                    _ => old,
                });
                frame.row(
                    *kind,
                    index,
                    &new,
                    old.map(|old| key_tuple(definition, old)).as_ref(),
                );
            }
            Record::Truncate(definition) => {
                let index = self.index(definition, frame);
                frame.record(
                    &pb::Truncate {
                        relations: vec![index],
                    }
                    .into(),
                );
            }
            Record::Announce(definition, refresh) => {
                let index = self.number(definition.oid);
                self.known.insert(definition.oid, (index, definition.fingerprint));
                let relation = pb::Relation {
                    announced: true,
                    refresh: *refresh,
                    ..definition.relation(index)
                };
                frame.record(&relation.into());
            }
            Record::Forget(oid, keep_keys) => {
                frame.record(
                    &pb::Forget {
                        oid: *oid,
                        keep_keys: *keep_keys || self.broken == Broken::KeepKeys,
                    }
                    .into(),
                );
            }
        }
    }

    fn number(&self, oid: u32) -> u32 {
        self.known
            .get(&oid)
            .map_or(self.known.len() as u32 + 1, |(index, _)| *index)
    }

    /// INVARIANT I5, the decoder's half: the definition stands before its first row.
    fn index(&mut self, definition: &Arc<Definition>, frame: &mut FrameWriter) -> u32 {
        let index = self.number(definition.oid);
        if self.known.insert(definition.oid, (index, definition.fingerprint))
            != Some((index, definition.fingerprint))
        {
            frame.record(&definition.relation(index).into());
        }
        index
    }
}

fn wire_snapshot(snapshot: &Snapshot) -> pb::Snapshot {
    let xip = (snapshot.xmin..snapshot.xmax)
        .filter(|xid| !snapshot.sees(*xid))
        .collect();
    pb::Snapshot {
        xmin: snapshot.xmin,
        xmax: snapshot.xmax,
        xip,
    }
}

fn wire_tuple(tuple: &TupleBuilder) -> pb::Tuple {
    let mut bytes = Vec::new();
    tuple.write_tuple(&mut bytes);
    pb::Tuple::decode(bytes.as_slice()).unwrap_or_default()
}
