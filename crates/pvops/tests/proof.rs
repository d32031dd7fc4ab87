//! The interrupt ops, through every form of call, in 64-bit and 32-bit mode:
//! registers filled with patterns, called, compared; and the meaning of the interrupt ops
//! against a model. Ring 0, in the soft engine. (All other ops: `registers.rs`.)

mod rig;

use core::arch::global_asm;
use pvops::backend::{AC, IF, vmi, vsmp, x86_32};
use pvops::convention::Convention;
use pvops::dynamic::{DynamicThunk, SaveSet, Vectors};
use pvops::{CallKind, Code, Erased, Family, Form, Gpr, RegSet, Template, Width};
use rig::{CODE, DATA, Rig, changed};
use softcpu::state::rflags::RFlags;

// lguest's words, Xen's bytes, VMI's words, and how often the host was called.
const ENABLED: u64 = DATA;
const PENDING: u64 = DATA + 4;
const INFO: u64 = DATA + 0x10;
const CALLED: u64 = DATA + 0x20;

global_asm!(
    ".pushsection .rodata.pvops_proof, \"a\"",
    ".globl p32_start",
    "p32_start:",
    ".code32",
    pvops::x86_32_irq_text!(native, "p32_native"),
    pvops::x86_32_irq_text!(vsmp, "p32_vsmp"),
    pvops::x86_32_irq_text!(lguest, "p32_lguest", "0x5000", "0x5004", "p32_host_thunk"),
    pvops::x86_32_irq_text!(xen, "p32_xen", "0x5010", "p32_host_thunk"),
    // The host's side: a conventional function that trashes all it may, behind a thunk.
    pvops::thunk_text!(32, "p32_host_thunk", "p32_host"),
    "p32_host: inc dword ptr [0x5020]; mov eax, -1; mov ecx, -1; mov edx, -1; ret",
    // A conventional callee that returns a 64-bit pair, and its thunk.
    pvops::thunk_text!(32, "p32_pair_thunk", "p32_pair"),
    "p32_pair: mov ecx, esp; and ecx, 15; mov [0x5024], ecx; mov ecx, -1",
    "mov edx, 0x11223344; mov eax, 0x55667788; ret",
    // A VMI ROM that changes all its contract lets it: arithmetic flags, and EAX for the
    // call that returns. Its state is the same two words.
    "p32_vmi_save_fl: cmp dword ptr [0x5000], 1; sbb eax, eax; not eax; and eax, 0x200; stc; ret",
    "p32_vmi_irq_disable: mov dword ptr [0x5000], 0; cmp esp, 0; stc; ret",
    "p32_vmi_irq_enable: mov dword ptr [0x5000], 0x200; cmp dword ptr [0x5004], 0; je 2f",
    "inc dword ptr [0x5020]; 2: stc; ret",
    "p32_vmi_restore_fl: push eax; and eax, 0x200; mov [0x5000], eax; test [0x5004], eax; je 2f",
    "inc dword ptr [0x5020]; 2: pop eax; stc; ret",
    ".code64",
    ".globl p32_end",
    "p32_end:",
    ".popsection",
);

macro_rules! labels {
    ($($backend:ident)*) => {$(
        pub(crate) mod $backend {
            unsafe extern "C" {
                #[link_name = concat!("p32_", stringify!($backend), "_save_fl")]
                static SAVE: u8;
                #[link_name = concat!("p32_", stringify!($backend), "_restore_fl")]
                static RESTORE: u8;
                #[link_name = concat!("p32_", stringify!($backend), "_irq_disable")]
                static DISABLE: u8;
                #[link_name = concat!("p32_", stringify!($backend), "_irq_enable")]
                static ENABLE: u8;
            }
            pub(crate) fn entries() -> [u64; 4] {
                [&raw const SAVE, &raw const RESTORE, &raw const DISABLE, &raw const ENABLE]
                    .map(super::in_guest)
            }
        }
    )*};
}
mod labels32 {
    pub(crate) use super::in_guest;
    labels!(native vsmp lguest xen vmi);
}

unsafe extern "C" {
    static p32_start: u8;
    static p32_end: u8;
    static p32_pair_thunk: u8;
    static p32_pair: u8;
}

