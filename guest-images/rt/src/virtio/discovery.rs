//! Where the machine's virtio-mmio devices are.
//!
//! The command line is asked first (`virtio_mmio.device=SIZE@BASE:IRQ`, as Linux reads it),
//! then ACPI's DSDT, and last the places where monitors are known to put them.

use alloc::vec::Vec;

use super::DeviceType;
use super::transport::{self, Transport};
use crate::acpi;
use crate::cmdline::{self, Args};

/// Most devices that are looked at.
const DEVICES_MAX: usize = 64;
/// Key on the command line.
const KEY: &str = "virtio_mmio.device";

/// Places to try without a description: first base, distance, number of slots.
const KNOWN: [(u64, u64, u32); 2] = [(0xd000_0000, 0x1000, 32), (0xfeb0_0000, 0x200, 24)];
/// Interrupt of the first slot at such a place.
const KNOWN_FIRST_GSI: u32 = 5;
/// Interrupts of an I/O APIC: more slots than that cannot have their own.
const KNOWN_GSI_END: u32 = 24;

/// All device slots with a device in it, in the order of their description.
pub fn devices() -> Vec<Transport> {
    let mut slots: Vec<_> = from_command_line(cmdline::args())
        .take(DEVICES_MAX)
        .collect();
    if slots.is_empty() {
        slots = acpi::virtio_devices()
            .take(DEVICES_MAX)
            .map(|d| (d.base, d.gsi))
            .collect();
    }
    if slots.is_empty() {
        slots = known_places().collect();
    }
    slots
        .into_iter()
        .filter_map(|(base, gsi)| Transport::probe(base, gsi))
        .collect()
}

/// The device `nth` (from 0) of a type.
///
/// # Errors
/// [`super::Error::Missing`] if there are fewer.
pub fn find(kind: DeviceType, nth: usize) -> Result<Transport, super::Error> {
    let mut found = devices()
        .into_iter()
        .filter(|device| device.kind() == kind as u32);
    found.nth(nth).ok_or(super::Error::Missing { kind, nth })
}

fn from_command_line(args: Args<'_>) -> impl Iterator<Item = (u64, u32)> {
    args.iter()
        .filter(|(key, _)| *key == KEY)
        .filter_map(|(_, value)| parse(value))
}

/// Base and interrupt of `SIZE@BASE:IRQ[:ID]`.
fn parse(value: &str) -> Option<(u64, u32)> {
    let (_, place) = value.split_once('@')?;
    let mut parts = place.split(':');
    let base = parts.next()?;
    let base = match base.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok()?,
        None => base.parse().ok()?,
    };
    Some((base, parts.next()?.parse().ok()?))
}

fn known_places() -> impl Iterator<Item = (u64, u32)> {
    KNOWN.into_iter().flat_map(|(first, distance, slots)| {
        (0..slots)
            .map(move |slot| (first + u64::from(slot) * distance, KNOWN_FIRST_GSI + slot))
            .take_while(|&(base, gsi)| gsi < KNOWN_GSI_END && transport::is_present(base))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_is_parsed_as_linux_does() {
        let line = "a=b virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=512@4273995776:23:1";
        let found: Vec<_> = from_command_line(Args(line)).collect();
        assert_eq!(found, [(0xd000_0000, 5), (0xfec0_0000, 23)]);
    }

    #[test]
    fn broken_descriptions_are_skipped() {
        for broken in [
            "",
            "4K",
            "4K@",
            "4K@0xd0000000",
            "4K@0xzz:5",
            "4K@0xd0000000:x",
        ] {
            assert_eq!(parse(broken), None, "{broken}");
        }
    }
}
