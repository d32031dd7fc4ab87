//! Every hypercall, direct and in the ring.

use super::*;
use lguest_abi::long::call::number;

guest!(
    registers_are_kept,
    "
    begin
    mov rbp, 0x1111
    mov r8, 0x2222
    mov r11, 0x3333
    mov r14, 0x4444
    mov rcx, 3
    mov rdx, 2
    mov rsi, 1
    mov rdi, 0
    stc
    mov eax, 19
    int 0x1f
    pushfq
    pop r12
    and r12, 1
    expect 1, r12
    expect 19, rax
    expect 3, rcx
    expect 2, rdx
    expect 1, rsi
    expect 0, rdi
    expect 0x1111, rbp
    expect 0x2222, r8
    expect 0x3333, r11
    expect 0x4444, r14
    expect STACK, rsp
    done
    "
);

#[test]
fn all_registers_survive_a_call() {
    check(registers_are_kept());
}

guest!(
    ring,
    "
    begin
    # Nothing happens before the next direct call,
    queue 16, 0, 0x123456789
    queue 16, 1, 0x987654321
    queue 16, 0, 0x55
    rdfsbase rax
    expect 0, rax
    expect32 0, SHARED + 192
    # nor at a trap.
    gate 6, 8f
    rdfsbase rax
    expect 0x55, rax
    rdgsbase rax
    expect 0x987654321, rax
    expect32 3, SHARED + 192
    queue 16, 0, 0x66
    ud2
    rdfsbase rax
    expect 0x55, rax
    expect32 3, SHARED + 192
    hcall 0
    rdfsbase rax
    expect 0x66, rax
    expect32 4, SHARED + 192
    # The full ring, around its end.
    mov r12, 64
1:  queue 16, 1, r12
    dec r12
    jnz 1b
    hcall 0
    rdgsbase rax
    expect 1, rax
    expect32 68, SHARED + 192
    done
8:  fault_handler 0, 0, 2
    "
);

#[test]
fn the_ring_is_carried_out_in_order_by_direct_calls_only() {
    check(ring());
}

guest!(
    memory_calls,
    "
    begin
    gate 14, 8f
    # A page table of our own: the top level is a copy, with a page at 0x8000000000.
    mov rsi, qword ptr [VARS + 800]
    mov rsi, qword ptr [rsi + 88]
    mov rcx, DIRECT
    add rsi, rcx
    mov rdi, DIRECT + 0x300000
    mov ecx, 512
    rep movsq
    mov rdi, DIRECT + 0x300000
    mov qword ptr [rdi + 8], 0x301003
    mov qword ptr [rdi + 0x1000], 0x302003
    mov qword ptr [rdi + 0x2000], 0x303003
    mov qword ptr [rdi + 0x3000], 0x304003
    mov qword ptr [rdi + 0x4000], 0x77
    mov qword ptr [rdi + 0x5000], 0x88
    hcall 4, 0x300000
    mov r12, 0x8000000000
    expect 0x77, qword ptr [r12]
    # A, and after a store D, are set by the host.
    mov rdi, DIRECT + 0x300000
    expect 0x304023, qword ptr [rdi + 0x3000]
    mov qword ptr [r12 + 8], 1
    expect 0x304063, qword ptr [rdi + 0x3000]
    # A changed entry counts from SET_PTE, FLUSH_PAGE, FLUSH_TLB or SET_DIRECTORY on.
    mov qword ptr [rdi + 0x3000], 0x305003
    hcall 14, 0x300000, r12, 0x305003
    expect 0x88, qword ptr [r12]
    mov rdi, DIRECT + 0x300000
    mov qword ptr [rdi + 0x3000], 0x304003
    hcall 20, r12
    expect 0x77, qword ptr [r12]
    mov rdi, DIRECT + 0x300000
    mov qword ptr [rdi + 0x3000], 0x305003
    hcall 5, 0
    expect 0x88, qword ptr [r12]
    mov rdi, DIRECT + 0x300000
    mov qword ptr [rdi + 0x3000], 0x304003
    queue 5, 1
    hcall 0
    expect 0x77, qword ptr [r12]
    mov rdi, DIRECT + 0x300000
    mov qword ptr [rdi + 0x6000], 0x305003
    mov qword ptr [rdi + 0x2000], 0x306003
    hcall 15, 0x300000, r12, 2
    expect 0x88, qword ptr [r12]
    # An entry that was not present needs no telling.
    mov rdi, DIRECT + 0x300000
    mov qword ptr [rdi + 0x6008], 0x304003
    expect 0x77, qword ptr [r12 + 0x1000]
    # What is told of other tables concerns nobody, and is harmless.
    hcall 14, 0x400000, r12, 0
    hcall 15, 0x400000, r12, 4
    expect 0x88, qword ptr [r12]
    # Back on the first tables the page is gone.
    mov rax, qword ptr [VARS + 800]
    mov rax, qword ptr [rax + 88]
    hcall 4, rax
    mov rax, qword ptr [r12]
    expect 1, qword ptr [VARS]
    expect 0, qword ptr [VARS + 8]
    expect 0x8000000000, qword ptr [FAULT_AT]
    done
8:  fault_handler 0, 1, 4
    "
);

