//! A vCPU.

use std::time::Instant;

use kvm_bindings::{kvm_lapic_state, kvm_mp_state, kvm_sregs, kvm_xcr, kvm_xcrs};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::cpuid;
use super::lapic::{LAPIC_SIZE, Timer, TimerMode, stop_timer};
use super::msrs::{self, MsrList};
use super::settle::{Settled, settle};
use super::xsave::XsaveRoom;
use super::{CpuidEntry, DebugState, EventsState, RegistersState, StateError, SystemState};

/// Most extended control registers; there is one so far.
const XCRS_MAX: usize = 16;
/// Page-level cache disable of the page tables' root (Intel SDM volume 3, 2.5): means nothing to guests.
const CR3_PCD: u64 = 1 << 4;
/// How often a periodic timer's interrupts are settled before the last one is given up.
const SETTLE_MAX: usize = 8;

/// A stopped vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    /// The processor that the guest was shown.
    pub cpuid: Vec<CpuidEntry>,
    /// Frequency of the time-stamp counter in kHz, where KVM tells it.
    pub tsc_khz: Option<u32>,
    /// KVM_MP_STATE_* (KVM API 4.38): runs, is halted, waits to be started.
    pub mp_state: u32,
    /// General registers.
    pub registers: RegistersState,
    /// System registers.
    pub system: SystemState,
    /// Extended control registers: number and value.
    pub xcrs: Vec<(u32, u64)>,
    /// Debug registers.
    pub debug: DebugState,
    /// Extended state in the processor's own layout (Intel SDM volume 1, 13.4).
    #[serde(with = "serde_bytes")]
    pub xsave: Vec<u8>,
    /// The local APIC's register page (KVM API 4.57).
    #[serde(with = "serde_bytes")]
    pub lapic: Vec<u8>,
    /// Model-specific registers in the order in which they are set: number and value.
    pub msrs: Vec<(u32, u64)>,
    /// Events on their way.
    pub events: EventsState,
}

/// What there is to save of a vCPU, found out once.
pub struct VcpuProbe {
    cpuid: Vec<CpuidEntry>,
    tsc_khz: Option<u32>,
    msrs: MsrList,
    xsave: XsaveRoom,
}

impl VcpuProbe {
    /// Finds out what there is of `vcpu` of `vm`, whose CPUID has to be set. Takes milliseconds,
    /// so it is done before the vCPU is stopped for the first time.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn new(kvm: &Kvm, vm: &VmFd, vcpu: &VcpuFd) -> Result<Self, StateError> {
        Ok(Self {
            cpuid: cpuid::read(vcpu)?,
            tsc_khz: vcpu.get_tsc_khz().ok(),
            msrs: MsrList::probe(kvm, vcpu)?,
            xsave: XsaveRoom::new(vm)?,
        })
    }
}

impl VcpuState {
    /// Version of the type.
    pub const VERSION: u32 = 1;

    /// Reads the state of `vcpu`, which has to be stopped with no I/O pending and no trap on its
    /// way (see [`super::trap_may_be_on_its_way`]).
    ///
    /// A local APIC timer whose interrupt is due is settled first: KVM injects the interrupt, by a
    /// run that ends before the guest executes anything. So the saved interrupt controller has it,
    /// and the timer can be saved as stopped; restored as it stood it would fire again.
    ///
    /// # Errors
    /// When KVM refuses, or I/O is pending.
    pub fn capture(vcpu: &mut VcpuFd, probe: &mut VcpuProbe) -> Result<Self, StateError> {
        // Asking for it can make KVM act on an INIT or SIPI: before all else.
        let mut mp_state = read_mp_state(vcpu)?;
        let (lapic, ran) = settled_lapic(vcpu)?;
        if ran {
            mp_state = read_mp_state(vcpu)?;
        }
        let events = vcpu
            .get_vcpu_events()
            .map_err(StateError::kvm("read a vCPU's events"))?;
        let registers = vcpu
            .get_regs()
            .map_err(StateError::kvm("read a vCPU's registers"))?;
        let system = vcpu
            .get_sregs()
            .map_err(StateError::kvm("read a vCPU's system registers"))?;
        let debug = vcpu
            .get_debug_regs()
            .map_err(StateError::kvm("read a vCPU's debug registers"))?;
        Ok(Self {
            cpuid: probe.cpuid.clone(),
            tsc_khz: probe.tsc_khz,
            mp_state,
            registers: registers.into(),
            system: system.into(),
            xcrs: read_xcrs(vcpu)?,
            debug: debug.into(),
            xsave: probe.xsave.read(vcpu)?,
            lapic: lapic.to_vec(),
            msrs: probe.msrs.read(vcpu)?,
            events: events.into(),
        })
    }

