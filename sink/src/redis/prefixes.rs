//! Finds the tables that a key may belong to by what it begins with: one walk over the keyspace serves thousands of tables.

use std::collections::{BTreeSet, HashMap};

use super::Scan;
use crate::plan::Purge;

/// An index over the key templates of tables, which are known by their places in a list.
pub(crate) struct Prefixes {
    /// Literal prefix -> places in the list of tables.
    tables: HashMap<Vec<u8>, BTreeSet<usize>>,
    lengths: BTreeSet<usize>,
    /// The pattern of the one template, if there is no other.
    only: Option<Vec<u8>>,
}

impl Prefixes {
    pub(crate) fn new<'p>(purges: impl Iterator<Item = (usize, &'p Purge)>) -> Self {
        let mut index = Self {
            tables: HashMap::new(),
            lengths: BTreeSet::new(),
            only: None,
        };
        for (number, (place, purge)) in purges.enumerate() {
            index.lengths.insert(purge.prefix().len());
            index
                .tables
                .entry(purge.prefix().to_vec())
                .or_default()
                .insert(place);
            index.only = (number == 0).then(|| purge.pattern());
        }
        index
    }

    /// A walk that sees the keys of all tables.
    pub(crate) fn scan(&self) -> Scan {
        if let Some(pattern) = &self.only {
            return Scan::new(pattern.clone());
        }
        let mut prefixes = self.tables.keys();
        let Some(mut common) = prefixes.next().map(Vec::as_slice) else {
            return Scan::empty();
        };
        for prefix in prefixes {
            let same = common.iter().zip(prefix).take_while(|(a, b)| a == b).count();
            common = common.get(..same).unwrap_or_default();
        }
        Scan::of_prefix(common)
    }

    /// The tables whose templates could match.
    pub(crate) fn places(&self, key: &[u8]) -> BTreeSet<usize> {
        self.lengths
            .iter()
            .filter_map(|length| self.tables.get(key.get(..*length)?))
            .flatten()
            .copied()
            .collect()
    }
}
