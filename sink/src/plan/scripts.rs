//! The Lua scripts of patches: a change that leaves a TOASTed column as it was brings only part of a row, and may be
//! applied only where the rest is. Redis runs them inside the MULTI of the batch, so the check and the write are one step.
//!
//! All take KEYS = key, pending hash[, old key] and ARGV = oid, ttl in ms (0: none), mode, … where mode is `m` (a
//! missing key is noted as pending, to be read again), `c` (cache: a missing key stays missing) or `r` (the table is
//! being refreshed: what the key holds may be stale, so it is noted as pending in any case).

use std::sync::LazyLock;

/// The status reply of a script that noted its key as pending.
pub const PENDING_REPLY: &str = "PENDING";

/// Moves the key when it has changed, then checks that it is there and of the right type. `KIND` is put in.
const PROLOGUE: &str = r"
local key, pending, old, mode = KEYS[1], KEYS[2], KEYS[3], ARGV[3]
local function done(absent)
  if mode == 'r' or (absent and mode == 'm') then
    redis.call('HSET', pending, key, ARGV[1])
    return redis.status_reply('PENDING')
  end
  return redis.status_reply('OK')
end
if old then
  -- What is to be read again is no better under another key: there it has to be as well, and of a cache it goes.
  local stale = redis.call('HEXISTS', pending, old) == 1
  if stale and mode == 'm' then mode = 'r' end
  if redis.call('TYPE', old).ok == 'KIND' and not (stale and mode == 'c') then
    redis.call('RENAME', old, key)
  else
    redis.call('UNLINK', old, key)
  end
end
if redis.call('TYPE', key).ok ~= 'KIND' then
  -- Left by an older version of the table. The next change may come before the key is read again, and take it for what it wants.
  if mode == 'r' then redis.call('UNLINK', key) end
  return done(true)
end
";

const EPILOGUE: &str = r"
if ARGV[2] ~= '0' then redis.call('PEXPIRE', key, ARGV[2]) end
return done(false)
";

/// ARGV from 4: number of fields to set, field, value, …, fields to delete.
const HASH: &str = r"
local sets = tonumber(ARGV[4]) * 2
if sets > 0 then redis.call('HSET', key, unpack(ARGV, 5, 4 + sets)) end
if #ARGV > 4 + sets then redis.call('HDEL', key, unpack(ARGV, 5 + sets)) end
";

/// Nothing from 4 on: the one value column is what did not change.
const STRING: &str = "";

/// ARGV from 4: for each member of the row, in jsonb's order, its name as a JSON string and its value as JSON, or an
/// empty text where the value is unchanged: then it is cut out of the stored object as it stands there.
const JSON: &str = r#"
local text = redis.call('GET', key)
-- A quote ends a string if an even number of backslashes stands before it. Plain search is memchr, which matters: the
-- values that are skipped over here are the large ones.
local function string_end(from)
  local at = from
  while true do
    at = string.find(text, '"', at + 1, true)
    if not at then return nil end
    local back = at - 1
    while string.byte(text, back) == 92 do back = back - 1 end
    if (at - back) % 2 == 1 then return at end
  end
end
local function value_end(from)
  local first = string.byte(text, from)
  if first == 34 then return string_end(from) end
  if first ~= 123 and first ~= 91 then
    local stop = string.find(text, '[,}]', from)
    return stop and stop - 1
  end
  local depth, at = 0, from
  while true do
    at = string.find(text, '["{}%[%]]', at)
    if not at then return nil end
    local byte = string.byte(text, at)
    if byte == 34 then
      at = string_end(at)
      if not at then return nil end
    elseif byte == 123 or byte == 91 then
      depth = depth + 1
    else
      depth = depth - 1
      if depth == 0 then return at end
    end
    at = at + 1
  end
end
local stored, at = {}, 2
while string.byte(text, at) == 34 do
  local name_end = string_end(at)
  if not name_end then break end
  local value = name_end + 3
  local stop = value_end(value)
  if not stop then break end
  stored[string.sub(text, at, name_end)] = string.sub(text, value, stop)
  at = stop + 3
end
local members = {}
for i = 4, #ARGV, 2 do
  local value = ARGV[i + 1]
  if value == '' then value = stored[ARGV[i]] end
  if not value then return done(true) end
  members[#members + 1] = ARGV[i] .. ': ' .. value
end
redis.call('SET', key, '{' .. table.concat(members, ', ') .. '}', 'KEEPTTL')
"#;

/// Removes keys, but only while this sink is the one whose epoch the progress key holds: a purge runs outside of the
/// MULTI of a batch, so it needs its own fence. KEYS = progress, key, …; ARGV = epoch. Replies with the number of keys
/// removed, or with -1 when another sink has taken over.
const PURGE: &str = r"
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return -1 end
return redis.call('UNLINK', unpack(KEYS, 2))
";

/// One of the scripts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Script {
    /// Patches a hash.
    PatchHash,
    /// Keeps or moves a string.
    PatchString,
    /// Patches a JSON object.
    PatchJson,
    /// Removes keys under the fence.
    Purge,
}

impl Script {
    /// All of them, in the order in which [`Scripts::new`] wants their hashes.
    pub const ALL: [Self; 4] = [Self::PatchHash, Self::PatchString, Self::PatchJson, Self::Purge];

    /// What SCRIPT LOAD gets.
    pub fn source(self) -> &'static str {
        static PATCHES: LazyLock<[String; 3]> = LazyLock::new(|| {
            [("hash", HASH), ("string", STRING), ("string", JSON)]
                .map(|(kind, body)| format!("{}{body}{EPILOGUE}", PROLOGUE.replace("KIND", kind)))
        });
        let [hash, string, json] = &*PATCHES;
        match self {
            Self::PatchHash => hash,
            Self::PatchString => string,
            Self::PatchJson => json,
            Self::Purge => PURGE,
        }
    }
}

/// The names that SCRIPT LOAD gave the scripts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scripts {
    hashes: [Vec<u8>; Script::ALL.len()],
}

impl Scripts {
    /// The answers to SCRIPT LOAD, in the order of [`Script::ALL`].
    pub fn new(hashes: [Vec<u8>; Script::ALL.len()]) -> Self {
        Self { hashes }
    }

    /// The name of a script for EVALSHA.
    pub fn hash(&self, script: Script) -> &[u8] {
        let [hash, string, json, purge] = &self.hashes;
        match script {
            Script::PatchHash => hash,
            Script::PatchString => string,
            Script::PatchJson => json,
            Script::Purge => purge,
        }
    }
}
