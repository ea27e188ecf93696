//! Registers of the first vCPU at the kernel's entry point, and the GDT and page tables they name.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::layout::{
    BOOT_STACK_TOP, GDT_START, PAGE_TABLES_START, PVH_INFO_START, Span, ZERO_PAGE_START,
};
use super::{BootError, Entry};

/// Selectors of the boot GDT; Linux's protocol wants 0x10 and 0x18.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;
/// Limit of a 32-bit TSS without I/O bitmap.
const TSS_LIMIT: u32 = 0x67;

/// Segment types (Intel SDM volume 3, table 3-1 and 3-2): accessed, and for the TSS busy.
const CODE_READ: u8 = 0xb;
const DATA_WRITE: u8 = 0x3;
const TSS_BUSY: u8 = 0xb;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// RFLAGS: bit 1 is always set.
const RFLAGS: u64 = 2;

const PAGE: u64 = 4096;
/// Present, writable, accessed, dirty.
const PTE_TABLE: u64 = 0x63;
/// The same, for a 2 MiB page.
const PTE_LARGE: u64 = 0xe3;
/// Page directories: 1 GiB each.
const DIRECTORIES: u64 = 4;

/// Sets the registers for `entry` and writes the GDT and page tables that they name.
///
/// `sregs` are those of a vCPU after reset, which keep what is not about the entry (such as the APIC
/// base); `regs` are overwritten.
///
/// # Errors
/// When guest memory lacks the first 64 KiB.
pub fn setup_bsp<M: GuestMemoryBackend>(
    entry: &Entry,
    mem: &M,
    sregs: &mut kvm_sregs,
    regs: &mut kvm_regs,
) -> Result<(), BootError> {
    let long = matches!(entry, Entry::Linux64(_));
    set_segments(mem, sregs, long)?;
    *regs = match *entry {
        Entry::Pvh(address) => {
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr3 = 0;
            sregs.cr4 = 0;
            sregs.efer = 0;
            kvm_regs {
                rip: address.into(),
                rbx: PVH_INFO_START,
                rflags: RFLAGS,
                ..Default::default()
            }
        }
        Entry::Linux64(address) => {
            write_page_tables(mem)?;
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.cr3 = PAGE_TABLES_START;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
            kvm_regs {
                rip: address,
                rsi: ZERO_PAGE_START,
                rsp: BOOT_STACK_TOP,
                rbp: BOOT_STACK_TOP,
                rflags: RFLAGS,
                ..Default::default()
            }
        }
    };
    Ok(())
}

fn set_segments<M: GuestMemoryBackend>(
    mem: &M,
    sregs: &mut kvm_sregs,
    long: bool,
) -> Result<(), BootError> {
    let code = flat(CODE_SELECTOR, CODE_READ, long);
    let data = flat(DATA_SELECTOR, DATA_WRITE, false);
    let tss = kvm_segment {
        limit: TSS_LIMIT,
        selector: TSS_SELECTOR,
        type_: TSS_BUSY,
        present: 1,
        ..Default::default()
    };
    let gdt = [0, 0, descriptor(&code), descriptor(&data), descriptor(&tss)];
    let bytes: Vec<u8> = gdt.into_iter().flat_map(u64::to_le_bytes).collect();
    write(mem, GDT_START, &bytes, "the boot GDT")?;
    sregs.gdt.base = GDT_START;
    sregs.gdt.limit = (bytes.len() - 1) as u16;
    // No IDT: an exception before the kernel sets its own is a triple fault.
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = code;
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = data;
    }
    sregs.tr = tss;
    Ok(())
}

/// A segment that covers 4 GiB; 64-bit code if `long`.
fn flat(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

/// A segment as a GDT holds it (Intel SDM volume 3, figure 3-8); base zero.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    };
    let limit = u64::from(limit);
    let flags = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7
        | u64::from(segment.l) << 13
        | u64::from(segment.db) << 14
        | u64::from(segment.g) << 15;
    (limit & 0xffff) | flags << 40 | (limit >> 16 & 0xf) << 48
}

