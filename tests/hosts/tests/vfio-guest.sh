#!/bin/busybox sh
# First program of a Linux guest with an NVMe disk that is the host's, put over the one of
# /opt/guest/initrd: writes the disk, reads it back past the page cache, says what it found, and powers
# off.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev 2>/dev/null
while read -r module; do insmod "/usr/$module"; done </modules

disk=/dev/nvme0n1
tries=600
until [ -b $disk ] || [ $tries = 0 ]; do
    tries=$((tries - 1))
    sleep 0.1
done
sum() { sha256sum | cut -d ' ' -f 1; }

echo "L2-BOOT $(nproc) CPUs"
dd if=/dev/urandom of=/given bs=1M count=8 2>/dev/null
echo "L2-GIVEN $(sum </given)"
dd if=/given of=$disk bs=1M conv=fsync 2>/dev/null || echo "L2-FAIL writing"
echo 3 >/proc/sys/vm/drop_caches
echo "L2-READ $(dd if=$disk bs=1M count=8 2>/dev/null | sum)"
echo "L2-INTERRUPTS $(grep -c nvme /proc/interrupts) $(awk '/nvme/ { for (n = 2; n < NF - 2; n++) s += $n } END { print s + 0 }' /proc/interrupts)"
dmesg | grep -E 'nvme.*(timeout|reset|abort)|BUG|WARNING|Call Trace' | sed 's/^/L2-FAIL /'
echo L2-DONE
sync
poweroff -f
