//! The names of the keys that a sink keeps for itself. The braces make them one hash slot in a Redis Cluster.

/// What the bookkeeping keys of all slots begin with.
const RESERVED: &[u8] = b"walmirror:{";

/// The bookkeeping keys of one slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisKeys {
    /// Hash: how far Redis is, who writes it, where the backfills are.
    pub progress: Vec<u8>,
    /// Hash: oid -> serialised Relation, the version that Redis is kept by.
    pub relations: Vec<u8>,
    /// Hash: key -> oid, rows that have to be read again.
    pub pending: Vec<u8>,
    /// Stream: the latest rows that could not be mirrored.
    pub rejected: Vec<u8>,
}

impl RedisKeys {
    /// The keys of this slot.
    pub fn new(slot: &str) -> Self {
        let key = |what: &str| format!("walmirror:{{{slot}}}:{what}").into_bytes();
        Self {
            progress: key("progress"),
            relations: key("relations"),
            pending: key("pending"),
            rejected: key("rejected"),
        }
    }

    /// Whether this is a bookkeeping key of any sink: no row may have it and no purge take it, whatever the template matches.
    pub fn is_reserved(key: &[u8]) -> bool {
        key.starts_with(RESERVED)
    }

    /// Whether keys that begin with this may be such keys.
    pub fn may_be_reserved(prefix: &[u8]) -> bool {
        prefix.starts_with(RESERVED) || RESERVED.starts_with(prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_the_documentation_says() {
        let keys = RedisKeys::new("walmirror");
        assert_eq!(keys.progress, b"walmirror:{walmirror}:progress");
        assert!(RedisKeys::is_reserved(&keys.pending) && RedisKeys::is_reserved(&keys.relations));
    }
}
