# A Linux guest that is given the host's NVMe disk. `vfio-guest.sh` is what runs in it.
set -u
readonly BUS=/run/godwit/bus

# within SECONDS COMMAND...
within() {
    local end=$((SECONDS + $1))
    shift
    while [ "$SECONDS" -lt "$end" ]; do
        "$@" && return
        sleep 0.2
    done
    echo "not in time: $*" >&2
    exit 1
}
# disk: the address of the NVMe disk, by its class.
disk() {
    local device
    for device in /sys/bus/pci/devices/*; do
        [ "$(cat "$device/class")" = 0x010802 ] && basename "$device" && return
    done
    return 1
}
driver() { basename "$(readlink "/sys/bus/pci/devices/$address/driver")"; }
has_driver() { [ "$(driver)" = "$1" ]; }
godwit() { /usr/local/bin/godwit --bus $BUS "$@"; }
is() { godwit --no-legend list | grep -q "^$1  *$2"; }

# machine NAME: makes one with the disk, and starts it.
machine() {
    godwit run --detach --keep --name "$1" --cpus 2 --memory 192M --kernel /opt/guest/vmlinuz \
        --initrd /run/initrd --cmdline "console=ttyS0 quiet panic=-1 mitigations=off nowatchdog" \
        --vfio "host=$address,id=nvme" 2>&1
}
# uses: a guest uses the disk, which the host had before and has afterwards.
uses() {
    mkdir -p /run/tree
    install -m 755 /share/vfio-guest.sh /run/tree/init
    (cat /opt/guest/initrd && cd /run/tree && find . | busybox cpio -o -H newc) >/run/initrd 2>/dev/null
    setsid godwit-broker --runtime-dir /run/godwit </dev/null >/run/broker.log 2>&1 &
    within 60 test -S $BUS
    within 60 disk >/dev/null
    address=$(disk)
    within 60 has_driver nvme
    machine early | grep -o "its driver is nvme: give it to vfio-pci"

    modprobe vfio-pci
    echo vfio-pci >"/sys/bus/pci/devices/$address/driver_override"
    echo "$address" >"/sys/bus/pci/devices/$address/driver/unbind"
    echo "$address" >/sys/bus/pci/drivers_probe
    has_driver vfio-pci || exit 1

    machine guest || { cat /run/broker.log && exit 1; }
    machine second | grep -o "another machine or program has it"
    within 200 is guest off
    godwit logs guest console | tr -d '\r' | grep -a -o 'L2-.*'

    # The host has it again, with what the guest wrote.
    echo >"/sys/bus/pci/devices/$address/driver_override"
    echo "$address" >"/sys/bus/pci/devices/$address/driver/unbind"
    echo "$address" >/sys/bus/pci/drivers_probe
    within 60 test -b /dev/nvme0n1
    echo "HOST-READ $(dd if=/dev/nvme0n1 bs=1M count=8 2>/dev/null | sha256sum | cut -d ' ' -f 1)"
}
