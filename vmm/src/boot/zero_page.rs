//! Linux's `boot_params`, the "zero page" (Documentation/arch/x86/zero-page.rst), by offsets.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::bzimage::SETUP_HEADER;
use super::cmdline::CMDLINE_LEN_MAX;
use super::layout::{CMDLINE_START, Span, ZERO_PAGE_START, memory_map};
use super::{BootError, acpi};

const PAGE: usize = 4096;
const ACPI_RSDP: usize = 0x70;
const E820_COUNT: usize = 0x1e8;
const BOOT_FLAG: usize = 0x1fe;
const HEADER_MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const LOADER_TYPE: usize = 0x210;
const LOAD_FLAGS: usize = 0x211;
const RAMDISK_ADDRESS: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const CMDLINE_POINTER: usize = 0x228;
const KERNEL_ALIGNMENT: usize = 0x230;
const CMDLINE_SIZE: usize = 0x238;
const E820_TABLE: usize = 0x2d0;
const E820_ENTRY: usize = 20;

/// Loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
/// `loadflags`: the protected-mode code is at 1 MiB or above.
const LOADED_HIGH: u8 = 1;

/// Writes the zero page; `header` is a bzImage's setup header, absent for an ELF kernel.
pub(super) fn write<M: GuestMemoryBackend>(
    mem: &M,
    header: Option<&[u8]>,
    initrd: Option<Span>,
    ram: &[Span],
) -> Result<(), BootError> {
    let mut page = vec![0u8; PAGE];
    match header {
        Some(bytes) => put(&mut page, SETUP_HEADER, bytes),
        None => put_default_header(&mut page),
    }
    page[LOADER_TYPE] = LOADER_UNDEFINED;
    page[LOAD_FLAGS] |= LOADED_HIGH;
    put(&mut page, ACPI_RSDP, &acpi::root(mem).to_le_bytes());
    put(
        &mut page,
        CMDLINE_POINTER,
        &(CMDLINE_START as u32).to_le_bytes(),
    );
    if let Some(span) = initrd {
        put(
            &mut page,
            RAMDISK_ADDRESS,
            &(span.start as u32).to_le_bytes(),
        );
        put(&mut page, RAMDISK_SIZE, &(span.len() as u32).to_le_bytes());
    }
    put_e820(&mut page, ram);
    mem.write_slice(&page, GuestAddress(ZERO_PAGE_START))
        .map_err(|_| BootError::NoRoom {
            wanted: Span {
                start: ZERO_PAGE_START,
                end: ZERO_PAGE_START + PAGE as u64,
            },
            what: "Linux's zero page",
        })
}

fn put(page: &mut [u8], offset: usize, bytes: &[u8]) {
    page[offset..offset + bytes.len()].copy_from_slice(bytes);
}

/// What an ELF image has no setup header for, and the kernel looks at nevertheless.
fn put_default_header(page: &mut [u8]) {
    put(page, BOOT_FLAG, &[0x55, 0xaa]);
    put(page, HEADER_MAGIC, b"HdrS");
    put(page, VERSION, &0x20fu16.to_le_bytes());
    put(page, KERNEL_ALIGNMENT, &0x100_0000u32.to_le_bytes());
    put(page, CMDLINE_SIZE, &(CMDLINE_LEN_MAX as u32).to_le_bytes());
}

fn put_e820(page: &mut [u8], ram: &[Span]) {
    let map = memory_map(ram);
    page[E820_COUNT] = map.len() as u8;
    for (i, (span, kind)) in map.into_iter().enumerate() {
        let at = E820_TABLE + i * E820_ENTRY;
        put(page, at, &span.start.to_le_bytes());
        put(page, at + 8, &span.len().to_le_bytes());
        put(page, at + 16, &(kind as u32).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::super::layout::ram_spans;
    use super::*;
    use vm_memory::GuestMemoryMmap;

    fn page(header: Option<&[u8]>, initrd: Option<Span>) -> Vec<u8> {
        let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write(&mem, header, initrd, &ram_spans(5 << 30)).unwrap();
        let mut page = vec![0; PAGE];
        mem.read_slice(&mut page, GuestAddress(ZERO_PAGE_START))
            .unwrap();
        page
    }

    #[test]
    fn elf_kernels_get_a_header() {
        let page = page(
            None,
            Some(Span {
                start: 0x7f0_0000,
                end: 0x7f0_1234,
            }),
        );
        assert_eq!(&page[0x1fe..0x200], [0x55, 0xaa]);
        assert_eq!(&page[0x202..0x206], b"HdrS");
        assert_eq!(&page[0x218..0x220], [0, 0, 0xf0, 7, 0x34, 0x12, 0, 0]);
        assert_eq!(&page[0x228..0x22c], [0, 0, 2, 0]);
        assert_eq!(page[0x1e8], 6);
        // The last entry is high RAM: 4 GiB, 2 GiB long, type 1.
        let last = &page[0x2d0 + 5 * 20..][..20];
        assert_eq!(
            last,
            [
                0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0x80, 0, 0, 0, 0, 1, 0, 0, 0
            ]
        );
    }

    #[test]
    fn setup_headers_are_kept_but_for_what_the_loader_fills_in() {
        let header = vec![0xaa; 0x268 - SETUP_HEADER];
        let page = page(Some(&header), None);
        assert_eq!(page[0x1f1], 0xaa);
        assert_eq!(page[0x267], 0xaa);
        assert_eq!(page[0x268], 0);
        assert_eq!(page[0x210], 0xff);
    }
}
