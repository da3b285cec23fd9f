# The stock Debian disk; systemd runs one command from the kernel's command line and powers off.
# Needs start_disk, start_network and run_vmm.
set -u
work=$(mktemp -d /run/machine.XXXXXX)
cd "$work" || exit
export DISK=/opt/guest/debian.ext4 TAP=tap1 BLK_SOCKET=$work/blk NET_SOCKET=$work/net
export KERNEL=${KERNEL:-/opt/guest/vmlinuz} INITRD=/opt/guest/initrd
report='echo L2-DEBIAN $(cat /proc/1/comm) on $(findmnt -no SOURCE /) >/dev/console'
export CMDLINE="console=ttyS0 quiet panic=-1 mitigations=off root=/dev/vda systemd.run=\"/bin/sh -c '$report'\""

ip tuntap add "$TAP" mode tap vnet_hdr && ip link set "$TAP" up
start_disk &
disk=$!
start_network &
network=$!
for _ in $(seq 100); do [ -S "$BLK_SOCKET" ] && break; sleep 0.05; done
[ -S "$BLK_SOCKET" ] || { echo "no socket at $BLK_SOCKET" >&2; exit 1; }
if kill -0 $network 2>/dev/null; then
    for _ in $(seq 100); do [ -S "$NET_SOCKET" ] && break; sleep 0.05; done
fi

run_vmm </dev/null
echo "HOST-VMM $?"
kill $disk $network 2>/dev/null
wait
e2fsck -fn "$DISK" >/dev/null 2>&1 && echo "HOST-DISK clean"
ip link del "$TAP"
rm -rf "$work"
exit 0
