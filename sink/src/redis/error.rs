//! What can be done about an error reply or a failure of the client: the one place where Redis' error codes are classed.

use std::time::Duration;

use redis::{ErrorKind, RedisError, ServerError};

use super::connection::REPLY_TIMEOUT;
use crate::error::{Class, Error};
use crate::shell::{THE_USER, word};
use crate::shown;

/// The class of an error reply.
pub fn class_of(code: &str, detail: Option<&str>) -> Class {
    match code {
        // The server is starting, full, failing over, or busy with a script: it heals, or somebody is on it. Dropping the
        // batch or stopping would only make it worse.
        "LOADING" | "OOM" | "READONLY" | "MISCONF" | "CLUSTERDOWN" | "TRYAGAIN" | "BUSY" | "MASTERDOWN"
        | "NOREPLICAS" | "UNKILLABLE" | "UNBLOCKED" => Class::Retry,
        // Somebody flushed the scripts, so a purge is refused (patches bring theirs): the next session loads them again.
        "NOSCRIPT" => Class::Retry,
        "NOAUTH" | "WRONGPASS" | "NOPERM" => Class::Access,
        "WRONGTYPE" | "DENIED" | "MOVED" | "ASK" | "CROSSSLOT" => Class::Operator,
        _ if detail.is_some_and(|text| text.contains("max number of clients")) => Class::Retry,
        // WAIT and WAITAOF say READONLY in words of their own: the master was made a replica.
        _ if detail.is_some_and(|text| text.contains("cannot be used with replica instances")) => {
            Class::Retry
        }
        // Somebody has followed the advice that stands with BUSY; or, before Redis 7, there was no room any more inside of a script. What it
        // was to do is noted, and done by the next session.
        _ if detail.is_some_and(|text| {
            [
                "Script killed by user",
                "-OOM ",
                "-READONLY ",
                "-MISCONF ",
                "-NOREPLICAS ",
            ]
            .iter()
            .any(|sign| text.contains(sign))
        }) =>
        {
            Class::Retry
        }
        _ if detail.is_some_and(is_of_a_proxy) => Class::Retry,
        _ if detail.is_some_and(|text| ["AUTH", "password"].iter().any(|word| text.contains(word))) => {
            Class::Access
        }
        _ if detail.is_some_and(|text| {
            // The third is of a script that calls what has another name here.
            [
                "DB index",
                "unknown command",
                "command called from script",
                "appendonly is disabled",
            ]
            .iter()
            .any(|word| text.contains(word))
        }) =>
        {
            Class::Operator
        }
        _ => Class::Bug,
    }
}

/// Whether the words are those of something between the sink and Redis, which has no answer of it: as if the connection broke.
/// Envoy and twemproxy speak like that. Any other ERR is about the command itself, and the same whenever it is sent.
fn is_of_a_proxy(text: &str) -> bool {
    let text = text.to_ascii_lowercase();
    [
        "upstream",
        "timed out",
        "connection refused",
        "connection reset",
        "server closed connection",
        "unavailable",
    ]
    .iter()
    .any(|word| text.contains(word))
}

/// The next command for an error reply that the operator has to deal with.
fn next_command(code: &str) -> Option<String> {
    let command = match code {
        "NOAUTH" => Some("walmirror run --redis redis://user:password@host:6379/0 …"),
        "WRONGPASS" => Some("redis-cli ACL WHOAMI   # with the user and password of --redis"),
        "NOPERM" => {
            return Some(rights_command(THE_USER));
        }
        "WRONGTYPE" => Some(
            "walmirror status   # a key of a mirrored row, or of the sink's own, is of another type: who writes it?",
        ),
        "MOVED" | "ASK" | "CROSSSLOT" => {
            Some("redis-cli INFO cluster   # a Redis Cluster is not supported yet: give a single Redis")
        }
        "BUSY" => Some("redis-cli SCRIPT KILL   # a script runs for longer than busy-reply-threshold"),
        "LOADING" => Some("redis-cli INFO persistence   # loading_eta_seconds: until it has read its file"),
        "DENIED" => Some("redis-cli CONFIG GET protected-mode"),
        _ => None,
    };
    command.map(str::to_owned)
}

/// What gives a user the rights that the sink uses, and `doctor`, which reads INFO and settings.
pub fn rights_command(user: &str) -> String {
    let user = word(user);
    format!(
        "redis-cli ACL SETUSER {user} '~*' +@read +@write +@transaction +@scripting +@connection +select +wait +info '+config|get'"
    )
}

/// An error reply as an error of the sink. The detail is Redis' own text, without the values that it may repeat.
pub fn reply_error(what: impl Into<String>, reply: &ServerError) -> Error {
    let (code, detail) = cause(reply);
    let text = match detail {
        Some(detail) => format!("{code} {detail}"),
        None => code.to_owned(),
    };
    let error = Error::redis(what, class_of(code, detail), text);
    match next_command(code) {
        Some(command) => error.next(command),
        None => error,
    }
}

