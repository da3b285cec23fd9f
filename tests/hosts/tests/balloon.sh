# A Linux guest with a balloon. `balloon-guest.sh` is what runs in it.
set -u

# within COMMAND...: it succeeds some time; asked rarely, as the guest needs the processors.
within() {
    local end=$((SECONDS + 240))
    while [ "$SECONDS" -lt "$end" ]; do
        "$@" && return
        sleep 0.5
    done
    echo "not within four minutes: $*" >&2
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
    within test -S "/run/$1/bus"
}

# at BROKER COMMAND...
at() { godwit --bus "/run/$1/bus" "${@:2}"; }

# prepare: the stock initrd with our first program over its own, and the same for the host's kernel,
# which knows a page poison; the guest's own does not.
INITRD=/run/initrd
KERNEL=/opt/guest/vmlinuz
prepare() {
    local tree=/run/tree
    mkdir -p $tree/usr
    install -m 755 /share/balloon-guest.sh $tree/init
    overlay $tree /run/initrd
    find "/lib/modules/$(uname -r)" -name virtio_balloon.ko -exec cp {} $tree/usr/ \;
    echo virtio_balloon.ko >$tree/modules
    overlay $tree /run/initrd.host
}
overlay() {
    (cat /opt/guest/initrd && cd "$1" && find . | busybox cpio -o -H newc) >"$2" 2>/dev/null
}
# cmdline WORD: the kernel's command line.
cmdline() { echo "console=ttyS0 quiet panic=-1 mitigations=off nowatchdog $1"; }

# boot BROKER WORD OPTION...: a stock kernel with its modules, and that word on its command line.
boot() {
    at "$1" run --detach --keep --name guest --cpus 1 --memory 192M --kernel "$KERNEL" \
        --initrd "$INITRD" --cmdline "$(cmdline "$2")" "${@:3}" || exit 1
    listen "$1"
    within grep -q READY /run/said
}

# boot_qemu MIB WORD: the same in a machine of QEMU's, with our balloon of that size. The generic
# vhost-user device knows of a balloon no more than its number, its queues and its size.
boot_qemu() {
    ! qemu-system-x86_64 -device help | grep -q vhost-user-balloon || exit 1
    mkfifo /run/ask
    setsid sleep infinity >/run/ask 2>/dev/null &
    setsid godwit-balloon --socket-path /run/balloon --metrics-socket /run/metrics --target "$1" \
        --statistics-interval 1 </dev/null >/run/balloon.log 2>&1 &
    within test -S /run/balloon
    setsid qemu-system-x86_64 -accel kvm -machine q35,memory-backend=ram -cpu host -smp 1 -m 192 \
        -object memory-backend-memfd,id=ram,size=192M,share=on \
        -nodefaults -no-user-config -display none -serial stdio \
        -kernel /opt/guest/vmlinux -initrd "$INITRD" -append "$(cmdline "$2")" \
        -chardev socket,id=balloon,path=/run/balloon \
        -device vhost-user-test-device-pci,chardev=balloon,virtio-id=5,num_vqs=5,config_size=16 \
        </run/ask >/run/said 2>/run/qemu.log &
    within grep -q READY /run/said
}

# move BROKER BROKER BANDWIDTH: the guest goes from one to the other, slowly enough for it to name
# pages before they are sent; the job.
move() {
    at "$1" --json migrate guest "unix:/run/$2.door" --max-downtime 2s --max-bandwidth "$3" || exit 1
    within runs_at "$2"
    deaf
    listen "$2"
}

# listen BROKER: to the guest's console, which is kept open from both sides.
listen() {
    mkfifo /run/ask && : >/run/said
    setsid sleep infinity >/run/ask 2>/dev/null &
    echo $! >/run/listeners
    setsid godwit --bus "/run/$1/bus" console --force guest </run/ask >/run/said 2>/dev/null &
    echo $! >>/run/listeners
}
# deaf: nobody listens any more.
deaf() {
    xargs kill </run/listeners 2>/dev/null
    rm -f /run/ask
}

# guest LINE: lets it carry that out; what it said, and its status.
guest() {
    local before
    before=$(wc -l </run/said)
    echo "$1" >/run/ask
    within answered "$before"
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
    for file in /proc/"$(pidof -s godwit-vmm qemu-system-x86_64)"/fd/*; do
        case $(readlink "$file") in
            /memfd:guest-ram* | /memfd:memory-backend*) echo $(($(stat -Lc %b "$file") / 2048)) && return ;;
        esac
    done
}
spent_below() { [ "$(spent)" -lt "$1" ]; }

# huge_pages NUMBER: has the host keep so many; and those that it has to spare.
huge_pages() {
    echo "$1" >/proc/sys/vm/nr_hugepages
    [ "$(huge)" = "$1" ] || { echo "the host has $(huge) huge pages" >&2 && exit 1; }
}
huge() { sed -n 's/^HugePages_Free: *//p' /proc/meminfo; }
huge_above() { [ "$(huge)" -gt "$1" ]; }
huge_below() { [ "$(huge)" -lt "$1" ]; }

# target BROKER SIZE: what the guest shall give.
target() { within at "$1" balloon guest "$2" >&2; }
# holds BROKER MIB: the balloon has just this size.
holds() { at "$1" --json balloon guest | tr -d ' \n' | grep -q "\"actual_bytes\":$(($2 << 20)),"; }
# says BROKER NAME: the guest says something of its memory.
says() { at "$1" --json balloon guest | grep -q "\"$2\""; }
runs_at() { at "$1" --no-legend list | grep -q "^guest  *running"; }
# counts BROKER NAME: the value of a counter of the balloon's process.
counts() { at "$1" --json device list guest | tr -d ' ",' | sed -n "s/^$2://p"; }
counts_above() { [ "$(counts "$1" "$2")" -gt "$3" ]; }

# measures NAME: the same, of a process that was started by hand.
measures() {
    printf 'GET /metrics HTTP/1.0\r\n\r\n' | socat -t 10 - UNIX:/run/metrics |
        sed -n "s/^godwit_balloon_$1_total \([0-9]*\).*/\1/p"
}
measures_above() { [ "$(measures "$1")" -gt "$2" ]; }

# expect WHAT COMMAND...
expect() {
    "${@:2}" || { echo "not so: $1 (free $(free), spent $(spent))" >&2 && exit 1; }
}