/// Maps the first 4 GiB one to one with 2 MiB pages, which every x86-64 processor has.
fn write_page_tables<M: GuestMemoryBackend>(mem: &M) -> Result<(), BootError> {
    let pdpt = PAGE_TABLES_START + PAGE;
    let directories = pdpt + PAGE;
    let entries = |count: u64, first: u64, step: u64, flags: u64| -> Vec<u8> {
        (0..count)
            .flat_map(|i| ((first + i * step) | flags).to_le_bytes())
            .collect()
    };
    let what = "the boot page tables";
    write(
        mem,
        PAGE_TABLES_START,
        &entries(1, pdpt, 0, PTE_TABLE),
        what,
    )?;
    write(
        mem,
        pdpt,
        &entries(DIRECTORIES, directories, PAGE, PTE_TABLE),
        what,
    )?;
    write(
        mem,
        directories,
        &entries(DIRECTORIES * 512, 0, 2 << 20, PTE_LARGE),
        what,
    )
}

fn write<M: GuestMemoryBackend>(
    mem: &M,
    address: u64,
    bytes: &[u8],
    what: &'static str,
) -> Result<(), BootError> {
    let wanted = Span {
        start: address,
        end: address + bytes.len() as u64,
    };
    mem.write_slice(bytes, GuestAddress(address))
        .map_err(|_| BootError::NoRoom { wanted, what })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryMmap;

    fn setup(entry: Entry) -> (GuestMemoryMmap, kvm_sregs, kvm_regs) {
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let mut sregs = kvm_sregs {
            apic_base: 0xfee0_0900,
            ..Default::default()
        };
        let mut regs = kvm_regs {
            rax: 1,
            ..Default::default()
        };
        setup_bsp(&entry, &mem, &mut sregs, &mut regs).unwrap();
        (mem, sregs, regs)
    }

    #[test]
    fn pvh_enters_protected_mode_without_paging() {
        let (mem, sregs, regs) = setup(Entry::Pvh(0x100_0000));
        assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x11, 0, 0));
        assert_eq!((regs.rip, regs.rbx, regs.rax), (0x100_0000, 0x6000, 0));
        assert_eq!(
            (sregs.cs.l, sregs.cs.db, sregs.apic_base),
            (0, 1, 0xfee0_0900)
        );
        let gdt: [u64; 5] = mem.read_obj(GuestAddress(GDT_START)).unwrap();
        assert_eq!(gdt[2], 0x00cf_9b00_0000_ffff);
        assert_eq!(gdt[3], 0x00cf_9300_0000_ffff);
        assert_eq!(gdt[4], 0x0000_8b00_0000_0067);
    }

    #[test]
    fn linux64_enters_long_mode_with_4_gib_mapped() {
        let (mem, sregs, regs) = setup(Entry::Linux64(0x100_0200));
        assert_eq!(sregs.cr0 & CR0_PG, CR0_PG);
        assert_eq!((regs.rip, regs.rsi), (0x100_0200, 0x7000));
        let gdt: [u64; 5] = mem.read_obj(GuestAddress(GDT_START)).unwrap();
        assert_eq!(gdt[2], 0x00af_9b00_0000_ffff);
        for address in [0u64, 0x1234_5678, 0xffff_f000] {
            assert_eq!(translate(&mem, sregs.cr3, address), address);
        }
    }

    fn translate(mem: &GuestMemoryMmap, cr3: u64, address: u64) -> u64 {
        let entry = |table: u64, index: u64| -> u64 {
            let value: u64 = mem.read_obj(GuestAddress(table + index % 512 * 8)).unwrap();
            assert_eq!(value & 1, 1);
            value & !0xfff
        };
        let pdpt = entry(cr3, address >> 39);
        let directory = entry(pdpt, address >> 30);
        entry(directory, address >> 21) + address % (2 << 20)
    }
}
