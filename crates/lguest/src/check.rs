//! `lguest check`: what this host offers, and what lguest makes of it.
//!
//! The only place that looks at /dev/kvm. Nothing here changes anything; each line says
//! what was found and, where it matters, what to do about it.

use crate::cli::{CheckOptions, EngineChoice};
use crate::status::Status;
use crate::{Error, run, size};
use rustix::fs::{Mode, OFlags};
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, opcode};
use rustix::process::{Resource, getrlimit};
use softcpu::cpuid::CpuModel;
use std::ffi::c_void;
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

/// Prints the report on stdout.
///
/// # Errors
/// No engine can run here, or stdout is closed.
pub(crate) fn check(_options: &CheckOptions) -> Result<Status, Error> {
    let engine = run::choose_engine(EngineChoice::Auto)?;
    let lines = [
        ("cpu", cpu()),
        ("levels", levels()),
        ("/dev/kvm", kvm()),
        ("memory", memory()),
        ("huge pages", huge_pages()),
        ("limits", limits()),
        ("seccomp", seccomp()),
        ("cpu model", format!("{} unless --cpu says otherwise", CpuModel::best_for_host())),
        ("engine", format!("{engine}, the CPU in software: needs no /dev/kvm and no privileges")),
    ];
    let mut out = io::stdout().lock();
    for (name, text) in lines {
        writeln!(out, "{name:<11} {text}")
            .map_err(|error| Error::Host(format!("cannot write to stdout: {error}")))?;
    }
    Ok(Status::PoweredOff)
}

fn cpu() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let usable = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{}, {usable} usable by this process", model.map_or("unknown", |(_, name)| name))
}

/// The features of one level that the host lacks.
macro_rules! missing {
    ($($feature:tt),+) => {{
        let mut missing: Vec<&str> = Vec::new();
        $(if !std::is_x86_feature_detected!($feature) { missing.push($feature); })+
        missing
    }};
}

/// The x86-64 microarchitecture levels (x86-64 psABI, section 3.1.1) and what stands in the
/// way of each.
fn levels() -> String {
    let v2 = missing!("cmpxchg16b", "popcnt", "sse3", "sse4.1", "sse4.2", "ssse3");
    let v3 = missing!("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave");
    let extra: Vec<&str> = [
        ("aes", std::is_x86_feature_detected!("aes")),
        ("sha", std::is_x86_feature_detected!("sha")),
    ]
    .into_iter()
    .filter_map(|(name, there)| there.then_some(name))
    .collect();
    let level = |name: &str, missing: &[&str]| {
        if missing.is_empty() {
            format!("{name} yes")
        } else {
            format!("{name} no, the CPU lacks {}", missing.join(" "))
        }
    };
    let mut text = format!("{}; {}", level("v2", &v2), level("v3", &v3));
    if !extra.is_empty() {
        text.push_str(&format!("; also {}", extra.join(" ")));
    }
    text
}

/// What /dev/kvm says of itself: there, ours to open, the API everyone speaks, and a VM that
/// can really be made (a host may have the module but not the hardware).
fn kvm() -> String {
    const PATH: &str = "/dev/kvm";
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let kvm = match rustix::fs::open(PATH, flags, Mode::empty()) {
        Ok(kvm) => kvm,
        Err(rustix::io::Errno::NOENT) => return "not there (not needed)".into(),
        Err(error) => {
            return format!(
                "there, but not for this user: {} (not needed)",
                io::Error::from(error)
            );
        }
    };
    match call(kvm.as_fd(), GET_API_VERSION) {
        Ok(12) => {}
        Ok(other) => return format!("speaks API version {other}, not 12: not capable"),
        Err(error) => return format!("does not say its API version: {error}"),
    }
    match call(kvm.as_fd(), CREATE_VM) {
        Ok(fd) => {
            // SAFETY: KVM_CREATE_VM returned a new descriptor that nobody else owns.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
            "there and capable, but this build does not use it".into()
        }
        Err(error) => format!("there, API 12, but it makes no VM: {error}"),
    }
}

/// `KVM_GET_API_VERSION` and `KVM_CREATE_VM` (Documentation/virt/kvm/api.rst, 4.1 and 4.2).
const GET_API_VERSION: u8 = 0x00;
const CREATE_VM: u8 = 0x01;

/// One of KVM's ioctls that take 0 and return a number.
struct KvmCall(u8);

// SAFETY: both calls take a plain number, here 0, and touch no memory of ours; the output is
// what the kernel returned.
unsafe impl Ioctl for KvmCall {
    type Output = i32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        opcode::none(0xae, self.0)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> rustix::io::Result<i32> {
        Ok(out)
    }
}

fn call(kvm: BorrowedFd<'_>, number: u8) -> io::Result<i32> {
    // SAFETY: see `KvmCall`; the descriptor is /dev/kvm's.
    unsafe { rustix::ioctl::ioctl(kvm, KvmCall(number)) }.map_err(io::Error::from)
}

/// A field of /proc/meminfo, in bytes.
pub(crate) fn meminfo(field: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

fn memory() -> String {
    let show = |field| meminfo(field).map_or("?".into(), |bytes| format!("{} MiB", bytes >> 20));
    let mut text = format!("{} available of {}", show("MemAvailable"), show("MemTotal"));
    if let Ok(limit) = fs::read_to_string("/sys/fs/cgroup/memory.max")
        && let Ok(bytes) = limit.trim().parse()
    {
        text.push_str(&format!(", cgroup limit {}", size::display(bytes)));
    }
    text
}

fn huge_pages() -> String {
    let chosen = |path: &str| {
        let text = fs::read_to_string(path).ok()?;
        let (_, rest) = text.split_once('[')?;
        Some(rest.split_once(']')?.0.to_string())
    };
    let thp = chosen("/sys/kernel/mm/transparent_hugepage/enabled");
    let free = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("HugePages_Free:"))?;
        line.trim().parse::<u64>().ok()
    });
    format!(
        "transparent: {}; reserved and free: {}",
        thp.as_deref().unwrap_or("not supported"),
        free.unwrap_or(0)
    )
}

fn limits() -> String {
    let limit = |resource| match getrlimit(resource).current {
        None => "unlimited".into(),
        Some(bytes) => size::display(bytes),
    };
    let mappings = fs::read_to_string("/proc/sys/vm/max_map_count").unwrap_or_default();
    format!(
        "address space {}, locked memory {}, mappings {}",
        limit(Resource::As),
        limit(Resource::Memlock),
        mappings.trim()
    )
}

/// What this kernel says it does to a filtered system call.
fn seccomp() -> String {
    match fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail") {
        Ok(actions) if actions.split_whitespace().any(|action| action == "trap") => {
            "there: system calls are filtered while a guest runs, unless --seccomp off".into()
        }
        _ => "not there: a guest runs without a filter on system calls".into(),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_line_of_the_report_says_something() {
        for text in [
            super::cpu(),
            super::levels(),
            super::kvm(),
            super::memory(),
            super::huge_pages(),
            super::limits(),
            super::seccomp(),
        ] {
            assert!(!text.is_empty() && !text.contains('\n'), "{text:?}");
        }
        assert!(super::meminfo("MemTotal").is_some_and(|bytes| bytes > 1 << 20));
    }
}
