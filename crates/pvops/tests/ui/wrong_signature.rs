use pvops::{Binding, Bindings, callee_save};

pvops::family! {
    mod sums {
        callee_save fn step(a: u64) -> u64;
    }
}

#[callee_save]
fn two(a: u64, b: u64) -> u64 {
    a + b
}

fn main() {
    let mut bindings = Bindings::<sums::Family>::new("wrong");
    let _ = bindings.bind(sums::op::Step, Binding::call(two::CALLEE_SAVE));
}
