//! The gate of one network device.
//!
//! ```text
//!   alone       guest TX > outside                             outside > guest RX
//!   primary     guest TX > comparator > [released] > outside   outside > the other side, guest RX
//!   secondary   guest TX > kept, the other side                the other side > guest RX
//! ```
//!
//! In the mode [`Mode::Checkpoint`] the primary's outputs all wait for the next checkpoint, and the secondary, which
//! stands, keeps inputs until a checkpoint has seen them.
//!
//! The device, the thread that reads the link and the thread that drives checkpoints share it behind one
//! lock, which is held for the time of one frame, its copy to the other side included.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tandem_devices::virtio::net::{FRAME_MAX, HEADER_SIZE, NetBackend, Offloads, Transmit};
use tandem_vmm::build::borrow;
use vmm_sys_util::eventfd::EventFd;

use super::copy::Secondary;
use super::{Permit, Tally};
use crate::announce::{self, Announcer};
use crate::compare::{Comparator, Figures, Limits};
use crate::link::{Kind, Outbox};
use crate::mode::Mode;
use crate::mode::interval::Waiting;
use crate::percentiles::Samples;
use crate::sequence::{self, Mapper, StateError};

/// Frames that a secondary keeps until they are settled, at most; its guest waits beyond that.
const KEPT_MAX: usize = 16 << 10;
/// Connections whose sequence numbers differ between guest and outside, at most.
const CONNECTIONS_MAX: usize = 16 << 10;
/// Frames that were on their way to a lost primary and wait for the guest, at most.
const LATE_MAX: usize = 16 << 10;
/// How far the time stamps of a guest that goes on elsewhere are moved ahead, in ticks of its own (1 ms
/// in Linux): its clock may be behind the other's by as long as a checkpoint takes to load.
const SLACK_TICKS: u32 = 1000;

/// Figures of a gate.
#[derive(Clone, Copy, Debug, Default)]
pub struct NetFigures {
    /// What the comparator counted.
    pub compared: Figures,
    /// Frames that went out while they were compared.
    pub released: u64,
}

/// How long outputs were held; they leave in the order in which they came, or nearly.
#[derive(Clone, Debug, Default)]
pub struct Delays {
    /// All of them.
    pub held: Samples,
    /// Those that the secondary said too.
    pub matched: Samples,
    /// How many, and how long together.
    pub tally: Tally,
}

/// What the gate does.
#[derive(Debug)]
enum Side {
    Alone,
    Primary(Box<Primary>),
    Secondary(Secondary),
}

/// A primary's side.
#[derive(Debug)]
struct Primary {
    comparator: Comparator,
    /// A checkpoint is under way: what the copy sends is of before.
    cut: bool,
    /// How many of the secondary's outputs it was told are out.
    told: u64,
    /// When outputs came that are held, and how many of the first of them a checkpoint explains.
    arrivals: VecDeque<Instant>,
    covered: usize,
    /// From the last cut on.
    mode: Mode,
    /// Outputs that wait for a checkpoint, in [`Mode::Checkpoint`].
    waiting: Option<Waiting>,
}

impl Primary {
    /// That of a guest whose first checkpoint begins.
    fn new(patience: Duration) -> Self {
        let mut comparator = Comparator::new(Limits::default());
        comparator.set_patience(patience);
        Self {
            comparator,
            cut: true,
            told: 0,
            arrivals: VecDeque::new(),
            covered: 0,
            mode: Mode::Lockstep,
            waiting: None,
        }
    }

    /// A checkpoint begins, from which on `mode` holds.
    fn begin(&mut self, mode: Mode) {
        self.cut = true;
        self.comparator.cut();
        self.comparator.set_comparing(mode == Mode::Lockstep);
        self.mode = mode;
        self.waiting = None;
    }

    /// Takes a frame of the guest. True if somebody is to look: outputs differ, or begin to wait for a checkpoint.
    fn take(&mut self, now: Instant, frame: Vec<u8>) -> bool {
        self.arrivals.push_back(now);
        self.comparator.primary(now, frame);
        if self.mode == Mode::Lockstep {
            return self.comparator.mismatch().is_some();
        }
        let full = !self.comparator.has_room();
        Waiting::add(&mut self.waiting, now, full)
    }

