//! Workloads of a stock Linux guest in a host, whatever VMM runs it.
//!
//! A workload makes a disk and a tap, starts the device processes and the VMM that [`Launch`]
//! gives, moves data in and out, and checks what the guest printed against what the host saw.

use std::time::Duration;

use crate::host::Host;
use crate::job::Output;
use crate::{Error, Result};

const COMMON_SCRIPT: &str = include_str!("linux_guest/common.sh");
const IO_SCRIPT: &str = include_str!("linux_guest/io.sh");
const DEBIAN_SCRIPT: &str = include_str!("linux_guest/debian.sh");

/// Half a minute to a minute on two idle cores; this is for busy ones.
const DEADLINE: Duration = Duration::from_secs(420);

/// Shell commands that start the processes of a machine. They run in the host and find in the
/// environment `DISK` (raw image), `TAP` (interface, up), `BLK_SOCKET` and `NET_SOCKET` (where to
/// listen), `KERNEL` (bzImage), `KERNEL_ELF` (the same kernel as ELF with a PVH note), `INITRD` and
/// `CMDLINE` (as one word).
#[derive(Clone, Debug)]
pub struct Launch {
    /// Serves the disk on `BLK_SOCKET`.
    pub disk: String,
    /// Serves the network on `NET_SOCKET`; none if the VMM opens the tap itself.
    pub network: Option<String>,
    /// Runs the guest with its serial console on standard output, with two vCPUs, through a
    /// reboot, until it powers off; then its exit status is 0.
    pub vmm: String,
}

impl Launch {
    fn script(&self, workload: &str) -> String {
        // The shell replaces itself by the program, so that killing the one ends the other.
        format!(
            "start_disk() {{ exec {}; }}\n\
             start_network() {{ exec {}; }}\n\
             run_vmm() {{ {}; }}\n\
             NETWORK_PROCESS={}\n\
             {COMMON_SCRIPT}\n{workload}",
            self.disk,
            self.network.as_deref().unwrap_or_default(),
            self.vmm,
            if self.network.is_some() { "yes" } else { "" },
        )
    }
}

/// The guest mounts ext4 on its disk, writes, syncs, reads back, reboots and reads again; then it
/// pings the host, moves 64 MiB by TCP each way, and powers off.
///
/// # Errors
///
/// When any of it did not happen, or a byte arrived changed.
pub fn io(host: &mut Host, launch: &Launch) -> Result<()> {
    let output = host.run_for(&launch.script(IO_SCRIPT), DEADLINE)?;
    let lines = Lines::of(&output);
    lines.expect_count("L2-BOOT 2 CPUs", 2)?;
    lines.expect_count("L2-DISK written 8 files", 1)?;
    lines.expect_count("L2-DISK kept 8 files", 1)?;
    lines.expect_count("L2-PING", 1)?;
    lines.expect_same("L2-SENT", "HOST-TAKEN")?;
    lines.expect_same("L2-RECEIVED", "HOST-GIVEN")?;
    lines.expect_count("L2-DONE", 1)?;
    lines.expect_count("HOST-DISK clean", 1)?;
    lines.expect_count("HOST-VMM 0", 1)
}

/// The stock Debian disk boots with systemd, says so, and powers off.
///
/// # Errors
///
/// When any of it did not happen.
pub fn debian(host: &mut Host, launch: &Launch) -> Result<()> {
    let output = host.run_for(&launch.script(DEBIAN_SCRIPT), DEADLINE)?;
    let lines = Lines::of(&output);
    lines.expect_count("L2-DEBIAN systemd on /dev/vda", 1)?;
    lines.expect_count("HOST-DISK clean", 1)?;
    lines.expect_count("HOST-VMM 0", 1)
}

/// What host and guest printed, line by line.
struct Lines<'a> {
    output: &'a Output,
    lines: Vec<&'a str>,
}

impl<'a> Lines<'a> {
    fn of(output: &'a Output) -> Self {
        Self {
            output,
            // The guest's lines end with a carriage return, and firmware leaves escapes in front.
            lines: output.stdout.lines().map(str::trim_end).collect(),
        }
    }

    /// Lines with the prefix, and what follows it.
    fn after(&self, prefix: &str) -> Vec<&'a str> {
        let found = |line: &&'a str| Some(line[line.find(prefix)? + prefix.len()..].trim());
        self.lines.iter().filter_map(found).collect()
    }

    fn expect_count(&self, prefix: &str, count: usize) -> Result<()> {
        match self.after(prefix).len() {
            found if found == count => Ok(()),
            found => Err(self.error(format!("`{prefix}` came {found} times, not {count}"))),
        }
    }

    fn expect_same(&self, one: &str, other: &str) -> Result<()> {
        match (self.after(one).as_slice(), self.after(other).as_slice()) {
            ([a], [b]) if a == b && a.len() == 64 => Ok(()),
            (a, b) => Err(self.error(format!("{one} is {a:?} and {other} is {b:?}"))),
        }
    }

    fn error(&self, reason: String) -> Error {
        Error::Workload {
            reason,
            output: format!("{}{}", self.output.stdout, self.output.stderr),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(stdout: &str) -> Output {
        Output {
            status: 0,
            stdout: stdout.to_owned(),
            stderr: String::new(),
        }
    }

    #[test]
    fn lines_are_found_behind_escapes_and_before_carriage_returns() {
        let output = output("\x1b[2JL2-BOOT 2 CPUs, 7.2\r\nL2-BOOT 2 CPUs, 7.2\r\n");
        let lines = Lines::of(&output);
        assert!(lines.expect_count("L2-BOOT 2 CPUs", 2).is_ok());
        assert!(lines.expect_count("L2-BOOT 1 CPUs", 2).is_err());
        assert!(lines.expect_count("L2-BOOT", 1).is_err());
    }

    #[test]
    fn sums_must_be_there_whole_and_equal() {
        let sum = "a".repeat(64);
        let good = output(&format!("L2-SENT {sum}\r\nHOST-TAKEN {sum}\n"));
        assert!(
            Lines::of(&good)
                .expect_same("L2-SENT", "HOST-TAKEN")
                .is_ok()
        );
        let other = output(&format!("L2-SENT {sum}\r\nHOST-TAKEN b{}\n", &sum[1..]));
        assert!(
            Lines::of(&other)
                .expect_same("L2-SENT", "HOST-TAKEN")
                .is_err()
        );
        let missing = output("nothing");
        assert!(
            Lines::of(&missing)
                .expect_same("L2-SENT", "HOST-TAKEN")
                .is_err()
        );
    }
}
