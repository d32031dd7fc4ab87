//! Interrupts: the flag and its windows, blocking, sleeping.

use super::*;

guest!(
    windows,
    "
    begin
    gate 0x20, 8f
    # Off: it waits, and says so.
    hcall 9, 1000
    wait_for32 0x200, IRQ_PENDING
    expect 0, qword ptr [VARS]
    # On, and asked for.
    mov eax, 0x200
    xchg dword ptr [IRQ_ENABLED], eax
    hcall 19
    expect 1, qword ptr [VARS]
    expect32 0, IRQ_PENDING
    # It comes by itself when interrupts are on,
    hcall 9, 1000
    wait_for 2, qword ptr [VARS]
    # once,
    mov ebx, 100000
1:  dec ebx
    jnz 1b
    expect 2, qword ptr [VARS]
    # and not after it was called off.
    mov dword ptr [IRQ_ENABLED], 0
    hcall 9, 50000000
    hcall 9, 0
    mov dword ptr [IRQ_ENABLED], 0x200
    hcall 9, 2000000
    hcall 10
    expect 3, qword ptr [VARS]
    # A guest that only stores the flag gets it within a millisecond.
    mov dword ptr [IRQ_ENABLED], 0
    hcall 9, 1000
    wait_for32 0x200, IRQ_PENDING
    mov dword ptr [IRQ_ENABLED], 0x200
    wait_for 4, qword ptr [VARS]
    # Blocked: no pending word; unblocked by a store: it comes.
    mov qword ptr [BLOCKED], 1
    hcall 9, 1000
    mov ebx, 3000000
1:  dec ebx
    jnz 1b
    expect32 0, IRQ_PENDING
    expect 4, qword ptr [VARS]
    mov qword ptr [BLOCKED], 0
    wait_for 5, qword ptr [VARS]
    # Without a gate it waits for one.
    hcall 6, 0x20, 0
    hcall 9, 1000
    mov ebx, 3000000
1:  dec ebx
    jnz 1b
    expect 5, qword ptr [VARS]
    gate 0x20, 8f
    expect 6, qword ptr [VARS]
    # HALT lets it in, whatever the flag was.
    mov dword ptr [IRQ_ENABLED], 0
    hcall 9, 1000000
    hcall 10
    expect 7, qword ptr [VARS]
    expect 9, qword ptr [VARS + 24]
    mov rax, qword ptr [VARS + 32]
    and eax, 0x200
    expect 0x200, rax
    done
8:  record 0
    push word ptr [rsp + 16]
    pop word ptr [IRQ_ENABLED]
    iretq
    "
);

#[test]
fn interrupts_come_when_they_may() {
    check(windows());
}

guest!(
    at_iretq,
    "
    begin
    gate 0x20, 8f
    gate 6, 9f
    # An interrupt that waits at the iretq of a handler comes right after it.
    mov dword ptr [IRQ_ENABLED], 0x200
    ud2
    expect 1, qword ptr [VARS]
    done
    # An exception: its handler makes an interrupt wait, then returns.
9:  hcall 9, 1000
    wait_for32 0x200, IRQ_PENDING
    add qword ptr [rsp], 2
    push word ptr [rsp + 16]
    pop word ptr [IRQ_ENABLED]
7:  iretq
8:  record 0
    push word ptr [rsp + 16]
    pop word ptr [IRQ_ENABLED]
    iretq
    "
);

#[test]
fn an_interrupt_that_waits_comes_behind_the_iretq() {
    check(at_iretq());
}

guest!(
    guarded,
    "
    lea rax, [rip + 7f]
    mov qword ptr [NOIRQ], rax
    begin
    gate 0x20, 8f
    gate 6, 9f, 1
    # Many times, so that the interrupt comes at the guarded instruction too: the deeper it
    # nests the lower RSP would get.
    mov r12, 2000
    mov qword ptr [VARS + 400], STACK
    mov dword ptr [IRQ_ENABLED], 0x200
1:  ud2
    dec r12
    jnz 1b
    expect STACK, rsp
    # The frames lay at most two deep.
    mov rax, STACK - 800
    cmp qword ptr [VARS + 400], rax
    ja 2f
    fail
2:  cmp qword ptr [VARS], 2000
    jae 2f
    fail
2:  done
    # With the clock's interrupt raised while the flag is off, and then the return.
9:  mov dword ptr [IRQ_ENABLED], 0
    mov eax, 9
    mov edi, 1
    int 0x1f
3:  cmp dword ptr [IRQ_PENDING], 0
    je 3b
    add qword ptr [rsp], 2
    # A step of the CPU's own at the flag's store stops at the iretq.
    push word ptr [rsp + 16]
    pop word ptr [IRQ_ENABLED]
7:  iretq
8:  inc qword ptr [VARS]
    cmp rsp, qword ptr [VARS + 400]
    jae 4f
    mov qword ptr [VARS + 400], rsp
4:  push word ptr [rsp + 16]
    pop word ptr [IRQ_ENABLED]
    jmp 7b
    "
);

#[test]
fn the_guarded_iretq_does_not_pile_up_frames() {
    check(guarded());
}

guest!(
    from_user,
    "
    begin
    open_to_user
    hcall 7, TRAP_STACK
    gate 0x20, 8f
    mov dword ptr [IRQ_ENABLED], 0x200
    hcall 9, 1000000
    enter_user 1f
1:  jmp 1b
8:  record 0
    expect 0x2b, qword ptr [VARS + 24]
    expect USER_STACK, qword ptr [VARS + 40]
    expect TRAP_STACK-40, rsp
    expect32 0, IRQ_ENABLED
    done
    "
);

#[test]
fn users_are_interrupted_too() {
    check(from_user());
}
