//! The same three ops in every style of call, and the same callers around them.
//!
//! `save` and `restore` are the real thing (`pushf; pop`, `push; popf`); `quiet` stands in
//! for `cli`, which user mode may not execute: `cld`, one byte as well.

use core::arch::{asm, naked_asm};
use pvops::{Binding, CalleeSave, Code, Gpr, Plain, RegSet, callee_save};

/// Compiled callees, as most are: two instructions and what the compiler makes of them.
pub(crate) extern "sysv64" fn save_c() -> usize {
    let flags;
    // SAFETY: reads the flags.
    unsafe { asm!("pushfq", "pop {}", out(reg) flags) };
    flags
}
pub(crate) extern "sysv64" fn restore_c(flags: usize) {
    // SAFETY: flags that were read before.
    unsafe { asm!("push {}", "popfq", in(reg) flags) };
}
pub(crate) extern "sysv64" fn quiet_c() {
    // SAFETY: the direction flag is clear anyway.
    unsafe { asm!("cld") };
}

#[callee_save]
fn save_wrapped() -> usize {
    save_c()
}
#[callee_save]
fn restore_wrapped(flags: usize) {
    restore_c(flags);
}
#[callee_save]
fn quiet_wrapped() {
    quiet_c();
}

#[unsafe(naked)]
extern "sysv64" fn save_asm() -> usize {
    naked_asm!("pushfq", "pop rax", "ret")
}
#[unsafe(naked)]
extern "sysv64" fn restore_asm(flags: usize) {
    naked_asm!("push rdi", "popfq", "ret")
}
#[unsafe(naked)]
extern "sysv64" fn quiet_asm() {
    naked_asm!("cld", "ret")
}

type Save = extern "sysv64" fn() -> usize;
type Restore = extern "sysv64" fn(usize);
type Quiet = extern "sysv64" fn();

const fn code(bytes: &'static [u8], clobbers: RegSet) -> Code {
    Code { bytes, clobbers, fixups: &[] }
}

// SAFETY: a naked function that changes RAX at most.
const SAVE_ASM: CalleeSave<Save> = unsafe { CalleeSave::promise(save_asm) };
// SAFETY: as above.
const RESTORE_ASM: CalleeSave<Restore> = unsafe { CalleeSave::promise(restore_asm) };
// SAFETY: as above.
const QUIET_ASM: CalleeSave<Quiet> = unsafe { CalleeSave::promise(quiet_asm) };
const SAVE_INLINE: Binding<CalleeSave<Save>> =
    // SAFETY: as above.
    unsafe { Binding::inline(SAVE_ASM, code(&[0x9c, 0x58], RegSet::of(&[Gpr::Rax]))) };
const RESTORE_INLINE: Binding<CalleeSave<Restore>> =
    // SAFETY: as above.
    unsafe { Binding::inline(RESTORE_ASM, code(&[0x57, 0x9d], RegSet::EMPTY)) };
const QUIET_INLINE: Binding<CalleeSave<Quiet>> =
    // SAFETY: as above.
    unsafe { Binding::inline(QUIET_ASM, code(&[0xfc], RegSet::EMPTY)) };

/// A load that stays one: the kernels this is for have no vector registers to load into.
#[inline(always)]
pub(crate) fn get(word: &u64) -> u64 {
    // SAFETY: a reference.
    unsafe { core::ptr::from_ref(word).read_volatile() }
}

/// A store that stays one.
#[inline(always)]
pub(crate) fn put(word: &mut u64, value: u64) {
    // SAFETY: a reference.
    unsafe { core::ptr::from_mut(word).write_volatile(value) }
}

