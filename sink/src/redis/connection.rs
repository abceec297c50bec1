//! A connection to Redis: the redis crate for URLs, TLS, greeting and reply parsing; commands are RESP made by `resp`.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Once};
use std::time::Duration;

use redis::io::tcp::TcpSettings;
use redis::{IntoConnectionInfo, RedisResult, Value};

use super::error::{client_error, reply_error, wrong_type};
use crate::config::RedisUrl;
use crate::error::Error;
use crate::resp::Commands;

/// How long to wait for the TCP and TLS handshakes.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a reply may take. A server that is stopped or unreachable without a reset is noticed after this; a huge
/// transaction on a slow server has to fit in.
pub(super) const REPLY_TIMEOUT: Duration = Duration::from_secs(15);

/// What carries commands to Redis and replies back: a socket, or a model of Redis in the simulator.
pub(crate) trait Wire: Send {
    fn send(&mut self, commands: &[u8]) -> RedisResult<()>;
    fn receive(&mut self) -> RedisResult<Value>;
}

impl Wire for redis::Connection {
    fn send(&mut self, commands: &[u8]) -> RedisResult<()> {
        self.send_packed_command(commands)
    }

    fn receive(&mut self) -> RedisResult<Value> {
        self.recv_response()
    }
}

/// One connection. After an error it must not be used any more: replies may be outstanding.
pub struct Connection {
    wire: Box<dyn Wire>,
    url: RedisUrl,
    answers: Answers,
}

/// How many replies a connection has read, for somebody else who wants to know whether Redis says anything.
#[derive(Clone, Debug, Default)]
pub struct Answers(Arc<AtomicU64>);

impl Answers {
    /// So many.
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Only the thread of the connection counts, so it need not be one step; it is done for each command of a batch.
    fn add(&self) {
        self.0.store(self.count().wrapping_add(1), Ordering::Relaxed);
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Connection({})", self.url)
    }
}

impl Connection {
    /// [`RedisUrl::complete`].
    pub(super) fn complete(&self, command: &str) -> String {
        self.url.complete(command)
    }

    /// Connects and greets.
    pub fn connect(url: &RedisUrl) -> Result<Self, Error> {
        let failed = |error| {
            let what = format!("cannot connect to Redis at {url}");
            client_error(what, error, url.expose(), Some(CONNECT_TIMEOUT))
        };
        let info = url.expose().into_connection_info().map_err(failed)?;
        // Without nodelay a batch waits for the acknowledgement of the one before.
        let info = info.set_tcp_settings(TcpSettings::default().set_nodelay(true));
        let client = redis::Client::open(info).map_err(failed)?;
        let inner = client
            .get_connection_with_timeout(CONNECT_TIMEOUT)
            .map_err(failed)?;
        inner.set_read_timeout(Some(REPLY_TIMEOUT)).map_err(failed)?;
        inner.set_write_timeout(Some(REPLY_TIMEOUT)).map_err(failed)?;
        Ok(Self {
            wire: Box::new(inner),
            url: url.clone(),
            answers: Answers::default(),
        })
    }

    /// A connection over something else than a socket.
    #[cfg(test)]
    pub(crate) fn over(wire: Box<dyn Wire>, url: RedisUrl) -> Self {
        Self {
            wire,
            url,
            answers: Answers::default(),
        }
    }

    /// Sends commands without reading replies.
    pub fn send(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.wire.send(bytes).map_err(|error| self.broken(error))
    }

    /// Reads the next reply; an error reply is a value here.
    pub fn receive(&mut self) -> Result<Value, Error> {
        let reply = self.wire.receive().map_err(|error| self.broken(error))?;
        self.answers.add();
        Ok(reply)
    }

    /// Counts its replies.
    pub fn answers(&self) -> Answers {
        self.answers.clone()
    }

    /// Runs one command; an error reply is an error, which says `what` could not be done.
    pub fn call(&mut self, what: &str, args: &[&[u8]]) -> Result<Value, Error> {
        match self.ask(args)? {
            Value::ServerError(reply) => {
                let what = format!("Redis refuses: cannot {what}");
                Err(match args.get(1).filter(|_| reply.code() == "WRONGTYPE") {
                    Some(key) => wrong_type(what, &reply, key),
                    None => reply_error(what, &reply),
                })
            }
            value => Ok(value),
        }
    }

    /// Runs one command; an error reply is a value here.
    pub fn ask(&mut self, args: &[&[u8]]) -> Result<Value, Error> {
        let mut commands = Commands::new();
        commands.command(args);
        self.send(commands.as_bytes())?;
        self.receive()
    }

    fn broken(&self, error: redis::RedisError) -> Error {
        client_error(
            format!("the connection to Redis at {} broke", self.url),
            error,
            self.url.expose(),
            None,
        )
    }
}

/// The longest value that Redis takes: a longer one would end the connection. A Redis that does not tell is taken to have the default.
pub fn value_limit(connection: &mut Connection) -> Result<usize, Error> {
    static SAID: Once = Once::new();
    let told = setting(connection, "proto-max-bulk-len")?.and_then(|digits| digits.parse().ok());
    if told.is_none() {
        SAID.call_once(|| {
            tracing::info!(
                "how long a value Redis takes is not known, as this login may not ask (CONFIG GET proto-max-bulk-len): {} bytes are assumed",
                crate::plan::VALUE_BYTES
            );
        });
    }
    Ok(told.unwrap_or(crate::plan::VALUE_BYTES))
}

/// What CONFIG GET says; None where it says nothing, as where the login may not ask.
pub fn setting(connection: &mut Connection, name: &str) -> Result<Option<String>, Error> {
    let fields = pairs(connection.ask(&[b"CONFIG", b"GET", name.as_bytes()])?);
    Ok(fields.into_iter().next().and_then(|(_, value)| match value {
        Value::BulkString(text) => String::from_utf8(text).ok(),
        _ => None,
    }))
}

/// What RESP3 answers as a map, and RESP2 as an array of names and values; anything else is empty.
pub(crate) fn pairs(reply: Value) -> Vec<(Value, Value)> {
    match reply {
        Value::Map(pairs) => pairs,
        Value::Array(items) => {
            let mut items = items.into_iter();
            std::iter::from_fn(|| Some((items.next()?, items.next()?))).collect()
        }
        _ => Vec::new(),
    }
}
