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

/// Who may follow a guest's writes at a time: a copy of the guest, and saves of it.
pub const FOLLOWERS_MAX: usize = 4;

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
    followers: Vec<Pending>,
    /// Followers so far.
    numbered: u64,
}

/// What a follower has not harvested yet of what was taken: from full rings, or when another one harvested.
struct Pending {
    follower: u64,
    pages: PageSet,
}

impl State {
    /// Adds pages to what is pending for all followers but one.
    fn add_for_others(&mut self, follower: u64, pages: &PageSet) -> Result<(), Error> {
        let mut others = self.followers.iter_mut().filter(|p| p.follower != follower);
        others.try_for_each(|other| add(&mut other.pages, pages))
    }
}

/// One who follows a guest's writes from when it began to. It is told of each on its own, whoever else harvests.
#[derive(Clone)]
pub struct Follower {
    tracker: Arc<DirtyTracker>,
    number: u64,
}

impl Follower {
    /// An empty set that has room for the pages of this guest.
    pub fn page_set(&self) -> PageSet {
        self.tracker.page_set()
    }

    /// Adds to `pages` what was written since the last harvest. The guest may run. See
    /// [the contract](super) for when to read those pages.
    ///
    /// Where the processor itself logs dirty pages, those in its buffers come with a later harvest.
    ///
    /// # Errors
    /// When it was stopped, `pages` is for another guest, or KVM fails: then pages were lost,
    /// and so does each later harvest.
    pub fn harvest(&self, pages: &mut PageSet) -> Result<(), Error> {
        let mut state = self.tracker.lock();
        self.tracker
            .harvest_locked(&mut state, self.number, pages)
            .map(drop)
    }

    /// Adds to `pages` all that was written since the last harvest, of a guest whose vCPUs are
    /// parked and saved and whose devices have nothing in flight.
    ///
    /// # Errors
    /// As [`Follower::harvest`], and when something still writes to guest memory.
    pub fn final_harvest(&self, pages: &mut PageSet) -> Result<(), Error> {
        let mut state = self.tracker.lock();
        for _ in 0..FINAL_ROUNDS_MAX {
            if !self
                .tracker
                .harvest_locked(&mut state, self.number, pages)?
            {
                return Ok(());
            }
        }
        Err(Error::Internal("a vCPU or device wrote during the pause"))
    }

    /// Forgets what the VMM itself wrote since the last harvest, of which this follower knows.
    ///
    /// # Errors
    /// When a page is none of this guest's.
    pub fn forget_own_writes(&self) -> Result<(), Error> {
        let tracker = &self.tracker;
        let mut state = tracker.lock();
        if state.followers.len() <= 1 {
            tracker.bitmaps().for_each(AtomicBitmap::reset);
            return Ok(());
        }
        let mut own = tracker.page_set();
        tracker.take_own_writes(&mut own)?;
        state.add_for_others(self.number, &own)
    }

