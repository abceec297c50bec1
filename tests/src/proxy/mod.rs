//! A TCP proxy that breaks a link in the ways that links break. It stands between the sink and Redis, or between the sink
//! and Postgres, and is switched while connections are open.
//!
//! A [`Mode`] says how bytes of one direction pass; a [`Trap`] waits for a word in what the client sends, and strikes at
//! exactly that place: this is how a batch is applied while its answer gets lost, or a process is killed between the two.
//!
//! `link` is one connection and its two ends, `pump` how bytes pass through it.

mod link;
mod pump;

use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use rand::SeedableRng;
use rand::rngs::StdRng;

use link::{Link, Side, open, reset};

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
    /// As they come, but for one bit, anywhere, of one in so many reads.
    Flip(u32),
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
    /// The server gets what stands before the word, and from then on the link is a black hole: the rest comes through when it heals.
    StallBefore,
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
    flipped: AtomicU64,
    /// Decides which bits flip.
    rng: Mutex<StdRng>,
    links: Mutex<Vec<Arc<Link>>>,
    accepted: AtomicU64,
    refuse: AtomicBool,
    ended: AtomicBool,
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
            flipped: AtomicU64::new(0),
            rng: Mutex::new(StdRng::seed_from_u64(0)),
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

    /// From now on this decides which bits flip.
    pub fn seed(&self, seed: u64) {
        *lock(&self.state.rng) = StdRng::seed_from_u64(seed);
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

    /// How many bits have flipped.
    pub fn flipped(&self) -> u64 {
        self.state.flipped.load(Ordering::Acquire)
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
