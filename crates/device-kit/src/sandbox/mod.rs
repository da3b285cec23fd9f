//! The sandbox: all rights that serving a guest does not need are given up.
//!
//! It is entered by the main thread when everything that options name is open, before any other
//! thread exists (all inherit it) and before the first byte of a guest is read. Then this process
//! - has no capabilities and cannot gain any (no_new_privs, empty bounding set);
//! - reaches no file, no network and no abstract socket by name (Landlock, where the kernel has it);
//! - makes only the system calls of [`seccomp`], all others fail with EPERM.

mod seccomp;

use std::io;

use landlock::{
    ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetError, RulesetStatus, Scope,
};
use thiserror::Error;

/// Why the sandbox could not be entered.
#[derive(Debug, Error)]
pub(crate) enum SandboxError {
    #[error("no_new_privs cannot be set")]
    NoNewPrivs(#[source] io::Error),
    #[error("capabilities cannot be dropped")]
    Capabilities(#[source] io::Error),
    #[error("Landlock cannot be set up")]
    Landlock(#[from] RulesetError),
    #[error("the seccomp filter cannot be installed")]
    Seccomp(#[from] seccompiler::Error),
    #[error("the seccomp filter cannot be compiled")]
    Filter(#[from] seccompiler::BackendError),
}

/// Restricts the calling thread, and every thread that it starts from now on, for good. `ioctls`
/// are the requests that the device makes.
pub(crate) fn enter(ioctls: &[u32]) -> Result<(), SandboxError> {
    nix::sys::prctl::set_no_new_privs().map_err(|error| SandboxError::NoNewPrivs(error.into()))?;
    drop_capabilities().map_err(SandboxError::Capabilities)?;
    leave_files()?;
    for filter in seccomp::filters(ioctls)? {
        seccompiler::apply_filter(&filter)?;
    }
    Ok(())
}

/// Nothing can be reached by name. Kernels without Landlock, or with less of it, restrict what they
/// can; the seccomp filter has no call that would open anything.
fn leave_files() -> Result<(), SandboxError> {
    let abi = ABI::V6;
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?
        .restrict_self()?;
    if status.ruleset != RulesetStatus::FullyEnforced {
        tracing::warn!(status = ?status.ruleset, "this kernel's Landlock is not complete");
    }
    Ok(())
}

/// Empties all capability sets of this thread.
#[expect(unsafe_code, reason = "capset has no safe wrapper")]
fn drop_capabilities() -> io::Result<()> {
    // Highest number first: the kernel says which do not exist. Dropping from the bounding set
    // itself needs a capability; without it there is nothing that the set could give back.
    for capability in (0..64).rev() {
        // SAFETY: numbers only.
        unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
    }
    // SAFETY: numbers only. Kernels without ambient capabilities have none to clear.
    unsafe {
        libc::prctl(
            libc::PR_CAP_AMBIENT,
            libc::PR_CAP_AMBIENT_CLEAR_ALL,
            0,
            0,
            0,
        )
    };
    /// _LINUX_CAPABILITY_VERSION_3, whose data is two times three words.
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0];
    let none = [0u32; 6];
    let mut held = none;
    // SAFETY: both arrays have the size that this version asks for; the kernel writes the second.
    let known = unsafe { libc::syscall(libc::SYS_capget, header.as_ptr(), held.as_mut_ptr()) };
    if known == 0 && held == none {
        // Where whoever started us has dropped them, capset itself may be refused as well.
        return Ok(());
    }
    // SAFETY: both arrays have the size that this version asks for and are only read.
    if unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::thread;

    use nix::errno::Errno;

    use super::*;

    /// Runs in a thread that entered the sandbox; the rest of the test's process did not.
    fn inside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
        thread::spawn(move || {
            enter(&[]).unwrap();
            work()
        })
        .join()
        .unwrap()
    }

    #[test]
    fn nothing_can_be_opened_or_connected() {
        let (open, socket, exec) = inside(|| {
            (
                File::open("/etc/hostname").unwrap_err().raw_os_error(),
                UnixStream::connect("/nowhere").unwrap_err().raw_os_error(),
                nix::unistd::execve::<&std::ffi::CStr, &std::ffi::CStr>(c"/bin/true", &[], &[]),
            )
        });
        assert_eq!(open, Some(libc::EPERM));
        assert_eq!(socket, Some(libc::EPERM));
        assert_eq!(exec.unwrap_err(), Errno::EPERM);
    }

    #[test]
    fn a_runtime_works_and_opens_nothing() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let error = thread::spawn(move || {
            enter(&[]).unwrap();
            runtime.block_on(async {
                let stream = tokio::net::UnixStream::from_std(ours).unwrap();
                let pause = std::time::Duration::from_millis(1);
                let read = tokio::time::timeout(pause, stream.readable());
                assert!(read.await.is_err());
                stream.writable().await.unwrap();
            });
            File::open("/etc/hostname").unwrap_err()
        })
        .join()
        .unwrap();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
        drop(theirs);
    }

    #[test]
    fn landlock_alone_refuses_files() {
        let error = thread::spawn(|| {
            leave_files().unwrap();
            File::open("/etc/hostname").unwrap_err()
        })
        .join()
        .unwrap();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn no_capability_is_left() {
        let status = thread::spawn(|| {
            nix::sys::prctl::set_no_new_privs().unwrap();
            drop_capabilities().unwrap();
            std::fs::read_to_string("/proc/thread-self/status").unwrap()
        })
        .join()
        .unwrap();
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert!(
                status.contains(&format!("{set}:\t0000000000000000")),
                "{status}"
            );
        }
        assert!(status.contains("NoNewPrivs:\t1"));
    }

    #[test]
    fn what_serving_needs_still_works() {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("s")).unwrap();
        let client = UnixStream::connect(folder.path().join("s")).unwrap();
        let memory = nix::sys::memfd::memfd_create(c"guest", nix::sys::memfd::MFdFlags::empty());
        let file = File::from(memory.unwrap());
        file.set_len(8192).unwrap();
        inside(move || {
            let (stream, _) = listener.accept().unwrap();
            stream
                .set_read_timeout(Some(std::time::Duration::from_millis(1)))
                .unwrap();
            let mapping = crate::memory::SharedMapping::new(&file, 0, 8192).unwrap();
            mapping
                .word16(4096)
                .store(7, std::sync::atomic::Ordering::Relaxed);
            drop(mapping);
            thread::spawn(|| ()).join().unwrap();
            nix::sys::memfd::memfd_create(c"x", nix::sys::memfd::MFdFlags::empty()).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(1));
        });
        drop(client);
    }
}
