//! What the stream brings besides changes: requests of the command line. And what becomes of rows that cannot be mirrored.

use walmirror_proto::{Lsn, pb};

use super::super::metrics::add;
use super::Planning;
use crate::config::OnBadRow;
use crate::error::Error;
use crate::rejected::Rejected;
use crate::request::Request;

/// So much of a key that is too long is noted.
const LONG_KEY_SHOWN: usize = 100;

impl Planning {
    /// What the command line asked for. It is written in the EXEC whose progress passes the marker, so a crash loses no
    /// request; a repeated one does no harm.
    pub(super) fn request(&mut self, request: &Request, lsn: Lsn) -> Result<(), Error> {
        self.pass(lsn)?;
        self.dirty = true;
        match request {
            Request::Sync => {}
            Request::Backfill(oid) => {
                let known = self
                    .registry
                    .get(*oid)
                    .filter(|known| known.mapping.mode == pb::Mode::Mirror);
                if let Some(relation) = known.map(|known| known.relation.clone()) {
                    self.register(relation)?;
                }
            }
            Request::Reread { relation, keys } if self.registry.get(*relation).is_some() => {
                let (relation, pending) = (relation.to_string(), self.planner.keys().pending.clone());
                let commands = self.assembly.batch().bookkeeping();
                for key in keys {
                    commands.command(&[b"HSET", &pending, key, relation.as_bytes()]);
                }
                self.assembly.note_pending();
            }
            Request::Reread { .. } => {}
        }
        Ok(())
    }

    /// A row that cannot be mirrored: its key is gone, and is noted in the same EXEC.
    pub(super) fn reject(&mut self, rejected: Rejected) -> Result<(), Error> {
        add(&self.shared.metrics.rejected, 1);
        if self.on_bad_row == OnBadRow::Stop {
            return Err(rejected.into_error());
        }
        self.told.log(&rejected);
        let keys = self.planner.keys().clone();
        rejected.write(self.assembly.batch().bookkeeping(), &keys);
        self.dirty = true;
        Ok(())
    }

    /// The row whose key was rendered last has a value that is too large.
    pub(super) fn reject_too_large(&mut self, table: String) -> Result<(), Error> {
        let rejected = Rejected {
            key: self.planner.key().to_vec(),
            table,
            lsn: self.lsn,
            reason: format!(
                "a value of it is longer than the {} bytes that Redis takes (proto-max-bulk-len)",
                self.limits.value_bytes
            ),
        };
        self.reject(rejected)
    }

    /// The row whose key was rendered last has one that is too long.
    pub(super) fn reject_long_key(&mut self, table: String) -> Result<(), Error> {
        let key = self.planner.key();
        self.reject(Rejected {
            key: key.get(..LONG_KEY_SHOWN).unwrap_or(key).to_vec(),
            table,
            lsn: self.lsn,
            reason: format!(
                "its key, which begins like that, is longer than the {} bytes that Redis takes (proto-max-bulk-len)",
                self.limits.value_bytes
            ),
        })
    }

    /// The row whose key was rendered last would have a bookkeeping key.
    pub(super) fn reject_reserved(&mut self, table: String) -> Result<(), Error> {
        self.reject(Rejected {
            key: self.planner.key().to_vec(),
            table,
            lsn: self.lsn,
            reason: "keys that start with walmirror:{ are walmirror's own".to_owned(),
        })
    }

