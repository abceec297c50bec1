//! How far the backfill of a table is. Stored in the progress hash, in the same EXEC as the rows that it speaks of, so that
//! a restart goes on where the last one stopped.

use serde::{Deserialize, Serialize};

/// What is being done to a table's keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Its rows are read and written.
    Fill,
    /// Keys without a row are looked for.
    Sweep,
    /// Its keys are what the stream makes of them.
    Done,
}

/// A place in a walk over the keyspace. SCAN keeps its promise also where another connection goes on, as long as it is the same process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Walk {
    /// The process that serves it.
    pub run_id: String,
    /// The cursor of SCAN.
    pub at: String,
}

/// The place of a backfill.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// The version of the table that it belongs to.
    pub fingerprint: u64,
    /// What is being done.
    pub stage: Stage,
    /// Fill: the table (a leaf partition, or the table itself) that is being read; those with lower oids are done.
    pub leaf: u32,
    /// Fill: the row to read next is in this block …
    pub block: u32,
    /// … at this offset or behind it.
    pub offset: u16,
    /// Fill: the file that this is a place in (relfilenode; 0: not known). VACUUM FULL and CLUSTER move rows to another one, and say so
    /// nowhere.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub file: u32,
    /// Rows read so far.
    pub rows: u64,
    /// Sweep: all keys before this place are checked, and those without a row removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub walk: Option<Walk>,
    /// Key templates that the table had before; their keys go at the end.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub old_keys: Vec<String>,
    /// Redis held no key of the table when this began, and under this version of it. So a row that is read finds its key
    /// missing, or as the stream has just written it: nothing has to be removed first, and no key is without a row.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub on_nothing: bool,
    /// A transaction id that was taken when this version of the table had been announced: whoever was writing to the table at that
    /// time has one below it. None: it is not known yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub horizon: Option<u64>,
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

impl Cursor {
    /// The beginning.
    pub fn start(fingerprint: u64, old_keys: Vec<String>) -> Self {
        Self {
            fingerprint,
            stage: Stage::Fill,
            leaf: 0,
            block: 0,
            offset: 0,
            file: 0,
            rows: 0,
            walk: None,
            old_keys,
            on_nothing: false,
            horizon: None,
        }
    }

    /// All rows are read.
    pub fn filled(self) -> Self {
        if self.on_nothing {
            return Self {
                rows: self.rows,
                ..Self::done(self.fingerprint)
            };
        }
        Self {
            stage: Stage::Sweep,
            leaf: 0,
            block: 0,
            offset: 0,
            file: 0,
            ..self
        }
    }

    /// Nothing is to be done for this version of the table.
    pub fn done(fingerprint: u64) -> Self {
        Self {
            stage: Stage::Done,
            ..Self::start(fingerprint, Vec::new())
        }
    }

    /// Whether the table's keys can be trusted.
    pub fn is_done(&self) -> bool {
        self.stage == Stage::Done
    }

    /// Reads what [`Self::to_json`] wrote; None when it is of another program.
    pub fn parse(text: &str) -> Option<Self> {
        serde_json::from_str(text).ok()
    }

    /// The text for the progress hash.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_reads_back() {
        let mut cursor = Cursor::start(u64::MAX, vec!["old:{id}".to_owned()]);
        assert_eq!(Cursor::parse(&cursor.to_json()), Some(cursor.clone()));
        cursor.old_keys.clear();
        cursor.stage = Stage::Sweep;
        assert_eq!(Cursor::parse(&cursor.to_json()), Some(cursor.clone()));
        assert!(cursor.to_json().contains("\"stage\":\"sweep\""));
        assert!(!cursor.to_json().contains("walk"));
        let (run_id, at) = ("5f0c".to_owned(), "17".to_owned());
        cursor.walk = Some(Walk { run_id, at });
        assert_eq!(Cursor::parse(&cursor.to_json()), Some(cursor.clone()));
        cursor.on_nothing = true;
        assert!(!cursor.to_json().contains("horizon"));
        cursor.horizon = Some(7);
        assert_eq!(Cursor::parse(&cursor.to_json()), Some(cursor));
        assert_eq!(Cursor::parse("{}"), None);
    }
}
