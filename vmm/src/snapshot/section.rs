//! What sections there are.

use std::fmt;

/// Bytes of a kind in a section's header.
pub(super) const KIND_SIZE: usize = 16;

/// What a section is the state of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SectionKind {
    /// What the guest is made of.
    Hardware,
    /// Where guest memory is, and its checksum.
    Memory,
    /// A vCPU, by its number.
    Vcpu,
    /// PIC and IOAPIC.
    Irqchip,
    /// The interval timer.
    Pit,
    /// The paravirtual clock.
    Clock,
    /// The serial port.
    Serial,
    /// ACPI power management.
    Power,
    /// The CMOS clock.
    Cmos,
    /// The transport of a virtio device, by its slot.
    Transport,
    /// A block device, by its slot.
    Block,
    /// A network device, by its slot.
    Net,
    /// A virtio console, by its slot.
    Console,
    /// An entropy device, by its slot.
    Rng,
    /// A socket device, by its slot.
    Vsock,
    /// Completions that a paced device holds back, by its slot; only of devices that are or were paced.
    Pace,
}

/// The name that ends a stream of sections.
pub(super) const END: &str = "end";

const NAMES: [(SectionKind, &str); 16] = [
    (SectionKind::Hardware, "hardware"),
    (SectionKind::Memory, "memory"),
    (SectionKind::Vcpu, "vcpu"),
    (SectionKind::Irqchip, "irqchip"),
    (SectionKind::Pit, "pit"),
    (SectionKind::Clock, "clock"),
    (SectionKind::Serial, "serial"),
    (SectionKind::Power, "power"),
    (SectionKind::Cmos, "cmos"),
    (SectionKind::Transport, "virtio-transport"),
    (SectionKind::Block, "virtio-block"),
    (SectionKind::Net, "virtio-net"),
    (SectionKind::Console, "virtio-console"),
    (SectionKind::Rng, "virtio-rng"),
    (SectionKind::Vsock, "virtio-vsock"),
    (SectionKind::Pace, "virtio-pace"),
];

impl SectionKind {
    /// The name, also in the section's header.
    pub fn name(self) -> &'static str {
        NAMES[self as usize].1
    }

    /// The kind with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        NAMES
            .iter()
            .find(|(_, n)| *n == name)
            .map(|(kind, _)| *kind)
    }
}

/// Which section: its kind and which of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SectionId {
    /// The kind.
    pub kind: SectionKind,
    /// Which one of its kind, from 0.
    pub instance: u32,
}

impl fmt::Display for SectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind.name(), self.instance)
    }
}

/// A name as it stands in a header.
pub(super) fn encode_name(name: &str) -> [u8; KIND_SIZE] {
    let mut bytes = [0; KIND_SIZE];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    bytes
}

/// The name that stands in a header, for errors also if it is none.
pub(super) fn decode_name(bytes: &[u8; KIND_SIZE]) -> String {
    let end = bytes.iter().rposition(|b| *b != 0).map_or(0, |at| at + 1);
    bytes[..end].escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_fit_and_come_back() {
        for (at, (kind, name)) in NAMES.iter().enumerate() {
            assert_eq!(*kind as usize, at);
            assert!(name.len() <= KIND_SIZE && *name != END);
            assert_eq!(SectionKind::from_name(name), Some(*kind));
            assert_eq!(decode_name(&encode_name(name)), *name);
        }
    }
}
