//! Keys as people are shown them: one may be of many megabytes, and neither a log nor a list is to hold it whole.

/// So much of a key stands in a line of the log, or in a message.
const LINE_BYTES: usize = 200;
/// So much of it is kept where a program may read it: keys that people make are shorter, and a thousand such notes take a megabyte.
const NOTE_BYTES: usize = 1024;

/// For a line. A longer one is cut, and says how long it is.
pub fn key(key: &[u8]) -> String {
    String::from_utf8_lossy(&cut(key, LINE_BYTES)).into_owned()
}

/// For a note.
pub fn noted_key(key: &[u8]) -> Vec<u8> {
    cut(key, NOTE_BYTES)
}

fn cut(key: &[u8], most: usize) -> Vec<u8> {
    let Some(start) = key.get(..most).filter(|_| key.len() > most) else {
        return key.to_vec();
    };
    // A character is left out whole, if its beginning is one of the last bytes.
    let is_continued = key.get(most).is_some_and(|byte| is_continuation(*byte));
    let begins = start.iter().rposition(|byte| !is_continuation(*byte));
    let start = match begins {
        Some(begins) if is_continued && most - begins < 4 => start.get(..begins).unwrap_or(start),
        _ => start,
    };
    [start, format!("… ({} bytes)", key.len()).as_bytes()].concat()
}

/// Of a character in UTF-8 it is not the first byte.
fn is_continuation(byte: u8) -> bool {
    byte & 0b1100_0000 == 0b1000_0000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_key_is_cut_and_says_how_long_it_is() {
        assert_eq!(key(b"t:1"), "t:1");
        let fits = "x".repeat(LINE_BYTES);
        assert_eq!(key(fits.as_bytes()), fits);
        let long = "x".repeat(8 << 20);
        assert_eq!(key(long.as_bytes()), format!("{fits}… (8388608 bytes)"));
        assert!(noted_key(long.as_bytes()).len() < NOTE_BYTES + 30);
        // Nothing of a character, and what is no text byte for byte.
        for before in 0..4 {
            let long = format!("{}{}", "x".repeat(LINE_BYTES - before), "😀".repeat(99));
            let shown = key(long.as_bytes());
            assert!(
                shown.starts_with(&format!("{}… (", "x".repeat(LINE_BYTES - before))),
                "{shown}"
            );
        }
        let bytes = [0x80; 2 * NOTE_BYTES];
        assert!(noted_key(&bytes).starts_with(&bytes[..NOTE_BYTES]));
    }
}
