# A boot sector that lives by its BIOS: it tells the memory map (int 15h) once, and then, at each
# tick of the timer, reads the disk's second sector (int 13h) and tells what is in it.
#
#   mSSSSSSSSSSSSSSSSLLLLLLLLLLLLLLLLTTTTTTTT   start, length and type of a range
#   rNNNNNNNNWWWWWWWW                           number of the read, first word of the sector
#   !                                           a read failed; it stops
    .code16
    .globl _start
_start:
    ljmp $0, $1f
1:  xor %ax, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov $0x7c00, %sp
    mov %dl, drive
    sti
    xor %ebx, %ebx
map:
    mov $0xe820, %eax
    mov $0x534d4150, %edx
    mov $20, %ecx
    mov $entry, %di
    int $0x15
    jc read
    push %ebx
    mov $'m', %al
    call put
    mov entry+4, %eax
    call hex
    mov entry, %eax
    call hex
    mov entry+12, %eax
    call hex
    mov entry+8, %eax
    call hex
    mov entry+16, %eax
    call hex
    call newline
    pop %ebx
    test %ebx, %ebx
    jnz map
read:
    hlt
    incl count
    movl $0, sector
    mov $0x42, %ah
    mov drive, %dl
    mov $packet, %si
    int $0x13
    jc failed
    mov $'r', %al
    call put
    mov count, %eax
    call hex
    mov sector, %eax
    call hex
    call newline
    jmp read
failed:
    mov $'!', %al
    call put
    call newline
    cli
    hlt

newline:
    mov $10, %al
put:
    push %ax
    mov $0x3fd, %dx
1:  in %dx, %al
    test $0x20, %al
    jz 1b
    pop %ax
    mov $0x3f8, %dx
    out %al, %dx
    ret

hex:
    mov $8, %cx
1:  rol $4, %eax
    push %eax
    and $15, %al
    cmp $10, %al
    jb 2f
    add $('a' - '0' - 10), %al
2:  add $'0', %al
    call put
    pop %eax
    loop 1b
    ret

    .balign 4
packet:
    .byte 16, 0
    .word 1, sector, 0
    .quad 1
count:
    .long 0
drive:
    .byte 0
    .org 510
    .word 0xaa55
    .set entry, 0x8000
    .set sector, 0x9000
