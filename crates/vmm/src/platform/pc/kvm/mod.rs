//! What KVM offers its guests beside the hardware, and we too, because every stock
//! kernel knows how to use it: a clock, steal time with remote TLB flushes, hypercalls.
//!
//! Not offered, because they save nothing where no exit is expensive or nothing is paged:
//! paravirtual end-of-interrupt (an APIC write is a function call here) and
//! asynchronous page faults. Source: Linux Documentation/virt/kvm/x86/{cpuid,msr,hypercalls}.rst.

pub mod clock;
pub mod cpuid;
pub mod hypercall;
pub mod steal;
