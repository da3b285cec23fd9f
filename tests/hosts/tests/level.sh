# Which instructions a stock Linux guest sees, by the `cpu` of its machine.
set -u

# shown LEVEL: those of some flags that the guest has.
shown() {
    # It reads its console when it has started.
    while sleep 1; do
        echo "grep -m 1 ^flags /proc/cpuinfo; poweroff -f"
    done | godwit-vmm --kernel /opt/guest/vmlinuz --initrd /opt/guest/initrd \
        --cmdline "console=ttyS0 quiet panic=-1" --memory 256M --serial stdio --cpu "$1" |
        tr -d '\r' | grep -m 1 '^flags' | tr ' ' '\n' |
        grep -xE 'sse2|sse4_2|avx|avx2|xsave|smep|sha_ni' | sort | tr '\n' ' '
    echo
}

for level in x86-64-v1 x86-64-v2 x86-64-v3 host; do
    echo "$level: $(shown "$level")"
done
godwit-vmm --kernel /opt/guest/vmlinuz --cpu x86-64-v4 --serial null 2>&1
