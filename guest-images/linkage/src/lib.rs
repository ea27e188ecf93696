//! What a guest's build script needs to say to the linker.
//!
//! A guest is an ordinary binary for the host's own target. The arguments printed here drop
//! the C runtime and lay the program out by `guest.ld`, which pins the addresses that `rt`'s
//! entry code, descriptor tables and page tables rely on.

use std::path::Path;

/// Arguments that turn a hosted binary into a freestanding one.
const ARGUMENTS: [&str; 9] = [
    "-nostartfiles",
    "-nostdlib",
    "-static",
    "-no-pie",
    "-Wl,--build-id=none",
    "-Wl,-z,max-page-size=4096",
    "-Wl,-z,noexecstack",
    "-Wl,-z,norelro",
    "-Wl,--gc-sections",
];

/// Prints the link arguments for every binary of the package whose build script calls this.
pub fn emit() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest.ld");
    println!("cargo:rerun-if-changed={}", script.display());
    println!("cargo:rustc-link-arg-bins=-Wl,-T,{}", script.display());
    for argument in ARGUMENTS {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
}
