//! KVM's ops through call sites, against a model of the host: what it takes over, what stays
//! native, and the registers around each call.

mod module;

use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering::SeqCst};
use module::{Module, Ops};
use pvops::backend::kvm::{self, *};
use pvops::families::types::{CpuMask, Lock, Mm, Pgd, Pmd, Pte, Pud};
use pvops::families::{apic, cpu, lock, mmu, time};
use pvops::user::{DualMapping, Threads};
use pvops::{Binding, Bindings, Family, Form, Outcome, Plain, Sites};
use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard};

/// Everything there is.
const ALL: Features = Features(u32::MAX);

fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(|e| e.into_inner())
}

/// Binds a family, keeps a site of each op at hand, has `check` look through the module's
/// sites as they were made and again as they are patched, and gives the family back. Returns
/// the forms that the program's sites took.
fn through_sites<F: Family>(
    bindings: &Bindings<F>,
    check: impl Fn(&Module),
) -> BTreeMap<&'static str, Form> {
    let sites = Sites::of_program();
    let mut text = DualMapping::around(sites, Threads::stop(42)).expect("a window");
    let mut family = F::claim().expect("nobody has it");
    family.bind(bindings).expect("complete");
    let (mut ops, mut forms) = (Ops::default(), BTreeMap::new());
    let log = |outcome: &Outcome| {
        ops.note(outcome);
        forms.insert(outcome.op, outcome.form);
    };
    let (mut patched, report) =
        family.apply(sites, &mut text, log).map_err(|(_, e)| e).expect("patched");
    assert_eq!(report.indirect, 0, "{report}");
    let mut module = Module::load(&ops);
    check(&module);
    let records = module.records();
    let report = patched.apply_late(records.sites(), &mut module, |_| ()).expect("patched");
    assert_eq!(report.indirect, 0, "{report}");
    check(&module);
    patched.undo(sites, &mut text).map_err(|(_, e)| e).expect("undone").release();
    forms
}

/// Ops that the host does not have stay native, whichever they are.
#[test]
fn without_features_nothing_is_taken_over() {
    let _turn = turn();
    // A wanting table is complete with what has no default; here that is all that is missing.
    let mut bindings = Bindings::<time::Family>::new("kvm");
    bind_time(&mut bindings, Features(0), &CLOCK).expect("nothing bound");
    bind_steal_clock(&mut bindings, Features(0), &CPUS).expect("nothing bound");
    let error = time::Family::claim().map(|mut f| (f.bind(&bindings), f.release()).0);
    assert!(error.expect("claimed").expect_err("none").to_string().contains("time.time_init"));
    let mut cpu = Bindings::<cpu::Family>::new("kvm");
    bind_cpu(&mut cpu, Features(0)).expect("nothing bound");
    cpu.bind(cpu::op::IoDelay, Binding::<Plain<_>>::nop()).expect("was left alone");
    let mut locks = Bindings::<lock::Family>::new("kvm");
    bind_locks(&mut locks, Features(0), &SLEEP).expect("nothing bound");
    bind_preempted(&mut locks, Features(0), &CPUS).expect("nothing bound");
    bind_locks(&mut locks, ALL, &SLEEP).expect("was left alone");
    bind_preempted(&mut locks, ALL, &CPUS).expect("was left alone");
    // Half of what it takes is not enough.
    let mut paging = Bindings::<mmu::Family>::new("kvm");
    bind_flush(&mut paging, Features::TLB_FLUSH, &CPUS, &SHOOTDOWN).expect("nothing bound");
    bind_flush(&mut paging, ALL, &CPUS, &SHOOTDOWN).expect("was left alone");
    bind_paging(&mut paging, Features(!Features::MMU_OP.0), &BATCHES).expect("nothing bound");
    bind_paging(&mut paging, ALL, &BATCHES).expect("was left alone");
    let twice = bind_flush(&mut paging, ALL, &CPUS, &SHOOTDOWN).expect_err("bound");
    assert_eq!(twice.to_string(), "backend kvm binds mmu.flush_tlb_others twice");
}

