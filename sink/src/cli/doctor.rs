//! `walmirror doctor`: every check, one line each.

use super::checks::{self, Check};
use super::{checks_mirror, checks_redis, checks_tables, say};
use crate::config::{Options, RedisUrl};
use crate::error::{Error, exit};

/// Prints the checks; the error sums up what failed.
pub fn run(options: &Options) -> Result<(), Error> {
    let slot = options.slot();
    if options.postgres.is_none() && options.redis.is_none() {
        options.postgres()?;
    }
    let url = options.redis_if_given()?;
    let conninfo = options.postgres.as_ref();
    let postgres = conninfo.map(|conninfo| checks::postgres(conninfo, &slot));
    let url = url.as_ref();
    let postgres = print("server", exit::POSTGRES, postgres, url);
    let templates = conninfo.map(checks_tables::templates).unwrap_or_default();
    let redis = url.map(|url| checks_redis::redis(url, &slot, &templates, conninfo, false));
    let redis = print("Redis", exit::REDIS, redis, url);
    let mirror = match (conninfo, &postgres.failure, &redis.failure) {
        (Some(conninfo), None, None) => Some(checks_mirror::mirror(conninfo, url, &slot)),
        _ => None,
    };
    let mirror = print("slot and Redis", exit::POSTGRES, mirror, url);
    let warnings = postgres.warnings + redis.warnings + mirror.warnings;
    let unsaid = postgres.unsaid.or(redis.unsaid).or(mirror.unsaid);
    match postgres.failure.or(redis.failure).or(mirror.failure).or(unsaid) {
        Some(error) => Err(error),
        None if warnings == 0 => say("all is well"),
        None => say(format!(
            "it works, and {warnings} of the checks warn: each says the next command"
        )),
    }
}

/// What the checks of one server came to.
#[derive(Debug, Default)]
pub struct Summary {
    /// Sums up those that failed, if any did.
    pub failure: Option<Error>,
    /// How many warn of something that works for now.
    pub warnings: usize,
    /// Why not all of it was printed.
    pub unsaid: Option<Error>,
}

/// Prints the checks of one server, an unreachable one as a check that failed. Commands for Redis are for the one of `url`.
pub fn print(
    name: &'static str,
    exit_code: u8,
    checks: Option<Result<Vec<Check>, Error>>,
    url: Option<&RedisUrl>,
) -> Summary {
    let checks: Vec<Check> = match checks {
        None => return Summary::default(),
        Some(Ok(checks)) => checks.into_iter().map(|check| check.at(url)).collect(),
        Some(Err(error)) => {
            let said = say(checks::from_error(name, &error).at(url));
            let failure = Error::checks(
                format!("{name}: not everything could be looked at"),
                error.exit_code(),
            );
            return Summary {
                failure: Some(failure),
                warnings: 0,
                unsaid: said.err(),
            };
        }
    };
    let said = checks.iter().try_for_each(say);
    let count = |which: fn(&Check) -> bool| checks.iter().filter(|check| which(check)).count();
    let (failed, warnings) = (count(Check::failed), count(Check::warned));
    let warn = if warnings > 0 {
        format!(", {warnings} warn")
    } else {
        String::new()
    };
    let what = format!(
        "{failed} of {} checks failed{warn}: each says the next command",
        checks.len()
    );
    Summary {
        failure: (failed > 0).then(|| Error::checks(what, exit_code)),
        warnings,
        unsaid: said.err(),
    }
}
