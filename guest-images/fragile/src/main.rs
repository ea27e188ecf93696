//! Guest with an old driver: its interrupt handler enables interrupts before it is done, and its
//! stack has room for a few handlers only. Completions that come faster than it can serve them
//! kill it.
#![no_std]
#![no_main]
#![allow(unsafe_code)]
// UNSAFETY: an interrupt handler of its own, in ring 0, and buffers that a device writes.

extern crate alloc;

use core::arch::{global_asm, x86_64::_rdtsc};
use core::sync::atomic::{
    AtomicU16, AtomicU64,
    Ordering::{Relaxed, SeqCst},
};

use alloc::boxed::Box;
use alloc::vec;
use rt::virtio::blk::BLOCK_BYTES;
use rt::virtio::queue::{Part, Queue};
use rt::virtio::{DeviceType, Transport, discovery};
use rt::{args, clock, irq, port, power, println};

rt::entry!(main);

/// Interrupt acknowledgement and queue notification of virtio-mmio (VIRTIO 1.2, 4.2.2).
const INTERRUPT_ACK: u64 = 0x64;
const QUEUE_NOTIFY: u64 = 0x50;
/// Bytes of the handlers' stack that they may use.
const STACK_BYTES: u64 = 3072;
/// How long the clock of the processor is measured, in microseconds.
const MEASURE_US: u64 = 20_000;
/// Where PCs show how far their start is; a write leaves the guest, and has no effect.
const HARMLESS_PORT: u16 = 0x80;
/// A report's stack.
const REPORT_STACK: usize = 16 << 10;
const READ: u32 = 0;

/// What handler and program share.
#[repr(C)]
struct State {
    /// Lowest address that the handlers' stack may reach.
    floor: AtomicU64,
    depth: AtomicU64,
    deepest: AtomicU64,
    /// Completions so far.
    done: AtomicU64,
    /// Requests that are not made yet.
    left: AtomicU64,
    /// Addresses of registers, and of the available index.
    acknowledge: AtomicU64,
    notify: AtomicU64,
    available: AtomicU64,
    /// How long a handler takes, by the processor's clock.
    service: AtomicU64,
    /// Bit of the interrupt line.
    line: AtomicU64,
    /// Top of the report's stack.
    stack: AtomicU64,
}

static STATE: State = State {
    floor: AtomicU64::new(0),
    depth: AtomicU64::new(0),
    deepest: AtomicU64::new(0),
    done: AtomicU64::new(0),
    left: AtomicU64::new(0),
    acknowledge: AtomicU64::new(0),
    notify: AtomicU64::new(0),
    available: AtomicU64::new(0),
    service: AtomicU64::new(0),
    line: AtomicU64::new(0),
    stack: AtomicU64::new(0),
};

global_asm!(
    include_str!("handler.s"),
    state = sym STATE,
    report = sym report,
    floor = const core::mem::offset_of!(State, floor),
    depth = const core::mem::offset_of!(State, depth),
    deepest = const core::mem::offset_of!(State, deepest),
    done = const core::mem::offset_of!(State, done),
    left = const core::mem::offset_of!(State, left),
    acknowledge = const core::mem::offset_of!(State, acknowledge),
    notify = const core::mem::offset_of!(State, notify),
    available = const core::mem::offset_of!(State, available),
    service = const core::mem::offset_of!(State, service),
    line = const core::mem::offset_of!(State, line),
    stack = const core::mem::offset_of!(State, stack),
);

unsafe extern "C" {
    static fragile_handler: u8;
    static boot_tss: u8;
    static mut boot_idt: [u64; 128];
}

fn main() {
    println!("fragile: start");
    let operations = args().get("ops", 200u64).max(1);
    let service_us = args().get("service-us", 3_000u64);
    let busy = args().flag("busy");
    let transport = discovery::find(DeviceType::Block, 0).unwrap_or_else(|error| panic!("{error}"));
    let mut queue = open(&transport);
    prepare(&transport, &queue, operations, service_us);
    let line = transport.start();
    STATE.line.store(1 << line.number(), SeqCst);
    install(line);
    println!("fragile: ready");
    add_request(&mut queue);
    transport.kick(&mut queue);
    loop {
        // Before the look, or the last interrupt could be missed.
        line.take();
        if STATE.done.load(SeqCst) >= operations && STATE.depth.load(SeqCst) == 0 {
            break;
        }
        if busy {
            port::write_u8(HARMLESS_PORT, 0);
        } else {
            irq::wait();
        }
    }
    let deepest = STATE.deepest.load(SeqCst);
    println!("fragile: done {operations} deepest {deepest}");
    while args().flag("stay") {
        clock::wait_until(None);
    }
}

