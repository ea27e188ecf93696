//! Whatever is not exactly what was written is an error, and what was written comes back.
#![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

use std::io;

use proptest::array::uniform32;
use proptest::collection::vec;
use proptest::prelude::*;
use tandem_devices::pace::{PaceState, PacedQueueState, WaitingState};
use tandem_devices::state::{
    BlockState, CmosState, ConsoleState, DeviceState, NetState, PmState, QueueState, RngState,
    SerialState, TransportState, VsockState,
};
use tandem_devices::virtio::DeviceKind;

use super::*;
use crate::kvm::state::{
    ChannelState, ClockState, CpuidEntry, DebugState, EventsState, ExceptionState, IoapicState,
    IrqchipState, KvmState, NmiState, PicState, PitState, RegistersState, SegmentState,
    SystemState, VcpuState,
};

fn write(states: impl FnOnce(&mut Writer<Vec<u8>>) -> Result<(), SnapshotError>) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new()).unwrap();
    states(&mut writer).unwrap();
    writer.finish().unwrap()
}

fn small() -> Vec<u8> {
    write(|to| {
        to.state(0, &CmosState { index: 7 })?;
        to.state(
            0,
            &PmState {
                status: 0,
                enable: 0x100,
            },
        )?;
        to.state(
            3,
            &ConsoleState {
                written: 5,
                columns: 80,
                rows: 25,
            },
        )
    })
}

/// Reads everything of [`small`], as a restore does.
fn restore_small(bytes: &[u8]) -> Result<(), SnapshotError> {
    let mut sections = Sections::read_all(bytes)?;
    let cmos: CmosState = sections.take(0)?;
    let pm: PmState = sections.take(0)?;
    let console: ConsoleState = sections.take(3)?;
    sections.finish()?;
    assert_eq!((cmos.index, pm.enable, console.rows), (7, 0x100, 25));
    Ok(())
}

#[test]
fn every_flipped_bit_is_found() {
    let bytes = small();
    restore_small(&bytes).unwrap();
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(restore_small(&flipped).is_err(), "bit {bit}");
    }
}

#[test]
fn every_truncation_is_found() {
    let bytes = small();
    for length in 0..bytes.len() {
        let error = restore_small(&bytes[..length]).unwrap_err();
        assert!(
            matches!(error, SnapshotError::Truncated { .. }),
            "{length}: {error}"
        );
    }
    let mut longer = bytes;
    longer.push(0);
    let error = restore_small(&longer).unwrap_err();
    assert!(matches!(error, SnapshotError::Trailing), "{error}");
}

/// Where the sections of [`small`] begin, and where they end.
fn bounds(bytes: &[u8]) -> Vec<usize> {
    let mut at = 12;
    let mut bounds = vec![at];
    while at < bytes.len() {
        let length = u32::from_le_bytes(bytes[at + 24..at + 28].try_into().unwrap());
        at += 28 + length as usize + 8;
        bounds.push(at);
    }
    bounds
}

#[test]
fn sections_that_are_gone_doubled_or_moved_are_found() {
    let bytes = small();
    let at = bounds(&bytes);
    let section = |i: usize| &bytes[at[i]..at[i + 1]];
    let header = &bytes[..12];
    let gone = [header, section(0), section(2), section(3)].concat();
    let moved = [header, section(1), section(0), section(2), section(3)].concat();
    for damaged in [gone, moved] {
        let error = restore_small(&damaged).unwrap_err();
        assert!(matches!(error, SnapshotError::WholeDamaged), "{error}");
    }
    let twice = [header, section(0), section(0), section(2), section(3)].concat();
    let error = restore_small(&twice).unwrap_err().to_string();
    assert_eq!(error, "section cmos 0 is there twice");
}

