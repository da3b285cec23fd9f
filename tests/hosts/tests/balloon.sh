# A Linux guest with a balloon. `balloon-guest.sh` is what runs in it.
set -u

# within SECONDS COMMAND...
within() {
    local tries
    for tries in $(seq $(($1 * 10))); do
        "${@:2}" && return
        sleep 0.1
    done
    echo "not within $1 s: ${*:2}" >&2
    [ ! -e /run/said ] || tail -n 20 /run/said >&2
    exit 1
}

# broker NAME: to which machines may come.
broker() {
    (umask 077 && echo "a secret of all brokers" >/run/key)
    mkdir "/run/$1.config"
    setsid godwit-broker --runtime-dir "/run/$1" --config-dir "/run/$1.config" \
        --migration-listen "unix:/run/$1.door" --migration-key /run/key \
        </dev/null >"/run/$1.log" 2>&1 &
    within 30 test -S "/run/$1/bus"
}

# at BROKER COMMAND...
at() { godwit --bus "/run/$1/bus" "${@:2}"; }

# boot BROKER OPTION...: the stock kernel and its modules, with our first program over the initrd's own.
boot() {
    local tree
    tree=$(mktemp -d)
    install -m 755 /share/balloon-guest.sh "$tree/init"
    (cd "$tree" && echo init | busybox cpio -o -H newc) >"$tree.cpio" 2>/dev/null
    cat /opt/guest/initrd "$tree.cpio" >/run/initrd
    at "$1" run --detach --keep --name guest --cpus 2 --memory 512M \
        --kernel /opt/guest/vmlinuz --initrd /run/initrd \
        --cmdline "console=ttyS0 quiet panic=-1 mitigations=off" --balloon "${@:2}"
    listen "$1"
    within 120 grep -q READY /run/said
}

# listen BROKER: to the guest's console, which is kept open from both sides.
listen() {
    rm -f /run/ask /run/said && mkfifo /run/ask
    setsid sleep infinity >/run/ask 2>/dev/null &
    setsid godwit --bus "/run/$1/bus" console --force guest </run/ask >/run/said 2>/dev/null &
    within 30 test -s /run/said
}

# guest LINE: lets it carry that out; what it said, and its status.
guest() {
    local before
    before=$(wc -l </run/said)
    echo "$1" >/run/ask
    within 120 answered "$before"
    tail -n "+$((before + 1))" /run/said | tr -d '\r' | grep -v ENDED
    tail -n "+$((before + 1))" /run/said | grep -q 'ENDED 0' || {
        echo "the guest failed: $1" >&2
        exit 1
    }
}
answered() { tail -n "+$(($1 + 1))" /run/said | grep -q ENDED; }

# free: MiB that the guest has to spare.
free() { guest free | sed -n 's/^FREE //p'; }

# spent: MiB that the host has spent on the guest's memory.
spent() {
    local file
    for file in /proc/"$(pidof -s godwit-vmm)"/fd/*; do
        case $(readlink "$file") in
            /memfd:guest-ram*) stat -Lc %b "$file" | awk '{ print int($1 / 2048) }' && return ;;
        esac
    done
}
spent_below() { [ "$(spent)" -lt "$1" ]; }
spent_above() { [ "$(spent)" -gt "$1" ]; }

# Huge pages that the host has to spare.
huge() { sed -n 's/^HugePages_Free: *//p' /proc/meminfo; }
huge_above() { [ "$(huge)" -gt "$1" ]; }
huge_below() { [ "$(huge)" -lt "$1" ]; }

# holds BROKER BYTES: the balloon has just this size.
holds() { at "$1" --json balloon guest | tr -d ' \n' | grep -q "\"actual_bytes\":$2,"; }
# says BROKER NAME: the guest says something of its memory.
says() { at "$1" --json balloon guest | grep -q "\"$2\""; }
runs_at() { at "$1" --no-legend list | grep -q "^guest  *running"; }
# counts BROKER NAME: the value of a counter of the balloon's process.
counts() { at "$1" --json top | tr -d ' ",' | sed -n "s/^$2://p" | sort -n | tail -n 1; }

# expect WHAT COMMAND...
expect() {
    "${@:2}" || { echo "not so: $1 (free $(free), spent $(spent))" >&2 && exit 1; }
}
