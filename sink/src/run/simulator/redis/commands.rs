//! What each command that the sink uses does to the keys.

use redis::Value;

use super::super::scripts;
use super::{Broken, Fields, Redis, Stored, error};

/// How many keys SCAN shows at once, and one more.
const PAGE: usize = 5;

impl Redis {
    pub(super) fn run(&mut self, id: u64, command: &[Vec<u8>]) -> Value {
        let args: Vec<&[u8]> = command.iter().map(Vec::as_slice).collect();
        match args.as_slice() {
            [b"HSET", key, pairs @ ..] => {
                let fields = self.fields(key);
                for pair in pairs.chunks_exact(2) {
                    fields.insert(pair[0].to_vec(), pair[1].to_vec());
                }
                Value::Int(1)
            }
            [b"HDEL", key, names @ ..] => {
                // What is not there is not removed, and breaks no WATCH.
                let held = self.hash(key);
                if held.is_some_and(|fields| names.iter().any(|name| fields.contains_key(*name))) {
                    let fields = self.fields(key);
                    names.iter().for_each(|name| _ = fields.remove(*name));
                    if fields.is_empty() {
                        self.data.remove(*key);
                    }
                }
                Value::Int(1)
            }
            [b"SET", key, value, options @ ..] => {
                if options.first() == Some(&b"XX".as_slice()) && !self.data.contains_key(*key) {
                    return Value::Nil;
                }
                self.touch(key);
                self.data.insert(key.to_vec(), Stored::Text(value.to_vec()));
                Value::Okay
            }
            [b"MSET", pairs @ ..] => {
                for pair in pairs.chunks_exact(2) {
                    self.touch(pair[0]);
                    self.data.insert(pair[0].to_vec(), Stored::Text(pair[1].to_vec()));
                }
                Value::Okay
            }
            [b"UNLINK", keys @ ..] => self.unlink(keys),
            // A row that is not mirrored: what was noted last, and all that ever was.
            [b"XADD", key, ..] => {
                self.touch(key);
                self.data.insert(key.to_vec(), Stored::Text(args[7].to_vec()));
                self.notes.insert((args[9].to_vec(), args[7].to_vec()));
                let is_taken = String::from_utf8_lossy(args[13]).contains("has more literal text");
                if is_taken && self.broken == Broken::WriteTaken {
                    self.touch(args[7]);
                    self.data.insert(args[7].to_vec(), Stored::Text(args[9].to_vec()));
                }
                Value::BulkString(b"1-1".to_vec())
            }
            [b"HGET", key, field] => {
                let value = self.hash(key).and_then(|fields| fields.get(*field));
                value.map_or(Value::Nil, |value| Value::BulkString(value.clone()))
            }
            [b"HMGET", key, names @ ..] => {
                let fields = self.hash(key);
                let value = |name: &&[u8]| fields.and_then(|fields| fields.get(*name));
                let bulk = |value: &Vec<u8>| Value::BulkString(value.clone());
                let values = names.iter().map(|name| value(name).map_or(Value::Nil, bulk));
                Value::Array(values.collect())
            }
            [b"HGETALL", key] => {
                let fields = self.hash(key).into_iter().flatten();
                let bulk = |bytes: &Vec<u8>| Value::BulkString(bytes.clone());
                Value::Array(
                    fields
                        .flat_map(|(field, value)| [bulk(field), bulk(value)])
                        .collect(),
                )
            }
            [b"EXISTS", keys @ ..] => {
                let there = keys.iter().filter(|key| self.data.contains_key(**key));
                Value::Int(there.count() as i64)
            }
            [b"DBSIZE"] => Value::Int(self.data.len() as i64),
            [b"SCAN", cursor, ..] => self.scan(cursor),
            [b"EVALSHA", script, _, ..] => scripts::run(self, script, &args[2..]),
            [b"EXEC"] => error("ERR EXEC without MULTI"),
            [b"SCRIPT", b"LOAD", source] => scripts::load(source),
            [b"CLIENT", b"SETNAME", name] => {
                self.clients
                    .entry(id)
                    .and_modify(|client| client.name = name.to_vec());
                Value::Okay
            }
            // Some do not allow this; the fence has to hold without it.
            [b"HELLO"] => Value::Array(Vec::new()),
            [b"CLIENT", ..] => error("NOPERM no permissions to run the 'client' command"),
            [b"WAITAOF", ..] => Value::Array(vec![
                Value::Int((self.saved == self.steps.len()).into()),
                Value::Int(0),
            ]),
            _ => {
                self.violation = Some(format!(
                    "an unknown command: {}",
                    String::from_utf8_lossy(args[0])
                ));
                error("ERR unknown command")
            }
        }
    }

    fn unlink(&mut self, keys: &[&[u8]]) -> Value {
        let before = self.data.len();
        for key in keys {
            if self.data.contains_key(*key) {
                self.touch(key);
                self.data.remove(*key);
            }
        }
        Value::Int((before - self.data.len()) as i64)
    }

    /// Removes keys ahead of the transaction that they go with.
    pub(in crate::run::simulator) fn purge(&mut self, keys: &[&[u8]]) -> Value {
        self.is_ahead = true;
        self.unlink(keys)
    }

    /// A page of the keys, in an order of their own that does not change when others come and go.
    fn scan(&self, cursor: &[u8]) -> Value {
        let place = |key: &[u8]| {
            key.iter().fold(7u64, |place, byte| {
                (place ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01B3) >> 1
            })
        };
        let from: u64 = String::from_utf8_lossy(cursor).parse().unwrap_or(0);
        let mut left: Vec<(u64, &Vec<u8>)> = self
            .data
            .keys()
            .map(|key| (place(key), key))
            .filter(|(place, _)| *place >= from)
            .collect();
        left.sort_unstable();
        let next = match left.get(PAGE) {
            // All that stand at one place come in one page.
            Some((next, _)) => {
                let next = *next;
                left.retain(|(place, _)| *place <= next);
                next + 1
            }
            None => 0,
        };
        let keys = left
            .into_iter()
            .map(|(_, key)| Value::BulkString(key.clone()))
            .collect();
        Value::Array(vec![
            Value::BulkString(next.to_string().into_bytes()),
            Value::Array(keys),
        ])
    }

    /// The fields of a hash that is about to change.
    pub(in crate::run::simulator) fn fields(&mut self, key: &[u8]) -> &mut Fields {
        self.touch(key);
        let stored = self
            .data
            .entry(key.to_vec())
            .or_insert_with(|| Stored::Hash(Fields::new()));
        if let Stored::Text(_) = stored {
            self.violation = Some(format!("WRONGTYPE for {}", String::from_utf8_lossy(key)));
            *stored = Stored::Hash(Fields::new());
        }
        match stored {
            Stored::Hash(fields) => fields,
            Stored::Text(_) => unreachable!("it was replaced"),
        }
    }
}
