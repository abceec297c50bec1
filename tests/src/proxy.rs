//! A TCP proxy that breaks a link in the ways that links break. It stands between the sink and Redis, or between the sink
//! and Postgres, and is switched while connections are open.
//!
//! A [`Mode`] says how bytes of one direction pass; a [`Trap`] waits for a word in what the client sends, and strikes at
//! exactly that place: this is how a batch is applied while its answer gets lost, or a process is killed between the two.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::sockopt::set_socket_linger;

/// How long a write may take until the proxy looks whether the link is over.
const WRITE_TIMEOUT: Option<Duration> = Some(Duration::from_millis(100));

/// How bytes of one direction pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// As they come.
    Pass,
    /// Not at all, and nobody is told; they come through when the mode changes, as TCP would repeat them.
    BlackHole,
    /// Each read after a pause of this many milliseconds, and up to as many more.
    Delay(u64, u64),
    /// So many bytes a second.
    Throttle(usize),
    /// In pieces of so many bytes.
    Split(usize),
}

/// The two directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the sink to the server.
    ToServer,
    /// From the server to the sink.
    ToClient,
}

/// What happens, once, when the client sends a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trap {
    /// The connection is reset; the server gets what stands before the word.
    CutBefore,
    /// The server gets what stands before the word, and from then on the connection is silent.
    HoldBefore,
    /// The server gets everything; when it answers, the answer is thrown away and the connection reset.
    LoseReply,
    /// The server gets everything; when it answers, the answer is kept, and the connection stays open.
    HoldReply,
    /// Half of the answer, then a reset.
    HalfReply,
    /// One bit of the answer's first byte is another one.
    FlipReply,
}

/// Where the proxy connects to.
#[derive(Clone)]
enum Upstream {
    Tcp(u16),
    Unix(PathBuf),
}

struct Armed {
    trap: Trap,
    word: Vec<u8>,
}

struct State {
    modes: Mutex<[Mode; 2]>,
    armed: Mutex<Option<Armed>>,
    sprung: AtomicU64,
    passed: [AtomicU64; 2],
    links: Mutex<Vec<Arc<Link>>>,
    accepted: AtomicU64,
    refuse: AtomicBool,
    ended: AtomicBool,
}

/// One connection. What a trap does to it concerns no other.
struct Link {
    client: TcpStream,
    server: Side,
    half: AtomicBool,
    over: AtomicBool,
    silent: AtomicBool,
    reply: Mutex<Option<Trap>>,
}

/// The proxy; dropped, it ends all its connections.
pub struct Proxy {
    port: u16,
    upstream: Arc<Mutex<Upstream>>,
    state: Arc<State>,
}

impl Proxy {
    /// In front of a TCP port of the loopback interface.
    pub fn to_port(port: u16) -> Proxy {
        Proxy::start(Upstream::Tcp(port))
    }

    /// In front of a Unix socket.
    pub fn to_socket(path: PathBuf) -> Proxy {
        Proxy::start(Upstream::Unix(path))
    }