/// What a host with everything has taken over, op by op; all else stays native.
#[test]
fn with_all_features_these_are_taken_over_and_no_others() {
    let _turn = turn();
    fn sorted<F: Family>(bindings: &Bindings<F>) -> Vec<&'static str> {
        let mut ops: Vec<_> = bindings.ops().collect();
        ops.sort_unstable();
        ops
    }
    let mut cpu = Bindings::<cpu::Family>::new("kvm");
    bind_cpu(&mut cpu, ALL).expect("once");
    assert_eq!(sorted(&cpu), ["io_delay"]);
    let mut time = Bindings::<time::Family>::new("kvm");
    bind_time(&mut time, ALL, &CLOCK).expect("once");
    bind_steal_clock(&mut time, ALL, &CPUS).expect("once");
    let clocks = ["get_tsc_khz", "get_wallclock", "sched_clock", "set_wallclock", "steal_clock"];
    assert_eq!(sorted(&time), clocks);
    let mut apic = Bindings::<apic::Family>::new("kvm");
    bind_apic(&mut apic, ALL, &CLOCK).expect("once");
    assert_eq!(sorted(&apic), ["setup_secondary_clock"]);
    let mut lock = Bindings::<lock::Family>::new("kvm");
    bind_locks(&mut lock, ALL, &SLEEP).expect("once");
    bind_preempted(&mut lock, ALL, &CPUS).expect("once");
    let native: Vec<_> = lock::Family::OPS
        .iter()
        .map(|op| op.name)
        .filter(|name| !sorted(&lock).contains(name))
        .collect();
    assert_eq!(native, ["spin_is_locked"]);
    let mut mmu = Bindings::<mmu::Family>::new("kvm");
    bind_flush(&mut mmu, ALL, &CPUS, &SHOOTDOWN).expect("once");
    assert_eq!(sorted(&mmu), ["flush_tlb_others"]);
    bind_paging(&mut mmu, ALL, &BATCHES).expect("once");
    let mut paging = vec!["flush_tlb_others", "flush_tlb_user", "lazy_enter", "lazy_leave"];
    paging.extend(["pmd_clear", "pte_clear", "ptep_modify_prot_commit"]);
    paging.extend(["release_pmd", "release_pte", "release_pud"]);
    paging.extend(["set_pgd", "set_pmd", "set_pte", "set_pte_at", "set_pte_atomic", "set_pud"]);
    assert_eq!(sorted(&mmu), paging);
}

// The host's clock: what it wrote to the page, when told where that is.
static PAGE: ClockPage = ClockPage::new();
static WALL: WallClock = WallClock {
    version: AtomicU32::new(0),
    seconds: AtomicU32::new(0),
    nanoseconds: AtomicU32::new(0),
};
static TIMERS: AtomicUsize = AtomicUsize::new(0);
/// The registers this host has: KVM's own range, or the old ones.
static REGISTERS: [AtomicU32; 2] = [AtomicU32::new(0), AtomicU32::new(0)];

/// What a write to a register asks of the host.
fn host_register(register: u32, value: u64) {
    let [wall, system] = REGISTERS.each_ref().map(|r| r.load(SeqCst));
    if register == wall {
        assert_eq!(value, (&raw const WALL).addr() as u64);
        WALL.seconds.store(1_000_000, SeqCst);
        WALL.nanoseconds.store(900_000_000, SeqCst);
    } else {
        assert_eq!((register, value), (system, (&raw const PAGE).addr() as u64 | 1));
        PAGE.system_time.store(5_200_000_000, SeqCst);
        PAGE.tsc_timestamp.store(cpu::read_tsc(), SeqCst);
        // Two GHz, it claims.
        PAGE.tsc_to_system_mul.store(1 << 31, SeqCst);
    }
}

static CLOCK: Clock = Clock {
    page: || &PAGE,
    wall: &WALL,
    physical: |pointer| pointer.addr() as u64,
    write_msr: host_register,
    start_timer: || {
        TIMERS.fetch_add(1, SeqCst);
    },
};

static CPUS: [StealTime; 4] = [const {
    StealTime {
        steal: AtomicU64::new(0),
        version: AtomicU32::new(0),
        flags: AtomicU32::new(0),
        preempted: AtomicU8::new(0),
    }
}; 4];

extern "sysv64" fn time_init() {}

/// Sites of this program, so that each op has one.
#[inline(never)]
fn clocks() -> (u64, u64, i32, u64) {
    // SAFETY: ops of the model's host.
    unsafe {
        apic::setup_secondary_clock();
        (time::sched_clock(), time::get_wallclock(), time::set_wallclock(1), time::steal_clock(1))
    }
}

