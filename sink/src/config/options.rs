//! The options as they are given: one field is a flag, an environment variable and a key of the file at once.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use serde::{Deserialize, Deserializer};
use walmirror_proto::lsn::Lsn;

use super::{
    ByteSize, Conninfo, Durability, LogFormat, LogLevel, OnBadRow, OnGap, RedisUrl, SlotName, Span, Streaming,
};
use crate::error::Error;

/// The options that every command has, as they were given; what was not given is None.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[command(next_help_heading = "Options of every command")]
#[serde(rename_all = "kebab-case", default)]
pub struct Options {
    /// Read options from this TOML file: the flags' names without the dashes, like `slot = "walmirror"`.
    #[arg(
        long,
        env = "WALMIRROR_CONFIG",
        hide_env_values = true,
        value_name = "FILE",
        global = true
    )]
    #[serde(skip)]
    pub config: Option<PathBuf>,

    /// Connection string of Postgres: anything that psql takes (a URI, key=value pairs, service=NAME, a database name).
    #[arg(
        long,
        env = "WALMIRROR_POSTGRES",
        value_name = "CONNINFO",
        hide_env_values = true,
        global = true
    )]
    #[serde(deserialize_with = "parsed")]
    pub postgres: Option<Conninfo>,

    /// URL of Redis: redis://user:password@host:6379/0, rediss:// for TLS, redis+unix:///path for a socket.
    #[arg(
        long,
        env = "WALMIRROR_REDIS",
        value_name = "URL",
        hide_env_values = true,
        global = true
    )]
    #[serde(deserialize_with = "parsed")]
    pub redis: Option<RedisUrl>,

    /// Name of the replication slot; it also names the progress key in Redis. [default: walmirror]
    #[arg(
        long,
        env = "WALMIRROR_SLOT",
        hide_env_values = true,
        value_name = "NAME",
        global = true
    )]
    #[serde(deserialize_with = "parsed")]
    pub slot: Option<SlotName>,

    /// Least severe log lines to show. [default: info]
    #[arg(
        long,
        env = "WALMIRROR_LOG_LEVEL",
        hide_env_values = true,
        value_name = "LEVEL",
        global = true
    )]
    #[serde(deserialize_with = "parsed")]
    pub log_level: Option<LogLevel>,

    /// How log lines look. [default: text]
    #[arg(
        long,
        env = "WALMIRROR_LOG_FORMAT",
        hide_env_values = true,
        value_name = "FORMAT",
        global = true
    )]
    #[serde(deserialize_with = "parsed")]
    pub log_format: Option<LogFormat>,
}

/// The options that only `run` has, as they were given. They may stand in the file whatever the command.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[command(next_help_heading = "Options of run")]
#[serde(rename_all = "kebab-case", default)]
pub struct RunOptions {
    /// Stop, with exit code 0, once everything before this LSN is in Redis.
    #[arg(long, env = "WALMIRROR_UNTIL_LSN", hide_env_values = true, value_name = "LSN")]
    #[serde(deserialize_with = "parsed")]
    pub until_lsn: Option<Lsn>,

    /// What to do when Redis and the slot do not fit together (progress lost, another server). [default: resync]
    #[arg(long, env = "WALMIRROR_ON_GAP", hide_env_values = true, value_name = "POLICY")]
    #[serde(deserialize_with = "parsed")]
    pub on_gap: Option<OnGap>,

