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
    /// Templates of other relations that begin with more literal text: a key that one of them matches is theirs.
    others: Vec<KeyTemplate>,
}

impl Purge {
    /// The keys of `template` that none of `others` (the templates of the other relations) claims.
    pub fn new<'t>(
        relation: u32,
        template: &KeyTemplate,
        others: impl IntoIterator<Item = &'t KeyTemplate>,
    ) -> Self {
        let own = literal_prefix(template);
        let others = others
            .into_iter()
            .filter(|other| literal_prefix(other) > own)
            .cloned()
            .collect();
        Self {
            relation,
            template: template.clone(),
            others,
        }
    }

    /// The keys of a template that its relation no longer has. Another relation may have taken it over, so every key that
    /// any of `others` matches is left alone.
    pub fn retired<'t>(
        relation: u32,
        template: &KeyTemplate,
        others: impl IntoIterator<Item = &'t KeyTemplate>,
    ) -> Self {
        Self {
            relation,
            template: template.clone(),
            others: others.into_iter().cloned().collect(),
        }
    }

    /// The glob for SCAN MATCH.
    pub fn pattern(&self) -> Vec<u8> {
        self.template.scan_pattern()
    }

    /// The values of the template's placeholders, if the key is one of those that this is about.
    pub fn match_key(&self, key: &[u8]) -> Option<Vec<Vec<u8>>> {
        if RedisKeys::is_reserved(key) || self.others.iter().any(|other| other.match_key(key).is_some()) {
            return None;
        }
        self.template.match_key(key)
    }
}

/// The number of bytes before the first placeholder (escapes of the glob counted twice, which orders just as well).
fn literal_prefix(template: &KeyTemplate) -> usize {
    let pattern = template.scan_pattern();
    let mut escaped = false;
    let end = pattern.iter().position(|&byte| {
        let star = byte == b'*' && !escaped;
        escaped = byte == b'\\' && !escaped;
        star
    });
    end.unwrap_or(pattern.len())
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
    fn bookkeeping_is_never_purged() {
        let purge = Purge::new(1, &template("{a}:{b}:{c}"), []);
        assert!(purge.match_key(b"x:y:z").is_some());
        assert!(purge.match_key(b"walmirror:{walmirror}:progress").is_none());
    }
}
