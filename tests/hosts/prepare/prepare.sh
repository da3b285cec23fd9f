#!/bin/bash
# prepare.sh OUT: makes everything that an emulated host needs, in the empty folder OUT.
#
#   OUT/host.ext4           root of the host: Debian with systemd, D-Bus, polkit, QEMU, fio, and in
#                           /opt/guest the Linux guest (see guest() below)
#   OUT/vmlinux OUT/initrd  kernel of the host as an ELF file with a PVH note, and its first root
#   OUT/qemu/               the same release's QEMU with its libraries, to run on this machine
#   OUT/prepare.log         what the tools said
#
# Runs as root on Debian 12 or later. Packages come from the archive in this machine's apt sources.
# Progress goes to stderr; everything else to the log.
set -Eeuo pipefail

readonly SUITE=trixie
readonly here=$(dirname "$(realpath "$0")")
readonly out=$(realpath "$1")
readonly work=$out/work root=$out/work/root
exec 3>&2 >"$out/prepare.log" 2>&1

say() { printf 'hosts: [%3d s] %s\n' "$SECONDS" "$*" >&3; }
die() { printf 'hosts: %s\n' "$*" >&3; exit 1; }
trap 'say "failed at line $LINENO: $BASH_COMMAND"' ERR

# --- This machine --------------------------------------------------------------------------------

