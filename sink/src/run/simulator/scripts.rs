//! The scripts of `plan/scripts.rs` once more, in Rust. That the real ones do the same is what `plan/model.rs` tests against
//! a real Redis.

use redis::Value;

use super::redis::{Broken, Redis, Stored, error};
use crate::plan::{PENDING_REPLY, Script};

pub(super) fn load(source: &[u8]) -> Value {
    let number = Script::ALL
        .iter()
        .position(|known| known.source().as_bytes() == source);
    number.map_or(Value::Nil, |number| {
        Value::BulkString(number.to_string().into_bytes())
    })
}

/// `args`: number of keys, keys, arguments.
pub(super) fn run(redis: &mut Redis, script: &[u8], args: &[&[u8]]) -> Value {
    let number: Option<usize> = std::str::from_utf8(script)
        .ok()
        .and_then(|text| text.parse().ok());
    let Some(script) = number.and_then(|number| Script::ALL.get(number)) else {
        return error("NOSCRIPT No matching script. Please use EVAL.");
    };
    let count: usize = String::from_utf8_lossy(args[0]).parse().unwrap();
    let (keys, argv) = args[1..].split_at(count);
    let is_hash = |stored: &Stored| matches!(stored, Stored::Hash(_));
    let is_text = |stored: &Stored| matches!(stored, Stored::Text(_));
    match script {
        Script::PatchHash => patch(redis, keys, argv, is_hash, |stored, rest| {
            let Stored::Hash(fields) = stored else { return None };
            let sets = String::from_utf8_lossy(rest[0]).parse::<usize>().unwrap() * 2;
            for pair in rest[1..1 + sets].chunks(2) {
                fields.insert(pair[0].to_vec(), pair[1].to_vec());
            }
            rest[1 + sets..].iter().for_each(|name| _ = fields.remove(*name));
            Some(())
        }),
        Script::PatchString => patch(redis, keys, argv, is_text, |stored, _| {
            matches!(stored, Stored::Text(_)).then_some(())
        }),
        Script::PatchJson => patch(redis, keys, argv, is_text, |stored, rest| {
            let Stored::Text(text) = stored else { return None };
            let object: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(text).ok()?;
            let members: Option<Vec<String>> = rest
                .chunks(2)
                .map(|member| {
                    let name = String::from_utf8_lossy(member[0]).into_owned();
                    let value = match member[1] {
                        b"" => object.get(name.trim_matches('"'))?.to_string(),
                        value => String::from_utf8_lossy(value).into_owned(),
                    };
                    Some(format!("{name}: {value}"))
                })
                .collect();
            *text = format!("{{{}}}", members?.join(", ")).into_bytes();
            Some(())
        }),
        Script::Purge => {
            let epoch = redis
                .hash(keys[0])
                .and_then(|fields| fields.get(b"epoch".as_slice()));
            if epoch.map(Vec::as_slice) != Some(argv[0]) && redis.broken != Broken::PurgeUnfenced {
                return Value::Int(-1);
            }
            redis.purge(&keys[1..])
        }
    }
}

/// What all patches have in common. `change` gives None where the key is not of the kind that it wants, or too old.
fn patch(
    redis: &mut Redis,
    keys: &[&[u8]],
    argv: &[&[u8]],
    is_kind: fn(&Stored) -> bool,
    change: impl FnOnce(&mut Stored, &[&[u8]]) -> Option<()>,
) -> Value {
    let (key, pending, mut mode) = (keys[0], keys[1], argv[2]);
    if let Some(old) = keys.get(2) {
        redis.touch(old);
        redis.touch(key);
        redis.data.remove(key);
        let is_stale = redis.pending().any(|(pending, _)| pending == old);
        if is_stale && mode == b"m" {
            mode = b"r";
        }
        let moved = redis.data.remove(*old).filter(|_| !is_stale || mode != b"c");
        if let Some(stored) = moved {
            redis.data.insert(key.to_vec(), stored);
        }
    }
    redis.touch(key);
    if mode == b"r" && redis.data.get(key).is_some_and(|stored| !is_kind(stored)) {
        redis.data.remove(key);
    }
    let changed = redis
        .data
        .get_mut(key)
        .and_then(|stored| change(stored, &argv[3..]));
    if mode == b"r" || (changed.is_none() && mode == b"m") {
        redis.fields(pending).insert(key.to_vec(), argv[0].to_vec());
        return Value::SimpleString(PENDING_REPLY.into());
    }
    Value::Okay
}
