//! How fast the interpreter is, in guest instructions per second.
//!
//! Each program is a loop of one flavour (byte loads and multiplication, scattered
//! memory and unpredictable branches, calls and the stack, a string instruction,
//! vectors by native stubs) in 64-bit mode with paging on. It ends in `hlt` and leaves
//! a result that is checked against the same computation on the host, so that nobody
//! measures a wrong answer.
//!
//! `cargo bench -p softcpu`

use std::arch::asm;
use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use softcpu::Exit;
use softcpu::state::regs::Gpr;
use softcpu::testing::TestMachine;

/// Where programs are loaded.
const CODE: u64 = 0x1000;
/// Where their stack starts, downwards.
const STACK: u64 = 0x8_0000;
/// First operand: [`LEN`] bytes.
const LEFT: u64 = 0x10_0000;
/// Second operand or result, as long.
const RIGHT: u64 = 0x20_0000;
/// Bytes of an operand.
const LEN: usize = 0x10_0000;
/// Words sorted.
const WORDS: usize = LEN / size_of::<u32>();
/// The first gap of Knuth's sequence 1, 4, 13... for that many words.
const FIRST_GAP: u32 = 88_573;
/// Argument of the recursive function.
const DEPTH: u32 = 24;

/// Declares `$name` as the bytes of a piece of position-independent machine code. Its
/// operands are constants.
macro_rules! program {
    ($name:ident, [$($line:literal),+], $($operand:ident = $value:expr),+) => {
        fn $name() -> &'static [u8] {
            let (start, end): (*const u8, *const u8);
            // SAFETY: only the addresses of two labels are taken; between them, in a
            // section of its own, lies code that is copied and never run in place.
            unsafe {
                asm!(
                    ".pushsection .rodata.bench, \"a\"",
                    "20:",
                    $($line,)+
                    "hlt",
                    "21:",
                    ".popsection",
                    "lea {start}, [rip + 20b]",
                    "lea {end}, [rip + 21b]",
                    start = out(reg) start,
                    end = out(reg) end,
                    $($operand = const $value,)+
                    options(nomem, nostack, preserves_flags)
                );
            }
            // SAFETY: the labels enclose read-only bytes of this very program.
            unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
        }
    };
}

// Fowler-Noll-Vo, 64 bits, byte by byte.
program!(
    fnv,
    [
        "mov edi, {left}",
        "mov ecx, {len}",
        "movabs rax, 0xcbf29ce484222325",
        "movabs r8, 0x100000001b3",
        "2: movzx edx, byte ptr [rdi]",
        "xor rax, rdx",
        "imul rax, r8",
        "inc rdi",
        "dec rcx",
        "jnz 2b"
    ],
    left = LEFT,
    len = LEN
);

// Shell sort of words that a linear congruence makes first.
program!(
    sort,
    [
        "mov edi, {left}",
        "mov ecx, {words}",
        "mov eax, 1",
        "2: imul eax, eax, 1664525",
        "add eax, 1013904223",
        "mov [rdi + rcx*4 - 4], eax",
        "dec ecx",
        "jnz 2b",
        "mov r8d, {gap}",
        "3: mov r9d, r8d",
        "4: mov eax, [rdi + r9*4]",
        "mov r10, r9",
        "5: cmp r10, r8",
        "jb 6f",
        "mov r11, r10",
        "sub r11, r8",
        "mov edx, [rdi + r11*4]",
        "cmp edx, eax",
        "jbe 6f",
        "mov [rdi + r10*4], edx",
        "mov r10, r11",
        "jmp 5b",
        "6: mov [rdi + r10*4], eax",
        "inc r9",
        "cmp r9, {words}",
        "jb 4b",
        "lea eax, [r8 - 1]",
        "xor edx, edx",
        "mov ecx, 3",
        "div ecx",
        "mov r8d, eax",
        "test eax, eax",
        "jnz 3b"
    ],
    left = LEFT,
    words = WORDS,
    gap = FIRST_GAP
);

// Fibonacci the silly way: nothing but calls, returns and the stack.
program!(
    recursion,
    [
        "mov edi, {depth}",
        "call 2f",
        "jmp 4f",
        "2: mov eax, edi",
        "cmp edi, 2",
        "jb 3f",
        "push rbx",
        "push rdi",
        "dec edi",
        "call 2b",
        "mov ebx, eax",
        "pop rdi",
        "sub edi, 2",
        "call 2b",
        "add eax, ebx",
        "pop rbx",
        "3: ret",
        "4:"
    ],
    depth = DEPTH
);

