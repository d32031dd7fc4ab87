use pvops::{CalleeSave, callee_save};

#[callee_save]
fn one() -> usize {
    1
}

fn main() {
    let pointer: CalleeSave<extern "sysv64" fn() -> usize> = one::CALLEE_SAVE;
    pointer();
}
