//! Settles pairs of row and key that did not look equal: were they read while a change was between them, or do they differ?
//!
//! **The proof of a difference.** A round goes like this:
//!
//! 1. Redis watches the key; its value *v* is read. Redis is at some position P0 then.
//! 2. Every transaction that runs now is waited for, so that snapshots see whatever Redis may hold (all up to P0).
//! 3. The row is read: *r*, as its last visible change *c* left it. A change that is not visible committed behind P0.
//! 4. The stream is waited for until Redis has passed a position P1 behind everything visible, *c* included.
//! 5. If Redis says that the key was not touched since 1, it held *v* from P0 to P1. At the larger of P0 and *c*, which lies
//!    between, it had to hold *r*: no other change of the row lies between *c* and there. So *v* ≠ *r* is a true difference.
//!
//! No change on its way can look like one, whatever it does and undoes, and a difference that stays is always found.
//!
//! A key that changes all the time never passes step 5. It is compared often instead, with the row as it was at the last few
//! looks, because the key trails behind the row.

use std::collections::HashMap;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::Finding;
use super::content::{Content, compare};
use super::sides::{Origin, Sides};
use super::table::Table;
use crate::error::Error;
use crate::plan::is_text;

/// Keys that are settled in one round.
const GROUP: usize = 500;
/// Looks at a group before anything is proven: nearly all changes have arrived by the second.
const LOOKS: usize = 2;
/// Looks at keys that change all the time before they are taken for quiet again.
const LOOKS_MOVING: usize = 50;
/// Between two looks.
const PAUSE: Duration = Duration::from_micros(500);
/// States of a row that are remembered.
const SEEN: usize = 16;

struct Candidate {
    key: Vec<u8>,
    /// What the row was at the last few looks.
    seen: VecDeque<Content>,
    /// What was proven, while the key waits to be read again by the sink.
    proven: Option<Finding>,
}

impl Candidate {
    fn see(&mut self, expected: Content) {
        if self.seen.back() != Some(&expected) {
            self.seen.push_back(expected);
        }
        if self.seen.len() > SEEN {
            self.seen.pop_front();
        }
    }

    fn agrees(&self, found: Content, may_be_absent: bool) -> bool {
        let mut seen = self.seen.iter();
        seen.any(|expected| compare(*expected, found, may_be_absent) == Finding::Equal)
    }
}

/// How each of the keys compares with its row. Equal ones are left out.
pub(super) fn settle(
    sides: &mut Sides,
    table: &Table,
    keys: Vec<Vec<u8>>,
    origin: Origin,
) -> Result<Vec<(Vec<u8>, Finding)>, Error> {
    let new = |key| Candidate {
        key,
        seen: VecDeque::new(),
        proven: None,
    };
    let mut fresh: VecDeque<Candidate> = keys.into_iter().map(new).collect();
    let mut quiet: Vec<Candidate> = Vec::new();
    let mut moving: Vec<Candidate> = Vec::new();
    let mut findings = Vec::new();
    let mut size = GROUP;
    let mut until = Instant::now() + sides.timeout;
    while !(fresh.is_empty() && quiet.is_empty() && moving.is_empty()) {
        if Instant::now() >= until {
            let rest = fresh.into_iter().chain(quiet).chain(moving);
            findings.extend(rest.map(|left| (left.key, left.proven.unwrap_or(Finding::Unknown))));
            break;
        }
        let before = fresh.len() + quiet.len() + moving.len();
        if quiet.is_empty() && fresh.is_empty() {
            quiet = look(sides, table, std::mem::take(&mut moving), LOOKS_MOVING, origin)?;
        } else if quiet.is_empty() {
            let group = fresh.drain(..GROUP.min(fresh.len())).collect();
            quiet = look(sides, table, group, LOOKS, origin)?;
        }
        let rest = quiet.split_off(size.min(quiet.len()));
        let group = std::mem::replace(&mut quiet, rest);
        if group.is_empty() {
            until = Instant::now() + sides.timeout;
            continue;
        }
        let round = prove(sides, table, group, origin)?;
        size = if round.touched {
            (size / 2).max(1)
        } else {
            (size * 2).min(GROUP)
        };
        quiet.extend(round.quiet);
        moving.extend(round.moving);
        let (waiting, certain) = noted(sides, round.proven)?;
        if !waiting.is_empty() {
            moving.extend(waiting);
            sides.sleep(Duration::from_millis(20))?;
        }
        findings.extend(certain);
        if fresh.len() + quiet.len() + moving.len() < before {
            until = Instant::now() + sides.timeout;
        }
    }
    findings.retain(|(_, finding)| *finding != Finding::Equal);
    Ok(findings)
}

