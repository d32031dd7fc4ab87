use pvops::{Bindings, Patched, Unpatched};

pvops::family! {
    mod sums {
        callee_save fn step(a: u64) -> u64;
    }
}

fn late(mut family: Patched<sums::Family>, bindings: &Bindings<sums::Family>) {
    family.bind(bindings).unwrap();
}

fn main() {
    let _: fn(Unpatched<sums::Family>, &Bindings<sums::Family>);
    let _ = late;
}
