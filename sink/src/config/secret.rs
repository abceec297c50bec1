//! Connection strings, with their passwords kept out of everything that is printed.

use std::fmt;
use std::str::FromStr;

use crate::shell::{THE_USER, word};

const MASK: &str = "***";

/// A libpq connection string. `Display` and `Debug` hide the passwords in it.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Conninfo(String);

impl Conninfo {
    /// The string itself, for libpq only.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl FromStr for Conninfo {
    type Err = std::convert::Infallible;

    /// Takes anything: libpq alone decides what a connection string is.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for Conninfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&redact_conninfo(&self.0))
    }
}

impl fmt::Debug for Conninfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.to_string())
    }
}

/// A Redis URL. `Display` and `Debug` hide the password in it.
#[derive(Clone, PartialEq, Eq)]
pub struct RedisUrl(String);

impl RedisUrl {
    /// The string itself, for the Redis client only.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl RedisUrl {
    /// The beginning of a redis-cli command for this server, without the password.
    pub fn redis_cli(&self) -> String {
        let socket = self
            .0
            .strip_prefix("redis+unix://")
            .or_else(|| self.0.strip_prefix("unix://"));
        match socket.map(|rest| rest.split('?').next().unwrap_or(rest)) {
            Some(path) => format!("redis-cli -s {}", word(path)),
            None => format!("redis-cli -u {}", word(&self.to_string())),
        }
    }

    /// A command that begins with `redis-cli` as one for this server. The login is left to whoever types it: what has to be
    /// done there is mostly not what the sink's own user may do. The user is filled in where the command is about it.
    pub fn complete(&self, command: &str) -> String {
        let info = redis::IntoConnectionInfo::into_connection_info(self.0.as_str());
        let Some((command, info)) = command.strip_prefix("redis-cli ").zip(info.ok()) else {
            return command.to_owned();
        };
        if command.starts_with('-') {
            return format!("redis-cli {command}");
        }
        let at = match info.addr() {
            redis::ConnectionAddr::Unix(path) => format!(" -s {}", word(&path.display().to_string())),
            redis::ConnectionAddr::TcpTls { host, port, .. } => {
                format!(" -h {} -p {port} --tls", word(host))
            }
            redis::ConnectionAddr::Tcp(host, port) => format!(" -h {} -p {port}", word(host)),
            _ => String::new(),
        };
        let settings = info.redis_settings();
        let database = match settings.db() {
            0 => String::new(),
            number => format!(" -n {number}"),
        };
        let user = word(settings.username().unwrap_or("default"));
        let command = command.replace(&word(THE_USER), &user);
        format!("redis-cli{at}{database} {command}")
    }

    /// Says what is wrong with the URL, without repeating it.
    ///
    /// Not part of reading it, because clap repeats a value that cannot be read, password and all.
    pub fn check(&self) -> Result<(), String> {
        const SCHEMES: [&str; 4] = ["redis", "rediss", "redis+unix", "unix"];
        let right = "write redis://host:6379/0, rediss://host:6379 for TLS, or redis+unix:///path/to/socket";
        let url = url::Url::parse(&self.0)
            .map_err(|error| format!("--redis is no Redis URL ({error}): {right}"))?;
        let scheme = url.scheme();
        if !SCHEMES.contains(&scheme) {
            return Err(format!("--redis is no Redis URL (scheme {scheme:?}): {right}"));
        }
        if !scheme.ends_with("unix") && url.host_str().is_none_or(str::is_empty) {
            return Err(format!("--redis is no Redis URL (it has no host): {right}"));
        }
        let database = url.path().trim_matches('/');
        if !scheme.ends_with("unix") && !database.is_empty() && database.parse::<u32>().is_err() {
            let why = "behind the host stands the number of the database, nothing else";
            return Err(format!("--redis is no Redis URL ({why}): {right}"));
        }
        redis::IntoConnectionInfo::into_connection_info(self.0.as_str())
            .map(drop)
            .map_err(|error| format!("--redis is no Redis URL ({}): {right}", error.category()))
    }
}

impl FromStr for RedisUrl {
    type Err = std::convert::Infallible;

    /// Takes anything: see [`RedisUrl::check`].
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&redact_uri(&self.0))
    }
}

