//! What may stand in a log, and what never may: one rule for the sink of a scenario and for second ones.

/// Lines with one of these are looked at.
const SIGNS: [&str; 5] = [" WARN ", " ERROR ", "error:", "panicked", "internal error"];
/// What no fault explains, whatever else the line says.
const NEVER: [&str; 2] = ["panicked", "internal error"];

/// What the sink says when it lost Redis, and tries again. The walsender of the session before takes a moment to go.
pub const REDIS_AWAY: [&str; 3] = [
    "the connection to Redis at * broke: ",
    "cannot connect to Redis at ",
    "replication slot * is active for PID",
];

/// What the sink says when it lost Postgres, and tries again. What was under way then is named in front of the reason.
pub const POSTGRES_AWAY: [&str; 10] = [
    "the stream of the slot * broke",
    "the stream ended",
    "cannot connect to Postgres",
    "cannot open a replication connection",
    "server closed the connection unexpectedly",
    "terminating connection due to administrator command",
    ": no connection to the server",
    "terminating connection because of crash of another server process",
    "terminating connection due to unexpected postmaster exit",
    "replication slot * is active for PID",
];

/// What the sink says only where something was taken away from it: a gap that nobody made is a defect, however well it is healed.
pub const GAP: [&str; 5] = [
    "has lost the WAL",
    "its files were put back to an earlier state",
    "lost the progress key",
    "somebody changed the key",
    "do not fit together: ",
];

/// The first line that speaks of a gap.
pub fn gap(log: &str) -> Option<&str> {
    log.lines()
        .find(|line| GAP.iter().any(|sign| line.contains(sign)))
}

/// The warnings, errors and panics of a log that none of these phrases explains. `*` in a phrase is whatever stands there.
pub fn unexpected<'a>(log: &'a str, allowed: &[&str]) -> Vec<&'a str> {
    log.lines()
        .filter(|line| SIGNS.iter().any(|sign| line.contains(sign)))
        .filter(|line| {
            NEVER.iter().any(|sign| line.contains(sign)) || !allowed.iter().any(|phrase| says(line, phrase))
        })
        .collect()
}

/// Whether the pieces between the `*` of a phrase stand in a line, one after the other.
fn says(line: &str, phrase: &str) -> bool {
    let mut rest = Some(line);
    for piece in phrase.split('*') {
        rest = rest
            .and_then(|rest| rest.split_once(piece))
            .map(|(_, behind)| behind);
    }
    rest.is_some()
}

/// The line in which a word of a row stands, as text or as the numbers of its bytes, which is how they are printed with `{:?}`.
fn leak<'a>(text: &'a str, word: &str) -> Option<&'a str> {
    let numbers: Vec<String> = word.bytes().map(|byte| byte.to_string()).collect();
    let numbers = numbers.join(", ");
    text.lines()
        .find(|line| line.contains(word) || line.contains(&numbers))
}

/// INVARIANT I8: no value of a row, which has `word` in it, is in what somebody printed.
#[track_caller]
pub fn keeps_secret(whose: &str, text: &str, word: &str) {
    assert_eq!(leak(text, word), None, "a value of a row is in {whose}");
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The story: a line with an allowed word in it passed, whatever it said.
    #[test]
    fn a_panic_is_never_allowed() {
        for line in [
            "ERROR internal error: the thread apply panicked, and something broke",
            "2026-01-01T00:00:00Z ERROR internal error: the connection to Redis at redis://h broke: x",
            "thread 'apply' panicked at sink/src/x.rs: the stream ended",
        ] {
            let allowed = [&REDIS_AWAY[..], &POSTGRES_AWAY, &["broke", ""]].concat();
            assert_eq!(unexpected(line, &allowed), [line]);
        }
    }

    #[test]
    fn a_phrase_is_allowed_as_a_whole() {
        let lost = "00:00 WARN the connection to Redis at redis://127.0.0.1:1/0 broke: early eof";
        let other = "00:00 WARN the connection to Redis at redis://127.0.0.1:1/0 is of no use";
        let broke = "00:00 ERROR something broke: the connection to Redis at";
        let log = [lost, "00:00 INFO nothing", other, broke].join("\n");
        assert_eq!(unexpected(&log, &REDIS_AWAY), [other, broke]);
        assert_eq!(unexpected(&log, &[]), [lost, other, broke]);
    }

    #[test]
    fn a_gap_is_found() {
        let told = "00:00 WARN Redis and the slot do not fit together: the slot is gone";
        assert_eq!(gap(&["00:00 INFO streaming", told].join("\n")), Some(told));
        assert_eq!(gap("00:00 INFO streaming"), None);
    }

    #[test]
    fn a_word_is_found_as_text_and_as_bytes() {
        let bytes = format!("a value: {:?}", b"my canary!");
        let log = format!("fine\nof canary 1\n{bytes}");
        assert_eq!(leak(&log, "canary"), Some("of canary 1"));
        assert_eq!(leak(&bytes, "canary"), Some(bytes.as_str()));
        assert_eq!(leak("99, 97, 110\ncanar y", "canary"), None);
    }
}
