//! Keys that a table's template can make and that are another table's, because the template of that one is more specific: with
//! `user:{id}` and `user:admin:{id}`, the row `admin:7` of the first would have the key of the row `7` of the second.

use walmirror_proto::key::KeyTemplate;

/// The templates that take keys from one. Nearly always there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claims(Vec<(u32, KeyTemplate)>);

impl Claims {
    /// What the templates of these tables take from `template`.
    pub fn new<'t>(template: &KeyTemplate, others: impl IntoIterator<Item = (u32, &'t KeyTemplate)>) -> Self {
        let mut claims = Self::default();
        for (oid, other) in others {
            claims.set(oid, Some(other).filter(|other| other.takes_from(template)));
        }
        claims
    }

    /// Whether this table takes keys.
    pub fn has(&self, oid: u32) -> bool {
        self.0.iter().any(|(by, _)| *by == oid)
    }

    /// From now on this table takes keys with this template, or none.
    pub fn set(&mut self, oid: u32, template: Option<&KeyTemplate>) {
        self.0.retain(|(by, _)| *by != oid);
        self.0.extend(template.map(|template| (oid, template.clone())));
    }

    /// Whose key this is; None: it is the table's own.
    pub fn of(&self, key: &[u8]) -> Option<u32> {
        let of = |(_, template): &&(u32, KeyTemplate)| template.match_key(key).is_some();
        let owners = self.0.iter().filter(of);
        let owner = owners.max_by_key(|(_, template)| template.specificity());
        owner.map(|(oid, _)| *oid)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_key_is_of_the_more_specific_template() {
        let template = |text: &str| KeyTemplate::parse(text).unwrap();
        let (users, posts, admins) = (
            template("user:{id}"),
            template("user:{id}:post:{post}"),
            template("user:admin:{id}"),
        );
        let claims = Claims::new(&users, [(2, &posts), (3, &admins), (4, &template("us{id}"))]);
        assert_eq!(claims.of(b"user:7"), None);
        assert_eq!(claims.of(b"user:7:post:8"), Some(2));
        assert_eq!(claims.of(b"user:admin:8"), Some(3));
        assert_eq!(Claims::new(&posts, [(1, &users)]), Claims::default());
        let mut claims = Claims::new(&posts, [(1, &users), (3, &admins)]);
        assert_eq!(claims.of(b"user:admin:post:8"), Some(3));
        assert_eq!(claims.of(b"user:7:post:8"), None);
        claims.set(3, None);
        assert!(!claims.has(3) && claims.of(b"user:admin:post:8").is_none());
    }
}
