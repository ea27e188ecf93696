//! Booting: puts a kernel into guest memory and describes the machine to it.
//!
//! [`write_tables`] describes the machine (ACPI tables and an MP table), [`load_kernel`] loads kernel,
//! initial RAM disk and command line, and [`setup_bsp`] sets the registers with which the first vCPU
//! enters the kernel:
//!
//! | image | protocol | registers at entry |
//! |---|---|---|
//! | ELF with a PVH note | PVH | 32-bit protected mode, no paging, ebx = `hvm_start_info` |
//! | ELF without, or on request | Linux 64-bit | long mode, 4 GiB mapped one to one, rsi = `boot_params` |
//! | bzImage | Linux 64-bit | the same |
//!
//! Memory has to be zero: what a kernel expects to be zero is not written, so that a boot touches no
//! more pages than it must. For a restart, give the guest fresh memory first.

mod acpi;
mod bzimage;
pub mod cmdline;
mod elf;
mod error;
mod image;
mod initrd;
pub mod layout;
mod mptable;
mod pvh;
mod registers;
#[cfg(test)]
mod tests;
mod zero_page;

use std::fs::File;

use vm_memory::GuestMemoryBackend;

use crate::config::{BootProtocol, CPUS_MAX};
use bzimage::BzImage;
use elf::ElfKernel;
use image::{Format, Image};
use layout::{Span, VirtioSlot};

pub use error::BootError;
pub use registers::setup_bsp;

/// Highest address that a kernel without a setup header takes for its initial RAM disk: the largest
/// that Linux's own images state.
const INITRD_ADDRESS_MAX: u64 = 0x7fff_ffff;

/// What to load.
#[derive(Debug)]
pub struct BootSources<'a> {
    /// Kernel image.
    pub kernel: &'a mut File,
    /// Initial RAM disk.
    pub initrd: Option<&'a mut File>,
    /// Kernel command line, complete.
    pub cmdline: &'a str,
    /// Entry protocol.
    pub protocol: BootProtocol,
}

/// Where the first vCPU enters the kernel, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// PVH at this guest-physical address.
    Pvh(u32),
    /// The Linux 64-bit boot protocol at this guest-physical address.
    Linux64(u64),
}

/// A loaded kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// Entry point.
    pub entry: Entry,
    /// Memory that the kernel covers.
    pub kernel: Span,
    /// Memory that the initial RAM disk covers.
    pub initrd: Option<Span>,
}

/// Writes the tables that describe the machine: ACPI and MP, for APIC ids 0 to `cpus` - 1.
///
/// # Errors
/// When there are more vCPUs than the tables hold, or less RAM than 1 MiB.
pub fn write_tables<M: GuestMemoryBackend>(
    mem: &M,
    cpus: u8,
    slots: &[VirtioSlot],
) -> Result<(), BootError> {
    write_mp_table(mem, cpus)?;
    acpi::write(mem, cpus, slots)
}

/// Writes the MP table alone, for a machine without ACPI.
///
/// # Errors
/// As [`write_tables`].
pub fn write_mp_table<M: GuestMemoryBackend>(mem: &M, cpus: u8) -> Result<(), BootError> {
    if !(1..=CPUS_MAX).contains(&cpus) {
        return Err(BootError::CpuCount {
            cpus,
            max: CPUS_MAX,
        });
    }
    mptable::write(mem, cpus)
}

