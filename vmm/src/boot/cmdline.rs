//! The kernel command line: checked, completed with the virtio devices, written to guest memory.

use std::fmt::Write as _;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::BootError;
use super::layout::{CMDLINE_START, Span, VIRTIO_MMIO_SIZE, VirtioSlot};

/// Longest command line without the NUL: Linux's COMMAND_LINE_SIZE on x86 less one.
pub const CMDLINE_LEN_MAX: usize = 2047;

/// The parts that announce virtio devices to a kernel without ACPI, such as
/// `virtio_mmio.device=4K@0xd0000000:5`.
pub fn virtio_parts(slots: &[VirtioSlot]) -> String {
    const { assert!(VIRTIO_MMIO_SIZE == 4096) };
    let mut parts = String::new();
    for slot in slots {
        if !parts.is_empty() {
            parts.push(' ');
        }
        // Writing to a string cannot fail.
        let _ = write!(
            parts,
            "virtio_mmio.device=4K@{:#x}:{}",
            slot.address, slot.gsi
        );
    }
    parts
}

/// `cmdline` with the virtio devices added, unless it names some itself.
///
/// They go before a ` -- `, which separates what is for the kernel from what is for init. A kernel
/// that finds the devices by ACPI as well keeps what it found there.
pub fn with_virtio_devices(cmdline: &str, slots: &[VirtioSlot]) -> String {
    if slots.is_empty() || cmdline.contains("virtio_mmio.device=") {
        return cmdline.to_owned();
    }
    let parts = virtio_parts(slots);
    if cmdline.trim().is_empty() {
        return parts;
    }
    match cmdline.find(" -- ") {
        Some(at) => format!("{} {parts}{}", &cmdline[..at], &cmdline[at..]),
        None => format!("{cmdline} {parts}"),
    }
}

/// Checks length and characters; `max` is the kernel's own limit.
pub(super) fn check(cmdline: &str, max: usize) -> Result<(), BootError> {
    let max = max.min(CMDLINE_LEN_MAX);
    if cmdline.len() > max {
        return Err(BootError::CmdlineTooLong {
            length: cmdline.len(),
            max,
        });
    }
    for (byte, found) in [
        (0, "a NUL"),
        (b'\n', "a line feed"),
        (b'\r', "a carriage return"),
    ] {
        if let Some(offset) = cmdline.bytes().position(|b| b == byte) {
            return Err(BootError::CmdlineInvalid { found, offset });
        }
    }
    Ok(())
}

/// Writes a checked command line with its NUL to [`CMDLINE_START`].
pub(super) fn write<M: GuestMemoryBackend>(mem: &M, cmdline: &str) -> Result<(), BootError> {
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    mem.write_slice(&bytes, GuestAddress(CMDLINE_START))
        .map_err(|_| BootError::NoRoom {
            wanted: Span {
                start: CMDLINE_START,
                end: CMDLINE_START + bytes.len() as u64,
            },
            what: "the kernel command line",
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_once_and_before_the_separator() {
        let slots = VirtioSlot::first(2).unwrap();
        let parts = "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6";
        assert_eq!(virtio_parts(&slots), parts);
        assert_eq!(with_virtio_devices("", &slots), parts);
        assert_eq!(
            with_virtio_devices("quiet", &slots),
            format!("quiet {parts}")
        );
        assert_eq!(
            with_virtio_devices("quiet -- -x", &slots),
            format!("quiet {parts} -- -x")
        );
        assert_eq!(with_virtio_devices(parts, &slots), parts);
        assert_eq!(with_virtio_devices("quiet", &[]), "quiet");
    }

    #[test]
    fn length_and_characters_are_checked() {
        assert!(check(&"x".repeat(2047), usize::MAX).is_ok());
        let err = check(&"x".repeat(2048), usize::MAX).unwrap_err();
        assert!(err.to_string().contains("at most 2047"), "{err}");
        let err = check(&"x".repeat(256), 255).unwrap_err();
        assert!(err.to_string().contains("at most 255"), "{err}");
        let err = check("a\0b", 255).unwrap_err();
        assert!(err.to_string().contains("a NUL at byte 1"), "{err}");
    }
}
