//! A guest that writes all over its memory, and devices that do so beside it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::kvm_regs;
use kvm_ioctls::{Kvm, VcpuFd};
use tandem_devices::GuestMemory;
use tandem_devices::legacy::MachineRequest;
use tandem_devices::virtio::buffers::Buffers;
use tandem_devices::virtio::registers::RegisterBank;
use vm_memory::{Bytes, GuestAddress};

use crate::dirty::{DirtyTracker, Mechanism};
use crate::kvm::exits::ExitCounters;
use crate::kvm::vcpu::{
    ExitHandler, Scheduling, VcpuEnd, VcpuSetup, VcpuThread, install_kick_handler,
};
use crate::kvm::vm::Vm;
use crate::long_mode;
use crate::until::Until;

const MIB: u64 = 1 << 20;
/// Guest memory: two slots with a hole between them.
pub(crate) const REGIONS: [(u64, u64); 2] = [(0, 16 * MIB), (4096 * MIB, 8 * MIB)];
/// Guest memory that holds neither code nor page tables, as the guest's addresses see it: the
/// second slot follows the first.
const DATA_START: u64 = 2 * MIB;
const DATA_END: u64 = 24 * MIB;
const CODE: u64 = MIB;
/// Where the guest writes: an address with as many bits as the mask after this.
pub(crate) const WINDOW: u64 = 8 * MIB;
/// Longest write of a device in bytes.
const DEVICE_WRITE_MAX: usize = 9_000;

/// Writes the numbers of a xorshift generator (state rax) to places that they name:
/// `[rbx + (rax >> 20 & rbp)]`, with ecx rounds of idling in between.
const SCATTER: &[u8] = &[
    0x48, 0x89, 0xc7, 0x48, 0xc1, 0xe7, 0x0d, 0x48, 0x31, 0xf8, // rax ^= rax << 13
    0x48, 0x89, 0xc7, 0x48, 0xc1, 0xef, 0x07, 0x48, 0x31, 0xf8, // rax ^= rax >> 7
    0x48, 0x89, 0xc7, 0x48, 0xc1, 0xe7, 0x11, 0x48, 0x31, 0xf8, // rax ^= rax << 17
    0x48, 0x89, 0xc7, 0x48, 0xc1, 0xef, 0x14, // mov %rax, %rdi; shr $20, %rdi
    0x48, 0x21, 0xef, 0x48, 0x89, 0x04, 0x3b, // and %rbp, %rdi; mov %rax, (%rbx, %rdi)
    0x89, 0xca, 0xff, 0xca, 0x75, 0xfc, // mov %ecx, %edx; 2: dec %edx; jnz 2b
    0xeb, 0xcc, // jmp to the start
];

/// Writes one word to each page of `rbp` bytes from `rbx` on, forever, as fast as can be.
const SWEEP: &[u8] = &[
    0x48, 0x89, 0xdf, // 1: mov %rbx, %rdi
    0x48, 0x89, 0xea, // mov %rbp, %rdx
    0x48, 0xff, 0xc0, // 2: inc %rax
    0x48, 0x89, 0x07, // mov %rax, (%rdi)
    0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add $4096, %rdi
    0x48, 0x81, 0xea, 0x00, 0x10, 0x00, 0x00, // sub $4096, %rdx
    0x75, 0xea, // jnz 2b
    0xeb, 0xe2, // jmp 1b
];

/// What the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    /// Random places in a window of `mask + 8` bytes, from ring 3.
    Scatter { mask: u64, idle: u32 },
    /// One page after the other in `bytes`, from ring 0.
    Sweep { bytes: u64 },
}

/// A running guest with its tracker.
pub(crate) struct Guest {
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) tracker: Arc<DirtyTracker>,
    /// Until when it may run.
    pub(crate) limit: Arc<Until>,
    counters: Vec<Arc<ExitCounters>>,
    device: Device,
    // Before what they use.
    vcpus: Vec<VcpuThread>,
}

impl Guest {
    /// Builds it, paused; tracking is off.
    pub(crate) fn new(kvm: &Kvm, mechanism: Mechanism, cpus: u8, program: Program) -> Self {
        install_kick_handler().unwrap();
        let ranges = REGIONS.map(|(start, len)| (GuestAddress(start), len as usize));
        let memory = Arc::new(GuestMemory::from_ranges(&ranges).unwrap());
        let vm = Arc::new(Vm::new(kvm, &memory, &RegisterBank::new(1).unwrap()).unwrap());
        let enabled = mechanism.enable(&vm).unwrap();
        let fds: Vec<VcpuFd> = (0..cpus).map(|i| vm.create_vcpu(i).unwrap()).collect();
        let tracker = Arc::new(DirtyTracker::new(&vm, &memory, &enabled, &fds).unwrap());
        write_code_and_tables(&memory, program);
        let limit = Arc::<Until>::default();
        let counters: Vec<Arc<ExitCounters>> = fds.iter().map(|_| Arc::default()).collect();
        let vcpus = (0..)
            .zip(fds)
            .zip(&counters)
            .map(|((index, fd), counters)| {
                set_registers(kvm, &fd, program, index);
                let setup = VcpuSetup {
                    handler: Arc::new(NoDevices),
                    dirty: Arc::clone(&tracker),
                    traps: None,
                    scheduling: Scheduling::default(),
                    limit: Arc::clone(&limit),
                    counters: Arc::clone(counters),
                };
                VcpuThread::start(index, fd, setup).unwrap()
            });
        Self {
            vcpus: vcpus.collect(),
            device: Device::start(&memory),
            memory,
            tracker,
            limit,
            counters,
        }
    }

