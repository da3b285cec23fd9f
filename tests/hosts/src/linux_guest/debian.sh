# The stock Debian disk: systemd runs one command from the kernel's command line and powers off.
prepare
export DISK=/opt/guest/debian.ext4
report='echo L2-DEBIAN $(cat /proc/1/comm) on $(findmnt -no SOURCE /) >/dev/console'
export CMDLINE="console=ttyS0 quiet panic=-1 mitigations=off root=/dev/vda systemd.run=\"/bin/sh -c '$report'\""
run
finish
exit 0
