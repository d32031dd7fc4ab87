//! Small guests of a few instructions, run by a whole machine: how runs end, and that
//! vCPUs sleep, wake and start as they should.

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use softcpu::cpuid::CpuModel;
use vmm::devices::virtio::IoThreads;
use vmm::engine::EngineChoice;
use vmm::engine::watch::Watchers;
use vmm::loader::Image;
use vmm::machine::{Machine, MachineConfig, MachineError, Outcome, PlatformChoice};

/// Where the guest is loaded; what its parts are called.
const BASE: u32 = 0x10_0000;
const IDT_POINTER: u32 = BASE + 0x10;
const CODE: usize = 0x20;
const HANDLER: usize = 0x800;
const AP_CODE: usize = 0x900;
const IDT: usize = 0x1000;
const SIZE: usize = IDT + 0x800;
/// The vector whose handler is at [`HANDLER`].
const VECTOR: u8 = 0x40;

const HALT_FOR_EVER: &[u8] = &[0xf4, 0xeb, 0xfd];
/// `cli`
const CLI: u8 = 0xfa;
/// `sti; hlt`
const STI_HLT: &[u8] = &[0xfb, 0xf4];

/// `mov dx, port; mov al, value; out dx, al`
fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

/// Ends the run by the debug-exit port.
fn exit(value: u8) -> Vec<u8> {
    out(0xf4, value)
}

/// `mov dword ptr [addr], value`
fn store(addr: u32, value: u32) -> Vec<u8> {
    [&[0xc7, 0x05][..], &addr.to_le_bytes(), &value.to_le_bytes()].concat()
}

/// `lidt [IDT_POINTER]`, and the local APIC enabled.
fn set_up_interrupts() -> Vec<u8> {
    let lidt = [&[0x0f, 0x01, 0x1d][..], &IDT_POINTER.to_le_bytes()].concat();
    [lidt, store(0xfee0_00f0, 0x1ff)].concat()
}

/// INIT and startup at 0x8000 to the local APIC 1.
fn start_other() -> Vec<u8> {
    [store(0xfee0_0310, 1 << 24), store(0xfee0_0300, 0x4500), store(0xfee0_0300, 0x4608)].concat()
}

