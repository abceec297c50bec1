//! The types of single options: each reads what a person writes, and says what would have been right.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use clap::ValueEnum;

/// A number of bytes: `65536`, `64KiB`, `256MiB`, `1GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub usize);

const BYTE_UNITS: [(&str, u32); 4] = [("gib", 30), ("mib", 20), ("kib", 10), ("b", 0)];

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let lower = text.trim().to_ascii_lowercase();
        let (digits, shift) = BYTE_UNITS
            .iter()
            .find_map(|(unit, shift)| lower.strip_suffix(unit).map(|digits| (digits, *shift)))
            .unwrap_or((&lower, 0));
        let count: usize = digits
            .trim()
            .parse()
            .map_err(|_| format!("{text:?} is no size: write bytes, or 64KiB, 256MiB, 1GiB"))?;
        count
            .checked_mul(1 << shift)
            .map(Self)
            .ok_or_else(|| format!("{text:?} is too large"))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, shift) in [("GiB", 30), ("MiB", 20), ("KiB", 10)] {
            if self.0 >= 1 << shift && self.0.trailing_zeros() >= shift {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

/// A length of time: `250ms`, `1s`, `5min`, `2h`, `1d`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

const TIME_UNITS: [(&str, u64); 6] = [
    ("ms", 1),
    ("min", 60_000),
    ("s", 1_000),
    ("m", 60_000),
    ("h", 3_600_000),
    ("d", 86_400_000),
];

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no time: write 250ms, 1s, 5min, 2h or 1d");
        let trimmed = text.trim();
        if trimmed == "0" {
            return Ok(Self(Duration::ZERO));
        }
        let (digits, factor_ms) = TIME_UNITS
            .iter()
            .find_map(|(unit, factor_ms)| trimmed.strip_suffix(unit).map(|digits| (digits, *factor_ms)))
            .ok_or_else(wrong)?;
        let count: u64 = digits.trim().parse().map_err(|_| wrong())?;
        count
            .checked_mul(factor_ms)
            .map(|time_ms| Self(Duration::from_millis(time_ms)))
            .ok_or_else(wrong)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time_ms = self.0.as_millis();
        for (unit, factor_ms) in [("d", 86_400_000), ("h", 3_600_000), ("min", 60_000), ("s", 1_000)] {
            if time_ms >= factor_ms && time_ms.is_multiple_of(factor_ms) {
                return write!(f, "{}{unit}", time_ms / factor_ms);
            }
        }
        write!(f, "{time_ms}ms")
    }
}

/// When a change counts as safe in Redis, so that the slot may be confirmed and Postgres may drop its WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// After it has been in Redis' memory for this long: `memory`, `memory=5s`.
    Memory {
        /// How far the confirmed position trails behind what is applied.
        window: Duration,
    },
    /// Once this many replicas of Redis have it: `replicas=1`.
    Replicas {
        /// How many.
        count: u32,
    },
    /// Once Redis has it in its append-only file on disk: `aof` (Redis 7.2 or later).
    Aof,
}

impl Durability {
    /// Redis' `appendfsync everysec` loses two seconds at worst.
    pub const MEMORY_WINDOW: Duration = Duration::from_secs(2);
}

impl FromStr for Durability {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no durability: write memory, memory=5s, replicas=1 or aof");
        match text.trim().split_once('=') {
            None if text.trim() == "memory" => Ok(Self::Memory {
                window: Self::MEMORY_WINDOW,
            }),
            None if text.trim() == "aof" => Ok(Self::Aof),
            Some(("memory", window)) => Ok(Self::Memory {
                window: window.parse::<Span>()?.0,
            }),
            Some(("replicas", count)) => match count.parse() {
                Ok(count) if count > 0 => Ok(Self::Replicas { count }),
                _ => Err(wrong()),
            },
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Durability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory { window } => write!(f, "memory={}", Span(*window)),
            Self::Replicas { count } => write!(f, "replicas={count}"),
            Self::Aof => f.write_str("aof"),
        }
    }
}

/// The name of a replication slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotName(String);

impl SlotName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for SlotName {
    fn default() -> Self {
        Self("walmirror".to_owned())
    }
}

impl FromStr for SlotName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let valid = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
        if (1..=63).contains(&text.len()) && text.bytes().all(valid) {
            Ok(Self(text.to_owned()))
        } else {
            Err(format!(
                "{text:?} is no slot name: Postgres allows a-z, 0-9 and _, at most 63 of them"
            ))
        }
    }
}

