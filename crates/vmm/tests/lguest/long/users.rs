//! User mode: how it is entered and left, and what it cannot do.

use super::*;

guest!(
    system_calls,
    "
    begin
    open_to_user
    hcall 7, TRAP_STACK
    lea rbx, [rip + 8f]
    hcall 23, rbx
    hcall 16, 0, 0x1111
    hcall 16, 1, 0x2222
    mov dword ptr [IRQ_ENABLED], 0x200
    enter_user 1f
1:  std
    mov r10, rsp
    lea r12, [rip + 2f]
    syscall
2:  ud2
    # In the kernel: the frame, the registers, the flags.
8:  mov r14, rsp
    pushfq
    pop r13
    mov rbp, rsp
    cld
    mov rdx, BASE
    expect r12, qword ptr [rbp]
    expect 0x2b, qword ptr [rbp + 8]
    mov rax, qword ptr [rbp + 16]
    and eax, 0x600
    expect 0x600, rax
    expect USER_STACK, qword ptr [rbp + 24]
    expect 0x23, qword ptr [rbp + 32]
    expect r12, rcx
    expect TRAP_STACK-40, r14
    and r11, 0x400
    expect 0x400, r11
    and r13, 0x600
    expect 0x200, r13
    expect32 0, IRQ_ENABLED
    mov eax, cs
    expect 9, rax
    mov eax, ss
    expect 0x11, rax
    rdfsbase rax
    expect 0x1111, rax
    rdgsbase rax
    expect 0x2222, rax
    # Back, and in again with other bases, which stay.
    lea rbx, [rip + 9f]
    hcall 23, rbx
    lea rax, [rip + 1f]
    mov rbx, BASE
    sub rax, rbx
    mov qword ptr [rbp], rax
    mov rsp, rbp
    iretq
1:  mov eax, 0x5555
    wrgsbase rax
    rdfsbase r9
    mov eax, ds
    syscall
9:  expect 0x1111, r9
    rdgsbase rax
    expect 0x5555, rax
    rdfsbase rax
    expect 0x1111, rax
    done
    "
);

#[test]
fn system_calls_enter_on_the_kernels_stack() {
    check(system_calls());
}

guest!(
    user_faults,
    "
    begin
    open_to_user
    hcall 7, TRAP_STACK
    gate 6, 6f
    gate 13, 13f
    gate 14, 14f
    gate 0x80, 80f, 2
    gate 0x81, 80f
    gate 3, 80f, 3
    gate 0x82, 82f, 2
    enter_user 1f
    # Each instruction is tried with a resumption point in R12.
    .macro tried vector, code, text:vararg
    lea r12, [rip + 2f]
    \\text
2:  .set check, check + 1
    mov r11d, check
    cmp r8d, \\vector
    jne 98f
    cmp r9, \\code
    jne 98f
    xor r8d, r8d
    .endm
1:
    tried 13, 0, cli
    tried 13, 0, hlt
    tried 13, 0, in al, dx
    tried 13, 0, mov rax, cr3
    tried 13, 0, rdmsr
    tried 13, 0, swapgs
    # Hypercalls are the kernel's; vectors are those it opened.
    tried 13, 0xfa, int 0x1f
    tried 13, 0x81*8+2, int 0x81
    tried 13, 14*8+2, int 14
    tried 13, 0x20*8+2, int 0x20
    tried 0x80, 0, int 0x80
    tried 0x80, 0, int3
    # There is no system call yet.
    tried 6, 0, syscall
    # The kernel's pages, by its own map, the direct map, and the text of it.
    mov rax, VARS
    tried 14, 5, mov rbx, qword ptr [rax]
    tried 14, 7, mov qword ptr [rax], rbx
    mov rax, DIRECT
    tried 14, 5, mov rbx, qword ptr [rax]
    lea rax, [rip + 99f]
    mov rbx, BASE
    add rax, rbx
    tried 14, 0x15, jmp rax
    # Memory that the kernel has not opened, and what is not mapped.
    mov eax, 0x600000
    tried 14, 5, mov rbx, qword ptr [rax]
    mov rax, 0x700000000000
    tried 14, 6, mov qword ptr [rax], rbx
    # Ring 1 is nowhere to go to.
    push 0x11
    push rsp
    push 0x202
    push 9
    push r12
    tried 13, 8, iretq
    add rsp, 40
    .purgem tried
    xor r11d, r11d
98: int 0x82
99: nop
6:  mov r8d, 6
    xor r9d, r9d
    jmp 1f
13: mov r8d, 13
    pop r9
    jmp 1f
14: mov r8d, 14
    pop r9
    jmp 1f
80: mov r8d, 0x80
    xor r9d, r9d
1:  mov qword ptr [rsp], r12
    iretq
    # The end: R11 says which try was not as it should be.
82: hcall 2, 0, 0, 4, r11
    "
);

#[test]
fn user_programs_are_kept_from_everything_that_is_the_kernels() {
    let (outcome, _) = run(config(image(user_faults()), 60.0));
    assert_eq!(outcome, Outcome::Exited(0), "the number of the try");
}
