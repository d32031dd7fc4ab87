//! Traps of each kind, and the frames they make.

use super::*;

guest!(
    exceptions,
    "
    begin
    gate 0, 10f
    gate 3, 11f, 2
    gate 6, 12f, 1
    gate 13, 13f
    gate 14, 14f
    mov dword ptr [IRQ_ENABLED], 0x200
    # Division: an interrupt gate turns interrupts off, and shows that they were on.
    xor ecx, ecx
    lea r12, [rip + 1f]
    mov qword ptr [rsp - 64], 0x1234
    mov r13, rsp
1:  div ecx
    expect 1, qword ptr [VARS]
    expect r12, qword ptr [VARS + 16]
    expect 9, qword ptr [VARS + 24]
    mov rax, qword ptr [VARS + 32]
    and eax, 0x200
    expect 0x200, rax
    expect r13, qword ptr [VARS + 40]
    expect 0x11, qword ptr [VARS + 48]
    # The frame lay below the red zone, which is as it was.
    expect 0x1234, qword ptr [rsp - 64]
    expect STACK-128-40, qword ptr [VARS + 56]
    expect32 0, VARS + 64
    mov eax, dword ptr [IRQ_ENABLED]
    and eax, 0x200
    expect 0x200, rax
    mov dword ptr [IRQ_ENABLED], 0x200
    # A trap gate leaves them on.
    ud2
    expect 1, qword ptr [VARS + 80]
    expect32 0x200, VARS + 640
    mov dword ptr [IRQ_ENABLED], 0
    ud2
    expect 2, qword ptr [VARS + 80]
    mov rax, qword ptr [VARS + 80 + 32]
    and eax, 0x200
    expect 0, rax
    # Software interrupts: behind the instruction; to a gate that is not there, #GP.
    int3
    expect 1, qword ptr [VARS + 160]
    int 3
    expect 2, qword ptr [VARS + 160]
    int 6
    expect 3, qword ptr [VARS + 80]
    lea r12, [rip + 1f]
1:  int 0x55
    expect 1, qword ptr [VARS + 240]
    expect 0x55<<3|2, qword ptr [VARS + 248]
    expect r12, qword ptr [VARS + 256]
    # The vectors without gates are ignored.
    gate 2, 12f
    gate 8, 12f
    gate 31, 12f
    int 8
    expect 8<<3|2, qword ptr [VARS + 248]
    # A page fault, with code and CR2.
    mov rax, 0x123456789000
    mov qword ptr [rax], rax
    expect 1, qword ptr [VARS + 320]
    expect 2, qword ptr [VARS + 328]
    expect 0x123456789000, qword ptr [FAULT_AT]
    mov rax, qword ptr [rax]
    nop
    expect 0, qword ptr [VARS + 328]
    # A non-canonical address is #GP.
    mov rax, 0x1234567890000000
    mov rax, qword ptr [rax]
    expect 3, qword ptr [VARS + 240]
    expect 0, qword ptr [VARS + 248]
    # A stack that is not aligned: the frame is.
    sub rsp, 7
    mov rax, 0x1234567890000000
    mov rax, qword ptr [rax]
    add rsp, 7
    expect 4, qword ptr [VARS + 240]
    expect STACK-7, qword ptr [VARS + 240 + 40]
    expect STACK, rsp
    done
10: mov qword ptr [VARS + 56], rsp
    mov eax, dword ptr [IRQ_ENABLED]
    mov dword ptr [VARS + 64], eax
    fault_handler 0, 0, 2
11: record 20
    iretq
12: mov eax, dword ptr [IRQ_ENABLED]
    mov dword ptr [VARS + 640], eax
    record 10
    mov rax, qword ptr [rsp]
    cmp word ptr [rax], 0x0b0f
    jne 1f
    add qword ptr [rsp], 2
1:  iretq
13: record 30, 1
    mov rax, qword ptr [rsp]
    add qword ptr [rsp], 2
    cmp byte ptr [rax], 0xcd
    je 1f
    add qword ptr [rsp], 1
1:  iretq
14: fault_handler 40, 1, 3
    "
);

#[test]
fn traps_in_the_kernel_have_the_cpus_frames() {
    check(exceptions());
}

