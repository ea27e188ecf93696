//! Which types are saved in which sections.

use std::io::{Read, Write};

use tandem_devices::pace::PaceState;
use tandem_devices::state::{
    BlockState, CmosState, ConsoleState, DeviceState, NetState, PmState, RngState, SerialState,
    TransportState, VsockState,
};
use tandem_devices::virtio::DeviceKind;

use super::guest::{HardwareState, MemoryState};
use super::{Saved, SectionKind, Sections, SnapshotError, Writer};
use crate::kvm::state::{ClockState, IrqchipState, KvmState, PitState, VcpuState};

macro_rules! saved {
    ($($state:ty => $kind:ident),* $(,)?) => {
        $(impl Saved for $state {
            const KIND: SectionKind = SectionKind::$kind;
            const VERSION: u32 = <$state>::VERSION;
        })*
    };
}

saved! {
    HardwareState => Hardware,
    MemoryState => Memory,
    VcpuState => Vcpu,
    IrqchipState => Irqchip,
    PitState => Pit,
    ClockState => Clock,
    SerialState => Serial,
    PmState => Power,
    CmosState => Cmos,
    TransportState => Transport,
    BlockState => Block,
    NetState => Net,
    ConsoleState => Console,
    RngState => Rng,
    VsockState => Vsock,
    PaceState => Pace,
}

impl<W: Write> Writer<W> {
    /// Writes the state of the virtio device in `slot`.
    ///
    /// # Errors
    /// As [`Writer::state`].
    pub fn device(&mut self, slot: u32, state: &DeviceState) -> Result<(), SnapshotError> {
        match state {
            DeviceState::Block(state) => self.state(slot, state),
            DeviceState::Net(state) => self.state(slot, state),
            DeviceState::Console(state) => self.state(slot, state),
            DeviceState::Rng(state) => self.state(slot, state),
            DeviceState::Vsock(state) => self.state(slot, state),
        }
    }

    /// Writes the state of KVM's own devices.
    ///
    /// # Errors
    /// As [`Writer::state`].
    pub fn kvm(&mut self, state: &KvmState) -> Result<(), SnapshotError> {
        self.state(0, &state.irqchip)?;
        self.state(0, &state.pit)?;
        self.state(0, &state.clock)
    }
}

impl Sections {
    /// Reads a saved state from a stream that ends with it.
    ///
    /// # Errors
    /// As [`Sections::read`], and when more follows.
    pub fn read_all(mut from: impl Read) -> Result<Self, SnapshotError> {
        let sections = Self::read(&mut from)?;
        let more = from.read(&mut [0]).map_err(|source| SnapshotError::Read {
            place: "the end".into(),
            source,
        })?;
        if more > 0 {
            return Err(SnapshotError::Trailing);
        }
        Ok(sections)
    }

    /// Takes the state of the device of this kind in `slot`.
    ///
    /// # Errors
    /// As [`Sections::take`].
    pub fn take_device(
        &mut self,
        kind: DeviceKind,
        slot: u32,
    ) -> Result<DeviceState, SnapshotError> {
        Ok(match kind {
            DeviceKind::Block => DeviceState::Block(self.take(slot)?),
            DeviceKind::Net => DeviceState::Net(self.take(slot)?),
            DeviceKind::Console => DeviceState::Console(self.take(slot)?),
            DeviceKind::Rng => DeviceState::Rng(self.take(slot)?),
            DeviceKind::Vsock => DeviceState::Vsock(self.take(slot)?),
        })
    }

    /// Takes the state of KVM's own devices.
    ///
    /// # Errors
    /// As [`Sections::take`].
    pub fn take_kvm(&mut self) -> Result<KvmState, SnapshotError> {
        Ok(KvmState {
            irqchip: self.take(0)?,
            pit: self.take(0)?,
            clock: self.take(0)?,
        })
    }
}
