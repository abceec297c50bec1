//! The pages over HTTP, by hyper, one request a connection. Connections are taken here, so that what keeps one from being taken ends
//! nothing: where there is no file descriptor for a client, it waits, and is taken when there is one.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

/// How often the thread looks whether it should end, and tries again what failed.
const TICK: Duration = Duration::from_millis(200);
/// So long a client may take to ask and to take the answer.
const PATIENCE: Duration = Duration::from_secs(5);
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

/// Listens, and has what it takes to answer.
pub(super) fn listen(address: SocketAddr) -> io::Result<(Runtime, TcpListener)> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let listener = runtime.block_on(TcpListener::bind(address))?;
    Ok((runtime, listener))
}

/// Answers until it is stopped.
pub(super) fn serve(runtime: &Runtime, listener: &TcpListener, stopped: &AtomicBool, page: &Arc<Page>) {
    runtime.block_on(async {
        let clients = Arc::new(Semaphore::new(CLIENTS_MAX));
        let mut is_told = false;
        while !stopped.load(Ordering::Acquire) {
            let Ok(Ok(place)) = timeout(TICK, Arc::clone(&clients).acquire_owned()).await else {
                continue;
            };
            match timeout(TICK, listener.accept()).await {
                Err(_) => {}
                Ok(Ok((stream, _))) => {
                    is_told = false;
                    let page = Arc::clone(page);
                    tokio::spawn(async move {
                        // Whoever asked may be gone, or say nothing more, which is his own affair.
                        let _ = timeout(PATIENCE, answer(stream, page)).await;
                        drop(place);
                    });
                }
                Ok(Err(error)) => {
                    if !is_told {
                        tracing::warn!("the admin server cannot take a connection, and tries again: {error}");
                    }
                    is_told = true;
                    sleep(TICK).await;
                }
            }
        }
    });
}

async fn answer(stream: TcpStream, page: Arc<Page>) -> hyper::Result<()> {
    let service = service_fn(|request: Request<Incoming>| {
        let is_read = matches!(*request.method(), Method::GET | Method::HEAD);
        let answer = page(is_read.then(|| request.uri().path()));
        std::future::ready(response(answer))
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service)
        .await
}

fn response(answer: Answer) -> Result<Response<Full<Bytes>>, hyper::http::Error> {
    let Answer { status, kind, text } = answer;
    Response::builder()
        .status(status)
        .header(CONTENT_TYPE, kind)
        .body(Full::from(text))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::time::Instant;

    use super::*;

    fn page(path: Option<&str>) -> Answer {
        Answer {
            status: if path.is_some() { 200 } else { 405 },
            kind: "text/plain",
            text: format!("{path:?}"),
        }
    }

    /// With a server, and its address.
    fn served(test: impl FnOnce(SocketAddr)) {
        let (runtime, listener) = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let stopped = Arc::new(AtomicBool::new(false));
        let (flag, answers): (_, Arc<Page>) = (Arc::clone(&stopped), Arc::new(page));
        let thread = std::thread::spawn(move || serve(&runtime, &listener, &flag, &answers));
        test(address);
        stopped.store(true, Ordering::Release);
        thread.join().unwrap();
    }

    fn said(address: SocketAddr, request: &str) -> String {
        let mut client = TcpStream::connect(address).unwrap();
        client.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn a_path_is_answered_and_what_is_no_request_refused() {
        served(|address| {
            let got = said(address, "GET /metrics?x=1 HTTP/1.1\r\nHost: h\r\n\r\n");
            assert!(
                got.starts_with("HTTP/1.1 200 OK\r\n") && got.ends_with("\r\n\r\nSome(\"/metrics\")"),
                "{got}"
            );
            let head = said(address, "HEAD / HTTP/1.0\r\n\r\n");
            assert!(
                head.contains("content-length: 9\r\n") && head.ends_with("\r\n\r\n"),
                "{head}"
            );
            assert!(said(address, "POST / HTTP/1.1\r\nHost: h\r\n\r\n").starts_with("HTTP/1.1 405 "));
            for request in ["GET\r\n\r\n", "\u{16}\u{3}\u{1}\r\n\r\n"] {
                assert!(said(address, request).starts_with("HTTP/1.1 400 "), "{request:?}");
            }
        });
    }

    /// Somebody who says nothing, and somebody who says half of it, keep nobody else waiting.
    #[test]
    fn who_is_slow_is_in_nobodys_way() {
        served(|address| {
            let mut slow: Vec<TcpStream> = (0..CLIENTS_MAX - 1)
                .map(|_| TcpStream::connect(address).unwrap())
                .collect();
            for client in slow.iter_mut().skip(1) {
                client.write_all(b"GET / HT").unwrap();
            }
            let started = Instant::now();
            for _ in 0..20 {
                let text = said(address, "GET /a HTTP/1.1\r\nHost: h\r\n\r\n");
                assert!(text.ends_with("Some(\"/a\")"), "{text}");
            }
            assert!(started.elapsed() < PATIENCE, "{:?}", started.elapsed());
        });
    }

    /// The place of one who is too slow is somebody else's.
    #[test]
    fn who_is_too_slow_goes() {
        served(|address| {
            let slow: Vec<TcpStream> = (0..CLIENTS_MAX)
                .map(|_| TcpStream::connect(address).unwrap())
                .collect();
            let text = said(address, "GET /a HTTP/1.1\r\nHost: h\r\n\r\n");
            assert!(text.ends_with("Some(\"/a\")"), "{text}");
            drop(slow);
        });
    }
}
