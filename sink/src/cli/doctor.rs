//! `walmirror doctor`: every check, one line each.

use super::checks::{self, Check};
use super::{checks_redis, say};
use crate::config::Options;
use crate::error::{Error, exit};

/// Prints the checks; the error sums up what failed.
pub fn run(options: &Options) -> Result<(), Error> {
    let slot = options.slot();
    if options.postgres.is_none() && options.redis.is_none() {
        options.postgres()?;
    }
    let redis = options.redis_if_given()?;
    let postgres = options
        .postgres
        .as_ref()
        .map(|conninfo| checks::postgres(conninfo, &slot));
    let postgres = print("server", exit::POSTGRES, postgres)?;
    let redis = print(
        "Redis",
        exit::REDIS,
        redis.map(|url| checks_redis::redis(&url, &slot)),
    )?;
    match postgres.or(redis) {
        Some(error) => Err(error),
        None => say("all is well"),
    }
}

/// Prints the checks of one server, an unreachable one as a check that failed. What is returned sums up what failed.
pub fn print(
    name: &'static str,
    exit_code: u8,
    checks: Option<Result<Vec<Check>, Error>>,
) -> Result<Option<Error>, Error> {
    let checks = match checks {
        None => return Ok(None),
        Some(Ok(checks)) => checks,
        Some(Err(error)) => {
            say(checks::from_error(name, &error))?;
            return Ok(Some(Error::checks(
                "there is no connection to check through",
                error.exit_code(),
            )));
        }
    };
    for check in &checks {
        say(check)?;
    }
    let failed = checks.iter().filter(|check| check.failed()).count();
    let what = format!(
        "{failed} of {} checks failed: each says the next command",
        checks.len()
    );
    Ok((failed > 0).then(|| Error::checks(what, exit_code)))
}
