//! Transactions that the stream sends while they are in progress: parts of them at any time before their commit is due, with
//! changes in between that are rolled back and would do harm.

use std::collections::BTreeMap;

use walmirror_proto::pb;
use walmirror_proto::writer::FrameWriter;

use super::dice::Dice;
use super::postgres::{Postgres, Record, Wal};
use super::stream::Stream;

/// A fingerprint that no definition has: it has to be sent again.
const NOT_SENT: u64 = u64::MAX;
/// Ids of subtransactions: above those of the model's transactions.
const SUB_XIDS: u64 = 1 << 40;

/// By transaction id: what was sent of it.
#[derive(Debug, Default)]
pub(super) struct Early {
    parts: BTreeMap<u64, Part>,
    sub_xids: u64,
}

#[derive(Debug, Default)]
struct Part {
    /// So many of its records.
    sent: usize,
    /// Subtransactions whose rollback was not told yet.
    doomed: Vec<u64>,
}

impl Early {
    /// Whether the transaction's records do not come in the order of commits.
    pub(super) fn holds(&self, xid: u64) -> bool {
        self.parts.contains_key(&xid)
    }
}

impl Stream {
    /// The next frame of a transaction in progress, if chance wants one, or one that has to come now.
    pub(super) fn early(&mut self, postgres: &Postgres, dice: &mut Dice, records: u64) -> Option<Vec<u8>> {
        self.due(postgres, dice, records)
            .or_else(|| self.aborted(postgres, dice))
            .or_else(|| {
                let (xid, all) = dice
                    .once_in(4)
                    .then(|| self.candidate(postgres, dice))
                    .flatten()?;
                self.part(xid, all, dice, records)
            })
    }

    /// What is missing before the commit that is next.
    fn due(&mut self, postgres: &Postgres, dice: &mut Dice, most: u64) -> Option<Vec<u8>> {
        let Some(Wal::Commit {
            xid,
            lsn,
            end,
            time,
            records,
        }) = postgres.wal.get(self.entry)
        else {
            return None;
        };
        let part = self.early.parts.get_mut(xid)?;
        if part.sent < records.len() {
            return self.part(*xid, records, dice, most);
        }
        if let Some(sub_xid) = part.doomed.pop() {
            return Some(rollback(*xid, sub_xid));
        }
        self.early.parts.remove(xid);
        self.next();
        let late = pb::LateCommit {
            begin: Some(pb::Begin {
                xid: *xid,
                commit_lsn: *lsn,
                commit_time: *time as i64,
            }),
            commit: Some(pb::Commit { end_lsn: *end }),
        };
        Some(frame(late))
    }

    /// The end of a transaction that never committed, or of a subtransaction.
    fn aborted(&mut self, postgres: &Postgres, dice: &mut Dice) -> Option<Vec<u8>> {
        if !dice.once_in(4) {
            return None;
        }
        let committed = postgres.wal.get(self.entry..).unwrap_or_default();
        let lives = |xid: u64| {
            postgres.open.iter().any(|open| open.xid == xid)
                || committed
                    .iter()
                    .any(|entry| matches!(entry, Wal::Commit { xid: other, .. } if *other == xid))
        };
        let gone = self.early.parts.keys().copied().find(|xid| !lives(*xid));
        if let Some(xid) = gone {
            self.early.parts.remove(&xid);
            return Some(rollback(xid, xid));
        }
        let mut parts = self.early.parts.iter_mut();
        parts.find_map(|(xid, part)| Some(rollback(*xid, part.doomed.pop()?)))
    }

    /// A transaction of which something is left to be sent.
    fn candidate<'p>(&self, postgres: &'p Postgres, dice: &mut Dice) -> Option<(u64, &'p [Record])> {
        let open = postgres.open.iter().filter(|open| !open.logged);
        let open = open.map(|open| (open.xid, open.records()));
        let first = self.entry + usize::from(self.sent > 0);
        let later = postgres.wal.get(first..).unwrap_or_default();
        let later = later.iter().filter_map(|entry| match entry {
            Wal::Commit {
                xid, lsn, records, ..
            } if *lsn >= self.from => Some((*xid, records.as_slice())),
            _ => None,
        });
        let left = |(xid, records): &(u64, &[Record])| {
            records.len() > self.early.parts.get(xid).map_or(0, |part| part.sent)
        };
        let all: Vec<_> = open.chain(later).filter(left).collect();
        dice.pick(&all).copied()
    }

    /// One frame of a transaction in progress, which defines for itself what it names.
    fn part(&mut self, xid: u64, all: &[Record], dice: &mut Dice, most: u64) -> Option<Vec<u8>> {
        let outside = self.known.clone();
        self.known
            .values_mut()
            .for_each(|(_, fingerprint)| *fingerprint = NOT_SENT);
        let mut frame = FrameWriter::new();
        frame.record(&pb::InProgress { xid, sub_xid: xid }.into());
        let sent = self.early.parts.entry(xid).or_default().sent;
        let count = 1 + dice.roll(most) as usize;
        for record in all.iter().skip(sent).take(count) {
            self.change(record, &mut frame);
        }
        let doomed = dice.once_in(3).then_some(SUB_XIDS + self.early.sub_xids);
        if let (Some(sub_xid), Some(record)) = (doomed, dice.pick(all)) {
            self.early.sub_xids += 1;
            frame.record(&pb::InProgress { xid, sub_xid }.into());
            self.harm(record, &mut frame);
        }
        let part = self.early.parts.entry(xid).or_default();
        part.sent = all.len().min(sent + count);
        part.doomed.extend(doomed);
        for (oid, known) in &mut self.known {
            known.1 = outside.get(oid).map_or(NOT_SENT, |(_, fingerprint)| *fingerprint);
        }
        Some(frame.as_bytes().to_vec())
    }

    /// What a subtransaction did that is rolled back.
    fn harm(&mut self, record: &Record, frame: &mut FrameWriter) {
        match record {
            Record::Row { definition, row, .. } => {
                let (definition, row) = (definition.clone(), row.clone());
                let (kind, unchanged, old) = (pb::Kind::Delete, false, None);
                self.change(&Record::Truncate(definition.clone()), frame);
                self.change(
                    &Record::Row {
                        definition,
                        kind,
                        row,
                        unchanged,
                        old,
                    },
                    frame,
                );
            }
            Record::Truncate(definition) | Record::Announce(definition, _) => {
                self.change(&Record::Forget(definition.oid, false), frame);
            }
            Record::Forget(..) => self.change(record, frame),
        }
    }
}

fn frame(record: impl Into<pb::Record>) -> Vec<u8> {
    let mut frame = FrameWriter::new();
    frame.record(&record.into());
    frame.as_bytes().to_vec()
}

fn rollback(xid: u64, sub_xid: u64) -> Vec<u8> {
    frame(pb::Rollback { xid, sub_xid })
}