#[test]
fn page_tables_are_the_guests_and_exact() {
    check(memory_calls());
}

guest!(
    task_switched,
    "
    begin
    gate 7, 8f
    hcall 8, 1
    movd xmm0, eax
    expect 1, qword ptr [VARS]
    movd xmm0, eax
    expect 1, qword ptr [VARS]
    queue 8, 1
    hcall 0
    fld1
    expect 2, qword ptr [VARS]
    fstp st(0)
    done
8:  record 0
    hcall 8, 0
    iretq
    "
);

#[test]
fn ts_makes_the_fpu_trap() {
    check(task_switched());
}

guest!(
    clock,
    "
    begin
    # Wall clock: after 2020.
    mov rax, qword ptr [SHARED + 80]
    mov rbx, 1577836800
    cmp rax, rbx
    ja 1f
    fail
1:  mov eax, dword ptr [SHARED + 128]
    and eax, 1
    expect 0, rax
    # Nanoseconds now, from the TSC; twice, and they do not run backwards.
    xor ebp, ebp
    mov r12, 2
2:  rdtsc
    shl rdx, 32
    or rax, rdx
    sub rax, qword ptr [SHARED + 136]
    mov cl, byte ptr [SHARED + 156]
    test cl, cl
    js 3f
    shl rax, cl
    jmp 4f
3:  neg cl
    shr rax, cl
4:  mov ecx, dword ptr [SHARED + 152]
    mul rcx
    shrd rax, rdx, 32
    add rax, qword ptr [SHARED + 144]
    cmp rax, rbp
    jae 5f
    fail
5:  mov rbp, rax
    dec r12
    jnz 2b
    # It is not a minute since the start, nor nothing.
    mov rcx, 60000000000
    cmp rax, rcx
    jb 6f
    fail
6:  test rax, rax
    jnz 7f
    fail
7:  done
    "
);

#[test]
fn the_clock_is_kept() {
    check(clock());
}

guest!(
    speaks,
    "
    mov dword ptr [VARS], 0x6c6c6548
    mov dword ptr [VARS + 4], 0x00000a6f
    hcall 22, 0x201000, 6
    begin
    queue 22, 0x201000, 6
    hcall 22, 0x201000, 4
    mov dword ptr [VARS], 0x65794220
    hcall 2, 0x201000, 5, 4, 77
    "
);

#[test]
fn console_and_last_words() {
    let (outcome, printed) = run(config(image(speaks()), 60.0));
    assert_eq!(outcome, Outcome::Exited(77));
    assert_eq!(printed, "Hello\nHello\nHellByeo\n");
}

guest!(powers_off, "hcall 2, 0, 0, 1");
guest!(restarts, "hcall 2, 0, 0, 2");
guest!(
    panics,
    "
    begin
    mov dword ptr [VARS], 0x73706f6f
    hcall 2, 0x201000, 4, 3
    "
);

#[test]
fn each_reason_of_shutdown_has_its_outcome() {
    let outcome = |code| run(config(image(code), 60.0)).0;
    assert_eq!(outcome(powers_off()), Outcome::PoweredOff);
    assert_eq!(outcome(restarts()), Outcome::Reset);
    assert_eq!(outcome(panics()), Outcome::PanickedSaying("oops".into()));
}

/// `mov` of five registers and the trap.
pub(crate) fn call_code(words: [u64; 5]) -> Vec<u8> {
    let opcodes: [[u8; 2]; 5] =
        [[0x48, 0xb8], [0x48, 0xbf], [0x48, 0xbe], [0x48, 0xba], [0x48, 0xb9]];
    let moves = opcodes
        .iter()
        .zip(words)
        .flat_map(|(op, word)| op.iter().copied().chain(word.to_le_bytes()));
    moves.chain(lguest_abi::long::call::TRAP).collect()
}