#[test]
fn clocks_are_the_hosts() {
    let _turn = turn();
    for (features, registers) in [
        (ALL, [msr::WALL_CLOCK, msr::SYSTEM_TIME]),
        (Features::CLOCK.and(Features::STEAL_TIME), [msr::OLD_WALL_CLOCK, msr::OLD_SYSTEM_TIME]),
    ] {
        for (register, number) in REGISTERS.iter().zip(registers) {
            register.store(number, SeqCst);
        }
        let mut bindings = Bindings::new("kvm");
        bind_apic(&mut bindings, features, &CLOCK).expect("once");
        CPUS[1].steal.store(77, SeqCst);
        let forms = through_sites(&bindings, |module| {
            let before = TIMERS.load(SeqCst);
            PAGE.system_time.store(0, SeqCst);
            // SAFETY: the model's op.
            unsafe { module.call("setup_secondary_clock", &[]) };
            assert_eq!(TIMERS.load(SeqCst), before + 1);
            assert_eq!(PAGE.system_time.load(SeqCst), 5_200_000_000, "registered");
        });
        assert_eq!(forms["setup_secondary_clock"], Form::Direct);

        let mut bindings = Bindings::new("kvm");
        bind_time(&mut bindings, features, &CLOCK).expect("once");
        bind_steal_clock(&mut bindings, features, &CPUS).expect("once");
        bindings.bind(time::op::TimeInit, Binding::call(Plain::new(time_init))).expect("once");
        through_sites(&bindings, |module| {
            let call = |op, args: &[usize]| {
                // SAFETY: ops of the model, which take any word.
                unsafe { module.call(op, args) }
            };
            let now = call("sched_clock", &[]);
            assert!((5_200_000_000..6_000_000_000).contains(&now), "{now}");
            // Boot at 1000000.9, and 5.2 seconds since.
            assert_eq!(call("get_wallclock", &[]), 1_000_006);
            assert_eq!(call("set_wallclock", &[5]) as i32, clock::ENODEV);
            assert_eq!(call("steal_clock", &[1]), 77);
            for nobody in [0, 4, u32::MAX as usize] {
                assert_eq!(call("steal_clock", &[nobody]), 0);
            }
            // Time of another CPU whose page lags does not go back.
            PAGE.system_time.store(4_200_000_000, SeqCst);
            assert!(call("sched_clock", &[]) >= now);
            PAGE.system_time.store(5_200_000_000, SeqCst);
            // A direct op: no site.
            // SAFETY: the model's op.
            assert_eq!(unsafe { time::get_tsc_khz() }, 2_000_000);
        });
        core::hint::black_box(clocks as fn() -> _);
    }
}

// CPUs that wait for a lock.
static ASLEEP: (Mutex<()>, Condvar) = (Mutex::new(()), Condvar::new());
static KICKS: AtomicUsize = AtomicUsize::new(0);
static NAPS: AtomicUsize = AtomicUsize::new(0);

static SLEEP: Sleep = Sleep {
    wait: |lock| {
        let guard = ASLEEP.0.lock().expect("no panics");
        if lock.0.load(SeqCst) == locks::SLEEPER {
            NAPS.fetch_add(1, SeqCst);
            drop(ASLEEP.1.wait(guard).expect("no panics"));
        }
    },
    kick: |_| {
        KICKS.fetch_add(1, SeqCst);
        let _guard = ASLEEP.0.lock().expect("no panics");
        ASLEEP.1.notify_one();
    },
};

/// Four threads, one lock, and a count that only the lock protects.
#[inline(never)]
fn contend(lock: &'static Lock) -> u32 {
    struct Count(core::cell::UnsafeCell<u32>);
    // SAFETY: touched under the lock only.
    unsafe impl Sync for Count {}
    static COUNT: Count = Count(core::cell::UnsafeCell::new(0));
    let work = |i: u32| {
        for round in 0..2000 {
            // SAFETY: a lock, taken before it is given back; the count is under it.
            unsafe {
                match (i, round % 3) {
                    (0, 0) if lock::spin_trylock(lock) == 0 => lock::spin_lock(lock),
                    (0, 0) => {}
                    (_, 1) => lock::spin_lock_flags(lock, 0x200),
                    _ => lock::spin_lock(lock),
                }
                let count = COUNT.0.get();
                let seen = count.read_volatile();
                if round % 64 == 0 {
                    std::thread::yield_now();
                }
                count.write_volatile(seen + 1);
                lock::spin_unlock(lock);
            }
        }
    };
    std::thread::scope(|scope| {
        for i in 0..4 {
            scope.spawn(move || work(i));
        }
    });
    // SAFETY: they are all done; and questions change nothing.
    unsafe {
        assert_eq!((lock::spin_is_locked(lock), lock::spin_is_contended(lock)), (0, 0));
        assert_eq!(lock::vcpu_is_preempted(0), 0);
        core::mem::take(&mut *COUNT.0.get())
    }
}

