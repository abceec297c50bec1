//! Which keys are a table's: those of its template, and those of templates that it had before and that are to go.

use walmirror_proto::key::KeyTemplate;

use super::Purge;

/// The keys of a table.
#[derive(Debug)]
pub struct Owned {
    own: Purge,
    retired: Vec<Purge>,
    any_bytes: bool,
}

/// What a key is to a table.
#[derive(Debug, PartialEq, Eq)]
pub enum Belongs {
    /// A row with these values, as text, would have it.
    ToRow(Vec<Vec<u8>>),
    /// It is of the table, and no row can have it: its template is an old one, or what stands in it is no text.
    ToNoRow,
    /// It is another table's, or nobody's.
    Elsewhere,
}

impl Owned {
    /// The keys of a table that has this template, and had those of `old_keys`. `others`: the templates of the other tables.
    pub fn new<'t>(
        relation: u32,
        template: &KeyTemplate,
        old_keys: &[String],
        others: impl IntoIterator<Item = &'t KeyTemplate> + Clone,
    ) -> Self {
        let old = old_keys.iter().filter_map(|key| KeyTemplate::parse(key).ok());
        Self {
            own: Purge::new(relation, template, others.clone()),
            retired: old
                .map(|template| Purge::retired(relation, &template, others.clone()))
                .collect(),
            any_bytes: false,
        }
    }

    /// Whether text of the database may be any bytes (SQL_ASCII).
    #[must_use]
    pub fn of_any_bytes(self, any_bytes: bool) -> Self {
        Self { any_bytes, ..self }
    }

    /// All of them, template by template.
    pub fn purges(&self) -> impl Iterator<Item = &Purge> {
        std::iter::once(&self.own).chain(&self.retired)
    }

    /// What a key is to the table. The template of today comes first.
    pub fn belongs(&self, key: &[u8]) -> Belongs {
        self.of(self.own.match_key(key), key)
    }

    /// The same for a key that was noted as pending for the table.
    pub fn noted(&self, key: &[u8]) -> Belongs {
        self.of(self.own.match_row(key), key)
    }

    fn of(&self, values: Option<Vec<Vec<u8>>>, key: &[u8]) -> Belongs {
        match values {
            Some(values) if is_text(&values, self.any_bytes) => Belongs::ToRow(values),
            Some(_) => Belongs::ToNoRow,
            None if self.retired.iter().any(|purge| purge.match_key(key).is_some()) => Belongs::ToNoRow,
            None => Belongs::Elsewhere,
        }
    }
}

/// Whether Postgres could hold these values as text at all; `any_bytes`: the database is SQL_ASCII.
pub(crate) fn is_text(values: &[Vec<u8>], any_bytes: bool) -> bool {
    values
        .iter()
        .all(|value| !value.contains(&0) && (any_bytes || std::str::from_utf8(value).is_ok()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_key_is_of_todays_template_or_of_an_old_one_or_of_nobody() {
        let template = |text: &str| KeyTemplate::parse(text).unwrap();
        let old = ["old:{id}".to_owned(), "taken:{id}".to_owned()];
        let owned = Owned::new(1, &template("a:{id}"), &old, &[template("taken:{id}")]);
        assert_eq!(owned.belongs(b"a:7"), Belongs::ToRow(vec![b"7".to_vec()]));
        for nobody in [b"a:\xff".as_slice(), b"a:\0", b"old:7"] {
            assert_eq!(owned.belongs(nobody), Belongs::ToNoRow);
        }
        for other in [b"taken:7".as_slice(), b"b:7"] {
            assert_eq!(owned.belongs(other), Belongs::Elsewhere);
        }
        assert_eq!(owned.purges().count(), 3);
        let owned = owned.of_any_bytes(true);
        assert_eq!(owned.belongs(b"a:\xff"), Belongs::ToRow(vec![b"\xff".to_vec()]));
        for nobody in [b"a:\0".as_slice(), b"old:7"] {
            assert_eq!(owned.belongs(nobody), Belongs::ToNoRow);
        }
    }
}
