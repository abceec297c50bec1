//! What the command line asks of the sink that runs: to begin a backfill, to read keys again, or just to say how far it is.
//!
//! A request is a marker in the WAL. It reaches the sink wherever that runs, at one place of the stream, and its effect is
//! written in the EXEC that passes this place: a crash loses no request. Only the sink has the gate, so only the sink may
//! write rows (INVARIANT I10).

use walmirror_proto::Lsn;

use crate::error::Error;
use crate::pq::{Connection, message_failed, quote_identifier};

/// One request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Say at once how far Redis is.
    Sync,
    /// Read all rows of the table with this oid again, then remove keys that have none.
    Backfill(u32),
    /// Read the rows of these keys again.
    Reread {
        /// pg_class.oid of the labelled table.
        relation: u32,
        /// The keys.
        keys: Vec<Vec<u8>>,
    },
}

impl Request {
    /// The content of the marker. It begins with the slot's name, because every sink of the database sees it.
    pub fn encode(&self, slot: &str) -> Vec<u8> {
        match self {
            Self::Sync => format!("{slot}:sync").into_bytes(),
            Self::Backfill(oid) => format!("{slot}:backfill:{oid}").into_bytes(),
            Self::Reread { relation, keys } => {
                let mut content = format!("{slot}:reread:{relation}:").into_bytes();
                for key in keys {
                    content.extend_from_slice(format!("{}:", key.len()).as_bytes());
                    content.extend_from_slice(key);
                }
                content
            }
        }
    }

    /// Reads a marker's content. None: it is no request to this slot's sink. Anybody may write markers.
    pub fn parse(slot: &str, content: &[u8]) -> Option<Self> {
        let words = content.strip_prefix(slot.as_bytes())?.strip_prefix(b":")?;
        if words == b"sync" {
            return Some(Self::Sync);
        }
        if let Some(oid) = words.strip_prefix(b"backfill:") {
            return Some(Self::Backfill(number(oid)?));
        }
        let (relation, mut rest) = split(words.strip_prefix(b"reread:")?)?;
        let relation = number(relation)?;
        let mut keys = Vec::new();
        while !rest.is_empty() {
            let (length, tail) = split(rest)?;
            let (key, tail) = tail.split_at_checked(number(length)?)?;
            keys.push(key.to_vec());
            rest = tail;
        }
        Some(Self::Reread { relation, keys })
    }

    /// Asks the sink to say how far it is. Redis holds every transaction that was visible before, and every request that was
    /// sent before is taken up, once its progress has reached the LSN that is returned.
    pub fn sync(sql: &mut Connection, slot: &str) -> Result<Lsn, Error> {
        Self::Sync.send(sql, slot)
    }

    /// Writes the request into the WAL, and says where the WAL ended before. Redis may be there already, so this says nothing
    /// about the request itself: [`Self::sync`] does, called behind it.
    pub fn send(&self, sql: &mut Connection, slot: &str) -> Result<Lsn, Error> {
        // The position comes first: the marker is not before it, so a sync has the sink write one that is not either. The transaction id makes the commit flush the WAL.
        let statement = "SELECT pg_current_wal_insert_lsn(), pg_logical_emit_message(false, 'walmirror.marker', $1::bytea), \
                         pg_current_xact_id()";
        let mut hex = b"\\x".to_vec();
        for byte in self.encode(slot) {
            hex.extend_from_slice(format!("{byte:02x}").as_bytes());
        }
        let what = "cannot write a request into the WAL";
        let result = sql.query(statement, &[Some(&hex)]);
        let result =
            result.map_err(|error| message_failed(what, error, &quote_identifier(&sql.target().user)))?;
        let lsn = result.text(0, 0).and_then(|text| text.parse().ok());
        lsn.ok_or_else(|| Error::answer(what))
    }
}

/// What stands before and behind the next colon.
fn split(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let colon = bytes.iter().position(|byte| *byte == b':')?;
    Some((bytes.get(..colon)?, bytes.get(colon + 1..)?))
}

fn number<T: std::str::FromStr>(digits: &[u8]) -> Option<T> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_read_back() {
        for request in [
            Request::Sync,
            Request::Backfill(42),
            Request::Reread {
                relation: 7,
                keys: vec![b"a:1".to_vec(), b"".to_vec(), b"5:\xff\0:".to_vec()],
            },
        ] {
            let content = request.encode("s");
            assert_eq!(Request::parse("s", &content), Some(request.clone()));
            assert_eq!(Request::parse("other", &content), None);
            assert_eq!(Request::parse("", &content), None);
        }
    }

    #[test]
    fn what_is_no_request_is_none() {
        for content in [
            "",
            "s",
            "s:",
            "s:17:3",
            "s:backfill:",
            "s:backfill:x",
            "s:reread:7",
            "s:reread:7:9:abc",
            "s:reread:7:x:",
            "s:syncs",
        ] {
            assert_eq!(Request::parse("s", content.as_bytes()), None, "{content}");
        }
    }
}
