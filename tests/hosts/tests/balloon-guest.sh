#!/bin/busybox sh
# First program of a Linux guest with a balloon, put over the one of /opt/guest/initrd: carries out
# each line that it reads on its console, and says "ENDED" with the status.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev 2>/dev/null
mount -t tmpfs -o size=100% none /run
while read -r module; do insmod "/usr/$module"; done </modules
stty -echo

# random FILE MIB: bytes that no two pages share, and that are no zeros; keeps their checksum.
random() {
    dd if=/dev/urandom of="$1" bs=1M count="$2" 2>/dev/null || return
    sha256sum "$1" >>/run/sums
}
# fill FILE MIB: as many, faster, and none of them zero.
fill() {
    [ -e /run/seed ] || dd if=/dev/urandom of=/run/seed bs=1M count=4 2>/dev/null || return
    local n
    for n in $(seq $(($2 / 4))); do cat /run/seed || return; done >"$1"
}
# filled FILE MIB: whether it is as fill left it.
filled() {
    local sum
    sum=$(for n in $(seq $(($2 / 4))); do cat /run/seed; done | md5sum)
    [ "$sum" = "$(md5sum <"$1")" ]
}
# kept: whether every file of random is as it was.
kept() { sha256sum -c -s /run/sums; }
# free: MiB that nobody uses.
free() { echo "FREE $(($(sed -n 's/^MemFree: *\([0-9]*\) kB/\1/p' /proc/meminfo) / 1024))"; }
# calm: whether nothing was killed, and the kernel complains of nothing.
calm() { ! dmesg | grep -E 'Killed process|BUG|WARNING|Call Trace|memory corruption'; }
# poisons: whether the kernel fills what is free, and looks at it when it is taken.
poisons() { dmesg | grep -q 'PAGE_POISONING is on'; }

echo "READY $(nproc)"
while read -r line; do
    eval "$line"
    echo "ENDED $?"
done
