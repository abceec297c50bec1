//! How bytes pass: in the mode of their direction, until a trap finds its word among them.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use rand::Rng;

use super::link::{Link, Side};
use super::{Mode, State, Trap, Way, lock};

/// Copies one direction of one connection.
pub(super) fn pump(state: &State, link: &Link, way: Way) -> std::io::Result<()> {
    let (mut from, mut to) = match way {
        Way::ToServer => (Side::Tcp(link.client.try_clone()?), link.server.try_clone()?),
        Way::ToClient => (link.server.try_clone()?, Side::Tcp(link.client.try_clone()?)),
    };
    let mut buffer = vec![0; 64 * 1024];
    // What was sent last, for a word that is cut by the end of a read.
    let mut tail: Vec<u8> = Vec::new();
    while !link.over.load(Ordering::Acquire) {
        if !wait_while_silent(state, link, way) {
            return Ok(());
        }
        let read = match from.stream().read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        if !wait_while_silent(state, link, way) {
            return Ok(());
        }
        let bytes = &mut buffer[..read];
        flip(state, way, bytes);
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
        Trap::StallBefore => {
            forward(state, link, Way::ToServer, to, &bytes[..at])?;
            *lock(&state.modes) = [Mode::BlackHole; 2];
            state.sprung.fetch_add(1, Ordering::AcqRel);
            forward(state, link, Way::ToServer, to, &bytes[at..])
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
        if !wait_while_silent(state, link, way) {
            return Ok(());
        }
        let mode = lock(&state.modes)[way as usize];
        let (piece, pause) = match mode {
            Mode::Pass | Mode::BlackHole | Mode::Flip(_) => (bytes.len(), Duration::ZERO),
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

/// One bit of one in so many reads, where the mode is that.
fn flip(state: &State, way: Way, bytes: &mut [u8]) {
    let Mode::Flip(one_in) = lock(&state.modes)[way as usize] else {
        return;
    };
    let mut rng = lock(&state.rng);
    if rng.random_ratio(1, one_in) {
        let at = rng.random_range(0..bytes.len());
        bytes[at] ^= 1 << rng.random_range(0..8);
        state.flipped.fetch_add(1, Ordering::AcqRel);
    }
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

/// False: the link ended. Then nothing may pass any more, because what came before may have been kept back: TCP loses bytes at the
/// end of a stream, and never in the middle.
fn wait_while_silent(state: &State, link: &Link, way: Way) -> bool {
    let silent =
        || link.silent.load(Ordering::Acquire) || lock(&state.modes)[way as usize] == Mode::BlackHole;
    let over = || link.over.load(Ordering::Acquire);
    while silent() && !over() {
        thread::sleep(Duration::from_millis(5));
    }
    !over()
}
