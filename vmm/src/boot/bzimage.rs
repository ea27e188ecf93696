//! bzImage kernels: Linux's x86 boot protocol, 64-bit entry (Documentation/arch/x86/boot.rst).

use vm_memory::GuestMemoryBackend;

use super::BootError;
use super::elf::check_in_ram;
use super::image::{Image, number};
use super::layout::{KERNEL_START_MIN, Span};

/// First byte of the setup header, in the file and in the zero page.
pub(super) const SETUP_HEADER: usize = 0x1f1;
/// Longest setup header: it ends at the latest where the zero page's next field begins.
const SETUP_HEADER_END_MAX: usize = 0x290;
/// Least protocol version: 2.12 brought `xloadflags`, which tells whether there is a 64-bit entry.
const VERSION_MIN: u64 = 0x20c;
/// `xloadflags`: the kernel has the 64-bit entry.
const XLF_KERNEL_64: u64 = 1;
/// Distance of the 64-bit entry from the loaded kernel.
const ENTRY64_OFFSET: u64 = 0x200;
/// Bytes of a sector, in which the setup code is counted.
const SECTOR: u64 = 512;
/// Unit of `syssize`.
const PARAGRAPH: u64 = 16;

/// A bzImage that passed the checks that need no guest memory.
#[derive(Debug)]
pub(super) struct BzImage {
    /// The setup header as it goes into the zero page at [`SETUP_HEADER`].
    pub(super) header: Vec<u8>,
    payload_offset: u64,
    payload_length: u64,
    memory: Span,
}

impl BzImage {
    /// Checks the setup header.
    pub(super) fn parse(image: &Image<'_>, head: &[u8]) -> Result<Self, BootError> {
        // The byte after the jump instruction tells where the header ends.
        let header_end = 0x202 + number::<1>(head, 0x201) as usize;
        let version = number::<2>(head, 0x206);
        if version < VERSION_MIN {
            return Err(damaged(
                "the boot protocol version",
                version,
                "0x20c (2.12) or newer",
            ));
        }
        if !(0x268..=SETUP_HEADER_END_MAX).contains(&header_end) {
            return Err(damaged(
                "the end of the setup header",
                header_end as u64,
                "0x268 to 0x290",
            ));
        }
        image.check_contains("its setup header", 0, header_end as u64)?;
        if number::<2>(head, 0x236) & XLF_KERNEL_64 == 0 {
            return Err(BootError::ProtocolUnavailable {
                wanted: "Linux 64-bit",
                why: "it is a 32-bit kernel (xloadflags lacks XLF_KERNEL_64)",
            });
        }
        let (payload_offset, payload_length) = payload(image, head)?;
        let memory = placement(head, payload_length)?;
        let header = head[SETUP_HEADER..header_end].to_vec();
        Ok(Self {
            header,
            payload_offset,
            payload_length,
            memory,
        })
    }

    /// Highest address that the initial RAM disk may occupy.
    pub(super) fn initrd_address_max(&self) -> u64 {
        number::<4>(&self.header, 0x22c - SETUP_HEADER)
    }

    /// Longest command line that the kernel takes, without the NUL.
    pub(super) fn cmdline_max(&self) -> usize {
        number::<4>(&self.header, 0x238 - SETUP_HEADER) as usize
    }

    /// Guest-physical address of the 64-bit entry.
    pub(super) fn entry64(&self) -> u64 {
        self.memory.start + ENTRY64_OFFSET
    }

    /// Loads the kernel and returns what it needs until it has set up its own memory management.
    pub(super) fn load<M: GuestMemoryBackend>(
        &self,
        image: &mut Image<'_>,
        mem: &M,
        low_ram: Span,
    ) -> Result<Span, BootError> {
        check_in_ram(self.memory, low_ram)?;
        image.load(
            mem,
            self.payload_offset,
            self.memory.start,
            self.payload_length,
        )?;
        Ok(self.memory)
    }
}

fn damaged(what: &'static str, value: u64, allowed: &'static str) -> BootError {
    BootError::KernelDamaged {
        what,
        value,
        allowed,
    }
}

/// Offset and length of the protected-mode kernel in the file.
fn payload(image: &Image<'_>, head: &[u8]) -> Result<(u64, u64), BootError> {
    // Zero means four, for historical reasons.
    let sectors = match number::<1>(head, SETUP_HEADER) {
        0 => 4,
        n => n,
    };
    let offset = (sectors + 1) * SECTOR;
    let length = number::<4>(head, 0x1f4) * PARAGRAPH;
    if length <= ENTRY64_OFFSET {
        return Err(damaged("the size of the kernel", length, "more than 0x200"));
    }
    // syssize is rounded up and some kernels are not padded.
    image.check_contains(
        "its protected-mode kernel",
        offset,
        length - (PARAGRAPH - 1),
    )?;
    Ok((offset, length.min(image.length() - offset)))
}

/// Where the kernel is loaded, and the memory that it works in there.
fn placement(head: &[u8], payload_length: u64) -> Result<Span, BootError> {
    let relocatable = number::<1>(head, 0x234) != 0;
    let start = if relocatable {
        number::<8>(head, 0x258)
    } else {
        KERNEL_START_MIN
    };
    // The decompressor's identity map is that of the boot page tables.
    if start >= super::layout::HIGH_RAM_START {
        return Err(damaged(
            "the preferred load address",
            start,
            "less than 4 GiB",
        ));
    }
    let length = number::<4>(head, 0x260).max(payload_length);
    Span::new(start, length)
        .ok_or_else(|| damaged("the preferred load address", start, "less than 4 GiB"))
}
