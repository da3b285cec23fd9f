//! Boots the guest in QEMU on /dev/kvm, so that the guest itself is known to be right before it
//! judges anything of ours.

use anyhow::{Context, Result, bail, ensure};
use std::io::{BufRead, BufReader, Write};
use std::net::UdpSocket;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};
use test_guest::{Activate, BlkMode, Idle, NetMode, Report, Workload, command};

/// For a whole run; generous, for the machine may be busy.
const DEADLINE: Duration = Duration::from_secs(90);
const DISK_BYTES: u64 = 16 << 20;

enum Machine {
    /// ECAM by MCFG, BARs placed by firmware, ACPI fixed hardware.
    Q35,
    /// No MCFG, BARs placed by the guest, hardware-reduced ACPI.
    Microvm,
}

impl Machine {
    fn arguments(&self) -> &[&str] {
        match self {
            Self::Q35 => &["-M", "q35,accel=kvm", "-bios", "qboot.rom"],
            Self::Microvm => &["-M", "microvm,pcie=on,accel=kvm"],
        }
    }

    /// What the guest cannot find out by itself.
    fn workload(&self) -> Workload {
        let workload = Workload {
            poweroff: true,
            ..Workload::default()
        };
        match self {
            Self::Q35 => workload,
            Self::Microvm => Workload {
                slp_typ: 5,
                ecam_mib: 3584,
                ..workload
            },
        }
    }
}

/// A running QEMU and the lines of its guest.
struct Qemu {
    process: Child,
    lines: Receiver<String>,
    deadline: Instant,
}

impl Qemu {
    fn start(machine: &Machine, workload: &Workload, arguments: &[String]) -> Result<Self> {
        ensure!(
            Path::new("/dev/kvm").exists(),
            "there is no /dev/kvm: load the kvm module of this processor"
        );
        let mut process = Command::new("qemu-system-x86_64")
            .args(machine.arguments())
            .args([
                "-cpu",
                "host,-arch-capabilities",
                "-m",
                "256",
                "-nodefaults",
                "-display",
                "none",
                "-serial",
                "stdio",
            ])
            .arg("-kernel")
            .arg(test_guest::program())
            .args(["-append", &workload.to_string()])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("qemu-system-x86_64 does not start: install the package qemu-system-x86")?;
        let output = process.stdout.take().context("no stdout")?;
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            process,
            lines,
            deadline: Instant::now() + DEADLINE,
        })
    }

    /// The next report; `None` when the machine is gone.
    fn report(&mut self) -> Result<Option<Report>> {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    if let Some(report) = Report::parse(&line)? {
                        return Ok(Some(report));
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) => {
                    bail!("the guest said nothing more within {DEADLINE:?}")
                }
            }
        }
    }

    fn wait_for(&mut self, what: &str, wanted: impl Fn(&Report) -> bool) -> Result<Report> {
        while let Some(report) = self.report()? {
            if wanted(&report) {
                return Ok(report);
            }
        }
        bail!("the machine ended before {what}")
    }

    fn command(&mut self, command: &str) -> Result<()> {
        Ok(self
            .process
            .stdin
            .as_mut()
            .context("no stdin")?
            .write_all(command.as_bytes())?)
    }

    /// All reports up to the end of the machine.
    fn rest(&mut self) -> Result<Vec<Report>> {
        let mut reports = Vec::new();
        while let Some(report) = self.report()? {
            reports.push(report);
        }
        ensure!(self.process.wait()?.success(), "QEMU failed");
        Ok(reports)
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Already gone when all went well.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn disk(folder: &Path) -> Result<Vec<String>> {
    let path = folder.join("disk");
    std::fs::File::create(&path)?.set_len(DISK_BYTES)?;
    Ok(vec![
        "-drive".into(),
        format!("file={},if=none,id=disk,format=raw", path.display()),
        "-device".into(),
        "virtio-blk-pci,drive=disk,serial=first,disable-legacy=on,num-queues=2".into(),
    ])
}

/// A network whose other end is this process: QEMU's user network carries UDP to the loopback.
fn network() -> Result<(u16, Vec<String>)> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    let port = socket.local_addr()?.port();
    thread::spawn(move || {
        let mut packet = [0; 2048];
        while let Ok((length, from)) = socket.recv_from(&mut packet) {
            if socket.send_to(&packet[..length], from).is_err() {
                return;
            }
        }
    });
    let arguments = [
        "-netdev",
        "user,id=net,net=10.77.0.0/24,host=10.77.0.1",
        "-device",
        "virtio-net-pci,netdev=net,disable-legacy=on,romfile=",
    ];
    Ok((port, arguments.map(String::from).to_vec()))
}