#[test]
fn errors_name_section_and_cause() {
    let mut sections = Sections::read_all(&small()[..]).unwrap();
    let missing = sections.take::<CmosState>(1).unwrap_err().to_string();
    assert_eq!(missing, "section cmos 1 is missing");
    sections.take::<CmosState>(0).unwrap();
    sections.take::<PmState>(0).unwrap();
    let left = sections.finish().unwrap_err().to_string();
    assert_eq!(
        left,
        "section virtio-console 3 is left over: nothing here belongs to it"
    );
    let bytes = small();
    let mut flipped = bytes.clone();
    flipped[bounds(&bytes)[2] + 30] ^= 1;
    let damaged = restore_small(&flipped).unwrap_err().to_string();
    assert_eq!(
        damaged,
        "section virtio-console 3 is damaged: its checksum is another"
    );
    let cut = restore_small(&bytes[..bounds(&bytes)[1] + 30])
        .unwrap_err()
        .to_string();
    assert_eq!(cut, "saved state is cut off in section power 0");
    let mut renamed = bytes.clone();
    renamed[12] = b'C';
    let unknown = restore_small(&renamed).unwrap_err().to_string();
    assert_eq!(unknown, "saved state has an unknown section `Cmos`");
    let mut newer = bytes;
    newer[8] = 9;
    let format = restore_small(&newer).unwrap_err().to_string();
    assert_eq!(format, "saved state has format version 9; allowed is 1");
}

/// Other types that stand in the section of [`CmosState`].
mod strange {
    use serde::{Deserialize, Serialize};

    use super::*;

    macro_rules! stands_for_cmos {
        ($name:ident, $version:literal, { $($field:ident: $type:ty),* }) => {
            #[derive(Serialize, Deserialize, Default)]
            pub(super) struct $name { $(pub(super) $field: $type),* }
            impl Saved for $name {
                const KIND: SectionKind = SectionKind::Cmos;
                const VERSION: u32 = $version;
            }
        };
    }

    stands_for_cmos!(Newer, 2, { index: u8 });
    stands_for_cmos!(FieldMore, 1, { index: u8, banks: u8 });
    stands_for_cmos!(FieldLess, 1, {});
    stands_for_cmos!(Wider, 1, { index: u32 });
    stands_for_cmos!(Long, 1, { bytes: Vec<u8> });
}

fn read_as_cmos<T: Saved + Default>(change: impl FnOnce(&mut T)) -> String {
    let mut state = T::default();
    change(&mut state);
    let bytes = write(|to| to.state(0, &state));
    let mut sections = Sections::read_all(&bytes[..]).unwrap();
    sections.take::<CmosState>(0).unwrap_err().to_string()
}

#[test]
fn other_versions_and_fields_are_refused() {
    let newer = read_as_cmos::<strange::Newer>(|_| ());
    assert_eq!(newer, "section cmos 0 has version 2; allowed is 1");
    let more = read_as_cmos::<strange::FieldMore>(|_| ());
    assert!(more.contains("unknown field `banks`"), "{more}");
    let less = read_as_cmos::<strange::FieldLess>(|_| ());
    assert!(less.contains("missing field `index`"), "{less}");
    let wider = read_as_cmos::<strange::Wider>(|s| s.index = 256);
    assert!(
        wider.starts_with("section cmos 0 cannot be understood"),
        "{wider}"
    );
}

/// What a paced disk holds back: one completion of some tens of milliseconds.
fn pace() -> PaceState {
    let waiting = WaitingState {
        remaining_ns: 30_000_000,
        entries: vec![(7, 4097), (9, 1)],
    };
    let queue = PacedQueueState {
        queue: 0,
        busy_ns: 5,
        head: 1 << 40,
        waiting: vec![waiting],
    };
    PaceState::new("hdd+safepoints:halted".parse().unwrap(), vec![queue])
}

#[test]
fn only_devices_that_are_paced_have_a_section_of_it() {
    let bytes = write(|to| {
        to.state(1, &pace())?;
        to.state(3, &pace())
    });
    let mut sections = Sections::read_all(&bytes[..]).unwrap();
    let some: Vec<(u32, PaceState)> = sections.take_some(0..3).unwrap();
    assert_eq!(some, [(1, pace())]);
    let left = sections.finish().unwrap_err();
    assert!(matches!(left, SnapshotError::LeftOver { .. }), "{left}");
}

#[test]
fn limits_are_kept_when_writing_and_reading() {
    let long = strange::Long {
        bytes: vec![200; SECTION_LENGTH_MAX as usize],
    };
    let mut writer = Writer::new(Vec::new()).unwrap();
    let error = writer.state(0, &long).unwrap_err();
    assert!(matches!(error, SnapshotError::TooLong { .. }), "{error}");
    let mut writer = Writer::new(io::sink()).unwrap();
    let mut written = 0;
    let error = loop {
        match writer.state(written, &CmosState { index: 0 }) {
            Ok(()) => written += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, SnapshotError::TooLarge), "{error}");
    assert_eq!(written, SECTIONS_MAX);
    // A length that was never written is not believed, and nothing is allocated for it.
    let mut bytes = small();
    bytes[36..40].copy_from_slice(&u32::MAX.to_le_bytes());
    let error = Sections::read_all(&bytes[..]).err().unwrap();
    assert!(matches!(error, SnapshotError::TooLong { .. }), "{error}");
}

