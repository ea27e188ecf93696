use std::process::Command;

use super::super::layout::VIRTIO_GSIS;
use super::*;
use crate::config::CPUS_MAX;

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum: u8, b| sum.wrapping_add(*b))
}

fn full() -> Vec<Placed> {
    tables(4, &VirtioSlot::first(3).unwrap())
}

fn find<'a>(tables: &'a [Placed], signature: &[u8]) -> &'a Placed {
    tables
        .iter()
        .find(|t| t.bytes.starts_with(signature))
        .unwrap()
}

fn address_at(table: &Placed, offset: usize) -> u64 {
    u64::from_le_bytes(table.bytes[offset..offset + 8].try_into().unwrap())
}

#[test]
fn tables_lead_to_each_other() {
    let tables = full();
    assert_eq!(tables[0].address, ACPI_START);
    assert_eq!(&tables[0].bytes[..8], b"RSD PTR ");
    let xsdt = find(&tables, b"XSDT");
    assert_eq!(address_at(&tables[0], 24), xsdt.address);
    let fadt = find(&tables, b"FACP");
    assert_eq!(address_at(xsdt, 36), fadt.address);
    assert_eq!(address_at(xsdt, 44), find(&tables, b"APIC").address);
    assert_eq!(address_at(fadt, 140), find(&tables, b"DSDT").address);
    let facs = find(&tables, b"FACS").address;
    assert_eq!(fadt.bytes[36..40], (facs as u32).to_le_bytes());
    assert_eq!(facs % 64, 0);
}

#[test]
fn lengths_and_checksums_are_right() {
    let tables = full();
    assert_eq!(sum(&tables[0].bytes[..20]), 0);
    assert_eq!(sum(&tables[0].bytes), 0);
    for table in &tables[1..] {
        let length = u32::from_le_bytes(table.bytes[4..8].try_into().unwrap());
        assert_eq!(length as usize, table.bytes.len());
        if !table.bytes.starts_with(b"FACS") {
            assert_eq!(sum(&table.bytes), 0);
        }
    }
}

#[test]
fn the_largest_machine_fits() {
    let tables = tables(CPUS_MAX, &VirtioSlot::first(VIRTIO_GSIS.len()).unwrap());
    for pair in tables[1..].windows(2) {
        assert!(pair[0].address + pair[0].bytes.len() as u64 <= pair[1].address);
    }
    let last = tables.last().unwrap();
    assert!(last.address + last.bytes.len() as u64 <= ACPI_END);
}

/// The tables are part of a guest's hardware: a change needs a new [`OEM_REVISION`].
#[test]
fn tables_are_those_of_this_revision() {
    let golden = [
        ("RSD PTR ", 36, 2480177265),
        ("FACS", 64, 370690599),
        ("DSDT", 454, 3134066437),
        ("FACP", 276, 1508958843),
        ("APIC", 104, 3879094159),
        ("XSDT", 52, 3516795157),
    ];
    let found: Vec<_> = full()
        .iter()
        .zip(&golden)
        .map(|(t, g)| (g.0, t.bytes.len(), fnv(&t.bytes)))
        .collect();
    assert_eq!(found, golden, "OEM_REVISION is {OEM_REVISION}");
}

/// FNV-1a.
fn fnv(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, b| {
        (hash ^ u32::from(*b)).wrapping_mul(0x0100_0193)
    })
}

#[test]
fn iasl_disassembles_and_recompiles_the_tables() {
    if Command::new("iasl").arg("-v").output().is_err() {
        eprintln!("skipped: iasl is not installed (Debian package acpica-tools)");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for table in full().iter().filter(|t| t.address != ACPI_START) {
        let name = String::from_utf8_lossy(&table.bytes[..4]).to_lowercase();
        std::fs::write(dir.path().join(format!("{name}.dat")), &table.bytes).unwrap();
        let text = iasl(dir.path(), &["-d", &format!("{name}.dat")]);
        for bad in ["rror", "nvalid", "incorrect", "unknown"] {
            assert!(!text.contains(bad), "{name}: {text}");
        }
    }
    let text = iasl(dir.path(), &["-tc", "dsdt.dsl"]);
    assert!(text.contains("0 Errors, 0 Warnings"), "{text}");
}

fn iasl(dir: &std::path::Path, args: &[&str]) -> String {
    let out = Command::new("iasl")
        .current_dir(dir)
        .args(args)
        .output()
        .unwrap();
    let text = [out.stdout, out.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(out.status.success(), "{text}");
    text
}