    /// Checks, before anything is restored, that this host has the processor that the guest was
    /// shown. `vcpu` is one that never ran.
    ///
    /// # Errors
    /// When it has not; the error names what is missing.
    pub fn check_host(&self, kvm: &Kvm, vcpu: &VcpuFd) -> Result<(), StateError> {
        cpuid::check(kvm, vcpu, &self.cpuid)
    }

    /// Sets the state of `vcpu` of `vm`, which never ran.
    ///
    /// The order: CPUID and the counter's frequency, on which the meaning of others depends; control
    /// registers before extended state and local APIC, whose form depends on them; the local APIC
    /// before the MSRs, one of which starts its timer; then the run state; events last, since
    /// setting registers cancels exceptions.
    ///
    /// # Errors
    /// When KVM of this host refuses a part; the virtual machine is of no use then.
    pub fn restore(&self, vm: &VmFd, vcpu: &VcpuFd) -> Result<(), StateError> {
        cpuid::write(vcpu, &self.cpuid)?;
        self.restore_tsc_frequency(vcpu)?;
        self.set(vm, vcpu)
    }

    /// Sets the state of `vcpu` of `vm`, which has run, is stopped as for [`VcpuState::capture`], and has the
    /// same CPUID and frequency. What it ran with is gone: the page tables that the processor holds as well
    /// as its timer, in either mode.
    ///
    /// # Errors
    /// When KVM of this host refuses a part.
    pub fn restore_in_place(&self, vm: &VmFd, vcpu: &VcpuFd) -> Result<(), StateError> {
        // Asking for it makes KVM act on an INIT or SIPI that is on its way: one that waits to be started has none after that.
        read_mp_state(vcpu)?;
        let mut other: kvm_sregs = self.system.into();
        // Page tables are looked up anew only where their root changes.
        other.cr3 ^= CR3_PCD;
        vcpu.set_sregs(&other)
            .map_err(StateError::kvm("set a vCPU's system registers"))?;
        // Changing the mode of the timer stops it, and a deadline that is over would be due at once.
        msrs::disarm(vcpu, &self.msrs)?;
        let mut page = self.lapic_page()?;
        stop_timer(&mut page);
        vcpu.set_lapic(&kvm_lapic(page))
            .map_err(StateError::kvm("set a vCPU's local APIC"))?;
        self.set(vm, vcpu)
    }

    fn set(&self, vm: &VmFd, vcpu: &VcpuFd) -> Result<(), StateError> {
        vcpu.set_sregs(&self.system.into())
            .map_err(StateError::kvm("set a vCPU's system registers"))?;
        vcpu.set_regs(&self.registers.into())
            .map_err(StateError::kvm("set a vCPU's registers"))?;
        vcpu.set_xcrs(&self.kvm_xcrs()?)
            .map_err(StateError::kvm("set a vCPU's extended control registers"))?;
        XsaveRoom::new(vm)?.write(vcpu, &self.xsave)?;
        vcpu.set_debug_regs(&self.debug.into())
            .map_err(StateError::kvm("set a vCPU's debug registers"))?;
        vcpu.set_lapic(&kvm_lapic(self.lapic_page()?))
            .map_err(StateError::kvm("set a vCPU's local APIC"))?;
        msrs::set(vcpu, &self.msrs)?;
        let mp_state = kvm_mp_state {
            mp_state: self.mp_state,
        };
        vcpu.set_mp_state(mp_state)
            .map_err(StateError::kvm("set a vCPU's run state"))?;
        vcpu.set_vcpu_events(&self.events.into())
            .map_err(StateError::kvm("set a vCPU's events"))?;
        // Tells the guest that it was stopped, so that its watchdogs do not bark. A guest without
        // kvmclock cannot be told.
        let _ = vcpu.kvmclock_ctrl();
        Ok(())
    }

