//! What all threads of a protected guest share: its gates, the way to the other side, its figures.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::time::{Duration, Instant};

use roaring::RoaringTreemap;
use serde::{Deserialize, Serialize};
use tandem_devices::virtio::block::BlockBackend;
use tandem_devices::virtio::net::NetBackend;
use tandem_vmm::console::ConsoleHub;
use tandem_vmm::gates::{Caller, Gates};
use tandem_vmm::until::Until;
use vmm_sys_util::eventfd::EventFd;

use super::events::{Event, Events, describe};
use super::feed::Feed;
use super::modes::{CutModes, Modes};
use super::paths::Paths;
use super::status::{Role, Status};
use super::stored::Stored;
use super::{ProtectionError, lock};
use crate::gate::net_backend::GatedBackend;
use crate::gate::watchdog::Watchdog;
use crate::gate::{
    CONSOLE, ConsoleGate, Delays, DiskGate, GatedDisk, NetCut, NetGate, Permit, SharedDisk,
    SharedGate, Tally,
};
use crate::keeper::TAPS_MAX;
use crate::link::{Kind, Outbox};
use crate::mirror::changes::{Changes, Signal};
use crate::mirror::{Base, Image};
use crate::mode::Mode;
use crate::mode::cost::Counters;
use crate::mode::interval::Waiting;
use crate::pair::{Cause, Notice};

/// What a checkpoint says of a guest's outputs, besides its state.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PairCut {
    /// Number of the checkpoint.
    pub(super) epoch: u64,
    /// How long ago the guest's clock was read when the mark of the checkpoint was sent.
    pub(super) age: Duration,
    /// Per network device.
    pub(super) nets: Vec<NetCut>,
    /// Console output that it explains and that is not out.
    #[serde(with = "serde_bytes")]
    pub(super) console: Vec<u8>,
    /// The mode from then on, for a secondary that knows of modes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) modes: Option<CutModes>,
    /// The disks are those of a base from then on, for a secondary that knows of them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) is_base: bool,
}

impl PairCut {
    /// The mode from then on.
    pub(super) fn mode(&self) -> Mode {
        self.modes.map_or(Mode::Lockstep, |told| told.mode)
    }
}

/// The gates of one guest, and what belongs to them.
pub struct Pair {
    nets: Vec<Arc<NetGate>>,
    console: Arc<ConsoleGate>,
    disks: Vec<Arc<DiskGate>>,
    /// Those of shared ones.
    pub(super) shared: Vec<Arc<SharedGate>>,
    pub(super) watchdog: Watchdog,
    /// Wakes who keeps which regions of disks changed.
    changed: Arc<Signal>,
    /// There is another copy, or is to be.
    paired: AtomicBool,
    outbox: Arc<Outbox>,
    status: Mutex<Status>,
    modes: Mutex<Modes>,
    /// Events of the checkpoint under way are as usual: nobody wants to know of them.
    quiet: AtomicBool,
    epoch: AtomicU64,
    /// Number of the checkpoint whose outputs leave, of which the secondary was not told yet; or 0.
    committing: AtomicU64,
    /// Bytes of memory that making or taking checkpoints costs.
    checkpoint_memory: AtomicU64,
    permit: Arc<Permit>,
    events: Mutex<Events>,
    caller: OnceLock<Weak<dyn Caller>>,
    /// How checkpoints of the guest go to a store, if they do.
    pub(super) stored: OnceLock<Stored>,
    feed: Feed,
    /// Secondaries that ever joined.
    joins: AtomicU64,
    /// The paths to the other side, if there are two.
    paths: Mutex<Option<Arc<Paths>>>,
}

