//! Reads keys back: which values was this key rendered from? Used by the search for keys without a row, so an answer for
//! a foreign key must be None, and the answer for an own key its values.

use std::collections::HashSet;

use memchr::memmem;

use super::KeyTemplate;

/// The most places that are tried for one key, besides a few for each of its bytes.
const STEPS_MAX: usize = 50_000;

/// No more ways to read a key are listed.
const MATCHES_MAX: usize = 64;

/// The ways to read a key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Readings {
    /// The values of the placeholders, for each of them.
    pub all: Vec<Vec<Vec<u8>>>,
    /// There may be more: the key has more of them than are worth a look one by one.
    pub is_cut_short: bool,
}

/// How many places are tried: a long key has many, and one look at each of them is no waste.
fn steps_max(template: &KeyTemplate, key: &[u8]) -> usize {
    STEPS_MAX.saturating_add(key.len().saturating_mul(2).saturating_mul(template.slots.len()))
}

/// See [`KeyTemplate::match_key`].
pub(super) fn match_key(template: &KeyTemplate, key: &[u8]) -> Option<Vec<Vec<u8>>> {
    let (first, rest) = template.literals.split_first()?;
    let key = key.strip_prefix(first.as_bytes())?;
    if let ([suffix], false) = (rest, template.escapes()) {
        return Some(vec![key.strip_suffix(suffix.as_bytes())?.to_vec()]);
    }
    if !holds_in_order(rest, key) {
        return None;
    }
    let mut search = Search {
        template,
        values: vec![None; template.names.len()],
        dead_ends: HashSet::new(),
        steps_left: steps_max(template, key),
        accepts: &|_, _| true,
        all: None,
    };
    search.slot(0, key)?;
    search.values.into_iter().collect()
}

/// The cheap question first: rows are asked whether their keys are another template's, and nearly none is.
fn holds_in_order(literals: &[String], key: &[u8]) -> bool {
    let mut rest = key;
    literals.iter().all(|literal| {
        let at = memmem::find(rest, literal.as_bytes());
        rest = at
            .and_then(|at| rest.get(at + literal.len()..))
            .unwrap_or_default();
        at.is_some()
    })
}

/// See [`KeyTemplate::match_all`].
pub(super) fn match_all(
    template: &KeyTemplate,
    key: &[u8],
    accepts: &dyn Fn(usize, &[u8]) -> bool,
) -> Readings {
    let rest = template
        .literals
        .split_first()
        .and_then(|(first, _)| key.strip_prefix(first.as_bytes()));
    let Some(key) = rest else {
        return Readings::default();
    };
    let mut search = Search {
        template,
        values: vec![None; template.names.len()],
        dead_ends: HashSet::new(),
        steps_left: steps_max(template, key),
        accepts,
        all: Some(Vec::new()),
    };
    let is_full = search.slot(0, key).is_some();
    Readings {
        is_cut_short: is_full || search.steps_left == 0,
        all: search.all.unwrap_or_default(),
    }
}

/// A depth-first search that tries short values first.
struct Search<'t> {
    template: &'t KeyTemplate,
    /// The values found so far, unescaped.
    values: Vec<Option<Vec<u8>>>,
    /// (placeholder, bytes left) from where no match is possible, so that no key makes the search exponential.
    dead_ends: HashSet<(usize, usize)>,
    /// Places that may still be tried.
    steps_left: usize,
    /// Whether a value may be one of that placeholder.
    accepts: &'t dyn Fn(usize, &[u8]) -> bool,
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
            self.steps_left = self.steps_left.saturating_sub(1);
            if self.steps_left == 0 {
                return None;
            }
            let matched = rest
                .strip_prefix(literal)
                .filter(|after| (!last || after.is_empty()) && (self.accepts)(name, &value));
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