fn two_cpus() -> Vec<String> {
    vec!["-smp".into(), "2".into()]
}

fn verify_disk(machine: &Machine, idle: Idle) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let workload = Workload {
        blk: BlkMode::Verify,
        blk_mib: 2,
        heartbeat: 20,
        idle,
        ..machine.workload()
    };
    let arguments = [two_cpus(), disk(folder.path())?, vec!["-no-reboot".into()]].concat();
    let reports = Qemu::start(machine, &workload, &arguments)?.rest()?;

    assert_eq!(reports.first(), Some(&Report::First {}), "{reports:?}");
    let has = |wanted: fn(&Report) -> bool| assert!(reports.iter().any(wanted), "{reports:?}");
    has(|report| {
        matches!(
            report,
            Report::Up {
                cpus: 2,
                mem_mib: 250..=256,
                ..
            }
        )
    });
    has(|report| matches!(report, Report::FirstRead { .. }));
    has(|report| matches!(report, Report::Beat { n: 1, back: 0, .. }));
    has(|report| {
        matches!(report, Report::Disk { dev: 0, queues: 2, offered: 2, sectors, id, .. }
        if *sectors == DISK_BYTES / 512 && id.as_str() == "first")
    });
    has(|report| {
        matches!(report, Report::Blk { dev: 0, reads: 512, writes: 512, flushes: 2, errors: 0, dup: 0, lost: 0, end: true, bytes }
        if *bytes == 4 << 20)
    });
    assert!(
        matches!(reports.last(), Some(Report::Done { ok: true, .. })),
        "{reports:?}"
    );

    // What was written is on the disk, not only in the guest's mind.
    let image = std::fs::read(folder.path().join("disk"))?;
    let (used, unused) = image.split_at(2 << 20);
    assert!(
        used.chunks(512)
            .all(|sector| sector.iter().any(|&byte| byte != 0))
    );
    assert!(unused.iter().all(|&byte| byte == 0));
    Ok(())
}

#[test]
fn verifies_a_disk_on_q35_by_polling() -> Result<()> {
    verify_disk(&Machine::Q35, Idle::Poll)
}

#[test]
fn verifies_a_disk_on_microvm_by_interrupts() -> Result<()> {
    verify_disk(&Machine::Microvm, Idle::Halt)
}

#[test]
fn exchanges_datagrams_with_its_peer() -> Result<()> {
    let (port, network) = network()?;
    let machine = Machine::Q35;
    let workload = Workload {
        net: NetMode::Udp,
        packets: 300,
        port,
        idle: Idle::Halt,
        ..machine.workload()
    };
    let reports = Qemu::start(&machine, &workload, &[two_cpus(), network].concat())?.rest()?;
    let last = reports
        .iter()
        .find(|report| matches!(report, Report::Net { end: true, .. }));
    let Some(&Report::Net {
        sent,
        received,
        lost,
        errors,
        ..
    }) = last
    else {
        bail!("no last word of the network: {reports:?}");
    };
    assert_eq!((sent, errors), (300, 0));
    assert_eq!(received + lost, 300);
    assert!(received >= 150, "only {received} of 300 packets came back");
    Ok(())
}