impl Pair {
    /// Gates, open, for a guest with `nets` network devices and `disks` disks.
    ///
    /// # Errors
    /// When the host has no descriptors left.
    pub fn new(name: &str, nets: usize, disks: usize) -> io::Result<Self> {
        let outbox = Arc::new(Outbox::default());
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let permit = Arc::new(Permit::new(event));
        let gates = (0..nets).map(|index| {
            let device = u8::try_from(index).map_err(|_| io::ErrorKind::InvalidInput)?;
            NetGate::new(device, Arc::clone(&outbox), Arc::clone(&permit)).map(Arc::new)
        });
        let nets = gates.collect::<io::Result<_>>()?;
        let disks = (0..disks).map(|index| {
            let number = u8::try_from(index).map_err(|_| io::ErrorKind::InvalidInput)?;
            DiskGate::new(number, Arc::clone(&permit)).map(Arc::new)
        });
        Ok(Self {
            nets,
            disks: disks.collect::<io::Result<_>>()?,
            shared: Vec::new(),
            watchdog: Watchdog::default(),
            changed: Arc::default(),
            paired: AtomicBool::new(false),
            console: Arc::new(ConsoleGate::new(Arc::clone(&outbox), Arc::clone(&permit))),
            outbox,
            status: Mutex::new(Status::unprotected(name)),
            modes: Mutex::new(Modes::new(Instant::now())),
            quiet: AtomicBool::new(false),
            epoch: AtomicU64::new(0),
            committing: AtomicU64::new(0),
            checkpoint_memory: AtomicU64::new(0),
            permit,
            events: Mutex::default(),
            caller: OnceLock::new(),
            stored: OnceLock::new(),
            feed: Feed::default(),
            joins: AtomicU64::new(0),
            paths: Mutex::default(),
        })
    }

    /// The same, for a guest whose disks with these numbers have images that both hosts reach.
    ///
    /// # Errors
    /// When the host has no descriptors left.
    pub fn sharing(mut self, disks: impl Iterator<Item = usize>) -> io::Result<Self> {
        let gates = disks.map(|disk| {
            let number = u8::try_from(disk).map_err(|_| io::ErrorKind::InvalidInput)?;
            let (outbox, permit) = (Arc::clone(&self.outbox), Arc::clone(&self.permit));
            SharedGate::new(number, outbox, permit).map(Arc::new)
        });
        self.shared = gates.collect::<io::Result<_>>()?;
        Ok(self)
    }

    /// What this side, as the guest's copy, gives to a store.
    pub fn feed(&self) -> &Feed {
        &self.feed
    }

    /// There are two paths to the other side, or none any more.
    pub(super) fn set_paths(&self, paths: Option<&Arc<Paths>>) {
        *lock(&self.paths) = paths.cloned();
    }

    /// Whether there are two.
    #[cfg(test)]
    pub(super) fn has_paths(&self) -> bool {
        lock(&self.paths).is_some()
    }

    /// A secondary joins.
    pub(super) fn joined(&self) {
        self.joins.fetch_add(1, Ordering::SeqCst);
    }

    /// How many ever did.
    pub(super) fn joins(&self) -> u64 {
        self.joins.load(Ordering::SeqCst)
    }

    pub(super) fn disks(&self) -> &[Arc<DiskGate>] {
        &self.disks
    }

    pub(super) fn nets(&self) -> &[Arc<NetGate>] {
        &self.nets
    }

    /// Its figures.
    pub fn status(&self) -> Status {
        let mut status = self.lock_status().clone();
        let mut delays = Delays::default();
        for net in &self.nets {
            status.add(&net.figures());
            let net = net.delays();
            delays.held.join(&net.held);
            delays.matched.join(&net.matched);
        }
        status.summarize();
        status.added_latency_us = delays.held.percentiles();
        status.secondary_lag_us = delays.matched.percentiles();
        status.tell_modes(&self.modes());
        let now = Instant::now();
        status.tell_trying(now);
        status.tell_age(now);
        let lease = self.permit.left(now);
        status.lease_ms = lease.map(|left| left.as_millis() as u64);
        status.protection_memory_bytes = self.memory_bytes();
        status.paths = lock(&self.paths)
            .as_ref()
            .map_or_else(Vec::new, |paths| paths.status());
        status.shared_disks = self.shared.iter().map(|disk| disk.number()).collect();
        status
    }

    /// Bytes of memory that protection costs this side: for checkpoints, and for what is held, kept or on its way.
    fn memory_bytes(&self) -> u64 {
        let nets: usize = self.nets.iter().map(|net| net.memory_bytes()).sum();
        let shared: usize = self.shared.iter().map(|disk| disk.memory_bytes()).sum();
        let paths = lock(&self.paths)
            .as_ref()
            .map_or(0, |paths| paths.memory_bytes());
        let queues =
            nets + shared + self.console.memory_bytes() + self.outbox.memory_bytes() + paths;
        self.checkpoint_memory.load(Ordering::Relaxed) + queues as u64
    }

