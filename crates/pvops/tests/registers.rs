//! Every op of every family, in ring 0 and 64-bit mode, through every form its site can
//! have: patterns in all registers, and exactly what the convention promises is there
//! again afterwards. The ops are enumerated from the families' own tables: one that this
//! file does not know is an error.

mod image;

use image::{After, COUNTER, DATA, End, GDT, Image, STACK, Touched, USER, changed};
use pvops::backend::{IrqOps, lguest, vsmp, xen};
use pvops::convention::X86_64;
use pvops::dynamic::{DynamicThunk, SaveSet};
use pvops::families::{apic, cpu, init, irq, lock, mmu, time};
use pvops::{CallKind, Erased, Family, Gpr, RegSet, Template, Width, callee_save};
use softcpu::state::rflags::RFlags;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};

/// How to call an op.
#[derive(Clone, Copy)]
struct Case {
    args: [u64; 6],
    /// Registers besides the arguments that the op reads.
    set: &'static [(Gpr, u64)],
    end: End,
    /// What changes from run to run: the time.
    varies: bool,
}

const fn call(args: [u64; 6]) -> Case {
    Case { args, set: &[], end: End::Returns, varies: false }
}

const fn leave(set: &'static [(Gpr, u64)]) -> Case {
    Case { args: [0; 6], set, end: End::Leaves, varies: false }
}

/// Arguments for an op of the families, if it is one.
fn case(op: &str, image: &Image) -> Option<Case> {
    let state = &image.machine.vcpu.state;
    let one = |word| Some(call([word, 0, 0, 0, 0, 0]));
    /// IA32_FS_BASE.
    const FS_BASE: u64 = 0xc000_0100;
    let words = call([DATA, DATA + 0x100, DATA + 0x200, 0x1234, 0, 0]);
    match op {
        "save_fl" | "irq_disable" | "irq_enable" | "safe_halt" | "halt" | "init_irq" => one(0),
        "restore_fl" => one(0x200),
        "adjust_exception_frame" => one(0),

        "get_debugreg" => one(7),
        "set_debugreg" => Some(call([2, 0x1234_5678, 0, 0, 0, 0])),
        "clts" | "wbinvd" | "read_cr0" | "read_cr4" | "read_cr4_safe" | "read_cr8" => one(0),
        "write_cr0" => one(state.cr0.bits()),
        "write_cr4" => one(state.cr4.bits()),
        "write_cr8" => one(3),
        "load_tr_desc" => one(0x20),
        "store_tr" | "swapgs" | "start_context_switch" | "end_context_switch" => one(0),
        "load_gdt" | "load_idt" | "store_gdt" | "store_idt" => Some(words),
        "set_ldt" | "alloc_ldt" | "free_ldt" | "load_tls" => Some(words),
        "load_gs_index" => one(0x18),
        "write_ldt_entry" | "write_idt_entry" => Some(call([DATA, 3, DATA + 0x200, 0, 0, 0])),
        // A TSS: two entries.
        "write_gdt_entry" => Some(call([DATA, 3, DATA + 0x200, 9, 0, 0])),
        "load_sp0" => Some(words),
        "set_iopl_mask" => one(0x3000),
        "io_delay" => one(0),
        "cpuid" => Some(call([DATA, DATA + 0x10, DATA + 0x20, DATA + 0x30, 0, 0])),
        "read_msr" | "read_msr_amd" => Some(call([FS_BASE, DATA, 0, 0, 0, 0])),
        "write_msr" => Some(call([FS_BASE, 0x1234_5000, 0x7f, 0, 0, 0])),
        "read_tsc" => Some(Case { varies: true, ..call([0; 6]) }),
        "read_tscp" => Some(Case { varies: true, ..words }),
        "read_pmc" => one(5),
        "iret" => Some(leave(&[(Gpr::Rsp, STACK)])),
        "usergs_sysret64" | "usergs_sysret32" => {
            Some(leave(&[(Gpr::Rcx, USER), (Gpr::R11, 0x202)]))
        }
        "irq_enable_sysexit" => Some(leave(&[(Gpr::Rdx, USER), (Gpr::Rcx, STACK)])),

        "pagetable_setup_start" | "pagetable_setup_done" | "read_cr2" | "read_cr3" => one(0),
        "write_cr2" => one(0x1234_5000),
        "write_cr3" => one(state.cr3),
        "activate_mm" | "dup_mmap" | "exit_mmap" | "flush_tlb_user" | "flush_tlb_kernel" => {
            Some(words)
        }
        "flush_tlb_single" | "flush_tlb_others" | "pgd_alloc" | "pgd_free" => Some(words),
        "alloc_pte" | "alloc_pmd" | "alloc_pmd_clone" | "alloc_pud" => Some(words),
        "release_pte" | "release_pmd" | "release_pud" => Some(words),
        "set_pte" | "set_pmd" | "set_pud" | "set_pgd" | "set_pte_atomic" => Some(words),
        "set_pte_at" | "pte_clear" | "pmd_clear" | "pte_update" | "pte_update_defer" => Some(words),
        "ptep_modify_prot_start" | "ptep_modify_prot_commit" => Some(words),
        "pte_val" | "make_pte" | "pmd_val" | "make_pmd" | "pud_val" | "make_pud" | "pgd_val"
        | "make_pgd" => one(0x8000_0000_1234_5067),
        "lazy_enter" | "lazy_leave" | "set_fixmap" => one(0),

        "spin_is_locked" | "spin_is_contended" | "spin_lock" | "spin_lock_flags"
        | "spin_trylock" | "spin_unlock" => Some(words),
        "vcpu_is_preempted" => one(1),

        "time_init" | "get_tsc_khz" | "get_wallclock" | "set_wallclock" | "sched_clock"
        | "steal_clock" => one(7),
        "setup_boot_clock" | "setup_secondary_clock" | "startup_ipi_hook" => Some(words),
        "arch_setup" | "post_allocator_init" | "banner" | "memory_setup" => one(0),
        _ => None,
    }
}

