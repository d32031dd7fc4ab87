//! Records of call sites, as the call sites leave them in a section of their own.
//!
//! Twelve bytes each, written by the `family!` macro inside the same assembly block as
//! the call, so that a call the compiler duplicates records itself twice and one it drops
//! takes its record along:
//!
//! | offset | bytes | content                                             |
//! |--------|-------|-----------------------------------------------------|
//! | 0      | 4     | the site, relative to this field                    |
//! | 4      | 4     | the table slot, relative to this field              |
//! | 8      | 1     | bytes at the site                                   |
//! | 9      | 1     | [`CallKind`]                                        |
//! | 10     | 2     | registers the site gives up ([`RegSet`])            |

use core::fmt;

use crate::convention::{CallKind, RegSet};

/// Bytes in a record.
pub const RECORD: usize = 12;

/// The shortest site: `call [slot]`.
pub const SITE_MIN: u8 = 6;

/// The longest.
pub const SITE_MAX: u8 = 64;

/// One call site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site {
    /// Address of its first byte.
    pub address: u64,
    /// Address of the slot it calls through.
    pub slot: u64,
    /// Its bytes, padding included.
    pub len: u8,
    /// How it calls.
    pub kind: CallKind,
    /// What it gives up.
    pub clobbers: RegSet,
}

/// A section of records that the macros cannot have written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RecordError {
    /// It does not hold a whole number of records.
    Ragged {
        /// Its bytes.
        len: usize,
    },
    /// It does not begin on a multiple of four.
    Unaligned {
        /// Where it begins.
        base: u64,
    },
    /// A record names a kind of call that does not exist.
    Kind {
        /// Number of the record.
        record: usize,
        /// What it says.
        kind: u8,
    },
    /// A record names an impossible length.
    Length {
        /// Number of the record.
        record: usize,
        /// What it says.
        len: u8,
    },
    /// A record points outside the address space.
    Address {
        /// Number of the record.
        record: usize,
    },
}

impl fmt::Display for RecordError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ragged { len } => write!(f, "{len} bytes of site records are not whole records"),
            Self::Unaligned { base } => write!(f, "site records at {base:#x} are not aligned"),
            Self::Kind { record, kind } => write!(f, "site record {record}: no call kind {kind}"),
            Self::Length { record, len } => {
                write!(f, "site record {record}: a site of {len} bytes cannot be")
            }
            Self::Address { record } => {
                write!(f, "site record {record} points outside the address space")
            }
        }
    }
}

impl core::error::Error for RecordError {}

/// A section of records, checked for its shape.
#[derive(Clone, Copy, Debug)]
pub struct Sites<'a> {
    bytes: &'a [u8],
    base: u64,
}

impl<'a> Sites<'a> {
    /// Records at address `base`, whose bytes are given: a module's, or another program's.
    ///
    /// # Safety
    /// The records must be true: written by this crate's macros for code that lies where
    /// they say. Text is rewritten on their word. (That they are well-formed need not be
    /// known, and is checked.)
    ///
    /// # Errors
    /// When they are not whole, aligned records.
    pub const unsafe fn new(bytes: &'a [u8], base: u64) -> Result<Self, RecordError> {
        if !bytes.len().is_multiple_of(RECORD) {
            return Err(RecordError::Ragged { len: bytes.len() });
        }
        if !base.is_multiple_of(4) {
            return Err(RecordError::Unaligned { base });
        }
        Ok(Self { bytes, base })
    }

    /// How many.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.bytes.len() / RECORD
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The sites, or what is wrong with a record.
    pub fn iter(&self) -> impl Iterator<Item = Result<Site, RecordError>> + Clone + use<'a> {
        let base = self.base;
        self.bytes
            .chunks_exact(RECORD)
            .enumerate()
            .map(move |(record, bytes)| decode(record, bytes, base))
    }
}

fn decode(record: usize, bytes: &[u8], base: u64) -> Result<Site, RecordError> {
    let outside = RecordError::Address { record };
    let &[a0, a1, a2, a3, s0, s1, s2, s3, len, kind, c0, c1] = bytes else {
        return Err(RecordError::Ragged { len: bytes.len() });
    };
    let at = |field: u64| base.checked_add((record as u64).checked_mul(12)?)?.checked_add(field);
    let relative = |field: u64, bytes: [u8; 4]| {
        at(field)?.checked_add_signed(i64::from(i32::from_le_bytes(bytes)))
    };
    let address = relative(0, [a0, a1, a2, a3]).ok_or(outside)?;
    let slot = relative(4, [s0, s1, s2, s3]).ok_or(outside)?;
    if !(SITE_MIN..=SITE_MAX).contains(&len) {
        return Err(RecordError::Length { record, len });
    }
    address.checked_add(u64::from(len)).ok_or(outside)?;
    let kind = CallKind::from_u8(kind).ok_or(RecordError::Kind { record, kind })?;
    Ok(Site { address, slot, len, kind, clobbers: RegSet::from_bits(u16::from_le_bytes([c0, c1])) })
}

impl Sites<'static> {
    /// The records of the running program (or of the shared object this is
    /// linked into). A kernel's own linker script must define `__start_pvops_sites` and
    /// `__stop_pvops_sites` around `KEEP(*(pvops_sites))`.
    #[must_use]
    pub fn of_program() -> Self {
        let (start, stop): (*const u8, *const u8);
        // SAFETY: two address computations. The empty contribution makes the linker define
        // both symbols in programs without a single call site.
        unsafe {
            core::arch::asm!(
                ".pushsection pvops_sites, \"aR\", @progbits",
                ".balign 4",
                ".popsection",
                "lea {0}, [rip + __start_pvops_sites]",
                "lea {1}, [rip + __stop_pvops_sites]",
                out(reg) start,
                out(reg) stop,
                options(nomem, nostack),
            );
        }
        // SAFETY: the linker puts the symbols around one section, which is loaded, never
        // written, and lives as long as the program.
        let bytes = unsafe { core::slice::from_raw_parts(start, stop.addr() - start.addr()) };
        // The section is made of twelve-byte records only, four-aligned each.
        Self { bytes, base: start.addr() as u64 }
    }
}
