//! The rows by name, and what is demanded of them.

use std::fmt;

use clap::builder::PossibleValue;

/// What has to be on the machine, and how many CPUs a guest has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Needs {
    /// The static program and one CPU.
    Nothing,
    /// Two CPUs.
    TwoCpus,
    /// Programs of Debian's.
    Debian,
}

impl fmt::Display for Needs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nothing => "static program",
            Self::TwoCpus => "two CPUs",
            Self::Debian => "Debian's programs",
        })
    }
}

/// What a row may take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Bar {
    /// So many times the host's own value.
    Host(f64),
    /// So much in the row's unit.
    Most(f64),
    /// At least so much in the row's unit, of which more is better.
    Least(f64),
    /// Whatever it takes.
    None,
}

/// Every row is to be so many times as fast as with QEMU's TCG, and their geometric mean.
pub(super) const QEMU: f64 = 1.5;
pub(super) const QEMU_MEAN: f64 = 4.0;

/// Integer and floating-point code; vector code; the kernel's work for processes.
const COMPUTE: Bar = Bar::Host(2.0);
const VECTOR: Bar = Bar::Host(1.3);
const KERNEL: Bar = Bar::Host(2.0);

/// A row of the comparison, as `guests/rows` calls it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Row {
    pub(super) name: &'static str,
    pub(super) needs: Needs,
    pub(super) bar: Bar,
}

const fn row(name: &'static str, bar: Bar) -> Row {
    Row { name, needs: Needs::Nothing, bar }
}

const fn debian(name: &'static str) -> Row {
    Row { name, needs: Needs::Debian, bar: Bar::None }
}

/// All of them, in the order of the table.
pub(super) const ROWS: [Row; 26] = [
    row("getppid", Bar::Most(400.0)),
    row("fnv", COMPUTE),
    row("shell-sort", COMPUTE),
    row("square-roots", COMPUTE),
    row("mandelbrot", VECTOR),
    row("matrix-product", VECTOR),
    row("aes-128-ctr-64-MiB", VECTOR),
    row("sha-256-64-MiB", VECTOR),
    row("copy-256-MiB", Bar::None),
    row("lua", COMPUTE),
    row("gzip-16-MiB", COMPUTE),
    row("zstd-64-MiB", COMPUTE),
    row("sqlite-insert", Bar::None),
    row("page-fault", KERNEL),
    row("mmap-munmap", Bar::None),
    row("signal", Bar::None),
    row("create-unlink", Bar::None),
    row("futex-switch", Bar::None),
    row("pipe-round-trip", KERNEL),
    row("fork", KERNEL),
    row("fork-exec", KERNEL),
    debian("gcc"),
    debian("luajit"),
    debian("node"),
    debian("python"),
    Row { name: "two-loops", needs: Needs::TwoCpus, bar: Bar::Least(1.8) },
];

impl clap::ValueEnum for Row {
    fn value_variants<'a>() -> &'a [Self] {
        &ROWS
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.name))
    }
}