/// The frame for `iretq`, data for ops that copy, and a table for ops that load one.
fn memory(op: &str, image: &Image) {
    let m = &image.machine;
    let put = |address, words: &[u64]| {
        for (i, word) in words.iter().enumerate() {
            m.put(address + i as u64 * 8, &word.to_le_bytes());
        }
    };
    put(DATA + 0x200, &[0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210]);
    match op {
        "iret" => put(STACK, &[USER, 0x43, 0x202, STACK + 0x100, 0x3b]),
        "load_gdt" => {
            m.put(DATA, &(9u16 * 8 - 1).to_le_bytes());
            put(DATA + 2, &[GDT]);
        }
        "load_idt" => {
            m.put(DATA, &m.get(DATA, 2));
            let idt = image.machine.vcpu.state.idtr;
            m.put(DATA, &idt.limit.to_le_bytes());
            put(DATA + 2, &[idt.base]);
        }
        _ => {}
    }
    assert!(op != "load_tr_desc" || m.get(GDT + 0x25, 1) == [0x89], "an available TSS");
}

/// A function that a kernel would bind: conventional, and trashing all it may.
#[unsafe(naked)]
extern "sysv64" fn conventional() {
    core::arch::naked_asm!(
        "mov rax, -1",
        "mov rcx, -1",
        "mov rdx, -1",
        "mov rsi, -1",
        "mov rdi, -1",
        "mov r8, -1",
        "mov r9, -1",
        "mov r10, -1",
        "mov r11, -1",
        "ret",
    )
}

/// The forms of a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// As compiled.
    Indirect,
    /// As compiled, with a thunk in the slot.
    Thunked,
    /// A direct call or jump.
    Direct,
    /// A direct call of a thunk.
    DirectThunked,
    /// What the backend likes best.
    Best,
}

const FORMS: [Form; 5] =
    [Form::Indirect, Form::Thunked, Form::Direct, Form::DirectThunked, Form::Best];

/// A thunk around `target`, at [`Image::extra`].
fn thunk(target: u64) -> Vec<u8> {
    let width = Width::Bits64;
    let thunk = DynamicThunk { width, saves: SaveSet::callee_save(width), target };
    let mut memory = vec![0; DynamicThunk::MAX];
    let len = thunk.write(&mut memory, Image::extra()).expect("written");
    memory.truncate(len);
    memory
}

/// How a run starts and ends: registers besides the patterns, and flags.
type Start = (Vec<(Gpr, u64)>, RFlags, End);

/// Runs a site in one form, with as many tries as there are pages to copy in.
fn run(
    kind: CallKind,
    len: u8,
    bound: Erased,
    form: Form,
    touched: &mut Touched,
    prepare: &mut dyn FnMut(&mut Image) -> Start,
) -> (After, After, pvops::Report) {
    let thunked = matches!(form, Form::Thunked | Form::DirectThunked);
    let target = bound.target.addr() as u64;
    let (target, extra) = if thunked { (Image::extra(), thunk(target)) } else { (target, vec![]) };
    let target_pointer = core::ptr::without_provenance(target as usize);
    loop {
        let mut image = Image::new(kind, len, target, &extra, touched);
        let mut report = pvops::Report::default();
        match form {
            Form::Indirect | Form::Thunked => {}
            Form::Direct | Form::DirectThunked => {
                report = image.patch(Erased { target: target_pointer, template: Template::Call });
                assert_eq!(report.direct + report.jump, 1);
            }
            Form::Best => {
                report = image.patch(bound);
                assert_eq!(report.indirect, 0);
            }
        }
        let (set, flags, end) = prepare(&mut image);
        if let Ok((before, after)) = image.run(&set, flags, end, touched) {
            return (before, after, report);
        }
    }
}

