//! Kernel images, initial RAM disks and command lines.

use std::fs::File;
use std::io::Write;

use rustix::fs::{MemfdFlags, memfd_create};
use tandem_vmm::boot::layout::Span;
use tandem_vmm::boot::{BootSources, Entry, Loaded, load_kernel, write_tables};
use tandem_vmm::config::BootProtocol;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::input::Input;

/// Guest memory: enough for what kernels in the corpus ask for.
const RAM: u64 = 32 << 20;
/// Length to which an image is extended by zeros on request.
const EXTENDED: u64 = 24 << 20;
/// Bits of the first byte: extend the image, have an initial RAM disk, describe the machine. The two
/// lowest are the protocol.
const EXTEND: u8 = 1 << 2;
const INITRD: u8 = 1 << 3;
const TABLES: u8 = 1 << 4;

/// An input: flags, length and text of the command line, length of the RAM disk in units of 256
/// bytes, the image.
pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let flags = input.u8();
    let cmdline = String::from_utf8_lossy(input.short()).into_owned();
    let initrd = vec![7; usize::from(input.u16()) * 256];
    let mut kernel = file(input.rest());
    if flags & EXTEND != 0 {
        kernel.set_len(EXTENDED).expect("extended");
    }
    let mut initrd = (flags & INITRD != 0).then(|| file(&initrd));
    let ram = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), RAM as usize)]);
    let ram = ram.expect("memory");
    if flags & TABLES != 0 {
        write_tables(&ram, 1, &[]).expect("tables");
    }
    let sources = BootSources {
        kernel: &mut kernel,
        initrd: initrd.as_mut(),
        cmdline: &cmdline,
        protocol: [
            BootProtocol::Auto,
            BootProtocol::Pvh,
            BootProtocol::Linux64,
            BootProtocol::Auto,
        ][usize::from(flags & 3)],
    };
    match load_kernel(&ram, sources) {
        Ok(loaded) => check(&loaded),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fn file(bytes: &[u8]) -> File {
    let memory = memfd_create("image", MemfdFlags::CLOEXEC).expect("a file in memory");
    let mut file = File::from(memory);
    file.write_all(bytes).expect("written");
    file
}

/// What was loaded lies in memory, apart, and is entered inside.
fn check(loaded: &Loaded) {
    let inside = |span: Span| span.start < span.end && span.end <= RAM;
    let kernel = loaded.kernel;
    assert!(inside(kernel) && kernel.start >= 1 << 20, "{loaded:?}");
    if let Some(initrd) = loaded.initrd {
        assert!(inside(initrd) && initrd.start >= kernel.end, "{loaded:?}");
    }
    let entry = match loaded.entry {
        Entry::Pvh(entry) => entry.into(),
        Entry::Linux64(entry) => entry,
    };
    assert!((kernel.start..kernel.end).contains(&entry), "{loaded:?}");
}
