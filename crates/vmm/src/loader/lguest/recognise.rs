//! Is this a kernel for the lguest platform? Nothing in its headers says so.
//!
//! What does is its text: a kernel with guest support begins on this platform with the
//! hypercall LGUEST_INIT, hand-written in assembler in every version, `mov eax, 1` and the
//! trap within a few bytes; and it has the name in its strings. So the segments are looked
//! through, of a bzImage after unpacking. Only 32-bit kernels are: a 64-bit one of those
//! days never had this support. One of ours says so in a note.

use std::io::{BufReader, Read};

use lguest_abi::Band;
use lguest_abi::band::Trap;
use lguest_abi::boot::V0_MAGIC;
use lguest_abi::bus::Form;
use lguest_abi::call::number::LGUEST_INIT;

use super::super::boot_params::{SetupHeader, XLF_KERNEL_64};
use super::super::bzimage;
use super::super::elf::{self, Machine};
use super::super::error::{KernelError, LoadError};
use super::super::identify::{self, KernelKind};
use super::super::image::Image;
use super::super::payload::Format;

/// What kind of machine a kernel is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlatformKind {
    /// A PC.
    Pc,
    /// The lguest platform.
    Lguest,
    /// The lguest platform for kernels in long mode.
    LguestLong,
}

impl std::fmt::Display for PlatformKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Pc => "pc",
            Self::Lguest => "lguest",
            Self::LguestLong => "lguest, 64-bit",
        })
    }
}

/// Where a kernel of the lguest platform looks for its devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceForm {
    /// On the lguest bus, in a page of descriptors of this form.
    Bus(Form),
    /// On PCI: from 4.0 on.
    Pci,
}

/// The first protocol version with `xloadflags`.
const XLOADFLAGS_VERSION: u16 = 0x020c;
/// The first whose header says where the payload is.
const PAYLOAD_VERSION: u16 = 0x0208;
/// The first that knows subarchitectures.
const SUBARCH_VERSION: u16 = 0x0207;
/// What `setup_sects` means when it is zero.
const DEFAULT_SETUP_SECTS: u8 = 4;
const SECTOR: u64 = 512;
/// Where ELF says whether it is of 32 bits.
const EI_CLASS: usize = 4;
const ELFCLASS32: u8 = 1;

/// How much is looked at at once, and how much of it again with the next.
const STRETCH: usize = 0x4_0000;
const OVERLAP: usize = 64;
/// The most that is unpacked and looked through: larger kernels than any of that age.
const LIMIT: u64 = 128 << 20;
/// How far behind the number the trap is at most: pointers are loaded in between.
const NEAR: usize = 32;
/// What the version stands behind.
const BANNER: &[u8] = b"Linux version ";
/// How much of a version is looked at; less than what successive looks share.
const VERSION_MAX: usize = 16;
/// The name, as the kernel's strings have it.
const NAME: &[u8] = b"lguest";

/// What kind of machine `kernel` is for.
///
/// # Errors
/// [`LoadError`]: it cannot be read, or is a lguest guest of the one version that nobody
/// can run any more. What is no kernel at all is left to the loader to say.
pub fn platform_of(kernel: &Image) -> Result<PlatformKind, LoadError> {
    if is_long(kernel).map_err(|reason| in_kernel(kernel, reason))? {
        return Ok(PlatformKind::LguestLong);
    }
    let form = look(kernel).map_err(|reason| in_kernel(kernel, reason))?;
    Ok(form.map_or(PlatformKind::Pc, |_| PlatformKind::Lguest))
}

/// Whether it is a kernel of the 64-bit ABI.
fn is_long(kernel: &Image) -> Result<bool, KernelError> {
    let head = kernel.bytes_at(0, identify::HEAD_LEN)?;
    Ok(elf::is_elf(&head) && super::long::is_long_guest(kernel)?)
}