fn with_args(case: &Case) -> Vec<(Gpr, u64)> {
    let mut set: Vec<_> = X86_64.args.iter().copied().zip(case.args).collect();
    if case.end == End::Leaves {
        set.clear();
    }
    set.extend(case.set);
    set
}

/// What a form may change: the convention's set, and in line what the template says.
fn may(kind: CallKind, bound: &Erased, report: &pvops::Report) -> RegSet {
    let convention = X86_64.clobbers(kind);
    match bound.template {
        Template::Inline(code) if report.inline == 1 => {
            assert!(code.clobbers.is_subset(convention));
            code.clobbers
        }
        Template::Nop if report.nop == 1 => RegSet::EMPTY,
        _ => convention,
    }
}

/// All ops of a family: how many runs each took.
fn family<F: Family>(covered: &mut BTreeMap<String, usize>) {
    let mut touched = Touched::new();
    let kernels = Erased { target: conventional as *const (), template: Template::Call };
    for (info, default) in F::OPS.iter().zip(F::DEFAULTS.as_ref()) {
        let name = format!("{}.{}", F::NAME, info.name);
        // Direct ops are called as any function is.
        let kind = info.sites.unwrap_or(CallKind::Plain);
        let bound = default.unwrap_or(kernels);
        let mut results: Vec<After> = vec![];
        for form in FORMS {
            if kind == CallKind::Jump && matches!(form, Form::Thunked | Form::DirectThunked) {
                // Nobody comes back through a thunk.
                continue;
            }
            let mut varies = false;
            let (before, after, report) = run(kind, 16, bound, form, &mut touched, &mut |image| {
                let case = case(info.name, image)
                    .unwrap_or_else(|| panic!("{name}: no test knows how to call it"));
                memory(info.name, image);
                varies = case.varies;
                (with_args(&case), RFlags::from_bits_retain(2), case.end)
            });
            let what = format!("{name} {form:?}");
            let lost = changed(&before, &after);
            if kind == CallKind::Jump {
                // The stack pointer is the user's now.
                let lost = lost.minus(RegSet::of(&[Gpr::Rsp]));
                assert!(lost.is_empty(), "{what}: lost {lost:?}");
                assert_eq!(after.place, (3, USER), "{what}");
            } else {
                let mut may = may(kind, &bound, &report);
                if matches!(form, Form::Thunked | Form::DirectThunked) {
                    may = X86_64.clobbers(CallKind::CalleeSave);
                }
                assert!(lost.is_subset(may), "{what}: lost {:?}", lost.minus(may));
                assert!(!after.flags.contains(RFlags::DF), "{what}");
                if default.is_none() && form == Form::Best {
                    assert_eq!(lost, X86_64.clobbers(CallKind::Plain), "{what}: it can fail");
                }
            }
            if !varies {
                results.push(after);
            }
            *covered.entry(name.clone()).or_default() += 1;
        }
        // Every form did the same, to memory, to the result and to all that survives.
        let kept = |after: &After| {
            let mut kept = after.clone();
            for register in X86_64.clobbers(kind).minus(RegSet::of(X86_64.ret)).iter() {
                kept.gpr[register as usize] = 0;
            }
            if !info.returns && kind != CallKind::Jump {
                kept.gpr[Gpr::Rax as usize] = 0;
            }
            // Narrow results leave the upper bits undefined, and arithmetic flags are.
            if info.name.starts_with("spin") || info.name == "vcpu_is_preempted" {
                kept.gpr[Gpr::Rax as usize] &= 0xff;
            }
            kept.flags.remove(RFlags::from_bits_retain(0x8d5));
            kept
        };
        for pair in results.windows(2) {
            assert_eq!(kept(&pair[0]), kept(&pair[1]), "{name}");
        }
        if info.name == "read_pmc" {
            assert!(results.iter().all(|after| after.gpr[0] == COUNTER));
        }
    }
}

