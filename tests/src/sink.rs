//! The sink under test, as a process.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use crate::{DEADLINE, Dir, Process, Signal};

/// A `walmirror` process.
pub struct Sink {
    process: Process,
    dir: Dir,
    command: Command,
    /// The most memory of the processes that have ended, as far as it was read before their end.
    peak: u64,
}

impl Sink {
    /// Starts `walmirror` with these arguments.
    pub fn start(args: &[impl AsRef<OsStr>]) -> Sink {
        Sink::start_in(args, &[])
    }

    /// The same with variables of its environment.
    pub fn start_in(args: &[impl AsRef<OsStr>], environment: &[(String, String)]) -> Sink {
        let mut command = Sink::command(args);
        command.envs(environment.iter().cloned());
        Sink::of(command)
    }

    /// The same by way of a program that becomes it, such as `nohup`.
    pub fn start_by(program: &str, args: &[impl AsRef<OsStr>]) -> Sink {
        let mut command = Command::new(program);
        command.arg(binary()).args(args);
        Sink::of(command)
    }

    fn of(command: Command) -> Sink {
        let dir = Dir::new("sink");
        let process = Process::start("walmirror", &dir.path().join("log"), None, &command);
        Sink {
            process,
            dir,
            command,
            peak: 0,
        }
    }

    /// The command itself, for a test that wants to run it to its end.
    pub fn command(args: &[impl AsRef<OsStr>]) -> Command {
        let mut command = Command::new(binary());
        command.args(args);
        command
    }

    /// Runs it to its end and returns its exit code and what it printed.
    pub fn run(args: &[impl AsRef<OsStr>], deadline: Duration) -> (Option<i32>, String) {
        let mut sink = Sink::start(args);
        let status = sink.process.wait(deadline);
        (status.code(), sink.output())
    }

    /// Runs it to its end with this for its standard output: its exit code and what it said on the other one.
    pub fn run_into(args: &[impl AsRef<OsStr>], stdout: impl Into<Stdio>) -> (Option<i32>, String) {
        let mut command = Sink::command(args);
        let output = command.stdin(Stdio::null()).stdout(stdout).output();
        let output = output.expect("run walmirror");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), said)
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.memory_max();
        self.process.kill();
    }

    /// Starts it again with the same arguments.
    pub fn restart(&mut self) {
        assert!(self.process.exited().is_some(), "the sink still runs");
        self.process = Process::start("walmirror", &self.dir.path().join("log"), None, &self.command);
    }

    /// From the next start on this flag, which was given before, has another value.
    pub fn set(&mut self, flag: &str, value: &str) {
        let mut args: Vec<_> = self.command.get_args().map(OsStr::to_owned).collect();
        let at = args.iter().position(|arg| arg == flag).expect("it was given");
        args[at + 1] = value.into();
        let environment: Vec<_> = self
            .command
            .get_envs()
            .filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned())))
            .collect();
        self.command = Command::new(self.command.get_program());
        self.command.args(args).envs(environment);
    }

    /// SIGTERM, and the exit status.
    pub fn terminate(&mut self) -> ExitStatus {
        self.memory_max();
        self.process.signal(Signal::TERM);
        self.process.wait(DEADLINE)
    }

    /// Any signal.
    pub fn signal(&mut self, signal: Signal) {
        self.memory_max();
        self.process.signal(signal);
    }

    /// How it has ended, if it has.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.process.exited()
    }

    /// Waits for its end.
    pub fn wait(&mut self, deadline: Duration) -> ExitStatus {
        self.process.wait(deadline)
    }

    /// Fails the test when the sink has ended.
    pub fn assert_running(&mut self) {
        self.memory_max();
        if let Some(status) = self.process.exited() {
            panic!("the sink ended with {status}:\n{}", self.output());
        }
    }

    /// Everything it printed.
    pub fn output(&self) -> String {
        self.process.output()
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Resident memory now and at its highest, in bytes.
    pub fn memory(&self) -> (u64, u64) {
        self.process.memory()
    }

    /// The time that all its threads have spent so far.
    pub fn processor_time(&self) -> Duration {
        self.process.processor_time()
    }

    /// How many files and sockets it has open.
    pub fn open_files(&self) -> usize {
        self.process.open_files()
    }

    /// The most memory that any of its processes was seen to take, in bytes. Every look at the process and whatever ends it
    /// counts, because a process that has ended tells no more.
    pub fn memory_max(&mut self) -> u64 {
        self.peak = self.peak.max(self.process.memory().1);
        self.peak
    }
}

/// A standard output that nobody reads any more, as that of a command before `| head -1`.
pub fn unread() -> Stdio {
    let (reader, writer) = std::io::pipe().expect("make a pipe");
    drop(reader);
    writer.into()
}

/// A standard output on a full disk.
pub fn full_disk() -> Stdio {
    let disk = std::fs::File::options().write(true).open("/dev/full");
    disk.expect("open /dev/full").into()
}

fn binary() -> PathBuf {
    std::env::var_os("WALMIRROR_BIN")
        .expect("WALMIRROR_BIN is not set: run the tests with `make test`")
        .into()
}
