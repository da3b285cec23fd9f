//! A terminal that passes every key on, and is what it was afterwards, in every case: at the
//! end, at an error, and at a panic.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use nix::sys::termios::{
    InputFlags, LocalFlags, SetArg, SpecialCharacterIndices, Termios, tcgetattr, tcsetattr,
};

/// What the terminal was before. A process has one at most.
static BEFORE: Mutex<Option<(OwnedFd, Termios)>> = Mutex::new(None);
static HOOK: Once = Once::new();

/// A terminal in raw mode, until this is dropped.
#[derive(Debug)]
pub struct Raw(());

impl Raw {
    /// Puts the terminal `tty` into raw mode; `None` if it is no terminal.
    ///
    /// Keys pass unseen and unchanged, those that send signals too. Output is still processed, so
    /// that a guest that ends its lines with a newline alone can be read.
    ///
    /// # Errors
    /// The terminal takes no settings.
    pub fn enter(tty: impl AsFd) -> io::Result<Option<Self>> {
        let set = |raw: &mut Termios| {
            raw.input_flags.remove(
                InputFlags::BRKINT
                    | InputFlags::ICRNL
                    | InputFlags::IGNCR
                    | InputFlags::INLCR
                    | InputFlags::ISTRIP
                    | InputFlags::IXON
                    | InputFlags::PARMRK,
            );
            raw.local_flags.remove(
                LocalFlags::ECHO
                    | LocalFlags::ECHONL
                    | LocalFlags::ICANON
                    | LocalFlags::IEXTEN
                    | LocalFlags::ISIG,
            );
            raw.control_chars[SpecialCharacterIndices::VMIN as usize] = 1;
            raw.control_chars[SpecialCharacterIndices::VTIME as usize] = 0;
        };
        Ok(change(&tty, set)?.then_some(Self(())))
    }
}

/// A terminal whose keys come at once and unseen, until this is dropped. Ctrl-C stays a signal.
#[derive(Debug)]
pub struct Keys(());

impl Keys {
    /// Sets up the terminal `tty`; `None` if it is no terminal.
    ///
    /// # Errors
    /// The terminal takes no settings.
    pub fn enter(tty: impl AsFd) -> io::Result<Option<Self>> {
        let set = |keys: &mut Termios| {
            keys.local_flags
                .remove(LocalFlags::ECHO | LocalFlags::ICANON);
        };
        Ok(change(&tty, set)?.then_some(Self(())))
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        restore();
    }
}

/// Changes a terminal's settings and keeps what they were; whether it is a terminal.
fn change(tty: &impl AsFd, set: impl FnOnce(&mut Termios)) -> io::Result<bool> {
    let Ok(before) = tcgetattr(tty) else {
        return Ok(false);
    };
    HOOK.call_once(|| {
        // A panic must be readable, and in a release it ends the process without any Drop.
        let next = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            restore();
            next(panic);
        }));
    });
    let mut now = before.clone();
    set(&mut now);
    *kept() = Some((tty.as_fd().try_clone_to_owned()?, before));
    if let Err(errno) = tcsetattr(tty, SetArg::TCSANOW, &now) {
        restore();
        return Err(errno.into());
    }
    Ok(true)
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

fn kept() -> MutexGuard<'static, Option<(OwnedFd, Termios)>> {
    BEFORE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes the terminal what it was, where a process ends without dropping what it has.
pub fn restore() {
    if let Some((tty, before)) = kept().take() {
        // The terminal may be gone.
        let _ = tcsetattr(&tty, SetArg::TCSANOW, &before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::pty::openpty;

    #[test]
    fn a_terminal_is_what_it_was_afterwards() {
        let pty = openpty(None, None).unwrap();
        let before = tcgetattr(&pty.slave).unwrap();
        assert!(before.local_flags.contains(LocalFlags::ICANON));
        let raw = Raw::enter(&pty.slave).unwrap().unwrap();
        let within = tcgetattr(&pty.slave).unwrap();
        let keys = LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG;
        assert!(!within.local_flags.intersects(keys));
        assert_eq!(within.output_flags, before.output_flags);
        drop(raw);
        assert_eq!(tcgetattr(&pty.slave).unwrap(), before);

        // Also when the thread that has it panics.
        let slave = pty.slave.try_clone().unwrap();
        let panicked = std::thread::spawn(move || {
            let raw = Raw::enter(&slave).unwrap();
            // Never dropped, as where a panic ends the process.
            std::mem::forget(raw);
            panic!("on purpose");
        });
        assert!(panicked.join().is_err());
        assert_eq!(tcgetattr(&pty.slave).unwrap(), before);
    }

    #[test]
    fn what_is_no_terminal_is_left_alone() {
        let file = tempfile::tempfile().unwrap();
        assert!(Raw::enter(&file).unwrap().is_none());
    }
}
