//! The interrupt controllers: a local APIC per vCPU, one IO-APIC, and MSIs.
//!
//! A device raises an interrupt line or writes an MSI; either becomes a
//! [`message::InterruptMessage`], which the [`controller::InterruptController`] hands to
//! the local APICs it names. Posting is lock-free: it sets a bit in the target's
//! request register and raises the vCPU's attention. Everything else about a local APIC
//! happens on its vCPU's own thread. Source: Intel SDM vol. 3, chapter 11 ("APIC").

pub mod access;
pub mod base;
pub mod bitmap;
pub mod controller;
pub mod icr;
pub mod io;
pub mod local;
pub mod message;
pub mod register;
pub mod timer;