/// Compares so many times; what remains has never agreed.
fn look(
    sides: &mut Sides,
    table: &Table,
    mut group: Vec<Candidate>,
    looks: usize,
    origin: Origin,
) -> Result<Vec<Candidate>, Error> {
    for number in 0..looks {
        if number > 0 {
            sides.sleep(PAUSE)?;
        }
        see_rows(sides, table, &mut group, origin)?;
        let found = sides.read(table, group.iter().map(|one| one.key.as_slice()))?;
        let mut found = found.into_iter();
        group.retain(|one| {
            found
                .next()
                .is_none_or(|found| !one.agrees(found, table.may_be_absent()))
        });
        if group.is_empty() {
            break;
        }
    }
    Ok(group)
}

/// Reads the rows of the keys, each in a snapshot of now.
fn see_rows(sides: &mut Sides, table: &Table, group: &mut [Candidate], origin: Origin) -> Result<(), Error> {
    let mut parsed = Vec::with_capacity(group.len());
    for one in group.iter() {
        let values = table.mapping.template.match_key(&one.key);
        match values.filter(|values| is_text(values, sides.sql.any_bytes)) {
            Some(values) => parsed.push((one.key.clone(), values)),
            // A row had it, so that it can be found, though not by values.
            None if origin == Origin::Rows => parsed.push((one.key.clone(), Vec::new())),
            None => {}
        }
    }
    let rows = if parsed.is_empty() {
        Vec::new()
    } else {
        sides.rows(table, parsed, origin)?
    };
    let rows: HashMap<Vec<u8>, Content> = rows.into_iter().collect();
    for one in group {
        // What no row can be the key of has no row.
        one.see(rows.get(&one.key).copied().unwrap_or(Content::Absent));
    }
    Ok(())
}

/// What a round brought.
#[derive(Default)]
struct Round {
    proven: Vec<(Candidate, Finding)>,
    /// Not touched themselves, but others of the round were.
    quiet: Vec<Candidate>,
    moving: Vec<Candidate>,
    touched: bool,
}

/// One round of the proof for a group of keys.
fn prove(
    sides: &mut Sides,
    table: &Table,
    mut group: Vec<Candidate>,
    origin: Origin,
) -> Result<Round, Error> {
    let may_be_absent = table.may_be_absent();
    sides.watch(group.iter().map(|one| one.key.as_slice()))?;
    let first = sides.read(table, group.iter().map(|one| one.key.as_slice()))?;
    if !sides.outlast()? {
        sides.unwatch()?;
        return Ok(Round {
            moving: group,
            ..Round::default()
        });
    }
    see_rows(sides, table, &mut group, origin)?;
    let mut pairs: Vec<(Candidate, Content)> = group.into_iter().zip(first).collect();
    pairs.retain(|(one, found)| !one.agrees(*found, may_be_absent));
    if pairs.is_empty() {
        sides.unwatch()?;
        return Ok(Round::default());
    }
    sides.reach()?;
    if sides.are_untouched()? {
        let proven = pairs.into_iter().map(|(one, found)| {
            let expected = one.seen.back().copied().unwrap_or(Content::Absent);
            let finding = compare(expected, found, may_be_absent);
            (one, finding)
        });
        return Ok(Round {
            proven: proven.collect(),
            ..Round::default()
        });
    }
    let found = sides.read(table, pairs.iter().map(|(one, _)| one.key.as_slice()))?;
    let mut round = Round {
        touched: true,
        ..Round::default()
    };
    for ((one, before), found) in pairs.into_iter().zip(found) {
        if one.agrees(found, may_be_absent) {
            continue;
        }
        if before == found {
            round.quiet.push(one);
        } else {
            round.moving.push(one);
        }
    }
    Ok(round)
}

/// Those of the differences that the sink knows of and is about to mend, and those that stand.
type Noted = (Vec<Candidate>, Vec<(Vec<u8>, Finding)>);

fn noted(sides: &mut Sides, proven: Vec<(Candidate, Finding)>) -> Result<Noted, Error> {
    let keys: Vec<Vec<u8>> = proven.iter().map(|(one, _)| one.key.clone()).collect();
    let pending = sides.pending(&keys)?;
    let (mut waiting, mut certain) = (Vec::new(), Vec::new());
    for ((mut one, finding), is_pending) in proven.into_iter().zip(pending) {
        if is_pending && finding.is_difference() {
            one.proven = Some(finding);
            waiting.push(one);
        } else {
            certain.push((one.key, finding));
        }
    }
    Ok((waiting, certain))
}