impl fmt::Debug for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.to_string())
    }
}

/// Hides a secret in a text that another library made (an error message that repeats the connection string).
pub fn scrub(text: &str, secret_holder: &str) -> String {
    secrets_of(secret_holder)
        .iter()
        .fold(text.to_owned(), |text, secret| text.replace(secret, MASK))
}

/// The passwords in a connection string or URL, the longest first.
fn secrets_of(text: &str) -> Vec<String> {
    let mut secrets: Vec<String> = if is_uri(text) {
        uri_secrets(text)
            .into_iter()
            .filter_map(|(from, to)| text.get(from..to))
            .map(str::to_owned)
            .collect()
    } else {
        pairs(text)
            .into_iter()
            .filter(|pair| is_secret(pair.keyword))
            .filter_map(|pair| text.get(pair.from..pair.to))
            .map(|value| value.trim_matches('\'').to_owned())
            .collect()
    };
    // Hiding a very short one would hide half of every message and tell nothing.
    secrets.retain(|secret| secret.len() >= 3);
    secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
    secrets
}

fn redact_conninfo(text: &str) -> String {
    if is_uri(text) {
        return redact_uri(text);
    }
    let mut out = String::with_capacity(text.len());
    let mut copied = 0;
    for pair in pairs(text).iter().filter(|pair| is_secret(pair.keyword)) {
        out.push_str(text.get(copied..pair.from).unwrap_or_default());
        out.push_str(MASK);
        copied = pair.to;
    }
    out.push_str(text.get(copied..).unwrap_or_default());
    out
}

fn redact_uri(text: &str) -> String {
    let mut ranges = uri_secrets(text);
    ranges.sort_unstable();
    let mut out = String::with_capacity(text.len());
    let mut copied = 0;
    for (from, to) in ranges {
        // One that overlaps the one before makes it longer, and is no second one.
        if from >= copied {
            out.push_str(text.get(copied..from).unwrap_or_default());
            out.push_str(MASK);
        }
        copied = copied.max(to);
    }
    out.push_str(text.get(copied..).unwrap_or_default());
    out
}

/// Whether it begins with a scheme, be it a wrong one. A password may well have `://` in it.
fn is_uri(text: &str) -> bool {
    let is_in_scheme = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.');
    text.trim_start()
        .split_once("://")
        .is_some_and(|(scheme, _)| scheme.bytes().all(is_in_scheme))
}

fn is_secret(keyword: &str) -> bool {
    let keyword = keyword.to_ascii_lowercase();
    ["password", "secret", "token", "passphrase"]
        .iter()
        .any(|sign| keyword.contains(sign))
        || keyword == "pass"
}

/// The byte ranges of what may be the passwords in a URI: behind the user, and in the query. They may overlap.
///
/// For libpq the user ends at the first at-sign before a slash, whatever else stands before it, a question mark too; for a Redis URL
/// at the last one before any of `/?#`. People write all of these into passwords unescaped, so each at-sign may be the end.
fn uri_secrets(text: &str) -> Vec<(usize, usize)> {
    let mut ranges = Vec::new();
    let Some(start) = text.find("://").map(|at| at + 3) else {
        return ranges;
    };
    let positions = |sign: char| {
        text.match_indices(sign)
            .map(|(at, _)| at)
            .filter(|at| *at >= start)
    };
    if let Some(colon) = positions(':').next() {
        ranges.extend(positions('@').filter(|at| *at > colon).map(|at| (colon + 1, at)));
    }
    for from in positions('?').chain(positions('&')).map(|at| at + 1) {
        // The hash sign ends nothing for libpq.
        let rest = text.get(from..).unwrap_or_default();
        let pair = rest.split('&').next().unwrap_or(rest);
        // libpq decodes keywords, too: one with an escape may be any.
        if let Some((keyword, _)) = pair.split_once('=')
            && (is_secret(keyword) || keyword.contains('%'))
        {
            ranges.push((from + keyword.len() + 1, from + pair.len()));
        }
    }
    ranges
}

/// A `keyword=value` of a connection string; the range is that of the value, quotes included.
struct Pair<'a> {
    keyword: &'a str,
    from: usize,
    to: usize,
}

