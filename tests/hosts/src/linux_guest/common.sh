# What every workload does. Needs start_disk, start_network and run_vmm, and NETWORK_PROCESS, which
# come before; a workload comes behind, and calls prepare, run and finish in this order.
set -u
readonly ADDRESS=10.9.0.1

prepare() {
    work=$(mktemp -d /run/machine.XXXXXX)
    cd "$work" || exit
    export TAP=tap0 BLK_SOCKET=$work/blk NET_SOCKET=$work/net
    export KERNEL=/opt/guest/vmlinuz KERNEL_ELF=/opt/guest/vmlinux INITRD=/opt/guest/initrd
    ip tuntap add "$TAP" mode tap vnet_hdr
    ip addr add $ADDRESS/24 dev "$TAP"
    ip link set "$TAP" up
}

# wait_for_socket PATH PID
wait_for_socket() {
    local tries
    for tries in $(seq 100); do
        [ -S "$1" ] && return
        kill -0 "$2" 2>/dev/null || break
        sleep 0.05
    done
    echo "nobody listens on $1" >&2
    exit 1
}

run() {
    start_disk &
    disk=$!
    wait_for_socket "$BLK_SOCKET" $disk
    network=
    if [ "$NETWORK_PROCESS" ]; then
        start_network &
        network=$!
        wait_for_socket "$NET_SOCKET" $network
    fi
    run_vmm </dev/null
    echo "HOST-VMM $?"
}

finish() {
    local process
    for process in $disk $network; do
        kill "$process" 2>/dev/null
        wait "$process"
    done
    e2fsck -fn "$DISK" >/dev/null 2>&1 && echo "HOST-DISK clean"
    ip link del "$TAP"
    cd / && rm -rf "$work"
}