/// The same for a key of a row.
pub(super) fn row_error(what: impl Into<String>, reply: &ServerError, key: &[u8]) -> Error {
    let error = reply_error(what, reply);
    let shown = shown::key(key);
    // One that is too long to be shown is too long to be typed.
    if reply.code() != "WRONGTYPE" || key != shown.as_bytes() {
        return error;
    }
    let key = word(&shown);
    error.next_instead(format!(
        "redis-cli TYPE {key}   # who writes it? When walmirror is started again, it replaces it with the row"
    ))
}

/// The same for a key of the sink's own, which somebody else has put there.
pub(super) fn wrong_type(what: impl Into<String>, reply: &ServerError, key: &[u8]) -> Error {
    let text = reply.details().unwrap_or_default();
    let key = word(&String::from_utf8_lossy(key));
    Error::redis(
        what,
        class_of(reply.code(), Some(text)),
        format!("{} {text}", reply.code()),
    )
    .next(format!(
        "redis-cli TYPE {key}   # if nobody needs it: UNLINK {key}, then start walmirror again"
    ))
}

/// An answer that is none to this command: something on the way is not as it was sent. What was applied is in the progress, and a
/// new connection reads on from there.
pub fn unreadable(command: &str) -> Error {
    let text = "it is of another kind: bytes were lost or changed on the way, or it is no Redis that answers";
    Error::redis(
        format!("Redis' answer to {command} cannot be read"),
        Class::Retry,
        text,
    )
}

/// Code and detail. Where an EXEC is refused itself, because something changed since its commands were queued, the reason stands in
/// the detail (`execCommandAbort`).
fn cause(reply: &ServerError) -> (&str, Option<&str>) {
    let nested = reply
        .details()
        .filter(|_| reply.code() == "EXECABORT")
        .and_then(|detail| detail.split_once("because of: "))
        .map(|(_, reason)| reason.strip_prefix('-').unwrap_or(reason));
    let (code, detail) = match nested.map(|reason| reason.split_once(' ').unwrap_or((reason, ""))) {
        Some((code, detail)) => (code, Some(detail)),
        None => (reply.code(), reply.details()),
    };
    // Of a script that calls what the login may not, Redis before 7.2 says so in words alone.
    let is_of_rights = |text: &str| text.contains("The user executing the script can't");
    let code = if detail.is_some_and(is_of_rights) {
        "NOPERM"
    } else {
        code
    };
    (code, detail.map(without_arguments))
}

/// INVARIANT I8: of a command that it does not know, as where it was renamed, Redis repeats the arguments, which are values of a row or
/// a password.
fn without_arguments(text: &str) -> &str {
    text.split_once(", with args beginning with")
        .map_or(text, |(before, _)| before)
}