#[test]
fn locks_sleep_and_wake() {
    static LOCK: Lock = Lock(AtomicU8::new(0));
    let _turn = turn();
    let mut bindings = Bindings::new("kvm");
    bind_locks(&mut bindings, ALL, &SLEEP).expect("once");
    bind_preempted(&mut bindings, ALL, &CPUS).expect("once");
    let forms = through_sites(&bindings, |module| {
        let address = (&raw const LOCK).addr();
        // SAFETY: ops on a lock of our own, or that take any word.
        let call = |op, word| unsafe { module.call(op, &[word, 0x200]) } as i32;
        let byte = || LOCK.0.load(SeqCst);
        let kicks = || KICKS.swap(0, SeqCst);
        kicks();
        call("spin_lock", address);
        assert_eq!((byte(), call("spin_is_locked", address)), (1, 1));
        assert_eq!((call("spin_trylock", address), call("spin_is_contended", address)), (0, 0));
        call("spin_unlock", address);
        assert_eq!((byte(), kicks()), (0, 0));
        call("spin_lock_flags", address);
        // Somebody goes to sleep for it. Trying must not forget that one.
        LOCK.0.store(locks::SLEEPER, SeqCst);
        assert_eq!((call("spin_trylock", address), byte()), (0, locks::SLEEPER));
        assert_eq!(call("spin_is_contended", address), 1);
        call("spin_unlock", address);
        assert_eq!((byte(), kicks()), (0, 1));
        assert_eq!((call("spin_trylock", address), byte()), (1, 1));
        call("spin_unlock", address);

        CPUS[2].preempted.store(steal::PREEMPTED | steal::FLUSH_TLB, SeqCst);
        CPUS[3].preempted.store(steal::FLUSH_TLB, SeqCst);
        let preempted = |cpu| call("vcpu_is_preempted", cpu);
        assert_eq!([0, 2, 3, 4, u32::MAX as usize].map(preempted), [0, 1, 0, 0, 0]);
        // The upper half of an argument of 32 bits may hold anything.
        assert_eq!(preempted(0xffff_ffff_0000_0002), 1);
        CPUS.iter().for_each(|cpu| cpu.preempted.store(0, SeqCst));

        // A waiter does go to sleep, and is woken.
        call("spin_lock", address);
        let naps = NAPS.load(SeqCst);
        std::thread::scope(|scope| {
            // SAFETY: a lock of our own.
            scope.spawn(|| unsafe {
                lock::spin_lock(&LOCK);
                lock::spin_unlock(&LOCK);
            });
            while NAPS.load(SeqCst) == naps {
                std::thread::yield_now();
            }
            assert_eq!(call("spin_is_contended", address), 1);
            call("spin_unlock", address);
        });
        assert_eq!(byte(), 0);
        assert_eq!(contend(&LOCK), 8000);
    });
    assert_eq!(forms["spin_unlock"], Form::Direct);
    assert_eq!(forms["spin_is_locked"], Form::Direct, "native, which has no template");
}

// Page tables: a few entries, the queue of the only CPU, and a host that carries out.
static ENTRIES: [AtomicU64; 8] = [const { AtomicU64::new(0) }; 8];
static FLUSHES: AtomicUsize = AtomicUsize::new(0);
static HYPERCALLS: AtomicUsize = AtomicUsize::new(0);
static RELEASED: AtomicU64 = AtomicU64::new(0);
static QUEUE: TheQueue = TheQueue(core::cell::UnsafeCell::new(Queue::new()));
struct TheQueue(core::cell::UnsafeCell<Queue>);
// SAFETY: used by one test, on one thread.
unsafe impl Sync for TheQueue {}

