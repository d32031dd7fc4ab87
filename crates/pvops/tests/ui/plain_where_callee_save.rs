use pvops::{Binding, Bindings, Plain};

pvops::family! {
    mod sums {
        callee_save fn step(a: u64) -> u64;
    }
}

extern "sysv64" fn plain(a: u64) -> u64 {
    a
}

fn main() {
    let mut bindings = Bindings::<sums::Family>::new("wrong");
    let _ = bindings.bind(sums::op::Step, Binding::call(Plain::new(plain as extern "sysv64" fn(u64) -> u64)));
    let _ = bindings.bind(sums::op::Step, Binding::call(plain));
}