guest!(
    privileged,
    "
    begin
    gate 13, 8f
    gate 6, 9f
    mov ecx, 0x10
    .macro privileged text:vararg
    .set number, number + 1
    lea r12, [rip + 2f]
    \\text
2:  expect number, qword ptr [VARS]
    expect 0, qword ptr [VARS + 8]
    .endm
    .set number, 0
    privileged cli
    privileged sti
    privileged hlt
    privileged in al, dx
    privileged in eax, 0x64
    privileged out dx, al
    privileged out 0x80, al
    privileged insb
    privileged mov rax, cr0
    privileged mov cr0, rax
    privileged mov rax, cr3
    privileged mov cr3, rax
    privileged mov rax, cr4
    privileged mov cr4, rax
    privileged mov rax, cr8
    privileged mov rax, dr7
    privileged mov dr7, rax
    privileged rdmsr
    privileged wrmsr
    privileged lgdt [rsp]
    privileged lidt [rsp]
    privileged ltr ax
    privileged lldt ax
    privileged invlpg [rsp]
    privileged swapgs
    privileged sysretq
    privileged wbinvd
    privileged clts
    .purgem privileged
    # syscall in ring 1, vmcall anywhere: not there.
    lea r12, [rip + 2f]
    syscall
2:  lea r12, [rip + 2f]
    vmcall
2:  expect 2, qword ptr [VARS + 80]
    # popf cannot touch the CPU's flag; the guest's own is another.
    push 0
    popfq
    pushfq
    pop rax
    and eax, 0x3200
    expect 0x200, rax
    push 0x3202
    popfq
    pushfq
    pop rax
    and eax, 0x3200
    expect 0x200, rax
    # Selectors that are not there.
    mov eax, 0x18
    lea r12, [rip + 2f]
    mov ds, eax
2:  expect 0x18, qword ptr [VARS + 8]
    mov eax, 0x10
    lea r12, [rip + 2f]
    mov ss, eax
2:  expect 0x10, qword ptr [VARS + 8]
    # Ring 0 is nowhere to return to.
    push 0x10
    push rsp
    push 2
    push 8
    lea rax, [rip + 2f]
    push rax
    lea r12, [rip + 2f]
    iretq
2:  expect 8, qword ptr [VARS + 8]
    done
8:  record 0, 1
    mov qword ptr [rsp], r12
    iretq
9:  record 10
    mov qword ptr [rsp], r12
    iretq
    "
);

#[test]
fn privileged_instructions_are_general_protection() {
    check(privileged());
}

guest!(
    single_step,
    "
    begin
    gate 1, 8f
    push 0x302
    popfq
    nop
    nop
    expect 3, qword ptr [VARS]
    done
    # The third instruction of the above ends it.
8:  record 0
    cmp qword ptr [VARS], 3
    jb 1f
    and qword ptr [rsp + 16], ~0x100
1:  iretq
    "
);

#[test]
fn single_steps_trap_and_end() {
    check(single_step());
}

guest!(no_gate, "begin\n ud2");
guest!(
    no_stack,
    "
    begin
    gate 6, 1f
    mov rsp, 0x7000000000
1:  ud2
    "
);
guest!(
    low_stack,
    "
    begin
    gate 6, 1f
    xor esp, esp
1:  ud2
    "
);
guest!(
    read_only_stack,
    "
    begin
    gate 6, 1f
    mov rsp, BASE + 0x100800
1:  ud2
    "
);
guest!(
    stray_table,
    "
    begin
    gate 14, 1f
    mov rax, DIRECT + 0x300000
    mov rsi, qword ptr [VARS + 800]
    mov rsi, qword ptr [rsi + 88]
    mov rcx, DIRECT
    add rsi, rcx
    mov rdi, rax
    mov ecx, 512
    rep movsq
    mov rbx, 0x7f000003
    mov qword ptr [rax + 8], rbx
    hcall 4, 0x300000
    mov rax, 0x8000000000
    mov rax, qword ptr [rax]
1:  fail
    "
);
guest!(
    stray_page,
    "
    begin
    gate 14, 1f
    mov rbx, qword ptr [VARS + 800]
    mov rbx, qword ptr [rbx + 88]
    mov rcx, DIRECT
    mov rax, 0x7f000003
    mov rdx, qword ptr [rbx + rcx]
    and rdx, -4096
    mov qword ptr [rdx + rcx + 0xff8], rax
    or qword ptr [rdx + rcx + 0xff8], 0x80
    and qword ptr [rdx + rcx + 0xff8], ~0x3fffff80
    or qword ptr [rdx + rcx + 0xff8], 0x40000080
    mov rax, 0x7fc0000000
    mov rax, qword ptr [rax]
    nop
1:  fail
    "
);

#[test]
fn what_cannot_be_reflected_dies_of_a_reason() {
    for (code, reason) in [
        (no_gate(), "unhandled trap 6"),
        (no_stack(), "the frame of trap 6 cannot be pushed: 0x6fffffff58"),
        (low_stack(), "the frame of trap 6 cannot be pushed: 0x0"),
        (read_only_stack(), "the frame of trap 6 cannot be pushed: 0xffffffff8010"),
        (stray_table(), "a page table at physical 0x7f000000, on the way to 0x8000000000"),
        (stray_page(), "physical 0x40000000, where there is neither memory nor a device"),
    ] {
        let died = dies(code);
        assert!(died.contains(reason), "{died}");
    }
}
