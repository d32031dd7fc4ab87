//! Kernel tests: a kernel that runs them reports by its exit status.
//!
//! ```text
//! kernel_test!(memory_is_zeroed, || { assert_eq!(...); });
//!
//! if boot.has_word("test") {
//!     lguest_guest::test::run(boot);
//! }
//! ```
//!
//! A test passes by returning. One that panics is a panic of the kernel: its words are
//! lguest's last line, and the exit status is 3. After the last test the kernel ends, with 0.
//! With `test=NAME` on the command line only the tests run whose names contain that.
//!
//! So `lguest run --append test --kernel` is a runner for cargo:
//! `target.x86_64-unknown-linux-gnu.runner = "lguest run --append test --kernel"`.

use crate::{Boot, power, println};

/// One test.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Test {
    /// Its name.
    pub name: &'static str,
    /// What it does; it panics to fail.
    pub body: fn(),
}

/// Registers a test: a name, and a function without arguments.
#[macro_export]
macro_rules! kernel_test {
    ($name:ident, $body:expr) => {
        const _: () = {
            #[used]
            #[unsafe(link_section = "kernel_tests")]
            static TEST: $crate::test::Test =
                $crate::test::Test { name: stringify!($name), body: $body };
        };
    };
}

unsafe extern "C" {
    static kernel_tests_start: u8;
    static kernel_tests_end: u8;
}

/// All tests of this kernel.
pub fn all() -> &'static [Test] {
    let (start, end) = (&raw const kernel_tests_start, &raw const kernel_tests_end);
    let count = (end.addr() - start.addr()) / size_of::<Test>();
    // SAFETY: the linker script puts the symbols around the section, which has nothing else.
    unsafe { core::slice::from_raw_parts(start.cast(), count) }
}

/// Runs them, and ends.
pub fn run(boot: &Boot) -> ! {
    let wanted = boot.command_line.split_whitespace().find_map(|word| word.strip_prefix("test="));
    let mut passed = 0;
    for test in all().iter().filter(|test| wanted.is_none_or(|part| test.name.contains(part))) {
        println!("test {} ...", test.name);
        (test.body)();
        passed += 1;
    }
    println!("test result: ok. {passed} passed");
    power::exit(if passed == 0 { 1 } else { 0 })
}
