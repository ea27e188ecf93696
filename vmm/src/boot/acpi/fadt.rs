//! Fixed ACPI Description Table (ACPI 6.5, section 5.2.9).

use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::super::layout::{
    CMOS_CENTURY, I8042_COMMAND_PORT, I8042_RESET, PM1_CONTROL_PORT, PM1_EVENT_PORT, SCI_GSI,
};
use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};

/// `IAPC_BOOT_ARCH`: there are devices on an ISA bus (the serial port).
const LEGACY_DEVICES: u16 = 1 << 0;
/// `IAPC_BOOT_ARCH`: do not look for a VGA adapter.
///
/// The bit for an 8042 is left clear: there is no keyboard to look for, which would take a kernel
/// a second, and the reset command works all the same.
const VGA_NOT_PRESENT: u16 = 1 << 2;

/// Bytes of the PM1 event block (status and enable) and of the control block.
const PM1_EVENT_LEN: u8 = 4;
const PM1_CONTROL_LEN: u8 = 2;

/// The FADT for a FACS and a DSDT at these addresses.
///
/// `SMI_CMD` is zero: the machine is always in ACPI mode. There is no PM timer and no GPE block.
pub(super) fn table(facs: u32, dsdt: u64) -> FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .firmware_ctrl_32(facs)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup);
    // Both fields name the same table; ACPICA prefers the wider.
    fadt.dsdt = (dsdt as u32).into();
    fadt.x_dsdt = dsdt.into();
    fadt.sci_int = (SCI_GSI as u16).into();
    fadt.pm1a_evt_blk = u32::from(PM1_EVENT_PORT).into();
    fadt.pm1a_cnt_blk = u32::from(PM1_CONTROL_PORT).into();
    fadt.pm1_evt_len = PM1_EVENT_LEN;
    fadt.pm1_cnt_len = PM1_CONTROL_LEN;
    fadt.x_pm1a_evt_blk = io_register(PM1_EVENT_PORT, PM1_EVENT_LEN, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = io_register(PM1_CONTROL_PORT, PM1_CONTROL_LEN, AccessSize::WordAccess);
    fadt.reset_reg = io_register(I8042_COMMAND_PORT, 1, AccessSize::ByteAccess);
    fadt.reset_value = I8042_RESET;
    fadt.century = CMOS_CENTURY;
    fadt.iapc_boot_arch = (LEGACY_DEVICES | VGA_NOT_PRESENT).into();
    // C2 and C3 do not exist (a latency above 100 and 1000 says so).
    fadt.p_lvl2_lat = 0x0fff.into();
    fadt.p_lvl3_lat = 0x0fff.into();
    fadt.finalize()
}

fn io_register(port: u16, bytes: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bytes * 8, 0, access, port.into())
}