/// Where a label of the 32-bit text lies in the rig.
pub(crate) fn in_guest(label: *const u8) -> u64 {
    CODE + (label.addr() - (&raw const p32_start).addr()) as u64
}

fn text32() -> &'static [u8] {
    let len = (&raw const p32_end).addr() - (&raw const p32_start).addr();
    // SAFETY: both labels bound one piece of read-only data of this program.
    unsafe { core::slice::from_raw_parts(&raw const p32_start, len) }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keeper {
    /// IF alone.
    Flag,
    /// IF and not AC.
    FlagAndAc,
    /// A word, as lguest and the mock ROM keep it.
    Word,
    /// Xen's bytes.
    Bytes,
}

impl Keeper {
    fn delivers(self) -> bool {
        matches!(self, Self::Word | Self::Bytes)
    }

    fn set(self, rig: &Rig, enabled: bool, pending: bool) -> RFlags {
        let mut flags = RFlags::from_bits_retain(2);
        let set = |address, on: bool| {
            rig.machine.put(address, &(u32::from(on) * 0x200).to_le_bytes());
        };
        match self {
            Self::Flag => flags.set(RFlags::IF, enabled),
            Self::FlagAndAc => {
                flags.set(RFlags::IF, enabled);
                flags.set(RFlags::AC, !enabled);
            }
            Self::Word => {
                set(ENABLED, enabled);
                set(PENDING, pending);
            }
            Self::Bytes => rig.machine.put(INFO, &[u8::from(pending), u8::from(!enabled)]),
        }
        flags
    }

    fn enabled(self, rig: &Rig, flags: RFlags) -> bool {
        match self {
            Self::Flag => flags.contains(RFlags::IF),
            Self::FlagAndAc => {
                assert_ne!(flags.contains(RFlags::IF), flags.contains(RFlags::AC));
                flags.contains(RFlags::IF)
            }
            Self::Word => rig.word(ENABLED) == 0x200,
            Self::Bytes => rig.machine.get(INFO + 1, 1) == [0],
        }
    }
}

const OPS: [&str; 4] = ["save_fl", "restore_fl", "irq_disable", "irq_enable"];

/// One op through one site that is in the form asked for.
fn check(rig: &mut Rig, keeper: Keeper, op: usize, what: &str) {
    let keeps = Convention::of(rig.width).clobbers(CallKind::CalleeSave);
    for enabled in [false, true] {
        for pending in [false, true] {
            for argument in [0, 0x200, 0xdd, 0x2dd] {
                let flags = keeper.set(rig, enabled, pending);
                let called = rig.word(CALLED);
                let (before, after) = rig.run(&[argument], flags);
                let what = format!(
                    "{what} {:?} {} enabled {enabled} pending {pending} argument {argument:#x}",
                    rig.width, OPS[op]
                );
                let lost = changed(&before, &after).minus(keeps);
                assert!(lost.is_empty(), "{what}: lost {lost:?}");
                let now = keeper.enabled(rig, after.flags);
                let on = argument & 0x200 != 0;
                let (expected, delivered) = match op {
                    0 => (enabled, false),
                    1 => (on, on && pending),
                    2 => (false, false),
                    _ => (true, pending),
                };
                assert_eq!(now, expected, "{what}");
                if keeper.delivers() {
                    let calls = rig.word(CALLED).wrapping_sub(called);
                    assert_eq!(calls, u32::from(delivered), "{what}: host calls");
                }
                if op == 0 {
                    let result = after.gpr[Gpr::Rax as usize] & IF as u64 != 0;
                    assert_eq!(result, enabled, "{what}: result");
                }
            }
        }
    }
}

