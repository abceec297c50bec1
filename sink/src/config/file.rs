//! Options from flags, environment and file, merged into what `run` gets.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Deserializer};
use walmirror_proto::lsn::Lsn;

use super::{ByteSize, Conninfo, Durability, LogFormat, LogLevel, OnGap, RedisUrl, SlotName, Span};
use crate::error::Error;

/// What `run` does, complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunConfig {
    /// How to connect to Postgres.
    pub postgres: Conninfo,
    /// How to connect to Redis.
    pub redis: RedisUrl,
    /// The replication slot, which also names the progress key.
    pub slot: SlotName,
    /// Stop once everything before this is applied.
    pub until_lsn: Option<Lsn>,
    /// What to do when Redis and the slot do not fit together.
    pub on_gap: OnGap,
    /// When a change counts as safe in Redis.
    pub durability: Durability,
    /// How many bytes of commands go to Redis in one step, about.
    pub batch_bytes: usize,
    /// A transaction with more bytes than this is cut into several steps.
    pub transaction_bytes: usize,
    /// How often the server hears from the sink when nothing happens.
    pub status_interval: Duration,
    /// How long to try to reach Postgres and Redis at the start; None: for ever.
    pub connect_timeout: Option<Duration>,
    /// Stop at the first error that would otherwise be retried.
    pub once: bool,
}

/// The options that every command has, as they were given; what was not given is None.
#[derive(Args, Clone, Debug, Default, Deserialize)]
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
    /// Fills what was not given from the `--config` file, if there is one. Flags and variables have been looked at by
    /// clap already, so they win.
    pub fn read_file(&mut self, run: RunOptions) -> Result<RunOptions, Error> {
        let Some(path) = &self.config else { return Ok(run) };
        let shown = path.display().to_string();
        let text = std::fs::read_to_string(path)
            .map_err(|error| Error::config(format!("cannot read the configuration file {shown}: {error}")))?;
        let (file, file_run) = parse_file(&text, &shown)?;
        *self = self.clone().or(file);
        Ok(run.or(file_run))
    }

    fn or(self, other: Self) -> Self {
        Self {
            config: self.config,
            postgres: self.postgres.or(other.postgres),
            redis: self.redis.or(other.redis),
            slot: self.slot.or(other.slot),
            log_level: self.log_level.or(other.log_level),
            log_format: self.log_format.or(other.log_format),
        }
    }

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

impl RunOptions {
    fn or(self, other: Self) -> Self {
        Self {
            until_lsn: self.until_lsn.or(other.until_lsn),
            on_gap: self.on_gap.or(other.on_gap),
            durability: self.durability.or(other.durability),
            batch_bytes: self.batch_bytes.or(other.batch_bytes),
            transaction_bytes: self.transaction_bytes.or(other.transaction_bytes),
            status_interval: self.status_interval.or(other.status_interval),
            connect_timeout: self.connect_timeout.or(other.connect_timeout),
            once: self.once.or(other.once),
        }
    }
}

impl RunConfig {
    /// Puts the defaults where nothing was given, and refuses what cannot work.
    pub fn new(options: &Options, run: RunOptions) -> Result<Self, Error> {
        let status_interval = run.status_interval.map_or(Duration::from_secs(1), |span| span.0);
        if !(Duration::from_millis(10)..=Duration::from_secs(3600)).contains(&status_interval) {
            return Err(Error::config("--status-interval has to be between 10ms and 1h"));
        }
        let size = |given: Option<ByteSize>, default: usize, flag: &str| match given
            .map_or(default, |size| size.0)
        {
            bytes if bytes >= 4096 => Ok(bytes),
            _ => Err(Error::config(format!("{flag} has to be at least 4KiB"))),
        };
        Ok(Self {
            postgres: options.postgres()?,
            redis: options.redis()?,
            slot: options.slot(),
            until_lsn: run.until_lsn,
            on_gap: run.on_gap.unwrap_or_default(),
            durability: run.durability.unwrap_or(Durability::Memory {
                window: Durability::MEMORY_WINDOW,
            }),
            batch_bytes: size(run.batch_bytes, 1 << 20, "--batch-bytes")?,
            transaction_bytes: size(run.transaction_bytes, 16 << 20, "--transaction-bytes")?,
            status_interval,
            connect_timeout: match run.connect_timeout {
                None => Some(Duration::from_secs(30)),
                Some(span) => Some(span.0).filter(|time| !time.is_zero()),
            },
            once: run.once.unwrap_or(false),
        })
    }
}

