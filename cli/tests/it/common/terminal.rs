//! A program on a terminal of its own, with a test as the person before it.
#![expect(
    unsafe_code,
    reason = "a child's terminal is set between fork and exec"
)]

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{Termios, tcgetattr};
use nix::unistd::Pid;

const DEADLINE: Duration = Duration::from_secs(60);

nix::ioctl_write_int_bad!(set_controlling_terminal, nix::libc::TIOCSCTTY);

/// A program on a terminal.
pub struct OnTerminal {
    child: Child,
    screen: String,
    output: Receiver<Vec<u8>>,
    keyboard: File,
    terminal: OwnedFd,
    before: Termios,
}

impl OnTerminal {
    /// Starts it.
    pub fn start(mut command: Command) -> Self {
        let pty = openpty(None, None).unwrap();
        let before = tcgetattr(&pty.slave).unwrap();
        let end = || pty.slave.try_clone().unwrap();
        command.stdin(end()).stdout(end()).stderr(end());
        // SAFETY: both calls are async-signal-safe; descriptor 0 is the terminal by then.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                set_controlling_terminal(std::io::stdin().as_raw_fd(), 0)?;
                Ok(())
            })
        };
        let child = command.spawn().unwrap();
        // It holds descriptors of the terminal.
        drop(command);
        let mut reader = File::from(pty.master.try_clone().unwrap());
        let (sender, output) = channel();
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut bytes) {
                if sender.send(bytes[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self {
            child,
            screen: String::new(),
            output,
            keyboard: pty.master.into(),
            terminal: pty.slave,
            before,
        }
    }

    /// Presses keys.
    pub fn press(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let process = Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        kill(process, signal).unwrap();
    }

    /// Waits until this is on the screen, and forgets what came before it.
    #[track_caller]
    pub fn see(&mut self, text: &str) {
        let end = Instant::now() + DEADLINE;
        loop {
            if let Some(at) = self.screen.find(text) {
                self.screen.drain(..at + text.len());
                return;
            }
            let left = end.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(bytes) => self.screen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(error) => panic!("{text:?} is not on the screen ({error}): {}", self.screen),
            }
        }
    }

    /// Whether keys come at once, as to a guest.
    pub fn is_raw(&self) -> bool {
        tcgetattr(&self.terminal).unwrap() != self.before
    }

    /// Waits for its end, after which the terminal is what it was.
    #[track_caller]
    pub fn end(mut self) -> ExitStatus {
        let end = Instant::now() + DEADLINE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > end {
                while let Ok(bytes) = self.output.try_recv() {
                    self.screen.push_str(&String::from_utf8_lossy(&bytes));
                }
                panic!("it does not end: {}", self.screen);
            }
            thread::sleep(Duration::from_millis(5));
        };
        assert!(
            !self.is_raw(),
            "the terminal was left as it is not to be left"
        );
        status
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
