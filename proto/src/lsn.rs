//! A position in the WAL, printed and parsed as Postgres does (`16/B374D848`). Used wherever a position is stored in
//! Redis, given on the command line or compared.

use std::fmt;
use std::str::FromStr;

/// A byte position in the WAL (`pg_lsn`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    /// The position that no record has; Postgres' InvalidXLogRecPtr.
    pub const INVALID: Self = Self(0);
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl From<u64> for Lsn {
    fn from(position: u64) -> Self {
        Self(position)
    }
}

impl From<Lsn> for u64 {
    fn from(lsn: Lsn) -> Self {
        lsn.0
    }
}

/// Why a text is not an LSN.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not an LSN: expected two hexadecimal numbers of up to 8 digits, like 16/B374D848")]
pub struct ParseLsnError(String);

impl FromStr for Lsn {
    type Err = ParseLsnError;

    fn from_str(text: &str) -> Result<Self, ParseLsnError> {
        let half = |digits: &str| {
            // u32::from_str_radix would take a sign, which pg_lsn does not.
            let valid = (1..=8).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit());
            if valid {
                u32::from_str_radix(digits, 16).ok()
            } else {
                None
            }
        };
        let parse = || {
            let (high, low) = text.split_once('/')?;
            Some(Self(u64::from(half(high)?) << 32 | u64::from(half(low)?)))
        };
        parse().ok_or_else(|| ParseLsnError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn prints_and_parses_as_pg_lsn_does() {
        assert_eq!(Lsn(0x16_B374_D848).to_string(), "16/B374D848");
        assert_eq!("16/b374d848".parse(), Ok(Lsn(0x16_B374_D848)));
        assert_eq!(Lsn::INVALID.to_string(), "0/0");
        assert_eq!("0/00000001".parse(), Ok(Lsn(1)));
        assert_eq!("FFFFFFFF/FFFFFFFF".parse(), Ok(Lsn(u64::MAX)));
        assert!(Lsn(0xFFFF_FFFF) < Lsn(0x1_0000_0000));
    }

    #[test]
    fn refuses_what_pg_lsn_refuses() {
        for text in [
            "",
            "/",
            "1/",
            "/1",
            "16-B374D848",
            "1/123456789",
            "123456789/1",
            "+1/1",
            " 1/1",
            "1/1 ",
            "g/1",
            "1/1/1",
        ] {
            let error = text.parse::<Lsn>().unwrap_err();
            assert!(error.to_string().contains(&format!("\"{text}\"")), "{error}");
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_parses_back(position: u64) {
            prop_assert_eq!(Lsn(position).to_string().parse(), Ok(Lsn(position)));
        }

        #[test]
        fn no_text_panics(text: String) {
            let _ = text.parse::<Lsn>();
        }
    }
}