    /// Making or taking checkpoints costs so many bytes of memory now.
    pub(super) fn set_checkpoint_memory(&self, bytes: u64) {
        self.checkpoint_memory.store(bytes, Ordering::Relaxed);
    }

    pub(super) fn lock_status(&self) -> MutexGuard<'_, Status> {
        lock(&self.status)
    }

    /// The modes of the guest's protection. Locked last.
    pub(super) fn modes(&self) -> MutexGuard<'_, Modes> {
        lock(&self.modes)
    }

    pub(super) fn permit(&self) -> &Permit {
        &self.permit
    }

    /// The last events after number `since`.
    pub fn events(&self, since: u64) -> Vec<Event> {
        self.lock_events().after(since)
    }

    fn lock_events(&self) -> MutexGuard<'_, Events> {
        lock(&self.events)
    }

    pub(super) fn report(&self, notice: &Notice) {
        let quiet = match notice {
            // There may be a hundred in a second.
            Notice::Resyncing(_, Cause::Outputs | Cause::Store) => {
                self.quiet.store(true, Ordering::SeqCst);
                true
            }
            Notice::Protected(_) => self.quiet.swap(false, Ordering::SeqCst),
            _ => {
                self.quiet.store(false, Ordering::SeqCst);
                false
            }
        };
        if !quiet {
            let (event, text) = describe(notice);
            self.happened(event, text);
        }
    }

    /// The end of the checkpoint under way is as usual.
    pub(super) fn keep_quiet(&self) {
        self.quiet.store(true, Ordering::SeqCst);
    }

    pub(super) fn happened(&self, event: &str, text: String) {
        self.lock_events().add(event, text);
    }

    pub(super) fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    /// Number of the checkpoint that both copies went on from last.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    pub(super) fn set_epoch(&self, epoch: u64) {
        self.epoch.store(epoch, Ordering::SeqCst);
        self.lock_status().epoch = epoch;
    }

    /// Whether outputs are held.
    pub fn holds(&self) -> bool {
        self.console.holds() || self.nets.iter().any(|net| net.holds()) || self.disks_owe()
    }

    /// Writes out what the console may say, waiting at most `patience`.
    pub(super) fn drain_console(&self, patience: Duration) {
        self.console.drain(patience);
    }

    // Primary.

    /// What the outside's frames are read from, by device, where another process can.
    pub(super) fn descriptors(&self) -> Vec<(u8, OwnedFd)> {
        let nets = (0..).zip(&self.nets);
        nets.filter_map(|(device, net)| Some((device, net.descriptor()?)))
            .take(TAPS_MAX)
            .collect()
    }

    pub(super) fn cut(&self, epoch: u64, patience: Duration) -> PairCut {
        let (mode, modes) = self.modes().cut();
        self.paired.store(true, Ordering::SeqCst);
        self.shared
            .iter()
            .for_each(|disk| disk.cut(epoch, patience, mode));
        let nets = self.nets.iter().map(|net| net.cut(patience, mode));
        PairCut {
            epoch,
            age: Duration::ZERO,
            nets: nets.collect(),
            console: self.console.cut(patience, mode),
            modes,
            is_base: false,
        }
    }

    /// What did not leave of a guest that stands and is to go on elsewhere, as a checkpoint would say.
    pub(super) fn cut_to_move(&self, patience: Duration) -> PairCut {
        let mode = self.modes().mode();
        let nets = self.nets.iter().map(|net| net.pack(patience, mode));
        PairCut {
            epoch: self.epoch() + 1,
            nets: nets.collect(),
            console: self.console.pack(patience, mode),
            ..PairCut::default()
        }
    }

    /// Outputs that wait for a checkpoint and for nothing else.
    pub(super) fn waiting(&self) -> Option<Waiting> {
        let nets = self.nets.iter().filter_map(|net| net.waiting());
        let disks = self.shared.iter().filter_map(|disk| disk.waiting());
        let all = nets.chain(disks).chain(self.console.waiting());
        all.reduce(Waiting::and)
    }

    /// What was counted of outputs that left.
    pub(super) fn counted(&self) -> Counters {
        let nets = self.nets.iter().map(|net| net.tally());
        let disks = self.shared.iter().map(|disk| disk.tally());
        let all = nets.chain(disks).fold(self.console.tally(), Tally::and);
        Counters {
            outputs: all.outputs,
            held_us: all.held_us,
            matched: all.matched,
            matched_us: all.matched_us,
            ..Counters::default()
        }
    }

    /// The checkpoint of `epoch` is loaded: the outputs that it explains leave, and the secondary is told
    /// once they did.
    pub(super) fn commit(&self, epoch: u64) {
        self.set_epoch(epoch);
        let now = Instant::now();
        self.commit_disks(now);
        self.console.commit(now);
        self.nets.iter().for_each(|net| net.commit(now));
        self.confirm_soon(epoch);
        self.committing.store(epoch, Ordering::SeqCst);
        self.tell_committed();
    }

    /// Tells the secondary of a checkpoint whose outputs are all out, if it was not told.
    pub(super) fn tell_committed(&self) {
        let epoch = self.committing.load(Ordering::SeqCst);
        let even = || self.console.is_even() && self.nets.iter().all(|net| net.is_even());
        if epoch != 0 && even() {
            self.committing.store(0, Ordering::SeqCst);
            self.outbox.tell(Kind::Committed, 0, epoch);
        }
    }

    /// Outputs of the other side. True if they do not match.
    pub(super) fn secondary_output(&self, now: Instant, device: u8, frame: &[u8]) -> bool {
        let net = self.nets.get(usize::from(device));
        net.is_some_and(|net| net.secondary_output(now, frame))
    }

    pub(super) fn secondary_console(&self, now: Instant, bytes: &[u8]) -> bool {
        self.console.secondary_output(now, bytes)
    }

    /// Lets out what may leave now.
    pub(super) fn release(&self) {
        self.console.release();
        self.nets.iter().for_each(|net| net.release());
    }

    /// Tells the secondary which of its frames it need not keep.
    pub(super) fn tell_settled(&self) {
        self.shared.iter().for_each(|disk| disk.tell_done());
        self.nets.iter().for_each(|net| net.tell_settled());
    }

    /// Looks for outputs that one side has waited for too long.
    pub(super) fn expire(&self, now: Instant) {
        self.console.expire(now);
        self.shared.iter().for_each(|disk| disk.expire(now));
        for net in &self.nets {
            net.expire(now);
        }
    }

    /// What does not match, in words.
    pub(super) fn mismatch(&self) -> Option<String> {
        let nets = self.nets.iter().filter_map(|net| net.mismatch());
        let disks = self.shared.iter().filter_map(|disk| disk.mismatch());
        nets.chain(self.console.mismatch()).chain(disks).next()
    }

    /// Whether it is frames, or writes, that do not match.
    pub(super) fn frames_differ(&self) -> bool {
        let disks = || self.shared.iter().any(|disk| disk.mismatch().is_some());
        self.nets.iter().any(|net| net.mismatch().is_some()) || disks()
    }

    /// Whether frames or writes wait for the secondary's.
    pub(super) fn waits(&self) -> bool {
        self.nets.iter().any(|net| net.waits()) || self.shared.iter().any(|disk| disk.waits())
    }

    /// Frames and writes that ever matched.
    pub(super) fn matched(&self) -> u64 {
        let figures = self.nets.iter().map(|net| net.figures());
        let frames: u64 = figures.map(|figures| figures.compared.matched_frames).sum();
        let writes = self.shared.iter().map(|disk| disk.tally().matched);
        frames + writes.sum::<u64>()
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        let nets = self.nets.iter().filter_map(|net| net.deadline());
        let disks = self.shared.iter().filter_map(|disk| disk.deadline());
        nets.chain(disks).chain(self.console.deadline()).min()
    }

    /// Nobody compares any more: all that is held leaves, once images have what it tells of.
    pub(super) fn open(&self) {
        self.paired.store(false, Ordering::SeqCst);
        self.outbox.disconnect();
        self.disks.iter().for_each(|disk| disk.open());
        if let Err(error) = self.open_outputs() {
            tracing::error!(%error, "writes that completed are not in a shared image: outputs wait");
        }
    }

    /// What is held leaves, after it is done what it tells of.
    ///
    /// # Errors
    /// When that cannot be done.
    pub(super) fn open_outputs(&self) -> io::Result<()> {
        self.open_disks()?;
        self.console.open();
        self.nets.iter().for_each(|net| net.open());
        Ok(())
    }

    /// Disks with the bases that they have.
    pub(super) fn bases(&self) -> Vec<(u8, Vec<Base>)> {
        let disks = (0..).zip(&self.disks);
        disks
            .filter_map(|(number, disk)| Some((number, disk.changes()?.bases())))
            .collect()
    }

    /// Whether it is worth it.
    pub(super) fn may_propose(&self) -> bool {
        self.all_changes().any(|changes| changes.may_propose())
    }

    // Both.

    /// The guest's disks may be those of `base`, but for what is not done.
    pub(super) fn propose(&self, base: Base) {
        self.disks.iter().for_each(|disk| disk.propose(base));
    }

    /// They are, if what was proposed is checkpoint `number`: it is kept soon.
    pub(super) fn confirm_soon(&self, number: u64) {
        self.all_changes().for_each(|c| c.confirm_soon(number));
    }

    /// From now on it is kept which regions of disk `number`, whose image is at `path`, change: in a file beside the image
    /// that is made if it `makes` it, or is there. The guest's devices do not have it open yet.
    ///
    /// # Errors
    /// When the host has no descriptors left.
    pub fn keep_changes(&self, number: usize, path: &Path, makes: bool) -> io::Result<()> {
        match self.disks.get(number) {
            Some(disk) => disk.keep_changes(path, makes, &self.changed),
            None => Ok(()),
        }
    }

    /// What is kept of that.
    pub(super) fn changes(&self, disk: u8) -> Option<&Arc<Changes>> {
        self.disks.get(usize::from(disk))?.changes()
    }

    pub(super) fn all_changes(&self) -> impl Iterator<Item = &Arc<Changes>> {
        self.disks.iter().filter_map(|disk| disk.changes())
    }

    /// Wakes who keeps that.
    pub(super) fn changed(&self) -> &Signal {
        &self.changed
    }

    /// Images of the guest's disks that it may write to.
    pub fn images(&self) -> Vec<Image> {
        self.disks.iter().filter_map(|disk| disk.image()).collect()
    }

    /// Sectors that the guest wrote to its disks since the last checkpoint.
    pub(super) fn take_written(&self) -> Vec<(u8, RoaringTreemap)> {
        let disks = (0..).zip(&self.disks);
        disks
            .map(|(number, disk)| (number, disk.take_written()))
            .collect()
    }

    /// Why the host failed a request to a disk.
    pub(super) fn disk_failure(&self) -> Option<String> {
        let shared = self.shared.iter().find_map(|disk| disk.failure());
        let disks = || self.disks.iter().find_map(|disk| disk.failure());
        shared.or_else(disks)
    }

    /// From now on it is known what the guest writes to its disks.
    pub(super) fn track_disks(&self) {
        self.disks.iter().for_each(|disk| disk.track());
    }

    /// The guest, which stands, will wait with writes to its disks.
    pub(super) fn hold_disks(&self) {
        self.disks.iter().for_each(|disk| disk.hold());
    }

    /// Whether the guest still waits with them.
    pub(super) fn disks_hold(&self) -> bool {
        self.disks.iter().all(|disk| disk.holds())
    }

    /// It waits no longer.
    pub(super) fn let_disks_go(&self) {
        self.disks.iter().for_each(|disk| disk.let_go());
    }

    /// Bytes of disks that were written since the last checkpoint.
    pub(super) fn bytes_written(&self) -> u64 {
        self.disks.iter().map(|disk| disk.count_written()).sum()
    }

    /// Bytes that the guest wrote to disks since they are tracked.
    pub(super) fn disk_bytes_written(&self) -> u64 {
        self.disks.iter().map(|disk| disk.bytes_written()).sum()
    }

    // Secondary.

    /// Nothing of the guest leaves from now on.
    pub fn become_secondary(&self) {
        self.paired.store(true, Ordering::SeqCst);
        self.disks.iter().for_each(|disk| disk.track());
        self.shared.iter().for_each(|disk| disk.become_secondary());
        self.console.become_secondary();
        self.nets.iter().for_each(|net| net.become_secondary());
    }

    /// A frame that was on its way to the primary when that was lost. False if too many wait, or there is no
    /// such device.
    pub(super) fn late_input(&self, device: u8, frame: &[u8]) -> bool {
        let net = self.nets.get(usize::from(device));
        net.is_some_and(|net| net.late_input(frame))
    }

    /// Lets devices look at the inputs that came: on the calling thread while the guest runs, which saves
    /// waking the device loop.
    pub(super) fn call_devices(&self) {
        let caller = self.caller.get().and_then(Weak::upgrade);
        for (index, net) in self.nets.iter().enumerate() {
            net.call_device(|token| {
                let caller = caller.as_ref();
                caller.is_some_and(|caller| caller.call_net(index, token))
            });
        }
    }

    /// Lets network devices go on, which waited for room on the way to the other side.
    pub(super) fn wake_nets(&self) {
        self.nets.iter().for_each(|net| net.wake_device());
    }

    /// A frame for the guest. False if too many wait, or there is no such device.
    pub(super) fn input(&self, device: u8, frame: &[u8]) -> bool {
        let net = self.nets.get(usize::from(device));
        net.is_some_and(|net| net.input(frame))
    }

    pub(super) fn console_input(&self, bytes: &[u8]) {
        self.console.input(bytes);
    }

    pub(super) fn settle(&self, device: u8, count: u64) {
        if device == CONSOLE {
            self.console.settle(count);
        } else if let Some(net) = self.nets.get(usize::from(device)) {
            net.settle(count);
        }
    }

    pub(super) fn mark_cut(&self) {
        self.console.mark_cut();
        self.nets.iter().for_each(|net| net.mark_cut());
    }

    /// Takes what the outside sends here while the copy stands.
    pub(super) fn overhear(&self) {
        self.nets.iter().for_each(|net| net.overhear());
    }

    /// Whether this is a copy that stands until it takes over, or a checkpoint lets it run.
    pub fn copy_stands(&self) -> bool {
        self.lock_status().role == Role::Secondary && self.modes().mode() == Mode::Checkpoint
    }

    /// The guest goes on from a checkpoint, or stands with it.
    pub(super) fn loaded(&self, cut: PairCut) -> Result<(), ProtectionError> {
        let mode = self.modes().loaded(Instant::now(), cut.modes);
        let mut nets = cut.nets.into_iter();
        for net in &self.nets {
            net.loaded(nets.next().unwrap_or_default(), mode)
                .map_err(|e| ProtectionError::Garbled(e.to_string()))?;
        }
        self.console.loaded(cut.console, mode);
        self.set_epoch(cut.epoch);
        Ok(())
    }

    /// The outputs that the checkpoint of `epoch` explains are out.
    pub(super) fn committed(&self, epoch: u64) {
        if epoch != self.epoch() {
            // Others wait for a later one.
            return;
        }
        self.nets.iter().for_each(|net| net.committed());
    }

    /// The guest is the only one now; the primary was `heard` last then. Returns how many frames left that it
    /// had kept.
    pub(super) fn go_live(&self, heard: Instant) -> usize {
        self.paired.store(false, Ordering::SeqCst);
        self.outbox.disconnect();
        self.set_paths(None);
        self.disks.iter().for_each(|disk| disk.open());
        self.all_changes().for_each(|changes| changes.settle());
        self.console.go_live();
        self.nets.iter().map(|net| net.go_live(heard)).sum()
    }
}