/// Reads the text of a configuration file.
fn parse_file(text: &str, name: &str) -> Result<(Options, RunOptions), Error> {
    let table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
        // The error's own Display repeats the line, which may hold a password.
        let line = error.span().map_or(0, |span| {
            text.get(..span.start).unwrap_or_default().matches('\n').count() + 1
        });
        Error::config(format!(
            "the configuration file {name} is no TOML: line {line}: {}",
            error.message()
        ))
    })?;
    // The flags are the keys: what clap knows is what the file may say.
    let command = RunOptions::augment_args(Options::augment_args(clap::Command::new("file")));
    let known: Vec<&str> = command
        .get_arguments()
        .filter_map(clap::Arg::get_long)
        .filter(|name| *name != "config")
        .collect();
    if let Some(unknown) = table.keys().find(|key| !known.contains(&key.as_str())) {
        return Err(Error::config(format!(
            "the configuration file {name} has an unknown key {unknown:?}; the keys are: {}",
            known.join(", ")
        )));
    }
    let wrong =
        |error: toml::de::Error| Error::config(format!("the configuration file {name}: {}", error.message()));
    Ok((
        table.clone().try_into().map_err(wrong)?,
        table.try_into().map_err(wrong)?,
    ))
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
        #[command(flatten)]
        run: RunOptions,
    }

    const MINIMAL: &str = "postgres = \"host=a password=geheim\"\nredis = \"redis://h\"\n";

    fn config(flags: &[&str], file: &str) -> Result<RunConfig, Error> {
        let line = Line::try_parse_from(std::iter::once(&"walmirror").chain(flags)).unwrap();
        let (options, run) = parse_file(file, "w.toml")?;
        RunConfig::new(&line.options.or(options), line.run.or(run))
    }

    #[test]
    fn flags_win_over_the_file_and_defaults_fill_the_rest() {
        let file = format!("{MINIMAL}slot = \"from_file\"\nbatch-bytes = 8192\nonce = true\n");
        let config = config(&["--slot", "from_flag", "--until-lsn", "16/B374D848"], &file).unwrap();
        assert_eq!(config.slot.as_str(), "from_flag");
        assert_eq!(config.until_lsn, Some(Lsn(0x16_B374_D848)));
        assert_eq!(config.batch_bytes, 8192);
        assert!(config.once);
        assert_eq!(config.on_gap, OnGap::Resync);
        assert_eq!(config.status_interval, Duration::from_secs(1));
    }

    #[test]
    fn every_flag_has_a_variable_of_its_name() {
        let command = RunOptions::augment_args(Options::augment_args(clap::Command::new("x")));
        for argument in command.get_arguments() {
            let name = argument.get_long().unwrap().replace('-', "_").to_uppercase();
            assert_eq!(
                argument.get_env().unwrap().to_str().unwrap(),
                format!("WALMIRROR_{name}")
            );
        }
    }

    #[test]
    fn every_key_of_the_file_is_read() {
        let file = "postgres = \"\"\nredis = \"redis://h\"\nslot = \"s\"\nlog-level = \"debug\"\nlog-format = \"json\"\n\
                    until-lsn = \"0/10\"\non-gap = \"fail\"\ndurability = \"aof\"\nbatch-bytes = \"64KiB\"\n\
                    transaction-bytes = \"1GiB\"\nstatus-interval = \"5s\"\nconnect-timeout = 0\nonce = false\n";
        let (options, run) = parse_file(file, "w.toml").unwrap();
        assert_eq!(options.log_level, Some(LogLevel::Debug));
        assert_eq!(options.log_format, Some(LogFormat::Json));
        let config = RunConfig::new(&options, run).unwrap();
        assert_eq!((config.on_gap, config.durability), (OnGap::Fail, Durability::Aof));
        assert_eq!((config.batch_bytes, config.transaction_bytes), (65536, 1 << 30));
        assert_eq!((config.connect_timeout, config.once), (None, false));
    }

    #[test]
    fn mistakes_in_the_file_are_named_without_its_values() {
        let error = config(&[], &format!("{MINIMAL}sloot = \"x\"\n"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("\"sloot\"") && error.contains("slot"), "{error}");
        let error = config(&[], &format!("{MINIMAL}until-lsn = \"16-0\"\n"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("w.toml") && error.contains("16-0"), "{error}");
        let error = config(&[], "postgres = \"password=geheim\nredis = 1")
            .unwrap_err()
            .to_string();
        assert!(error.contains("line 1") && !error.contains("geheim"), "{error}");
        assert!(
            config(&[], "redis = \"redis://h\"")
                .unwrap_err()
                .to_string()
                .contains("WALMIRROR_POSTGRES")
        );
        assert!(config(&["--status-interval", "1ms"], MINIMAL).is_err());
        assert!(config(&["--batch-bytes", "1"], MINIMAL).is_err());
    }

    #[test]
    fn a_configuration_is_printed_without_its_secrets() {
        let config = config(&[], &MINIMAL.replace("redis://h", "redis://:heimlich@h")).unwrap();
        let shown = format!("{config:?}");
        assert!(
            !shown.contains("geheim") && !shown.contains("heimlich"),
            "{shown}"
        );
    }
}
