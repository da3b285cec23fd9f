# The host's side of the io workload; `prepare/guest/init` is the guest's. Needs start_disk,
# start_network and run_vmm.
set -u
work=$(mktemp -d /run/machine.XXXXXX)
cd "$work" || exit
export DISK=$work/disk.ext4 TAP=tap0 BLK_SOCKET=$work/blk NET_SOCKET=$work/net
export KERNEL=${KERNEL:-/opt/guest/vmlinuz} INITRD=/opt/guest/initrd
export CMDLINE="console=ttyS0 quiet panic=-1 mitigations=off godwit.test=io godwit.ip=10.9.0.2/24 godwit.peer=10.9.0.1"

truncate -s 64M "$DISK" && mke2fs -q -t ext4 "$DISK"
ip tuntap add "$TAP" mode tap vnet_hdr && ip addr add 10.9.0.1/24 dev "$TAP" && ip link set "$TAP" up
dd if=/dev/urandom of=given bs=1M count=64 status=none
socat -u TCP-LISTEN:5001,reuseaddr CREATE:taken &
takes=$!
socat -u FILE:given TCP-LISTEN:5002,reuseaddr &
gives=$!

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
kill $disk $network $takes $gives 2>/dev/null
wait
echo "HOST-GIVEN $(sha256sum <given | cut -d ' ' -f 1)"
echo "HOST-TAKEN $(sha256sum <taken | cut -d ' ' -f 1)"
e2fsck -fn "$DISK" >/dev/null 2>&1 && echo "HOST-DISK clean"
ip link del "$TAP"
rm -rf "$work"
exit 0
