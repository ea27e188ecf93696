//! Which system calls which threads may make, and what for.
//!
//! A table is a list of rules that belong together; a kind of thread has several. Whoever makes a
//! thread do something new adds its system calls here, with the reason; a test runs guests and
//! finds the rules that nothing needs. What only happens where tests cannot lead it is marked by
//! [`Rule::rare`].

mod api;
mod bucket;
mod devices;
mod kvm;
mod machine;
mod protection;
mod runtime;
mod saving;
mod store;

use syscalls::Sysno;

use super::ThreadKind;
use super::rules::Rule;

/// The tables of a kind of thread.
pub(super) fn of(kind: ThreadKind) -> &'static [&'static [Rule]] {
    match kind {
        // What vCPUs and disks' workers may do is a part of it, since the device loop starts those of
        // a guest that was reset or not taken elsewhere, and a thread cannot shake off the filters of
        // the one that started it.
        ThreadKind::DeviceLoop => &[
            runtime::EVERY_THREAD,
            runtime::STARTS_THREADS,
            devices::RINGS,
            devices::DISK_WRITES,
            devices::WORKER,
            devices::NETWORKS,
            devices::SOCKETS,
            devices::DEVICES,
            devices::STOP_LOADING,
            kvm::INTERRUPTS,
            kvm::VCPU,
            kvm::BUILD,
            kvm::SAVE_VCPU,
            kvm::SAVE_MACHINE,
            kvm::GO_ON,
            kvm::DIRTY_PAGES,
            machine::LOOP,
            machine::RESET,
            machine::END,
            saving::REOPEN,
        ],
        // A vCPU carries out what the guest writes to registers, and so starts, resets and serves
        // devices.
        ThreadKind::Vcpu => &[
            runtime::EVERY_THREAD,
            devices::RINGS,
            devices::DISK_WRITES,
            devices::NETWORKS,
            devices::SOCKETS,
            devices::DEVICES,
            kvm::INTERRUPTS,
            kvm::VCPU,
            kvm::SAVE_VCPU,
            kvm::REPLACE_VCPU,
        ],
        ThreadKind::BlockWorker => &[runtime::EVERY_THREAD, devices::DISK_WRITES, devices::WORKER],
        ThreadKind::MemoryLoader => &[
            runtime::EVERY_THREAD,
            devices::LOADER,
            devices::STOP_LOADING,
        ],
        ThreadKind::Api => &[
            runtime::EVERY_THREAD,
            runtime::STARTS_THREADS,
            api::API,
            saving::SAVING,
            kvm::DIRTY_PAGES,
            kvm::DIRTY_RINGS,
        ],
        // A copy's network devices work on the thread that hears what is for them.
        ThreadKind::Protection => &[
            runtime::EVERY_THREAD,
            runtime::STARTS_THREADS,
            devices::NETWORKS,
            devices::DEVICES,
            kvm::INTERRUPTS,
            saving::SAVING,
            kvm::DIRTY_PAGES,
            kvm::DIRTY_RINGS,
            protection::PAIR,
            protection::ARBITER,
        ],
        ThreadKind::Keeper => &[runtime::EVERY_THREAD, protection::KEEPER],
        ThreadKind::Checkpoints => &[
            runtime::EVERY_THREAD,
            runtime::STARTS_THREADS,
            store::READ,
            store::WRITE,
            store::LOGS,
            kvm::DIRTY_PAGES,
            kvm::DIRTY_RINGS,
        ],
        ThreadKind::StoreLoader => &[
            runtime::EVERY_THREAD,
            devices::LOADER,
            devices::STOP_LOADING,
            store::READ,
        ],
        ThreadKind::Bucket => &[
            runtime::EVERY_THREAD,
            runtime::STARTS_THREADS,
            bucket::NAMES,
            bucket::REQUESTS,
        ],
    }
}

/// System calls that are said not to exist to threads that start others, since there is another way
/// that a filter can look at.
pub const MISSING: &[Sysno] = &[
    // Its flags are in memory; those of `clone` are an argument.
    Sysno::clone3,
    // A new ring could be used past all filters. Disks that are opened again are served by threads.
    Sysno::io_uring_setup,
];