    fn restore_tsc_frequency(&self, vcpu: &VcpuFd) -> Result<(), StateError> {
        let here = vcpu.get_tsc_khz().ok();
        let Some(saved) = self.tsc_khz.filter(|_| self.tsc_khz != here) else {
            return Ok(());
        };
        vcpu.set_tsc_khz(saved)
            .map_err(|_| StateError::TscFrequency {
                saved,
                here: here.unwrap_or(0),
            })
    }

    fn kvm_xcrs(&self) -> Result<kvm_xcrs, StateError> {
        let mut kvm = kvm_xcrs {
            nr_xcrs: self.xcrs.len() as u32,
            ..Default::default()
        };
        if self.xcrs.len() > XCRS_MAX {
            return Err(StateError::Value {
                what: "the number of extended control registers",
                value: self.xcrs.len() as u64,
                allowed: "at most 16",
            });
        }
        for (to, (xcr, value)) in kvm.xcrs.iter_mut().zip(&self.xcrs) {
            *to = kvm_xcr {
                xcr: *xcr,
                value: *value,
                ..Default::default()
            };
        }
        Ok(kvm)
    }

    fn lapic_page(&self) -> Result<[u8; LAPIC_SIZE], StateError> {
        let page = <[u8; LAPIC_SIZE]>::try_from(self.lapic.as_slice());
        page.map_err(|_| StateError::Value {
            what: "the number of bytes of the local APIC",
            value: self.lapic.len() as u64,
            allowed: "1024",
        })
    }
}

fn kvm_lapic(page: [u8; LAPIC_SIZE]) -> kvm_lapic_state {
    kvm_lapic_state {
        regs: page.map(u8::cast_signed),
    }
}

fn read_xcrs(vcpu: &VcpuFd) -> Result<Vec<(u32, u64)>, StateError> {
    let kvm = vcpu
        .get_xcrs()
        .map_err(StateError::kvm("read a vCPU's extended control registers"))?;
    let count = (kvm.nr_xcrs as usize).min(XCRS_MAX);
    Ok(kvm.xcrs[..count].iter().map(|x| (x.xcr, x.value)).collect())
}

fn read_lapic(vcpu: &VcpuFd) -> Result<[u8; LAPIC_SIZE], StateError> {
    let lapic = vcpu
        .get_lapic()
        .map_err(StateError::kvm("read a vCPU's local APIC"))?;
    Ok(lapic.regs.map(i8::cast_unsigned))
}

fn read_mp_state(vcpu: &VcpuFd) -> Result<u32, StateError> {
    let state = vcpu
        .get_mp_state()
        .map_err(StateError::kvm("read a vCPU's run state"))?;
    Ok(state.mp_state)
}

/// The local APIC, with every interrupt of its timer that was due, and whether that took a run.
fn settled_lapic(vcpu: &mut VcpuFd) -> Result<([u8; LAPIC_SIZE], bool), StateError> {
    let page = read_lapic(vcpu)?;
    let timer = Timer::of(&page);
    if timer.has_expired() {
        Ok((settle_one_shot(vcpu, page)?, true))
    } else if timer.was_started() && timer.mode == TimerMode::Periodic {
        Ok((settle_periodic(vcpu, page)?, true))
    } else {
        Ok((page, false))
    }
}

/// It expired before the run, so its interrupt is injected by the run, and nothing is left to come.
fn settle_one_shot(
    vcpu: &mut VcpuFd,
    before: [u8; LAPIC_SIZE],
) -> Result<[u8; LAPIC_SIZE], StateError> {
    if settle(vcpu)? == Settled::No {
        // Better an interrupt twice than never.
        return Ok(before);
    }
    let mut page = read_lapic(vcpu)?;
    stop_timer(&mut page);
    Ok(page)
}

/// Settles until no period ended between the run and the reading of the page.
fn settle_periodic(
    vcpu: &mut VcpuFd,
    mut page: [u8; LAPIC_SIZE],
) -> Result<[u8; LAPIC_SIZE], StateError> {
    for _ in 0..SETTLE_MAX {
        let start = Instant::now();
        settle(vcpu)?;
        page = read_lapic(vcpu)?;
        if u128::from(Timer::of(&page).period_age_ns()) > start.elapsed().as_nanos() {
            break;
        }
    }
    Ok(page)
}
