//! The filters as data, as programs, and in processes of their own that break them.

use super::*;

mod bpf;
mod processes;
mod programs;

/// Everything a run can need.
fn everything() -> Needs {
    Needs { disk: true, tap: true, unix: true, children: vec![4_000_001, 4_000_002] }
}
