//! A vCPU that waits for a damaged chunk inside KVM_RUN can be made to end.

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use kvm_bindings::kvm_regs;
use kvm_ioctls::{Kvm, VcpuFd};
use tandem_devices::GuestMemory;
use tandem_devices::legacy::MachineRequest;
use tandem_devices::virtio::registers::RegisterBank;
use vm_memory::{Bytes, GuestAddress};

use super::sources::{memory, save};
use crate::cpu::PlatformKind;
use crate::dirty::{DirtyTracker, Mechanism};
use crate::kvm::vcpu::{
    ExitHandler, Scheduling, VcpuEnd, VcpuSetup, VcpuThread, install_kick_handler,
};
use crate::kvm::vm::Vm;
use crate::long_mode;
use crate::memory_image::{CHUNK_SIZE, Loader, on_demand_is_available};

const CODE: u64 = CHUNK_SIZE;
/// Where the guest leaves a mark once it has read the damaged chunk.
const MARK: u64 = 2 * CHUNK_SIZE;
const DAMAGED: u64 = 3 * CHUNK_SIZE;
/// Two large pages, and as little as there can be above the hole.
const REGIONS: [(u64, u64); 2] = [(0, 64 * CHUNK_SIZE), (4 << 30, CHUNK_SIZE)];
/// Reads the damaged chunk at rbx, then marks that it did at rbp, then idles.
const PROGRAM: &[u8] = &[
    0x8a, 0x03, // mov (%rbx), %al
    0xc6, 0x45, 0x00, 0x5a, // movb $0x5a, (%rbp)
    0xeb, 0xfe, // jmp .
];

/// Longest wait for something that must happen soon.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long something that must not happen is given to happen.
const A_WHILE: Duration = Duration::from_millis(200);

/// A guest that is about to run [`PROGRAM`].
fn guest() -> Arc<GuestMemory> {
    let memory = memory(REGIONS);
    memory.write_slice(PROGRAM, GuestAddress(CODE)).unwrap();
    long_mode::map(&memory, [0, 2 << 20]);
    // The chunk of the mark and the one that is damaged are stored.
    memory.write_obj(1_u8, GuestAddress(MARK + 1)).unwrap();
    memory.write_obj(1_u8, GuestAddress(DAMAGED)).unwrap();
    memory
}

fn set_registers(kvm: &Kvm, vcpu: &VcpuFd, ring: u8) {
    let regs = kvm_regs {
        rip: CODE,
        rbx: DAMAGED,
        rbp: MARK,
        rflags: 0x2,
        ..Default::default()
    };
    long_mode::begin(kvm, vcpu, ring, &regs);
}

/// Remembers that the vCPU ended because it was asked to.
#[derive(Default)]
struct End(AtomicBool);

impl ExitHandler for End {
    fn port_read(&self, _: u16, _: &mut [u8]) {}
    fn port_write(&self, _: u16, _: &[u8]) -> Option<MachineRequest> {
        None
    }
    fn port_is_blocked(&self, _: u16) -> bool {
        false
    }
    fn mmio_read(&self, _: u64, _: &mut [u8]) {}
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn vcpu_ended(&self, end: VcpuEnd) {
        assert!(matches!(end, VcpuEnd::Asked), "{end:?}");
        self.0.store(true, Ordering::SeqCst);
    }
    fn first_run(&self) {}
}

impl End {
    fn came_within(&self, time: Duration) -> bool {
        let begun = Instant::now();
        while !self.0.load(Ordering::SeqCst) && begun.elapsed() < time {
            thread::sleep(Duration::from_millis(1));
        }
        self.0.load(Ordering::SeqCst)
    }
}

/// Starts to load the guest, with its chunk damaged, and waits until that was found.
fn load_damaged(restored: &Arc<GuestMemory>) -> Loader {
    let (file, sums) = save(&guest());
    file.write_all_at(b"damage", DAMAGED).unwrap();
    let (told, failure) = mpsc::channel();
    let loader = Loader::start(
        file,
        sums,
        Arc::clone(restored),
        Box::new(move |error| told.send(error.to_string()).unwrap()),
    )
    .unwrap();
    let message = failure.recv_timeout(PATIENCE).unwrap();
    assert!(message.starts_with("chunk 3 "), "{message}");
    loader
}

/// In ring 3 hardware runs the guest wherever these tests run; in ring 0, KVM may emulate it.
#[test]
fn it_ends_at_the_kick_or_when_loading_is_stopped() {
    let Ok(kvm) = Kvm::new() else {
        eprintln!("skipped: /dev/kvm cannot be used");
        return;
    };
    if let Err(reason) = on_demand_is_available() {
        eprintln!("skipped: {reason}");
        return;
    }
    install_kick_handler().unwrap();
    for ring in [3, 0] {
        let restored = memory(REGIONS);
        let loader = load_damaged(&restored);
        let vm = Arc::new(Vm::new(&kvm, &restored, &RegisterBank::new(1).unwrap()).unwrap());
        let mechanism = Mechanism::detect(&kvm, PlatformKind::detect()).unwrap();
        let enabled = mechanism.enable(&vm).unwrap();
        let fds = [vm.create_vcpu(0).unwrap()];
        let dirty = DirtyTracker::new(&vm, &restored, &enabled, &fds).unwrap();
        let [fd] = fds;
        set_registers(&kvm, &fd, ring);
        let end = Arc::new(End::default());
        let setup = VcpuSetup {
            handler: end.clone(),
            dirty: Arc::new(dirty),
            traps: None,
            scheduling: Scheduling::default(),
            limit: Arc::default(),
            counters: Arc::default(),
        };
        let vcpu = VcpuThread::start(0, fd, setup).unwrap();
        vcpu.resume();
        assert!(!end.came_within(A_WHILE), "ring {ring}: it waits");
        let mark = || restored.read_obj::<u8>(GuestAddress(MARK)).unwrap();
        assert_eq!(mark(), 0, "ring {ring}: it has not read the damaged chunk");
        vcpu.ask_exit();
        // Where hardware runs it, this is enough; an instruction that KVM emulates goes on waiting.
        end.came_within(A_WHILE);
        assert_eq!(mark(), 0, "ring {ring}: the kick gives it nothing");
        loader.stop();
        assert!(end.came_within(PATIENCE), "ring {ring}: it does not end");
        vcpu.join().unwrap();
        assert_eq!(mark(), 0, "ring {ring}: it went on with zeros");
    }
}
