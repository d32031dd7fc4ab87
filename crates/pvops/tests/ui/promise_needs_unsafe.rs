use pvops::CalleeSave;

extern "sysv64" fn compiled() -> usize {
    1
}

fn main() {
    let _ = CalleeSave::promise(compiled as extern "sysv64" fn() -> usize);
}
