# The host's side of the io workload; `prepare/guest/init` is the guest's.
prepare
export DISK=$work/disk.ext4
export CMDLINE="console=ttyS0 quiet panic=-1 mitigations=off godwit.test=io godwit.ip=10.9.0.2/24 godwit.peer=$ADDRESS"
truncate -s 64M "$DISK"
mke2fs -q -t ext4 "$DISK"
dd if=/dev/urandom of=given bs=1M count=64 status=none
socat -u TCP-LISTEN:5001,reuseaddr CREATE:taken &
takes=$!
socat -u FILE:given TCP-LISTEN:5002,reuseaddr &
gives=$!
run
kill $takes $gives 2>/dev/null
wait $takes $gives
echo "HOST-GIVEN $(sha256sum <given | cut -d ' ' -f 1)"
[ -e taken ] && echo "HOST-TAKEN $(sha256sum <taken | cut -d ' ' -f 1)"
finish
exit 0
