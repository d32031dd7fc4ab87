//! House work, as `cargo xtask COMMAND`: the demo, the verification, measurements, and the
//! kernels and programs that guests are made of.
//!
//! Nothing here is part of lguest itself. What it fetches comes from the machine's package
//! manager by download only and lies under `target/guests/`.

mod apt;
mod bounded;
mod compare;
mod cpio;
mod debian_image;
mod demo;
mod guests;
mod initramfs;
mod interrupt;
mod kvm_unit_tests;
mod measure;
mod mmdebstrap;
mod modules;
mod partition_table;
mod paths;
mod private_tree;
mod progress;
mod puppy;
mod qcow2;
mod qemu;
mod running;
mod soak;
mod test_failures;
mod uml;
mod verify;
mod xen_check;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "House work for lguest", disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boot Debian's stock kernel to a shell
    Demo(demo::Options),
    /// Build and boot puppy, the kernel in Rust
    Puppy(puppy::Options),
    /// Check everything: format, lints, docs, tests, boots, fuzz targets
    Verify(verify::Options),
    /// Fetch kernels and build what runs in guests
    Guests(guests::Options),
    /// Make a disk image with Debian on it
    DebianImage(debian_image::Options),
    /// Measure lguest against QEMU without KVM
    Compare(compare::Options),
    /// Try devices and CPU for a long time: data checks, crashes, transfers, hot resets, jobs
    Soak(soak::Options),
    /// Run the x86 tests of a built kvm-unit-tests tree
    KvmUnitTests(kvm_unit_tests::Options),
    /// Prove pvops' Xen backend under Debian's Xen, in QEMU
    XenCheck(xen_check::Options),
}

fn main() -> ExitCode {
    let done: Result<()> = match Cli::parse().command {
        Command::Demo(options) => demo::demo(&options),
        Command::Puppy(options) => puppy::puppy(&options),
        Command::Verify(options) => verify::verify(&options),
        Command::Guests(options) => guests::guests(&options),
        Command::DebianImage(options) => debian_image::debian_image(&options),
        Command::Compare(options) => compare::compare(&options),
        Command::Soak(options) => soak::soak(&options),
        Command::KvmUnitTests(options) => kvm_unit_tests::kvm_unit_tests(&options),
        Command::XenCheck(options) => xen_check::xen_check(&options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_one() {
        super::Cli::command().debug_assert();
    }
}
