//! The bus: a device from its block to its reset, and its interrupts.

use std::sync::Arc;

use vmm::devices::virtio::Entropy;

use super::*;

guest!(
    entropy,
    "
    .set BUS, DIRECT + (32 << 20)
    .set DEVICE, 512
    begin
    gate 0x22, 8f
    mov rbp, BUS
    mov rax, 0x736274736575676c
    cmp rax, qword ptr [rbp]
    je 1f
    fail
1:  expect32 2, rbp+8
    expect32 512, rbp+12
    add rbp, DEVICE
    # An entropy source with one queue, and a console behind it.
    expect32 4, rbp
    expect32 3, rbp+DEVICE
    expect32 1, rbp+4
    mov eax, dword ptr [rbp + 12]
    and eax, 1
    expect 1, rax
    expect32 1, rbp+32
    mov eax, dword ptr [rbp + 192]
    shr eax, 16
    expect 2, rax
    # A notification before anything is set up means nothing.
    hcall 17, 0, 0
    # Features that were not offered.
    mov rax, -1
    mov qword ptr [rbp + 16], rax
    hcall 21, 0, 11
    expect32 3, rbp+24
    hcall 21, 0, 0
    expect32 0, rbp+24
    # Version 1 only.
    mov rax, 1 << 32
    mov qword ptr [rbp + 16], rax
    hcall 21, 0, 1
    hcall 21, 0, 3
    hcall 21, 0, 11
    expect32 11, rbp+24
    # A queue of four at 0x300000; a buffer of 8 bytes at 0x304000.
    mov word ptr [rbp + 192 + 4], 4
    mov word ptr [rbp + 192 + 6], 1
    mov qword ptr [rbp + 192 + 8], 0x300000
    mov qword ptr [rbp + 192 + 16], 0x301000
    mov qword ptr [rbp + 192 + 24], 0x302000
    mov rbx, DIRECT + 0x300000
    mov qword ptr [rbx], 0x304000
    mov rax, 0x200000008
    mov qword ptr [rbx + 8], rax
    hcall 21, 0, 15
    expect32 15, rbp+24
    # Once by the ring of calls and once directly; it says so by its interrupt.
    mov r12, 1
2:  mov rbx, DIRECT + 0x300000
    mov word ptr [rbx + 0x1002], r12w
    queue 17, 0, 0
    hcall 10
    mov rbx, DIRECT + 0x300000
    movzx eax, word ptr [rbx + 0x2002]
    expect r12, rax
    expect r12, qword ptr [VARS]
    mov dword ptr [IRQ_ENABLED], 0
    inc r12
    cmp r12, 3
    jb 2b
    cmp qword ptr [rbx + 0x4000], 0
    jne 3f
    fail
    # Interrupts that are not wanted do not come.
3:  mov rbx, DIRECT + 0x300000
    mov word ptr [rbx + 0x1000], 1
    mov word ptr [rbx + 0x1002], r12w
    hcall 17, 0, 0
4:  cmp word ptr [rbx + 0x2002], r12w
    jne 4b
    hcall 21, 0, 0
    mov dword ptr [IRQ_ENABLED], 0x200
    hcall 19
    expect 2, qword ptr [VARS]
    # After the reset nothing is written any more.
    mov rbx, DIRECT + 0x300000
    mov qword ptr [rbx + 0x4000], 0
    mov word ptr [rbx + 0x1002], 9
    hcall 17, 0, 0
    hcall 9, 3000000
    gate 0x20, 9f
    hcall 10
    mov rbx, DIRECT + 0x300000
    expect 0, qword ptr [rbx + 0x4000]
    # A ring outside of memory: the device needs a reset, by the other interrupt.
    gate 0x21, 9f
    mov rax, 1 << 32
    mov qword ptr [rbp + 16], rax
    mov rax, 32 << 20
    mov qword ptr [rbp + 192 + 24], rax
    hcall 21, 0, 11
    hcall 21, 0, 15
    expect32 79, rbp+24
    expect 2, qword ptr [VARS + 80]
    done
8:  record 0
    push word ptr [rsp + 16]
    pop word ptr [IRQ_ENABLED]
    iretq
9:  record 10
    push word ptr [rsp + 16]
    pop word ptr [IRQ_ENABLED]
    iretq
    "
);

#[test]
fn a_device_works_over_the_bus() {
    let (mut config, console) = config(image(entropy()), 60.0);
    config.devices = vec![Box::new(Entropy::new(Arc::clone(&config.io)))];
    let (outcome, _) = run((config, console));
    assert_eq!(outcome, Outcome::PoweredOff);
}
