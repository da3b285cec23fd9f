//! Starts the embedded broker.
//!
//! Its folder is that of its socket, which is named `bus` there. It gets a session of its own, so that it outlives this program and the terminal, and writes to
//! a file beside its socket. When two programs start one at the same time, the broker that comes
//! second ends, and both programs use the first.
#![expect(
    unsafe_code,
    reason = "the broker's session is made between fork and exec"
)]

use std::env;
use std::fs::{self, DirBuilder, File};
use std::future::Future;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use zbus::Connection;

use crate::error::{Failure, Result};

const PROGRAM: &str = "godwit-broker";
/// How a broker names its socket, in its folder.
const SOCKET: &str = "bus";
/// Where its output goes, beside its socket.
const LOG: &str = "broker.log";
/// How long it may take until it answers.
const DEADLINE: Duration = Duration::from_secs(15);
/// How long the other broker may take to answer, when ours ended because of it.
const OTHER_DEADLINE: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(10);
/// How much of its output is quoted when it fails.
const QUOTED: usize = 2000;

/// Starts a broker on `socket`, and connects to it by `connect`.
///
/// # Errors
/// It is not installed, or ended, or did not answer in time.
pub async fn start<F>(socket: &Path, mut connect: impl FnMut() -> F) -> Result<Connection>
where
    F: Future<Output = Result<Connection>>,
{
    let folder = match (socket.parent(), socket.file_name()) {
        (Some(folder), Some(name)) if name == SOCKET => folder,
        _ => {
            return Err(Failure::NotEmbeddable {
                socket: socket.into(),
            });
        }
    };
    let program = program()?;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(|source| Failure::NoFolder {
            folder: folder.into(),
            source,
        })?;
    let log = folder.join(LOG);
    let began = fs::metadata(&log).map_or(0, |file| file.len());
    let mut child = spawn(&program, folder, &log)?;
    let failed = |why: String| Failure::BrokerStart {
        program: program.clone(),
        why,
    };
    let mut end = Instant::now() + DEADLINE;
    let mut ended = None;
    loop {
        match connect().await {
            Err(Failure::NoBroker { .. }) => {}
            answer => return answer,
        }
        if ended.is_none()
            && let Ok(Some(status)) = child.try_wait()
        {
            ended = Some(status);
            end = Instant::now() + OTHER_DEADLINE;
        }
        if Instant::now() > end {
            return Err(failed(match ended {
                Some(status) => format!("it ended with {status}: {}", last_words(&log, began)),
                None => {
                    let seconds = DEADLINE.as_secs();
                    format!(
                        "it does not answer after {seconds} s; its log is {}",
                        log.display()
                    )
                }
            }));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Beside this program, or in PATH.
fn program() -> Result<PathBuf> {
    let beside = env::current_exe().ok();
    let beside = beside.as_deref().and_then(Path::parent).map(Path::to_owned);
    let path = env::var_os("PATH").unwrap_or_default();
    beside
        .into_iter()
        .chain(env::split_paths(&path))
        .map(|folder| folder.join(PROGRAM))
        .find(|program| program.is_file())
        .ok_or(Failure::NoBrokerProgram)
}

fn spawn(program: &Path, folder: &Path, log: &Path) -> Result<Child> {
    let unusable = || Failure::io(format!("{} cannot be written", log.display()));
    let output = File::options()
        .create(true)
        .append(true)
        .open(log)
        .map_err(unusable())?;
    let errors = output.try_clone().map_err(unusable())?;
    let mut command = Command::new(program);
    command
        .arg("--embedded")
        .arg("--runtime-dir")
        .arg(folder)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors);
    // SAFETY: setsid is async-signal-safe, and nothing else is done there.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            Ok(())
        })
    };
    command.spawn().map_err(Failure::io(format!(
        "{} cannot be started",
        program.display()
    )))
}

/// What was added to the log since it had `began` bytes, in short.
fn last_words(log: &Path, began: u64) -> String {
    let bytes = fs::read(log).unwrap_or_default();
    let new = usize::try_from(began).map_or(&[][..], |began| bytes.get(began..).unwrap_or(&bytes));
    let tail = &new[new.len().saturating_sub(QUOTED)..];
    let text = String::from_utf8_lossy(tail);
    match text.trim() {
        "" => "it said nothing".into(),
        text => text.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_new_broker_said_is_quoted() {
        let folder = tempfile::TempDir::new().unwrap();
        let log = folder.path().join(LOG);
        assert_eq!(last_words(&log, 0), "it said nothing");
        fs::write(&log, "old\nno KVM\n").unwrap();
        assert_eq!(last_words(&log, 4), "no KVM");
        assert_eq!(last_words(&log, 11), "it said nothing");
        // The file is another one by now.
        assert_eq!(last_words(&log, 100), "old\nno KVM");
    }
}