    /// Lets vCPUs and device run.
    pub(crate) fn resume(&self) {
        self.vcpus.iter().for_each(VcpuThread::resume);
    }

    /// Stops the vCPUs, and the device for as long as the guard lives.
    pub(crate) fn pause(&self) -> MutexGuard<'_, ()> {
        self.vcpus.iter().for_each(VcpuThread::ask_pause);
        self.vcpus.iter().for_each(VcpuThread::wait_parked);
        self.device.busy.lock().unwrap()
    }

    /// How often a full ring took a vCPU out of the guest.
    pub(crate) fn full_rings(&self) -> u64 {
        self.counters
            .iter()
            .map(|c| c.by_name()["dirty_ring_full"])
            .sum()
    }
}

/// A device that writes to guest memory whenever it likes, as a worker thread of a disk does.
struct Device {
    /// Held during a write.
    busy: Arc<Mutex<()>>,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Device {
    fn start(memory: &Arc<GuestMemory>) -> Self {
        let busy = Arc::new(Mutex::new(()));
        let end = Arc::new(AtomicBool::new(false));
        let (memory, lock, stop) = (Arc::clone(memory), Arc::clone(&busy), Arc::clone(&end));
        let thread = std::thread::spawn(move || {
            let mut seed = 88_172_645_463_325_252;
            while !stop.load(Ordering::SeqCst) {
                let guard = lock.lock().unwrap();
                write_as_device(&memory, xorshift(&mut seed));
                drop(guard);
                std::thread::sleep(Duration::from_micros(seed % 200));
            }
        });
        Self {
            busy,
            end,
            thread: Some(thread),
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.end.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

fn xorshift(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Writes, as `choice` says, through one or two buffers of a request.
pub(crate) fn write_as_device(memory: &Arc<GuestMemory>, choice: u64) {
    let mut seed = choice | 1;
    let bytes = vec![choice as u8; 1 + xorshift(&mut seed) as usize % DEVICE_WRITE_MAX];
    let (first, second) = bytes.split_at(bytes.len() / 2);
    let mut buffers = Buffers::new(memory);
    for part in [first, second] {
        let at = data_address(xorshift(&mut seed), part.len());
        assert!(buffers.push(at, part.len()));
    }
    assert_eq!(buffers.write_at(0, &bytes), bytes.len());
}

/// Writes, as `choice` says, the way that queues are written.
pub(crate) fn write_directly(memory: &GuestMemory, choice: u64) {
    let mut seed = choice | 1;
    let at = data_address(xorshift(&mut seed), size_of::<u64>());
    memory.write_obj(choice, at).unwrap();
}

/// Somewhere in guest memory where `len` bytes may be overwritten.
fn data_address(choice: u64, len: usize) -> GuestAddress {
    let linear = DATA_START + choice % (DATA_END - DATA_START);
    let (index, at) = match linear.checked_sub(REGIONS[0].1) {
        None => (0, linear),
        Some(at) => (1, at),
    };
    let (start, size) = REGIONS[index];
    GuestAddress(start + at.min(size - len as u64))
}

fn write_code_and_tables(memory: &GuestMemory, program: Program) {
    let code = match program {
        Program::Scatter { .. } => SCATTER,
        Program::Sweep { .. } => SWEEP,
    };
    memory.write_slice(code, GuestAddress(CODE)).unwrap();
    let frames = REGIONS
        .iter()
        .flat_map(|(start, len)| (*start..start + len).step_by(2 * MIB as usize));
    long_mode::map(memory, frames);
}

fn set_registers(kvm: &Kvm, vcpu: &VcpuFd, program: Program, index: u8) {
    let ring = if matches!(program, Program::Sweep { .. }) {
        0
    } else {
        3
    };
    let mut regs = kvm_regs {
        rip: CODE,
        rax: 0x1234_5678_9abc_def1 + u64::from(index),
        rbx: WINDOW,
        rflags: 0x2,
        ..Default::default()
    };
    match program {
        Program::Scatter { mask, idle } => {
            regs.rflags |= 0x200;
            regs.rbp = mask;
            regs.rcx = idle.into();
        }
        Program::Sweep { bytes } => regs.rbp = bytes,
    }
    long_mode::begin(kvm, vcpu, ring, &regs);
}

/// The guest only writes memory.
struct NoDevices;

impl ExitHandler for NoDevices {
    fn port_read(&self, port: u16, _: &mut [u8]) {
        panic!("the guest reads port {port:#x}");
    }

    fn port_write(&self, port: u16, _: &[u8]) -> Option<MachineRequest> {
        panic!("the guest writes port {port:#x}");
    }

    fn port_is_blocked(&self, _: u16) -> bool {
        false
    }

    fn mmio_read(&self, address: u64, _: &mut [u8]) {
        panic!("the guest reads {address:#x}");
    }

    fn mmio_write(&self, address: u64, _: &[u8]) {
        panic!("the guest writes {address:#x}");
    }

    fn vcpu_ended(&self, end: VcpuEnd) {
        assert!(matches!(end, VcpuEnd::Asked), "a vCPU ended: {end:?}");
    }

    fn first_run(&self) {}
}