/// Where `kernel`, which is one for the lguest platform, looks for its devices.
///
/// # Errors
/// As [`platform_of`].
pub fn device_form(kernel: &Image) -> Result<DeviceForm, LoadError> {
    let form = look(kernel).map_err(|reason| in_kernel(kernel, reason))?;
    form.ok_or_else(|| in_kernel(kernel, KernelError::NotLguest))
}

fn in_kernel(kernel: &Image, reason: KernelError) -> LoadError {
    LoadError::Kernel { name: kernel.name().to_owned(), reason }
}

/// `None`: it is for a PC.
fn look(kernel: &Image) -> Result<Option<DeviceForm>, KernelError> {
    let head = kernel.bytes_at(0, identify::HEAD_LEN)?;
    let Ok(kind) = identify::identify(&head) else { return Ok(None) };
    let signs = match kind {
        KernelKind::Multiboot => Signs::default(),
        KernelKind::Elf => {
            let bits32 = head.get(EI_CLASS) == Some(&ELFCLASS32);
            if bits32 && elf::machine(&head)? == Machine::I386 {
                Signs::search(kernel.section(0, kernel.len()))?
            } else {
                Signs::default()
            }
        }
        KernelKind::BzImage => {
            let header = bzimage::setup_header(&head)?;
            let version = header.version.get();
            let bits64 =
                version >= XLOADFLAGS_VERSION && header.xloadflags.get() & XLF_KERNEL_64 != 0;
            match Payload::of(kernel, &header) {
                Ok(Some(payload)) if !bits64 && version >= SUBARCH_VERSION => {
                    payload.signs(kernel)?
                }
                // What is wrong with it is the loader's to say.
                _ => Signs::default(),
            }
        }
    };
    if signs.v0 {
        return Err(KernelError::LguestV0);
    }
    if !(signs.init && signs.name) {
        return Ok(None);
    }
    let band = signs.version.and_then(|(major, minor, patch)| Band::of_linux(major, minor, patch));
    tracing::info!(version = ?signs.version, ?band, "a kernel for the lguest platform");
    Ok(Some(match (band, signs.version) {
        (Some(Band::V6), _) => DeviceForm::Pci,
        (_, Some((2, 6, 24))) => DeviceForm::Bus(Form::Tagged),
        // A version that is not Linux' own says nothing; this was there the longest.
        _ => DeviceForm::Bus(Form::Packed),
    }))
}

/// Where a bzImage's protected-mode code begins in the file.
pub(super) fn code_offset(header: &SetupHeader) -> u64 {
    let sectors = match header.setup_sects {
        0 => DEFAULT_SETUP_SECTS,
        n => n,
    };
    u64::from(sectors).saturating_add(1).saturating_mul(SECTOR)
}

/// The compressed part of a bzImage.
#[derive(Clone, Copy, Debug)]
pub(super) struct Payload {
    offset: u64,
    len: u64,
    format: Format,
    /// The header says where it is; otherwise it was found by how it begins.
    stated: bool,
}

impl Payload {
    /// Where the header says it is or, before it did, where gzip data begins. `None` when
    /// there is none that could be unpacked.
    pub(super) fn of(image: &Image, header: &SetupHeader) -> Result<Option<Self>, KernelError> {
        let code = code_offset(header);
        if header.version.get() >= PAYLOAD_VERSION {
            let offset = code.saturating_add(header.payload_offset.get().into());
            let magic = image.bytes_at(offset, 16)?;
            let len = header.payload_length.get().into();
            return Ok(Format::detect(&magic).map(|format| Self {
                offset,
                len,
                format,
                stated: true,
            }));
        }
        // gzip's magic number, deflate, no flags, as the kernel's build calls it.
        const GZIP: &[u8] = &[0x1f, 0x8b, 0x08, 0x00];
        let bytes = image.bytes_at(code, usize::try_from(image.len().min(LIMIT)).unwrap_or(0))?;
        let found = bytes.windows(GZIP.len()).position(|window| window == GZIP);
        Ok(found.map(|at| Self {
            offset: code.saturating_add(at as u64),
            len: (bytes.len() as u64).saturating_sub(at as u64),
            format: Format::Gzip,
            stated: false,
        }))
    }