/// Cuts a connection string the way libpq does: spaces around `=`, quotes, backslashes.
fn pairs(text: &str) -> Vec<Pair<'_>> {
    let bytes = text.as_bytes();
    let at = |index: usize| bytes.get(index).copied();
    let space = |index: usize| at(index).is_some_and(|byte| byte.is_ascii_whitespace());
    let mut found = Vec::new();
    let mut index = 0;
    loop {
        while space(index) {
            index += 1;
        }
        let start = index;
        while at(index).is_some_and(|byte| byte != b'=') && !space(index) {
            index += 1;
        }
        let keyword = text.get(start..index).unwrap_or_default();
        while space(index) {
            index += 1;
        }
        match at(index) {
            None => return found,
            Some(b'=') => index += 1,
            // Not what libpq takes; go on with the next word.
            Some(_) => continue,
        }
        while space(index) {
            index += 1;
        }
        let from = index;
        let quoted = at(index) == Some(b'\'');
        index += usize::from(quoted);
        while let Some(byte) = at(index) {
            if byte == b'\\' {
                index += 1;
            } else if quoted && byte == b'\'' {
                index += 1;
                break;
            } else if !quoted && byte.is_ascii_whitespace() {
                break;
            }
            index += 1;
        }
        index = index.min(text.len());
        found.push(Pair {
            keyword,
            from,
            to: index,
        });
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shown(conninfo: &str) -> String {
        conninfo.parse::<Conninfo>().unwrap().to_string()
    }

    #[test]
    fn passwords_of_connection_strings_are_hidden() {
        for (given, want) in [
            ("host=a password=geheim dbname=b", "host=a password=*** dbname=b"),
            ("password = 'ge\\'h eim' user=x", "password = *** user=x"),
            ("password='unterminated secret", "password=***"),
            ("sslpassword=geheim host=a", "sslpassword=*** host=a"),
            (
                "postgresql://u:geheim@h/db?sslmode=require",
                "postgresql://u:***@h/db?sslmode=require",
            ),
            ("postgresql://u:ge/h@eim@h/db", "postgresql://u:***@h/db"),
            (
                "postgres://h/db?user=u&password=geheim&x=1",
                "postgres://h/db?user=u&password=***&x=1",
            ),
            ("postgresql://u:ge?heim@h/db", "postgresql://u:***@h/db"),
            ("postgresql://u:ge#heim@h/db", "postgresql://u:***@h/db"),
            ("postgresql://u:g@e?h=eim@h/db", "postgresql://u:***@h/db"),
            ("postgresql://u:ge?password=heim@h/db", "postgresql://u:***"),
            ("postgres://h:1/db?password=ge@h#eim&x=1", "postgres://h:***&x=1"),
            (
                "postgres://h/db?pass%77ord=geheim",
                "postgres://h/db?pass%77ord=***",
            ),
            ("postgres://u@h/db?user=a@b", "postgres://u@h/db?user=a@b"),
            ("service=prod", "service=prod"),
            ("mydb", "mydb"),
            ("", ""),
        ] {
            assert_eq!(shown(given), want);
        }
        // Found by fuzzing: this was taken for a URI, and shown.
        assert_eq!(
            shown("host=h password='a://b' dbname=d"),
            "host=h password=*** dbname=d"
        );
        assert_eq!(shown("password=x://y:z@w"), "password=***");
    }

    #[test]
    fn passwords_of_redis_urls_are_hidden_and_wrong_urls_explained() {
        let url: RedisUrl = "redis://:geheim@localhost:6379/1".parse().unwrap();
        assert_eq!(url.to_string(), "redis://:***@localhost:6379/1");
        assert!(!format!("{url:?}").contains("geheim"));
        assert_eq!(url.redis_cli(), "redis-cli -u redis://:***@localhost:6379/1");
        for secret in ["ge?heim", "ge#heim", "ge/heim", "ge@heim"] {
            let url: RedisUrl = format!("rediss://u:{secret}@h:6379/1").parse().unwrap();
            assert_eq!(url.to_string(), "rediss://u:***@h:6379/1", "{secret}");
        }
        let url: RedisUrl = "redis+unix:///tmp/x.sock?pass=geheim".parse().unwrap();
        assert_eq!(url.redis_cli(), "redis-cli -s /tmp/x.sock");
        assert_eq!(url.complete("redis-cli INFO"), "redis-cli -s /tmp/x.sock INFO");
        for wrong in [
            "localhost:6379",
            "http://localhost",
            "redis://",
            "not a url",
            "redis://h:99999",
        ] {
            let message = wrong.parse::<RedisUrl>().unwrap().check().unwrap_err();
            assert!(message.contains("redis://host:6379/0"), "{wrong}: {message}");
        }
        for wrong in ["redis//:geheim@h", "redis://:geheim@h:99999", "geheim"] {
            assert!(
                !wrong
                    .parse::<RedisUrl>()
                    .unwrap()
                    .check()
                    .unwrap_err()
                    .contains("geheim"),
                "{wrong}"
            );
        }
        for right in [
            "redis://h",
            "rediss://u:p@h:1/2",
            "redis+unix:///tmp/x.sock",
            "unix:///tmp/x.sock",
        ] {
            assert_eq!(right.parse::<RedisUrl>().unwrap().check(), Ok(()), "{right}");
        }
    }

    #[test]
    fn a_command_for_redis_cli_is_one_for_this_server() {
        for (url, command, want) in [
            ("redis://h", "redis-cli INFO", "redis-cli -h h -p 6379 INFO"),
            (
                "rediss://u:geheim@h:1/2",
                "redis-cli UNLINK 'a b'",
                "redis-cli -h h -p 1 --tls -n 2 UNLINK 'a b'",
            ),
            (
                "redis://a%20b:geheim@h",
                "redis-cli ACL SETUSER '<user>' '~*'",
                "redis-cli -h h -p 6379 ACL SETUSER 'a b' '~*'",
            ),
            (
                "redis://:geheim@h",
                "redis-cli ACL SETUSER '<user>'",
                "redis-cli -h h -p 6379 ACL SETUSER default",
            ),
            (
                "redis://h",
                "redis-cli -u redis://h PING",
                "redis-cli -u redis://h PING",
            ),
            ("redis://h", "walmirror doctor", "walmirror doctor"),
        ] {
            assert_eq!(url.parse::<RedisUrl>().unwrap().complete(command), want);
        }
    }

    #[test]
    fn messages_of_other_libraries_are_scrubbed() {
        assert_eq!(
            scrub("bad \"u:geheim@h\"", "postgresql://u:geheim@h"),
            "bad \"u:***@h\""
        );
        assert_eq!(scrub("near geheim", "host=x password='geheim'"), "near ***");
        assert_eq!(
            scrub("near ge?heim", "postgresql://u:ge?heim@h/db?user=a@b"),
            "near ***"
        );
    }

    proptest! {
        #[test]
        fn no_password_is_shown_whatever_surrounds_it(before in "[a-z= ']{0,12}", after in "[a-z=\\\\ ']{0,12}") {
            let _ = shown(&format!("{before}{after}"));
            let pairs = shown(&format!("host=x password=GEHEIM {after}"));
            prop_assert!(!pairs.contains("GEHEIM"));
            let uri = shown(&format!("postgresql://{}:GEHEIM@h/{after}", before.replace(' ', "")));
            prop_assert!(!uri.contains("GEHEIM"));
        }

        /// The story: a question mark in a password was taken for the beginning of the query, and the rest was logged.
        #[test]
        fn no_password_is_shown_whatever_is_in_it(begin in "[a-z=&?#@/:%]{0,6}", end in "[a-z=&?#@/:%]{0,6}", query in "(\\?[a-z=&@]{0,9})?") {
            for scheme in ["postgresql", "redis"] {
                let uri = shown(&format!("{scheme}://u:{begin}GEHEIM{end}@h/db{query}"));
                prop_assert!(!uri.contains("GEHEIM"), "{uri}");
            }
        }

        #[test]
        fn no_text_makes_it_panic(text in ".{0,40}") {
            let _ = shown(&text);
            let _ = scrub(&text, &text);
            let _ = text.parse::<RedisUrl>().unwrap().check();
        }
    }
}
