//! Why a guest cannot be booted.

use std::io;

use super::layout::Span;

/// Why a kernel, its initial RAM disk or the tables that describe the machine could not be put into
/// guest memory. The caller adds the path of the file.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel image is neither ELF nor bzImage.
    #[error(
        "the kernel image is not a kernel: it {found}, and allowed are an x86-64 ELF image (with a PVH note or a 64-bit Linux entry) and a bzImage"
    )]
    NotAKernel {
        /// What it looks like instead.
        found: String,
    },
    /// The image ends before what its headers announce.
    #[error(
        "the kernel image is truncated: {what} takes bytes {start:#x} to {end:#x}, and the file has {length:#x}"
    )]
    KernelTruncated {
        /// Part of the image.
        what: &'static str,
        /// First byte of the part in the file.
        start: u64,
        /// First byte after the part.
        end: u64,
        /// Bytes in the file.
        length: u64,
    },
    /// A header contradicts itself or the format.
    #[error("the kernel image is damaged: {what} is {value:#x}, and allowed is {allowed}")]
    KernelDamaged {
        /// Field of the header.
        what: &'static str,
        /// What the field holds.
        value: u64,
        /// What it may hold.
        allowed: &'static str,
    },
    /// Two segments of an ELF image cover the same addresses.
    #[error("the kernel image is damaged: its segments {first} and {second} overlap")]
    SegmentsOverlap {
        /// The one that starts first.
        first: Span,
        /// The other.
        second: Span,
    },
    /// A part of the kernel would lie outside usable RAM.
    #[error(
        "the kernel needs guest memory at {wanted}, and kernels may use {allowed} of this guest: give the guest more memory, or link the kernel elsewhere"
    )]
    KernelOutsideRam {
        /// Addresses that the kernel wants.
        wanted: Span,
        /// Addresses that it may use.
        allowed: Span,
    },
    /// The entry point is not in the image.
    #[error("the kernel image is damaged: its entry point {entry:#x} is in none of its segments")]
    EntryOutsideKernel {
        /// Guest-physical address of the entry.
        entry: u64,
    },
    /// The entry protocol that was asked for does not fit the image.
    #[error("the kernel image cannot be entered by the {wanted} protocol: {why}")]
    ProtocolUnavailable {
        /// Protocol asked for.
        wanted: &'static str,
        /// What is missing.
        why: &'static str,
    },
    /// The initial RAM disk has no bytes.
    #[error("the initrd is empty: an archive of at least one byte is needed")]
    InitrdEmpty,
    /// The initial RAM disk does not fit.
    #[error(
        "the initrd of {size} bytes is too big: at most {room} bytes fit between the kernel's end and the highest address that the kernel allows"
    )]
    InitrdTooBig {
        /// Bytes of the file.
        size: u64,
        /// Bytes that fit.
        room: u64,
    },
    /// A file is a directory, a pipe or the like.
    #[error("the {what} is not a regular file, and only regular files can be loaded")]
    NotAFile {
        /// Which file.
        what: &'static str,
    },
    /// A file could not be read.
    #[error("the {what} cannot be read")]
    Read {
        /// Which file.
        what: &'static str,
        /// Error of the host.
        source: io::Error,
    },
    /// A file became shorter while it was read.
    #[error(
        "the {what} ended while it was read: {expected} bytes were expected from offset {offset:#x}, and the file is shorter now"
    )]
    Shrunk {
        /// Which file.
        what: &'static str,
        /// Offset at which reading began.
        offset: u64,
        /// Bytes asked for.
        expected: u64,
    },
    /// The command line does not fit.
    #[error("the kernel command line of {length} bytes is too long: at most {max} are allowed")]
    CmdlineTooLong {
        /// Its bytes.
        length: usize,
        /// Most bytes.
        max: usize,
    },
    /// The command line contains a character that would end it.
    #[error(
        "the kernel command line contains {found} at byte {offset}, which is not allowed in it"
    )]
    CmdlineInvalid {
        /// Name of the character.
        found: &'static str,
        /// Where.
        offset: usize,
    },
    /// More virtio devices than interrupt lines.
    #[error(
        "the guest has too many virtio devices: at most {max} are allowed, one per free interrupt line"
    )]
    TooManyVirtioDevices {
        /// Number of lines.
        max: usize,
    },
    /// A number of vCPUs that the tables cannot describe.
    #[error("the guest has {cpus} vCPUs, and allowed are 1 to {max}")]
    CpuCount {
        /// Number asked for.
        cpus: u8,
        /// Most.
        max: u8,
    },
    /// RAM does not reach far enough to hold what the machine needs.
    #[error("the guest's RAM does not contain {wanted}, which {what} needs")]
    NoRoom {
        /// Addresses that are missing.
        wanted: Span,
        /// What they are for.
        what: &'static str,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_the_thing_and_what_is_allowed() {
        let err = BootError::KernelOutsideRam {
            wanted: Span {
                start: 0x100_0000,
                end: 0x200_0000,
            },
            allowed: Span {
                start: 0x10_0000,
                end: 0x80_0000,
            },
        };
        let text = err.to_string();
        assert!(text.contains("0x1000000..0x2000000"), "{text}");
        assert!(text.contains("0x100000..0x800000"), "{text}");
    }
}