    /// The row whose key was rendered last would have a key of this other table.
    pub(super) fn reject_claimed(&mut self, table: String, by: u32) -> Result<(), Error> {
        let owner = self.registry.get(by).map(|owner| &owner.mapping);
        let reason = owner.map_or_else(String::new, |owner| {
            format!(
                "the key is one of the table {}, whose template has more literal text",
                owner.table
            )
        });
        self.reject(Rejected {
            key: self.planner.key().to_vec(),
            table,
            lsn: self.lsn,
            reason,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use super::super::tests::{Frame, OID, flushed, planning, relation, settled};
    use super::*;
    use walmirror_proto::pb::Kind;

    fn marker(request: &Request, lsn: u64) -> pb::Marker {
        pb::Marker {
            content: request.encode("s"),
            lsn,
        }
    }

    #[test]
    fn a_request_is_written_with_a_position_that_passes_it() {
        let mut planning = planning(settled(), 1 << 20, 1 << 24);
        let asked = |planning: &mut Planning, request: &Request, lsn| {
            Frame::default().record(marker(request, lsn)).feed(planning);
            flushed(planning)
        };
        assert_eq!(
            asked(&mut planning, &Request::Sync, 50),
            ["HSET walmirror:{s}:progress lsn 0/32"]
        );
        let reread = Request::Reread {
            relation: OID,
            keys: vec![b"t:1".to_vec(), b"t:2".to_vec()],
        };
        assert_eq!(
            asked(&mut planning, &reread, 60),
            [
                "HSET walmirror:{s}:pending t:1 500",
                "HSET walmirror:{s}:pending t:2 500",
                "HSET walmirror:{s}:progress lsn 0/3C"
            ]
        );
        let lines = asked(&mut planning, &Request::Backfill(OID), 70);
        assert!(
            lines.iter().any(|line| line.contains(r#""stage":"fill""#)),
            "{lines:?}"
        );
        assert_eq!(lines.last().unwrap(), "HSET walmirror:{s}:progress lsn 0/46");
        // Of tables that nobody knows nothing is written.
        let unknown = Request::Reread {
            relation: 7,
            keys: vec![b"x".to_vec()],
        };
        for request in [unknown, Request::Backfill(7)] {
            assert_eq!(
                asked(&mut planning, &request, 80),
                ["HSET walmirror:{s}:progress lsn 0/50"]
            );
        }
    }

    /// The story: Redis closed the connection over it, each time anew, or the sink ended.
    #[test]
    fn a_row_whose_key_is_too_long_is_noted_and_the_rest_flows() {
        let mut planning = planning(settled(), 1 << 20, 1 << 24);
        planning.limits.value_bytes = 200;
        planning.planner.limit_values(200);
        let long = "x".repeat(199);
        Frame::default()
            .relation(relation(1, "t:{id}"))
            .begin(100, 100)
            .row(Kind::Insert, &long, Some("v"))
            .row(Kind::Insert, "1", Some("v"))
            .row(Kind::Delete, &long, None)
            .commit(105)
            .feed(&mut planning);
        let lines = flushed(&mut planning);
        let is_long = |line: &&String| line.contains(&long[..150]);
        assert_eq!(lines.iter().find(is_long), None);
        assert!(lines.contains(&"HSET t:1 id 1 v v".to_owned()), "{lines:?}");
        let noted: Vec<_> = lines.iter().filter(|line| line.starts_with("XADD")).collect();
        assert_eq!(noted.len(), 1, "{lines:?}");
        assert!(noted[0].contains(" key t:xxx") && noted[0].contains("proto-max-bulk-len"));
    }

    #[test]
    fn a_row_that_is_too_large_goes_and_is_noted_with_the_progress() {
        let mut planning = planning(settled(), 1 << 20, 1 << 24);
        planning.limits.value_bytes = 10;
        planning.planner.limit_values(10);
        let insert = |planning: &mut Planning, id: &str, v: &str, at| {
            Frame::default()
                .relation(relation(1, "t:{id}"))
                .begin(at, at)
                .row(Kind::Insert, id, Some(v))
                .commit(at + 5)
                .feed(planning);
        };
        insert(&mut planning, "1", "0123456789", 100);
        assert!(flushed(&mut planning)[0].starts_with("HSET t:1 "));
        insert(&mut planning, "1", "0123456789A", 200);
        let lines = flushed(&mut planning);
        assert_eq!(lines[0], "UNLINK t:1");
        assert!(
            lines[1].starts_with("XADD walmirror:{s}:rejected MAXLEN ~ 1000 * key t:1 table public.t lsn "),
            "{lines:?}"
        );
        assert!(!lines[1].contains("0123456789A"));
        assert!(
            lines[2].starts_with("HSET walmirror:{s}:progress lsn "),
            "{lines:?}"
        );
        planning.on_bad_row = OnBadRow::Stop;
        let frame = Frame::default()
            .begin(300, 300)
            .row(Kind::Insert, "2", Some("0123456789A"));
        let error = frame.fails(&mut planning);
        assert!(error.to_string().contains("\"t:2\""), "{error}");
        assert_eq!(error.class(), crate::error::Class::Operator);
    }
}
