# What every guest of these tests begins with: names for numbers and places, and macros.
# Physical 0x100000 is the code, 0x200000 the shared data, 0x201000 variables (zero).
.set BASE, 0xffffffff80000000
.set SHARED, BASE + 0x200000
.set IRQ_ENABLED, SHARED + 64
.set IRQ_PENDING, SHARED + 68
.set BLOCKED, SHARED + 56
.set NOIRQ, SHARED + 32
.set FAULT_AT, SHARED + 72
.set RING_TAIL, SHARED + 256
.set VARS, BASE + 0x201000
.set STACK, BASE + 0x210000
.set USER_STACK, 0x220000
.set TRAP_STACK, BASE + 0x230000
.set DIRECT, 0xffff800000000000
.set check, 0

# A direct hypercall. Later arguments must not be registers that earlier ones are put into.
.macro hcall number, a=0, b=0, c=0, d=0
    mov rcx, \d
    mov rdx, \c
    mov rsi, \b
    mov rdi, \a
    mov eax, \number
    int 0x1f
.endm

# The end: a numbered check does not hold.
.macro fail
    hcall 2, 0, 0, 4, check
.endm

# The next check: a quad word in memory (or a register) has that value.
.macro expect value, what:vararg
    .set check, check + 1
    mov r15, \value
    cmp \what, r15
    je 771f
    fail
771:
.endm

.macro expect32 value, what:vararg
    .set check, check + 1
    cmp dword ptr [\what], \value
    je 772f
    fail
772:
.endm

# All checks hold.
.macro done
    hcall 2, 0, 0, 1
.endm

.macro begin
    mov qword ptr [VARS + 8 * 100], rdi
    hcall 1, 0x200000
    mov rsp, STACK
    mov rbx, VARS
.endm

# A gate.
.macro gate vector, label, kind=0
    lea rbx, [rip + \label]
    hcall 6, \vector, rbx, \kind
.endm

# A call that waits in the ring.
.macro queue number, a=0, b=0, c=0, d=0
    mov eax, dword ptr [RING_TAIL]
    and eax, 63
    imul rax, rax, 40
    mov rbx, SHARED + 512
    add rbx, rax
    mov qword ptr [rbx], \number
    mov rax, \a
    mov qword ptr [rbx + 8], rax
    mov rax, \b
    mov qword ptr [rbx + 16], rax
    mov rax, \c
    mov qword ptr [rbx + 24], rax
    mov rax, \d
    mov qword ptr [rbx + 32], rax
    add dword ptr [RING_TAIL], 1
.endm

# Saves a frame to six variables from number \n on (error code, RIP, CS, RFLAGS, RSP, SS), and
# counts in the one before.
.macro record n, code=0
    add qword ptr [VARS + 8 * \n], 1
    .if \code
    pop qword ptr [VARS + 8 * \n + 8]
    .endif
    pop qword ptr [VARS + 8 * \n + 16]
    pop qword ptr [VARS + 8 * \n + 24]
    pop qword ptr [VARS + 8 * \n + 32]
    pop qword ptr [VARS + 8 * \n + 40]
    pop qword ptr [VARS + 8 * \n + 48]
    sub rsp, 40
.endm

# A handler of a fault: records, and goes on \skip bytes behind the instruction. It leaves
# the interrupt flag as the fault found it.
.macro fault_handler n, code, skip
    record \n, \code
    add qword ptr [rsp], \skip
    push word ptr [rsp + 16]
    pop word ptr [IRQ_ENABLED]
    iretq
.endm

# Goes round until a quad word in memory has that value.
.macro wait_for value, what:vararg
773:
    cmp \what, \value
    jne 773b
.endm

# The same, of a double word.
.macro wait_for32 value, what:vararg
774:
    cmp dword ptr [\what], \value
    jne 774b
.endm

# To user mode at a label's physical address, which the identity map has.
.macro enter_user label
    push 0x23
    push USER_STACK
    push 0x202
    push 0x2b
    lea rax, [rip + \label]
    mov rbx, BASE
    sub rax, rbx
    push rax
    iretq
.endm

# Opens the identity map's first gigabyte to user mode: by its entries' U bits.
.macro open_to_user
    mov rbx, qword ptr [VARS + 8 * 100]
    mov rax, qword ptr [rbx + 88]
    mov rcx, DIRECT
    add rax, rcx
    or qword ptr [rax], 4
    mov rax, qword ptr [rax]
    and rax, -4096
    add rax, rcx
    or qword ptr [rax], 4
    mov rax, qword ptr [rax]
    and rax, -4096
    add rax, rcx
    or qword ptr [rax], 4
    or qword ptr [rax + 8], 4
    hcall 5, 1
.endm