/// Loads a kernel, its initial RAM disk and its command line into `mem`, which is zero but for the
/// tables of [`write_tables`]; the kernel is told of ACPI tables if they are there.
///
/// # Errors
/// When an image is not what it should be, or does not fit. Guest memory may be partly written then.
pub fn load_kernel<M: GuestMemoryBackend>(
    mem: &M,
    sources: BootSources<'_>,
) -> Result<Loaded, BootError> {
    let ram = layout::spans_of(mem);
    let mut image = Image::new(sources.kernel, "kernel image")?;
    let head = image.head()?;
    let kernel = match image::detect(&head)? {
        Format::Elf => Kernel::elf(&image, &head, sources.protocol)?,
        Format::BzImage => Kernel::bzimage(&image, &head, sources.protocol)?,
    };
    cmdline::check(sources.cmdline, kernel.cmdline_max())?;
    let low_ram = ram.first().copied().unwrap_or(Span { start: 0, end: 0 });
    let span = kernel.load(&mut image, mem, low_ram)?;
    let initrd = match sources.initrd {
        Some(file) => {
            let mut image = Image::new(file, "initrd")?;
            let highest = kernel.initrd_address_max();
            Some(initrd::load(&mut image, mem, low_ram, span, highest)?)
        }
        None => None,
    };
    cmdline::write(mem, sources.cmdline)?;
    kernel.write_handover(mem, initrd, &ram)?;
    Ok(Loaded {
        entry: kernel.entry(),
        kernel: span,
        initrd,
    })
}

/// A checked kernel image with the way to enter it.
enum Kernel {
    Elf(ElfKernel, Entry),
    BzImage(BzImage),
}

impl Kernel {
    fn elf(image: &Image<'_>, head: &[u8], protocol: BootProtocol) -> Result<Self, BootError> {
        let elf = ElfKernel::parse(image, head)?;
        let entry = match (protocol, elf.entry_pvh()?) {
            (BootProtocol::Auto | BootProtocol::Pvh, Some(address)) => Entry::Pvh(address),
            (BootProtocol::Auto | BootProtocol::Linux64, _) => Entry::Linux64(elf.entry64()?),
            (BootProtocol::Pvh, None) => {
                let why = "it has no XEN_ELFNOTE_PHYS32_ENTRY note";
                return Err(BootError::ProtocolUnavailable { wanted: "PVH", why });
            }
        };
        Ok(Self::Elf(elf, entry))
    }

    fn bzimage(image: &Image<'_>, head: &[u8], protocol: BootProtocol) -> Result<Self, BootError> {
        if protocol == BootProtocol::Pvh {
            let why = "a bzImage is entered by the Linux 64-bit protocol only (its vmlinux can have a PVH entry)";
            return Err(BootError::ProtocolUnavailable { wanted: "PVH", why });
        }
        Ok(Self::BzImage(BzImage::parse(image, head)?))
    }

    fn entry(&self) -> Entry {
        match self {
            Self::Elf(_, entry) => *entry,
            Self::BzImage(kernel) => Entry::Linux64(kernel.entry64()),
        }
    }

    fn cmdline_max(&self) -> usize {
        match self {
            Self::Elf(..) => cmdline::CMDLINE_LEN_MAX,
            Self::BzImage(kernel) => kernel.cmdline_max(),
        }
    }

    fn initrd_address_max(&self) -> u64 {
        match self {
            Self::Elf(..) => INITRD_ADDRESS_MAX,
            Self::BzImage(kernel) => kernel.initrd_address_max(),
        }
    }

    fn load<M: GuestMemoryBackend>(
        &self,
        image: &mut Image<'_>,
        mem: &M,
        low_ram: Span,
    ) -> Result<Span, BootError> {
        match self {
            Self::Elf(kernel, _) => kernel.load(image, mem, low_ram),
            Self::BzImage(kernel) => kernel.load(image, mem, low_ram),
        }
    }

    fn write_handover<M: GuestMemoryBackend>(
        &self,
        mem: &M,
        initrd: Option<Span>,
        ram: &[Span],
    ) -> Result<(), BootError> {
        match self {
            Self::Elf(_, Entry::Pvh(_)) => pvh::write(mem, initrd, ram),
            Self::Elf(_, Entry::Linux64(_)) => zero_page::write(mem, None, initrd, ram),
            Self::BzImage(kernel) => zero_page::write(mem, Some(&kernel.header), initrd, ram),
        }
    }
}