/// Indirect, direct and, where there is a template, in line.
fn check_forms(
    width: Width,
    keeper: Keeper,
    op: usize,
    load: &dyn Fn(&Rig),
    bound: Erased,
    what: &str,
) -> usize {
    let target = bound.target.addr() as u64;
    let mut rig = Rig::new(width, CallKind::CalleeSave, 10, target);
    load(&rig);
    check(&mut rig, keeper, op, &format!("{what} indirect"));
    for template in [Template::Call, bound.template] {
        let mut rig = Rig::new(width, CallKind::CalleeSave, 10, target);
        load(&rig);
        let report = rig.patch(Erased { template, ..bound });
        assert_eq!(report.indirect, 0);
        check(&mut rig, keeper, op, &format!("{what} {report}"));
    }
    // Through a dynamic thunk, in the thunk's own place.
    let mut rig = Rig::new(width, CallKind::CalleeSave, 10, CODE + 0x1000);
    load(&rig);
    let thunk = DynamicThunk { width, saves: SaveSet::callee_save(width), target };
    let mut memory = [0; DynamicThunk::MAX];
    let len = thunk.write(&mut memory, CODE + 0x1000).expect("written");
    rig.machine.put(CODE + 0x1000, &memory[..len]);
    check(&mut rig, keeper, op, &format!("{what} thunked"));
    4
}

fn guest(target: u64, template: Template) -> Erased {
    Erased { target: core::ptr::without_provenance(target as usize), template }
}

#[test]
fn interrupt_ops_in_64_bit_mode() {
    let backends = [
        ("native", Keeper::Flag, pvops::backend::IrqOps::NATIVE),
        ("vsmp", Keeper::FlagAndAc, vsmp::IRQ),
    ];
    for (name, keeper, ops) in backends {
        let all = [
            ops.save_fl.erase(),
            ops.restore_fl.erase(),
            ops.irq_disable.erase(),
            ops.irq_enable.erase(),
        ];
        for (op, bound) in all.into_iter().enumerate() {
            // SAFETY: naked functions of this program without addresses in them; what
            // follows them is text too.
            let text = unsafe { core::slice::from_raw_parts(bound.target.cast::<u8>(), 64) };
            let load = |rig: &Rig| rig.machine.put(CODE, text);
            check_forms(Width::Bits64, keeper, op, &load, guest(CODE, bound.template), name);
        }
    }
    assert_eq!(AC, 1 << 18);
}

#[test]
fn interrupt_ops_in_32_bit_mode() {
    let load = |rig: &Rig| rig.machine.put(CODE, text32());
    let inline = |bytes, lost: &[Gpr]| {
        Template::Inline(Code { bytes, clobbers: RegSet::of(lost), fixups: &[] })
    };
    let native = [
        inline(x86_32::SAVE_FL, &[Gpr::Rax]),
        inline(x86_32::RESTORE_FL, &[]),
        inline(x86_32::IRQ_DISABLE, &[]),
        inline(x86_32::IRQ_ENABLE, &[]),
    ];
    let call = [Template::Call; 4];
    let mut forms = 0;
    for (name, keeper, entries, templates) in [
        ("native", Keeper::Flag, labels32::native::entries(), native),
        ("vsmp", Keeper::FlagAndAc, labels32::vsmp::entries(), call),
        ("lguest", Keeper::Word, labels32::lguest::entries(), call),
        ("xen", Keeper::Bytes, labels32::xen::entries(), call),
    ] {
        for op in 0..4 {
            let bound = guest(entries[op], templates[op]);
            forms += check_forms(Width::Bits32, keeper, op, &load, bound, name);
        }
    }
    assert_eq!(forms, 4 * 4 * 4);
}

/// The ROM decides: calls for all four here.
struct MockRom;

impl vmi::Rom for MockRom {
    fn relocation(&self, call: vmi::Call) -> vmi::Relocation {
        let [save, restore, disable, enable] = labels32::vmi::entries().map(|e| e as u32);
        vmi::Relocation::Call(match call {
            vmi::Call::GetInterruptMask => save,
            vmi::Call::SetInterruptMask => restore,
            vmi::Call::DisableInterrupts => disable,
            vmi::Call::EnableInterrupts => enable,
            vmi::Call::Iret | vmi::Call::Sysexit => return vmi::Relocation::None,
        })
    }
}

#[test]
fn vmi_rom_calls_keep_to_callee_save_sites() {
    let load = |rig: &Rig| rig.machine.put(CODE, text32());
    let calls = [
        vmi::Call::GetInterruptMask,
        vmi::Call::SetInterruptMask,
        vmi::Call::DisableInterrupts,
        vmi::Call::EnableInterrupts,
    ];
    for (op, call) in calls.into_iter().enumerate() {
        let native = guest(labels32::native::entries()[op], Template::Call);
        let bound = vmi::binding(&MockRom, call, native, 0);
        check_forms(Width::Bits32, Keeper::Word, op, &load, bound, "vmi");
    }
    let native = guest(0x1234, Template::Call);
    let left = vmi::binding(&MockRom, vmi::Call::Iret, native, 0);
    assert_eq!(left.target.addr(), 0x1234);
}

