//! The history of a timeline: where each of its ancestors was left. Pure, but for the question to the server.
//!
//! A promotion begins a new timeline, and notes in its history file where it left the one before. Up to that position both
//! have the same WAL; what the old one has behind it never happened on the new one.

use walmirror_proto::Lsn;

use crate::error::Error;
use crate::pq::Connection;

/// The ancestors of a timeline, oldest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct History(Vec<(u32, Lsn)>);

impl History {
    /// That of a timeline that has no ancestors.
    pub const fn none() -> Self {
        Self(Vec::new())
    }

    /// Reads a history file: a line names a timeline, where it was left, and why. None: a line cannot be read.
    pub fn parse(text: &str) -> Option<Self> {
        text.lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(|line| {
                let mut words = line.split_whitespace();
                Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
            })
            .collect::<Option<_>>()
            .map(Self)
    }

    /// Where this timeline was left; None where it is no ancestor.
    pub fn left(&self, timeline: u32) -> Option<Lsn> {
        self.0
            .iter()
            .find(|(ancestor, _)| *ancestor == timeline)
            .map(|(_, left)| *left)
    }
}

/// Asks the server for the history of its timeline. One whose file is gone has no ancestors that anybody knows of.
pub fn history(connection: &mut Connection, timeline: u32) -> Result<History, Error> {
    let results = match connection.simple(&format!("TIMELINE_HISTORY {timeline}")) {
        Ok(results) => results,
        // undefined_file
        Err(error) if error.sqlstate.as_deref() == Some("58P01") => return Ok(History::none()),
        Err(error) => {
            return Err(Error::postgres(
                "cannot ask Postgres for the history of its timeline",
                error,
            ));
        }
    };
    // The second column is bytea, and yet the file as it is. A reason in it may be in any encoding.
    results
        .first()
        .and_then(|result| result.get(0, 1))
        .and_then(|file| History::parse(&String::from_utf8_lossy(file)))
        .ok_or_else(|| Error::answer("cannot ask Postgres for the history of its timeline"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_history_says_where_timelines_were_left() {
        let history = History::parse(
            "# a comment\n1\t0/A000198\tno recovery target specified\n\n2\t1/0B\tbefore 2026-01-01 00:00:00+00\n",
        )
        .unwrap();
        assert_eq!(history.left(1), Some(Lsn(0xA00_0198)));
        assert_eq!(history.left(2), Some(Lsn(0x1_0000_000B)));
        assert_eq!(history.left(3), None);
    }

    #[test]
    fn what_is_no_history_is_none() {
        for text in ["x\t0/1\n", "1\n", "1\tnowhere\n"] {
            assert_eq!(History::parse(text), None, "{text}");
        }
        assert_eq!(History::parse(""), Some(History::none()));
    }
}