impl fmt::Display for SlotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::ops::Deref for SlotName {
    type Target = str;
    fn deref(&self) -> &str {
        &self.0
    }
}

/// Makes FromStr and Display out of the names that clap knows, so that file and flags take the same words.
macro_rules! words {
    ($type:ident) => {
        impl FromStr for $type {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                <Self as ValueEnum>::from_str(text, true).map_err(|_| {
                    let names: Vec<String> = Self::value_variants().iter().map(Self::to_string).collect();
                    format!("{text:?} is not one of {}", names.join(", "))
                })
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.to_possible_value()
                    .map_or(Ok(()), |value| f.write_str(value.get_name()))
            }
        }
    };
}

/// What to do when Redis and the slot do not fit together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum OnGap {
    /// Backfill every table online, and remove keys that have no row.
    #[default]
    Resync,
    /// Stop with exit code 6.
    Fail,
}
words!(OnGap);

/// Whether transactions larger than `logical_decoding_work_mem` are asked for while they are in progress.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Streaming {
    /// They come in parts and wait for their commit in files of the sink.
    #[default]
    On,
    /// They come when they have committed; until then Postgres keeps them in files of its own.
    Off,
}
words!(Streaming);

/// What to do about a row that cannot be mirrored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum OnBadRow {
    /// Go on without it: its key goes (one of another type stays), and is noted.
    #[default]
    Skip,
    /// Stop.
    Stop,
}
words!(OnBadRow);

/// The least severe log lines that are shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogLevel {
    /// Only what stops the sink.
    Error,
    /// And what heals by itself, or will hurt later.
    Warn,
    /// And what the sink does.
    #[default]
    Info,
    /// And notices of Postgres, batches, decisions.
    Debug,
    /// Everything.
    Trace,
}
words!(LogLevel);

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}
words!(LogFormat);

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_written_with_units() {
        assert_eq!("64KiB".parse(), Ok(ByteSize(65536)));
        assert_eq!("17".parse(), Ok(ByteSize(17)));
        assert_eq!("1 GiB".parse(), Ok(ByteSize(1 << 30)));
        assert!("12XB".parse::<ByteSize>().unwrap_err().contains("64KiB"));
        assert!("99999999999999999GiB".parse::<ByteSize>().is_err());
        assert_eq!("250ms".parse(), Ok(Span(Duration::from_millis(250))));
        assert_eq!("5min".parse(), Ok(Span(Duration::from_secs(300))));
        assert_eq!("0".parse(), Ok(Span(Duration::ZERO)));
        assert!("5 parsecs".parse::<Span>().unwrap_err().contains("250ms"));
        assert!("5".parse::<Span>().is_err());
    }

    #[test]
    fn what_is_displayed_can_be_read_again() {
        for size in [0, 1, 1023, 1024, 1536, 1 << 20, 3 << 30] {
            assert_eq!(ByteSize(size).to_string().parse(), Ok(ByteSize(size)));
        }
        for time_ms in [1, 999, 1000, 1500, 60_000, 3_600_000, 90_000] {
            let span = Span(Duration::from_millis(time_ms));
            assert_eq!(span.to_string().parse(), Ok(span));
        }
        for text in ["memory=2s", "replicas=2", "aof"] {
            assert_eq!(text.parse::<Durability>().unwrap().to_string(), text);
        }
        assert_eq!("resync".parse::<OnGap>().unwrap().to_string(), "resync");
        assert!("maybe".parse::<OnGap>().unwrap_err().contains("resync, fail"));
    }

    #[test]
    fn durability_says_what_would_have_been_right() {
        assert_eq!(
            "memory".parse(),
            Ok(Durability::Memory {
                window: Durability::MEMORY_WINDOW
            })
        );
        for wrong in [
            "disk",
            "replicas",
            "replicas=0",
            "replicas=x",
            "memory=",
            "aof=1",
            "",
        ] {
            assert!(wrong.parse::<Durability>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn slot_names_are_those_of_postgres() {
        assert!("walmirror_2".parse::<SlotName>().is_ok());
        for wrong in ["", "Upper", "with space", "semi;colon", &"x".repeat(64)] {
            assert!(wrong.parse::<SlotName>().is_err(), "{wrong}");
        }
    }
}