impl Gates for Pair {
    fn connect(&self, caller: Weak<dyn Caller>) {
        // There is one machine.
        drop(self.caller.set(caller));
    }

    fn net(&self, index: usize, outside: Box<dyn NetBackend>) -> Box<dyn NetBackend> {
        match self.nets.get(index) {
            Some(gate) => Box::new(GatedBackend::new(Arc::clone(gate), outside)),
            None => outside,
        }
    }

    fn limit(&self) -> Arc<Until> {
        self.permit.guest()
    }

    fn compare(&self) -> bool {
        self.paired.load(Ordering::Relaxed)
    }

    fn disk(
        &self,
        index: usize,
        outside: Box<dyn BlockBackend>,
        image: File,
    ) -> Box<dyn BlockBackend> {
        if let Some(gate) = self.shared_disk(index) {
            return Box::new(SharedDisk::new(Arc::clone(gate), outside, image));
        }
        match self.disks.get(index) {
            Some(gate) => Box::new(GatedDisk::new(Arc::clone(gate), outside, image)),
            None => outside,
        }
    }

    fn locks_disk(&self, index: usize) -> bool {
        self.shared_disk(index).is_none_or(|disk| !disk.is_copy())
    }

    fn console(&self, console: &ConsoleHub) {
        self.console.connect(console.clone());
        let gate: Arc<dyn tandem_vmm::console::ConsoleGate> = self.console.clone();
        console.guard(gate);
    }
}
