//! What cannot work is refused in one line that names the thing, and leaves nothing behind.

use std::fs;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use anyhow::Result;
use tempfile::TempDir;
use test_framework::process::Launch;
use test_framework::programs::program;

/// Runs the core with `options`, which it must refuse; its one line.
fn refused(options: &[(&str, &str)]) -> Result<String> {
    refused_with(Launch::new(&program("godwit-vmm")?), options)
}

/// As [`refused`], of a core that is given more.
fn refused_with(mut launch: Launch, options: &[(&str, &str)]) -> Result<String> {
    for (option, value) in options {
        launch = launch.option(option, value);
    }
    if !options.iter().any(|(option, _)| *option == "--serial") {
        launch = launch.option("--serial", "null");
    }
    let mut core = launch.start()?;
    let status = core.wait(Duration::from_secs(20))?;
    assert_eq!(status.code(), Some(1), "{options:?}: {}", core.stderr());
    let said = core.stderr();
    assert_eq!(said.lines().count(), 1, "{said}");
    Ok(said.trim_end().to_owned())
}

fn guest() -> (&'static str, &'static str) {
    (
        "--kernel",
        test_guest::program().to_str().unwrap_or_default(),
    )
}

#[test]
fn kernels_that_are_none() -> Result<()> {
    let folder = TempDir::new()?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    let elf = fs::read(test_guest::program())?;
    fs::write(path("text"), "#!/bin/sh\necho I am no kernel\n")?;
    fs::write(path("truncated"), &elf[..elf.len() / 16])?;
    fs::write(path("empty"), "")?;
    for name in ["text", "truncated", "empty", "absent"] {
        let said = refused(&[("--kernel", &path(name))])?;
        assert!(
            said.starts_with(&format!("godwit-vmm: kernel {} ", path(name))),
            "{said}"
        );
    }
    let said = refused(&[guest(), ("--initrd", &path("absent"))])?;
    assert!(said.contains(&path("absent")), "{said}");
    Ok(())
}

#[test]
fn no_kvm() -> Result<()> {
    let said = refused(&[guest(), ("--kvm", "/nonexistent/kvm")])?;
    assert!(
        said.starts_with("godwit-vmm: /nonexistent/kvm cannot be opened; is KVM there"),
        "{said}"
    );
    let said = refused(&[guest(), ("--kvm", "/dev/null")])?;
    assert!(said.contains("/dev/null is not a KVM device"), "{said}");
    let said = refused(&[guest(), ("--kvm-fd", "999")])?;
    assert!(
        said.contains("--kvm-fd 999: there is no such open descriptor"),
        "{said}"
    );
    Ok(())
}

#[test]
fn devices_that_are_not_there() -> Result<()> {
    let folder = TempDir::new()?;
    let socket = folder.path().join("nobody").display().to_string();
    let said = refused(&[guest(), ("--vhost-user", &format!("blk,socket={socket}"))])?;
    assert!(
        said.contains(&format!("nobody listens on {socket}")),
        "{said}"
    );
    let said = refused(&[guest(), ("--vhost-user", "toaster,socket=/x")])?;
    assert!(said.contains("toaster"), "{said}");
    let said = refused(&[guest(), ("--vhost-user", "blk,socket=/x,color=red")])?;
    assert!(said.contains("color is no setting of a device"), "{said}");
    let twice = [
        guest(),
        ("--vhost-user", "blk,socket=/x,id=a"),
        ("--vhost-user", "net,socket=/y,id=a"),
    ];
    let said = refused(&twice)?;
    assert!(said.contains("two devices are named a"), "{said}");
    Ok(())
}

#[test]
fn pci_devices_that_are_not_there() -> Result<()> {
    let folder = TempDir::new()?;
    let socket = folder.path().join("nobody").display().to_string();
    let device = format!("socket={socket}");
    let said = refused(&[guest(), ("--vfio-user", &device)])?;
    assert!(
        said.contains(&format!(
            "device vfio0: nobody listens on {socket}; start its back-end first"
        )),
        "{said}"
    );
    let said = refused(&[guest(), ("--vfio-user", "socket=/x,color=red")])?;
    assert!(
        said.contains("color is no setting of a PCI device"),
        "{said}"
    );
    let twice = [
        guest(),
        ("--vhost-user", "blk,socket=/x,id=a"),
        ("--vfio-user", "socket=/y,id=a"),
    ];
    let said = refused(&twice)?;
    assert!(said.contains("two devices are named a"), "{said}");
    // What listens is a device of another protocol.
    let listener = UnixListener::bind(&socket)?;
    let mut launch = Launch::new(&program("godwit-balloon")?);
    let fd = launch.inherit(listener.into());
    let _balloon = launch.option("--fd", fd.to_string()).start()?;
    let said = refused(&[guest(), ("--vfio-user", &device)])?;
    assert!(
        said.contains("device vfio0 cannot be given to the machine"),
        "{said}"
    );
    Ok(())
}

#[test]
fn no_machine_arrives_with_a_pci_device() -> Result<()> {
    let mut launch = Launch::new(&program("godwit-vmm")?);
    let fd = launch.inherit(tempfile::tempfile()?.into());
    let from = format!("snapshot={fd}");
    let (place, device) = (("--incoming", &*from), ("--vfio-user", "socket=/x,id=card"));
    let said = refused_with(launch, &[guest(), place, device])?;
    let why = "device card is a PCI device of vfio-user, with which no machine can arrive";
    assert!(said.contains(why), "{said}");
    Ok(())
}

#[test]
fn impossible_machines() -> Result<()> {
    for (cpus, memory, named) in [
        ("0", "64M", "0 vCPUs"),
        ("33", "64M", "33 vCPUs"),
        ("1", "1M", "1048576 bytes"),
    ] {
        let said = refused(&[guest(), ("--cpus", cpus), ("--memory", memory)])?;
        assert!(said.contains(named), "{said}");
    }
    let said = refused(&[guest(), ("--memory", "1T"), ("--hugepages", "2M")])?;
    assert!(said.contains("see vm.nr_hugepages"), "{said}");
    let long = "x".repeat(5000);
    let said = refused(&[guest(), ("--cmdline", &long)])?;
    assert!(said.contains("5000 bytes"), "{said}");
    let said = refused(&[guest(), ("--serial", "fd=77")])?;
    assert!(said.contains("serial"), "{said}");
    Ok(())
}

#[test]
fn unknown_options_are_named_by_every_program() -> Result<()> {
    for name in ["godwit-vmm", "godwit-blk", "godwit-net", "godwit-vfio"] {
        let mut process = Launch::new(&program(name)?).arg("--toast").start()?;
        let status = process.wait(Duration::from_secs(20))?;
        assert_ne!(status.code(), Some(0));
        assert!(process.stderr().contains("--toast"), "{}", process.stderr());
    }
    Ok(())
}
