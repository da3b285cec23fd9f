# A stock Debian whose owner, who has nothing but busctl, pauses and resumes it, presses the power
# button and sees it go.
set -u
work=$(mktemp -d /run/machine.XXXXXX)
cd "$work" || exit 1

core() {
    busctl --address="unix:path=$work/control" "$1" org.godwit.Core1 /org/godwit/Core1 \
        org.godwit.Core1 "${@:2}"
}

# wait_for SECONDS COMMAND...
wait_for() {
    local tries
    for tries in $(seq "$1"); do
        "${@:2}" && return
        sleep 1
    done
    echo "not within $1 s: ${*:2}" >&2
    exit 1
}

godwit-blk --socket-path disk --blk-file /opt/guest/debian.ext4 &
wait_for 10 test -S disk
godwit-vmm --kernel /opt/guest/vmlinuz --initrd /opt/guest/initrd --cpus 2 --memory 512M \
    --cmdline "console=ttyS0 root=/dev/vda quiet mitigations=off" \
    --vhost-user blk,socket=disk --serial file=console --control-socket control &
vmm=$!
wait_for 120 grep -qs "login:" console

core call Pause && core get-property State
sleep 2
core call Resume && core get-property State
core call PowerButton && echo "pressed"
wait $vmm
echo "status $?"
grep -o "reboot: Power down" console