    /// Follows writes no longer, and forgets what was not harvested. The guest may run, at full speed from then on
    /// if nobody else follows it. Nothing happens the second time.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn stop(&self) -> Result<(), Error> {
        self.tracker.stop(self.number)
    }

    /// Whether the virtual machine is gone.
    pub fn is_detached(&self) -> bool {
        self.tracker.lock().kvm.is_none()
    }
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
                followers: Vec::new(),
                numbered: 0,
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
    /// When [`FOLLOWERS_MAX`] do already, when it has failed before, or when KVM refuses.
    pub fn follow(self: &Arc<Self>) -> Result<Follower, Error> {
        let mut state = self.lock();
        if state.followers.len() >= FOLLOWERS_MAX {
            return Err(Error::Internal("too many follow the guest's writes"));
        }
        match state.phase {
            Phase::Off => self.start(&mut state)?,
            Phase::On => self.share_out(&mut state)?,
            Phase::Broken => return Err(BROKEN),
        }
        state.numbered += 1;
        let number = state.numbered;
        state.followers.push(Pending {
            follower: number,
            pages: self.page_set(),
        });
        Ok(Follower {
            tracker: Arc::clone(self),
            number,
        })
    }

    fn start(&self, state: &mut State) -> Result<(), Error> {
        let vm = &state.kvm.as_ref().ok_or(DETACHED)?.vm;
        self.bitmaps().for_each(AtomicBitmap::reset);
        vm.log_writes(true).inspect_err(|_| {
            // The first failure is what is told; a slot that still logs does no harm.
            drop(vm.log_writes(false));
        })?;
        state.phase = Phase::On;
        Ok(())
    }

    /// Gives what was written so far to those who follow already.
    fn share_out(&self, state: &mut State) -> Result<(), Error> {
        let mut fresh = self.page_set();
        let taken = self.take(state, &mut fresh);
        let mut followers = state.followers.iter_mut();
        let result = taken.and(followers.try_for_each(|follower| add(&mut follower.pages, &fresh)));
        if result.is_err() {
            state.phase = Phase::Broken;
        }
        result
    }

    fn stop(&self, number: u64) -> Result<(), Error> {
        let mut state = self.lock();
        state.followers.retain(|other| other.follower != number);
        if !state.followers.is_empty() || state.phase == Phase::Off {
            return Ok(());
        }
        let Some(kvm) = &state.kvm else {
            return Ok(());
        };
        kvm.vm.log_writes(false)?;
        if state.phase == Phase::On {
            // Else the rings would be found full when it is started again.
            self.empty_rings(&mut state)?;
            state.phase = Phase::Off;
        }
        Ok(())
    }

    /// Lets the virtual machine go, which the guest is done with, whoever still holds the tracker: a
    /// descriptor that is bound to it cannot be bound to the next.
    pub fn detach(&self) {
        self.lock().kvm = None;
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
        let result = match &mut state.followers[..] {
            [only] => self.drain_rings(rings, vm.fd(), &mut only.pages),
            followers => {
                let mut fresh = self.page_set();
                let drained = self.drain_rings(rings, vm.fd(), &mut fresh);
                let mut each = followers.iter_mut();
                drained.and(each.try_for_each(|follower| add(&mut follower.pages, &fresh)))
            }
        };
        if result.is_err() {
            state.phase = Phase::Broken;
        }
        result
    }

    /// Adds what a follower was not told of to `pages`. False if there was nothing.
    fn harvest_locked(
        &self,
        state: &mut State,
        number: u64,
        pages: &mut PageSet,
    ) -> Result<bool, Error> {
        match state.phase {
            Phase::Off => return Err(Error::Internal("dirty tracking was not started")),
            Phase::On => {}
            Phase::Broken => return Err(BROKEN),
        }
        let at = state.followers.iter().position(|p| p.follower == number);
        let at = at.ok_or(Error::Internal("who does not follow a guest harvests"))?;
        if pages.limit() < state.followers[at].pages.limit() {
            return Err(Error::Internal("a set of pages is for another guest"));
        }
        let mut own = std::mem::replace(&mut state.followers[at].pages, PageSet::new(0));
        let result = match state.followers.len() {
            1 => self.take(state, &mut own),
            _ => {
                let mut fresh = self.page_set();
                self.take(state, &mut fresh)
                    .and_then(|()| state.add_for_others(number, &fresh))
                    .and_then(|()| add(&mut own, &fresh))
            }
        };
        let found = !own.is_empty();
        let result = result.and_then(|()| add(pages, &own));
        own.clear();
        state.followers[at].pages = own;
        if result.is_err() {
            state.phase = Phase::Broken;
        }
        result.map(|()| found)
    }

    /// Adds all that was written since it was taken last.
    fn take(&self, state: &mut State, into: &mut PageSet) -> Result<(), Error> {
        let kvm = state.kvm.as_mut().ok_or(DETACHED)?;
        self.take_guest_writes(kvm, into)
            .and_then(|()| self.take_own_writes(into))
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