// One long copy.
program!(
    copy,
    ["cld", "mov esi, {left}", "mov edi, {right}", "mov ecx, {len}", "rep movsb"],
    left = LEFT,
    right = RIGHT,
    len = LEN
);

// Dot product of doubles, two at a time.
program!(
    dot,
    [
        "mov esi, {left}",
        "mov edi, {right}",
        "mov ecx, {len}",
        "xorpd xmm0, xmm0",
        "2: movapd xmm1, [rsi + rcx - 16]",
        "mulpd xmm1, [rdi + rcx - 16]",
        "addpd xmm0, xmm1",
        "sub rcx, 16",
        "jnz 2b",
        "movapd xmm1, xmm0",
        "unpckhpd xmm1, xmm1",
        "addsd xmm0, xmm1",
        "movq rax, xmm0"
    ],
    left = LEFT,
    right = RIGHT,
    len = LEN
);

/// A machine with `code` loaded.
fn machine(code: &[u8]) -> TestMachine {
    let machine = TestMachine::long_mode();
    machine.put(CODE, code);
    machine
}

/// Runs the program once; yields RAX.
fn run(machine: &mut TestMachine) -> u64 {
    machine.vcpu.state.rip = CODE;
    machine.vcpu.state.set_reg(Gpr::Rsp, STACK);
    assert_eq!(machine.vcpu.run(), Exit::Halt);
    machine.vcpu.state.reg(Gpr::Rax)
}

/// Measures the program in `machine`, which has just been checked by a first run.
/// The unit is the guest's instructions, or `bytes` where one instruction does it all.
fn measure(c: &mut Criterion, name: &str, mut machine: TestMachine, bytes: Option<u64>) {
    let before = machine.vcpu.counters().ops;
    run(&mut machine);
    let ops = machine.vcpu.counters().ops - before;
    let mut group = c.benchmark_group("interpreter");
    group
        .sampling_mode(SamplingMode::Flat)
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(2))
        .throughput(bytes.map_or(Throughput::Elements(ops), Throughput::Bytes))
        .bench_function(name, |b| {
            b.iter_custom(|times| {
                let start = cpu_time();
                for _ in 0..times {
                    black_box(run(&mut machine));
                }
                cpu_time().saturating_sub(start)
            });
        });
    group.finish();
}

/// Time this thread has been running: unlike the time of day it does not count what
/// else the host was doing.
fn cpu_time() -> Duration {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is ours to be written to.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut now) };
    assert_eq!(result, 0, "every Linux has this clock");
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// Bytes without a pattern that matters.
fn noise() -> Vec<u8> {
    let next = |x: &u32| Some(x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
    std::iter::successors(Some(1), next).map(|x: u32| (x >> 24) as u8).take(LEN).collect()
}

fn hashing(c: &mut Criterion) {
    let mut machine = machine(fnv());
    let data = noise();
    machine.put(LEFT, &data);
    let hash = data.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    assert_eq!(run(&mut machine), hash);
    measure(c, "fnv", machine, None);
}

fn sorting(c: &mut Criterion) {
    let mut machine = machine(sort());
    run(&mut machine);
    let sorted = machine.get(LEFT, LEN);
    let (words, _) = sorted.as_chunks::<4>();
    assert!(words.iter().map(|word| u32::from_le_bytes(*word)).is_sorted());
    measure(c, "shell_sort", machine, None);
}

fn calling(c: &mut Criterion) {
    let mut machine = machine(recursion());
    let (fibonacci, _) = (0..DEPTH).fold((0_u64, 1), |(a, b), _| (b, a + b));
    assert_eq!(run(&mut machine), fibonacci);
    measure(c, "recursion", machine, None);
}

fn copying(c: &mut Criterion) {
    let mut machine = machine(copy());
    let data = noise();
    machine.put(LEFT, &data);
    run(&mut machine);
    assert_eq!(machine.get(RIGHT, LEN), data);
    measure(c, "rep_movsb", machine, Some(LEN as u64));
}

fn multiplying(c: &mut Criterion) {
    let mut machine = machine(dot());
    // Small whole numbers: the sum is exact in whatever order it is made.
    let numbers: Vec<f64> = noise().iter().step_by(8).map(|byte| f64::from(*byte)).collect();
    let image: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    machine.put(LEFT, &image);
    machine.put(RIGHT, &image);
    let sum: f64 = numbers.iter().map(|number| number * number).sum();
    assert_eq!(f64::from_bits(run(&mut machine)), sum);
    measure(c, "sse2_dot", machine, None);
}

criterion_group!(benches, hashing, sorting, calling, copying, multiplying);
criterion_main!(benches);
