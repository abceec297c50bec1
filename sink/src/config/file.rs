//! The configuration file, and what comes of all options together.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use walmirror_proto::lsn::Lsn;

use super::{
    ByteSize, Conninfo, Durability, OnBadRow, OnGap, Options, RedisUrl, RunOptions, SlotName, Streaming,
};
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
    /// What to do about a row that cannot be mirrored.
    pub on_bad_row: OnBadRow,
    /// When a change counts as safe in Redis.
    pub durability: Durability,
    /// How many bytes of commands go to Redis in one step, about.
    pub batch_bytes: usize,
    /// A transaction with more bytes than this is cut into several steps.
    pub transaction_bytes: usize,
    /// Whether large transactions are asked for while they are in progress.
    pub streaming: Streaming,
    /// Where those wait for their commit.
    pub spool_dir: PathBuf,
    /// How often the server hears from the sink when nothing happens.
    pub status_interval: Duration,
    /// How long to try to reach Postgres and Redis at the start; None: for ever.
    pub connect_timeout: Option<Duration>,
    /// Stop at the first error that would otherwise be retried.
    pub once: bool,
    /// Where the admin server listens, if at all.
    pub admin: Option<std::net::SocketAddr>,
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
            on_bad_row: run.on_bad_row.unwrap_or_default(),
            durability: run.durability.unwrap_or(Durability::Memory {
                window: Durability::MEMORY_WINDOW,
            }),
            batch_bytes: size(run.batch_bytes, 1 << 20, "--batch-bytes")?,
            transaction_bytes: size(run.transaction_bytes, 16 << 20, "--transaction-bytes")?,
            streaming: run.streaming.unwrap_or_default(),
            spool_dir: run.spool_dir.unwrap_or_else(spool_dir),
            status_interval,
            connect_timeout: match run.connect_timeout {
                None => Some(Duration::from_secs(30)),
                Some(span) => Some(span.0).filter(|time| !time.is_zero()),
            },
            once: run.once.unwrap_or(false),
            admin: run.admin,
        })
    }
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
}

impl RunOptions {
    fn or(self, other: Self) -> Self {
        Self {
            until_lsn: self.until_lsn.or(other.until_lsn),
            on_gap: self.on_gap.or(other.on_gap),
            on_bad_row: self.on_bad_row.or(other.on_bad_row),
            durability: self.durability.or(other.durability),
            batch_bytes: self.batch_bytes.or(other.batch_bytes),
            transaction_bytes: self.transaction_bytes.or(other.transaction_bytes),
            streaming: self.streaming.or(other.streaming),
            spool_dir: self.spool_dir.or(other.spool_dir),
            status_interval: self.status_interval.or(other.status_interval),
            connect_timeout: self.connect_timeout.or(other.connect_timeout),
            once: self.once.or(other.once),
            admin: self.admin.or(other.admin),
        }
    }
}

/// For temporary files that may be large: /tmp is often kept in memory.
fn spool_dir() -> PathBuf {
    std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from)
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::{LogFormat, LogLevel};
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
                    until-lsn = \"0/10\"\non-gap = \"fail\"\non-bad-row = \"stop\"\ndurability = \"aof\"\nbatch-bytes = \"64KiB\"\n\
                    transaction-bytes = \"1GiB\"\nstatus-interval = \"5s\"\nconnect-timeout = 0\nonce = false\n\
                    streaming = \"off\"\nspool-dir = \"/srv/spool\"\n";
        let (options, run) = parse_file(file, "w.toml").unwrap();
        assert_eq!(options.log_level, Some(LogLevel::Debug));
        assert_eq!(options.log_format, Some(LogFormat::Json));
        let config = RunConfig::new(&options, run).unwrap();
        assert_eq!((config.on_gap, config.durability), (OnGap::Fail, Durability::Aof));
        assert_eq!(config.on_bad_row, OnBadRow::Stop);
        assert_eq!((config.batch_bytes, config.transaction_bytes), (65536, 1 << 30));
        assert_eq!((config.connect_timeout, config.once), (None, false));
        assert_eq!(
            (config.streaming, config.spool_dir),
            (Streaming::Off, "/srv/spool".into())
        );
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
