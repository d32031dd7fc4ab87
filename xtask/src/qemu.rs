//! Debian's QEMU, for comparison and to run Xen: the machine's if it has one, else unpacked privately.

use crate::private_tree::Program;
use anyhow::{Result, bail};
use std::path::Path;
use std::process::{Command, Stdio};

/// A QEMU that can be started.
#[derive(Debug)]
pub(crate) struct Qemu {
    program: Program,
}

impl Qemu {
    /// Finds QEMU, or downloads and unpacks it under `target/guests/qemu`.
    pub(crate) fn find() -> Result<Self> {
        let program = Program::find("qemu-system-x86_64", "--version", "qemu-system-x86")?;
        Ok(Self { program })
    }

    /// What QEMU says it is.
    pub(crate) fn version(&self) -> Result<String> {
        let output = self.command().arg("--version").stderr(Stdio::null()).output()?;
        if !output.status.success() {
            bail!("QEMU does not start");
        }
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().next().unwrap_or_default().to_owned())
    }

    /// QEMU's program with what it needs to find its own parts.
    pub(crate) fn command(&self) -> Command {
        let mut command = self.program.command();
        if let Some(root) = self.program.root() {
            command.env("QEMU_MODULE_DIR", root.join("usr/lib/x86_64-linux-gnu/qemu"));
            for data in ["usr/share/qemu", "usr/share/seabios"] {
                command.arg("-L").arg(root.join(data));
            }
        }
        command
    }

    /// A PC without KVM that starts a multiboot kernel with one module, its serial console on
    /// stdout. It ends when the kernel resets it.
    pub(crate) fn multiboot(
        &self,
        kernel: &Path,
        module: &Path,
        mem_mib: u64,
        append: &str,
    ) -> Command {
        self.booting(kernel, module, mem_mib, append)
    }

    /// A PC without KVM that starts a Linux kernel, its serial console on stdout.
    pub(crate) fn pc(&self, kernel: &Path, initrd: &Path, mem_mib: u64, append: &str) -> Command {
        self.booting(kernel, initrd, mem_mib, append)
    }

    /// A microvm without KVM, its serial console on stdin and stdout, its memory in a memfd
    /// so that it can be told from QEMU's own.
    pub(crate) fn microvm(
        &self,
        kernel: &Path,
        initrd: &Path,
        mem_mib: u64,
        append: &str,
    ) -> Command {
        let mut command = self.booting(kernel, initrd, mem_mib, append);
        command
            .args(["-machine", "microvm,memory-backend=ram"])
            .args(["-object", &format!("memory-backend-memfd,id=ram,size={mem_mib}M")]);
        command
    }

    /// A raw image as a virtio disk with the serial number `name`.
    pub(crate) fn disk(command: &mut Command, image: &Path, name: &str, read_only: bool) {
        let more = if read_only { ",readonly=on" } else { "" };
        command
            .arg("-drive")
            .arg(format!("if=none,id={name},format=raw,file={}{more}", image.display()))
            .args(["-device", &format!("virtio-blk-pci,drive={name},serial={name}")]);
    }

    /// What all machines have: one vCPU in software, and a serial console on stdin and stdout.
    fn booting(&self, kernel: &Path, initrd: &Path, mem_mib: u64, append: &str) -> Command {
        let mut command = self.command();
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-accel", "tcg", "-cpu", "max", "-smp", "1"])
            .args(["-m", &format!("{mem_mib}M")])
            .args(["-serial", "stdio"])
            .arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(initrd)
            .args(["-append", append]);
        command
    }
}
