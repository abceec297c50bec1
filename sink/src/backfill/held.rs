//! Keys that wait to be looked up, table by table: many at once, as each look-up is a statement. With thousands of tables that are
//! walked over together, each holds some, so their bytes are bounded too (INVARIANT I7).

use super::lookup::ParsedKey;

/// Keys of one table that are looked up at once.
const KEYS: usize = 500;
/// Those of all tables take at most about so much memory.
const BYTES_MAX: usize = 16 * 1024 * 1024;

/// The keys of one table.
#[derive(Default)]
pub(crate) struct Held {
    /// Keys that a row could have.
    pub(crate) keys: Vec<ParsedKey>,
    /// Keys that no row can have.
    pub(crate) rowless: Vec<Vec<u8>>,
    bytes: usize,
}

impl Held {
    pub(crate) fn push(&mut self, key: &[u8], values: Vec<Vec<u8>>) {
        let values_bytes = values.iter().map(|value| size_of::<Vec<u8>>() + value.len());
        self.bytes += size_of::<ParsedKey>() + key.len() + values_bytes.sum::<usize>();
        self.keys.push((key.to_vec(), values));
    }

    pub(crate) fn push_rowless(&mut self, key: &[u8]) {
        self.bytes += size_of::<Vec<u8>>() + key.len();
        self.rowless.push(key.to_vec());
    }

    /// Hands them out.
    pub(crate) fn take(&mut self) -> Self {
        std::mem::take(self)
    }

    /// Whether it is time to look them up.
    pub(crate) fn is_full(&self, most: Most) -> bool {
        self.keys.len() >= KEYS || self.rowless.len() >= KEYS || self.bytes >= most.0
    }
}

/// How much a table may hold for now, in bytes.
#[derive(Clone, Copy)]
pub(crate) struct Most(usize);

impl Most {
    /// Where all of them hold too much, those go that hold no less than the others: few statements for many keys.
    pub(crate) fn of<'h>(tables: impl Iterator<Item = &'h Held>) -> Self {
        let (mut count, mut bytes) = (0, 0_usize);
        for held in tables {
            count += usize::from(held.bytes > 0);
            bytes += held.bytes;
        }
        Self(if bytes < BYTES_MAX {
            usize::MAX
        } else {
            bytes / count.max(1)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keys of ten thousand tables, which came in turns or one table after the other, and long ones of a single table.
    #[test]
    fn thousands_of_tables_hold_no_more_than_one() {
        for (tables, length, stride) in [(10_000, 20, 1), (10_000, 20, 7_919), (1, 100_000, 1)] {
            let mut all: Vec<Held> = (0..tables).map(|_| Held::default()).collect();
            let (mut peak, mut looked_up, mut keys) = (0, 0, 0);
            for page in 0..1_000_000_000 / length / 500 {
                for number in 0..500 {
                    let place = (page * 500 + number) * stride / 3 % tables;
                    if let Some(held) = all.get_mut(place) {
                        held.push(&vec![b'x'; length], vec![vec![b'x'; length]]);
                    }
                }
                peak = peak.max(all.iter().map(|held| held.bytes).sum());
                let most = Most::of(all.iter());
                for held in all.iter_mut().filter(|held| held.is_full(most)) {
                    looked_up += 1;
                    keys += held.take().keys.len();
                }
                if page > 4_000 {
                    break;
                }
            }
            assert!(peak < BYTES_MAX + 500 * 2 * (length + 100), "{peak} bytes");
            assert!(keys / looked_up > 1, "{keys} keys in {looked_up} statements");
        }
    }
}
