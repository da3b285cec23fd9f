# The way from the PVH entry, or from a start-up IPI, to Rust at CPL3.
#
#   start32 (PVH, 32 bit) ──┐
#                           ├─► start64 (CPL0) ─► iretq ─► Rust (CPL3)
#   trampoline (AP, 16 bit) ┘
#
# Every instruction at CPL0 may cost a microsecond (see cpu.rs), so tables are laid out by the
# assembler where the linker can say the address, and nothing is done here that CPL3 can do.

.set MAX_CPUS, 32
.set STACK, 0x8000              # per CPU: the lowest page is the CPL0 stack, the rest is CPL3's
.set TSS_STEP, 0x80
.set COM1, 0x3f8

.section .note.pvh, "a", @note
  .long 4, 8, 18                # name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY
  .asciz "Xen"
  .quad start32                 # 8 bytes: QEMU reads no other size

.section .text.entry, "ax", @progbits
.code32
.globl start32
start32:                        # ebx = hvm_start_info
  mov dx, COM1
.irp letter, '@', 'f', 'i', 'r', 's', 't', '\n'
  mov al, \letter
  out dx, al
.endr
  cld
  mov edi, ebx
  xor esi, esi                  # CPU 0
  mov eax, offset boot_pml4
  mov cr3, eax
  mov eax, 0x620                # PAE, OSFXSR, OSXMMEXCPT
  mov cr4, eax
  mov ecx, 0xc0000080           # EFER
  xor edx, edx
  mov eax, 0x101                # LME, SCE
  wrmsr
  mov eax, 0x80000033           # PG, NE, ET, MP, PE
  mov cr0, eax
  lgdt [gdt_pointer]
  .byte 0xea                    # ljmp 0x10:start64
  .long start64
  .short 0x10

.code64
start64:                        # CPL0; edi = start info (CPU 0), esi = CPU
  lidt [idt_pointer]
  mov ecx, esi
  shl ecx, 4
  add ecx, 0x40                 # this CPU's TSS descriptor
  mov eax, esi
  shl eax, 7
  add eax, offset tss
  mov [rcx + gdt + 2], ax       # its base; the rest is in place
  shr eax, 16
  mov [rcx + gdt + 4], al
  mov [rcx + gdt + 7], ah
  ltr cx
  mov eax, esi
  inc eax
  shl eax, 15
  add eax, offset stacks
  mov ecx, 0x2b
  mov ds, ecx
  mov es, ecx
  lea rsp, [rax - STACK + 0x1000]
  push 0x2b
  sub eax, 8                    # as after a call: Rust wants RSP = 16n + 8
  push rax
  push 0x3002                   # IOPL 3
  push 0x33
  push offset rust_start
  iretq

# The application processors' first code, copied to TRAMPOLINE below 1 MiB.
.set TRAMPOLINE, 0x8000
.code16
.globl trampoline, trampoline_end
trampoline:
  cli
  xor ax, ax
  mov ds, ax
  .byte 0x66, 0x0f, 0x01, 0x16  # lgdt, with a 32-bit base
  .short TRAMPOLINE + trampoline_gdt - trampoline
  mov eax, 0x620
  mov cr4, eax
  mov eax, offset boot_pml4
  mov cr3, eax
  mov ecx, 0xc0000080
  xor edx, edx
  mov eax, 0x101
  wrmsr
  mov eax, 0x80000033
  mov cr0, eax
  .byte 0x66, 0xea              # ljmp 0x10:ap64
  .long ap64
  .short 0x10
.balign 4
trampoline_gdt:
  .short 0x40 + 16 * MAX_CPUS - 1
  .long gdt
trampoline_end:

.code64
ap64:
  mov esi, 1
  lock xadd [ap_ticket], esi    # CPUs number themselves in the order in which they come
  jmp start64

.section .data
.balign 16
# Linux's layout: 08 code32, 10 code64, 18 data, 23 user code32, 2b user data, 33 user code64, 40… TSS
.globl gdt
gdt:
  .quad 0, 0x00cf9b000000ffff, 0x00af9b000000ffff, 0x00cf93000000ffff
  .quad 0x00cffb000000ffff, 0x00cff3000000ffff, 0x00affb000000ffff, 0
.set cpu, 0
.rept MAX_CPUS
  .short TSS_STEP * (MAX_CPUS - cpu) + 0x2000
  .short 0
  .byte 0, 0x89, 0, 0
  .quad 0
  .set cpu, cpu + 1
.endr
gdt_pointer:
  .short 0x40 + 16 * MAX_CPUS - 1
  .quad gdt
idt_pointer:
  .short 0xfff
  .quad idt
.globl ap_ticket
.balign 4
ap_ticket: .long 1

# One TSS a CPU, and behind them one I/O bitmap for all, with every port allowed. It lets CPL3 use in
# and out where a KVM that emulates CPL0 loses IOPL at an IRETQ; IOPL does where QEMU's TCG runs the
# guest's processor: there no bitmap counts when the TSS was loaded as a busy one, as by a migration.
.balign 128
tss:
.set cpu, 0
.rept MAX_CPUS
  .long 0
  .quad stacks + STACK * cpu + 0x1000
  .fill 0x5a, 1, 0
  .short TSS_STEP * (MAX_CPUS - cpu)
  .fill TSS_STEP - 0x68, 1, 0
  .set cpu, cpu + 1
.endr
  .fill 0x2000, 1, 0
  .byte 0xff

# The first 4 GiB, one to one, user, in 2 MiB pages. Rust adds what lies above.
.balign 4096
.globl boot_pml4
boot_pml4:
  .quad boot_pdpt + 7
  .fill 511, 8, 0
boot_pdpt:
  .quad boot_pd + 7, boot_pd + 0x1007, boot_pd + 0x2007, boot_pd + 0x3007
  .fill 508, 8, 0
boot_pd:
.set address, 0
.rept 2048
  .quad address + 0x87
  .set address, address + 0x200000
.endr

.section .bss
.balign 4096
.globl idt, stacks
idt: .skip 4096
.balign 4096
stacks: .skip STACK * MAX_CPUS
