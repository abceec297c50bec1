//! As much of HTTP as probes and Prometheus speak: GET and HEAD, one request a connection. Small enough to see that nothing in it fails for
//! good: where there is no file descriptor for a client, it waits, and is taken when there is one.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How often the thread looks whether it should end, and tries again what failed.
const TICK: Duration = Duration::from_millis(200);
/// So long a client may take to ask, and to take the answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// A request is not longer than this.
const HEAD_MAX: usize = 8192;
/// Clients at once. Whoever comes then waits.
const CLIENTS_MAX: usize = 8;

/// What is sent back.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) kind: &'static str,
    pub(super) text: String,
}

/// What makes an answer of a path; None: of a method other than GET and HEAD.
pub(super) type Page = dyn Fn(Option<&str>) -> Answer + Send + Sync;

/// Answers until it is stopped.
pub(super) fn serve(listener: &TcpListener, stopped: &AtomicBool, page: &Arc<Page>) {
    let clients = Arc::new(AtomicUsize::new(0));
    let mut is_told = false;
    while !stopped.load(Ordering::Acquire) {
        if clients.load(Ordering::Acquire) >= CLIENTS_MAX {
            std::thread::sleep(TICK / 10);
            continue;
        }
        if !has_client(listener) {
            continue;
        }
        let taken = listener.accept().and_then(|(stream, _)| {
            let client = Client::new(stream, &clients);
            let page = Arc::clone(page);
            let thread = std::thread::Builder::new().name("admin client".to_owned());
            thread.spawn(move || client.answer(page.as_ref())).map(drop)
        });
        match taken {
            Ok(()) => is_told = false,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => {
                if !is_told {
                    tracing::warn!("the admin server cannot take a connection, and tries again: {error}");
                }
                is_told = true;
                std::thread::sleep(TICK);
            }
        }
    }
}

/// Waits for a client for a while.
fn has_client(listener: &TcpListener) -> bool {
    let timeout = Timespec {
        tv_sec: 0,
        tv_nsec: TICK.subsec_nanos().into(),
    };
    let mut fds = [PollFd::new(listener, PollFlags::IN)];
    poll(&mut fds, Some(&timeout)).is_ok_and(|ready| ready > 0)
}

/// Somebody who asks, counted as long as he is there.
struct Client {
    stream: TcpStream,
    clients: Arc<AtomicUsize>,
    deadline: Instant,
}

impl Client {
    fn new(stream: TcpStream, clients: &Arc<AtomicUsize>) -> Self {
        clients.fetch_add(1, Ordering::AcqRel);
        Self {
            stream,
            clients: Arc::clone(clients),
            deadline: Instant::now() + PATIENCE,
        }
    }

    /// Whoever asked may be gone, which is his own affair.
    fn answer(&self, page: &Page) {
        let Some(head) = self.read_head() else { return };
        let _ = self.stream.set_write_timeout(Some(PATIENCE));
        let mut stream = &self.stream;
        if stream.write_all(&reply(&head, page)).is_ok() && stream.shutdown(Shutdown::Write).is_ok() {
            // What is not read when the connection is closed resets it, and with it what the client has not read yet.
            let _ = self.read_some(&mut [0; 1024]);
        }
    }

    /// Everything up to the empty line; what stands behind it is of no interest.
    fn read_head(&self) -> Option<Vec<u8>> {
        let mut head = Vec::new();
        let mut piece = [0; 1024];
        while !is_whole(&head) {
            let count = self.read_some(&mut piece)?;
            head.extend_from_slice(piece.get(..count)?);
            if head.len() > HEAD_MAX {
                return None;
            }
        }
        Some(head)
    }

    /// None: there is nothing more, or the time is over.
    fn read_some(&self, piece: &mut [u8]) -> Option<usize> {
        let left = self.deadline.checked_duration_since(Instant::now())?;
        let left = left.max(Duration::from_millis(1));
        self.stream.set_read_timeout(Some(left)).ok()?;
        let mut stream = &self.stream;
        stream.read(piece).ok().filter(|count| *count > 0)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.clients.fetch_sub(1, Ordering::AcqRel);
    }
}

