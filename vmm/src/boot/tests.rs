use std::fs::File;
use std::io::Write;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::layout::{CMDLINE_START, PVH_INFO_START, ZERO_PAGE_START};
use super::*;

const MIB: u64 = 1 << 20;
const RAM: u64 = 32 * MIB;
/// Offset of the program headers and of the segment in [`elf`].
const PHDRS: usize = 64;
const PAYLOAD: usize = 0x200;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap()
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

fn put64(image: &mut [u8], at: usize, value: u64) {
    put(image, at, &value.to_le_bytes());
}

/// An executable with one segment at 1 MiB, entry 16 bytes into it, and optionally a PVH note.
fn elf(pvh_entry: Option<u32>) -> Vec<u8> {
    let mut image = vec![0; PAYLOAD + 0x100];
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    put(&mut image, 16, &[2, 0, 62, 0, 1]);
    put64(&mut image, 24, MIB + 16);
    put64(&mut image, 32, PHDRS as u64);
    put(&mut image, 54, &[56, 0, 2, 0]);
    program_header(&mut image, 0, 1, PAYLOAD as u64, 0x100, 0x3000);
    if let Some(entry) = pvh_entry {
        program_header(&mut image, 1, 4, 0x100, 20, 20);
        put(&mut image, 0x100, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
        put(&mut image, 0x10c, b"Xen\0");
        put(&mut image, 0x110, &entry.to_le_bytes());
    }
    image[PAYLOAD..].fill(0x90);
    image
}

fn program_header(image: &mut [u8], number: usize, kind: u8, offset: u64, file: u64, mem: u64) {
    let at = PHDRS + number * 56;
    image[at] = kind;
    put64(image, at + 8, offset);
    put64(image, at + 24, MIB);
    put64(image, at + 32, file);
    put64(image, at + 40, mem);
}

/// A bzImage with one setup sector and a kernel of 1 KiB that prefers 16 MiB.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 0x400 + 0x400];
    image[0x1f1] = 1;
    put(&mut image, 0x1f4, &(0x400u32 / 16).to_le_bytes());
    put(&mut image, 0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(&mut image, 0x202, b"HdrS\x0f\x02");
    image[0x211] = 1;
    put(&mut image, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    image[0x234] = 1;
    put(&mut image, 0x236, &[0x7f, 0]);
    put(&mut image, 0x238, &255u32.to_le_bytes());
    put64(&mut image, 0x258, 16 * MIB);
    put(&mut image, 0x260, &0x10_0000u32.to_le_bytes());
    image[0x400..].fill(0xcc);
    image
}

fn load(
    mem: &GuestMemoryMmap,
    kernel: &[u8],
    initrd: Option<&[u8]>,
    cmdline: &str,
    protocol: BootProtocol,
) -> Result<Loaded, BootError> {
    let mut kernel = file(kernel);
    let mut initrd = initrd.map(file);
    let (kernel, initrd) = (&mut kernel, initrd.as_mut());
    load_kernel(
        mem,
        BootSources {
            kernel,
            initrd,
            cmdline,
            protocol,
        },
    )
}

fn load_auto(kernel: &[u8]) -> Result<Loaded, BootError> {
    load(&memory(), kernel, None, "", BootProtocol::Auto)
}

fn message(kernel: &[u8]) -> String {
    load_auto(kernel).unwrap_err().to_string()
}

#[test]
fn pvh_is_preferred_where_the_note_is() {
    let pvh = elf(Some(0x10_0020));
    let loaded = load_auto(&pvh).unwrap();
    assert_eq!(loaded.entry, Entry::Pvh(0x10_0020));
    let loaded = load(&memory(), &pvh, None, "", BootProtocol::Linux64).unwrap();
    assert_eq!(loaded.entry, Entry::Linux64(0x10_0010));
    assert_eq!(
        load_auto(&elf(None)).unwrap().entry,
        Entry::Linux64(0x10_0010)
    );
}

#[test]
fn protocols_that_do_not_fit_are_refused() {
    for image in [elf(None), bzimage()] {
        let err = load(&memory(), &image, None, "", BootProtocol::Pvh).unwrap_err();
        assert!(
            matches!(err, BootError::ProtocolUnavailable { wanted: "PVH", .. }),
            "{err}"
        );
    }
}

#[test]
fn everything_arrives_in_memory() {
    let mem = memory();
    write_tables(&mem, 1, &[]).unwrap();
    let initrd = [7; 5000];
    let kernel = elf(Some(0x10_0000));
    let loaded = load(&mem, &kernel, Some(&initrd), "a=b", BootProtocol::Auto).unwrap();
    assert_eq!(
        loaded.kernel,
        Span {
            start: MIB,
            end: MIB + 0x3000
        }
    );
    let at = loaded.initrd.unwrap();
    assert_eq!(
        at,
        Span {
            start: RAM - 8192,
            end: RAM - 8192 + 5000
        }
    );
    let mut bytes = [0; 5001];
    mem.read_slice(&mut bytes, GuestAddress(at.start)).unwrap();
    assert!(bytes[..5000] == initrd && bytes[5000] == 0);
    let mut bytes = [0; 0x101];
    mem.read_slice(&mut bytes, GuestAddress(MIB)).unwrap();
    assert!(bytes[..0x100] == [0x90; 0x100] && bytes[0x100] == 0);
    let cmdline: [u8; 4] = mem.read_obj(GuestAddress(CMDLINE_START)).unwrap();
    assert_eq!(&cmdline, b"a=b\0");
    let rsdp: u64 = mem.read_obj(GuestAddress(PVH_INFO_START + 32)).unwrap();
    assert_eq!(rsdp, layout::ACPI_START);
}

#[test]
fn without_acpi_tables_none_are_announced() {
    for (protocol, at) in [
        (BootProtocol::Pvh, PVH_INFO_START + 32),
        (BootProtocol::Linux64, ZERO_PAGE_START + 0x70),
    ] {
        let mem = memory();
        write_mp_table(&mem, 1).unwrap();
        load(&mem, &elf(Some(0x10_0000)), None, "", protocol).unwrap();
        let rsdp: u64 = mem.read_obj(GuestAddress(at)).unwrap();
        assert_eq!(rsdp, 0);
    }
}

#[test]
fn bzimage_goes_where_it_prefers() {
    let mem = memory();
    let loaded = load(&mem, &bzimage(), None, "quiet", BootProtocol::Auto).unwrap();
    assert_eq!(loaded.entry, Entry::Linux64(16 * MIB + 0x200));
    assert_eq!(
        loaded.kernel,
        Span {
            start: 16 * MIB,
            end: 17 * MIB
        }
    );
    assert_eq!(
        mem.read_obj::<u8>(GuestAddress(16 * MIB + 0x3ff)).unwrap(),
        0xcc
    );
    let magic: u32 = mem.read_obj(GuestAddress(ZERO_PAGE_START + 0x202)).unwrap();
    assert_eq!(magic, u32::from_le_bytes(*b"HdrS"));
}

#[test]
fn bzimage_that_cannot_move_goes_to_1_mib() {
    let mut image = bzimage();
    image[0x234] = 0;
    assert_eq!(
        load_auto(&image).unwrap().entry,
        Entry::Linux64(MIB + 0x200)
    );
}

#[test]
fn the_kernels_own_limit_of_the_command_line_counts() {
    let cmdline = "x".repeat(256);
    let err = load(&memory(), &bzimage(), None, &cmdline, BootProtocol::Auto).unwrap_err();
    assert!(
        matches!(
            err,
            BootError::CmdlineTooLong {
                length: 256,
                max: 255
            }
        ),
        "{err}"
    );
    assert!(load(&memory(), &elf(None), None, &cmdline, BootProtocol::Auto).is_ok());
}

#[test]
fn truncated_images_are_named() {
    let image = elf(None);
    assert!(message(&image[..60]).contains("its ELF header takes bytes 0x0 to 0x40"));
    assert!(message(&image[..100]).contains("its ELF program headers"));
    assert!(message(&image[..0x280]).contains("an ELF segment takes bytes 0x200 to 0x300"));
    let image = bzimage();
    assert!(message(&image[..0x260]).contains("its setup header"));
    assert!(message(&image[..0x700]).contains("its protected-mode kernel"));
    // The last paragraph need not be complete.
    assert!(load_auto(&image[..0x800 - 15]).is_ok());
}

#[test]
fn other_processors_are_named() {
    let mut image = elf(None);
    image[18] = 183;
    assert!(message(&image).contains("the ELF machine is 0xb7, and allowed is 0x3e (x86-64)"));
    let mut image = bzimage();
    image[0x236] = 0;
    assert!(message(&image).contains("32-bit kernel"));
    let mut image = bzimage();
    image[0x206] = 0x0a;
    assert!(message(&image).contains("boot protocol version is 0x20a"));
}

#[test]
fn segments_must_lie_in_ram_apart_from_each_other() {
    let mut image = elf(None);
    for (at, text) in [
        (0x8000, "may use 0x100000..0x2000000"),
        (RAM - 0x2000, "0x1ffe000..0x2001000"),
    ] {
        put64(&mut image, 24, at);
        put64(&mut image, PHDRS + 24, at);
        assert!(message(&image).contains(text));
    }
    put64(&mut image, PHDRS + 24, u64::MAX - 1);
    assert!(message(&image).contains("address of a segment"));
    let mut image = elf(None);
    program_header(&mut image, 1, 1, PAYLOAD as u64, 1, 1);
    assert!(message(&image).contains("overlap"));
}

#[test]
fn entries_must_lie_in_the_image() {
    let mut image = elf(None);
    put64(&mut image, 24, MIB + 0x3000);
    assert!(message(&image).contains("entry point 0x103000"));
    assert!(message(&elf(Some(0x1000))).contains("entry point 0x1000"));
}

#[test]
fn a_small_guest_has_no_room_for_the_initrd() {
    let initrd = vec![1; (RAM - MIB) as usize];
    let err = load(&memory(), &elf(None), Some(&initrd), "", BootProtocol::Auto).unwrap_err();
    assert!(
        matches!(
            err,
            BootError::InitrdTooBig {
                room: 0x1ef_d000,
                ..
            }
        ),
        "{err}"
    );
}

#[test]
fn impossible_numbers_of_cpus_are_refused() {
    for cpus in [0, CPUS_MAX + 1] {
        let err = write_tables(&memory(), cpus, &[]).unwrap_err();
        assert!(err.to_string().contains("1 to 32"), "{err}");
    }
}

/// Overwrites a few bytes of a valid image's headers.
fn mutated(image: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let change = (0..PAYLOAD + 0x90, any::<u64>(), 1..=8usize);
    (
        Just(image),
        prop::collection::vec(change, 1..8),
        any::<u16>(),
    )
        .prop_map(|(mut image, changes, cut)| {
            for (at, value, length) in changes {
                let end = image.len().min(at + length);
                image[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
            }
            if cut % 4 == 0 {
                image.truncate(usize::from(cut) / 16);
            }
            image
        })
}

/// Loads an image that may be anything: it must not panic, and what it loads must lie in RAM.
fn check(image: &[u8]) -> Result<(), TestCaseError> {
    for protocol in [BootProtocol::Auto, BootProtocol::Linux64] {
        if let Ok(loaded) = load(&memory(), image, Some(&[1; 100]), "quiet", protocol) {
            prop_assert!(loaded.kernel.start >= MIB && loaded.kernel.end <= RAM);
            let initrd = loaded.initrd.unwrap();
            prop_assert!(initrd.start >= loaded.kernel.end && initrd.end <= RAM);
            let entry = match loaded.entry {
                Entry::Pvh(entry) => entry.into(),
                Entry::Linux64(entry) => entry,
            };
            prop_assert!(loaded.kernel.start <= entry && entry < loaded.kernel.end);
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn damaged_elf_images_are_errors_or_harmless(image in mutated(elf(Some(0x10_0000)))) {
        check(&image)?;
    }

    #[test]
    fn damaged_bzimages_are_errors_or_harmless(image in mutated(bzimage())) {
        check(&image)?;
    }

    #[test]
    fn noise_is_not_a_kernel(image in prop::collection::vec(any::<u8>(), 0..2000)) {
        check(&image)?;
    }
}
