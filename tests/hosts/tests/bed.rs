//! The bed itself, without any program of Godwit: QEMU runs the guests, qemu-storage-daemon
//! serves their disks. When these pass and `linux_guest` does not, it is Godwit's fault.

use test_hosts::linux_guest::{self, Launch};
use test_hosts::{Host, HostOptions, Pair};

/// A guest under the host's QEMU, with the disk in a process of its own.
fn qemu() -> Launch {
    Launch {
        disk: "qemu-storage-daemon \
               --blockdev driver=file,node-name=disk,filename=$DISK \
               --export type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=2,addr.type=unix,addr.path=$BLK_SOCKET"
            .to_owned(),
        network: None,
        vmm: "qemu-system-x86_64 -accel kvm -machine pc,memory-backend=ram -cpu host -smp 2 -m 512 \
              -object memory-backend-memfd,id=ram,size=512M,share=on \
              -nodefaults -no-user-config -display none -serial stdio \
              -kernel $KERNEL_ELF -initrd $INITRD -append \"$CMDLINE\" \
              -chardev socket,id=blk,path=$BLK_SOCKET -device vhost-user-blk-pci,chardev=blk \
              -netdev tap,id=net,ifname=$TAP,script=no,downscript=no,vhost=on \
              -device virtio-net-pci,netdev=net,romfile="
            .to_owned(),
    }
}

#[test]
fn host_has_systemd_and_kvm() {
    let mut host = Host::start(&HostOptions::named("first")).unwrap();
    let output = host
        .run("cat /proc/1/comm; hostname; test -c /dev/kvm && echo kvm; cat /sys/module/kvm_amd/parameters/npt")
        .unwrap();
    assert_eq!(output.stdout, "systemd\nfirst\nkvm\nY\n");
    host.run("busctl --system status org.freedesktop.systemd1 >/dev/null")
        .unwrap();

    let output = host
        .run_for(
            "echo out; echo err >&2; exit 7",
            std::time::Duration::from_secs(5),
        )
        .unwrap();
    assert_eq!(
        (output.status, &*output.stdout, &*output.stderr),
        (7, "out\n", "err\n")
    );
    let error = host
        .run_for("echo before; sleep 60", std::time::Duration::from_secs(1))
        .unwrap_err();
    assert!(error.to_string().contains("before"), "{error}");
}

#[test]
fn linux_guest_under_qemu_keeps_its_data() {
    let mut host = Host::start(&HostOptions::default()).unwrap();
    linux_guest::io(&mut host, &qemu()).unwrap();
}

#[test]
fn pair_is_on_one_wire() {
    let mut pair = Pair::start().unwrap();
    pair.a.run("ping -c 3 -i 0.2 -W 5 10.8.0.2").unwrap();
    pair.b.run("ping -c 3 -i 0.2 -W 5 10.8.0.1").unwrap();
    let ids: Vec<String> = [&mut pair.a, &mut pair.b]
        .map(|host| host.run("cat /etc/machine-id").unwrap().stdout)
        .into();
    assert_ne!(ids[0], ids[1]);
    assert_eq!(ids[0].trim().len(), 32);
}
