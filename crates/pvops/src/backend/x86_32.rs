//! The interrupt ops as text for 32-bit code.
//!
//! There is no thunk macro to expand here and no Rust to call: 32-bit kernels assemble
//! this text (from a 64-bit build between `.code32` and `.code64`). Labels begin with the
//! prefix given; memory operands are spelled by the user, who knows where things lie.

/// Expands to the assembly text of a backend's four interrupt ops:
/// `NAME_save_fl`, `NAME_restore_fl`, `NAME_irq_disable`, `NAME_irq_enable`.
///
/// * `native`, `vsmp`: the prefix only.
/// * `lguest`: then the address expressions of `irq_enabled`, `irq_pending` and of a
///   callee-save function that makes the hypercall.
/// * `xen`: then those of `vcpu_info` and of a callee-save function that forces a callback.
///
/// They preserve every register but the return registers, EAX and EDX.
#[macro_export]
macro_rules! x86_32_irq_text {
    (native, $p:literal) => {
        concat!(
            $p, "_save_fl: pushfd; pop eax; ret\n",
            $p, "_restore_fl: push eax; popfd; ret\n",
            $p, "_irq_disable: cli; ret\n",
            $p, "_irq_enable: sti; ret\n",
        )
    };
    (vsmp, $p:literal) => {
        concat!(
            $p, "_save_fl: pushfd; pop eax; test eax, 0x40000; je 2f; and eax, 0xfffffdff; 2: ret\n",
            $p, "_restore_fl: and eax, 0xfffbffff; test eax, 0x200; jne 2f; or eax, 0x40000; ",
            "2: push eax; popfd; ret\n",
            $p, "_irq_disable: pushfd; pop eax; and eax, 0xfffffdff; or eax, 0x40000; push eax; popfd; ret\n",
            $p, "_irq_enable: pushfd; pop eax; and eax, 0xfffbffff; or eax, 0x200; push eax; popfd; ret\n",
        )
    };
    (lguest, $p:literal, $enabled:literal, $pending:literal, $send:literal) => {
        concat!(
            $p, "_save_fl: mov eax, [", $enabled, "]; ret\n",
            $p, "_restore_fl: mov edx, eax; and edx, 0x200; xchg [", $enabled, "], edx; ",
            "and eax, 0x200; test [", $pending, "], eax; jne 2f; ret; 2: jmp ", $send, "\n",
            $p, "_irq_disable: mov dword ptr [", $enabled, "], 0; ret\n",
            $p, "_irq_enable: mov eax, 0x200; xchg [", $enabled, "], eax; ",
            "cmp dword ptr [", $pending, "], 0; jne 2f; ret; 2: jmp ", $send, "\n",
        )
    };
    (xen, $p:literal, $info:literal, $force:literal) => {
        concat!(
            $p, "_save_fl: xor eax, eax; cmp byte ptr [", $info, " + 1], 0; sete ah; add ah, ah; ret\n",
            $p, "_restore_fl: test ah, 2; sete byte ptr [", $info, " + 1]; ",
            "cmp word ptr [", $info, "], 1; je 2f; ret; 2: jmp ", $force, "\n",
            $p, "_irq_disable: mov byte ptr [", $info, " + 1], 1; ret\n",
            $p, "_irq_enable: mov byte ptr [", $info, " + 1], 0; ",
            "cmp byte ptr [", $info, "], 0; jne 2f; ret; 2: jmp ", $force, "\n",
        )
    };
}

/// `pushfd; pop eax`: the native template for a 32-bit `save_fl` site.
pub const SAVE_FL: &[u8] = &[0x9c, 0x58];
/// `push eax; popfd`
pub const RESTORE_FL: &[u8] = &[0x50, 0x9d];
/// `cli`
pub const IRQ_DISABLE: &[u8] = &[0xfa];
/// `sti`
pub const IRQ_ENABLE: &[u8] = &[0xfb];
