//! The first instruction: registers, maps, start info, CPUID.

use super::*;

guest!(
    first_instruction,
    "
    mov qword ptr [VARS], rsp
    mov rsp, STACK
    pushfq
    pop qword ptr [VARS + 16]
    mov qword ptr [VARS + 8], rax
    or qword ptr [VARS + 8], rbx
    or qword ptr [VARS + 8], rcx
    or qword ptr [VARS + 8], rdx
    or qword ptr [VARS + 8], rsi
    or qword ptr [VARS + 8], rbp
    or qword ptr [VARS + 8], r8
    or qword ptr [VARS + 8], r15
    mov rbp, rdi
    expect 0x202, qword ptr [VARS + 16]
    expect 0, qword ptr [VARS]
    expect 0, qword ptr [VARS + 8]
    mov eax, cs
    expect 0x09, rax
    mov eax, ss
    expect 0x11, rax
    mov eax, ds
    expect 0x11, rax
    mov eax, gs
    expect 0, rax
    rdgsbase rax
    expect 0, rax
    # The start info, in the direct map.
    expect 0x017472617473676c, qword ptr [rbp]
    mov eax, dword ptr [rbp + 8]
    expect 176, rax
    mov rax, qword ptr [rbp + 16]
    expect 0x100000001, rax
    expect 3, qword ptr [rbp + 24]
    expect 32<<20, qword ptr [rbp + 32]
    expect 0x100000, qword ptr [rbp + 40]
    expect 0x140000, qword ptr [rbp + 48]
    expect 5, qword ptr [rbp + 64]
    mov rbx, DIRECT
    mov rax, qword ptr [rbp + 56]
    mov eax, dword ptr [rax + rbx]
    expect 0x65697571, rax
    expect 0, qword ptr [rbp + 80]
    expect DIRECT, qword ptr [rbp + 112]
    expect 32<<20, qword ptr [rbp + 120]
    expect 0x1000, qword ptr [rbp + 128]
    # Three maps of the same memory.
    mov rax, qword ptr [SHARED]
    mov rcx, DIRECT + 0x200000
    cmp rax, qword ptr [rcx]
    je 1f
    fail
1:  mov ecx, 0x200000
    cmp rax, qword ptr [rcx]
    je 1f
    fail
1:  mov eax, 0x40000000
    xor ecx, ecx
    cpuid
    mov esi, eax
    expect 0x40000001, rsi
    mov esi, ebx
    expect 0x6575676c, rsi
    mov esi, ecx
    expect 0x676c7473, rsi
    mov esi, edx
    expect 0x74736575, rsi
    mov eax, 0x40000001
    cpuid
    expect 1, rax
    # SSE, AVX state and the rest work without further ado.
    mov eax, 0x3f800000
    movd xmm0, eax
    addss xmm0, xmm0
    movd eax, xmm0
    expect 0x40000000, rax
    sub rsp, 8
    stmxcsr dword ptr [rsp]
    mov eax, dword ptr [rsp]
    expect 0x1f80, rax
    mov eax, 1
    cpuid
    bt ecx, 26
    jnc 1f
    xor ecx, ecx
    xgetbv
    mov esi, eax
    mov eax, 0xd
    xor ecx, ecx
    cpuid
    cmp eax, esi
    je 1f
    fail
1:  done
    "
);

#[test]
fn the_first_instruction_finds_what_is_specified() {
    check(first_instruction());
}

guest!(
    identity_is_executable,
    "
    begin
    gate 14, 8f
    lea rax, [rip + 1f]
    mov rbx, BASE
    sub rax, rbx
    jmp rax
1:  lea rax, [rip + 2f]
    mov rbx, BASE
    add rax, rbx
    jmp rax
2:  mov rax, DIRECT + 0x100000
    lea rbx, [rip + 3f]
    mov qword ptr [VARS + 80], rbx
    jmp rax
3:  expect 1, qword ptr [VARS]
    expect 0x11, qword ptr [VARS + 8]
    # Text is not writable, though this is the supervisor.
    lea rax, [rip + 4f]
    mov qword ptr [VARS + 80], rax
    mov byte ptr [BASE + 0x100000], 0
    fail
4:  expect 2, qword ptr [VARS]
    expect 3, qword ptr [VARS + 8]
    # Nor are data executable.
    lea rax, [rip + 5f]
    mov qword ptr [VARS + 80], rax
    mov rax, VARS
    jmp rax
5:  expect 0x11, qword ptr [VARS + 8]
    done
8:  record 0, 1
    mov rax, qword ptr [VARS + 80]
    mov qword ptr [rsp], rax
    iretq
    "
);

#[test]
fn maps_have_the_permissions_they_should() {
    check(identity_is_executable());
}

guest!(
    initrd,
    "
    mov rbp, rdi
    mov rsp, STACK
    expect 9, qword ptr [rbp + 88 - 8]
    mov rax, qword ptr [rbp + 72]
    test eax, 4095
    jz 1f
    fail
1:  mov rbx, DIRECT
    mov rax, qword ptr [rax + rbx]
    mov rbx, 0x3837363534333231
    cmp rax, rbx
    je 1f
    fail
1:  done
    "
);

#[test]
fn a_command_line_and_an_initrd_arrive() {
    let (mut config, console) = config(image(initrd()), 60.0);
    config.initrds = vec![vmm::loader::Image::from_bytes("initrd", b"123456789".to_vec())];
    let (outcome, _) = run((config, console));
    assert_eq!(outcome, Outcome::PoweredOff);
}
