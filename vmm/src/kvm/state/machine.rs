//! What KVM holds of the machine beside its vCPUs.

use kvm_bindings::{
    KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, kvm_clock_data, kvm_pit_channel_state, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::registers::mirror;
use super::{IrqchipState, StateError};

mirror! {
    /// A channel of the interval timer. When it was loaded is not saved: that is the host's time.
    ChannelState = kvm_pit_channel_state {
        /// Initial count.
        count: u32 = count,
        /// Latched count.
        latched_count: u16 = latched_count,
        /// Whether and how far the latched count was read.
        count_latched: u8 = count_latched,
        /// Whether the status is latched.
        status_latched: u8 = status_latched,
        /// Latched status.
        status: u8 = status,
        /// Which byte is read next.
        read_state: u8 = read_state,
        /// Which byte is written next.
        write_state: u8 = write_state,
        /// First byte of a count of two.
        write_latch: u8 = write_latch,
        /// How counts are read and written.
        rw_mode: u8 = rw_mode,
        /// Mode.
        mode: u8 = mode,
        /// Whether it counts in BCD.
        bcd: u8 = bcd,
        /// Level of the gate.
        gate: u8 = gate,
    }
}

/// The interval timer (8254).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PitState {
    /// The channels.
    pub channels: [ChannelState; 3],
    /// KVM_PIT_FLAGS_* (KVM API 4.72).
    pub flags: u32,
}

impl PitState {
    /// Version of the type.
    pub const VERSION: u32 = 1;
}

/// The paravirtual clock (kvmclock).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClockState {
    /// What it shows, in ns.
    pub ns: u64,
    /// The host's time of day then, in ns since 1970, where KVM tells it.
    pub realtime_ns: Option<u64>,
    /// The host's time-stamp counter then, where KVM tells it.
    pub host_tsc: Option<u64>,
}

impl ClockState {
    /// Version of the type.
    pub const VERSION: u32 = 1;
}

/// What KVM holds of the machine beside its vCPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvmState {
    /// Interrupt controllers.
    pub irqchip: IrqchipState,
    /// Interval timer.
    pub pit: PitState,
    /// Clock.
    pub clock: ClockState,
}

impl KvmState {
    /// Reads it. The vCPUs have to be stopped.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn capture(vm: &VmFd) -> Result<Self, StateError> {
        let irqchip = IrqchipState::capture(vm)?;
        let pit = vm
            .get_pit2()
            .map_err(StateError::kvm("read the interval timer"))?;
        let clock = vm.get_clock().map_err(StateError::kvm("read the clock"))?;
        let told = |flag, value| (clock.flags & flag != 0).then_some(value);
        Ok(Self {
            irqchip,
            pit: PitState {
                channels: pit.channels.map(Into::into),
                flags: pit.flags,
            },
            clock: ClockState {
                ns: clock.clock,
                realtime_ns: told(KVM_CLOCK_REALTIME, clock.realtime),
                host_tsc: told(KVM_CLOCK_HOST_TSC, clock.host_tsc),
            },
        })
    }

    /// Sets it in a virtual machine that never ran. The clock goes on from what it showed.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn restore(&self, vm: &VmFd) -> Result<(), StateError> {
        self.irqchip.restore(vm)?;
        let pit = kvm_pit_state2 {
            channels: self.pit.channels.map(Into::into),
            flags: self.pit.flags,
            ..Default::default()
        };
        vm.set_pit2(&pit)
            .map_err(StateError::kvm("set the interval timer"))?;
        let clock = kvm_clock_data {
            clock: self.clock.ns,
            ..Default::default()
        };
        vm.set_clock(&clock)
            .map_err(StateError::kvm("set the clock"))
    }
}
