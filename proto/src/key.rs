//! Key templates: `user:{id}`. The extension parses them to check them, the sink renders a key for every row and reads
//! keys back when it looks for those that have no row.
//!
//! A template is literal text and `{column}` placeholders; `{{` and `}}` are literal braces. With two or more
//! placeholders, `%` and `:` in values are written `%25` and `%3A`, so that no two rows share a key as long as the
//! literals between the placeholders hold a `:`. A literal between two placeholders without one (or none at all) can make
//! two rows share a key; reading such a key back takes the leftmost placeholder as short as possible.

mod matching;
mod overlap;

pub use matching::Readings;

use std::fmt::Write;

use memchr::{memchr2, memchr2_iter};

/// Redis takes no longer key.
pub const MAX_KEY_BYTES: usize = 512 * 1024 * 1024;

/// Why a template is not one, or a key cannot be made. Positions count bytes of the template from 1.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// `{` without its `}`.
    #[error("the \"{{\" at position {0} is not closed; write \"{{{{\" for a literal brace")]
    Unclosed(usize),
    /// `}` outside of a placeholder.
    #[error("the \"}}\" at position {0} closes nothing; write \"}}}}\" for a literal brace")]
    Unopened(usize),
    /// `{a{b}`
    #[error("there is a \"{{\" at position {0} inside a placeholder; a column name cannot hold braces here")]
    Nested(usize),
    /// `{}`
    #[error("the placeholder at position {0} names no column; write {{column}}")]
    Empty(usize),
    /// The template would give every row the same key.
    #[error("the key template has no {{column}} placeholder, so all rows would share one key")]
    NoPlaceholder,
    /// The rendered key is longer than Redis takes.
    #[error("the key is {0} bytes long, but Redis takes at most 512 MB")]
    TooLong(usize),
}

/// A parsed template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyTemplate {
    /// The literals before, between and after the placeholders: one more than `slots`.
    literals: Vec<String>,
    /// For each placeholder its place in `names`.
    slots: Vec<usize>,
    names: Vec<String>,
}

impl KeyTemplate {
    /// Parses a template.
    pub fn parse(template: &str) -> Result<Self, KeyError> {
        let mut key = Self {
            literals: Vec::new(),
            slots: Vec::new(),
            names: Vec::new(),
        };
        let mut literal = String::new();
        let mut rest = template;
        let at = |rest: &str| template.len() - rest.len() + 1;
        while let Some(c) = rest.chars().next() {
            let tail = rest.get(c.len_utf8()..).unwrap_or_default();
            match c {
                '{' | '}' if tail.starts_with(c) => {
                    literal.push(c);
                    rest = tail.get(1..).unwrap_or_default();
                }
                '{' => {
                    let end = tail.find(['{', '}']).ok_or(KeyError::Unclosed(at(rest)))?;
                    let (name, close) = tail.split_at_checked(end).unwrap_or((tail, ""));
                    let after = close.strip_prefix('}').ok_or(KeyError::Nested(at(close)))?;
                    if name.is_empty() {
                        return Err(KeyError::Empty(at(rest)));
                    }
                    key.placeholder(std::mem::take(&mut literal), name);
                    rest = after;
                }
                '}' => return Err(KeyError::Unopened(at(rest))),
                _ => {
                    literal.push(c);
                    rest = tail;
                }
            }
        }
        key.literals.push(literal);
        if key.slots.is_empty() {
            Err(KeyError::NoPlaceholder)
        } else {
            Ok(key)
        }
    }

    fn placeholder(&mut self, literal: String, name: &str) {
        self.literals.push(literal);
        let known = self.names.iter().position(|known| known == name);
        self.slots.push(known.unwrap_or(self.names.len()));
        if known.is_none() {
            self.names.push(name.to_owned());
        }
    }

    /// The columns that the template names, each once, in order of first appearance.
    pub fn placeholders(&self) -> &[String] {
        &self.names
    }

    /// What every key of it begins with.
    pub fn prefix(&self) -> &str {
        self.literals.first().map_or("", String::as_str)
    }

    /// The template without its column names (`user:{}`), in template syntax: two tables whose skeletons are equal would
    /// write the same keys.
    pub fn skeleton(&self) -> String {
        let mut out = String::new();
        for (i, literal) in self.literals.iter().enumerate() {
            let _ = write!(
                out,
                "{}{}",
                if i > 0 { "{}" } else { "" },
                literal.replace('{', "{{").replace('}', "}}")
            );
        }
        out
    }

    /// How much of it is literal text, in bytes: what stands before the first placeholder, and all of it.
    pub fn specificity(&self) -> (usize, usize) {
        let all = self.literals.iter().map(String::len).sum();
        (self.prefix().len(), all)
    }

    /// Whether it has a key space of its own: it begins with literal text, or has a letter or a digit in it. The keys of `{id}` and
    /// `{a}:{b}` could be anybody's.
    pub fn has_own_space(&self) -> bool {
        let mut chars = self.literals.iter().flat_map(|literal| literal.chars());
        !self.prefix().is_empty() || chars.any(char::is_alphanumeric)
    }

