//! The tracker: one interface to what KVM and the VMM know of dirty pages.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::{VcpuFd, VmFd};
use tandem_devices::GuestMemory;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MmapRegion};

use super::log::Log;
use super::mechanism::{Enabled, Mechanism};
use super::page_set::{PAGE_SIZE, PageSet};
use super::ring::Rings;
use crate::error::Error;
use crate::kvm::vm::Vm;

/// Harvests until a stopped guest must have come to rest: one that finds pages and one that finds
/// none, and the same again for pages that KVM itself wrote when it stopped the vCPUs.
const FINAL_ROUNDS_MAX: u32 = 4;

/// Follows which pages of a guest's memory are written, once started. Shared by who harvests and
/// by the vCPUs' threads, whose rings may be full at any time.
pub struct DirtyTracker {
    memory: Arc<GuestMemory>,
    slots: Vec<Slot>,
    state: Mutex<State>,
}

/// Where a memory slot is.
#[derive(Clone, Copy)]
struct Slot {
    first_frame: u64,
    pages: u64,
}

struct State {
    phase: Phase,
    /// Nothing once the guest was reset.
    kvm: Option<KvmSide>,
    /// Taken from full rings and not harvested yet.
    pending: PageSet,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Off,
    On,
    /// KVM failed, and pages may have been lost. There is no way back.
    Broken,
}

/// What knows of the guest's own writes.
struct KvmSide {
    vm: Arc<Vm>,
    source: Source,
}

enum Source {
    Rings(Rings),
    Log(Log),
}

impl DirtyTracker {
    /// Follows the guest of `vm`, whose vCPUs are `vcpus`, all of them. Off until it is started.
    ///
    /// # Errors
    /// When the rings cannot be mapped.
    pub fn new(
        vm: &Arc<Vm>,
        memory: &Arc<GuestMemory>,
        enabled: &Enabled,
        vcpus: &[VcpuFd],
    ) -> Result<Self, Error> {
        let slots: Vec<Slot> = memory.iter().map(Slot::of).collect();
        let pages_max = slots.iter().map(|s| s.pages as usize).max().unwrap_or(0);
        let source = match enabled.0 {
            Mechanism::Ring { entries } => Source::Rings(Rings::map(vcpus, entries)?),
            Mechanism::Log => Source::Log(Log::new(pages_max)),
        };
        Ok(Self {
            memory: Arc::clone(memory),
            slots,
            state: Mutex::new(State {
                phase: Phase::Off,
                kvm: Some(KvmSide {
                    vm: Arc::clone(vm),
                    source,
                }),
                pending: PageSet::covering(memory),
            }),
        })
    }

    /// An empty set that has room for the pages of this guest.
    pub fn page_set(&self) -> PageSet {
        PageSet::covering(&self.memory)
    }

    /// Starts to follow writes: each one after the return will be in a harvest. The guest may run.
    ///
    /// # Errors
    /// When it was started already or has failed before, or when KVM refuses.
    pub fn start(&self) -> Result<(), Error> {
        let mut state = self.lock();
        match state.phase {
            Phase::Off => {}
            Phase::On => return Err(Error::Internal("dirty tracking was started twice")),
            Phase::Broken => return Err(BROKEN),
        }
        let vm = &state.kvm.as_ref().ok_or(DETACHED)?.vm;
        self.bitmaps().for_each(AtomicBitmap::reset);
        vm.log_writes(true).inspect_err(|_| {
            // The first failure is what is told; a slot that still logs does no harm.
            drop(vm.log_writes(false));
        })?;
        state.pending.clear();
        state.phase = Phase::On;
        Ok(())
    }