#[test]
fn what_breaks_the_rules_dies_of_a_reason_that_names_the_call() {
    let init = call_code([number::LGUEST_INIT, DATA, 0, 0, 0]);
    let after = |words| [init.clone(), call_code(words)].concat();
    let end = 32 << 20;
    let cases: &[([u64; 5], &str)] = &[
        ([3, 0, 0, 0, 0], "hypercall 0x3 does not exist"),
        ([u64::MAX, 0, 0, 0, 0], "hypercall 0xffffffffffffffff does not exist"),
        ([1, DATA, 0, 0, 0], "LGUEST_INIT twice"),
        ([2, 0, 1025, 1, 0], "SHUTDOWN: argument 2 is 0x401"),
        ([2, 0, 0, 5, 0], "SHUTDOWN: argument 3 is 0x5"),
        ([2, 0, 0, 4, 256], "SHUTDOWN: argument 4 is 0x100"),
        ([2, end - 3, 4, 1, 0], "SHUTDOWN: 4 bytes at physical 0x1fffffd are not all memory"),
        ([4, 0x300001, 0, 0, 0], "NEW_PGTABLE: the table at physical 0x300001"),
        ([4, end, 0, 0, 0], "NEW_PGTABLE: the table at physical 0x2000000"),
        ([4, 1 << 63, 0, 0, 0], "NEW_PGTABLE: the table at physical 0x8000000000000000"),
        ([5, 2, 0, 0, 0], "FLUSH_TLB: argument 1 is 0x2"),
        ([6, 256, 0, 0, 0], "LOAD_IDT_ENTRY: argument 1 is 0x100"),
        ([6, 3, 1 << 60, 0, 0], "LOAD_IDT_ENTRY: argument 2"),
        ([6, 3, 0, 4, 0], "LOAD_IDT_ENTRY: argument 3 is 0x4"),
        ([7, 1 << 47, 0, 0, 0], "SET_STACK: argument 1"),
        ([8, 2, 0, 0, 0], "TS: argument 1 is 0x2"),
        ([14, 0, 1 << 47, 0, 0], "SET_PTE: argument 2"),
        ([15, 0, 0, 1, 0], "SET_DIRECTORY: argument 3 is 0x1"),
        ([16, 2, 0, 0, 0], "SET_BASE: argument 1 is 0x2"),
        ([16, 0, 1 << 47, 0, 0], "SET_BASE: argument 2"),
        ([17, 9, 0, 0, 0], "there is no device 9"),
        ([17, 0, 9, 0, 0], "device 0 has no queue 9"),
        ([17, 1 << 16, 0, 0, 0], "NOTIFY: argument 1 is 0x10000"),
        ([20, 1 << 47, 0, 0, 0], "FLUSH_PAGE: argument 1"),
        ([21, 1, 0, 0, 0], "there is no device 1"),
        ([21, 0, 256, 0, 0], "SET_STATUS: argument 2 is 0x100"),
        ([22, 0, 4097, 0, 0], "CONSOLE: argument 2 is 0x1001"),
        ([22, u64::MAX, 2, 0, 0], "CONSOLE: 2 bytes at physical 0xffffffffffffffff"),
        ([23, 1 << 47, 0, 0, 0], "SET_SYSCALL: argument 1"),
    ];
    for (words, reason) in cases {
        let died = dies(&after(*words));
        assert!(died.contains(reason), "{words:x?}: {died}");
    }
    let early = dies(&call_code([10, 0, 0, 0, 0]));
    assert!(early.contains("hypercall 0xa before LGUEST_INIT"), "{early}");
    let trap = dies(&[0x0f, 0x0b]);
    assert!(trap.contains("unhandled trap 6") && trap.contains("before LGUEST_INIT"), "{trap}");
}

#[test]
fn a_greeting_that_is_none_dies_of_the_field() {
    for (place, reason) in [
        (DATA + 8, "LGUEST_INIT: shared data is not a page of RAM"),
        (32 << 20, "LGUEST_INIT: shared data is not a page of RAM"),
        (DATA + 0x1000, "LGUEST_INIT: shared data begins with"),
    ] {
        let died = dies(&call_code([1, place, 0, 0, 0]));
        assert!(died.contains(reason), "{died}");
    }
}

guest!(
    blocked_halt,
    "
    begin
    mov qword ptr [BLOCKED], -1
    hcall 10
    "
);
guest!(
    long_ring,
    "
    begin
    mov dword ptr [RING_TAIL], 65
    hcall 0
    "
);
guest!(
    halt_in_ring,
    "
    begin
    queue 10
    hcall 0
    "
);
guest!(
    unknown_in_ring,
    "
    begin
    queue 99
    hcall 0
    "
);

#[test]
fn the_ring_and_halt_have_rules_of_their_own() {
    for (code, reason) in [
        (blocked_halt(), "HALT: all interrupts are blocked"),
        (long_ring(), "65 calls wait in its ring"),
        (halt_in_ring(), "HALT must not wait in the ring"),
        (unknown_in_ring(), "hypercall 0x63 does not exist"),
    ] {
        let died = dies(code);
        assert!(died.contains(reason), "{died}");
    }
}
