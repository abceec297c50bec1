//! Whether two templates can make the same key. The extension asks it of labels, the sink before it removes keys.

use std::collections::HashSet;

use super::KeyTemplate;

/// After so many places the answer is that they can: no template that somebody would write takes as many.
const STEPS_MAX: usize = 50_000;

/// See [`KeyTemplate::overlaps`]. Walks over both templates at once, along all keys that both could have so far.
pub(super) fn overlaps(one: &KeyTemplate, other: &KeyTemplate) -> bool {
    if differ_at_a_glance(one, other) {
        return false;
    }
    let (one, other) = (Walk::new(one), Walk::new(other));
    let start = (Place::START, Place::START);
    let (mut seen, mut todo) = (HashSet::from([start]), vec![start]);
    while let Some((a, b)) = todo.pop() {
        if one.is_end(a) && other.is_end(b) || seen.len() > STEPS_MAX {
            return true;
        }
        let mut next: Vec<(Place, Place)> = Vec::new();
        next.extend(one.skip(a).map(|a| (a, b)));
        next.extend(other.skip(b).map(|b| (a, b)));
        // A byte that is in no literal and no escape only leads back to where it comes from.
        let literals = [one.literal(a), other.literal(b)].into_iter().flatten();
        for byte in literals.chain(*b"%235A") {
            next.extend(one.step(a, byte).zip(other.step(b, byte)));
        }
        todo.extend(next.into_iter().filter(|pair| seen.insert(*pair)));
    }
    false
}

/// The walk takes its time, and the templates of thousands of tables are asked about in pairs. Nearly all of them begin or end in
/// another way, or have another text between two colons, of which no escaped value has one.
fn differ_at_a_glance(one: &KeyTemplate, other: &KeyTemplate) -> bool {
    let (begin, other_begin) = (one.prefix(), other.prefix());
    let end = |template: &KeyTemplate| template.literals.last().cloned().unwrap_or_default();
    let (end, other_end) = (end(one), end(other));
    if !begin.starts_with(other_begin) && !other_begin.starts_with(begin)
        || !end.ends_with(&other_end) && !other_end.ends_with(&end)
    {
        return true;
    }
    if !one.escapes() || !other.escapes() {
        return false;
    }
    let (one, other) = (Walk::new(one), Walk::new(other));
    let (one, other) = (one.parts(), other.parts());
    let is_text = |part: &[Option<u8>]| part.iter().all(Option::is_some);
    let mut pairs = one.iter().zip(&other);
    one.len() != other.len() || pairs.any(|(one, other)| is_text(one) && is_text(other) && one != other)
}

/// A place in a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Place {
    token: usize,
    escape: Escape,
}

impl Place {
    const START: Self = Self::at(0);

    const fn at(token: usize) -> Self {
        Self {
            token,
            escape: Escape::Outside,
        }
    }
}

/// What of `%25` or `%3A` has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Escape {
    Outside,
    Percent,
    Two,
    Three,
}

/// A template byte by byte; None is a placeholder.
struct Walk {
    tokens: Vec<Option<u8>>,
    escapes: bool,
}

impl Walk {
    fn new(template: &KeyTemplate) -> Self {
        let mut tokens = Vec::new();
        for (i, literal) in template.literals.iter().enumerate() {
            tokens.extend((i > 0).then_some(None));
            tokens.extend(literal.bytes().map(Some));
        }
        Self {
            tokens,
            escapes: template.escapes(),
        }
    }

    /// What stands between colons.
    fn parts(&self) -> Vec<&[Option<u8>]> {
        self.tokens.split(|token| *token == Some(b':')).collect()
    }

    fn is_end(&self, place: Place) -> bool {
        place == Place::at(self.tokens.len())
    }

    /// The literal byte that has to come.
    fn literal(&self, place: Place) -> Option<u8> {
        *self.tokens.get(place.token)?
    }

    /// The end of a value.
    fn skip(&self, place: Place) -> Option<Place> {
        let is_value = self.tokens.get(place.token) == Some(&None);
        (is_value && place.escape == Escape::Outside).then_some(Place::at(place.token + 1))
    }

    fn step(&self, place: Place, byte: u8) -> Option<Place> {
        let Some(literal) = self.tokens.get(place.token)? else {
            let escape = match (place.escape, byte) {
                _ if !self.escapes => Escape::Outside,
                (Escape::Outside, b'%') => Escape::Percent,
                (Escape::Outside, b':') => return None,
                (Escape::Outside, _) | (Escape::Two, b'5') | (Escape::Three, b'A') => Escape::Outside,
                (Escape::Percent, b'2') => Escape::Two,
                (Escape::Percent, b'3') => Escape::Three,
                _ => return None,
            };
            return Some(Place { escape, ..place });
        };
        (*literal == byte).then_some(Place::at(place.token + 1))
    }
}
