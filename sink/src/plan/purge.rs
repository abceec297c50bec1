//! What has to go when a table is emptied or forgotten: every key that its template can render, but for those that a more
//! specific template of another table claims. The Redis layer scans with it, the sweep asks it about single keys.

use walmirror_proto::key::KeyTemplate;

use super::RedisKeys;

/// The keys of one template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Purge {
    /// pg_class.oid of the relation, for messages.
    pub relation: u32,
    template: KeyTemplate,
    /// What all its keys begin with.
    prefix: Vec<u8>,
    /// Templates of other relations: a key that one of them matches is theirs.
    others: Vec<KeyTemplate>,
}

impl Purge {
    /// The keys of `template` that none of `others` (the templates of the other relations) claims by beginning with more
    /// literal text, or with as much and having more of it in all: `user:{id}:profile` claims keys that `user:{id}` could
    /// render too.
    pub fn new<'t>(
        relation: u32,
        template: &KeyTemplate,
        others: impl IntoIterator<Item = &'t KeyTemplate>,
    ) -> Self {
        Self::without(relation, template, others, |own, other| {
            other.prefix.starts_with(&own.prefix)
                && (other.prefix.len(), other.length) > (own.prefix.len(), own.length)
        })
    }

    /// The keys of a template that its relation no longer has. Another relation may have taken it over, so every key that
    /// any of `others` matches is left alone.
    pub fn retired<'t>(
        relation: u32,
        template: &KeyTemplate,
        others: impl IntoIterator<Item = &'t KeyTemplate>,
    ) -> Self {
        Self::without(relation, template, others, |own, other| {
            other.prefix.starts_with(&own.prefix) || own.prefix.starts_with(&other.prefix)
        })
    }

    /// Keeps only those of the others that could match a key of this template at all: there may be thousands of tables.
    fn without<'t>(
        relation: u32,
        template: &KeyTemplate,
        others: impl IntoIterator<Item = &'t KeyTemplate>,
        matters: impl Fn(&Literals, &Literals) -> bool,
    ) -> Self {
        let own = Literals::of(template);
        let others = others
            .into_iter()
            .filter(|other| matters(&own, &Literals::of(other)))
            .cloned()
            .collect();
        Self {
            relation,
            template: template.clone(),
            prefix: own.prefix,
            others,
        }
    }

    /// Whether some of its keys could be another relation's.
    pub fn is_contested(&self) -> bool {
        !self.others.is_empty()
    }

    /// The glob for SCAN MATCH.
    pub fn pattern(&self) -> Vec<u8> {
        self.template.scan_pattern()
    }

    /// What every key of it begins with.
    pub fn prefix(&self) -> &[u8] {
        &self.prefix
    }

    /// The values of the template's placeholders, if the key is one of those that this is about.
    pub fn match_key(&self, key: &[u8]) -> Option<Vec<Vec<u8>>> {
        if RedisKeys::is_reserved(key) || self.others.iter().any(|other| other.match_key(key).is_some()) {
            return None;
        }
        self.template.match_key(key)
    }
}

/// The literal text of a template.
struct Literals {
    /// What stands before the first placeholder.
    prefix: Vec<u8>,
    /// How long all of it is, in bytes.
    length: usize,
}

impl Literals {
    fn of(template: &KeyTemplate) -> Self {
        let (mut prefix, mut length, mut is_prefix) = (Vec::new(), 0, true);
        let mut bytes = template.scan_pattern().into_iter();
        while let Some(byte) = bytes.next() {
            let literal = match byte {
                b'*' => None,
                b'\\' => bytes.next(),
                _ => Some(byte),
            };
            is_prefix &= literal.is_some();
            length += usize::from(literal.is_some());
            prefix.extend(literal.filter(|_| is_prefix));
        }
        Self { prefix, length }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn template(text: &str) -> KeyTemplate {
        KeyTemplate::parse(text).unwrap()
    }

    #[test]
    fn keys_of_a_more_specific_template_are_left_alone() {
        let (users, admins) = (template("user:{id}"), template("user:admin:{id}"));
        let purge = Purge::new(1, &users, [&admins]);
        assert!(purge.match_key(b"user:7").is_some());
        assert!(purge.match_key(b"user:admin:7").is_none());
        let purge = Purge::new(2, &admins, [&users]);
        assert!(purge.match_key(b"user:admin:7").is_some());
    }

    #[test]
    fn keys_of_a_template_that_has_more_behind_the_same_beginning_are_left_alone() {
        let (users, profiles) = (template("user:{id}"), template("user:{id}:profile"));
        let purge = Purge::new(1, &users, [&profiles]);
        assert!(purge.match_key(b"user:7").is_some());
        assert!(purge.match_key(b"user:7:profile").is_none());
        let purge = Purge::new(2, &profiles, [&users]);
        assert!(purge.match_key(b"user:7:profile").is_some());
        assert!(purge.match_key(b"user:7").is_none());
    }

    #[test]
    fn a_template_that_somebody_took_over_is_left_alone() {
        let (old, same) = (template("user:{id}"), template("user:{name}"));
        assert!(
            Purge::retired(1, &old, [&template("x:{id}")])
                .match_key(b"user:7")
                .is_some()
        );
        assert!(Purge::retired(1, &old, [&same]).match_key(b"user:7").is_none());
        assert!(
            Purge::retired(1, &old, [&template("us{id}")])
                .match_key(b"user:7")
                .is_none()
        );
    }

    #[test]
    fn a_prefix_is_literal_text() {
        assert_eq!(Purge::new(1, &template("a*[{{b}}:{id}"), []).prefix(), b"a*[{b}:");
        assert_eq!(Purge::new(1, &template("{id}"), []).prefix(), b"");
    }

    #[test]
    fn bookkeeping_is_never_purged() {
        let purge = Purge::new(1, &template("{a}:{b}:{c}"), []);
        assert!(purge.match_key(b"x:y:z").is_some());
        assert!(purge.match_key(b"walmirror:{walmirror}:progress").is_none());
    }
}