    /// Whether outputs wait for the secondary's.
    fn waits(&self) -> bool {
        !self.cut && self.comparator.waits()
    }

    /// An output leaves.
    fn count_delay(&mut self, now: Instant, delays: &mut Delays) {
        let Some(since) = self.arrivals.pop_front() else {
            return;
        };
        let delay = now.saturating_duration_since(since);
        delays.held.add(delay);
        delays.tally.add(delay);
        match self.covered.checked_sub(1) {
            Some(left) => self.covered = left,
            None => {
                delays.matched.add(delay);
                delays.tally.add_matched(delay);
            }
        }
    }

    /// Tells the secondary how many of its outputs are out, if those are more than it knows.
    fn tell_settled(&mut self, gate: &NetGate) {
        let settled = self.comparator.settled();
        if settled > self.told {
            self.told = settled;
            gate.outbox
                .put(Kind::Settled, gate.device, &settled.to_le_bytes());
        }
    }
}

/// What a checkpoint says of a network device besides the device's own state.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetCut {
    /// Outputs that it explains and that are not out.
    pub covered: Vec<serde_bytes::ByteBuf>,
    /// How the outside's sequence numbers differ from the guest's.
    pub mapping: sequence::State,
    /// What the guest's frames showed of it, for a copy that stands and says nothing itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addresses: Option<Announcer>,
}

pub(super) struct State {
    pub(super) outside: Option<Box<dyn NetBackend>>,
    side: Side,
    mapper: Mapper,
    /// Inputs from the time as a copy that the guest has not seen.
    left: VecDeque<Vec<u8>>,
    announcer: Announcer,
    /// Released frames that the outside had no room for.
    blocked: VecDeque<Vec<u8>>,
    /// Room for a frame from the outside.
    room: Vec<u8>,
    /// What the driver takes, while it is ready, and the token under which the device is called.
    pub(super) started: Option<(Offloads, u32)>,
    /// Inputs came that the device was not told of.
    to_call: bool,
    pub(super) waits_for_room: bool,
    released: u64,
    delays: Delays,
}

/// The gate of one network device.
pub struct NetGate {
    device: u8,
    state: Mutex<State>,
    event: EventFd,
    outbox: Arc<Outbox>,
    permit: Arc<Permit>,
}