#[test]
fn works_until_told_to_stop() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let machine = Machine::Q35;
    let workload = Workload {
        blk: BlkMode::Loop,
        blk_mib: 1,
        span: 16,
        dirty: 50,
        heartbeat: 50,
        ..machine.workload()
    };
    let mut qemu = Qemu::start(
        &machine,
        &workload,
        &[two_cpus(), disk(folder.path())?].concat(),
    )?;
    qemu.wait_for("its third heartbeat", |report| {
        matches!(report, Report::Beat { n: 3, .. })
    })?;
    qemu.command(command::REPORT)?;
    qemu.wait_for("a report of the disk", |report| {
        matches!(report, Report::Blk { end: false, .. })
    })?;
    qemu.wait_for("a report of the memory", |report| {
        matches!(
            report,
            Report::Dirty {
                span: 4096,
                bad: 0,
                ..
            }
        )
    })?;
    qemu.command(command::STOP)?;
    let reports = qemu.rest()?;
    let has = |wanted: fn(&Report) -> bool| assert!(reports.iter().any(wanted), "{reports:?}");
    has(|report| {
        matches!(
            report,
            Report::Verify {
                pages: 1..=4096,
                bad: 0
            }
        )
    });
    has(|report| {
        matches!(
            report,
            Report::Blk {
                reads: 1..,
                writes: 256..,
                errors: 0,
                dup: 0,
                lost: 0,
                end: true,
                ..
            }
        )
    });
    assert!(
        matches!(reports.last(), Some(Report::Done { ok: true, .. })),
        "{reports:?}"
    );
    Ok(())
}

#[test]
fn sees_that_bad_requests_are_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let machine = Machine::Q35;
    let workload = Workload {
        blk: BlkMode::Errors,
        activate: Activate::All,
        ..machine.workload()
    };
    let reports = Qemu::start(&machine, &workload, &disk(folder.path())?)?.rest()?;
    assert!(
        matches!(reports.last(), Some(Report::Done { ok: true, .. })),
        "{reports:?}"
    );
    Ok(())
}

#[test]
fn reboots_and_starts_afresh() -> Result<()> {
    let machine = Machine::Q35;
    let workload = Workload {
        heartbeat: 50,
        ..machine.workload()
    };
    let mut qemu = Qemu::start(
        &machine,
        &Workload {
            seconds: 3600,
            ..workload
        },
        &two_cpus(),
    )?;
    for command in [command::RESET, command::STOP] {
        qemu.wait_for("its CPUs", |report| {
            matches!(report, Report::Up { cpus: 2, .. })
        })?;
        qemu.wait_for("a heartbeat", |report| {
            matches!(report, Report::Beat { n: 1, .. })
        })?;
        qemu.command(command)?;
    }
    assert!(matches!(
        qemu.rest()?.last(),
        Some(Report::Done { ok: true, .. })
    ));
    Ok(())
}

#[test]
fn names_what_it_cannot_do() -> Result<()> {
    let machine = Machine::Q35;
    let fail = |workload: &Workload| -> Result<String> {
        let reports = Qemu::start(&machine, workload, &["-no-reboot".into()])?.rest()?;
        match reports.last() {
            Some(Report::Fail { reason, .. }) => Ok(reason.to_string()),
            _ => bail!("no failure: {reports:?}"),
        }
    };
    let with = |blk, span| Workload {
        blk,
        span,
        ..machine.workload()
    };
    assert_eq!(fail(&with(BlkMode::Verify, 0))?, "device-missing");
    assert_eq!(fail(&with(BlkMode::Off, 10_000))?, "out-of-memory");

    let mut qemu = Qemu::start(
        &machine,
        &Workload {
            heartbeat: 50,
            seconds: 3600,
            ..machine.workload()
        },
        &["-no-reboot".into()],
    )?;
    qemu.wait_for("a heartbeat", |report| {
        matches!(report, Report::Beat { .. })
    })?;
    qemu.command(command::FAULT)?;
    qemu.wait_for("a page fault", |report| {
        matches!(report, Report::Fail { reason, what, .. }
        if reason.as_str() == "exception" && what.as_str().starts_with("vector-14"))
    })?;
    Ok(())
}
