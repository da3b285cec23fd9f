//! A stock Linux guest under `godwit-vmm`, with its disk and network served by `godwit-blk` and
//! `godwit-net`, in an emulated host.

use std::time::Duration;

use anyhow::Result;
use test_framework::programs::program;
use test_hosts::linux_guest::{self, Launch};
use test_hosts::{Host, HostOptions};

/// The one place where the programs' command lines stand.
fn godwit() -> Launch {
    Launch {
        disk: "godwit-blk --socket-path $BLK_SOCKET --blk-file $DISK --num-queues 2".to_owned(),
        network: Some("godwit-net --socket-path $NET_SOCKET --tap $TAP --queue-pairs 1".to_owned()),
        vmm: "godwit-vmm --kernel $KERNEL --initrd $INITRD --cmdline \"$CMDLINE\" \
              --cpus 2 --memory 512M --serial stdio \
              --vhost-user blk,socket=$BLK_SOCKET --vhost-user net,socket=$NET_SOCKET"
            .to_owned(),
    }
}

/// A host with the programs.
fn host() -> Result<Host> {
    let mut host = Host::start(&HostOptions::named("godwit"))?;
    for name in ["godwit-vmm", "godwit-blk", "godwit-net"] {
        host.install(&[&program(name)?])?;
    }
    Ok(host)
}

#[test]
fn linux_guest_keeps_its_data() {
    linux_guest::io(&mut host().unwrap(), &godwit()).unwrap();
}

#[test]
fn debian_disk_boots() {
    linux_guest::debian(&mut host().unwrap(), &godwit()).unwrap();
}

#[test]
fn a_debian_is_paused_and_shut_down_by_its_owner() {
    let script = include_str!("owner.sh");
    let output = host().unwrap().run_for(script, Duration::from_secs(240));
    let output = output.unwrap();
    let said: Vec<_> = output.stdout.lines().collect();
    let expected = [
        "s \"paused\"",
        "s \"running\"",
        "pressed",
        "status 0",
        "reboot: Power down",
    ];
    assert_eq!(said, expected, "{}", output.stderr);
}