/// A multiboot ELF with `code` to run, `handler` for [`VECTOR`], and `other` copied to
/// 0x8000 first, for another vCPU in real mode.
fn image(code: &[u8], handler: &[u8], other: &[u8]) -> Vec<u8> {
    let mut segment = vec![0; SIZE];
    let mut put = |at: usize, bytes: &[u8]| segment[at..at + bytes.len()].copy_from_slice(bytes);
    let magic = 0x1bad_b002_u32;
    put(0, &[magic.to_le_bytes(), [0; 4], magic.wrapping_neg().to_le_bytes()].concat());
    let idt = BASE + IDT as u32;
    put(0x10, &[&0x7ff_u16.to_le_bytes()[..], &idt.to_le_bytes()].concat());
    // mov esi, AP_CODE; mov edi, 0x8000; mov ecx, 64; rep movsb
    let source = BASE + AP_CODE as u32;
    let copy =
        [&[0xbe][..], &source.to_le_bytes(), &[0xbf, 0, 0x80, 0, 0, 0xb9, 64, 0, 0, 0, 0xf3, 0xa4]];
    put(CODE, &[&copy.concat(), code].concat());
    put(HANDLER, handler);
    put(AP_CODE, other);
    let [a, b, c, d] = (BASE + HANDLER as u32).to_le_bytes();
    put(IDT + 8 * usize::from(VECTOR), &[a, b, 8, 0, 0, 0x8e, c, d]);

    let word = |value: u32| value.to_le_bytes();
    let half = |value: u16| value.to_le_bytes();
    let mut elf = vec![0x7f, b'E', b'L', b'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    elf.extend([half(2), half(3)].concat());
    elf.extend([word(1), word(BASE + CODE as u32), word(52), word(0), word(0)].concat());
    elf.extend([half(52), half(32), half(1), half(0), half(0), half(0)].concat());
    let size = SIZE as u32;
    elf.extend([1, 0x1000, BASE, BASE, size, size, 7, 0x1000].map(word).concat());
    elf.resize(0x1000, 0);
    elf.extend(segment);
    elf
}

#[derive(Clone, Default)]
struct Console(Arc<Mutex<Vec<u8>>>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn config(kernel: &[u8], cpus: u32, seconds: f64) -> (MachineConfig, Console) {
    let console = Console::default();
    let config = MachineConfig {
        memory: 64 << 20,
        cpus,
        cpu_model: CpuModel::best_for_host(),
        engine: EngineChoice::Soft,
        platform: PlatformChoice::Auto,
        kernel: Image::from_bytes("kernel", kernel.to_vec()),
        initrds: Vec::new(),
        command_line: String::new(),
        serial_output: Box::new(console.clone()),
        devices: Vec::new(),
        io: IoThreads::start(1).unwrap(),
        sandbox: None,
        debug_exit: true,
        timeout: Some(Duration::from_secs_f64(seconds)),
        translation: softcpu::translate::Config::default(),
        watchers: Watchers::default(),
    };
    (config, console)
}

fn run(cpus: u32, code: &[u8], handler: &[u8], other: &[u8]) -> Outcome {
    let kernel = image(code, handler, other);
    let (config, _) = config(&kernel, cpus, 20.0);
    Machine::new(config).unwrap().run().unwrap()
}

fn outcome(code: &[u8]) -> Outcome {
    run(1, code, &[], &[])
}

#[test]
fn guests_end_runs() {
    assert_eq!(outcome(&[exit(0x2a), HALT_FOR_EVER.into()].concat()), Outcome::DebugExit(0x2a));
    assert_eq!(outcome(&[out(0x600, 0x34), HALT_FOR_EVER.into()].concat()), Outcome::PoweredOff);
    assert_eq!(outcome(&[out(0x64, 0xfe), HALT_FOR_EVER.into()].concat()), Outcome::Reset);
    assert_eq!(outcome(&[out(0x604, 1), HALT_FOR_EVER.into()].concat()), Outcome::Reset);
    assert_eq!(outcome(&[out(0x505, 1), HALT_FOR_EVER.into()].concat()), Outcome::Panicked);
    // ud2 without an interrupt descriptor table.
    let end = outcome(&[0x0f, 0x0b]);
    assert!(matches!(end, Outcome::TripleFault { vcpu: 0, rip } if rip < 0x20_0000), "{end:?}");
}

#[test]
fn others_end_runs() {
    let spinning = image(&[0xeb, 0xfe], &[], &[]);
    let (timed, _) = config(&spinning, 2, 0.2);
    let start = Instant::now();
    assert_eq!(Machine::new(timed).unwrap().run().unwrap(), Outcome::TimedOut);
    assert!(start.elapsed() < Duration::from_secs(5));

    let halted = image(&[&[CLI], HALT_FOR_EVER].concat(), &[], &[]);
    let (stopped, _) = config(&halted, 2, 20.0);
    let machine = Machine::new(stopped).unwrap();
    let controller = machine.controller();
    let asker = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        let dump = controller.dump();
        controller.stop();
        dump
    });
    assert_eq!(machine.run().unwrap(), Outcome::Stopped);
    let dump = asker.join().unwrap();
    assert!(
        dump.contains("vcpu 0 running or halted") && dump.contains("vcpu 1 waits for startup"),
        "{dump}"
    );
}

#[test]
fn a_timer_wakes_a_halted_vcpu() {
    // One-shot, 20 ms.
    let timer = [
        store(0xfee0_0320, VECTOR.into()),
        store(0xfee0_03e0, 0xb),
        store(0xfee0_0380, 20_000_000),
    ];
    let code = [set_up_interrupts(), timer.concat(), STI_HLT.into(), exit(1)].concat();
    let start = Instant::now();
    assert_eq!(run(1, &code, &exit(0x33), &[]), Outcome::DebugExit(0x33));
    assert!(start.elapsed() >= Duration::from_millis(20));
}

