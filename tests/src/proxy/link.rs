//! One connection through the proxy: its two ends, and how it is opened and ended.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use rustix::net::sockopt::set_socket_linger;

use super::pump::pump;
use super::{State, Trap, Upstream, Way, lock};

/// How long a write may take until the proxy looks whether the link is over.
const WRITE_TIMEOUT: Option<Duration> = Some(Duration::from_millis(100));

/// One connection. What a trap does to it concerns no other.
pub(super) struct Link {
    pub(super) client: TcpStream,
    pub(super) server: Side,
    half: AtomicBool,
    pub(super) over: AtomicBool,
    pub(super) silent: AtomicBool,
    pub(super) reply: Mutex<Option<Trap>>,
}

impl Link {
    pub(super) fn end(&self) {
        self.over.store(true, Ordering::Release);
        reset(&self.client);
        self.server.end();
    }

    fn finish(&self, way: Way) {
        match (way, &self.server) {
            (Way::ToServer, Side::Tcp(server)) => drop(server.shutdown(Shutdown::Write)),
            (Way::ToServer, Side::Unix(server)) => drop(server.shutdown(Shutdown::Write)),
            (Way::ToClient, _) => drop(self.client.shutdown(Shutdown::Write)),
        }
    }
}

/// Lets bytes pass between the two until one of them ends.
pub(super) fn open(state: &Arc<State>, client: TcpStream, server: Side) {
    let _ = client.set_nodelay(true);
    let _ = client.set_write_timeout(WRITE_TIMEOUT);
    let link = Arc::new(Link {
        client,
        server,
        half: AtomicBool::new(false),
        over: AtomicBool::new(false),
        silent: AtomicBool::new(false),
        reply: Mutex::new(None),
    });
    lock(&state.links).push(Arc::clone(&link));
    for way in [Way::ToServer, Way::ToClient] {
        let (state, link) = (Arc::clone(state), Arc::clone(&link));
        thread::spawn(move || {
            match pump(&state, &link, way) {
                // One side has said all it has to say: the other hears that, and may still answer.
                Ok(()) if !link.half.swap(true, Ordering::AcqRel) => link.finish(way),
                Ok(()) => link.over.store(true, Ordering::Release),
                // An error of either side ends both, as a link that is gone does.
                Err(_) => link.end(),
            }
            // The last handle is closed with this thread.
            lock(&state.links).retain(|link| !link.over.load(Ordering::Acquire));
        });
    }
}

/// One end of a connection.
pub(super) enum Side {
    Tcp(TcpStream),
    Unix(UnixStream),
}

pub(super) trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

impl Side {
    pub(super) fn connect(upstream: &Upstream) -> std::io::Result<Side> {
        match upstream {
            Upstream::Tcp(port) => {
                let stream = TcpStream::connect(("127.0.0.1", *port))?;
                stream.set_nodelay(true)?;
                stream.set_write_timeout(WRITE_TIMEOUT)?;
                Ok(Side::Tcp(stream))
            }
            Upstream::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_write_timeout(WRITE_TIMEOUT)?;
                Ok(Side::Unix(stream))
            }
        }
    }

    pub(super) fn try_clone(&self) -> std::io::Result<Side> {
        match self {
            Side::Tcp(stream) => stream.try_clone().map(Side::Tcp),
            Side::Unix(stream) => stream.try_clone().map(Side::Unix),
        }
    }

    pub(super) fn stream(&mut self) -> &mut dyn Stream {
        match self {
            Side::Tcp(stream) => stream,
            Side::Unix(stream) => stream,
        }
    }

    pub(super) fn end(&self) {
        match self {
            Side::Tcp(stream) => reset(stream),
            Side::Unix(stream) => drop(stream.shutdown(Shutdown::Both)),
        }
    }
}

/// Makes the kernel send RST instead of FIN once the last handle is closed, which whoever reads from it does now.
pub(super) fn reset(stream: &TcpStream) {
    let _ = set_socket_linger(stream, Some(Duration::ZERO));
    let _ = stream.shutdown(Shutdown::Read);
}
