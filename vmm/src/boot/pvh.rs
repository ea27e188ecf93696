//! The PVH hand-over: `hvm_start_info` (xen/include/public/arch-x86/hvm/start_info.h), version 1.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::layout::{CMDLINE_START, PVH_INFO_START, Span, ZERO_PAGE_START, memory_map};
use super::{BootError, acpi};

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
const INFO_LEN: u64 = 56;
const MODULE_LEN: u64 = 32;

/// Writes `hvm_start_info`, then the module list, then the memory map to [`PVH_INFO_START`].
pub(super) fn write<M: GuestMemoryBackend>(
    mem: &M,
    initrd: Option<Span>,
    ram: &[Span],
) -> Result<(), BootError> {
    let bytes = encode(initrd, ram, acpi::root(mem));
    let wanted = Span {
        start: PVH_INFO_START,
        end: PVH_INFO_START + bytes.len() as u64,
    };
    let error = BootError::NoRoom {
        wanted,
        what: "the PVH start information",
    };
    // At most 7 map entries of 24 bytes follow 88 bytes.
    if wanted.end > ZERO_PAGE_START {
        return Err(error);
    }
    mem.write_slice(&bytes, GuestAddress(PVH_INFO_START))
        .map_err(|_| error)
}

fn encode(initrd: Option<Span>, ram: &[Span], rsdp: u64) -> Vec<u8> {
    let map = memory_map(ram);
    let modules_at = PVH_INFO_START + INFO_LEN;
    let map_at = modules_at + MODULE_LEN;
    let mut bytes = Vec::with_capacity(512);
    for word in [MAGIC, VERSION, 0, u32::from(initrd.is_some())] {
        bytes.extend(word.to_le_bytes());
    }
    let modules = if initrd.is_some() { modules_at } else { 0 };
    for address in [modules, CMDLINE_START, rsdp, map_at] {
        bytes.extend(address.to_le_bytes());
    }
    bytes.extend((map.len() as u32).to_le_bytes());
    bytes.extend([0; 4]);
    let (start, length) = initrd.map_or((0, 0), |s| (s.start, s.len()));
    for field in [start, length, 0, 0] {
        bytes.extend(field.to_le_bytes());
    }
    for (span, kind) in map {
        bytes.extend(span.start.to_le_bytes());
        bytes.extend(span.len().to_le_bytes());
        bytes.extend((kind as u32).to_le_bytes());
        bytes.extend([0; 4]);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::super::layout::ram_spans;
    use super::*;

    fn word(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn fields_are_where_the_interface_says() {
        let bytes = encode(
            Some(Span {
                start: 0x700_0000,
                end: 0x700_0010,
            }),
            &ram_spans(64 << 20),
            0xe_0000,
        );
        assert_eq!(bytes[0..4], MAGIC.to_le_bytes());
        assert_eq!(bytes[12], 1);
        assert_eq!(word(&bytes, 16), 0x6038);
        assert_eq!(word(&bytes, 24), CMDLINE_START);
        assert_eq!(word(&bytes, 32), 0xe_0000);
        assert_eq!(word(&bytes, 40), 0x6058);
        assert_eq!(bytes[48], 5);
        assert_eq!((word(&bytes, 56), word(&bytes, 64)), (0x700_0000, 0x10));
        assert_eq!(
            (word(&bytes, 88), word(&bytes, 96), bytes[104]),
            (0, 0x9_fc00, 1)
        );
        assert_eq!(bytes.len(), 88 + 5 * 24);
    }

    #[test]
    fn without_initrd_there_is_no_module() {
        let bytes = encode(None, &ram_spans(64 << 20), 0);
        assert_eq!(bytes[12], 0);
        assert_eq!(word(&bytes, 16), 0);
    }
}