/// A failure of the client: no connection, a broken one, a server that refused the greeting, which has so long to be answered.
pub(super) fn client_error(
    what: impl Into<String>,
    error: RedisError,
    secret_holder: &str,
    greeting: Option<Duration>,
) -> Error {
    let code = error.code().unwrap_or_default().to_owned();
    let class = match error.kind() {
        ErrorKind::AuthenticationFailed => Class::Access,
        ErrorKind::InvalidClientConfig => Class::Operator,
        ErrorKind::Server(_) | ErrorKind::Extension => class_of(&code, error.detail()),
        ErrorKind::UnexpectedReturnType => Class::Bug,
        // A connection that broke, was refused or timed out, or on which bytes came that Redis never sends: what was
        // applied is in the progress, and a new connection reads on from there.
        _ => Class::Retry,
    };
    // A greeting that fails hides its code in the text. INVARIANT I8: the parser quotes what it stumbled over.
    let text = if error.kind() == ErrorKind::Parse {
        "the answer is not in Redis' protocol".to_owned()
    } else if error.is_timeout() {
        // What the system says of it is "Resource temporarily unavailable".
        let patience = greeting.unwrap_or(REPLY_TIMEOUT);
        format!("no answer within {} s", patience.as_secs())
    } else {
        crate::config::scrub(without_arguments(&error.to_string()), secret_holder)
    };
    let hidden = ["NOAUTH", "WRONGPASS", "NOPERM", "LOADING", "DENIED"]
        .into_iter()
        .find(|code| text.contains(code))
        // Of a refused SELECT the client keeps the words alone.
        .or_else(|| text.contains("has no permissions").then_some("NOPERM"));
    let class = hidden.map_or(class, |code| class_of(code, None));
    if text.contains("invalid peer certificate") {
        // It does not mend itself, so it is told as a refused login is.
        return Error::redis(what, Class::Access, text).next(
            "openssl s_client -connect <host>:<port> -showcerts   # what the server shows; SSL_CERT_FILE names whom to trust",
        );
    }
    // A Redis without TLS waits for the end of what it takes for a command, or closes the connection.
    let is_about_tls = error.is_timeout() || text.contains("corrupt message") || text.contains("handshake");
    let text = if greeting.is_some() && secret_holder.starts_with("rediss:") && is_about_tls {
        format!("{text}; rediss:// is TLS: is this a port for TLS?")
    } else {
        text
    };
    let wrapped = Error::redis(what, class, text);
    let code = if class == Class::Access {
        "WRONGPASS"
    } else {
        &code
    };
    match next_command(hidden.unwrap_or(code)) {
        Some(command) if class != Class::Retry => wrapped.next(command),
        _ => wrapped,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The story: a Redis that hangs was told as "Resource temporarily unavailable", with the advice to check the password.
    #[test]
    fn silence_is_told_with_its_length_and_tls_on_a_plain_port_is_asked_about() {
        let silent = || RedisError::from(std::io::Error::from(std::io::ErrorKind::WouldBlock));
        let seconds = Some(Duration::from_secs(5));
        let error = client_error("cannot connect", silent(), "redis://h", seconds);
        assert_eq!(error.to_string(), "cannot connect: no answer within 5 s");
        assert_eq!((error.class(), error.next_command()), (Class::Retry, None));
        let error = client_error("cannot connect", silent(), "rediss://h", seconds);
        assert!(error.to_string().contains("is this a port for TLS?"), "{error}");
        let error = client_error("it broke", silent(), "rediss://h", None);
        assert_eq!(error.to_string(), "it broke: no answer within 15 s");
    }

    /// The story: on a Redis whose HSET was renamed, the log had the first values of a row.
    #[test]
    #[allow(clippy::panic)]
    fn the_arguments_of_an_unknown_command_are_not_repeated() {
        let text = "ERR unknown command 'HSET', with args beginning with: 'item:1' 'note' 'my value' ";
        let replies = [
            format!("-{text}\r\n"),
            format!("-EXECABORT Transaction discarded because of: {text}\r\n"),
        ];
        for reply in replies {
            let Ok(redis::Value::ServerError(reply)) = redis::parse_redis_value(reply.as_bytes()) else {
                panic!("{reply}");
            };
            let error = reply_error("Redis refuses HSET", &reply);
            assert_eq!(
                error.to_string(),
                "Redis refuses HSET: ERR unknown command 'HSET'"
            );
            assert_eq!(error.class(), Class::Operator);
            let error = client_error("cannot connect", reply.into(), "redis://h", None);
            assert!(!error.to_string().contains("my value"), "{error}");
        }
    }

    #[test]
    fn errors_that_heal_are_retried() {
        for code in [
            "LOADING",
            "OOM",
            "READONLY",
            "MISCONF",
            "CLUSTERDOWN",
            "TRYAGAIN",
            "BUSY",
            "MASTERDOWN",
            "NOREPLICAS",
            "NOSCRIPT",
        ] {
            assert_eq!(class_of(code, Some("x")), Class::Retry, "{code}");
        }
        for code in ["WRONGTYPE", "CROSSSLOT", "MOVED", "ASK", "DENIED"] {
            assert_eq!(class_of(code, Some("x")), Class::Operator, "{code}");
        }
        for code in ["NOAUTH", "WRONGPASS", "NOPERM"] {
            assert_eq!(class_of(code, Some("x")), Class::Access, "{code}");
        }
        assert_eq!(
            class_of("ERR", Some("Script killed by user with SCRIPT KILL.")),
            Class::Retry
        );
        assert_eq!(
            class_of(
                "ERR",
                Some("Error running script (call to f_1): @user_script:9: -OOM command not allowed")
            ),
            Class::Retry
        );
        assert_eq!(
            class_of("ERR", Some("max number of clients reached")),
            Class::Retry
        );
        for text in [
            "wrong number of arguments for 'hset' command",
            "syntax error",
            "MULTI calls can not be nested",
        ] {
            assert_eq!(class_of("ERR", Some(text)), Class::Bug, "{text}");
        }
        for text in [
            "DB index is out of range",
            "Unknown Redis command called from script script: f, on @user_script:15.",
        ] {
            assert_eq!(class_of("ERR", Some(text)), Class::Operator, "{text}");
        }
    }

    /// A master that was made a replica ended the sink for good where `--durability` asks for WAIT, because that is told as no other
    /// command tells it.
    #[test]
    fn a_master_that_became_a_replica_is_waited_for() {
        for command in ["WAIT", "WAITAOF"] {
            let text = format!(
                "{command} cannot be used with replica instances. Please also note that writes to replicas are just local \
                 and are not propagated."
            );
            assert_eq!(class_of("ERR", Some(&text)), Class::Retry, "{command}");
        }
    }

    #[test]
    fn what_a_proxy_says_is_as_a_broken_connection() {
        for text in [
            "upstream failure",
            "no upstream host",
            "Connection timed out",
            "Connection refused",
            "server closed connection",
        ] {
            assert_eq!(class_of("ERR", Some(text)), Class::Retry, "{text}");
        }
    }
}
