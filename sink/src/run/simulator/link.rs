//! The wire between the sink's writer and the model of Redis, and what can happen on it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redis::{RedisResult, Value};

use super::redis::{Command, Redis};
use crate::redis::{Connection, Wire};
use crate::resp::tests::parse;

/// What happens to the next commands that are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// They are applied, and the answer is lost.
    LoseAnswer,
    /// Only so many of them arrive.
    Cut(usize),
    /// The one with this number, and what follows, is refused.
    Refuse(usize),
    /// They arrive when whoever sent them has given up long ago.
    Delay,
}

#[derive(Debug, Default)]
pub(super) struct Server {
    pub(super) redis: Redis,
    pub(super) fault: Option<Fault>,
    /// So many sends go well before it.
    pub(super) fault_in: u64,
    /// The next command that removes keys ahead of their transaction is the last of its connection: true, if it arrives.
    pub(super) purge_fault: Option<bool>,
    /// What is under way, and the connection that it is on.
    pub(super) delayed: Vec<(u64, Vec<Command>)>,
}

impl Server {
    /// What was under way for long arrives; the connection ends behind it. False: there is none.
    pub(super) fn arrive(&mut self) -> bool {
        let Some((client, commands)) = self.delayed.pop() else {
            return false;
        };
        for command in commands {
            if self.redis.is_connected(client) {
                self.redis.execute(client, command);
            }
        }
        self.redis.disconnect(client);
        true
    }
}

pub(super) type Shared = Arc<Mutex<Server>>;

pub(super) fn lock(shared: &Shared) -> MutexGuard<'_, Server> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Link {
    shared: Shared,
    client: u64,
    replies: VecDeque<Value>,
    /// It was given up; what it sent is still under way.
    is_given_up: bool,
}

pub(super) fn connect(shared: &Shared) -> Connection {
    let client = lock(shared).redis.connect();
    let link = Link {
        shared: Arc::clone(shared),
        client,
        replies: VecDeque::new(),
        is_given_up: false,
    };
    Connection::over(Box::new(link), "redis://model".parse().unwrap())
}

impl Wire for Link {
    fn send(&mut self, commands: &[u8]) -> RedisResult<()> {
        let mut server = lock(&self.shared);
        if self.is_given_up {
            return Ok(());
        }
        let fault = match server.fault_in {
            0 => server.fault.take(),
            _ => None,
        };
        server.fault_in = server.fault_in.saturating_sub(1);
        let commands = parse(commands);
        if let [command] = commands.as_slice()
            && command[0] == b"EVALSHA"
            && let Some(arrives) = server.purge_fault.take()
        {
            if arrives {
                server.redis.execute(self.client, command.clone());
            }
            self.replies.clear();
            server.redis.disconnect(self.client);
            return Ok(());
        }
        if fault == Some(Fault::Delay) {
            self.replies.clear();
            self.is_given_up = true;
            server.delayed.push((self.client, commands));
            return Ok(());
        }
        let arrive = match fault {
            Some(Fault::Cut(count)) => count.min(commands.len() - 1),
            _ => commands.len(),
        };
        for (number, command) in commands.into_iter().enumerate().take(arrive) {
            if !server.redis.is_connected(self.client) {
                break;
            }
            let refused =
                matches!(fault, Some(Fault::Refuse(from)) if number >= from) && command[0] != b"EXEC";
            let reply = if refused {
                server.redis.refuse(self.client)
            } else {
                server.redis.execute(self.client, command)
            };
            self.replies.push_back(reply);
        }
        if matches!(fault, Some(Fault::Cut(_) | Fault::LoseAnswer)) {
            self.replies.clear();
            server.redis.disconnect(self.client);
        }
        Ok(())
    }

    fn receive(&mut self) -> RedisResult<Value> {
        self.replies.pop_front().ok_or_else(|| {
            std::io::Error::new(std::io::ErrorKind::ConnectionReset, "the connection was cut").into()
        })
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if !self.is_given_up {
            lock(&self.shared).redis.disconnect(self.client);
        }
    }
}
