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
    /// Templates of other relations: a key that one of them matches is theirs.
    others: Vec<KeyTemplate>,
    /// As specific as this one: a key that one of them matches may be of either, and is left alone.
    rivals: Vec<KeyTemplate>,
    /// All that the relation has written in the same step before this goes too, whatever its keys: it is emptied or forgotten.
    is_whole: bool,
}

impl Purge {
    /// The keys of `template` that none of `others` (the templates of the other relations) claims by beginning with more
    /// literal text, or with as much and having more of it in all: `user:{id}:profile` claims keys that `user:{id}` could
    /// render too. What another one matches that is as specific is left alone; new labels make no such templates.
    pub fn new<'t>(
        relation: u32,
        template: &KeyTemplate,
        others: impl IntoIterator<Item = &'t KeyTemplate>,
    ) -> Self {
        let may_match = |other: &&KeyTemplate| other.prefix().starts_with(template.prefix());
        let (mut claims, mut rivals) = (Vec::new(), Vec::new());
        // Only those that could match a key of this template at all: there may be thousands of tables.
        for other in others.into_iter().filter(may_match) {
            if other.specificity() > template.specificity() {
                claims.push(other.clone());
            } else if other.ties_with(template) {
                rivals.push(other.clone());
            }
        }
        Self {
            relation,
            template: template.clone(),
            others: claims,
            rivals,
            is_whole: true,
        }
    }

    /// The keys of a template that its relation no longer has. Another relation may have taken it over, so every key that
    /// any of `others` matches is left alone.
    pub fn retired<'t>(
        relation: u32,
        template: &KeyTemplate,
        others: impl IntoIterator<Item = &'t KeyTemplate>,
    ) -> Self {
        let own = template.prefix();
        let may_match =
            |other: &&KeyTemplate| other.prefix().starts_with(own) || own.starts_with(other.prefix());
        Self {
            relation,
            template: template.clone(),
            others: others.into_iter().filter(may_match).cloned().collect(),
            rivals: Vec::new(),
            is_whole: false,
        }
    }

    /// Whether some of its keys could be another relation's.
    pub fn is_contested(&self) -> bool {
        !self.others.is_empty()
    }

    /// Whether a key goes that `writer` has written in the same step before this: as in Redis, whoever wrote it.
    pub fn takes_written(&self, writer: u32, key: &[u8]) -> bool {
        self.is_whole && writer == self.relation || self.match_key(key).is_some()
    }

    /// The glob for SCAN MATCH.
    pub fn pattern(&self) -> Vec<u8> {
        self.template.scan_pattern()
    }

    /// What every key of it begins with.
    pub fn prefix(&self) -> &[u8] {
        self.template.prefix().as_bytes()
    }

    /// The values of the template's placeholders, if the key is one of those that this is about.
    pub fn match_key(&self, key: &[u8]) -> Option<Vec<Vec<u8>>> {
        if self.rivals.iter().any(|rival| rival.match_key(key).is_some()) {
            return None;
        }
        self.match_row(key)
    }

    /// The same for a key that a row of the relation is known to have had: it may be a rival's as well.
    pub fn match_row(&self, key: &[u8]) -> Option<Vec<Vec<u8>>> {
        if RedisKeys::is_reserved(key) || self.others.iter().any(|other| other.match_key(key).is_some()) {
            return None;
        }
        self.template.match_key(key)
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

    /// A TRUNCATE of one table removed rows of the other.
    #[test]
    fn keys_that_may_be_of_a_template_that_is_as_specific_are_left_alone() {
        let (one, other) = (template("x:{a}-{b}"), template("x:{a}_{b}"));
        for (own, rival, key) in [(&one, &other, "x:1-2"), (&other, &one, "x:1_2")] {
            let purge = Purge::new(1, own, [rival]);
            assert!(purge.match_key(key.as_bytes()).is_some());
            assert!(purge.match_key(b"x:1-2_3").is_none());
            assert!(purge.match_row(b"x:1-2_3").is_some());
        }
        // Two tables have one template only where one of them is of the past.
        assert!(
            Purge::new(1, &one, [&template("x:{c}-{d}")])
                .match_key(b"x:1-2")
                .is_some()
        );
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