fn is_whole(head: &[u8]) -> bool {
    head.windows(4).any(|end| end == b"\r\n\r\n") || head.windows(2).any(|end| end == b"\n\n")
}

/// The whole answer to a request.
fn reply(head: &[u8], page: &Page) -> Vec<u8> {
    let line = head.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let mut words = line.trim_end().split(' ');
    let (method, target, version) = (words.next(), words.next(), words.next());
    let answer = match (method, target, version) {
        (Some(method), Some(target), Some(version)) if version.starts_with("HTTP/1.") => {
            let path = target.split('?').next();
            page(path.filter(|_| matches!(method, "GET" | "HEAD")))
        }
        _ => Answer {
            status: 400,
            kind: "text/plain; charset=utf-8",
            text: "not a request of HTTP/1.1\n".to_owned(),
        },
    };
    let Answer { status, kind, text } = answer;
    let reason = match status {
        200 => "OK",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        503 => "Service Unavailable",
        _ => "Internal Server Error",
    };
    let mut reply = format!(
        "HTTP/1.1 {status} {reason}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        text.len()
    );
    if method != Some("HEAD") {
        reply.push_str(&text);
    }
    reply.into_bytes()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn page(path: Option<&str>) -> Answer {
        Answer {
            status: if path.is_some() { 200 } else { 405 },
            kind: "text/plain",
            text: format!("{path:?}"),
        }
    }

    fn said(request: &str) -> String {
        String::from_utf8(reply(request.as_bytes(), &page)).unwrap()
    }

    #[test]
    fn a_path_is_answered_and_what_is_no_request_refused() {
        let got = said("GET /metrics?x=1 HTTP/1.1\r\nHost: h\r\n\r\n");
        assert!(
            got.starts_with("HTTP/1.1 200 OK\r\n") && got.ends_with("\r\n\r\nSome(\"/metrics\")"),
            "{got}"
        );
        let head = said("HEAD / HTTP/1.0\r\n\r\n");
        assert!(
            head.contains("Content-Length: 9\r\n") && head.ends_with("\r\n\r\n"),
            "{head}"
        );
        assert!(said("POST / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405 "));
        for request in [
            "",
            "GET\r\n\r\n",
            "GET /\r\n\r\n",
            "\u{16}\u{3}\u{1}\r\n\r\n",
            "GET / HTTP/2\r\n\r\n",
        ] {
            assert!(said(request).starts_with("HTTP/1.1 400 "), "{request:?}");
        }
    }

    /// Somebody who says nothing, and somebody who says half of it, keep nobody else waiting.
    #[test]
    fn who_is_slow_is_in_nobodys_way() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let stopped = Arc::new(AtomicBool::new(false));
        let (flag, answers): (_, Arc<Page>) = (Arc::clone(&stopped), Arc::new(page));
        let thread = std::thread::spawn(move || serve(&listener, &flag, &answers));
        let mut slow: Vec<TcpStream> = (0..CLIENTS_MAX - 1)
            .map(|_| TcpStream::connect(address).unwrap())
            .collect();
        for client in &mut slow {
            client.write_all(b"GET / HT").unwrap();
        }
        let started = Instant::now();
        for _ in 0..20 {
            let mut client = TcpStream::connect(address).unwrap();
            client.write_all(b"GET /a HTTP/1.1\r\n").unwrap();
            client.write_all(b"Host: h\r\n\r\n").unwrap();
            let mut text = String::new();
            client.read_to_string(&mut text).unwrap();
            assert!(text.ends_with("Some(\"/a\")"), "{text}");
        }
        assert!(started.elapsed() < PATIENCE, "{:?}", started.elapsed());
        stopped.store(true, Ordering::Release);
        thread.join().unwrap();
    }
}