    /// Stops following writes and forgets what was not harvested. The guest may run, at full speed
    /// from then on. Nothing happens when it was not started.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn stop(&self) -> Result<(), Error> {
        let mut state = self.lock();
        let Some(kvm) = state.kvm.as_ref().filter(|_| state.phase != Phase::Off) else {
            return Ok(());
        };
        kvm.vm.log_writes(false)?;
        if state.phase == Phase::On {
            // Else the rings would be found full when it is started again.
            self.empty_rings(&mut state)?;
            state.phase = Phase::Off;
        }
        state.pending.clear();
        Ok(())
    }

    /// Lets the virtual machine go, which the guest is done with, whoever still holds the tracker: a
    /// descriptor that is bound to it cannot be bound to the next.
    pub fn detach(&self) {
        self.lock().kvm = None;
    }

    /// Whether the virtual machine is gone.
    pub fn is_detached(&self) -> bool {
        self.lock().kvm.is_none()
    }

    /// Adds to `pages` what was written since the last harvest. The guest may run. See
    /// [the contract](super) for when to read those pages.
    ///
    /// Where the processor itself logs dirty pages, those in its buffers come with a later harvest.
    ///
    /// # Errors
    /// When it was not started, `pages` is for another guest, or KVM fails: then pages were lost,
    /// and so does each later harvest.
    pub fn harvest(&self, pages: &mut PageSet) -> Result<(), Error> {
        self.harvest_locked(&mut self.lock(), pages)
    }

    /// Adds to `pages` all that was written since the last harvest, of a guest whose vCPUs are
    /// parked and saved and whose devices have nothing in flight.
    ///
    /// # Errors
    /// As [`DirtyTracker::harvest`], and when something still writes to guest memory.
    pub fn final_harvest(&self, pages: &mut PageSet) -> Result<(), Error> {
        let mut state = self.lock();
        let mut round = self.page_set();
        for _ in 0..FINAL_ROUNDS_MAX {
            self.harvest_locked(&mut state, &mut round)?;
            if round.is_empty() {
                return Ok(());
            }
            add(pages, &round)?;
            round.clear();
        }
        Err(Error::Internal("a vCPU or device wrote during the pause"))
    }

    /// Forgets what the VMM itself wrote since the last harvest: both know of it.
    pub fn forget_own_writes(&self) {
        self.bitmaps().for_each(AtomicBitmap::reset);
    }

    /// Makes room in the rings; for a vCPU that left the guest since its ring is full.
    ///
    /// # Errors
    /// When KVM fails: then pages were lost, and the vCPU cannot run on.
    pub fn ring_is_full(&self) -> Result<(), Error> {
        let mut state = self.lock();
        if state.phase == Phase::Broken {
            return Err(BROKEN);
        }
        self.empty_rings(&mut state)
    }

    /// Moves what is in the rings to the pending pages.
    fn empty_rings(&self, state: &mut State) -> Result<(), Error> {
        let KvmSide { vm, source } = state.kvm.as_mut().ok_or(DETACHED)?;
        let Source::Rings(rings) = source else {
            return Ok(());
        };
        let result = self.drain_rings(rings, vm.fd(), &mut state.pending);
        if result.is_err() {
            state.phase = Phase::Broken;
        }
        result
    }

    fn harvest_locked(&self, state: &mut State, pages: &mut PageSet) -> Result<(), Error> {
        match state.phase {
            Phase::Off => return Err(Error::Internal("dirty tracking was not started")),
            Phase::On => {}
            Phase::Broken => return Err(BROKEN),
        }
        if pages.limit() < state.pending.limit() {
            return Err(Error::Internal("a set of pages is for another guest"));
        }
        let kvm = state.kvm.as_mut().ok_or(DETACHED)?;
        let result = self
            .take_guest_writes(kvm, pages)
            .and_then(|()| self.take_own_writes(pages))
            .and_then(|()| add(pages, &state.pending));
        state.pending.clear();
        if result.is_err() {
            state.phase = Phase::Broken;
        }
        result
    }

    fn take_guest_writes(&self, kvm: &mut KvmSide, into: &mut PageSet) -> Result<(), Error> {
        match &mut kvm.source {
            Source::Rings(rings) => self.drain_rings(rings, kvm.vm.fd(), into),
            Source::Log(log) => self.read_log(log, kvm.vm.fd(), into),
        }
    }

    fn drain_rings(&self, rings: &mut Rings, vm: &VmFd, into: &mut PageSet) -> Result<(), Error> {
        let mut known = true;
        rings.drain(vm, |slot, page| {
            let frame = self
                .slots
                .get(slot as usize)
                .filter(|s| page < s.pages)
                .map(|s| s.first_frame + page);
            known &= frame.is_some_and(|f| into.insert(f));
        })?;
        check(known)
    }

    fn read_log(&self, log: &mut Log, vm: &VmFd, into: &mut PageSet) -> Result<(), Error> {
        let mut known = true;
        for (number, slot) in (0..).zip(&self.slots) {
            let bits = log.take(vm, number, slot.pages as usize)?;
            known &= into.insert_bits(slot.first_frame, bits);
        }
        check(known)
    }

    fn take_own_writes(&self, into: &mut PageSet) -> Result<(), Error> {
        let mut known = true;
        for (slot, bitmap) in self.slots.iter().zip(self.bitmaps()) {
            known &= into.insert_bits(slot.first_frame, &bitmap.get_and_reset());
        }
        check(known)
    }

    /// The bitmaps of the VMM's own writes, in the order of the slots.
    fn bitmaps(&self) -> impl Iterator<Item = &AtomicBitmap> {
        self.memory.iter().map(|region| {
            let mapping: &MmapRegion<AtomicBitmap> = region;
            mapping.bitmap()
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    fn of(region: &impl GuestMemoryRegion) -> Self {
        Self {
            first_frame: region.start_addr().0 / PAGE_SIZE,
            pages: region.len() / PAGE_SIZE,
        }
    }
}

const BROKEN: Error = Error::Internal("dirty tracking failed before and cannot go on");
const DETACHED: Error = Error::Internal("the guest whose writes were followed is gone");

fn add(pages: &mut PageSet, more: &PageSet) -> Result<(), Error> {
    check(pages.insert_all(more))
}

fn check(known: bool) -> Result<(), Error> {
    if known {
        Ok(())
    } else {
        Err(Error::Internal("a dirty page is outside guest memory"))
    }
}