#[test]
fn every_op_of_every_family_keeps_what_its_kind_promises() {
    let mut covered = BTreeMap::new();
    family::<irq::Family>(&mut covered);
    family::<cpu::Family>(&mut covered);
    family::<mmu::Family>(&mut covered);
    family::<time::Family>(&mut covered);
    family::<apic::Family>(&mut covered);
    family::<lock::Family>(&mut covered);
    family::<init::Family>(&mut covered);
    let tables = [
        irq::Family::OPS,
        cpu::Family::OPS,
        mmu::Family::OPS,
        time::Family::OPS,
        apic::Family::OPS,
        lock::Family::OPS,
        init::Family::OPS,
    ];
    let all: usize = tables.iter().map(|ops| ops.len()).sum();
    assert_eq!(covered.len(), all);
    assert!(covered.values().all(|forms| *forms >= 3), "{covered:?}");
}

static CALLS: AtomicU32 = AtomicU32::new(0);

/// The hypervisor's side: compiled code behind its thunk.
#[callee_save]
fn hypercall() {
    CALLS.fetch_add(1, Ordering::SeqCst);
}

/// How a backend's state is set: enabled, pending.
type Set = fn(&Image, bool, bool) -> RFlags;

/// IF, as native code has it.
fn set_flag(_: &Image, enabled: bool, _: bool) -> RFlags {
    RFlags::from_bits_retain(2 | u64::from(enabled) << 9)
}

/// IF, and AC as its complement.
fn set_flag_and_ac(_: &Image, enabled: bool, _: bool) -> RFlags {
    RFlags::from_bits_retain(2 | if enabled { 1 << 9 } else { 1 << 18 })
}

fn set_words(image: &Image, enabled: bool, pending: bool) -> RFlags {
    let words = &raw const lguest::SHARED;
    let bytes = [enabled, pending].map(|on| (u32::from(on) * 0x200).to_le_bytes()).concat();
    image.put(words.addr() as u64, &bytes);
    RFlags::from_bits_retain(2)
}

fn set_bytes(image: &Image, enabled: bool, pending: bool) -> RFlags {
    let info = &raw const xen::VCPU_INFO;
    image.put(info.addr() as u64, &[u8::from(pending), u8::from(!enabled)]);
    RFlags::from_bits_retain(2)
}

/// The four ops of the interrupt flag of every 64-bit backend, in all states.
#[test]
fn interrupt_ops_of_every_backend_lose_the_return_register_only() {
    lguest::on_pending(hypercall::CALLEE_SAVE);
    xen::on_pending(hypercall::CALLEE_SAVE);
    let backends: [(&str, &IrqOps, Set, &[u64]); 4] = [
        ("native", &IrqOps::NATIVE, set_flag, &[]),
        ("vsmp", &vsmp::IRQ, set_flag_and_ac, &[]),
        ("lguest", &lguest::IRQ, set_words, &[(&raw const lguest::SHARED).addr() as u64]),
        ("xen", &xen::IRQ, set_bytes, &[(&raw const xen::VCPU_INFO).addr() as u64]),
    ];
    let keeps = X86_64.clobbers(CallKind::CalleeSave);
    let mut runs = 0;
    let mut inlined = vec![];
    for (backend, ops, set, data) in backends {
        let mut touched: Touched = data.iter().map(|a| a & !0xfff).collect();
        let all = [
            ("save_fl", ops.save_fl.erase(), 6),
            ("restore_fl", ops.restore_fl.erase(), 6),
            ("irq_disable", ops.irq_disable.erase(), 10),
            ("irq_enable", ops.irq_enable.erase(), 6),
        ];
        for (op, bound, len) in all {
            for form in FORMS {
                for state in 0..8u64 {
                    let (enabled, pending) = (state & 1 != 0, state & 2 != 0);
                    // Only IF of the flags may go to the CPU itself.
                    let argument = 2 | (state >> 2) << 9;
                    let kind = CallKind::CalleeSave;
                    let (before, after, report) =
                        run(kind, len, bound, form, &mut touched, &mut |image| {
                            let flags = set(image, enabled, pending);
                            (vec![(Gpr::Rdi, argument)], flags, End::Returns)
                        });
                    let what = format!("{backend} {op} {form:?} {state:#b}");
                    let lost = changed(&before, &after);
                    let may = may(kind, &bound, &report);
                    assert!(may.is_subset(keeps));
                    let may = if form == Form::Best { may } else { keeps };
                    assert!(lost.is_subset(may), "{what}: lost {:?}", lost.minus(may));
                    assert!(!after.flags.contains(RFlags::DF), "{what}");
                    runs += 1;
                    if report.inline == 1 && state == 0 {
                        inlined.push(format!("{backend} {op}"));
                    }
                }
            }
        }
    }
    assert_eq!(runs, 4 * 4 * 5 * 8);
    // In line at a site of the length that the family gives it: these at least.
    for op in ["native save_fl", "native irq_enable", "lguest save_fl", "lguest irq_disable"] {
        assert!(inlined.iter().any(|i| i == op), "{op} of {inlined:?}");
    }
}