    /// What to do about a row that cannot be mirrored (a value too large for Redis, one that cannot be encoded, a key of
    /// another type in its place): skip notes the key in Redis, stop ends with an error. [default: skip]
    #[arg(
        long,
        env = "WALMIRROR_ON_BAD_ROW",
        hide_env_values = true,
        value_name = "POLICY"
    )]
    #[serde(deserialize_with = "parsed")]
    pub on_bad_row: Option<OnBadRow>,

    /// Answer /healthz, /readyz and /metrics by HTTP at this address, for example 127.0.0.1:9187. [default: not at all]
    #[arg(long, env = "WALMIRROR_ADMIN", hide_env_values = true, value_name = "ADDRESS")]
    #[serde(deserialize_with = "parsed")]
    pub admin: Option<std::net::SocketAddr>,

    /// When a change counts as safe in Redis, so that Postgres may drop its WAL: memory, memory=5s, replicas=N, aof.
    /// [default: memory=2s]
    #[arg(
        long,
        env = "WALMIRROR_DURABILITY",
        hide_env_values = true,
        value_name = "HOW"
    )]
    #[serde(deserialize_with = "parsed")]
    pub durability: Option<Durability>,

    /// How many bytes of commands go to Redis in one step, about. [default: 1MiB]
    #[arg(
        long,
        env = "WALMIRROR_BATCH_BYTES",
        hide_env_values = true,
        value_name = "SIZE"
    )]
    #[serde(deserialize_with = "parsed")]
    pub batch_bytes: Option<ByteSize>,

    /// A transaction with more bytes than this is applied in several steps. [default: 16MiB]
    #[arg(
        long,
        env = "WALMIRROR_TRANSACTION_BYTES",
        hide_env_values = true,
        value_name = "SIZE"
    )]
    #[serde(deserialize_with = "parsed")]
    pub transaction_bytes: Option<ByteSize>,

    /// Whether transactions larger than logical_decoding_work_mem come while they are in progress, and wait here until they
    /// commit, instead of on the disk of Postgres: on, off. [default: on]
    #[arg(
        long,
        env = "WALMIRROR_STREAMING",
        hide_env_values = true,
        value_name = "BOOL"
    )]
    #[serde(deserialize_with = "parsed")]
    pub streaming: Option<Streaming>,

    /// Where they wait: a directory with room for them. [default: $TMPDIR, or /var/tmp]
    #[arg(long, env = "WALMIRROR_SPOOL_DIR", hide_env_values = true, value_name = "DIR")]
    #[serde(deserialize_with = "parsed")]
    pub spool_dir: Option<PathBuf>,

    /// How often Postgres hears from the sink when nothing happens. [default: 1s]
    #[arg(
        long,
        env = "WALMIRROR_STATUS_INTERVAL",
        hide_env_values = true,
        value_name = "TIME"
    )]
    #[serde(deserialize_with = "parsed")]
    pub status_interval: Option<Span>,

    /// How long to try to reach Postgres and Redis at the start; 0: for ever. Afterwards it always tries for ever.
    /// [default: 30s]
    #[arg(
        long,
        env = "WALMIRROR_CONNECT_TIMEOUT",
        hide_env_values = true,
        value_name = "TIME"
    )]
    #[serde(deserialize_with = "parsed")]
    pub connect_timeout: Option<Span>,

    /// Stop, with exit code 5, at the first error that would otherwise be retried.
    #[arg(long, env = "WALMIRROR_ONCE", num_args = 0..=1, default_missing_value = "true", hide_env_values = true, value_name = "BOOL", require_equals = true)]
    #[serde(deserialize_with = "parsed")]
    pub once: Option<bool>,
}

impl Options {
    /// The connection string of Postgres. An empty one means libpq's defaults (PGHOST, PGDATABASE and the like), but
    /// somebody has to say so.
    pub fn postgres(&self) -> Result<Conninfo, Error> {
        self.postgres.clone().ok_or_else(|| {
            Error::config("no Postgres was named: give --postgres CONNINFO, or set WALMIRROR_POSTGRES")
                .next("walmirror run --postgres 'host=localhost dbname=mydb' --redis redis://localhost:6379")
        })
    }

    /// The URL of Redis, if there is one.
    pub fn redis_if_given(&self) -> Result<Option<RedisUrl>, Error> {
        let checked = self.redis.as_ref().map(|url| url.check().map(|()| url.clone()));
        checked
            .transpose()
            .map_err(|what| Error::config(what).next("walmirror run --help"))
    }

    /// The URL of Redis.
    pub fn redis(&self) -> Result<RedisUrl, Error> {
        self.redis_if_given()?.ok_or_else(|| {
            Error::config("no Redis was named: give --redis URL, or set WALMIRROR_REDIS")
                .next("walmirror run --postgres 'host=localhost dbname=mydb' --redis redis://localhost:6379")
        })
    }

    /// The name of the slot.
    pub fn slot(&self) -> SlotName {
        self.slot.clone().unwrap_or_default()
    }
}

/// Reads a value of the file the way that the flag is read.
fn parsed<'de, D: Deserializer<'de>, T: FromStr<Err: fmt::Display>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Scalar {
        Text(String),
        Number(i64),
        Bool(bool),
    }
    let text = match Scalar::deserialize(deserializer)? {
        Scalar::Text(text) => text,
        Scalar::Number(number) => number.to_string(),
        Scalar::Bool(value) => value.to_string(),
    };
    text.parse().map(Some).map_err(serde::de::Error::custom)
}
