//! `walmirror doctor`: every check, one line each.

use super::checks::{self, Check};
use super::{checks_redis, say};
use crate::config::Options;
use crate::error::{Class, Error};

/// Prints the checks; the error sums up what failed.
pub fn run(options: &Options) -> Result<(), Error> {
    let slot = options.slot();
    if options.postgres.is_none() && options.redis.is_none() {
        options.postgres()?;
    }
    let postgres = options
        .postgres
        .as_ref()
        .map(|conninfo| checks::postgres(conninfo, &slot));
    let postgres = print("server", postgres)?;
    let redis = options
        .redis_if_given()?
        .map(|url| checks_redis::redis(&url, &slot));
    let redis = print("Redis", redis)?;
    match (postgres.error, redis.error) {
        (Some(error), _) | (None, Some(error)) => Err(error),
        (None, None) => say("all is well"),
    }
}

/// What the checks of one server ended with.
pub struct Summary {
    /// None: everything works.
    pub error: Option<Error>,
}

/// Prints the checks of one server, an unreachable one as a check that failed.
pub fn print(name: &'static str, checks: Option<Result<Vec<Check>, Error>>) -> Result<Summary, Error> {
    let checks = match checks {
        None => return Ok(Summary { error: None }),
        Some(Ok(checks)) => checks,
        Some(Err(error)) => {
            say(checks::from_error(name, &error))?;
            // The line above has said everything but the class.
            return Ok(Summary { error: Some(error) });
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
    let error = (failed > 0).then(|| match name {
        "Redis" => Error::redis("Redis is not ready", Class::Operator, what),
        _ => Error::setup(format!("Postgres is not ready: {what}")),
    });
    Ok(Summary { error })
}