/// What the host does with a queue.
fn host_paging(len: usize, address: u64) -> u64 {
    HYPERCALLS.fetch_add(1, SeqCst);
    let words: *const u64 = core::ptr::with_exposed_provenance(address as usize);
    // SAFETY: the model's physical addresses are virtual ones, of a queue of that length.
    let words = unsafe { core::slice::from_raw_parts(words, len / 8) };
    // This host takes one operation at a time.
    match words {
        [1, entry, value, ..] => {
            let first = ENTRIES.as_ptr().addr() as u64;
            let index = (entry - first) / 8;
            ENTRIES[index as usize].store(*value, SeqCst);
            24
        }
        [2, ..] => {
            FLUSHES.fetch_add(1, SeqCst);
            8
        }
        [3, table, ..] => {
            RELEASED.store(*table, SeqCst);
            16
        }
        other => panic!("no operation: {other:x?}"),
    }
}

static BATCHES: Batches = Batches {
    queue: || QUEUE.0.get(),
    physical: |pointer| pointer.expose_provenance() as u64,
    hypercall: host_paging,
    refused: |refused| panic!("{refused:?}"),
};

// CPUs to interrupt, as bits.
static MASK: AtomicU64 = AtomicU64::new(0);
static INTERRUPTED: AtomicU64 = AtomicU64::new(0);

static SHOOTDOWN: Shootdown = Shootdown {
    without: |cpus, later| {
        // SAFETY: this kernel's sets are words.
        let all = unsafe { &*cpus.cast::<AtomicU64>() }.load(SeqCst);
        let kept = (0..64).filter(|cpu| all >> cpu & 1 != 0 && !later(*cpu));
        MASK.store(kept.fold(0, |set, cpu| set | 1 << cpu), SeqCst);
        (&raw const MASK).cast()
    },
    interrupt: |cpus, mm, address| {
        assert_eq!((mm.addr(), address), (0x1000, 0x2000));
        // SAFETY: as above.
        let cpus = unsafe { &*cpus.cast::<AtomicU64>() }.load(SeqCst);
        INTERRUPTED.store(cpus, SeqCst);
    },
};

unsafe extern "sysv64" fn set_fixmap(_: u32, _: u64, _: u64) {}

/// Sites of this program, so that each op has one. Never run: they are native elsewhere.
#[inline(never)]
unsafe fn page_tables(mm: *mut Mm, pte: *mut Pte, word: *mut u64, cpus: *const CpuMask) {
    // SAFETY: the caller's.
    unsafe {
        let (pmd, pud, pgd): (*mut Pmd, *mut Pud, *mut Pgd) =
            (word.cast(), word.cast(), word.cast());
        mmu::lazy_enter();
        mmu::set_pte(pte, Pte(1));
        mmu::set_pte_atomic(pte, Pte(1));
        mmu::set_pte_at(mm, 0, pte, Pte(1));
        let taken = mmu::ptep_modify_prot_start(mm, 0, pte);
        mmu::ptep_modify_prot_commit(mm, 0, pte, taken);
        mmu::set_pmd(pmd, Pmd(1));
        mmu::set_pud(pud, Pud(1));
        mmu::set_pgd(pgd, Pgd(1));
        mmu::pte_clear(mm, 0, pte);
        mmu::pmd_clear(pmd);
        mmu::flush_tlb_user();
        mmu::flush_tlb_single(0);
        mmu::flush_tlb_others(cpus, mm, 0);
        mmu::release_pte(1);
        mmu::release_pmd(1);
        mmu::release_pud(1);
        mmu::lazy_leave();
    }
}

