//! The security label of a table: the configuration of its mirror, as a JSON object.
//!
//! `SECURITY LABEL FOR walmirror ON TABLE users IS '{"mode":"mirror","key":"user:{id}"}'`. Labels stand in a catalog, so
//! the decoder reads them as of the WAL position that it decodes.

use serde::Deserialize;
use serde_json::Value as Json;
use walmirror_proto::pb;

use crate::error::Refusal;

/// The options of a label. Unknown ones are errors.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Label {
    /// Whether Redis holds every row, or only those that somebody reads.
    pub mode: Mode,
    /// The key template; `<table>:{pk}` when absent.
    pub key: Option<String>,
    /// What a Redis value looks like.
    #[serde(default)]
    pub value: Value,
    /// The columns of the value; all when absent.
    #[serde(default, deserialize_with = "present")]
    pub columns: Option<Vec<String>>,
    /// Expiry in milliseconds; none when absent.
    pub ttl_ms: Option<u64>,
    /// What a write does to a cached key.
    #[serde(default)]
    pub on_write: OnWrite,
    /// Whether SELECTs bring back expired rows of a mirror.
    #[serde(default)]
    pub capture: bool,
}

/// The names of all columns that an index can have make half of it. What is asked of templates takes time that grows faster than they do, and
/// cannot be cancelled.
const KEY_BYTES_MAX: usize = 4096;

/// See [`pb::Mode`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    Mirror,
    Cache,
}

/// See [`pb::ValueKind`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Value {
    #[default]
    Hash,
    String,
    Json,
}

/// See [`pb::OnWrite`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnWrite {
    #[default]
    Refresh,
    Populate,
    Invalidate,
}

impl Label {
    /// Reads the JSON of a label. What the extension's SQL, which reads labels as jsonb, does not know as one is refused: what jsonb does
    /// not hold, and what serde would take for a label besides, an array of the options' values and `{"mirror":null}` for `"mirror"`.
    pub fn parse(json: &str) -> Result<Self, Refusal> {
        let invalid = |error: String| {
            Refusal::invalid(
                format!("invalid walmirror label: {error}"),
                "A label is a JSON object like {\"mode\":\"mirror\",\"key\":\"user:{id}\",\"value\":\"hash\"}; its options \
                 are mode (mirror, cache), key, value (hash, string, json), columns, ttl_ms, on_write (refresh, populate, \
                 invalidate) and capture. SELECT walmirror.mirror('table') writes it for you.",
            )
        };
        let options: serde_json::Map<String, Json> =
            serde_json::from_str(json).map_err(|error| invalid(error.to_string()))?;
        let words = ["mode", "value", "on_write"].map(|name| (name, options.get(name)));
        if let Some((name, _)) = words
            .iter()
            .find(|(_, word)| word.is_some_and(|word| !word.is_string()))
        {
            return Err(invalid(format!("{name} is not a string")));
        }
        let label: Self = serde_json::from_str(json).map_err(|error| invalid(error.to_string()))?;
        let columns = label.columns.iter().flatten();
        if columns.chain(&label.key).any(|text| text.contains('\0')) {
            return Err(invalid("it holds the character \\u0000".to_owned()));
        }
        if let Some(key) = label.key.as_ref().filter(|key| key.len() > KEY_BYTES_MAX) {
            return Err(invalid(format!(
                "its key template has {} bytes, and {KEY_BYTES_MAX} are the most",
                key.len()
            )));
        }
        Ok(label)
    }
}

/// Whether the JSON of a label holds a `\u` escape of a character beyond ASCII. In databases that are not in UTF-8 jsonb may have no such
/// character, and the extension's views, which read all labels as jsonb, would fail for everybody.
pub fn escapes_beyond_ascii(json: &str) -> bool {
    let mut rest = json;
    while let Some((_, tail)) = rest.split_once('\\') {
        let digits = tail.strip_prefix('u').and_then(|digits| digits.get(..4));
        if digits
            .and_then(|digits| u32::from_str_radix(digits, 16).ok())
            .is_some_and(|character| character > 0x7F)
        {
            return true;
        }
        rest = tail.get(1..).unwrap_or_default();
    }
    false
}

/// An option that is there has a value.
fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<String>>, D::Error> {
    Vec::deserialize(deserializer).map(Some)
}

impl From<Mode> for pb::Mode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Mirror => Self::Mirror,
            Mode::Cache => Self::Cache,
        }
    }
}

impl From<Value> for pb::ValueKind {
    fn from(value: Value) -> Self {
        match value {
            Value::Hash => Self::Hash,
            Value::String => Self::String,
            Value::Json => Self::Json,
        }
    }
}

impl From<OnWrite> for pb::OnWrite {
    fn from(on_write: OnWrite) -> Self {
        match on_write {
            OnWrite::Refresh => Self::Refresh,
            OnWrite::Populate => Self::Populate,
            OnWrite::Invalidate => Self::Invalidate,
        }
    }
}