#[test]
fn thunk_for_32_bit_pairs_keeps_ecx_and_returns_both_halves() {
    let load = |rig: &Rig| rig.machine.put(CODE, text32());
    let static_thunk = in_guest(&raw const p32_pair_thunk);
    for patched in [false, true] {
        let mut rig = Rig::new(Width::Bits32, CallKind::CalleeSave, 6, static_thunk);
        load(&rig);
        if patched {
            assert_eq!(rig.patch(guest(static_thunk, Template::Call)).direct, 1);
        }
        let (before, after) = rig.run(&[1, 2, 3], RFlags::from_bits_retain(2));
        assert_eq!(changed(&before, &after), RegSet::of(&[Gpr::Rax, Gpr::Rdx]));
        assert_eq!(after.gpr[Gpr::Rdx as usize], 0x1122_3344);
        assert_eq!(after.gpr[Gpr::Rax as usize], 0x5566_7788);
        // The callee's own return address lies below an aligned stack.
        assert_eq!(rig.word(DATA + 0x24), 12);
    }
    // Without its thunk the callee does lose ECX: the test can fail.
    let mut rig = Rig::new(Width::Bits32, CallKind::CalleeSave, 6, in_guest(&raw const p32_pair));
    load(&rig);
    let (before, after) = rig.run(&[1, 2, 3], RFlags::from_bits_retain(2));
    assert!(changed(&before, &after).contains(Gpr::Rcx));
}

/// A 64-bit callee that trashes all it may, vector registers too.
#[test]
fn dynamic_thunks_keep_what_they_are_told() {
    // mov every caller-saved register, -1 ; pcmpeqd xmm0..15 ; ret
    let mut callee = vec![];
    for r in Convention::of(Width::Bits64).caller_saved().iter() {
        let n = r as u8;
        callee.extend([0x48 | n >> 3, 0xc7, 0xc0 | n & 7, 0xff, 0xff, 0xff, 0xff]);
    }
    for n in 0..16u8 {
        let rex = 0x40 | ((n >> 3) * 5);
        callee.extend([0x66, rex, 0x0f, 0x76, 0xc0 | ((n & 7) * 9)]);
    }
    callee.push(0xc3);
    let saves =
        SaveSet { vectors: Vectors::Xmm, flags: true, ..SaveSet::callee_save(Width::Bits64) };
    let thunk = DynamicThunk { width: Width::Bits64, saves, target: CODE + 0x1000 };
    let mut memory = [0; DynamicThunk::MAX];
    let len = thunk.write(&mut memory, CODE).expect("written");

    for (target, expected) in [
        (CODE, RegSet::of(&[Gpr::Rax])),
        (CODE + 0x1000, Convention::of(Width::Bits64).caller_saved()),
    ] {
        let mut rig = Rig::new(Width::Bits64, CallKind::CalleeSave, 6, target);
        rig.machine.put(CODE, &memory[..len]);
        rig.machine.put(CODE + 0x1000, &callee);
        let vectors = rig.machine.vcpu.state.vec;
        let flags = RFlags::from_bits_retain(2 | 1); // CF
        let (before, after) = rig.run(&[1, 2, 3, 4, 5, 6], flags);
        assert_eq!(changed(&before, &after), expected);
        let kept = rig.machine.vcpu.state.vec == vectors;
        assert_eq!(kept, target == CODE);
        assert_eq!(after.flags, flags);
    }
}