    /// What it unpacks to.
    pub(super) fn open<'i>(&self, image: &'i Image) -> Result<Box<dyn Read + 'i>, KernelError> {
        let section = image.section(self.offset, self.len);
        self.format.decompress(BufReader::with_capacity(0x1_0000, section))
    }

    /// Whether that is an ELF file that can be loaded in place of unpacking in the guest.
    pub(super) fn is_vmlinux(&self, image: &Image) -> Result<bool, KernelError> {
        let mut magic = Vec::new();
        self.open(image)?.take(4).read_to_end(&mut magic)?;
        Ok(self.stated && elf::is_elf(&magic))
    }

    fn signs(&self, image: &Image) -> Result<Signs, KernelError> {
        let mut head = Vec::new();
        let Ok(mut stream) = self.open(image) else { return Ok(Signs::default()) };
        // What does not unpack is the loader's to complain of.
        if stream.by_ref().take(32).read_to_end(&mut head).is_err() {
            return Ok(Signs::default());
        }
        if elf::is_elf(&head) && head.get(EI_CLASS) != Some(&ELFCLASS32) {
            return Ok(Signs::default());
        }
        Signs::search(std::io::Cursor::new(head).chain(stream)).or(Ok(Signs::default()))
    }
}

/// What was found in a kernel's bytes.
#[derive(Clone, Copy, Debug, Default)]
struct Signs {
    init: bool,
    name: bool,
    v0: bool,
    /// Linux' version, from its banner.
    version: Option<(u32, u32, u32)>,
}

impl Signs {
    /// Looks through all of `kernel`.
    fn search(kernel: impl Read) -> Result<Self, KernelError> {
        let mut signs = Self::default();
        let mut kernel = kernel.take(LIMIT);
        let mut window = Vec::new();
        loop {
            let keep = window.len().saturating_sub(OVERLAP);
            window.drain(..keep);
            let read = kernel.by_ref().take(STRETCH as u64).read_to_end(&mut window)?;
            signs.see(&window);
            if read == 0 || signs.v0 {
                return Ok(signs);
            }
        }
    }

    fn see(&mut self, bytes: &[u8]) {
        let holds = |needle: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
        self.v0 |= holds(V0_MAGIC);
        self.name |= holds(NAME);
        self.init |= holds_init(bytes);
        self.version = self.version.or_else(|| version(bytes));
    }
}

/// The version in a banner that lies whole in `bytes`: `Linux version 3.12.9 (`. The third
/// number may be missing.
fn version(bytes: &[u8]) -> Option<(u32, u32, u32)> {
    let at = bytes.windows(BANNER.len()).position(|window| window == BANNER)?;
    let rest = bytes.get(at.saturating_add(BANNER.len())..)?;
    let text = rest.get(..rest.len().min(VERSION_MAX))?;
    let text = text.split(|byte| !byte.is_ascii_digit() && *byte != b'.').next()?;
    let mut numbers = text
        .split(|byte| *byte == b'.')
        .map(|number| std::str::from_utf8(number).ok()?.parse().ok());
    Some((numbers.next()??, numbers.next()??, numbers.next().flatten().unwrap_or(0)))
}

/// `mov eax, LGUEST_INIT` and soon behind it one of the instructions that trap.
fn holds_init(bytes: &[u8]) -> bool {
    const MOV: [u8; 5] = [0xb8, LGUEST_INIT as u8, 0, 0, 0];
    bytes.windows(MOV.len().saturating_add(NEAR)).any(|window| {
        window.strip_prefix(&MOV).is_some_and(|near| {
            [Trap::Int1f, Trap::Vmcall].iter().any(|trap| {
                let trap = trap.bytes();
                near.windows(trap.len()).any(|code| code == trap)
            })
        })
    })
}
