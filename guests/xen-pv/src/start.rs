//! How Xen finds and enters the kernel: the notes it reads, the page it hands over.

use core::arch::{global_asm, naked_asm};

// Xen, public/elfnote.h.
global_asm!(
    ".macro xen_note type, value:vararg",
    ".balign 4",
    ".long 2f - 1f, 4f - 3f, \\type",
    "1: .asciz \"Xen\"",
    "2: .balign 4",
    "3: \\value",
    "4: .balign 4",
    ".endm",
    ".pushsection .note.Xen, \"a\", @note",
    "xen_note 1, .quad xen_entry",
    "xen_note 2, .quad hypercall_page",
    "xen_note 3, .quad 0", // virtual addresses begin here,
    "xen_note 4, .quad 0", // and so do the ELF file's physical ones
    "xen_note 5, .asciz \"xen-3.0\"",
    "xen_note 6, .asciz \"pvops\"",
    "xen_note 8, .asciz \"generic\"",
    "xen_note 9, .asciz \"yes\"",
    "xen_note 10, .asciz \"!writable_page_tables|pae_pgdir_above_4gb\"",
    "xen_note 17, .quad 1 << 11", // can be the first domain
    ".popsection",
);

const STACK: usize = 64 << 10;

#[repr(C, align(16))]
struct Stack(core::cell::UnsafeCell<[u8; STACK]>);
// SAFETY: one CPU's stack, and nothing else's.
unsafe impl Sync for Stack {}
static BOOT_STACK: Stack = Stack(core::cell::UnsafeCell::new([0; STACK]));

/// Where Xen starts the first CPU: start info in RSI.
#[unsafe(naked)]
#[unsafe(no_mangle)]
extern "sysv64" fn xen_entry() -> ! {
    naked_asm!(
        "cld",
        "lea rsp, [rip + {stack} + {size}]",
        "xor ebp, ebp",
        "mov rdi, rsi",
        "call {main}",
        "ud2",
        stack = sym BOOT_STACK,
        size = const STACK,
        main = sym crate::main,
    )
}

/// `struct start_info` (Xen, public/xen.h), as far as it is of interest.
#[repr(C)]
pub(crate) struct StartInfo {
    magic: [u8; 32],
    /// Frames of this domain: as many as the table at `frames` has words.
    pub(crate) frame_count: u64,
    /// Machine address of what is shared with Xen.
    pub(crate) shared_info: u64,
    flags: u32,
    _store: [u64; 2],
    _console: [u64; 2],
    /// The top page table.
    pub(crate) page_table: usize,
    _page_table_frames: u64,
    /// The table of machine frames.
    pub(crate) frames: usize,
}

const _: () = assert!(core::mem::offset_of!(StartInfo, frames) == 104);

impl StartInfo {
    /// Whether it is what this kernel was made for.
    pub(crate) fn check(&self) {
        const INITIAL_DOMAIN: u32 = 2;
        assert!(self.magic.starts_with(b"xen-3.0-x86_64"), "start info has another format");
        assert!(self.flags & INITIAL_DOMAIN != 0, "not the first domain: its console is not ours");
    }
}
