//! Words of a command that is printed for a person to copy into a shell.

/// Stands for a user that is not known where a command is made: whoever prints it knows.
pub const THE_USER: &str = "<user>";

/// As it is where a shell leaves it alone, else in single quotes.
pub fn word(text: &str) -> String {
    // The asterisks of a hidden password have to be replaced anyway.
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_@%+=:,./-*".contains(&byte) || byte >= 0x80;
    if !text.is_empty() && text.bytes().all(is_plain) {
        text.to_owned()
    } else {
        single_quoted(text)
    }
}

/// In double quotes, or in single ones where a shell would read something into it.
pub fn double_quoted(text: &str) -> String {
    if text.contains(['"', '$', '`', '\\', '!']) {
        single_quoted(text)
    } else {
        format!("\"{text}\"")
    }
}

/// In single quotes.
pub fn single_quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_shell_would_read_into_a_word_is_quoted() {
        for (text, want) in [
            ("redis://:***@h:6379/1", "redis://:***@h:6379/1"),
            (
                "redis://h/0?protocol=resp3&x=1",
                "'redis://h/0?protocol=resp3&x=1'",
            ),
            ("my db", "'my db'"),
            ("", "''"),
            ("it's", r"'it'\''s'"),
        ] {
            assert_eq!(word(text), want);
        }
        assert_eq!(double_quoted("host=h dbname=d"), "\"host=h dbname=d\"");
        assert_eq!(double_quoted("dbname='my db'"), "\"dbname='my db'\"");
        assert_eq!(double_quoted("a'$b"), r"'a'\''$b'");
    }
}
