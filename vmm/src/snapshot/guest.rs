//! All of a stopped guest but its memory, to sections and back.

use std::io::Write;

use serde::{Deserialize, Serialize};
use tandem_devices::virtio::DeviceKind;

use super::{SectionId, SectionKind, Sections, SnapshotError, Writer};
use crate::config::{CPUS_MAX, VIRTIO_DEVICES_MAX};
use crate::device_model::DevicesState;
use crate::kvm::state::{KvmState, VcpuState};

/// What a guest is made of, as far as its state depends on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HardwareState {
    /// Version of Tandem that saved it.
    pub tandem: String,
    /// Name of the guest.
    pub name: String,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Guest memory in bytes.
    pub memory: u64,
    /// Virtio devices in the order of their slots.
    pub devices: Vec<HardwareDevice>,
}

/// One virtio device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HardwareDevice {
    /// Name, such as `disk0`.
    pub id: String,
    /// Kind, such as `block`.
    pub kind: String,
}

impl HardwareState {
    /// Version of the type.
    pub const VERSION: u32 = 1;

    /// Checks that a guest of this shape can go on as a guest of the shape `here`.
    ///
    /// # Errors
    /// When it cannot: what differs.
    pub fn expect(&self, here: &Self) -> Result<(), SnapshotError> {
        let differs = |what, saved: &dyn ToString, here: &dyn ToString| {
            let (saved, here) = (saved.to_string(), here.to_string());
            Err(SnapshotError::Shape { what, saved, here })
        };
        if self.cpus != here.cpus {
            return differs("a number of vCPUs of", &self.cpus, &here.cpus);
        }
        if self.memory != here.memory {
            let sizes = (mebibytes(self.memory), mebibytes(here.memory));
            return differs("memory of", &sizes.0, &sizes.1);
        }
        if self.devices != here.devices {
            return differs("the devices", &self.device_list(), &here.device_list());
        }
        Ok(())
    }

    /// The devices in one line.
    pub fn device_list(&self) -> String {
        let devices = self.devices.iter();
        let list: Vec<String> = devices.map(|d| format!("{} ({})", d.id, d.kind)).collect();
        list.join(", ")
    }

    fn check(&self) -> Result<(), SnapshotError> {
        let refuse = |what, value: &dyn ToString, allowed: String| {
            Err(SnapshotError::Value {
                section: SectionId {
                    kind: SectionKind::Hardware,
                    instance: 0,
                },
                what,
                value: value.to_string(),
                allowed,
            })
        };
        if !(1..=u32::from(CPUS_MAX)).contains(&self.cpus) {
            return refuse("`cpus`", &self.cpus, format!("1 to {CPUS_MAX}"));
        }
        if self.devices.len() > VIRTIO_DEVICES_MAX {
            let allowed = format!("at most {VIRTIO_DEVICES_MAX} devices");
            return refuse("`devices`", &self.devices.len(), allowed);
        }
        Ok(())
    }
}

fn mebibytes(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

/// All of a stopped guest but its memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestState {
    /// What it is made of.
    pub hardware: HardwareState,
    /// KVM's own devices.
    pub kvm: KvmState,
    /// The vCPUs, by number.
    pub vcpus: Vec<VcpuState>,
    /// The devices.
    pub devices: DevicesState,
}

impl GuestState {
    /// It alone as bytes.
    ///
    /// # Errors
    /// As [`Writer::state`].
    pub fn to_bytes(&self) -> Result<Vec<u8>, SnapshotError> {
        let mut writer = Writer::new(Vec::new())?;
        self.write(&mut writer)?;
        writer.finish()
    }

    /// What [`GuestState::to_bytes`] wrote.
    ///
    /// # Errors
    /// When it is not exactly that.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SnapshotError> {
        let mut sections = Sections::read_all(bytes)?;
        let state = Self::take(&mut sections)?;
        sections.finish()?;
        Ok(state)
    }

    /// Writes it, a section for each part.
    ///
    /// # Errors
    /// As [`Writer::state`].
    pub fn write<W: Write>(&self, writer: &mut Writer<W>) -> Result<(), SnapshotError> {
        writer.state(0, &self.hardware)?;
        for (index, vcpu) in (0..).zip(&self.vcpus) {
            writer.state(index, vcpu)?;
        }
        writer.kvm(&self.kvm)?;
        writer.state(0, &self.devices.serial)?;
        writer.state(0, &self.devices.power)?;
        writer.state(0, &self.devices.cmos)?;
        for (slot, (transport, device)) in (0..).zip(&self.devices.virtio) {
            writer.state(slot, transport)?;
            writer.device(slot, device)?;
        }
        for (slot, pace) in &self.devices.pace {
            writer.state(*slot, pace)?;
        }
        Ok(())
    }

    /// Takes its sections.
    ///
    /// # Errors
    /// As [`Sections::take`], and when there cannot be such a guest.
    pub fn take(sections: &mut Sections) -> Result<Self, SnapshotError> {
        let hardware: HardwareState = sections.take(0)?;
        hardware.check()?;
        let vcpus = (0..hardware.cpus)
            .map(|index| sections.take(index))
            .collect::<Result<_, _>>()?;
        let kvm = sections.take_kvm()?;
        let devices = DevicesState {
            serial: sections.take(0)?,
            power: sections.take(0)?,
            cmos: sections.take(0)?,
            virtio: (0..)
                .zip(&hardware.devices)
                .map(|(slot, device)| {
                    let kind = kind_of(device)?;
                    Ok((sections.take(slot)?, sections.take_device(kind, slot)?))
                })
                .collect::<Result<_, SnapshotError>>()?,
            pace: sections.take_some(0..hardware.devices.len() as u32)?,
        };
        Ok(Self {
            hardware,
            kvm,
            vcpus,
            devices,
        })
    }
}

fn kind_of(device: &HardwareDevice) -> Result<DeviceKind, SnapshotError> {
    DeviceKind::from_name(&device.kind).ok_or_else(|| SnapshotError::Value {
        section: SectionId {
            kind: SectionKind::Hardware,
            instance: 0,
        },
        what: "the kind of a device",
        value: format!("`{}`", device.kind.escape_debug()),
        allowed: "net, block, console, rng or vsock".into(),
    })
}

/// Guest memory beside the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryState {
    /// Size in bytes.
    pub bytes: u64,
    /// Bytes that share a checksum.
    pub chunk_size: u64,
    /// XXH3 of all checksums.
    pub digest: u64,
}

impl MemoryState {
    /// Version of the type.
    pub const VERSION: u32 = 1;
}