#[test]
fn page_tables_change_by_hypercall_in_batches() {
    let _turn = turn();
    core::hint::black_box(page_tables as unsafe fn(_, _, _, _));
    let mut bindings = Bindings::new("kvm");
    bind_paging(&mut bindings, ALL, &BATCHES).expect("once");
    bind_flush(&mut bindings, ALL, &CPUS, &SHOOTDOWN).expect("once");
    bindings.bind(mmu::op::SetFixmap, Binding::call(Plain::new(set_fixmap))).expect("once");
    let forms = through_sites(&bindings, |module| {
        let entry = |i: usize| (&raw const ENTRIES[i]).expose_provenance();
        let value = |i: usize| ENTRIES[i].load(SeqCst);
        // SAFETY: entries of the model's.
        let call = |op, args: &[usize]| unsafe { module.call(op, args) };
        let calls = || HYPERCALLS.swap(0, SeqCst);
        ENTRIES.iter().for_each(|entry| entry.store(0, SeqCst));
        calls();
        // One at a time, at once.
        for (i, op) in
            ["set_pte", "set_pte_atomic", "set_pmd", "set_pud", "set_pgd"].into_iter().enumerate()
        {
            call(op, &[entry(i), 0x1000 + i]);
            assert_eq!((value(i), calls()), (0x1000 + i as u64, 1), "{op}");
        }
        call("set_pte_at", &[0, 0, entry(5), 0x5000]);
        assert_eq!((value(5), calls()), (0x5000, 1));
        // The exchange is native: at once, without a hypercall.
        assert_eq!(call("ptep_modify_prot_start", &[0, 0, entry(5)]), 0x5000);
        assert_eq!((value(5), calls()), (0, 0));
        call("ptep_modify_prot_commit", &[0, 0, entry(5), 0x6000]);
        call("pmd_clear", &[entry(4)]);
        assert_eq!((value(5), value(4), calls()), (0x6000, 0, 2));
        for (i, op) in ["release_pte", "release_pmd", "release_pud"].into_iter().enumerate() {
            call(op, &[0x77 + i]);
            assert_eq!((RELEASED.load(SeqCst), calls()), ((0x77 + i as u64) << 12, 1), "{op}");
        }
        // In lazy mode: later, in order.
        FLUSHES.store(0, SeqCst);
        call("lazy_enter", &[]);
        call("set_pte", &[entry(6), 0x7000]);
        call("pte_clear", &[0, 0, entry(6)]);
        call("set_pte", &[entry(7), 0x8000]);
        call("flush_tlb_user", &[]);
        assert_eq!((value(7), FLUSHES.load(SeqCst), calls()), (0, 0, 0));
        call("lazy_leave", &[]);
        assert_eq!((value(6), value(7), FLUSHES.load(SeqCst)), (0, 0x8000, 1));
        assert_eq!(calls(), 4, "this host takes one operation at a time");

        // CPUs 0, 1 and 2; number 1 does not run. Number 40 has no steal time: it is
        // interrupted, to be safe.
        let cpus = AtomicU64::new(0b111 | 1 << 40);
        CPUS[1].preempted.store(steal::PREEMPTED, SeqCst);
        call("flush_tlb_others", &[(&raw const cpus).expose_provenance(), 0x1000, 0x2000]);
        assert_eq!(INTERRUPTED.load(SeqCst), 0b101 | 1 << 40);
        let later = steal::PREEMPTED | steal::FLUSH_TLB;
        assert_eq!(CPUS.each_ref().map(|cpu| cpu.preempted.swap(0, SeqCst)), [0, later, 0, 0]);
        assert_eq!(cpus.load(SeqCst), 0b111 | 1 << 40, "the caller's set is the caller's");
    });
    for (native, form) in
        [("ptep_modify_prot_start", Form::Inline), ("flush_tlb_single", Form::Inline)]
    {
        assert_eq!(forms[native], form, "{native} stays native");
    }
}

/// `cpu`: one op taken over, the rest as it was.
#[test]
fn delays_are_nothing() {
    let _turn = turn();
    let mut bindings = Bindings::new("kvm");
    bind_cpu(&mut bindings, ALL).expect("once");
    let twice = bind_cpu(&mut bindings, ALL).expect_err("bound");
    assert_eq!(twice.to_string(), "backend kvm binds cpu.io_delay twice");
    assert!(kvm::is_kvm(0x4b4d_564b, 0x564b_4d56, 0x4d) && !kvm::is_kvm(0, 0, 0));
    bindings
        .bind(cpu::op::SetLdt, Binding::<Plain<_>>::nop())
        .and_then(|b| b.bind(cpu::op::LoadTls, Binding::<Plain<_>>::nop()))
        .expect("once");
    let mut family = cpu::Family::claim().expect("nobody has it");
    family.bind(&bindings).expect("complete");
    // Natively this is an I/O instruction, which an ordinary program may not execute.
    // SAFETY: KVM's does nothing.
    unsafe { cpu::io_delay() };
    assert_ne!(cpu::read_tsc(), 0);
    family.release();
}
