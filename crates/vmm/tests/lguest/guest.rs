//! Making such a kernel: a small assembler, and an image with everything around it.
//!
//! The kernel is linked at [`KERNEL`] + [`TEXT`], starts at physical addresses, introduces
//! itself, gets onto page tables (the host's or its own) and goes on at virtual ones.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use lguest_abi::band::InitialTables;
use lguest_abi::call::ShutdownReason;
use lguest_abi::ring::SLOT_READY;
use lguest_abi::segments::{Gate, GateKind};
use lguest_abi::shared_data::{NoIrqWindow, StaticFields};
use lguest_abi::{Band, Call, Paging, Phys};
use softcpu::cpuid::CpuModel;
use vmm::devices::virtio::IoThreads;
use vmm::engine::EngineChoice;
use vmm::engine::watch::Watchers;
use vmm::loader::{Image, PlatformKind};
use vmm::machine::{Machine, MachineConfig, Outcome, PlatformChoice};

/// PAGE_OFFSET.
pub(crate) const KERNEL: u32 = 0xc000_0000;
/// Physical addresses of the image's parts.
pub(crate) const TEXT: u32 = 0x40_0000;
pub(crate) const DATA: u32 = 0x50_0000;
/// Variables, zero at the start; a word each.
pub(crate) const VARS: u32 = 0x50_1000;
const WORDS: u32 = 0x51_0000;
const TABLES: u32 = 0x60_0000;
/// Where the kernel's stack ends, and the one for traps from ring 3.
pub(crate) const STACK: u32 = 0x70_0000;
pub(crate) const TRAP_STACK: u32 = 0x72_0000;
/// Where user code may be put, with its stack below.
pub(crate) const USER: u32 = 0x80_0000;
const TEXT_BYTES: usize = 0x1_0000;
const WORDS_BYTES: usize = 128;
const MEMORY: u64 = 32 << 20;

/// General registers, as encoded.
#[derive(Clone, Copy)]
pub(crate) enum Reg {
    Eax,
    Ecx,
    Edx,
    Ebx,
    Esp,
    Esi = 6,
}

/// A place in the code.
#[derive(Clone, Copy)]
pub(crate) struct Label(usize);

/// A kernel being written.
pub(crate) struct Guest {
    pub(crate) band: Band,
    pub(crate) paging: Paging,
    code: Vec<u8>,
    labels: Vec<Option<usize>>,
    /// Where a label's address goes, and whether it is relative.
    fixups: Vec<(usize, Label, bool)>,
    words: Vec<String>,
    window: Option<(Label, Label)>,
    slot: u32,
    user: Vec<u8>,
    /// It has no page tables: addresses are physical.
    pub(crate) linear: bool,
    /// Of the Linux it says it is.
    pub(crate) version: Option<&'static str>,
}

/// The virtual address of a kernel's physical one.
pub(crate) const fn high(phys: u32) -> u32 {
    phys + KERNEL
}

/// The virtual address of variable number `n`.
pub(crate) const fn var(n: u32) -> u32 {
    high(VARS) + n * 4
}

impl Guest {
    /// A kernel of that band that has introduced itself and runs at virtual addresses.
    pub(crate) fn new(band: Band, paging: Paging) -> Self {
        let mut guest = Self::bare(band, paging);
        guest.begin();
        guest
    }

    /// The same without a stack that is anywhere, and before its first hypercall.
    pub(crate) fn bare(band: Band, paging: Paging) -> Self {
        Self {
            band,
            paging,
            code: Vec::new(),
            labels: Vec::new(),
            fixups: Vec::new(),
            words: vec!["Power down".into()],
            window: None,
            slot: 0,
            user: Vec::new(),
            linear: false,
            version: None,
        }
    }