#[test]
fn a_stream_that_fails_is_told_from_damage() {
    struct Broken;
    impl io::Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::ErrorKind::ConnectionReset.into())
        }
    }
    impl io::Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let error = Sections::read(Broken).err().unwrap();
    assert!(matches!(error, SnapshotError::Read { .. }), "{error}");
    let error = Writer::new(Broken).err().unwrap();
    assert!(matches!(error, SnapshotError::Write { .. }), "{error}");
}

prop_compose! {
    fn segment()(base: u64, limit: u32, selector: u16, kind: u8, bits: [u8; 8]) -> SegmentState {
        let [present, dpl, db, s, l, g, avl, unusable] = bits;
        SegmentState { base, limit, selector, kind, present, dpl, db, s, l, g, avl, unusable }
    }
}

prop_compose! {
    fn vcpu()(
        cpuid in vec(any::<[u32; 7]>(), 0..80),
        tsc_khz: Option<u32>,
        mp_state: u32,
        numbers: [u64; 6],
        segment in segment(),
        xcrs in vec(any::<(u32, u64)>(), 0..3),
        db: [u64; 4],
        xsave in vec(any::<u8>(), 0..5000),
        lapic in vec(any::<u8>(), 1024),
        msrs in vec(any::<(u32, u64)>(), 0..300),
        exception: (u8, u8, u8, u8, u32),
        exception_payload: Option<u64>,
    ) -> VcpuState {
        let entry = |[leaf, index, flags, eax, ebx, ecx, edx]: [u32; 7]| CpuidEntry {
            leaf, index, flags, eax, ebx, ecx, edx,
        };
        let [rax, rip, cr3, efer, dr7, last] = numbers;
        let (injected, vector, has_error_code, pending, error_code) = exception;
        VcpuState {
            cpuid: cpuid.into_iter().map(entry).collect(),
            tsc_khz,
            mp_state,
            registers: RegistersState { rax, rip, ..Default::default() },
            system: SystemState {
                cs: segment,
                tr: segment,
                cr3,
                efer,
                interrupt_bitmap: [0, 0, 0, last],
                ..Default::default()
            },
            xcrs,
            debug: DebugState { db, dr6: last, dr7 },
            xsave,
            lapic,
            msrs,
            events: EventsState {
                exception: ExceptionState { injected, vector, has_error_code, pending, error_code },
                exception_payload,
                nmi: NmiState { injected, pending: vector, masked: pending },
                ..Default::default()
            },
        }
    }
}

prop_compose! {
    fn kvm()(irr: u8, imr: u8, base_address: u64, redirection in vec(any::<u64>(), 24), count: u32, flags: u32, ns: u64, realtime_ns: Option<u64>) -> KvmState {
        let channel = ChannelState { count, ..Default::default() };
        let mut ioapic = IoapicState { base_address, ..Default::default() };
        ioapic.redirection.copy_from_slice(&redirection);
        let pic = PicState { irr, imr, ..Default::default() };
        KvmState {
            irqchip: IrqchipState { primary: pic, secondary: pic, ioapic },
            pit: PitState { channels: [channel; 3], flags },
            clock: ClockState { ns, realtime_ns, host_tsc: realtime_ns },
        }
    }
}

prop_compose! {
    fn transport()(words: [u32; 6], active: bool, driver_features: u64, queues in vec(any::<([u16; 6], [u64; 3], bool)>(), 0..4)) -> TransportState {
        let [device_id, status, device_features_sel, driver_features_sel, queue_sel, interrupt_status] = words;
        let queue = |(small, [descriptors, available, used], ready): ([u16; 6], [u64; 3], bool)| {
            let [max_size, size, next_available, next_used, announced, refused] = small;
            QueueState {
                max_size, size, ready, descriptors, available, used, next_available, next_used,
                refused: refused as u8, unannounced: ready, announced,
            }
        };
        TransportState {
            device_id, status, active, device_features_sel, driver_features_sel, driver_features,
            queue_sel, interrupt_status, config_generation: status,
            queues: queues.into_iter().map(queue).collect(),
        }
    }
}

