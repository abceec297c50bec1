//! The options of the output plugin, as given to START_REPLICATION or pg_logical_slot_get_changes.

use crate::error::Refusal;

/// What the client asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Protobuf frames, or JSON text for people.
    pub format: Format,
    /// Which of the labelled tables to send; empty: all of them.
    pub tables: Vec<TablePattern>,
    /// A frame is sent when it has grown to this many bytes.
    pub batch_bytes: usize,
    /// Which replication origins' changes to send.
    pub origin: Origin,
    /// Whether transactions larger than `logical_decoding_work_mem` come while they are in progress.
    pub streaming: bool,
}

/// The `format` option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Protobuf,
    Json,
}

/// The `origin` option: `any`, or `none` for only those changes that were made on this server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    Any,
    None,
}

/// `schema.table` or `table`, where `*` stands for any characters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TablePattern {
    schema: Option<String>,
    table: String,
}

const VALID: &str = "Valid options are format (protobuf, json), tables (comma-separated patterns like public.*), proto_version (1), \
                     batch_bytes (1024 to 16777216), origin (any, none) and streaming (on, off).";

impl Default for Options {
    fn default() -> Self {
        Self {
            format: Format::Protobuf,
            tables: Vec::new(),
            batch_bytes: 32 * 1024,
            origin: Origin::Any,
            streaming: false,
        }
    }
}

impl Options {
    /// Reads the options, in the order in which they were given. An option without a value has `None`.
    pub fn parse<'a>(given: impl IntoIterator<Item = (&'a str, Option<&'a str>)>) -> Result<Self, Refusal> {
        let mut options = Self::default();
        for (name, value) in given {
            options.set(name, value.unwrap_or(""))?;
        }
        if options.streaming && options.format == Format::Json {
            return Err(Refusal::invalid(
                "walmirror option \"streaming\" is for format protobuf",
                "Leave it out, and transactions come whole, in the order of their commits.",
            ));
        }
        Ok(options)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), Refusal> {
        let wrong = || {
            Refusal::invalid(
                format!("invalid value \"{value}\" for walmirror option \"{name}\""),
                VALID,
            )
        };
        match name {
            "format" => {
                self.format = match value {
                    "protobuf" => Format::Protobuf,
                    "json" => Format::Json,
                    _ => return Err(wrong()),
                }
            }
            "tables" => {
                self.tables = value
                    .split(',')
                    .map(|part| TablePattern::parse(part.trim()).ok_or_else(wrong))
                    .collect::<Result<_, _>>()?;
            }
            "proto_version" if value == "1" => {}
            "batch_bytes" => {
                self.batch_bytes = value
                    .parse()
                    .ok()
                    .filter(|bytes| (1024..=16 << 20).contains(bytes))
                    .ok_or_else(wrong)?;
            }
            "origin" => {
                self.origin = match value {
                    "any" => Origin::Any,
                    "none" => Origin::None,
                    _ => return Err(wrong()),
                }
            }
            "streaming" => {
                self.streaming = match value {
                    "on" => true,
                    "off" => false,
                    _ => return Err(wrong()),
                }
            }
            "proto_version" => return Err(wrong()),
            _ => {
                return Err(Refusal::invalid(
                    format!("unknown walmirror option \"{name}\""),
                    VALID,
                ));
            }
        }
        Ok(())
    }

    /// Whether the client wants this table.
    pub fn wants(&self, schema: &str, table: &str) -> bool {
        self.tables.is_empty() || self.tables.iter().any(|pattern| pattern.matches(schema, table))
    }
}

impl TablePattern {
    fn parse(text: &str) -> Option<Self> {
        if text.is_empty() {
            return None;
        }
        Some(match text.split_once('.') {
            Some((schema, table)) => Self {
                schema: Some(schema.to_owned()),
                table: table.to_owned(),
            },
            None => Self {
                schema: None,
                table: text.to_owned(),
            },
        })
    }

    fn matches(&self, schema: &str, table: &str) -> bool {
        self.schema.as_deref().is_none_or(|pattern| glob(pattern, schema)) && glob(&self.table, table)
    }
}

/// Whether `text` fits `pattern`, in which `*` stands for any characters.
fn glob(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = text.strip_prefix(parts.next().unwrap_or_default()) else {
        return false;
    };
    let Some(last) = parts.next_back() else {
        return rest.is_empty();
    };
    for part in parts {
        // Where it comes first leaves the most to those that follow, so that no other place need be tried.
        let Some((_, tail)) = rest.split_once(part) else {
            return false;
        };
        rest = tail;
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn patterns_match_schema_and_table() {
        let options = Options::parse([("tables", Some("public.*, audit.log_*x,plain"))]).unwrap();
        assert!(options.wants("public", "users"));
        assert!(options.wants("audit", "log_2020x"));
        assert!(!options.wants("audit", "log_2020"));
        assert!(options.wants("anything", "plain"));
        assert!(!options.wants("other", "users"));
    }

    #[test]
    fn stars_stand_for_any_characters() {
        for (pattern, text, fits) in [
            ("*", "", true),
            ("**", "a", true),
            ("a", "ab", false),
            ("a*a", "a", false),
            ("a*a", "aa", true),
            ("*ab*ab", "ab", false),
            ("*ab*ab", "abab", true),
            ("*b*d*", "abcde", true),
            ("*d*b*", "abcde", false),
            ("é*", "éa", true),
        ] {
            assert_eq!(glob(pattern, text), fits, "{pattern} {text}");
        }
        assert!(!glob(&format!("{}b", "*a".repeat(30)), &"a".repeat(63)));
    }

    #[test]
    fn wrong_options_name_what_is_valid() {
        for (name, value) in [
            ("format", "xml"),
            ("colour", "red"),
            ("batch_bytes", "12"),
            ("origin", ""),
            ("streaming", "perhaps"),
            ("proto_version", "2"),
            ("tables", "a,,b"),
        ] {
            let refusal = Options::parse([(name, Some(value))]).unwrap_err();
            assert!(refusal.message.contains(name), "{}", refusal.message);
            assert!(refusal.hint.contains("batch_bytes"), "{}", refusal.hint);
        }
    }
}
