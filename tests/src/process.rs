//! Child processes that never outlive the test, and the directories they live in.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, OnceLock, mpsc};
use std::time::Duration;

pub use rustix::process::Signal;
use rustix::process::{Pid, WaitId, WaitIdOptions, kill_process, waitid};

use crate::wait_for;

/// A server or the sink, with its output in a log file.
pub struct Process {
    name: String,
    log: PathBuf,
    child: Child,
}

impl Process {
    /// Starts `program` with `args`; stdout and stderr are appended to `log`. With `user`, as that user.
    pub fn start(name: &str, log: &Path, user: Option<&str>, command: &Command) -> Process {
        // The kernel ends the child when the test process dies in a way that runs no destructor. SIGQUIT is the
        // immediate shutdown of Postgres, and ends the others too, unless a shell that runs this in the background has it
        // ignored: that is inherited.
        let mut wrapped = Command::new("setpriv");
        wrapped.args(["--pdeathsig", "QUIT"]);
        if let Some(user) = user {
            wrapped.args([
                &format!("--reuid={user}"),
                &format!("--regid={}", group_of(user)),
                "--clear-groups",
            ]);
        }
        wrapped
            .args(["--", "env", "--default-signal=HUP,INT,QUIT"])
            .arg(command.get_program())
            .args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => wrapped.env(name, value),
                None => wrapped.env_remove(name),
            };
        }
        // A variable of whoever runs the tests, not of the servers' users.
        wrapped.env_remove("RUST_BACKTRACE");
        let out = File::options()
            .create(true)
            .append(true)
            .open(log)
            .expect("open the log");
        wrapped
            .stdin(Stdio::null())
            .stderr(out.try_clone().unwrap())
            .stdout(out)
            .current_dir("/");
        let child = spawn(wrapped);
        Process {
            name: name.to_owned(),
            log: log.to_owned(),
            child,
        }
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal; a process that has ended already is left alone. After SIGSTOP it is stopped: on a busy machine its other
    /// threads go on for a while until the first one has taken the signal.
    pub fn signal(&mut self, signal: Signal) {
        if self.exited().is_none() {
            let pid = Pid::from_raw(self.child.id() as i32).unwrap();
            kill_process(pid, signal).unwrap_or_else(|e| panic!("signal {}: {e}", self.name));
            if signal == Signal::STOP {
                // Who has ended meanwhile is no child that could stop, which is an error; nothing is to be done then.
                let _ = waitid(WaitId::Pid(pid), WaitIdOptions::STOPPED | WaitIdOptions::NOWAIT);
            }
        }
    }

    /// The exit status, if the process has ended.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("wait for a child")
    }

    /// Waits for the end of the process.
    pub fn wait(&mut self, deadline: Duration) -> ExitStatus {
        let what = format!("the end of {}", self.name);
        wait_for(deadline, what, || self.exited())
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.wait(Duration::from_secs(20));
    }

    /// Everything the process printed so far.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// The resident set size, and its highest value so far, in bytes.
    pub fn memory(&self) -> (u64, u64) {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap_or_default();
        let kib = |field: &str| {
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix(field))
                .unwrap_or("0");
            line.split_whitespace()
                .next()
                .and_then(|n| n.parse::<u64>().ok())
                .unwrap_or(0)
        };
        (kib("VmRSS:") * 1024, kib("VmHWM:") * 1024)
    }

    /// The processor time that it has taken so far.
    pub fn processor_time(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap_or_default();
        // Behind the name, which may have anything in it: the state, ten figures, and then the ticks in user and in kernel mode.
        let ticks = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .skip(11)
            .take(2);
        let ticks: u64 = ticks.filter_map(|ticks| ticks.parse::<u64>().ok()).sum();
        Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
    }

    /// How many files and sockets it has open.
    pub fn open_files(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).map_or(0, Iterator::count)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let output = self.output();
            let lines: Vec<&str> = output.lines().collect();
            eprintln!("--- the last lines of {} ({})", self.name, self.log.display());
            for line in &lines[lines.len().saturating_sub(25)..] {
                eprintln!("{line}");
            }
        }
        if self.exited().is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn group_of(user: &str) -> String {
    let output = Command::new("id").args(["-g", user]).output().expect("run id");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Starts a command from a thread that lives as long as this process. The kernel takes "the parent died" to mean the
/// thread that forked, and the threads of a test runner end with their test.
fn spawn(command: Command) -> Child {
    type Job = (Command, mpsc::Sender<std::io::Result<Child>>);
    static SPAWNER: OnceLock<Mutex<mpsc::Sender<Job>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, jobs) = mpsc::channel::<Job>();
        std::thread::spawn(move || {
            for (mut command, reply) in jobs {
                let _ = reply.send(command.spawn());
            }
        });
        Mutex::new(sender)
    });
    let program = format!("{command:?}");
    let (reply, answer) = mpsc::channel();
    spawner.lock().unwrap().send((command, reply)).unwrap();
    answer
        .recv()
        .unwrap()
        .unwrap_or_else(|e| panic!("start {program}: {e}"))
}

/// A temporary directory, removed on drop unless `WALMIRROR_KEEP` is set.
pub struct Dir(Option<tempfile::TempDir>);

static DIRS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Removes all directories there are: for a program that a signal ends.
pub fn remove_dirs() {
    for dir in DIRS.lock().unwrap_or_else(|e| e.into_inner()).drain(..) {
        let _ = fs::remove_dir_all(dir);
    }
}

impl Dir {
    /// Makes a directory. Its name is short because socket paths are limited to 107 bytes.
    pub fn new(kind: &str) -> Dir {
        let dir = tempfile::Builder::new()
            .prefix(&format!("wm-{kind}-"))
            .tempdir()
            .expect("make a directory");
        // Servers that run as another user must be able to enter it.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        DIRS.lock()
            .unwrap_or_else(|e| e.into_inner())
            .push(dir.path().to_owned());
        Dir(Some(dir))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.as_ref().expect("present until drop").path()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let path = self.path().to_owned();
        DIRS.lock()
            .unwrap_or_else(|e| e.into_inner())
            .retain(|dir| *dir != path);
        if std::env::var_os("WALMIRROR_KEEP").is_some()
            && let Some(dir) = self.0.take()
        {
            eprintln!("kept {}", dir.keep().display());
        }
    }
}
