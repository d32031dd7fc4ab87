#[pvops::callee_save]
fn float(a: f64) -> usize {
    a as usize
}

pvops::family! {
    mod wide {
        callee_save fn wide(a: u128);
    }
}

fn main() {}