/// Callers with some values alive across one to three ops. Each loads its values, does
/// the ops, and stores every value changed: all of them live through all ops.
macro_rules! callers {
    () => {
        callers!(@live caller_0_, []);
        callers!(@live caller_2_, [a 0 b 1]);
        callers!(@live caller_4_, [a 0 b 1 c 2 d 3]);
        callers!(@live caller_6_, [a 0 b 1 c 2 d 3 e 4 f 5]);
        callers!(@live caller_8_, [a 0 b 1 c 2 d 3 e 4 f 5 g 6 h 7]);
        callers!(@live caller_10_, [a 0 b 1 c 2 d 3 e 4 f 5 g 6 h 7 i 8 j 9]);
        callers!(@live caller_12_, [a 0 b 1 c 2 d 3 e 4 f 5 g 6 h 7 i 8 j 9 k 10 l 11]);
    };
    (@live caller_0_, $l:tt) => { callers!(@ops one_0 two_0 three_0 $l); };
    (@live caller_2_, $l:tt) => { callers!(@ops one_2 two_2 three_2 $l); };
    (@live caller_4_, $l:tt) => { callers!(@ops one_4 two_4 three_4 $l); };
    (@live caller_6_, $l:tt) => { callers!(@ops one_6 two_6 three_6 $l); };
    (@live caller_8_, $l:tt) => { callers!(@ops one_8 two_8 three_8 $l); };
    (@live caller_10_, $l:tt) => { callers!(@ops one_10 two_10 three_10 $l); };
    (@live caller_12_, $l:tt) => { callers!(@ops one_12 two_12 three_12 $l); };
    (@ops $one:ident $two:ident $three:ident [$($v:ident $i:literal)*]) => {
        callers!(@fn $one, [$($v $i)*], { ops::quiet(); });
        callers!(@fn $two, [$($v $i)*], { ops::quiet(); ops::quiet(); });
        callers!(@fn $three, [$($v $i)*], {
            let flags = ops::save();
            ops::quiet();
            ops::restore(flags);
        });
    };
    (@fn $name:ident, [$($v:ident $i:literal)*], $ops:block) => {
        #[inline(never)]
        #[allow(unused_imports)]
        pub(crate) extern "sysv64" fn $name(p: &mut [u64; 16]) {
            use $crate::styles::{get, put};
            $(let $v = get(&p[$i]);)*
            $ops
            $(put(&mut p[$i], $v ^ ($i + 1));)*
            let _ = p;
        }
    };
}

/// A loop with twelve live values, all in registers if the ops leave them there.
macro_rules! hungry {
    () => {
        #[inline(never)]
        pub(crate) extern "sysv64" fn hungry(p: &mut [u64; 16]) {
            let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h, mut i, mut j, mut k, ..] =
                *p;
            let mut n = p[15];
            while n != 0 {
                let flags = ops::save();
                ops::quiet();
                a = a.wrapping_add(b) ^ flags as u64;
                b ^= c;
                c = c.wrapping_add(d);
                d ^= e;
                e = e.wrapping_add(f);
                f ^= g;
                g = g.wrapping_add(h);
                h ^= i;
                i = i.wrapping_add(j);
                j ^= k;
                k = k.wrapping_add(a);
                n -= 1;
            }
            *p = [a, b, c, d, e, f, g, h, i, j, k, 0, 0, 0, 0, 0];
        }

        /// A ring push under a critical section: the typical caller.
        #[inline(never)]
        pub(crate) extern "sysv64" fn typical(ring: &mut [u64; 16]) {
            let mut n = ring[15];
            let mut head = 0usize;
            while n != 0 {
                let flags = ops::save();
                ops::quiet();
                ring[head & 7] = n;
                head = head.wrapping_add(1);
                n -= 1;
                core::hint::black_box(flags);
            }
        }

        /// One op, nothing else.
        #[inline(never)]
        pub(crate) extern "sysv64" fn bare(n: &mut [u64; 16]) {
            let mut left = n[15];
            while left != 0 {
                core::hint::black_box(ops::save());
                left -= 1;
            }
        }
    };
}

/// Thousands of sites, each run once a round.
macro_rules! cold {
    () => {
        #[inline(never)]
        pub(crate) extern "sysv64" fn cold(p: &mut [u64; 16]) {
            macro_rules! x16 {
                                                ($e:block) => {{
                                                    $e $e $e $e $e $e $e $e $e $e $e $e $e $e $e $e
                                                }};
                                            }
            macro_rules! x256 {
                () => {
                    x16!({
                        x16!({
                            ops::quiet();
                            p[0] = p[0].wrapping_add(1);
                        })
                    })
                };
            }
            macro_rules! x4096 {
                () => {
                    x16!({ x256!() })
                };
            }
            x4096!();
        }
    };
}

macro_rules! style {
    ($name:ident, $kind:ident, $save:expr, $restore:expr, $quiet:expr) => {
        pub(crate) mod $name {
            pvops::family! {
                pub(crate) mod ops {
                    $kind fn save() -> usize = $save;
                    $kind fn restore(flags: usize) = $restore;
                    $kind fn quiet() = $quiet;
                }
            }
            callers!();
            hungry!();
            cold!();
        }
    };
}

