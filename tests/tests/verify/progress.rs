//! What a person sees while a command reads: a bar on the terminal, nothing of it in the result, and none where nobody looks.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use walmirror_tests::{Mirror, Sink};

/// A terminal of 100 columns: the side that shows it, and the side that a process writes to.
fn terminal() -> (File, OwnedFd) {
    let shows = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&shows).unwrap();
    unlockpt(&shows).unwrap();
    let name = ptsname(&shows, Vec::new()).unwrap();
    let writes = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
    let size = Winsize {
        ws_row: 30,
        ws_col: 100,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(&writes, size).unwrap();
    (shows.into(), writes)
}

fn command(m: &Mirror, args: &[&str]) -> Command {
    let mut command = Sink::command(&m.arguments(args));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .env("TERM", "xterm");
    command
}

/// Its standard output, and what stood on the terminal that was its standard error.
fn on_a_terminal(m: &Mirror, args: &[&str]) -> (String, String) {
    let (mut shows, writes) = terminal();
    let child = {
        let mut command = command(m, args);
        command.stderr(writes);
        // With the command our copy of the terminal goes, so that there is an end to be read.
        command.spawn().unwrap()
    };
    let reader = std::thread::spawn(move || {
        let (mut shown, mut piece) = (Vec::new(), [0; 4096]);
        // Where the other side is closed it is an error.
        while let Ok(count @ 1..) = shows.read(&mut piece) {
            shown.extend_from_slice(&piece[..count]);
        }
        shown
    });
    let output = child.wait_with_output().unwrap();
    let shown = String::from_utf8(reader.join().unwrap()).unwrap();
    assert!(output.status.success(), "{shown}");
    (String::from_utf8(output.stdout).unwrap(), shown)
}

/// The same into pipes.
fn into_pipes(m: &Mirror, args: &[&str]) -> (String, String) {
    let output = command(m, args).stderr(Stdio::piped()).output().unwrap();
    let [stdout, stderr] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    assert!(output.status.success(), "{stderr}");
    (stdout, stderr)
}

/// The per cents that were drawn behind these words.
fn drawn(shown: &str, words: &str) -> Vec<u32> {
    let lines = shown.split(['\r', '\n']).filter(|line| line.contains(words));
    lines
        .filter_map(|line| line.split_once('%')?.0.rsplit(' ').next()?.parse().ok())
        .collect()
}

/// Lines that control nothing.
fn is_plain(text: &str) -> bool {
    !text.contains(['\r', '\u{1b}'])
}

#[test]
fn a_bar_on_a_terminal_and_nowhere_else() {
    let m = Mirror::with(
        "CREATE TABLE large (id int PRIMARY KEY, v text); INSERT INTO large SELECT i, repeat('v', 100) FROM generate_series(1, 60000) i; \
         ANALYZE large; SELECT walmirror.mirror('large')",
    );
    for (args, words, result) in [
        (
            &["verify"][..],
            "verify public.large",
            "public.large: 60000 rows, 60000 keys: equal\n",
        ),
        (
            &["backfill", "--table", "large"],
            "public.large",
            "public.large: filled again\n",
        ),
    ] {
        let (stdout, shown) = on_a_terminal(&m, args);
        let percents = drawn(&shown, words);
        println!("{args:?}: {percents:?}");
        assert!(
            !percents.is_empty() && percents.is_sorted(),
            "{percents:?} in {shown:?}"
        );
        assert!(stdout.starts_with(result) && is_plain(&stdout), "{stdout:?}");
        // The bar is wiped away in the end.
        let last = shown.rfind('%').unwrap();
        assert!(shown[last..].contains("\u{1b}[2K"), "{shown:?}");

        let (stdout, stderr) = into_pipes(&m, args);
        assert!(stdout.starts_with(result) && is_plain(&stdout), "{stdout:?}");
        assert!(is_plain(&stderr) && !stderr.contains('%'), "{stderr:?}");
    }
}
