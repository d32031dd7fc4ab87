//! What can be wrong with what the user gave: each a line that names the thing and what
//! to do about it.

use std::io;

use super::identify::LooksLike;
use crate::memory::MIB;

/// Why a guest could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A kernel or initrd cannot be opened.
    #[error("{name}: cannot be read: {reason}")]
    Open {
        /// The file.
        name: String,
        /// What the host said.
        reason: io::Error,
    },
    /// Something is wrong with the kernel.
    #[error("{name}: {reason}")]
    Kernel {
        /// The file.
        name: String,
        /// What is wrong with it.
        reason: KernelError,
    },
    /// An initrd became shorter, or unreadable, while it was loaded.
    #[error("{name}: cannot be read as an initrd: {reason}")]
    InitrdRead {
        /// The file.
        name: String,
        /// What went wrong.
        reason: io::Error,
    },
    /// The initrds do not fit between the kernel and the end of low memory.
    #[error(
        "the initrds ({} MiB) do not fit into memory beside the kernel: give --mem {}M or more, or smaller initrds",
        .bytes.div_ceil(MIB), .needed.div_ceil(MIB)
    )]
    InitrdTooBig {
        /// All initrds together.
        bytes: u64,
        /// The memory it would take.
        needed: u64,
    },
    /// The initrds would lie above what the kernel can reach.
    #[error("the initrds ({} MiB) do not fit below the {} MiB this kernel can take them from: give smaller ones",
        .bytes.div_ceil(MIB), .limit / MIB)]
    InitrdUnreachable {
        /// All initrds together.
        bytes: u64,
        /// Where the kernel's reach ends.
        limit: u64,
    },
    /// More initrds than the boot protocol's tables have room for.
    #[error("{0} initrds are more than this boot protocol can pass: concatenate some")]
    TooManyInitrds(usize),
    /// The command line is longer than the kernel accepts.
    #[error("the command line is {len} bytes long, but this kernel takes {max}: shorten --append")]
    CommandLineTooLong {
        /// Its length.
        len: usize,
        /// The most the kernel takes.
        max: usize,
    },
    /// The command line contains a zero byte, which would end it.
    #[error("the command line contains a zero byte: remove it from --append")]
    CommandLineZero,
    /// The ACPI tables could not be made.
    #[error(transparent)]
    Acpi(#[from] crate::acpi::AcpiError),
    /// Boot structures do not go where they should.
    #[error(transparent)]
    Place(#[from] PlaceError),
}

/// What is wrong with a kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// It is something else.
    #[error("not a kernel but {0}: give a bzImage (as in /boot/vmlinuz-*) or an ELF vmlinux")]
    NotAKernel(LooksLike),
    /// It is a kernel, but not for x86.
    #[error("a kernel for {0}: this machine runs x86-64 kernels")]
    OtherArchitecture(&'static str),
    /// It is a 32-bit x86 kernel where a 64-bit one is needed.
    #[error("a 32-bit x86 kernel{0}: give a 64-bit one (an amd64 package)")]
    Bits32(&'static str),
    /// A kernel of the first version with lguest support.
    #[error(
        "a kernel of Linux 2.6.23, whose lguest support nobody has a host for any more: give one of 2.6.24 to 4.13"
    )]
    LguestV0,
    /// The file ends too early.
    #[error("truncated: the file ends before {0}; copy or download it again")]
    Truncated(&'static str),
    /// A field contradicts another, or the file.
    #[error("damaged: {0}; copy or download it again")]
    Malformed(&'static str),
    /// It does not decompress.
    #[error(
        "damaged: its {format} payload does not decompress ({reason}); copy or download it again"
    )]
    Decompress {
        /// The compression.
        format: &'static str,
        /// What the decompressor said.
        reason: io::Error,
    },
    /// It is compressed in a way that is not supported.
    #[error(
        "compressed with {0}, which is not supported: recompress it (CONFIG_KERNEL_ZSTD, _XZ or _GZIP), or give its vmlinux"
    )]
    Compression(&'static str),
    /// A bzImage older than the boot protocol that says where the payload is.
    #[error("a bzImage of boot protocol {}.{:02}: 2.08 (Linux 2.6.26) or newer is needed", .0 >> 8, .0 & 0xff)]
    OldProtocol(u16),
    /// Not enough memory for it.
    #[error("too big for the guest's memory: it needs {} MiB, so give --mem {}M or more", .needed.div_ceil(MIB), .needed.div_ceil(MIB))]
    TooBig {
        /// Where its last byte would be.
        needed: u64,
    },
    /// It is linked where there is no RAM.
    #[error(
        "linked for physical address {0:#x}, where this machine has no memory: a kernel must lie between 1 MiB and 3 GiB"
    )]
    LinkedElsewhere(u64),
    /// It asks the loader for something that is not supported.
    #[error("unsupported multiboot image: {0}")]
    Multiboot(&'static str),
    /// More memory than a kernel for the lguest platform can be given.
    #[error(
        "a 32-bit kernel for lguest, which cannot have {} MiB of memory: give --mem {}M or less",
        .0 / MIB, super::lguest::MAX_RAM / MIB
    )]
    LguestMemory(u64),
    /// The note of a 64-bit kernel for lguest is of no use.
    #[error("{0}: build it against this version of the lguest ABI (docs/lguest-abi.md)")]
    LongNote(lguest_abi::long::note::BadNote),
    /// A 64-bit kernel for lguest that is linked in a way its ABI does not allow.
    #[error("{0}: link it as the lguest ABI has it (docs/lguest-abi.md, section 1)")]
    LongImage(&'static str),
    /// Several vCPUs for a kernel that can have one.
    #[error("a kernel for lguest, which runs on one vCPU: give --cpus 1")]
    LguestCpus,
    /// A kernel that is not for the platform that was asked for.
    #[error(
        "no kernel for the lguest platform: give a 32-bit one of Linux 2.6.24 to 4.13 with lguest guest support (CONFIG_LGUEST_GUEST)"
    )]
    NotLguest,
    /// Its place is taken.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The host could not read it.
    #[error("cannot be read: {0}")]
    Read(#[from] io::Error),
}

/// Why something cannot be put at an address in guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    /// Not all of the range is RAM.
    #[error("the {what} ({len} bytes at {start:#x}) is not all within guest memory")]
    NotRam {
        /// What was to be put there.
        what: &'static str,
        /// Where it was to start.
        start: u64,
        /// How long it is.
        len: u64,
    },
    /// Something is there already.
    #[error("the {what} at {start:#x} would overlap the {with}")]
    Overlap {
        /// What was to be put there.
        what: &'static str,
        /// Where it was to start.
        start: u64,
        /// What is there.
        with: &'static str,
    },
    /// It does not fit into the space the machine's map gives it.
    #[error("the {what} takes {len} bytes, but only {room} are set aside for it")]
    NoRoom {
        /// What was to be put there.
        what: &'static str,
        /// How long it is.
        len: u64,
        /// The space set aside.
        room: u64,
    },
}