fn device() -> impl Strategy<Value = DeviceState> {
    prop_oneof![
        any::<(u64, u32, bool)>().prop_map(|(sectors, block_size, readonly)| {
            DeviceState::Block(BlockState {
                sectors,
                block_size,
                readonly,
            })
        }),
        any::<([u8; 6], u16, bool)>().prop_map(|(mac, mtu, link_up)| DeviceState::Net(NetState {
            mac,
            mtu,
            link_up
        })),
        any::<(u64, u16, u16)>().prop_map(|(written, columns, rows)| {
            DeviceState::Console(ConsoleState {
                written,
                columns,
                rows,
            })
        }),
        (uniform32(any::<u8>()), any::<u64>())
            .prop_map(|(seed, position)| DeviceState::Rng(RngState { seed, position })),
        any::<(u64, bool)>().prop_map(|(guest_cid, connections_lost)| {
            DeviceState::Vsock(VsockState {
                guest_cid,
                connections_lost,
            })
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn states_come_back(
        vcpus in vec(vcpu(), 1..3),
        kvm in kvm(),
        transport in transport(),
        device in device(),
        bytes in vec(any::<u8>(), 0..100),
    ) {
        let serial = SerialState {
            divisor: 1, interrupt_enable: 2, interrupt_identification: 3, line_control: 4,
            line_status: 5, modem_control: 6, modem_status: 7, scratch: 8,
            fifo: bytes.clone(), waiting: bytes,
        };
        let written = write(|to| {
            to.kvm(&kvm)?;
            for (number, vcpu) in (0..).zip(&vcpus) {
                to.state(number, vcpu)?;
            }
            to.state(0, &serial)?;
            to.state(5, &transport)?;
            to.device(5, &device)
        });
        let mut sections = Sections::read_all(&written[..]).unwrap();
        prop_assert_eq!(sections.take_device(device.kind(), 5).unwrap(), device);
        prop_assert_eq!(sections.take::<TransportState>(5).unwrap(), transport);
        prop_assert_eq!(sections.take::<SerialState>(0).unwrap(), serial);
        for (number, vcpu) in (0..).zip(&vcpus) {
            prop_assert_eq!(&sections.take::<VcpuState>(number).unwrap(), vcpu);
        }
        prop_assert_eq!(sections.take_kvm().unwrap(), kvm);
        prop_assert!(sections.finish().is_ok());
    }

    /// Any change of any bytes is found, wherever it is.
    #[test]
    fn damage_is_found(vcpu in vcpu(), at: prop::sample::Index, change in 1u8.., cut: bool) {
        let mut bytes = write(|to| to.state(0, &vcpu));
        let at = at.index(bytes.len());
        if cut {
            bytes.truncate(at);
        } else {
            bytes[at] ^= change;
        }
        prop_assert!(Sections::read_all(&bytes[..]).is_err());
    }

    /// Payloads are not trusted even when the checksums are right.
    #[test]
    fn nonsense_is_refused_or_read_but_never_a_panic(bytes in vec(any::<u8>(), 0..300)) {
        let section = SectionId { kind: SectionKind::Vcpu, instance: 0 };
        drop(codec::decode::<VcpuState>(section, &bytes));
        drop(codec::decode::<TransportState>(section, &bytes));
        drop(codec::decode::<RngState>(section, &bytes));
        drop(Sections::read_all(&bytes[..]));
    }

    #[test]
    fn a_damaged_payload_is_refused_or_another_state(vcpu in vcpu(), at: prop::sample::Index, change in 1u8..) {
        let section = SectionId { kind: SectionKind::Vcpu, instance: 0 };
        let mut bytes = Vec::new();
        codec::encode(section, &vcpu, &mut bytes).unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= change;
        drop(codec::decode::<VcpuState>(section, &bytes));
    }
}

#[test]
fn the_kind_of_a_device_decides_its_section() {
    let state = DeviceState::Vsock(VsockState {
        guest_cid: 3,
        connections_lost: true,
    });
    let bytes = write(|to| to.device(1, &state));
    let mut sections = Sections::read_all(&bytes[..]).unwrap();
    let other = sections.take_device(DeviceKind::Block, 1).unwrap_err();
    assert_eq!(other.to_string(), "section virtio-block 1 is missing");
    assert_eq!(sections.take_device(DeviceKind::Vsock, 1).unwrap(), state);
}
