//! Connection strings and Redis URLs: whatever stands in them and around them, the password is never shown, neither by the
//! string itself nor by what is said about a wrong one; and no text at all makes the masking panic.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../../sink/src/config/secret.rs"]
#[allow(dead_code, missing_docs)]
mod secret;
#[path = "../../../sink/src/shell.rs"]
#[allow(dead_code)]
mod shell;

/// In every password, so that it is known when it is shown. Long enough not to come by chance.
const CANARY: &str = "kAnArIeNvOgEl";

fuzz_target!(|input: (&str, &str, &str, u8)| {
    let (before, after, around, form) = input;
    // Any text at all.
    look(around);
    look(&format!("redis://{around}"));
    if around.contains(CANARY) {
        return;
    }
    let password = format!("{before}{CANARY}{after}");
    let text = match form % 4 {
        // As libpq reads it: quoted, or with its blanks and quotes escaped.
        0 => format!("host={} password={} dbname=x", quoted(around), quoted(&password)),
        1 => format!("user={}  password = {}", escaped(around), escaped(&password)),
        // As URLs hold it.
        2 => format!(
            "postgresql://{}:{}@host:5432/x?application_name={0}",
            percent(around),
            percent(&password)
        ),
        _ => format!("redis://{}:{}@host:6379/0", percent(around), percent(&password)),
    };
    // No password can hold a NUL, and a text that is escaped cannot be empty.
    if !text.contains('\0') {
        for shown in look(&text) {
            assert!(!shown.contains(CANARY), "{text:?} is shown as {shown:?}");
        }
    }
});

/// Everything that is printed of a connection string.
fn look(text: &str) -> Vec<String> {
    let conninfo: secret::Conninfo = text.parse().unwrap();
    let url: secret::RedisUrl = text.parse().unwrap();
    let mut shown = vec![
        conninfo.to_string(),
        format!("{conninfo:?}"),
        secret::scrub(&format!("cannot connect with {text}"), text),
    ];
    if text.starts_with("redis://") {
        shown.extend([url.to_string(), format!("{url:?}"), url.redis_cli()]);
        shown.extend(url.check().err());
    }
    shown
}

fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
}

fn escaped(value: &str) -> String {
    let mut out = String::from("x");
    for c in value.chars() {
        if c.is_whitespace() || matches!(c, '\'' | '\\') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

fn percent(value: &str) -> String {
    let mut out = String::new();
    for byte in value.bytes() {
        if byte.is_ascii_alphanumeric() {
            out.push(byte.into());
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}
