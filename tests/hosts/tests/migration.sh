# A Linux guest that moves between brokers while it works. `prepare/guest/init` says what it does
# and tells its peer, who is the host with number 1.
set -u
readonly NETWORK=10.8.0 GUEST=10.8.0.9 PEER=10.8.0.1 DISK=/share/disk.ext4

# network NUMBER [INTERFACE]: the guest's tap and the interface to other hosts on one bridge.
network() {
    ip link add br0 type bridge && ip link set br0 up
    if [ $# = 2 ]; then
        ip addr flush dev "$2"
        ip link set "$2" master br0 up
    fi
    ip addr add "$NETWORK.$1/24" dev br0
    ip tuntap add tap0 mode tap vnet_hdr multi_queue
    ip link set tap0 master br0 up
}

# within SECONDS COMMAND...
within() {
    local tries
    for tries in $(seq $(($1 * 10))); do
        "${@:2}" && return
        sleep 0.1
    done
    echo "not within $1 s: ${*:2}" >&2
    exit 1
}

# Says again what the guest says until it shall stop, and keeps what it tells.
peer() {
    mkdir -p /run/peer
    cat >/run/peer/talk <<'TALK'
cd /run/peer
while read -r line; do
    case $line in
        [0-9]*)
            echo "$line" >last.new && mv last.new last
            [ -e stop ] && line=stop
            echo "$line"
            ;;
        *) echo "$line" >>told ;;
    esac
done
TALK
    echo 'date +%s%3N' >/run/peer/clock
    setsid socat TCP-LISTEN:5003,reuseaddr EXEC:"bash /run/peer/talk" &
    setsid socat -t 10 TCP-LISTEN:5004,reuseaddr,fork EXEC:"bash /run/peer/clock" &
}

# broker NAME ADDRESS: to which machines may come.
broker() {
    (umask 077 && echo "a secret of all brokers" >/run/key)
    mkdir "/run/$1.config"
    setsid godwit-broker --runtime-dir "/run/$1" --config-dir "/run/$1.config" \
        --migration-listen "$2" --migration-listen "unix:/run/$1.door" --migration-key /run/key \
        </dev/null >"/run/$1.log" 2>&1 &
    within 30 test -S "/run/$1/bus"
}

# at BROKER COMMAND...
at() { godwit --bus "/run/$1/bus" "${@:2}"; }

# boot BROKER
boot() {
    truncate -s 64M "$DISK" && mke2fs -q -t ext4 "$DISK"
    at "$1" run --detach --keep --name guest --cpus 2 --memory 256M \
        --kernel /opt/guest/vmlinuz --initrd /opt/guest/initrd \
        --cmdline "console=ttyS0 quiet panic=-1 mitigations=off godwit.test=move godwit.ip=$GUEST/24 godwit.peer=$PEER" \
        --disk "$DISK,queues=2" --net tap:tap0,mac=52:54:00:08:00:09 || exit 1
}

# Waits until the guest has done each of its works again, and again.
works() {
    within 120 test -e /run/peer/last
    local before
    read -ra before </run/peer/last
    within 120 advanced "${before[@]}"
    cat /run/peer/last
}
advanced() {
    local now
    read -ra now </run/peer/last
    ((now[0] >= $1 + 10 && now[1] >= $2 + 2 && now[2] >= $3 + 5 && now[3] >= $4 + 5))
}

# move BROKER URI: an emulated host on a busy machine sends few bytes in 300 ms. A broker to which
# the guest has come hears of it later than the guest's peer.
move() {
    within 120 runs_at "$1"
    at "$1" migrate guest "$2" --max-downtime 2s || exit 1
}
runs_at() { at "$1" --no-legend list | grep -q "^guest  *running"; }

# Ends the guest's work; what it tells.
ends() {
    touch /run/peer/stop
    within 120 grep -qs DONE /run/peer/told
    cat /run/peer/told
}

# Nothing of the guest is left; its disk is whole.
disk() {
    within 60 gone
    e2fsck -fn "$DISK" >/dev/null && echo "disk clean"
}
gone() { ! pidof godwit-vmm godwit-blk godwit-net >/dev/null; }
