//! Values and names as text that stays on its line.

use std::io::Write;

/// Values longer than this are cut, unless they are asked for in full.
const VALUE_BYTES_MAX: usize = 120;

/// A value on one line: as it is where that is clear, quoted and escaped otherwise.
pub fn value(text: &[u8], full: bool, out: &mut Vec<u8>) {
    let whole = String::from_utf8_lossy(text);
    let end = whole
        .char_indices()
        .map(|(at, _)| at)
        .find(|at| *at >= VALUE_BYTES_MAX)
        .filter(|_| !full);
    let shown = end.and_then(|end| whole.get(..end)).unwrap_or(&whole);
    let plain = |character: char| {
        !character.is_whitespace() && !character.is_control() && !"'\"=\\()".contains(character)
    };
    if !shown.is_empty() && shown != "NULL" && shown.chars().all(plain) {
        out.extend_from_slice(shown.as_bytes());
    } else {
        out.push(b'\'');
        for character in shown.chars() {
            match character {
                '\'' => out.extend_from_slice(b"''"),
                '"' => out.push(b'"'),
                _ => {
                    let _ = write!(out, "{}", character.escape_debug());
                }
            }
        }
        out.push(b'\'');
    }
    if end.is_some() {
        let _ = write!(out, "…({} bytes)", text.len());
    }
}

/// A name as SQL would need it.
pub fn identifier(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    if !name.is_empty() && name.bytes().all(plain) {
        name.to_owned()
    } else {
        format!("\"{}\"", name.replace('"', "\"\"").escape_debug())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn no_value_breaks_its_line() {
        let mut out = Vec::new();
        for text in [
            "",
            "NULL",
            "a b",
            "it's",
            "a=b",
            "line\nbreak",
            "\x1b[31m",
            "\\x00ff",
            "ä",
        ] {
            value(text.as_bytes(), false, &mut out);
            out.push(b' ');
        }
        let text = String::from_utf8(out).unwrap();
        assert_eq!(
            text,
            "'' 'NULL' 'a b' 'it''s' 'a=b' 'line\\nbreak' '\\u{1b}[31m' '\\\\x00ff' ä "
        );
    }
}
