//! Every interrupt op in every form, with events that Xen sends and delivers, and a pattern
//! in every register.

use core::fmt;

use crate::frames::Tables;
use crate::text::Alias;
use crate::{events, hypercall, say};
use pvops::backend::{IF, xen};
use pvops::families::irq;
use pvops::{
    Binding, Bindings, CallKind, Family, Form, Plain, Sites, callee_save, convention, probe,
};

/// What an op is called on when an event must be let in: the most harmless hypercall.
#[callee_save]
fn force_callback() {
    hypercall::version();
}

extern "sysv64" fn init_irq() {}

// Functions of nothing but a site. With frame pointers, which this kernel is built with,
// nothing else in them changes a register.

#[inline(never)]
extern "sysv64" fn save_fl() -> usize {
    // SAFETY: bound to Xen's, which only touch what is shared with Xen. So are the others.
    unsafe { irq::save_fl() }
}

#[inline(never)]
extern "sysv64" fn restore_fl(flags: usize) {
    // SAFETY: as above.
    unsafe { irq::restore_fl(flags) }
}

#[inline(never)]
extern "sysv64" fn irq_disable() {
    // SAFETY: as above.
    unsafe { irq::irq_disable() }
}

#[inline(never)]
extern "sysv64" fn irq_enable() {
    // SAFETY: as above.
    unsafe { irq::irq_enable() }
}

const OPS: [&str; 4] = ["save_fl", "restore_fl", "irq_disable", "irq_enable"];

fn sites() -> [*const (); 4] {
    [save_fl as _, restore_fl as _, irq_disable as _, irq_enable as _]
}

/// The functions that the ops are bound to.
fn callees() -> [*const (); 4] {
    let ops = xen::IRQ;
    let bound = [
        ops.save_fl.erase(),
        ops.restore_fl.erase(),
        ops.irq_disable.erase(),
        ops.irq_enable.erase(),
    ];
    bound.map(|bound| bound.target)
}

/// The same ops as a kernel with several CPUs has them: `vcpu_info` is where GS says.
mod per_cpu {
    /// Where it is in the CPU's own data, which here has nothing before it to speak of.
    pub(super) const OFFSET: usize = 0x40;
    pvops::xen_irq_ops!("gs:[{info}", const super::per_cpu::OFFSET);

    pub(super) fn callees() -> [*const (); 4] {
        [save_fl as _, restore_fl as _, irq_disable as _, irq_enable as _]
    }
}

/// One call of one op.
#[derive(Clone, Copy)]
struct Case<'f> {
    form: &'f str,
    op: usize,
    enabled: bool,
    pending: bool,
    argument: usize,
}

impl fmt::Display for Case<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { form, op, enabled, pending, argument } = self;
        let name = OPS[*op];
        write!(f, "{name}, {form}: enabled {enabled}, pending {pending}, argument {argument:#x}")
    }
}

impl Case<'_> {
    /// Calls the op by that function and looks at everything it may and may not have done.
    fn check(self, function: *const ()) {
        let Self { op, enabled, pending, argument, .. } = self;
        events::set(enabled, pending);
        // SAFETY: one of the ops, which take any word and return.
        let found = unsafe { probe::observe(function, &[argument]) };
        let (now, came) = (events::enabled(), events::taken());
        let on = argument & IF != 0;
        let (enables, delivers) = match op {
            0 => (enabled, false),
            1 => (on, on && pending),
            2 => (false, false),
            _ => (true, pending),
        };
        assert_eq!((now, came), (enables, u32::from(delivers)), "{self}: on, events that came");
        let lost = found.changed.minus(convention::NATIVE.clobbers(CallKind::CalleeSave));
        assert!(lost.is_empty(), "{self}: lost {lost:?}");
        if op == 0 {
            assert_eq!(found.result as usize & IF != 0, enabled, "{self}: result");
        }
        // Xen sees the mask as we do: the next event comes, or waits.
        let next = events::send();
        assert_eq!(next, u32::from(enables), "{self}: next event");
        // What was not let in was not lost either. (Two that wait are one.)
        let waited = events::drain();
        assert_eq!(waited, u32::from(!enables), "{self}: event that waited");
    }
}

fn check(form: &str, functions: [*const (); 4]) {
    let mut checked = 0;
    for (op, function) in functions.into_iter().enumerate() {
        for (enabled, pending) in [(false, false), (false, true), (true, false)] {
            for argument in [0, IF, !IF, usize::MAX] {
                Case { form, op, enabled, pending, argument }.check(function);
                checked += 1;
            }
        }
    }
    say!("interrupts, {form}: {checked} calls");
}

/// A critical section in another, as kernels have them, with an event that comes within.
#[inline(never)]
fn nested(form: &str) {
    events::set(true, false);
    // SAFETY: as above.
    let came = unsafe {
        let outer = irq::save_fl();
        irq::irq_disable();
        let inner = irq::save_fl();
        irq::irq_disable();
        let within = events::send();
        irq::restore_fl(inner);
        let between = events::taken();
        irq::restore_fl(outer);
        [within, between, events::taken()]
    };
    assert_eq!(came, [0, 0, 1], "{form}: the event comes when the outer section ends");
    assert!(events::enabled(), "{form}");
    events::drain();
}

/// The interrupt ops in every form.
pub(crate) fn prove(tables: Tables) {
    xen::on_pending(force_callback::CALLEE_SAVE);
    check("called", callees());
    hypercall::set_gs_base((&raw const xen::VCPU_INFO).addr() - per_cpu::OFFSET);
    check("called, through GS", per_cpu::callees());
    let mut bindings = Bindings::new("xen");
    xen::IRQ.bind(&mut bindings).expect("once");
    bindings.bind(irq::op::InitIrq, Binding::call(Plain::new(init_irq))).expect("once");
    let mut family = irq::Family::claim().expect("nobody has it");
    family.bind(&bindings).expect("complete");
    check("indirect", sites());
    nested("indirect");

    let records = Sites::of_program();
    let mut text = Alias::new(tables);
    let (patched, report) = family
        .apply(records, &mut text, |o| {
            let expected = if o.op == "irq_disable" { Form::Inline } else { Form::Direct };
            assert_eq!(o.form, expected, "{o}");
        })
        .map_err(|(_, error)| error)
        .expect("patched");
    say!("interrupts, patched: {report}");
    check("patched", sites());
    nested("patched");

    let family = patched.undo(records, &mut text).map_err(|(_, error)| error).expect("undone");
    check("undone", sites());
    nested("undone");
    family.release();
}
