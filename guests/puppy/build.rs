//! Links the kernel by the script that belongs to its library, and with nothing else.

fn main() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../crates/lguest-guest/kernel.ld");
    println!("cargo::rerun-if-changed={script}");
    let arguments = [
        "-nostdlib",
        "-nostartfiles",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,-z,max-page-size=4096",
    ];
    for argument in arguments {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
    println!("cargo::rustc-link-arg-bins=-Wl,-T,{script}");
}
