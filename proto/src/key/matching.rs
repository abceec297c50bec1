//! Reads keys back: which values was this key rendered from? Used by the search for keys without a row, so an answer for
//! a foreign key must be None, and the answer for an own key its values.

use std::collections::HashSet;

use super::KeyTemplate;

/// The most places that are tried for one key. Only a template that names a column twice, between others that nothing
/// separates, can need more; a key of it is then left alone.
const STEPS_MAX: u32 = 50_000;

/// So many ways to read a key are enough.
const MATCHES_MAX: usize = 64;

/// See [`KeyTemplate::match_key`].
pub(super) fn match_key(template: &KeyTemplate, key: &[u8]) -> Option<Vec<Vec<u8>>> {
    let (first, rest) = template.literals.split_first()?;
    let key = key.strip_prefix(first.as_bytes())?;
    if let ([suffix], false) = (rest, template.escapes()) {
        return Some(vec![key.strip_suffix(suffix.as_bytes())?.to_vec()]);
    }
    let mut search = Search {
        template,
        values: vec![None; template.names.len()],
        dead_ends: HashSet::new(),
        steps: 0,
        all: None,
    };
    search.slot(0, key)?;
    search.values.into_iter().collect()
}

/// See [`KeyTemplate::match_all`].
pub(super) fn match_all(template: &KeyTemplate, key: &[u8]) -> Vec<Vec<Vec<u8>>> {
    let Some((first, _)) = template.literals.split_first() else {
        return Vec::new();
    };
    let Some(key) = key.strip_prefix(first.as_bytes()) else {
        return Vec::new();
    };
    let mut search = Search {
        template,
        values: vec![None; template.names.len()],
        dead_ends: HashSet::new(),
        steps: 0,
        all: Some(Vec::new()),
    };
    // Whether that were enough does not matter.
    let _ = search.slot(0, key);
    search.all.unwrap_or_default()
}

/// A depth-first search that tries short values first.
struct Search<'t> {
    template: &'t KeyTemplate,
    /// The values found so far, unescaped.
    values: Vec<Option<Vec<u8>>>,
    /// (placeholder, bytes left) from where no match is possible, so that no key makes the search exponential.
    dead_ends: HashSet<(usize, usize)>,
    /// Places tried so far.
    steps: u32,
    /// Every match is wanted, and these were found. Else the first one ends the search.
    all: Option<Vec<Vec<Vec<u8>>>>,
}

impl Search<'_> {
    /// Matches placeholder number `at` and all that follows to `key`.
    fn slot(&mut self, at: usize, key: &[u8]) -> Option<()> {
        let Some(&name) = self.template.slots.get(at) else {
            if !key.is_empty() {
                return None;
            }
            let values: Option<Vec<Vec<u8>>> = self.values.iter().cloned().collect();
            let Some(all) = &mut self.all else { return Some(()) };
            all.extend(values);
            return (all.len() >= MATCHES_MAX).then_some(());
        };
        let literal = self.template.literals.get(at + 1)?.as_bytes();
        if let Some(known) = self.values.get(name)?.clone() {
            // A column named twice: its second value is as good as a literal.
            let mut text = known;
            super::escape(&mut text, 0);
            return self.slot(at + 1, key.strip_prefix(text.as_slice())?.strip_prefix(literal)?);
        }
        if self.dead_ends.contains(&(at, key.len())) {
            return None;
        }
        let last = at + 1 == self.template.slots.len();
        let mut value = Vec::new();
        let mut rest = key;
        loop {
            self.steps += 1;
            if self.steps > STEPS_MAX {
                return None;
            }
            let matched = rest
                .strip_prefix(literal)
                .filter(|after| !last || after.is_empty());
            if let Some(after) = matched {
                *self.values.get_mut(name)? = Some(value.clone());
                if self.slot(at + 1, after).is_some() {
                    return Some(());
                }
                *self.values.get_mut(name)? = None;
            }
            let Some(after) = take_escaped(rest, &mut value) else {
                break;
            };
            rest = after;
        }
        // Where a column is named twice, whether the rest matches depends on the values found before.
        if self.all.is_none() && self.values.len() == self.template.slots.len() {
            self.dead_ends.insert((at, key.len()));
        }
        None
    }
}

/// Moves one byte of a value, unescaped, from the front of `key` to `value`; None where no value can go on.
fn take_escaped<'k>(key: &'k [u8], value: &mut Vec<u8>) -> Option<&'k [u8]> {
    let (byte, rest) = match key {
        [b'%', b'2', b'5', rest @ ..] => (b'%', rest),
        [b'%', b'3', b'A', rest @ ..] => (b':', rest),
        [b'%' | b':', ..] | [] => return None,
        [byte, rest @ ..] => (*byte, rest),
    };
    value.push(byte);
    Some(rest)
}
