//! Walks over the keys that match a pattern, page by page. SCAN promises that a key which is there from beginning to end
//! is seen, and never holds the server up; it may show a key twice.

use redis::Value;

use super::{Connection, unreadable};
use crate::error::Error;

/// How many buckets Redis looks at for one page.
const PAGE: &[u8] = b"500";

/// A walk over the keyspace.
#[derive(Debug)]
pub struct Scan {
    pattern: Vec<u8>,
    cursor: Option<Vec<u8>>,
}

/// What a page is made of.
pub type Pages = Vec<Vec<u8>>;

impl Scan {
    /// A walk over the keys that match this glob.
    pub fn new(pattern: Vec<u8>) -> Self {
        Self {
            pattern,
            cursor: Some(b"0".to_vec()),
        }
    }

    /// The same walk from this place on, which another one of the same process came to.
    pub fn from(self, place: &[u8]) -> Self {
        Self {
            cursor: self.cursor.map(|_| place.to_vec()),
            ..self
        }
    }

    /// Where it goes on. None: it is over.
    pub fn place(&self) -> Option<&[u8]> {
        self.cursor.as_deref()
    }

    /// A walk that is over.
    pub fn empty() -> Self {
        Self {
            pattern: Vec::new(),
            cursor: None,
        }
    }

    /// A walk over the keys that begin with this text; all, if it is empty.
    pub fn of_prefix(prefix: &[u8]) -> Self {
        let mut pattern = Vec::with_capacity(prefix.len() + 1);
        for &byte in prefix {
            if matches!(byte, b'*' | b'?' | b'[' | b']' | b'\\') {
                pattern.push(b'\\');
            }
            pattern.push(byte);
        }
        pattern.push(b'*');
        Self::new(pattern)
    }

    /// The next page, possibly empty; None at the end.
    pub fn page(&mut self, connection: &mut Connection) -> Result<Option<Pages>, Error> {
        let Some(cursor) = self.cursor.take() else {
            return Ok(None);
        };
        let command: [&[u8]; 6] = [b"SCAN", &cursor, b"MATCH", &self.pattern, b"COUNT", PAGE];
        let reply = connection.call("scan the keys", &command)?;
        let unreadable = || unreadable("SCAN");
        let Value::Array(parts) = reply else {
            return Err(unreadable());
        };
        let mut parts = parts.into_iter();
        let (Some(Value::BulkString(next)), Some(Value::Array(keys))) = (parts.next(), parts.next()) else {
            return Err(unreadable());
        };
        if next != b"0" {
            self.cursor = Some(next);
        }
        Ok(Some(
            keys.into_iter()
                .filter_map(|key| {
                    if let Value::BulkString(key) = key {
                        Some(key)
                    } else {
                        None
                    }
                })
                .collect(),
        ))
    }
}
