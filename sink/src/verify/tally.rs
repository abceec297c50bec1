//! What a comparison found, table by table: numbers, and the names of some keys. INVARIANT I8: never a value.

use crate::shown;

/// Examples that are kept of each kind.
const EXAMPLES: usize = 10;

/// How a key and its row compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// They agree.
    Equal,
    /// The row has no key.
    Missing,
    /// The key has no row.
    Extra,
    /// The key does not hold the row.
    Different,
    /// It could not be found out in time.
    Unknown,
}

impl Finding {
    /// Whether it is known to be wrong.
    pub fn is_difference(self) -> bool {
        matches!(self, Self::Missing | Self::Extra | Self::Different)
    }

    /// One word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Equal => "equal",
            Self::Missing => "missing",
            Self::Extra => "extra",
            Self::Different => "different",
            Self::Unknown => "unknown",
        }
    }
}

/// The result for one table.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// `schema.name`
    pub table: String,
    /// Rows compared.
    pub rows: u64,
    /// Keys looked at in Redis' keyspace.
    pub keys: u64,
    /// Rows without a key because a key column is NULL.
    pub without_key: u64,
    /// Rows whose key is not there and need not be: a cache, or it may have expired.
    pub absent: u64,
    /// Whether keys of the table expire.
    pub expires: bool,
    /// Whether it is cached on demand.
    pub is_cache: bool,
    /// Rows without their key.
    pub missing: u64,
    /// Keys without a row.
    pub extra: u64,
    /// Keys that hold something else.
    pub different: u64,
    /// Keys that could not be compared.
    pub unknown: u64,
    /// Differences that the sink has mended meanwhile.
    pub repaired: u64,
    /// Some of the keys.
    pub examples: Vec<(Finding, String)>,
}

impl Tally {
    pub(super) fn count(&mut self, key: &[u8], finding: Finding) {
        match finding {
            Finding::Equal => return,
            Finding::Missing => self.missing += 1,
            Finding::Extra => self.extra += 1,
            Finding::Different => self.different += 1,
            Finding::Unknown => self.unknown += 1,
        }
        let same = self.examples.iter().filter(|(other, _)| *other == finding);
        if same.count() < EXAMPLES {
            self.examples.push((finding, show(key)));
        }
    }

    /// How many keys are wrong, mended ones included.
    pub fn differences(&self) -> u64 {
        self.missing + self.extra + self.different
    }

    /// How many keys are still wrong.
    pub fn left(&self) -> u64 {
        self.differences().saturating_sub(self.repaired)
    }
}

/// A key as one can print it.
fn show(key: &[u8]) -> String {
    let key = shown::noted_key(key);
    let text = String::from_utf8_lossy(&key);
    if text.chars().any(char::is_control) {
        format!("{text:?}")
    } else {
        text.into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn examples_are_bounded_and_printable() {
        let mut tally = Tally::default();
        tally.count(b"a\n\x1b[1m", Finding::Extra);
        for _ in 0..100 {
            tally.count(b"k", Finding::Missing);
            tally.count(b"k", Finding::Equal);
        }
        assert_eq!(
            (tally.missing, tally.extra, tally.examples.len()),
            (100, 1, EXAMPLES + 1)
        );
        assert_eq!(
            tally.examples.first().map(|(_, key)| key.as_str()),
            Some("\"a\\n\\u{1b}[1m\"")
        );
        tally.repaired = 99;
        assert_eq!((tally.differences(), tally.left()), (101, 2));
    }
}
