//! The first instructions, of which there are two sets: one kernel, two platforms.
//!
//! lguest starts the image in ring 1 and long mode, with page tables; a PC's loader by PVH, in
//! 32-bit protected mode without any. Which of the entries ran is how the kernel knows where
//! it is.

use core::arch::{global_asm, naked_asm};
use core::cell::UnsafeCell;

use lguest_abi::long::entry::{DIRECT_MAP, StartInfo};
use lguest_abi::long::note::{Descriptor, NAME, TYPE};
use lguest_abi::long::{Wire, feature};

use crate::boot::{Boot, Platform, bytes_at, direct, phys_of, set_platform};
use crate::{hypercall, kernel_main, ops, paging, pc, time, trap, user};

const STACK: usize = 64 << 10;
const PAGE: u64 = 4096;

#[repr(C, align(16))]
struct Stack(UnsafeCell<[u8; STACK]>);
// SAFETY: one CPU's stack, and nothing else's.
unsafe impl Sync for Stack {}
static BOOT_STACK: Stack = Stack(UnsafeCell::new([0; STACK]));

unsafe extern "C" {
    static kernel_end: u8;
}

// The note that lguest knows the image by (lguest_abi::long::note), written out because it
// holds an address that the linker decides.
global_asm!(
    ".pushsection .note.lguest, \"a\", @note",
    ".balign 4",
    ".long {name_len}, {desc_len}, {kind}",
    ".ascii \"lguest\\0\\0\"",
    ".long 1, 1",
    ".quad lguest_entry",
    ".quad {features}",
    ".popsection",
    name_len = const NAME.len() + 1,
    desc_len = const size_of::<Descriptor>(),
    kind = const TYPE,
    features = const feature::CLOCK,
);

/// lguest's entry: RDI has the start info.
#[unsafe(naked)]
#[unsafe(no_mangle)]
extern "sysv64" fn lguest_entry() -> ! {
    naked_asm!(
        "lea rsp, [rip + {stack} + {size}]",
        "xor ebp, ebp",
        "call {start}",
        "ud2",
        stack = sym BOOT_STACK,
        size = const STACK,
        start = sym start_on_lguest,
    )
}

/// What is loaded behind the image may begin here.
fn image_end() -> u64 {
    phys_of(&raw const kernel_end)
}

