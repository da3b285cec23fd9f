# Everything that runs at CPL0 after the start: services, interrupts, exceptions.

.section .text
.code64

# Service gate (int3, DPL 3): eax = number, rdi and rsi = arguments; result in rax.
# The numbers are those of `Service` in cpu.rs.
.globl service_gate
service_gate:
  cmp eax, 1
  jb service_halt
  je service_read_msr
  cmp eax, 3
  jb service_write_msr
  je service_cpuid
  cmp eax, 5
  jb service_enable
  je service_disable
service_triple_fault:           # an empty IDT, and an instruction that needs it
  push 0
  push 0
  lidt [rsp]
  ud2
service_halt:                   # IF is off; sti lets nothing in before the hlt
  sti
  hlt
  cli
  iretq
service_read_msr:
  mov ecx, edi
  rdmsr
  shl rdx, 32
  or rax, rdx
  iretq
service_write_msr:
  mov ecx, edi
  mov eax, esi
  shr rsi, 32
  mov edx, esi
  wrmsr
  iretq
service_cpuid:                  # the hypervisor's CPUID; at CPL3 the hardware's may be seen
  mov eax, edi
  mov ecx, esi
  push rbx
  cpuid
  mov edi, ebx
  pop rbx
  iretq                         # eax, edi (for ebx), ecx, edx
service_enable:
  or dword ptr [rsp + 16], 0x200
  iretq
service_disable:
  and dword ptr [rsp + 16], 0xfffffdff
  iretq

# Interrupts only count and acknowledge; CPL3 looks at the counters.
.balign 16
.globl interrupt_stubs
interrupt_stubs:
.set vector, 0x20
.rept 0xe0
  .balign 16
  push rax
  mov eax, vector
  jmp interrupt
  .set vector, vector + 1
.endr
interrupt:
  lock inc dword ptr [interrupt_counts + rax * 4]
  cmp byte ptr [x2apic_mode], 0
  je 1f
  push rcx
  push rdx
  mov ecx, 0x80b                # EOI
  xor eax, eax
  xor edx, edx
  wrmsr
  pop rdx
  pop rcx
  pop rax
  iretq
1: mov eax, 0xfee000b0
  mov dword ptr [rax], 0
  pop rax
  iretq

# Exceptions: remember what happened, and go on at CPL3 in the Rust handler.
.balign 16
.globl exception_stubs
exception_stubs:
.set vector, 0
.rept 32
  .balign 16
  .if (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30)
  .else
  push 0                        # the error code that this one does not have
  .endif
  push vector
  jmp exception
  .set vector, vector + 1
.endr
exception:
  pop rdi
  pop rsi
  mov rdx, [rsp]                # rip
  mov rcx, cr2
  mov rax, [rsp + 24]           # rsp
  and rax, -16
  sub rax, 0x108
  mov [rsp + 24], rax
  mov qword ptr [rsp], offset exception_start
  mov qword ptr [rsp + 8], 0x33
  mov qword ptr [rsp + 16], 2
  mov qword ptr [rsp + 32], 0x2b
  iretq

.section .bss
.balign 64
.globl interrupt_counts, x2apic_mode
interrupt_counts: .skip 1024
x2apic_mode: .skip 1
