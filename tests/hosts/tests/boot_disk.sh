# A disk that a firmware boots, by GRUB: behind its file system of 64 MiB are the boot loader, a
# kernel and an initrd.
#
#   0        boot.img, in the file system's boot block, loads the first sector of
#   CORE     core.img, which loads the rest of itself, and then
#   KERNEL   } ROOM sectors each, zeros behind their ends
#   INITRD   }
readonly CORE=$((64 << 11)) KERNEL=$((65 << 11)) INITRD=$((81 << 11)) ROOM=$((16 << 11))

# loader FOLDER CMDLINE: makes boot.img and core.img, where GRUB is installed.
loader() {
    cat >"$1/grub.cfg" <<CONFIG
serial --unit=0 --speed=115200
terminal_output serial
linux (hd0)$KERNEL+$ROOM $2
initrd (hd0)$INITRD+$ROOM
boot
CONFIG
    grub-mkimage -O i386-pc -p "(hd0)" -c "$1/grub.cfg" -o "$1/core.img" biosdisk serial linux || exit
    cp /usr/lib/grub/i386-pc/boot.img "$1/boot.img" || exit
    # Where each has the sector that it loads.
    le64 $CORE | patch "$1/boot.img" 1 92
    le64 $((CORE + 1)) | patch "$1/core.img" 1 500
}
le64() {
    local byte
    for byte in 0 8 16 24 32 40 48 56; do printf '%b' "\\x$(printf %x $(($1 >> byte & 255)))"; done
}
# patch FILE UNIT AT: puts standard input there.
patch() { dd of="$1" bs="$2" seek="$3" conv=notrunc status=none; }

# bootable DISK FOLDER KERNEL INITRD: puts them onto a disk.
bootable() {
    truncate -s $(((INITRD + ROOM) * 512)) "$1"
    patch "$1" 512 0 <"$2/boot.img"
    patch "$1" 512 $CORE <"$2/core.img"
    patch "$1" 512 $KERNEL <"$3"
    patch "$1" 512 $INITRD <"$4"
}