    /// Whether some key can be of both templates. A column that one of them names twice counts as two.
    pub fn overlaps(&self, other: &Self) -> bool {
        overlap::overlaps(self, other)
    }

    /// Whether this template begins with more literal text, or with as much and has more of it in all, and some key can be of both: such
    /// a key is this one's.
    pub fn takes_from(&self, other: &Self) -> bool {
        self.prefix().starts_with(other.prefix())
            && self.specificity() > other.specificity()
            && self.overlaps(other)
    }

    /// Whether some key can be of both, and neither is more specific: nobody can tell whose it is, as for `x:{a}-{b}` and
    /// `x:{a}_{b}`. Templates that are the same but for the names of their columns are not meant: those are known by their skeletons.
    pub fn ties_with(&self, other: &Self) -> bool {
        self.specificity() == other.specificity()
            && self.prefix() == other.prefix()
            && self.skeleton() != other.skeleton()
            && self.overlaps(other)
    }

    /// Whether `%` and `:` in values are escaped.
    fn escapes(&self) -> bool {
        self.slots.len() > 1
    }

    /// Appends the key of one row. `value(i, out)` appends the text of column `placeholders()[i]`, which is not NULL. A
    /// key that Redis would not take is an error, and `out` is as it was.
    pub fn render(
        &self,
        mut value: impl FnMut(usize, &mut Vec<u8>),
        out: &mut Vec<u8>,
    ) -> Result<(), KeyError> {
        let start = out.len();
        for (i, literal) in self.literals.iter().enumerate() {
            if let Some(&slot) = i.checked_sub(1).and_then(|before| self.slots.get(before)) {
                let from = out.len();
                value(slot, out);
                if self.escapes() {
                    escape(out, from);
                }
            }
            out.extend_from_slice(literal.as_bytes());
        }
        let len = out.len() - start;
        if len > MAX_KEY_BYTES {
            out.truncate(start);
            return Err(KeyError::TooLong(len));
        }
        Ok(())
    }

    /// The values of `placeholders()` that `key` was rendered from; None when it cannot come from this template.
    pub fn match_key(&self, key: &[u8]) -> Option<Vec<Vec<u8>>> {
        matching::match_key(self, key)
    }

    /// Whether a key may be read in several ways, because a value may hold what stands between two placeholders: `{day}-{id}`.
    pub fn is_ambiguous(&self) -> bool {
        let between = self
            .literals
            .len()
            .checked_sub(1)
            .and_then(|last| self.literals.get(1..last));
        between
            .unwrap_or_default()
            .iter()
            .any(|literal| !literal.contains(':'))
    }

    /// Every way to read `key`, as [`Self::match_key`] gives the first of them, or 64 of them. `accepts(i, value)`: whether the
    /// column `placeholders()[i]` can have that value.
    pub fn match_all(&self, key: &[u8], accepts: &dyn Fn(usize, &[u8]) -> bool) -> Readings {
        matching::match_all(self, key, accepts)
    }

    /// The template as an expression of SQL, which gives the key of a row as text. `column(i)` is the text of the column
    /// `placeholders()[i]`, and `literal` quotes a string.
    pub fn expression(&self, column: impl Fn(usize) -> String, literal: impl Fn(&str) -> String) -> String {
        let mut parts = Vec::new();
        for (i, text) in self.literals.iter().enumerate() {
            if let Some(&slot) = i.checked_sub(1).and_then(|before| self.slots.get(before)) {
                let value = column(slot);
                parts.push(if self.escapes() {
                    format!("replace(replace({value}, '%', '%25'), ':', '%3A')")
                } else {
                    value
                });
            }
            if !text.is_empty() {
                parts.push(literal(text));
            }
        }
        parts.join(" || ")
    }

    /// A glob for Redis' SCAN MATCH that every key of this template matches (and possibly others: check them with
    /// [`Self::match_key`]).
    pub fn scan_pattern(&self) -> Vec<u8> {
        let mut pattern = Vec::new();
        for (i, literal) in self.literals.iter().enumerate() {
            if i > 0 && !pattern.ends_with(b"*") {
                pattern.push(b'*');
            }
            for byte in literal.bytes() {
                if matches!(byte, b'*' | b'?' | b'[' | b']' | b'\\') {
                    pattern.push(b'\\');
                }
                pattern.push(byte);
            }
        }
        pattern
    }
}

/// Escapes what stands in `out` from `from` on, in place.
fn escape(out: &mut Vec<u8>, from: usize) {
    let Some(value) = out
        .get(from..)
        .filter(|value| memchr2(b'%', b':', value).is_some())
    else {
        return;
    };
    // Only values with a colon or a percent sign get here, and those are rare enough to be copied.
    let mut escaped = Vec::with_capacity(value.len() + 2 * memchr2_iter(b'%', b':', value).count());
    for &byte in value {
        match byte {
            b'%' => escaped.extend_from_slice(b"%25"),
            b':' => escaped.extend_from_slice(b"%3A"),
            _ => escaped.push(byte),
        }
    }
    out.truncate(from);
    out.extend_from_slice(&escaped);
}

#[cfg(test)]
mod tests;