    /// LGUEST_INIT, page tables, a stack, and the jump up.
    pub(crate) fn begin(&mut self) {
        self.call(Call::Init { data: Phys(DATA) });
        if self.band.initial_tables() == InitialTables::None {
            self.call(Call::NewPgtable { top: Phys(TABLES) });
        }
        let up = self.label();
        self.mov_label(Reg::Eax, up);
        self.raw(&[0xff, 0xe0]);
        self.bind(up);
        self.mov(Reg::Esp, high(STACK));
    }

    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.code.extend(bytes);
    }

    fn word(&mut self, word: u32) {
        self.raw(&word.to_le_bytes());
    }

    pub(crate) fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    pub(crate) fn bind(&mut self, label: Label) {
        self.labels[label.0] = Some(self.code.len());
    }

    pub(crate) fn here(&mut self) -> Label {
        let label = self.label();
        self.bind(label);
        label
    }

    pub(crate) fn mov(&mut self, reg: Reg, value: u32) {
        self.raw(&[0xb8 + reg as u8]);
        self.word(value);
    }

    /// The label's virtual address.
    pub(crate) fn mov_label(&mut self, reg: Reg, label: Label) {
        self.raw(&[0xb8 + reg as u8]);
        self.fixups.push((self.code.len(), label, false));
        self.word(0);
    }

    /// `mov dword ptr [at], value`
    pub(crate) fn store(&mut self, at: u32, value: u32) {
        self.raw(&[0xc7, 0x05]);
        self.word(at);
        self.word(value);
    }

    /// `mov byte ptr [at], value`
    fn store_byte(&mut self, at: u32, value: u8) {
        self.raw(&[0xc6, 0x05]);
        self.word(at);
        self.raw(&[value]);
    }

    /// `mov [at], reg`
    pub(crate) fn save(&mut self, at: u32, reg: Reg) {
        self.raw(&[0x89, 0x05 | (reg as u8) << 3]);
        self.word(at);
    }

    /// `mov reg, [at]`
    pub(crate) fn load(&mut self, reg: Reg, at: u32) {
        self.raw(&[0x8b, 0x05 | (reg as u8) << 3]);
        self.word(at);
    }

    /// `pop dword ptr [at]`
    pub(crate) fn pop_to(&mut self, at: u32) {
        self.raw(&[0x8f, 0x05]);
        self.word(at);
    }

    /// `push dword ptr [at]`
    pub(crate) fn push_from(&mut self, at: u32) {
        self.raw(&[0xff, 0x35]);
        self.word(at);
    }

    pub(crate) fn push(&mut self, value: u32) {
        self.raw(&[0x68]);
        self.word(value);
    }

    /// `inc dword ptr [at]`
    pub(crate) fn inc(&mut self, at: u32) {
        self.raw(&[0xff, 0x05]);
        self.word(at);
    }

    pub(crate) fn jmp(&mut self, label: Label) {
        self.raw(&[0xe9]);
        self.relative(label);
    }

    fn relative(&mut self, label: Label) {
        self.fixups.push((self.code.len(), label, true));
        self.word(0);
    }

    /// Does what `body` makes so often, counting at `at`.
    pub(crate) fn repeat(&mut self, at: u32, count: u32, body: impl FnOnce(&mut Self)) {
        self.store(at, count);
        let again = self.here();
        body(self);
        self.raw(&[0xff, 0x0d]); // dec dword ptr [at]
        self.word(at);
        self.raw(&[0x0f, 0x85]);
        self.relative(again);
    }

    /// `cmp dword ptr [at], value`
    pub(crate) fn compare(&mut self, at: u32, value: u32) {
        self.raw(&[0x81, 0x3d]);
        self.word(at);
        self.word(value);
    }

    /// Goes round until the word at `at` is `value`.
    pub(crate) fn wait_for(&mut self, at: u32, value: u32) {
        let again = self.here();
        self.compare(at, value);
        self.raw(&[0x0f, 0x85]);
        self.relative(again);
    }

    /// Goes round until the upper half of the word at `at` is `value`.
    pub(crate) fn wait_for_upper_half(&mut self, at: u32, value: u16) {
        let again = self.here();
        self.raw(&[0x66, 0x81, 0x3d]);
        self.word(at + 2);
        self.raw(&value.to_le_bytes());
        self.raw(&[0x0f, 0x85]);
        self.relative(again);
    }

    /// Panics with `words` unless the word at `at` is `value`.
    pub(crate) fn expect(&mut self, at: u32, value: u32, words: &str) {
        self.compare(at, value);
        let fine = self.label();
        self.raw(&[0x0f, 0x84]);
        self.relative(fine);
        let number = self.words.len();
        self.words.push(format!("check {number}: {words}"));
        self.shutdown(number);
        self.bind(fine);
    }

    fn shutdown(&mut self, words: usize) {
        let text = Phys(WORDS + (words * WORDS_BYTES) as u32);
        self.call(Call::Shutdown { text, reason: ShutdownReason::PowerOff });
    }

    /// All checks hold.
    pub(crate) fn done(&mut self) {
        self.shutdown(0);
        self.raw(&[0xeb, 0xfe]);
    }

    /// A direct hypercall, in this band's registers and by its instruction.
    pub(crate) fn call(&mut self, call: Call) {
        let registers = call.encode().to_registers(self.band.register_order());
        for (reg, value) in [
            (Reg::Eax, registers.eax),
            (Reg::Ebx, registers.ebx),
            (Reg::Ecx, registers.ecx),
            (Reg::Edx, registers.edx),
            (Reg::Esi, registers.esi),
        ] {
            self.mov(reg, value);
        }
        self.raw(self.band.trap().bytes());
    }

    /// Puts a call into the ring.
    pub(crate) fn queue(&mut self, call: Call) {
        let offsets = self.band.layout().offsets();
        let (form, slot) = (self.band.slot_form(), self.slot as usize);
        let mut bytes = vec![0; form.bytes()];
        form.write(&call.encode(), &mut bytes).unwrap();
        let at = high(DATA) + (offsets.hcalls + form.offset(slot)) as u32;
        for (at, word) in (at..).step_by(4).zip(bytes.chunks(4)) {
            self.store(at, u32::from_le_bytes(word.try_into().unwrap()));
        }
        self.store_byte(high(DATA) + (offsets.hcall_status + slot) as u32, SLOT_READY);
        self.slot = (self.slot + 1) % 64;
    }

    /// The address of a field of the shared data.
    pub(crate) fn field(&self, offset: usize) -> u32 {
        high(DATA) + offset as u32
    }

    pub(crate) fn irq_enabled(&self) -> u32 {
        self.field(self.band.layout().offsets().irq_enabled)
    }

    pub(crate) fn blocked(&self) -> u32 {
        self.field(self.band.layout().offsets().blocked_interrupts)
    }

    /// Puts a handler for `vector` aside, with `body` as its code, and loads its gate.
    pub(crate) fn handler(
        &mut self,
        vector: u8,
        kind: GateKind,
        dpl: u8,
        body: impl FnOnce(&mut Self),
    ) {
        let over = self.label();
        self.jmp(over);
        let base = if self.linear { TEXT } else { high(TEXT) };
        let offset = base + self.code.len() as u32;
        body(self);
        self.bind(over);
        let (low, high) = Gate { offset, dpl, kind }.words();
        self.call(Call::LoadIdtEntry { vector: vector.into(), low, high });
    }

    /// The stretch of code that no interrupt may be pushed into; in V6 its last label is
    /// that of the `iret`.
    pub(crate) fn window(&mut self, start: Label, end: Label) {
        self.window = Some((start, end));
    }

    /// What is at [`USER`].
    pub(crate) fn user(&mut self, code: &[u8]) {
        self.user = code.to_vec();
    }

    /// Goes to [`USER`] in ring 3, with the stack below it.
    pub(crate) fn enter_user(&mut self) {
        self.push(0x7b);
        self.push(USER);
        self.push(0x202);
        self.push(0x73);
        self.push(USER);
        self.raw(&[0xcf]);
    }

    /// Loads the descriptors for ring 3, as the band does it.
    pub(crate) fn user_segments(&mut self) {
        for (index, high) in [(14, 0x00cf_fa00), (15, 0x00cf_f200)] {
            let low = 0xffff;
            if self.band < Band::V2 {
                // LOAD_GDT replaces all of it, from a table that is made here.
                let table = VARS + 0x800;
                self.store(self::high(table) + index * 8, low);
                self.store(self::high(table) + index * 8 + 4, high);
                continue;
            }
            self.call(Call::LoadGdtEntry { index, low, high });
        }
        if self.band < Band::V2 {
            let table = VARS + 0x800;
            for (index, high) in [(12, 0x00cf_9a00), (13, 0x00cf_9200)] {
                self.store(self::high(table) + index * 8, 0xffff);
                self.store(self::high(table) + index * 8 + 4, high);
            }
            self.call(Call::LoadGdt { table: Phys(table), count: 32 });
        }
        self.call(Call::SetStack {
            ss: 0x69,
            esp: lguest_abi::Virt(self::high(TRAP_STACK)),
            pages: 2,
        });
    }

    /// DS as the kernel's: going to ring 3 has made it null. For the start of handlers.
    pub(crate) fn kernel_data(&mut self) {
        self.raw(&[0x6a, 0x69, 0x1f]); // push 0x69; pop ds
    }

    /// The kernel as an ELF file.
    pub(crate) fn image(&self) -> Vec<u8> {
        let mut text = self.code.clone();
        let address = |label: Label| self.labels[label.0].expect("the label is bound") as u32;
        for (at, label, relative) in &self.fixups {
            let target = address(*label);
            let value = if *relative {
                target.wrapping_sub(*at as u32 + 4)
            } else {
                high(TEXT).wrapping_add(target)
            };
            text[*at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        // What makes it known for what it is, where no code runs.
        text.extend(b"\0lguest\0");
        if let Some(version) = self.version {
            text.extend(format!("Linux version {version} \0").bytes());
        }
        text.extend([0xb8, 1, 0, 0, 0, 0x90]);
        text.extend(self.band.trap().bytes());
        text.extend([0x90; 16]);
        assert!(text.len() <= TEXT_BYTES);

        let mut data = vec![0; 4096];
        let (start, end) = match self.window {
            Some((start, end)) => (high(TEXT) + address(start), high(TEXT) + address(end)),
            None => (high(TEXT) + 0xf000, high(TEXT) + 0xf001),
        };
        let window = match self.band {
            Band::V6 => NoIrqWindow::Iret(end),
            _ => NoIrqWindow::Range { start, end },
        };
        let fields = StaticFields { window, kernel_address: KERNEL, syscall_vec: 0x80 };
        fields.write(self.band.layout(), &mut data).unwrap();
        let mut words = Vec::new();
        for text in &self.words {
            let mut text = text.as_bytes().to_vec();
            text.truncate(WORDS_BYTES - 1);
            text.resize(WORDS_BYTES, 0);
            words.extend(text);
        }
        let mut parts = vec![(TEXT, text), (DATA, data), (WORDS, words), (USER, self.user.clone())];
        if self.band.initial_tables() == InitialTables::None {
            parts.push((TABLES, tables(self.paging)));
        }
        parts.retain(|(_, bytes)| !bytes.is_empty());
        elf(TEXT, &parts)
    }

    pub(crate) fn config(&self, seconds: f64) -> (MachineConfig, Console) {
        config(self.image(), seconds)
    }

    /// Runs it: how it ended, and what it printed.
    pub(crate) fn run(&self) -> (Outcome, String) {
        let (config, console) = self.config(20.0);
        let machine = Machine::new(config).unwrap();
        assert_eq!(machine.platform(), PlatformKind::Lguest);
        let outcome = machine.run().unwrap();
        (outcome, console.text())
    }

    /// Finishes it, runs it, and says what went wrong if something did.
    pub(crate) fn check(mut self) -> String {
        self.done();
        let name = format!("{} {:?}", self.band, self.paging);
        let (outcome, console) = self.run();
        assert_eq!(outcome, Outcome::PoweredOff, "{name}: {console}");
        console
    }

    /// Runs it until it dies, and says of what.
    pub(crate) fn dies(&self) -> String {
        match self.run().0 {
            Outcome::Died(reason) => reason,
            other => panic!("{} should have died: {other:?}", self.band),
        }
    }
}

/// Every band with every format of page tables it can have.
pub(crate) fn all() -> Vec<(Band, Paging)> {
    let later = Band::ALL.into_iter().skip(2);
    let mut all: Vec<_> = later.map(|band| (band, Paging::TwoLevel)).collect();
    // Those of V3 and V4 are found out by their text, which `bands` does.
    all.extend([(Band::V5, Paging::Pae), (Band::V6, Paging::Pae)]);
    all
}

/// Page tables for RAM, at 0 and at [`KERNEL`]; all of it for ring 3 too.
fn tables(paging: Paging) -> Vec<u8> {
    let frames = (MEMORY >> 12) as u32;
    let mut words = Vec::new();
    match paging {
        Paging::TwoLevel => {
            let mut top = vec![0; 1024];
            for n in 0..frames / 1024 {
                let entry = (TABLES + 0x1000 + n * 0x1000) | 7;
                top[n as usize] = entry;
                top[(KERNEL >> 22) as usize + n as usize] = entry;
            }
            words.extend(top);
            words.extend((0..frames).map(|n| n << 12 | 7));
        }
        Paging::Pae => {
            let mut top = vec![0; 1024];
            top[0] = (TABLES + 0x1000) | 1;
            top[6] = top[0];
            words.extend(top);
            let mut middle = vec![0; 1024];
            for n in 0..frames / 512 {
                middle[n as usize * 2] = (TABLES + 0x2000 + n * 0x1000) | 7;
            }
            words.extend(middle);
            words.extend((0..frames).flat_map(|n| [n << 12 | 7, 0]));
        }
    }
    words.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// The address of the table entry for a kernel's page, and its size.
pub(crate) fn entry_of(paging: Paging, phys: u32) -> u32 {
    match paging {
        Paging::TwoLevel => high(TABLES + 0x1000) + (phys >> 12) * 4,
        Paging::Pae => high(TABLES + 0x2000) + (phys >> 12) * 8,
    }
}

/// The current top level, when it is the guest's own.
pub(crate) const TOP: Phys = Phys(TABLES);

/// An ELF32 executable.
pub(crate) fn elf(entry: u32, parts: &[(u32, Vec<u8>)]) -> Vec<u8> {
    let word = |value: u32| value.to_le_bytes();
    let half = |value: u16| value.to_le_bytes();
    let mut elf = vec![0x7f, b'E', b'L', b'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    elf.extend([half(2), half(3)].concat());
    elf.extend([word(1), word(entry), word(52), word(0), word(0)].concat());
    elf.extend([52, 32, parts.len() as u16, 0, 0, 0].map(half).concat());
    let mut offset = (52 + 32 * parts.len()) as u32;
    for (at, bytes) in parts {
        let len = bytes.len() as u32;
        elf.extend([1, offset, *at, *at, len, len, 7, 1].map(word).concat());
        offset += len;
    }
    parts.iter().for_each(|(_, bytes)| elf.extend(bytes));
    elf
}

/// What the guest printed.
#[derive(Clone, Default)]
pub(crate) struct Console(Arc<Mutex<Vec<u8>>>);

impl Console {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

impl std::io::Write for Console {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

pub(crate) fn config(kernel: Vec<u8>, seconds: f64) -> (MachineConfig, Console) {
    let console = Console::default();
    let config = MachineConfig {
        memory: MEMORY,
        cpus: 1,
        cpu_model: CpuModel::best_for_host(),
        engine: EngineChoice::Soft,
        platform: PlatformChoice::Auto,
        kernel: Image::from_bytes("kernel", kernel),
        initrds: Vec::new(),
        command_line: "quiet".into(),
        serial_output: Box::new(console.clone()),
        devices: Vec::new(),
        io: IoThreads::start(1).unwrap(),
        sandbox: None,
        debug_exit: false,
        timeout: Some(Duration::from_secs_f64(seconds)),
        translation: softcpu::translate::Config::default(),
        watchers: Watchers::default(),
    };
    (config, console)
}