    fn start(upstream: Upstream) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let upstream = Arc::new(Mutex::new(upstream));
        let state = Arc::new(State {
            modes: Mutex::new([Mode::Pass; 2]),
            armed: Mutex::new(None),
            sprung: AtomicU64::new(0),
            passed: [AtomicU64::new(0), AtomicU64::new(0)],
            links: Mutex::new(Vec::new()),
            accepted: AtomicU64::new(0),
            refuse: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        });
        let (to, shared) = (Arc::clone(&upstream), Arc::clone(&state));
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if shared.ended.load(Ordering::Acquire) {
                    return;
                }
                shared.accepted.fetch_add(1, Ordering::AcqRel);
                let upstream = lock(&to).clone();
                match Side::connect(&upstream) {
                    Ok(server) if !shared.refuse.load(Ordering::Acquire) => open(&shared, client, server),
                    _ => reset(&client),
                }
            }
        });
        Proxy {
            port,
            upstream,
            state,
        }
    }

    /// The port that it listens on.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// From now on new connections go to another port: what a failover does behind one address.
    pub fn point_to_port(&self, port: u16) {
        *lock(&self.upstream) = Upstream::Tcp(port);
    }

    /// From now on new connections go to another socket.
    pub fn point_to_socket(&self, path: PathBuf) {
        *lock(&self.upstream) = Upstream::Unix(path);
    }

    /// Changes how one direction passes.
    pub fn set(&self, way: Way, mode: Mode) {
        lock(&self.state.modes)[way as usize] = mode;
    }

    /// Changes both directions.
    pub fn set_both(&self, mode: Mode) {
        *lock(&self.state.modes) = [mode; 2];
    }

    /// Everything passes again, and no trap is armed.
    pub fn heal(&self) {
        self.set_both(Mode::Pass);
        *lock(&self.state.armed) = None;
        self.state.refuse.store(false, Ordering::Release);
    }

    /// Resets all connections (SO_LINGER 0).
    pub fn cut(&self) {
        for link in lock(&self.state.links).drain(..) {
            link.end();
        }
    }

    /// Resets new connections too, until [`Proxy::heal`].
    pub fn refuse(&self) {
        self.state.refuse.store(true, Ordering::Release);
        self.cut();
    }

    /// Arms a trap for the next time that a client sends this word.
    pub fn arm(&self, trap: Trap, word: &str) {
        let word = word.as_bytes().to_vec();
        *lock(&self.state.armed) = Some(Armed { trap, word });
    }

    /// How many traps have done what they do.
    pub fn sprung(&self) -> u64 {
        self.state.sprung.load(Ordering::Acquire)
    }

    /// How many connections were accepted.
    pub fn accepted(&self) -> u64 {
        self.state.accepted.load(Ordering::Acquire)
    }

    /// How many bytes have passed in one direction.
    pub fn passed(&self, way: Way) -> u64 {
        self.state.passed[way as usize].load(Ordering::Acquire)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.state.ended.store(true, Ordering::Release);
        self.cut();
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

impl Link {
    fn end(&self) {
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

fn open(state: &Arc<State>, client: TcpStream, server: Side) {
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

/// Copies one direction of one connection.
fn pump(state: &State, link: &Link, way: Way) -> std::io::Result<()> {
    let (mut from, mut to) = match way {
        Way::ToServer => (Side::Tcp(link.client.try_clone()?), link.server.try_clone()?),
        Way::ToClient => (link.server.try_clone()?, Side::Tcp(link.client.try_clone()?)),
    };
    let mut buffer = vec![0; 64 * 1024];
    // What was sent last, for a word that is cut by the end of a read.
    let mut tail: Vec<u8> = Vec::new();
    while !link.over.load(Ordering::Acquire) {
        wait_while_silent(state, link, way);
        let read = match from.stream().read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        wait_while_silent(state, link, way);
        let bytes = &mut buffer[..read];
        match way {
            Way::ToServer => to_server(state, link, &mut to, bytes, &mut tail)?,
            Way::ToClient => to_client(state, link, &mut to, bytes)?,
        }
    }
    Ok(())
}

fn to_server(
    state: &State,
    link: &Link,
    to: &mut Side,
    bytes: &[u8],
    tail: &mut Vec<u8>,
) -> std::io::Result<()> {
    let Some((trap, at)) = strike(state, tail, bytes) else {
        return forward(state, link, Way::ToServer, to, bytes);
    };
    match trap {
        Trap::CutBefore | Trap::HoldBefore => {
            forward(state, link, Way::ToServer, to, &bytes[..at])?;
            state.sprung.fetch_add(1, Ordering::AcqRel);
            if trap == Trap::CutBefore {
                return Err(std::io::ErrorKind::ConnectionReset.into());
            }
            link.silent.store(true, Ordering::Release);
            Ok(())
        }
        reply => {
            *lock(&link.reply) = Some(reply);
            forward(state, link, Way::ToServer, to, bytes)
        }
    }
}

fn to_client(state: &State, link: &Link, to: &mut Side, bytes: &mut [u8]) -> std::io::Result<()> {
    let Some(trap) = lock(&link.reply).take() else {
        return forward(state, link, Way::ToClient, to, bytes);
    };
    let result = match trap {
        Trap::HoldReply => {
            link.silent.store(true, Ordering::Release);
            Ok(())
        }
        Trap::FlipReply => {
            bytes[0] ^= 1 << 4;
            forward(state, link, Way::ToClient, to, bytes)
        }
        Trap::HalfReply => {
            forward(state, link, Way::ToClient, to, &bytes[..bytes.len().div_ceil(2)])?;
            Err(std::io::ErrorKind::ConnectionReset.into())
        }
        _ => Err(std::io::ErrorKind::ConnectionReset.into()),
    };
    state.sprung.fetch_add(1, Ordering::AcqRel);
    result
}

/// The trap, if its word is in what was sent; and where in `bytes` the word begins.
fn strike(state: &State, tail: &mut Vec<u8>, bytes: &[u8]) -> Option<(Trap, usize)> {
    let mut armed = lock(&state.armed);
    let word = &armed.as_ref()?.word;
    let keep = word.len().saturating_sub(1);
    let before = tail.len();
    tail.extend_from_slice(bytes);
    let found = tail.windows(word.len()).position(|window| window == word);
    let drop = tail.len().saturating_sub(keep);
    tail.drain(..drop);
    let at = found?.saturating_sub(before);
    tail.clear();
    armed.take().map(|armed| (armed.trap, at))
}

fn forward(state: &State, link: &Link, way: Way, to: &mut Side, mut bytes: &[u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        wait_while_silent(state, link, way);
        let mode = lock(&state.modes)[way as usize];
        let (piece, pause) = match mode {
            Mode::Pass | Mode::BlackHole => (bytes.len(), Duration::ZERO),
            Mode::Delay(ms, jitter) => (
                bytes.len(),
                Duration::from_millis(ms + rand::random_range(0..=jitter)),
            ),
            Mode::Throttle(per_second) => {
                let piece = (per_second / 50).clamp(1, bytes.len());
                (piece, Duration::from_secs_f64(piece as f64 / per_second as f64))
            }
            Mode::Split(piece) => (piece.min(bytes.len()), Duration::ZERO),
        };
        pause_for(pause, link);
        let written = match to.stream().write(&bytes[..piece]) {
            Ok(written) => written,
            // Whoever reads slowly must not keep the proxy from ending.
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock && !link.over.load(Ordering::Acquire) => 0,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => 0,
            Err(e) => return Err(e),
        };
        state.passed[way as usize].fetch_add(written as u64, Ordering::AcqRel);
        bytes = &bytes[written..];
    }
    Ok(())
}

/// A slow link must not keep the proxy from ending.
fn pause_for(pause: Duration, link: &Link) {
    let until = Instant::now() + pause;
    while !link.over.load(Ordering::Acquire) {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        thread::sleep(left.min(Duration::from_millis(50)));
    }
}

fn wait_while_silent(state: &State, link: &Link, way: Way) {
    let silent =
        || link.silent.load(Ordering::Acquire) || lock(&state.modes)[way as usize] == Mode::BlackHole;
    while silent() && !link.over.load(Ordering::Acquire) {
        thread::sleep(Duration::from_millis(5));
    }
}

/// One end of a connection.
enum Side {
    Tcp(TcpStream),
    Unix(UnixStream),
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

impl Side {
    fn connect(upstream: &Upstream) -> std::io::Result<Side> {
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

    fn try_clone(&self) -> std::io::Result<Side> {
        match self {
            Side::Tcp(stream) => stream.try_clone().map(Side::Tcp),
            Side::Unix(stream) => stream.try_clone().map(Side::Unix),
        }
    }

    fn stream(&mut self) -> &mut dyn Stream {
        match self {
            Side::Tcp(stream) => stream,
            Side::Unix(stream) => stream,
        }
    }

    fn end(&self) {
        match self {
            Side::Tcp(stream) => reset(stream),
            Side::Unix(stream) => drop(stream.shutdown(Shutdown::Both)),
        }
    }
}

/// Makes the kernel send RST instead of FIN once the last handle is closed, which whoever reads from it does now.
fn reset(stream: &TcpStream) {
    let _ = set_socket_linger(stream, Some(Duration::ZERO));
    let _ = stream.shutdown(Shutdown::Read);
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