/// The ROM may say that a call needs nothing, or leave it native.
#[test]
fn vmi_rom_may_ask_for_nops() {
    struct Rom(vmi::Relocation);
    impl vmi::Rom for Rom {
        fn relocation(&self, _: vmi::Call) -> vmi::Relocation {
            self.0
        }
    }
    let native = guest(0x1234, Template::Call);
    for (kind, expected) in [(0, Form::Direct), (1, Form::Direct), (3, Form::Nop)] {
        let answer = vmi::Relocation::decode(CODE as u32, kind).expect("a known type");
        let bound = vmi::binding(&Rom(answer), vmi::Call::EnableInterrupts, native, CODE as u32);
        let target = if kind == 0 { 0x1234 } else { CODE as usize };
        assert_eq!(bound.target.addr(), target);
        let mut rig = Rig::new(Width::Bits32, CallKind::CalleeSave, 6, CODE);
        rig.machine.put(CODE, &[0xc3]);
        let report = rig.patch(bound);
        assert_eq!(
            (report.nop, report.direct),
            match expected {
                Form::Nop => (1, 0),
                _ => (0, 1),
            }
        );
    }
    assert_eq!(vmi::Relocation::decode(0, 4), None);
}

/// Jump sites: `iretq` reached by an indirect jump, a direct one, and in line, with every
/// register as the site left it.
#[test]
fn jumps_reach_their_target_with_all_registers() {
    use pvops::families::cpu;
    let index = cpu::Family::OPS.iter().position(|op| op.name == "iret").expect("an op");
    let bound = cpu::Family::DEFAULTS[index].expect("native");
    // SAFETY: a naked function of this program without addresses in it.
    let text = unsafe { core::slice::from_raw_parts(bound.target.cast::<u8>(), 64) };
    for form in 0..3 {
        let mut rig = Rig::new(Width::Bits64, CallKind::Jump, 6, CODE);
        rig.machine.put(CODE, text);
        // Where iret finds its selectors: Linux's kernel code and data.
        let gdt = [0, 0, 0x00af_9b00_0000_ffff_u64, 0x00cf_9300_0000_ffff];
        for (i, entry) in gdt.iter().enumerate() {
            rig.machine.put(0x7000 + i as u64 * 8, &entry.to_le_bytes());
        }
        rig.machine.vcpu.state.gdtr.base = 0x7000;
        rig.machine.vcpu.state.gdtr.limit = 31;
        let frame = [rig::SITE + 6, 0x10, 0x2d5, rig::STACK, 0x18];
        for (i, word) in frame.iter().enumerate() {
            rig.machine.put(rig::STACK + i as u64 * 8, &word.to_le_bytes());
        }
        if form > 0 {
            let template = if form == 1 { Template::Call } else { bound.template };
            let report = rig.patch(guest(CODE, template));
            assert_eq!(
                (report.jump, report.inline),
                (usize::from(form == 1), usize::from(form == 2))
            );
        }
        let (before, after) = rig.run(&[], RFlags::from_bits_retain(2));
        assert_eq!(changed(&before, &after), RegSet::EMPTY);
        assert_eq!(after.flags, RFlags::from_bits_retain(0x2d7));
    }
}

/// Xen's ops for the `vcpu_info` of the CPU they run on, addressed through GS.
mod per_cpu {
    pvops::xen_irq_ops!("gs:[{info}", const 0x1010);

    /// In the order of `OPS`.
    pub(crate) fn entries() -> [*const (); 4] {
        [
            save_fl as *const (),
            restore_fl as *const (),
            irq_disable as *const (),
            irq_enable as *const (),
        ]
    }
}

#[test]
fn xen_ops_find_their_cpu_through_gs() {
    use softcpu::state::segment::SegReg;
    for (op, entry) in per_cpu::entries().into_iter().enumerate() {
        // SAFETY: naked functions of this program; what refers to its own addresses is the
        // callback, which is not taken while nothing is pending.
        let text = unsafe { core::slice::from_raw_parts(entry.cast::<u8>(), 64) };
        let mut rig = Rig::new(Width::Bits64, CallKind::CalleeSave, 6, CODE);
        rig.machine.put(CODE, text);
        rig.machine.vcpu.state.segment_mut(SegReg::Gs).base = INFO - 0x1010;
        for enabled in [false, true] {
            let flags = Keeper::Bytes.set(&rig, enabled, false);
            let (before, after) = rig.run(&[0x200], flags);
            assert!(changed(&before, &after).is_subset(RegSet::of(&[Gpr::Rax])));
            let now = Keeper::Bytes.enabled(&rig, after.flags);
            assert_eq!(now, [enabled, true, false, true][op], "{}", OPS[op]);
            if op == 0 {
                assert_eq!(after.gpr[0] & 0x200 != 0, enabled);
            }
        }
    }
}
