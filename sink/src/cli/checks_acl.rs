//! The check of `doctor` and `init` whether Redis lets this login do what the sink does. Asked for, not tried: nothing is changed.

use redis::Value;
use walmirror_proto::key::KeyTemplate;

use super::checks::Outcome;
use crate::config::SlotName;
use crate::plan::RedisKeys;
use crate::redis::{Connection, rights_command};

/// What is done to no key, and to how many arguments it matters not.
const PLAIN: [&[&str]; 7] = [
    &["MULTI"],
    &["EXEC"],
    &["DISCARD"],
    &["SCAN", "0"],
    &["DBSIZE"],
    &["SCRIPT", "LOAD", "x"],
    &["RANDOMKEY"],
];

/// What is done to a row's key.
const ROW: [&[&str]; 13] = [
    &["HSET", "", "f", "v"],
    &["HDEL", "", "f"],
    &["HGETALL", ""],
    &["SET", "", "v"],
    &["GET", ""],
    &["MSET", "", "v"],
    &["UNLINK", ""],
    &["TYPE", ""],
    &["RENAME", "", ""],
    &["PEXPIRE", "", "1"],
    &["PTTL", ""],
    &["WATCH", ""],
    &["EVALSHA", "x", "1", ""],
];

/// What is done to a hash of the sink's own.
const HASH: [&[&str]; 10] = [
    &["WATCH", ""],
    &["HSET", "", "f", "v"],
    &["HDEL", "", "f"],
    &["HGET", "", "f"],
    &["HMGET", "", "f"],
    &["HEXISTS", "", "f"],
    &["HGETALL", ""],
    &["HSCAN", "", "0"],
    &["HLEN", ""],
    &["EXISTS", ""],
];

/// What is done to the stream of rejected rows.
const STREAM: [&[&str]; 3] = [
    &["XADD", "", "*", "f", "v"],
    &["XLEN", ""],
    &["XREVRANGE", "", "+", "-"],
];

/// Asks for each command; ACL DRYRUN is there since Redis 7, and may itself not be allowed.
pub fn rights(connection: &mut Connection, slot: &SlotName, templates: &[String]) -> Outcome {
    let unknown = |why: String| Outcome::Note(format!("cannot be asked for: {why}"), None);
    let user = match connection.call("ask who this is", &[b"ACL", b"WHOAMI"]) {
        Ok(Value::BulkString(user)) => user,
        Ok(_) => return unknown("Redis does not say who this is".into()),
        Err(error) => return unknown(error.to_string()),
    };
    let mut refused: Vec<String> = Vec::new();
    for (command, key) in probes(slot, templates) {
        let mut args: Vec<&[u8]> = vec![b"ACL", b"DRYRUN", &user];
        args.extend(command.iter().map(|word| match *word {
            "" => key.as_slice(),
            word => word.as_bytes(),
        }));
        match connection.call("ask for a right", &args) {
            Ok(Value::Okay) => {}
            // Any other answer says what is missing.
            Ok(Value::BulkString(_) | Value::SimpleString(_)) => {
                let key = String::from_utf8_lossy(&key);
                let words: Vec<&str> = command.iter().copied().take(1).chain([key.as_ref()]).collect();
                refused.push(words.join(" ").trim_end().to_owned());
            }
            Ok(_) => return unknown("Redis' answer to ACL DRYRUN cannot be read".into()),
            Err(error) => return unknown(error.to_string()),
        }
    }
    let user = String::from_utf8_lossy(&user);
    if refused.is_empty() {
        return Outcome::Ok(format!("the user {user} may do what the sink does"));
    }
    Outcome::Fail(
        format!("the user {user} may not: {}", refused.join(", ")),
        rights_command(&user),
    )
}

/// Commands, an empty word where the key belongs, and the key.
fn probes(slot: &SlotName, templates: &[String]) -> Vec<(&'static [&'static str], Vec<u8>)> {
    let keys = RedisKeys::new(slot);
    let mut probes: Vec<(&[&str], Vec<u8>)> = Vec::new();
    let mut add = |commands: &[&'static [&'static str]], key: &[u8]| {
        probes.extend(commands.iter().map(|command| (*command, key.to_vec())));
    };
    add(&PLAIN, b"");
    for hash in [&keys.progress, &keys.relations, &keys.pending] {
        add(&HASH, hash);
    }
    add(&STREAM, &keys.rejected);
    for template in templates {
        let mut key = Vec::new();
        let sample = KeyTemplate::parse(template)
            .and_then(|template| template.render(|_, out| out.push(b'1'), &mut key));
        if sample.is_ok() {
            add(&ROW, &key);
        }
    }
    probes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_template_is_asked_for_with_a_key_of_its_own() {
        let templates = ["user:{id}".to_owned(), "{broken".into()];
        let probes = probes(&SlotName::default(), &templates);
        let keys: Vec<&[u8]> = probes.iter().map(|(_, key)| key.as_slice()).collect();
        assert_eq!(keys.iter().filter(|key| **key == b"user:1").count(), ROW.len());
        assert!(keys.contains(&b"walmirror:{walmirror}:progress".as_slice()));
        assert!(keys.iter().all(|key| !key.starts_with(b"{")));
    }
}