style!(
    plain,
    plain,
    pvops::Binding::call(crate::styles::PLAIN.0),
    pvops::Binding::call(crate::styles::PLAIN.1),
    pvops::Binding::call(crate::styles::PLAIN.2)
);
style!(
    thunk,
    callee_save,
    pvops::Binding::call(crate::styles::WRAPPED.0),
    pvops::Binding::call(crate::styles::WRAPPED.1),
    pvops::Binding::call(crate::styles::WRAPPED.2)
);
style!(
    assembler,
    callee_save,
    pvops::Binding::call(crate::styles::ASM.0),
    pvops::Binding::call(crate::styles::ASM.1),
    pvops::Binding::call(crate::styles::ASM.2)
);
style!(
    direct,
    callee_save,
    pvops::Binding::call(crate::styles::ASM.0),
    pvops::Binding::call(crate::styles::ASM.1),
    pvops::Binding::call(crate::styles::ASM.2)
);
style!(
    direct_thunk,
    callee_save,
    pvops::Binding::call(crate::styles::WRAPPED.0),
    pvops::Binding::call(crate::styles::WRAPPED.1),
    pvops::Binding::call(crate::styles::WRAPPED.2)
);
style!(
    patched,
    callee_save,
    crate::styles::INLINE.0,
    crate::styles::INLINE.1,
    crate::styles::INLINE.2
);

pub(crate) const PLAIN: (Plain<Save>, Plain<Restore>, Plain<Quiet>) =
    (Plain::new(save_c), Plain::new(restore_c), Plain::new(quiet_c));
pub(crate) const WRAPPED: (CalleeSave<Save>, CalleeSave<Restore>, CalleeSave<Quiet>) =
    (save_wrapped::CALLEE_SAVE, restore_wrapped::CALLEE_SAVE, quiet_wrapped::CALLEE_SAVE);
pub(crate) const ASM: (CalleeSave<Save>, CalleeSave<Restore>, CalleeSave<Quiet>) =
    (SAVE_ASM, RESTORE_ASM, QUIET_ASM);
type Inline = (Binding<CalleeSave<Save>>, Binding<CalleeSave<Restore>>, Binding<CalleeSave<Quiet>>);
pub(crate) const INLINE: Inline = (SAVE_INLINE, RESTORE_INLINE, QUIET_INLINE);

/// The floor: the instructions themselves, no table at all.
pub(crate) mod native {
    mod ops {
        use core::arch::asm;
        #[inline(always)]
        pub(super) fn save() -> usize {
            let flags;
            // SAFETY: reads the flags.
            unsafe { asm!("pushfq", "pop {}", out(reg) flags) };
            flags
        }
        #[inline(always)]
        pub(super) fn restore(flags: usize) {
            // SAFETY: flags that were read before.
            unsafe { asm!("push {}", "popfq", in(reg) flags) };
        }
        #[inline(always)]
        pub(super) fn quiet() {
            // SAFETY: the direction flag is clear anyway.
            unsafe { asm!("cld") };
        }
    }
    callers!();
    hungry!();
    cold!();
}

/// A caller: what it changes lies in the array; its last word is the number of rounds.
pub(crate) type Caller = extern "sysv64" fn(&mut [u64; 16]);

/// One style's callers.
pub(crate) struct Style {
    pub(crate) name: &'static str,
    pub(crate) corpus: [(&'static str, Caller); 21],
    pub(crate) hungry: Caller,
    pub(crate) typical: Caller,
    pub(crate) bare: Caller,
    pub(crate) cold: Caller,
}

macro_rules! collect {
    ($($title:literal $name:ident),* $(,)?) => {
        pub(crate) const STYLES: &[Style] = &[$(Style {
            name: $title,
            corpus: collect!(@corpus $name: one_0 two_0 three_0 one_2 two_2 three_2 one_4 two_4
                three_4 one_6 two_6 three_6 one_8 two_8 three_8 one_10 two_10 three_10 one_12
                two_12 three_12),
            hungry: $name::hungry,
            typical: $name::typical,
            bare: $name::bare,
            cold: $name::cold,
        }),*];
    };
    (@corpus $name:ident: $($f:ident)*) => { [$((stringify!($f), $name::$f as Caller)),*] };
}

collect! {
    "native inline" native,
    "plain C through table" plain,
    "callee-save thunk" thunk,
    "callee-save assembler" assembler,
    "patched direct, thunk" direct_thunk,
    "patched direct, assembler" direct,
    "patched inline" patched,
}