impl NetGate {
    /// A gate that is open, for network device `device`; messages of a pair go to `outbox`, and what
    /// was matched leaves as `permit` says.
    ///
    /// # Errors
    /// When the host has no descriptors left.
    pub fn new(device: u8, outbox: Arc<Outbox>, permit: Arc<Permit>) -> io::Result<Self> {
        Ok(Self {
            device,
            state: Mutex::new(State {
                outside: None,
                side: Side::Alone,
                mapper: Mapper::new(CONNECTIONS_MAX),
                left: VecDeque::new(),
                announcer: Announcer::default(),
                blocked: VecDeque::new(),
                room: vec![0; HEADER_SIZE + FRAME_MAX],
                started: None,
                to_call: false,
                waits_for_room: false,
                released: 0,
                delays: Delays::default(),
            }),
            event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            outbox,
            permit,
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_outside(&self, outside: Option<Box<dyn NetBackend>>) {
        self.lock().outside = outside;
    }

    /// What frames from the outside are read from, shared, if another process can do that.
    pub(crate) fn descriptor(&self) -> Option<OwnedFd> {
        let state = self.lock();
        let fd = state.outside.as_ref()?.descriptor()?;
        // Without one, what waits there is lost with this process.
        fd.try_clone_to_owned().ok()
    }

    pub(super) fn event(&self) -> BorrowedFd<'_> {
        borrow(&self.event)
    }

    /// Takes the events that came.
    pub(super) fn take_event(&self) {
        // None may have come.
        drop(self.event.read());
    }

    pub(super) fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    /// Lets the device look at what waits on either side of it.
    pub fn wake_device(&self) {
        if let Err(error) = self.event.write(1) {
            tracing::error!(%error, "cannot wake a network device");
        }
    }

    // What the primary does.

    /// A checkpoint begins, while the guest stands: outputs from now on are of the next epoch, in which `mode` holds.
    pub fn cut(&self, patience: Duration, mode: Mode) -> NetCut {
        let mut state = self.lock();
        if matches!(state.side, Side::Alone) {
            state.side = Side::Primary(Box::new(Primary::new(patience)));
        }
        let Side::Primary(primary) = &mut state.side else {
            return NetCut::default();
        };
        primary.begin(mode);
        let covered = primary.comparator.covered();
        let covered = covered.map(|frame| frame.to_vec().into());
        NetCut {
            covered: covered.collect(),
            mapping: state.mapper.state(),
            addresses: (mode == Mode::Checkpoint).then(|| state.announcer.clone()),
        }
    }

    /// The guest stands, and is to go on elsewhere: all that is held here leaves there. As [`NetGate::cut`] for a guest
    /// with a copy, and nothing at all for one without.
    pub fn pack(&self, patience: Duration, mode: Mode) -> NetCut {
        let alone = matches!(self.lock().side, Side::Alone);
        let mut cut = match alone {
            true => NetCut {
                mapping: self.lock().mapper.state(),
                ..NetCut::default()
            },
            false => self.cut(patience, mode),
        };
        cut.addresses = Some(self.lock().announcer.clone());
        cut
    }

    /// Whether the guest's connections are other ones for the outside than for itself, which is to be known where it
    /// goes on.
    pub fn is_mapped(&self) -> bool {
        !self.lock().mapper.is_empty()
    }

    /// Outputs that wait for a checkpoint and for nothing else.
    pub fn waiting(&self) -> Option<Waiting> {
        match &self.lock().side {
            Side::Primary(primary) => primary.waiting,
            _ => None,
        }
    }

    /// The checkpoint is loaded: the outputs that it explains leave.
    pub fn commit(&self, now: Instant) {
        self.with_primary(|primary| {
            primary.cut = false;
            primary.told = 0;
            primary.covered += primary.comparator.covered().count();
            primary.comparator.commit(now);
            if primary.waits() {
                self.permit.tell_waiting();
            }
        });
    }

    /// A frame of the secondary. True if it does not match: then a checkpoint is due.
    pub fn secondary_output(&self, now: Instant, frame: &[u8]) -> bool {
        self.with_primary(|primary| {
            if !primary.cut {
                primary.comparator.secondary(now, frame.to_vec());
            }
        })
    }

    /// Lets out what may leave now.
    pub fn release(&self) {
        self.with_primary(|_| ());
    }

    /// Tells the other side which of its outputs it need not keep: once for all that left since.
    pub fn tell_settled(&self) {
        let state = &mut *self.lock();
        if let Side::Primary(primary) = &mut state.side
            && state.blocked.is_empty()
        {
            primary.tell_settled(self);
        }
    }

    /// Looks for outputs that one side has waited for too long.
    pub fn expire(&self, now: Instant) {
        self.with_primary(|primary| {
            if !primary.cut {
                primary.comparator.expire(now);
            }
        });
    }

    /// When [`NetGate::expire`] is due.
    pub fn deadline(&self) -> Option<Instant> {
        match &self.lock().side {
            Side::Primary(primary) if !primary.cut => primary.comparator.deadline(),
            _ => None,
        }
    }

    /// What does not match, in words.
    pub fn mismatch(&self) -> Option<String> {
        match &self.lock().side {
            Side::Primary(primary) if !primary.cut => {
                primary.comparator.mismatch().map(ToString::to_string)
            }
            _ => None,
        }
    }

    /// Nobody compares any more: all that is held leaves.
    pub fn open(&self) {
        let mut state = self.lock();
        if let Side::Primary(mut primary) = std::mem::replace(&mut state.side, Side::Alone) {
            primary.comparator.alone();
            while let Some(frame) = primary.comparator.release() {
                state.leave(frame);
            }
        }
        drop(state);
        self.wake_device();
    }

    /// Whether everything is out that may leave.
    pub fn is_even(&self) -> bool {
        let state = self.lock();
        let ready = match &state.side {
            Side::Primary(primary) => primary.comparator.has_ready(),
            _ => false,
        };
        !ready && state.blocked.is_empty()
    }

    /// Whether outputs are held.
    pub fn holds(&self) -> bool {
        let state = self.lock();
        let held = match &state.side {
            Side::Primary(primary) => primary.comparator.holds(),
            _ => false,
        };
        held || !state.blocked.is_empty()
    }

    /// Whether outputs wait for the secondary's.
    pub fn waits(&self) -> bool {
        matches!(&self.lock().side, Side::Primary(primary) if primary.waits())
    }

    /// Lets out what may leave after `act`. True if something does not match.
    fn with_primary(&self, act: impl FnOnce(&mut Primary)) -> bool {
        let mut state = self.lock();
        let Side::Primary(primary) = &mut state.side else {
            return false;
        };
        act(primary);
        let differs = primary.comparator.mismatch().is_some();
        let released = state.release(self);
        let wake =
            (released && std::mem::take(&mut state.waits_for_room)) || !state.blocked.is_empty();
        drop(state);
        if wake {
            self.wake_device();
        }
        differs
    }

    // What the secondary does.

    /// The guest is a copy: nothing of it leaves.
    pub fn become_secondary(&self) {
        self.lock().side = Side::Secondary(Secondary::default());
    }

    /// A frame for the guest, which finds it at [`NetGate::call_device`]. False if too many wait.
    pub fn input(&self, frame: &[u8]) -> bool {
        let mut state = self.lock();
        let Side::Secondary(secondary) = &mut state.side else {
            return false;
        };
        let call = secondary.take_in(frame);
        let room = secondary.has_room();
        state.to_call |= call;
        room
    }

    /// Lets the device look at the inputs that came since the last time: by `call`, which gets the token of
    /// the device's backend, or else by its event.
    pub fn call_device(&self, call: impl FnOnce(u32) -> bool) {
        let mut state = self.lock();
        if !std::mem::take(&mut state.to_call) {
            return;
        }
        let token = state.started.map(|(_, token)| token);
        drop(state);
        if !token.is_some_and(call) {
            self.wake_device();
        }
    }

    /// A frame that was on its way to the primary when that was lost. False if too many wait.
    pub fn late_input(&self, frame: &[u8]) -> bool {
        // It may take over at any moment: which of both it is has to be known until the frame is in place.
        let mut state = self.lock();
        let state = &mut *state;
        let room = match &mut state.side {
            Side::Secondary(secondary) if !secondary.has_room() => return false,
            Side::Secondary(secondary) => {
                secondary.take_in(frame);
                true
            }
            Side::Alone if state.left.len() < LATE_MAX => {
                state.left.push_back(frame.to_vec());
                true
            }
            Side::Alone | Side::Primary(_) => return false,
        };
        self.wake_device();
        room
    }

    /// The first `count` outputs since the checkpoint are out.
    pub fn settle(&self, count: u64) {
        let mut state = self.lock();
        let Side::Secondary(secondary) = &mut state.side else {
            return;
        };
        let out = count.saturating_sub(secondary.settled) as usize;
        let out = out.min(secondary.kept.len());
        secondary.kept.drain(..out);
        secondary.settled += out as u64;
        let wake = out > 0 && std::mem::take(&mut state.waits_for_room);
        drop(state);
        if wake {
            self.wake_device();
        }
    }

    /// What came so far, the checkpoint under way has seen.
    pub fn mark_cut(&self) {
        if let Side::Secondary(secondary) = &mut self.lock().side {
            secondary.mark_cut();
        }
    }

    /// The guest goes on from the checkpoint, or stands with it, by `mode`.
    ///
    /// # Errors
    /// When the primary's mappings cannot be.
    pub fn loaded(&self, cut: NetCut, mode: Mode) -> Result<(), StateError> {
        let mapper = Mapper::from_state(&cut.mapping, CONNECTIONS_MAX)?;
        let mut state = self.lock();
        let Side::Secondary(secondary) = &mut state.side else {
            return Ok(());
        };
        let covered = cut.covered.into_iter();
        let covered = covered.map(|frame| frame.into_vec()).collect();
        secondary.loaded(covered, mode == Mode::Checkpoint);
        state.mapper = mapper;
        if let Some(addresses) = &cut.addresses {
            state.announcer.learn(addresses);
        }
        Ok(())
    }

    /// Takes what the outside sent to a copy that stands, whose device does not look.
    pub fn overhear(&self) {
        let mut state = self.lock();
        if matches!(&state.side, Side::Secondary(secondary) if secondary.stands) {
            state.overhear();
        }
    }

    /// The outputs that the last checkpoint explains are out.
    pub fn committed(&self) {
        if let Side::Secondary(secondary) = &mut self.lock().side {
            secondary.covered.clear();
        }
    }

    /// The guest is the only one now: what it kept leaves, and it talks to the outside itself. It gets what
    /// the outside sent after the primary was `heard` last. Returns how many frames left.
    pub fn go_live(&self, heard: Instant) -> usize {
        let mut state = self.lock();
        let Side::Secondary(secondary) = std::mem::replace(&mut state.side, Side::Alone) else {
            return 0;
        };
        state.mapper.go_live(SLACK_TICKS);
        let announcements = state.announcer.announcements();
        state.blocked.extend(announcements);
        let mut count = 0;
        for mut frame in secondary.covered.into_iter().chain(secondary.kept) {
            state.mapper.outbound(&mut frame);
            state.blocked.push_back(frame);
            count += 1;
        }
        state.left = secondary.inbox;
        let since = |(at, frame)| (at >= heard).then_some(frame);
        let overheard = secondary.overheard.into_iter().filter_map(since);
        state.left.extend(overheard);
        state.send_blocked();
        drop(state);
        self.wake_device();
        count
    }

    /// What the guest's own frames showed of it.
    pub fn addresses(&self) -> Announcer {
        self.lock().announcer.clone()
    }

    /// The guest's frames showed this of it where it was before.
    pub fn know(&self, addresses: &Announcer) {
        self.lock().announcer.learn(addresses);
    }

    /// Tells the network where the guest is that has this address, by a frame of its own (RFC 903; switches learn from it
    /// whatever they think of its content), and by those for all addresses that it is known to use.
    pub fn announce(&self, mac: [u8; 6]) {
        let mut state = self.lock();
        let known = state.announcer.announcements();
        state.blocked.push_back(announce::reverse_arp(mac));
        state.blocked.extend(known);
        state.send_blocked();
        if let Some(outside) = &mut state.outside {
            outside.flush();
        }
        drop(state);
        self.wake_device();
    }

    /// Bytes of frames and streams that are held, kept or waiting.
    pub fn memory_bytes(&self) -> usize {
        let state = self.lock();
        let frames = |frames: &VecDeque<Vec<u8>>| frames.iter().map(Vec::len).sum::<usize>();
        let side = match &state.side {
            Side::Alone => 0,
            Side::Primary(primary) => primary.comparator.memory_bytes(),
            Side::Secondary(secondary) => secondary.memory_bytes(),
        };
        side + frames(&state.left) + frames(&state.blocked)
    }

    /// How many outputs left, and how long they had been held.
    pub fn tally(&self) -> Tally {
        self.lock().delays.tally
    }

    /// How long outputs were held lately.
    pub fn delays(&self) -> Delays {
        self.lock().delays.clone()
    }

    /// Figures.
    pub fn figures(&self) -> NetFigures {
        let state = self.lock();
        let compared = match &state.side {
            Side::Primary(primary) => primary.comparator.figures(),
            _ => Figures::default(),
        };
        NetFigures {
            compared,
            released: state.released,
        }
    }
}

impl State {
    /// Lets out what may leave. True if something left.
    fn release(&mut self, gate: &NetGate) -> bool {
        self.send_blocked();
        let mut any = false;
        while self.blocked.is_empty() {
            let Side::Primary(primary) = &mut self.side else {
                break;
            };
            if !primary.comparator.has_ready() {
                break;
            }
            let now = Instant::now();
            if !gate.permit.lets_out(now) {
                gate.permit.call();
                break;
            }
            let Some(frame) = primary.comparator.release() else {
                break;
            };
            primary.count_delay(now, &mut self.delays);
            any = true;
            self.released += 1;
            self.leave(frame);
        }
        if any && let Some(outside) = &mut self.outside {
            outside.flush();
        }
        any
    }

    /// Hands a frame of the guest to the outside.
    fn leave(&mut self, mut frame: Vec<u8>) {
        self.mapper.outbound(&mut frame);
        self.blocked.push_back(frame);
        self.send_blocked();
    }

    /// Sends what the outside had no room for.
    pub(super) fn send_blocked(&mut self) {
        while let (Some(frame), Some(outside)) = (self.blocked.front(), &mut self.outside) {
            match outside.send(frame) {
                Transmit::Full => return,
                // A link that is down loses frames.
                Transmit::Sent | Transmit::Pending | Transmit::Refused => {
                    drop(self.blocked.pop_front());
                }
            }
        }
    }

    /// Whether released frames wait for the outside.
    pub(super) fn is_blocked(&self) -> bool {
        !self.blocked.is_empty()
    }

    /// Whether frames go between device and outside as they are.
    pub(super) fn is_open(&self) -> bool {
        matches!(self.side, Side::Alone)
            && self.mapper.is_empty()
            && self.blocked.is_empty()
            && self.left.is_empty()
    }

    /// Takes what the outside sends to a copy, of which it knows nothing. False if the guest is none.
    pub(super) fn overhear(&mut self) -> bool {
        let Side::Secondary(secondary) = &mut self.side else {
            return false;
        };
        let Some(outside) = &mut self.outside else {
            return true;
        };
        while outside.next_room().is_some()
            && let Some(length) = outside.take(&mut self.room)
        {
            let frame = &self.room[..length];
            if self.announcer.is_for(frame) {
                secondary.overhear(frame);
            }
        }
        true
    }

    /// Looks at the beginning of a frame that leaves as it is.
    pub(super) fn see(&mut self, first: &[u8]) {
        self.announcer.see(first);
    }

    /// Takes a frame of the guest.
    pub(super) fn transmit(&mut self, gate: &NetGate, frame: Vec<u8>) -> Transmit {
        self.announcer.see(&frame);
        match &mut self.side {
            Side::Alone if self.blocked.is_empty() => {
                self.leave(frame);
                return Transmit::Sent;
            }
            Side::Primary(primary) if primary.comparator.has_room() && self.blocked.is_empty() => {
                if primary.take(Instant::now(), frame) {
                    gate.permit.call();
                } else if primary.waits() {
                    gate.permit.tell_waiting();
                }
                self.release(gate);
                return Transmit::Sent;
            }
            Side::Secondary(secondary)
                if secondary.kept.len() < KEPT_MAX && !gate.outbox.is_full() =>
            {
                gate.outbox.put(Kind::Output, gate.device, &frame);
                self.mapper.note_outbound(&frame);
                secondary.kept.push_back(frame);
                return Transmit::Sent;
            }
            _ => {}
        }
        self.waits_for_room = true;
        Transmit::Full
    }

    /// Room that the next frame for the guest may need.
    pub(super) fn next_room(&mut self, gate: &NetGate) -> Option<usize> {
        match &self.side {
            Side::Secondary(secondary) => secondary.inbox.front().map(Vec::len),
            Side::Primary(_) if gate.outbox.is_full() => None,
            _ => match self.left.front() {
                Some(frame) => Some(frame.len()),
                None => self.outside.as_mut()?.next_room(),
            },
        }
    }

    /// The next frame for the guest, which is the outside's or the other side's.
    pub(super) fn receive(&mut self, gate: &NetGate) -> Option<&[u8]> {
        let waiting = match &mut self.side {
            Side::Secondary(secondary) => Some(secondary.next_input()?),
            Side::Primary(_) if gate.outbox.is_full() => return None,
            _ => self.left.pop_front(),
        };
        let len = match waiting {
            Some(frame) => {
                self.room[..frame.len()].copy_from_slice(&frame);
                frame.len()
            }
            None => self.outside.as_mut()?.take(&mut self.room)?,
        };
        if matches!(self.side, Side::Primary(_)) {
            gate.outbox.put(Kind::Input, gate.device, &self.room[..len]);
        }
        self.mapper.inbound(&mut self.room[..len]);
        if let Side::Primary(primary) = &mut self.side {
            primary.comparator.inbound(&self.room[..len]);
        }
        Some(&self.room[..len])
    }
}

#[cfg(test)]
#[path = "net_tests.rs"]
mod tests;