fn text(bytes: &'static [u8]) -> &'static str {
    core::str::from_utf8(bytes).unwrap_or_default()
}

static BOOT: BootCell =
    BootCell(UnsafeCell::new(Boot { memory: 0..0, command_line: "", initrd: &[] }));
struct BootCell(UnsafeCell<Boot>);
// SAFETY: written once, by the entry, before anybody reads it.
unsafe impl Sync for BootCell {}

impl BootCell {
    fn set(&'static self, boot: Boot) -> &'static Boot {
        // SAFETY: see above.
        unsafe {
            *self.0.get() = boot;
            &*self.0.get()
        }
    }
}

extern "sysv64" fn start_on_lguest(info: *const [u8; size_of::<StartInfo>()]) -> ! {
    set_platform(Platform::Lguest);
    // SAFETY: by the ABI it is there.
    let info = StartInfo::read(unsafe { &*info }).unwrap_or(StartInfo::ZERO);
    hypercall::introduce(info.features);
    ops::bind_lguest();
    paging::started_on(info.tables);
    time::on_lguest();
    trap::on_lguest();
    user::on_lguest();
    // The host has put its structures at memory's end, the start info lowest. They stay.
    let first = info.tables_start - 2 * PAGE;
    // SAFETY: the host wrote them, and nobody writes to that memory again.
    let (line, initrd) = unsafe {
        (bytes_at(info.cmdline, info.cmdline_len), bytes_at(info.initrd, info.initrd_len))
    };
    let boot = Boot { memory: image_end()..first, command_line: text(line), initrd };
    hypercall::set_bus(info.bus, info.bus_len);
    // SAFETY: `main!` has defined it.
    unsafe { kernel_main(BOOT.set(boot)) }
}

/// `struct hvm_start_info` (xen/include/public/arch-x86/hvm/start_info.h), version 1.
#[derive(Clone, Copy)]
#[repr(C)]
struct PvhInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    command_line: u64,
    rsdp: u64,
    map: u64,
    map_entries: u32,
    reserved: u32,
}

/// The longest command line that is looked for.
const LINE_MAX: u64 = 4096;
/// Physical memory above is not used: devices' registers follow.
const LOW_END: u64 = 0xc000_0000;
/// A map entry's kind: usable RAM.
const USABLE: u64 = 1;

extern "sysv64" fn start_on_pc(info: u64) -> ! {
    set_platform(Platform::Pc);
    // SAFETY: by PVH they are there, in the first 4 GiB, which the entry has mapped.
    let (info, map, modules) = unsafe {
        let info = *direct(info).cast::<PvhInfo>();
        let words = |at, count: u32| {
            core::slice::from_raw_parts(direct(at).cast::<[u64; 3]>(), count as usize)
        };
        let modules = core::slice::from_raw_parts(
            direct(info.module_list).cast::<[u64; 4]>(),
            info.modules as usize,
        );
        (info, words(info.map, info.map_entries), modules)
    };
    let first = image_end();
    let holds = |[start, len, _]: &[u64; 3]| (*start..start + len).contains(&first);
    let ram = map.iter().find(|entry| entry[2] & 0xffff_ffff == USABLE && holds(entry));
    let mut end = ram.map_or(first, |[start, len, _]| (start + len).min(LOW_END)) & !(PAGE - 1);
    let initrd = modules.first().map_or(&[][..], |[start, len, ..]| {
        // It lies at memory's end.
        end = end.min(start & !(PAGE - 1));
        // SAFETY: the loader wrote it, and nobody writes to that memory again.
        unsafe { bytes_at(*start, *len) }
    });
    // SAFETY: likewise, up to its zero.
    let line = unsafe { bytes_at(info.command_line, LINE_MAX) };
    let line = line.split(|byte| *byte == 0).next().unwrap_or_default();
    pc::segments::load();
    ops::bind_pc();
    pc::start();
    user::on_pc();
    let boot = Boot { memory: first..end, command_line: text(line), initrd };
    // SAFETY: `main!` has defined it.
    unsafe { kernel_main(BOOT.set(boot)) }
}

/// The first page tables on a PC, zero until the entry fills them: a top level, a table of
/// pointers for the first 4 GiB, one for the kernel, four directories.
#[repr(C, align(4096))]
struct FirstTables(UnsafeCell<[[u64; 512]; 7]>);
// SAFETY: the CPU's, from the entry on.
unsafe impl Sync for FirstTables {}
#[unsafe(no_mangle)]
static PC_TABLES: FirstTables = FirstTables(UnsafeCell::new([[0; 512]; 7]));

// The PVH entry: 32-bit, physical addresses, EBX has the start info. It maps the first 4 GiB
// at 0 and in the direct map, the first GiB where the kernel is linked, turns paging, long
// mode and SSE on, and goes up.
global_asm!(
    ".set low, 0xffffffff80000000",
    ".pushsection .note.Xen, \"a\", @note",
    ".balign 4",
    ".long 4, 4, 18",
    ".asciz \"Xen\"",
    ".long pvh_entry - low",
    ".popsection",
    ".pushsection .text.pvh, \"ax\"",
    ".code32",
    "pvh_entry:",
    "cld",
    "movl $(PC_TABLES - low), %edi",
    // Top level: identity, direct map, kernel.
    "leal 0x1003(%edi), %eax",
    "movl %eax, (%edi)",
    "movl %eax, 256 * 8(%edi)",
    "leal 0x2003(%edi), %eax",
    "movl %eax, 511 * 8(%edi)",
    // Pointers: four directories; the kernel's second last is the first directory.
    "leal 0x3003(%edi), %eax",
    "movl %eax, 0x2000 + 510 * 8(%edi)",
    "xorl %ecx, %ecx",
    "2: movl %eax, 0x1000(%edi, %ecx, 8)",
    "addl $0x1000, %eax",
    "incl %ecx",
    "cmpl $4, %ecx",
    "jb 2b",
    // Directories: 2048 pages of 2 MiB.
    "xorl %ecx, %ecx",
    "movl $0x83, %eax",
    "3: movl %eax, 0x3000(%edi, %ecx, 8)",
    "addl $0x200000, %eax",
    "incl %ecx",
    "cmpl $2048, %ecx",
    "jb 3b",
    "movl %edi, %cr3",
    // PAE, OSFXSR, OSXMMEXCPT.
    "movl %cr4, %eax",
    "orl $0x620, %eax",
    "movl %eax, %cr4",
    // EFER: SCE, LME, NXE.
    "movl $0xc0000080, %ecx",
    "rdmsr",
    "orl $0x901, %eax",
    "wrmsr",
    // PG, WP, NE, MP; not EM.
    "movl %cr0, %eax",
    "andl $~4, %eax",
    "orl $0x80010022, %eax",
    "movl %eax, %cr0",
    "lgdt pvh_gdt_pointer - low",
    "ljmp $8, $(4f - low)",
    ".code64",
    "4: movabsq $5f, %rax",
    "jmp *%rax",
    "5: movl $16, %eax",
    "movl %eax, %ss",
    "movl %eax, %ds",
    "movl %eax, %es",
    "leaq {stack} + {size}(%rip), %rsp",
    "xorl %ebp, %ebp",
    "movl %ebx, %edi",
    "call {start}",
    "ud2",
    ".balign 8",
    "pvh_gdt: .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff",
    "pvh_gdt_pointer: .word 23",
    ".long pvh_gdt - low",
    ".popsection",
    stack = sym BOOT_STACK,
    size = const STACK,
    start = sym start_on_pc,
    options(att_syntax)
);

const _: () = assert!(DIRECT_MAP == 0xffff_8000_0000_0000, "the 256th entry of the top level");
