//! The real broker, as `godwit` starts it, in a folder of the test's own.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::Pid;
use tempfile::TempDir;
use test_framework::keeper::Keeper;
use test_guest::Workload;

use super::{Ended, godwit, run};

const DEADLINE: Duration = Duration::from_secs(60);

/// A folder for a broker, which is started by whoever needs it. All of it ends with this.
pub struct Real {
    pub bus: PathBuf,
    _keeper: Keeper,
    folder: TempDir,
}

impl Real {
    pub fn new() -> Self {
        let folder = TempDir::new().unwrap();
        Self {
            bus: folder.path().join("godwit/bus"),
            _keeper: Keeper::of(&[folder.path()]).unwrap(),
            folder,
        }
    }

    /// A path for what a test needs.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// An empty disk.
    pub fn disk(&self, name: &str, mib: u64) -> PathBuf {
        let path = self.path(name);
        std::fs::File::create(&path)
            .unwrap()
            .set_len(mib << 20)
            .unwrap();
        path
    }

    /// The program with these words.
    pub fn command(&self, line: &str) -> Command {
        godwit(&self.bus, line)
    }

    /// Runs it to its end.
    pub fn run(&self, line: &str) -> Ended {
        run(self.command(line))
    }

    /// `run` of the bundled guest with this to do.
    pub fn guest(&self, workload: &Workload, line: &str) -> Command {
        let mut command = self.command("run --memory 64M");
        command.arg("--kernel").arg(test_guest::program());
        command.arg("--cmdline").arg(workload.to_string());
        command.args(line.split_whitespace());
        command
    }

    /// Kills the broker, and waits until it is gone.
    pub fn kill_broker(&self) {
        let stream = UnixStream::connect(&self.bus).unwrap();
        let broker = getsockopt(&stream, PeerCredentials).unwrap().pid();
        kill(Pid::from_raw(broker), Signal::SIGKILL).unwrap();
        eventually("the broker is gone", || {
            UnixStream::connect(&self.bus).is_err()
                && !Path::new(&format!("/proc/{broker}/fd/0")).exists()
        });
    }

    /// One machine as `show` has it.
    pub fn show(&self, name: &str) -> serde_json::Value {
        self.run(&format!("show {name} --json")).json()[0].take()
    }
}

/// Another broker, at whose door machines may come.
pub struct Other {
    pub door: String,
    folder: PathBuf,
    process: Child,
}

impl Other {
    pub fn start(real: &Real) -> Self {
        let program = Path::new(env!("CARGO_BIN_EXE_godwit")).with_file_name("godwit-broker");
        let path = real.path("door");
        let door = format!("unix:{}", path.display());
        let process = Command::new(program)
            .arg("--runtime-dir")
            .arg(real.path("other"))
            .args(["--migration-listen", &door])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        eventually("the other broker listens", || path.exists());
        let folder = real.path("other");
        Self {
            door,
            folder,
            process,
        }
    }

    /// Where it is called.
    pub fn bus(&self) -> PathBuf {
        self.folder.join("bus")
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Waits until something is true.
#[track_caller]
pub fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !is() {
        assert!(Instant::now() < end, "it never was that {what}");
        thread::sleep(Duration::from_millis(20));
    }
}
