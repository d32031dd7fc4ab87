//! A machine to prove on: the soft engine in ring 0, with one call site in its memory.

use pvops::engine::{State, Subject, rewrite};
use pvops::family::OpInfo;
use pvops::plan::original;
use pvops::{CallKind, Erased, Report, Site, Sites, Text, TextError, Why, Width};
use softcpu::Exit;
use softcpu::state::rflags::RFlags;
use softcpu::testing::TestMachine;

pub(crate) const SITE: u64 = 0x1_0000;
pub(crate) const SLOT: u64 = 0x1_2000;
pub(crate) const CODE: u64 = 0x2_0000;
pub(crate) const DATA: u64 = 0x5000;
pub(crate) const STACK: u64 = 0x8_0000;

pub(crate) struct Rig {
    pub(crate) machine: TestMachine,
    pub(crate) width: Width,
    records: Vec<u8>,
    site: Site,
}

/// The rig's memory as text to patch.
pub(crate) struct GuestText<'a>(&'a TestMachine);

// SAFETY: the machine does not run meanwhile, and its engine watches its code for writes.
unsafe impl Text for GuestText<'_> {
    fn covers(&self, address: u64, len: usize) -> Result<(), TextError> {
        if address + len as u64 <= 1 << 20 { Ok(()) } else { Err(TextError::OutsideWindow) }
    }
    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), TextError> {
        bytes.copy_from_slice(&self.0.get(address, bytes.len()));
        Ok(())
    }
    unsafe fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), TextError> {
        self.0.put(address, bytes);
        Ok(())
    }
}

/// What a run left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct After {
    pub(crate) gpr: [u64; 16],
    pub(crate) flags: RFlags,
}

impl Rig {
    /// A site of that kind and length, calling through a slot with `target`.
    pub(crate) fn new(width: Width, kind: CallKind, len: u8, target: u64) -> Self {
        let machine = match width {
            Width::Bits64 => TestMachine::long_mode(),
            Width::Bits32 => TestMachine::protected_mode(),
        };
        let clobbers = pvops::convention::Convention::of(width).clobbers(kind);
        let site = Site { address: SITE, slot: SLOT, len, kind, clobbers };
        machine.put(SITE, original(&site, width, Why::Unpatched).bytes());
        machine.put(SITE + u64::from(len), &[0xf4]); // hlt
        machine.put(SLOT, &target.to_le_bytes());
        // The record, as if it stood at address 0x100.
        let base = 0x100i32;
        let mut records = vec![];
        records.extend((SITE as i32 - base).to_le_bytes());
        records.extend((SLOT as i32 - base - 4).to_le_bytes());
        records.extend([len, kind as u8]);
        records.extend(clobbers.bits().to_le_bytes());
        Self { machine, width, records, site }
    }

    /// Patches the site to the best form of `bound`.
    pub(crate) fn patch(&mut self, bound: Erased) -> Report {
        let ops: &'static [OpInfo] = Box::leak(Box::new([OpInfo {
            name: "op",
            sites: Some(self.site.kind),
            args: 0,
            returns: false,
        }]));
        let subject = Subject {
            family: "rig",
            ops,
            width: self.width,
            index_of: |slot| (slot == SLOT).then_some(0),
        };
        // SAFETY: one record of the site that `new` put there.
        let sites = unsafe { Sites::new(&self.records, 0x100) }.expect("whole records");
        // SAFETY: nobody executes it but the machine.
        unsafe {
            rewrite(
                &subject,
                sites,
                &mut GuestText(&self.machine),
                |_| State::Original,
                |_| State::Bound(bound),
                |_| (),
            )
        }
        .expect("patched")
    }

    /// Runs the site with patterns in every register but those of `args`.
    pub(crate) fn run(&mut self, args: &[u64], flags: RFlags) -> (After, After) {
        let convention = pvops::convention::Convention::of(self.width);
        let mask = if self.width == Width::Bits64 { u64::MAX } else { u64::from(u32::MAX) };
        let mut before = pvops::Gpr::ALL.map(|r| pvops::probe::pattern(r) & mask);
        for (register, value) in convention.args.iter().zip(args) {
            before[*register as usize] = *value;
        }
        before[pvops::Gpr::Rsp as usize] = STACK;
        let state = &mut self.machine.vcpu.state;
        state.gpr[..16].copy_from_slice(&before);
        state.rip = SITE;
        state.rflags = flags;
        self.machine.vcpu.state_changed();
        let end = SITE + u64::from(self.site.len) + 1;
        // Ops that halt go on as if an interrupt had come.
        for _ in 0..3 {
            assert_eq!(self.machine.vcpu.run(), Exit::Halt, "{:?}", self.machine.vcpu.state);
            if self.machine.vcpu.state.rip == end {
                break;
            }
        }
        let state = &self.machine.vcpu.state;
        assert_eq!(state.rip, end);
        let mut gpr = [0; 16];
        gpr.copy_from_slice(&state.gpr[..16]);
        let before = After { gpr: before, flags };
        (before, After { gpr, flags: state.rflags })
    }

    pub(crate) fn word(&self, address: u64) -> u32 {
        let bytes = self.machine.get(address, 4);
        u32::from_le_bytes(bytes.try_into().expect("four bytes"))
    }
}

/// The general registers that differ.
pub(crate) fn changed(before: &After, after: &After) -> pvops::RegSet {
    let changed: Vec<_> = pvops::Gpr::ALL
        .into_iter()
        .filter(|r| before.gpr[*r as usize] != after.gpr[*r as usize])
        .collect();
    pvops::RegSet::of(&changed)
}