/// A queue without event index and indirect descriptors, as old drivers have it.
fn open(transport: &Transport) -> Queue {
    let opened = transport
        .negotiate(0)
        .and_then(|features| transport.queue(0, 4, features));
    opened.unwrap_or_else(|error| panic!("{error}"))
}

fn prepare(transport: &Transport, queue: &Queue, operations: u64, service_us: u64) {
    let [_, available, _] = queue.addresses();
    let stack = Box::leak(vec![0u8; REPORT_STACK].into_boxed_slice());
    let top = stack.as_ptr() as u64 + REPORT_STACK as u64;
    // SAFETY: rsp0 of the task state is at byte 4, which nobody changes.
    let ring0_top = unsafe { (&raw const boot_tss).add(4).cast::<u64>().read_unaligned() };
    STATE.floor.store(ring0_top - STACK_BYTES, SeqCst);
    STATE.left.store(operations - 1, SeqCst);
    STATE.available.store(available + 2, SeqCst);
    STATE
        .acknowledge
        .store(transport.base() + INTERRUPT_ACK, SeqCst);
    STATE.notify.store(transport.base() + QUEUE_NOTIFY, SeqCst);
    STATE.service.store(service_us * ticks_per_us(), SeqCst);
    // As a function finds it that was called: eight below a multiple of sixteen.
    STATE.stack.store((top & !15) - 8, SeqCst);
}

/// Speed of the processor's clock.
fn ticks_per_us() -> u64 {
    let ticks = || {
        // SAFETY: every 64-bit processor has it.
        unsafe { _rdtsc() }
    };
    let (from, begin) = (clock::now(), ticks());
    while clock::now() < from + MEASURE_US {}
    ((ticks() - begin) / (clock::now() - from)).max(1)
}

/// Lets the handler take the line's interrupts.
fn install(line: irq::Line) {
    let entry = 2 * line.vector() as usize;
    let address = (&raw const fragile_handler) as u64;
    // Interrupt gate of ring 0, present.
    let gate = address & 0xffff | 8 << 16 | 0x8e00 << 32 | (address >> 16 & 0xffff) << 48;
    // SAFETY: the entry is the line's, and no interrupt comes before the first request.
    unsafe {
        (&raw mut boot_idt)
            .cast::<u64>()
            .add(entry)
            .write_volatile(gate);
    };
}

/// Adds a read, and has every entry of the available ring name it: whoever moves the index makes
/// it once more.
fn add_request(queue: &mut Queue) {
    let header = Box::leak(Box::new([READ, 0, 0, 0]));
    let data = Box::leak(vec![0u8; BLOCK_BYTES].into_boxed_slice());
    let status = Box::leak(Box::new(0xff_u8));
    let part = |address: u64, len: usize, device_writes| Part {
        address,
        len: len as u32,
        device_writes,
    };
    let parts = [
        part(header.as_ptr() as u64, 16, false),
        part(data.as_ptr() as u64, BLOCK_BYTES, true),
        part(&raw const *status as u64, 1, true),
    ];
    // SAFETY: the buffers are leaked, and nobody looks at them.
    let head = unsafe { queue.add(&parts) }.unwrap_or_else(|| panic!("The queue is full."));
    let [_, available, _] = queue.addresses();
    for slot in 0..u64::from(queue.size()) {
        let at = (available + 4 + 2 * slot) as *mut u16;
        // SAFETY: an entry of the ring, aligned, which the device only reads.
        unsafe { AtomicU16::from_ptr(at) }.store(head, Relaxed);
    }
}

/// Says what happened; ring 0 continues here when its stack is full.
extern "C" fn report() -> ! {
    let (depth, done) = (STATE.depth.load(SeqCst), STATE.done.load(SeqCst));
    println!("PANIC: {depth} interrupt handlers overflowed their stack after {done} completions");
    power::off()
}
