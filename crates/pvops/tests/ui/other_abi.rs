#[pvops::callee_save]
extern "win64" fn other(a: usize) -> usize {
    a
}

fn main() {}
