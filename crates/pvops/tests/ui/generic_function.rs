#[pvops::callee_save]
fn generic<T: Copy>(a: T) {}

fn main() {}