#[test]
fn a_timer_interrupts_a_busy_vcpu() {
    let timer =
        [store(0xfee0_0320, VECTOR.into()), store(0xfee0_03e0, 0xb), store(0xfee0_0380, 5_000_000)];
    let code = [set_up_interrupts(), timer.concat(), vec![0xfb, 0xeb, 0xfe]].concat();
    assert_eq!(run(1, &code, &exit(0x34), &[]), Outcome::DebugExit(0x34));
}

#[test]
fn an_interprocessor_interrupt_to_oneself_is_taken() {
    let send = store(0xfee0_0300, 0x4_4000 | u32::from(VECTOR));
    let code = [set_up_interrupts(), vec![0xfb], send, HALT_FOR_EVER.into()].concat();
    assert_eq!(run(1, &code, &exit(0x35), &[]), Outcome::DebugExit(0x35));
}

#[test]
fn another_vcpu_starts_in_real_mode() {
    let other = [&[0xb0, 0x07, 0xe6, 0xf4], HALT_FOR_EVER].concat();
    let code = [set_up_interrupts(), start_other(), HALT_FOR_EVER.into()].concat();
    assert_eq!(run(2, &code, &[], &other), Outcome::DebugExit(7));
}

#[test]
fn a_halted_vcpu_is_started_again_and_again() {
    const ROUNDS: u8 = 100;
    // inc byte ptr [0x9000]
    let other = [&[0xfe, 0x06, 0x00, 0x90], HALT_FOR_EVER].concat();
    // mov byte ptr [0x9000], 0; xor ebx, ebx
    let clear = vec![0xc6, 0x05, 0x00, 0x90, 0x00, 0x00, 0x00, 0x31, 0xdb];
    // inc bl; pause; cmp [0x9000], bl; jne pause
    let wait = vec![0xfe, 0xc3, 0xf3, 0x90, 0x38, 0x1d, 0x00, 0x90, 0x00, 0x00, 0x75, 0xf6];
    let round = [start_other(), wait].concat();
    // cmp bl, ROUNDS; jne round
    let back = (round.len() as u8 + 5).wrapping_neg();
    let again = vec![0x80, 0xfb, ROUNDS, 0x75, back];
    let code = [set_up_interrupts(), clear, round, again, exit(ROUNDS)].concat();
    assert_eq!(run(2, &code, &[], &other), Outcome::DebugExit(ROUNDS));
}

#[test]
fn the_console_speaks_and_listens() {
    let hello = [out(0x3f8, b'h'), out(0x3f8, b'i')].concat();
    // mov dx, 0x3fd; in al, dx; test al, 1; jz in; mov dx, 0x3f8; in al, dx; out dx, al
    let echo =
        [0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb, 0x66, 0xba, 0xf8, 0x03, 0xec, 0xee];
    let kernel = image(&[&hello, &echo[..], &exit(0)].concat(), &[], &[]);
    let (config, console) = config(&kernel, 1, 20.0);
    let machine = Machine::new(config).unwrap();
    assert_eq!(machine.controller().serial_input(b"!"), 1);
    assert_eq!(machine.run().unwrap(), Outcome::DebugExit(0));
    assert_eq!(*console.0.lock().unwrap(), b"hi!");
}

#[test]
fn what_cannot_be_had_is_said_before_anything_runs() {
    let kernel = b"not a kernel".to_vec();
    let error = |change: fn(&mut MachineConfig)| {
        let (mut config, _) = config(&kernel, 1, 1.0);
        change(&mut config);
        Machine::new(config).unwrap_err()
    };
    let errors = [
        error(|_| ()),
        error(|config| config.cpus = 0),
        error(|config| config.memory = 1),
        error(|config| config.engine = EngineChoice::Kvm),
        error(|config| config.kernel = Image::from_bytes("empty", Vec::new())),
    ];
    for error in errors {
        assert!(error.is_users(), "{error:?}");
        assert!(!error.to_string().contains('\n') && !matches!(error, MachineError::Crashed(_)));
    }
}