tools() {
    local missing=() pair
    for pair in mmdebstrap:mmdebstrap mke2fs:e2fsprogs cpio:cpio modprobe:kmod zstd:zstd xz:xz-utils \
        gzip:gzip dpkg-deb:dpkg; do
        PATH=$PATH:/usr/sbin:/sbin command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
    done
    command -v apt-get >/dev/null || die "emulated hosts are prepared on Debian 12 or later; this machine has no apt-get"
    if [ "$(id -u)" != 0 ]; then
        die "emulated hosts are prepared by root, with these packages: ${missing[*]:-(all there)}; run the preparation as root once"
    fi
    [ ${#missing[@]} = 0 ] && return
    say "installing ${missing[*]}"
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -yq --no-install-recommends "${missing[@]}" ||
        die "apt-get could not install ${missing[*]}; see $out/prepare.log"
}

# apt itself reads its sources, in either of their two formats. Sets $archive and $security.
sources() {
    local uri suite codename
    codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
    archive= security=
    while read -r uri suite; do
        case $suite in
            "$codename" | stable | oldstable) archive=${archive:-$uri} ;;
            "$codename-security" | stable-security | oldstable-security) security=${security:-$uri} ;;
        esac
    done < <(apt-get indextargets --no-release-info --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' \
        'Created-By: Packages' | sed -n 's/ main$//p')
    [ "$archive" ] || die "this machine's apt sources name no Debian archive with suite $codename and component main"
}

# --- Roots ---------------------------------------------------------------------------------------

# What the host and the guest have in common; the host's root grows from it.
bootstrap() {
    local lines=("deb $archive $SUITE main" "deb $archive $SUITE-updates main" "deb $archive $SUITE-backports main")
    [ "$security" ] && lines+=("deb $security $SUITE-security main")
    mmdebstrap --quiet --variant=minbase --mode=root --skip=cleanup/apt \
        --aptopt='Acquire::Languages "none"' \
        --aptopt='APT::Install-Recommends "false"' --aptopt='APT::Sandbox::User "root"' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt=force-unsafe-io \
        --include=systemd-sysv,udev,dbus,kmod,procps,iproute2,iputils-ping,busybox-static,socat,e2fsprogs \
        "$SUITE" "$root" "${lines[@]}"
    cp /etc/resolv.conf "$root/etc/resolv.conf"
}

in_root() { chroot "$root" env DEBIAN_FRONTEND=noninteractive "$@"; }

host_packages() {
    in_root apt-get install -yq -t "$SUITE-backports" qemu-system-x86 qemu-utils passt- fio \
        polkitd libglib2.0-bin pciutils
}

# Services that are no part of any test and would only cost time at boot.
readonly QUIET=(apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer
    e2scrub_reap.service fstrim.timer getty@tty1.service systemd-journal-flush.service
    systemd-pstore.service systemd-random-seed.service systemd-update-utmp.service)

# clean ROOT HOSTNAME: no traces of this machine, no work at boot that nobody needs.
clean() {
    local unit
    rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/* "$1/etc/resolv.conf" "$1/etc/apt/sources.list" \
        "$1"/etc/apt/sources.list.d/*
    : >"$1/etc/fstab"
    : >"$1/etc/machine-id"
    echo "$2" >"$1/etc/hostname"
    mkdir -p "$1/etc/systemd/journald.conf.d"
    printf '[Journal]\nStorage=volatile\n' >"$1/etc/systemd/journald.conf.d/volatile.conf"
    for unit in "${QUIET[@]}"; do ln -sf /dev/null "$1/etc/systemd/system/$unit"; done
}

# pack ROOT IMAGE SIZE: a folder as an ext4 image.
pack() {
    rm -f "$2"
    truncate -s "$3" "$2"
    mke2fs -q -t ext4 -O "${4:-has_journal}" -E lazy_itable_init=1,nodiscard -m0 -d "$1" "$2"
}

# --- Kernels -------------------------------------------------------------------------------------

# fetch_kernel SUITE FLAVOUR DIR: unpacks the newest kernel packages of the flavour into DIR.
fetch_kernel() {
    local packages deb
    mkdir -p "$root/download" "$3"
    packages=$(in_root apt-cache -t "$1" depends --recurse --important "linux-image-$2" |
        grep -E '^linux-(image|base|binary|modules)-[0-9]' | sort -u)
    in_root sh -c "cd /download && apt-get download -q $(echo $packages)"
    for deb in "$root"/download/*.deb; do dpkg-deb -x "$deb" "$3"; done
    rm -rf "$root/download"
}

# The boot protocol's header says where in a bzImage the compressed ELF file lies (Linux,
# Documentation/arch/x86/boot.rst: setup_sects, payload_offset, payload_length).
extract_vmlinux() {
    field() { od -An -t "u$3" -j "$2" -N "$3" "$1" | tr -d ' '; }
    local setup start length tool
    setup=$(field "$1" 497 1)
    start=$(((${setup/#0/4} + 1) * 512 + $(field "$1" 584 4)))
    length=$(field "$1" 588 4)
    for tool in 'zstd -dc' 'xz -dc --single-stream' 'gzip -dc'; do
        # The four bytes of the unpacked size behind the data make some tools complain, harmlessly.
        tail -c "+$((start + 1))" "$1" | head -c "$length" | $tool >"$2" 2>/dev/null || true
        [ "$(head -c 4 "$2" | tail -c 3)" = ELF ] && return
    done
    die "the kernel $1 holds no ELF file that zstd, xz or gzip can unpack"
}

# modules FROM TO VERSION NAME...: copies the modules with what they depend on, unpacked, because
# unpacking is slow in an emulated machine. Prints their paths under TO in the order of loading.
modules() {
    local from=$1 to=$2 version=$3 name file
    shift 3
    mkdir -p "$to/usr/lib/modules/$version"
    for name; do
        modprobe -S "$version" -d "$from/usr" --show-depends "$name" || echo "no module $name" >&2
    done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' | while read -r file; do
        file=${file#"$from/usr/"}
        file=${file#/}
        mkdir -p "$to/usr/$(dirname "$file")"
        case $file in
            *.xz) xz -dc "$from/usr/$file" >"$to/usr/${file%.xz}" ;;
            *.zst) zstd -dcq "$from/usr/$file" >"$to/usr/${file%.zst}" ;;
            *) cp "$from/usr/$file" "$to/usr/$file" ;;
        esac
        file=${file%.xz}
        echo "${file%.zst}"
    done
}

# index FROM TO VERSION: what depmod makes from the copied modules.
index() {
    cp "$1/usr/lib/modules/$3"/modules.{order,builtin,builtin.modinfo} "$2/usr/lib/modules/$3/"
    depmod -b "$2/usr" "$3"
}

# initrd KERNEL VERSION INIT OUT NAME...: busybox, the init program, and modules listed in /modules.
initrd() {
    local from=$1 version=$2 init=$3 to=$4 tree=$work/initrd
    shift 4
    rm -rf "$tree"
    mkdir -p "$tree"/{bin,dev,proc,sys,run,mnt}
    cp "$root/usr/bin/busybox" "$tree/bin/"
    install -m 755 "$init" "$tree/init"
    modules "$from" "$tree" "$version" "$@" >"$tree/modules"
    (cd "$tree" && find . | cpio -o -H newc --quiet) >"$to"
}

# --- Host and guest ------------------------------------------------------------------------------

# What hosts of this and later tests load: virtio, KVM, taps and vhost, VFIO and things to pass
# through, disks of all kinds and ways to disturb disks and networks.
readonly HOST_MODULES=(virtio_blk virtio_net virtio_rng virtio_mem virtio_balloon virtio_iommu 9p 9pnet_virtio
    ext4 overlay erofs fuse kvm-amd tun tap macvtap veth bridge vhost_net vhost_vsock
    vmw_vsock_virtio_transport vsock_loopback vfio-pci vfio_iommu_type1 mdev vduse vhost_vdpa
    nvme nvme-loop e1000e igb igbvf loop brd null_blk nbd zram dm-mod dm-delay
    dm-flakey sch_netem sch_tbf sch_htb nf_tables nft_chain_nat nft_masq nft_ct autofs4
    raw_diag tcp_diag inet_diag pci_stub af_packet crc32c_cryptoapi)

# The guest, in the folder /opt/guest of the host: the kernel as Debian ships it (vmlinuz), the ELF
# file inside (vmlinux), an initrd that runs the tests' workload or starts a root on /dev/vda, and
# a stock Debian disk (debian.ext4) that belongs to that kernel.
guest() {
    local to=$root/opt/guest kernel=$work/guest-kernel tree=$work/guest version
    mkdir -p "$to"
    fetch_kernel "$SUITE-backports" cloud-amd64 "$kernel"
    version=$(basename "$kernel"/usr/lib/modules/*)
    depmod -b "$kernel/usr" "$version"
    boot_image "$kernel" "$version" "$to/vmlinuz"
    extract_vmlinux "$to/vmlinuz" "$to/vmlinux"
    initrd "$kernel" "$version" "$here/guest/init" "$to/initrd" \
        virtio_blk virtio_net virtio_balloon virtio_rng ext4 nvme
    say "guest kernel $version"

    cp -a --reflink=auto "$root" "$tree"
    rm -rf "$tree/opt/guest"
    mkdir -p "$tree/usr/lib/modules"
    cp -a "$kernel/usr/lib/modules/$version" "$tree/usr/lib/modules/"
    clean "$tree" debian
    sed -i 's/^root:[^:]*:/root::/' "$tree/etc/shadow"
    pack "$tree" "$to/debian.ext4" 1G
    say "guest disk of $(du -m "$to/debian.ext4" | cut -f1) MiB"
    rm -rf "$tree" "$kernel"
}

# The host's kernel is the release's own: under the emulator's SVM, Linux 7.3 of the backports hangs
# or panics in one of five runs of a guest, 6.12 in none.
host() {
    local kernel=$work/host-kernel version
    fetch_kernel "$SUITE" amd64 "$kernel"
    version=$(basename "$kernel"/usr/lib/modules/*)
    depmod -b "$kernel/usr" "$version"
    boot_image "$kernel" "$version" "$work/vmlinuz"
    extract_vmlinux "$work/vmlinuz" "$out/vmlinux"
    initrd "$kernel" "$version" "$here/host/init" "$out/initrd" virtio_blk ext4
    modules "$kernel" "$root" "$version" "${HOST_MODULES[@]}" >/dev/null
    index "$kernel" "$root" "$version"
    rm -rf "$kernel"
    say "host kernel $version"

    clean "$root" host
    ln -sf /dev/null "$root/etc/systemd/system/serial-getty@ttyS0.service"
    install -m 755 "$here/host/agent" "$root/usr/local/sbin/host-agent"
    install -m 644 "$here/host/agent.service" "$root/etc/systemd/system/host-agent.service"
    mkdir -p "$root/etc/systemd/system/multi-user.target.wants" "$root/etc/systemd/network" "$root/share"
    ln -sf ../host-agent.service "$root/etc/systemd/system/multi-user.target.wants/"
    install -m 644 "$here/host/lan0.link" "$root/etc/systemd/network/10-lan0.link"
    pack "$root" "$out/host.ext4" 8G ^has_journal,^metadata_csum
    say "host disk of $(du -m "$out/host.ext4" | cut -f1) MiB"
}

boot_image() {
    local file
    for file in "$1/usr/lib/modules/$2/vmlinuz" "$1/boot/vmlinuz-$2"; do
        [ -e "$file" ] && cp "$file" "$3" && return
    done
    die "the packages of kernel $2 hold no vmlinuz"
}

# QEMU of the host's release, run on this machine through its own dynamic loader.
qemu() {
    local lib=usr/lib/x86_64-linux-gnu program
    mkdir -p "$out/qemu"
    (
        cd "$root"
        for program in qemu-system-x86_64 qemu-img; do
            echo "usr/bin/$program"
            in_root ldd "/usr/bin/$program" | sed -n 's/.*=> \(\/[^ ]*\).*/\1/p' | xargs -n1 chroot "$root" realpath | cut -c2-
            in_root ldd "/usr/bin/$program" | sed -n 's/.*=> \/\([^ ]*\).*/usr\/\1/p' | sed 's/^usr\/usr/usr/'
        done | sort -u | cpio -pdm --quiet "$out/qemu"
        echo usr/lib64/ld-linux-x86-64.so.2 | cpio -pdmL --quiet "$out/qemu"
        find usr/share/qemu usr/share/seabios "$lib/qemu" | cpio -pdm --quiet "$out/qemu"
    )
    say "QEMU for this machine, $(du -sm "$out/qemu" | cut -f1) MiB"
}

tools
sources
mkdir -p "$work"
say "bootstrapping Debian $SUITE"
bootstrap
say "guest"
guest
say "host packages"
host_packages
qemu
host
rm -rf "$work"
