//! A guest's gates when its checkpoints go to a store: here, or where its copy is.
//!
//! Of a pair the secondary makes them, of what it has of the guest as of a checkpoint of the pair: that is exact, and
//! costs the primary nothing but that checkpoint. Who makes them is settled by terms of the store: whoever begins to
//! takes the next one. The primary lets its secondary do so when it has made its own last one
//! ([`Pair::let_copy_store`]), by the number of its term, of which the secondary takes the one after and no other: so
//! a primary that is alone again, and takes that itself, surely makes what its secondary was told worthless.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use roaring::RoaringBitmap;
use serde::{Deserialize, Serialize};
use tandem_vmm::error::causes;
use tandem_vmm::snapshot::GuestState;

use super::ProtectionError;
use super::checkpoint::{decode, encode};
use super::feed::Begun;
use super::pair::{Pair, PairCut};
use super::status::{Checkpoints, Role};
use crate::announce::Announcer;
use crate::arbiter::Term;
use crate::link::Kind;

/// How long outputs wait for a store: until they are explained, however long that takes.
const STORE_PATIENCE: Duration = Duration::from_secs(365 * 24 * 3600);
/// Bytes of frames that a checkpoint in a store keeps, of those that may not be out: networks may lose frames, and
/// whoever misses them asks again.
const FRAMES_KEPT: usize = 1 << 20;
/// Bytes of the addresses of a guest, at most.
const ADDRESSES_LENGTH_MAX: usize = 64 << 10;

/// What checkpoints in a store may cost, by which their interval is chosen; or what they did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// Share of its time for which the guest stands, in millionths.
    pub pause_ppm: u32,
    /// Bytes per second that go to the store.
    pub bandwidth: u64,
}

impl Default for Budget {
    /// A hundredth of the guest's time, and 32 MiB per second.
    fn default() -> Self {
        Self {
            pause_ppm: 10_000,
            bandwidth: 32 << 20,
        }
    }
}

/// How checkpoints of a guest go to a store: what a secondary is told of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stored {
    /// Where the store is, for every host alike.
    pub place: String,
    /// The file with the key by which it is encrypted, if it is.
    pub key: Option<PathBuf>,
    /// By which the store's terms of the hosts of a pair are known to be theirs.
    pub kin: u64,
    /// How often checkpoints are made, in milliseconds.
    pub every_ms: u64,
    /// What they may cost, if how often is chosen by that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<Budget>,
}

/// What a host has of a guest whose checkpoints go to a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The copy.
    Copy,
    /// The guest, without a copy.
    Alone,
    /// The guest, with the copy that is the so-manieth, and could go on with it or not yet.
    Owner {
        /// Which copy.
        copy: u64,
        /// Whether it could.
        protected: bool,
    },
}

/// Outputs that a checkpoint in a store explains.
pub struct Outputs(PairCut);

impl Outputs {
    /// Those of a checkpoint of a pair, of which there will be no more.
    pub(super) fn of(cut: &PairCut) -> Self {
        Self(PairCut {
            modes: None,
            ..cut.clone()
        })
    }

    /// As bytes, for [`Pair::go_on_from`].
    ///
    /// # Errors
    /// When they cannot be encoded.
    pub fn to_bytes(self) -> Result<Vec<u8>, ProtectionError> {
        encode(&self.0.bounded())
    }
}

impl PairCut {
    /// Without the last frames, if there are many.
    fn bounded(mut self) -> Self {
        for net in &mut self.nets {
            let mut left = FRAMES_KEPT;
            let fits = net.covered.iter().take_while(|frame| {
                let fits = frame.len() <= left;
                left = left.saturating_sub(frame.len());
                fits
            });
            let fits = fits.count();
            net.covered.truncate(fits);
        }
        self
    }
}

impl Pair {
    /// Says how the checkpoints in a store stand.
    pub fn tell_checkpoints(&self, checkpoints: Checkpoints) {
        self.lock_status().checkpoints = Some(checkpoints);
    }

    /// Adds an event.
    pub fn tell(&self, event: &str, text: String) {
        self.happened(event, text);
    }

    /// From now on outputs wait until they are explained by a checkpoint ([`Pair::explain`]) that is complete
    /// ([`Pair::complete`]).
    pub fn hold_outputs(&self) {
        self.cut(self.epoch(), STORE_PATIENCE);
    }

    /// A checkpoint is made of the guest, which stands: outputs so far are explained by it. Returns them, for whoever
    /// goes on from it: they may not be out then.
    pub fn explain(&self) -> Outputs {
        Outputs(self.cut(self.epoch() + 1, STORE_PATIENCE))
    }

    /// The checkpoint is complete: what it explains leaves.
    pub fn complete(&self) {
        self.commit(self.epoch() + 1);
    }

    /// Outputs wait for nothing any more. What a guest that has ended printed is written within `patience`.
    pub fn let_outputs_go(&self, patience: Duration) {
        self.open();
        self.drain_console(patience);
    }

    /// The guest goes on from a checkpoint in a store that says this of its outputs: those leave again, and the network
    /// is told where the guest is, whose interfaces have these addresses. It runs after that.
    ///
    /// # Errors
    /// When they are not outputs.
    pub fn go_on_from(&self, outputs: Option<&[u8]>) -> Result<(), ProtectionError> {
        if let Some(outputs) = outputs {
            let cut = decode(outputs, "outputs")?;
            self.become_secondary();
            self.loaded(cut)?;
            self.go_live(Instant::now());
        }
        Ok(())
    }

    /// The addresses that the guest's frames showed so far, as bytes for [`Pair::know_addresses`]. They are few.
    ///
    /// # Errors
    /// When they cannot be encoded.
    pub fn addresses(&self) -> Result<Vec<u8>, ProtectionError> {
        let all = self.nets().iter().map(|net| net.addresses());
        encode(&all.collect::<Vec<Announcer>>())
    }

    /// The guest had these addresses where it was before.
    ///
    /// # Errors
    /// When they are none, or too many.
    pub fn know_addresses(&self, bytes: &[u8]) -> Result<(), ProtectionError> {
        if bytes.len() > ADDRESSES_LENGTH_MAX {
            let length = bytes.len();
            let what = format!("addresses in {length} bytes; allowed are {ADDRESSES_LENGTH_MAX}");
            return Err(ProtectionError::Garbled(what));
        }
        let all: Vec<Announcer> = decode(bytes, "addresses")?;
        for (net, addresses) in self.nets().iter().zip(&all) {
            net.know(addresses);
        }
        Ok(())
    }

    /// Tells the network that the guest is here, by the addresses of its interfaces and those that it is known to use.
    pub fn announce(&self, macs: &[[u8; 6]]) {
        for (net, mac) in self.nets().iter().zip(macs) {
            net.announce(*mac);
        }
    }

    /// Checkpoints of the guest go to a store, also when its copy makes them.
    pub fn set_stored(&self, stored: Stored) {
        // It is the same one for as long as the guest lives.
        drop(self.stored.set(stored));
    }

    /// How they do.
    pub fn stored(&self) -> Option<&Stored> {
        self.stored.get()
    }

    /// What this host has of the guest.
    pub fn side(&self) -> Side {
        let status = self.lock_status();
        match (status.role, &status.peer) {
            (Role::Secondary, _) => Side::Copy,
            (Role::Primary, None) => Side::Alone,
            (Role::Primary, Some(_)) => Side::Owner {
                copy: self.joins(),
                protected: status.protected,
            },
        }
    }

    /// The copy is to make checkpoints for the store from now on: it takes the store's term after `term`.
    pub fn let_copy_store(&self, term: Term) {
        self.outbox().tell(Kind::Store, 0, term.0);
    }

    /// Asks the primary for a checkpoint, which the store is to get.
    pub fn ask_for_checkpoint(&self) {
        self.outbox().tell(Kind::StoreWaits, 0, self.epoch());
        self.permit().wake();
    }

    /// At a copy: a checkpoint is loaded, and the guest has yet to run. The beginning of what the store gets, if it waits.
    pub(super) fn give_cut(&self, state: &GuestState, cut: &PairCut) -> Option<Begun> {
        let begun = self.feed().begin_cut(state, cut, &self.images());
        begun.unwrap_or_else(|error| {
            // It is the store's loss alone, which asks again.
            tracing::warn!(why = %causes(&error), "the store does not get a checkpoint");
            None
        })
    }

    /// The guest runs: the rest of it.
    pub(super) fn give_rest(&self, begun: Option<Begun>) {
        let given = begun.map_or(Ok(()), |begun| self.feed().complete_cut(begun));
        if let Err(error) = given {
            tracing::warn!(why = %causes(&error), "the store does not get a checkpoint");
        }
    }

    /// From now on it is known what the guest writes to its disks, for a store.
    pub fn follow_disks(&self) {
        self.disks().iter().for_each(|disk| disk.track_for_store());
    }

    /// The end of [`Pair::follow_disks`].
    pub fn follow_disks_no_more(&self) {
        self.disks().iter().for_each(|disk| disk.forget_store());
    }

    /// What the guest wrote to its disks since this was asked last: some of it may come again.
    pub fn take_stored(&self) -> Vec<(u8, RoaringBitmap)> {
        let disks = (0..).zip(self.disks());
        disks
            .map(|(number, disk)| (number, disk.take_stored()))
            .collect()
    }

    /// The guest, which stands, will wait with writes to its disks, for a store.
    pub fn hold_disks_for_store(&self) {
        self.disks().iter().for_each(|disk| disk.hold_for_store());
    }

    /// It waits no longer for that.
    pub fn let_disks_go_for_store(&self) {
        self.disks().iter().for_each(|disk| disk.let_go_for_store());
    }
}

#[cfg(test)]
mod store_tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

    use tandem_devices::virtio::net::HEADER_SIZE;
    use tandem_devices::virtio::net::NetBackend;
    use tandem_devices::virtio::net::memory::MemoryBackend;
    use tandem_vmm::gates::Gates;

    use super::super::pair::Pair;
    use super::*;

    const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 1];

    fn frame(mark: u8) -> Vec<u8> {
        let mut frame = vec![0; HEADER_SIZE];
        frame.extend([0xff; 6]);
        frame.extend(GUEST);
        frame.extend([0x88, 0xb5, mark]);
        frame
    }

    /// A guest's gates, the backend that its network device sees, and the outside.
    fn guest() -> (Pair, Box<dyn NetBackend>, MemoryBackend) {
        let pair = Pair::new("guest", 1, 0).unwrap();
        let outside = MemoryBackend::default();
        let device = pair.net(0, Box::new(outside.clone()));
        (pair, device, outside)
    }

    fn marks(outside: &MemoryBackend) -> Vec<u8> {
        let sent = std::mem::take(&mut outside.wire().sent);
        sent.iter().map(|frame| frame[HEADER_SIZE + 14]).collect()
    }

    #[test]
    fn outputs_leave_with_the_checkpoint_that_explains_them() {
        let (pair, mut device, outside) = guest();
        pair.hold_outputs();
        device.send(&frame(1));
        assert!(pair.holds() && marks(&outside).is_empty());
        let first = pair.explain();
        device.send(&frame(2));
        pair.complete();
        assert_eq!(marks(&outside), [1]);
        // One that fails leaves its outputs to the next.
        drop(pair.explain());
        device.send(&frame(3));
        let last = pair.explain();
        device.send(&frame(4));
        assert!(marks(&outside).is_empty());
        pair.complete();
        assert_eq!(marks(&outside), [2, 3]);
        pair.let_outputs_go(Duration::ZERO);
        assert_eq!(marks(&outside), [4]);
        assert_eq!(first.0.nets[0].covered.len(), 1);
        assert_eq!(last.0.nets[0].covered.len(), 2);
    }

    #[test]
    fn who_goes_on_repeats_what_may_not_be_out() {
        let (pair, mut device, outside) = guest();
        pair.hold_outputs();
        device.send(&frame(1));
        let outputs = pair.explain().to_bytes().unwrap();
        let (next, mut device, elsewhere) = guest();
        next.go_on_from(Some(&outputs)).unwrap();
        assert_eq!(marks(&elsewhere), [1]);
        device.send(&frame(2));
        assert_eq!(marks(&elsewhere), [2]);
        next.announce(&[GUEST]);
        assert_eq!(elsewhere.wire().sent.len(), 1);
        assert!(marks(&outside).is_empty());
        assert!(next.go_on_from(Some(b"nothing")).is_err());
    }

    #[test]
    fn who_goes_on_announces_the_addresses_that_the_guest_used() {
        let (pair, mut device, _outside) = guest();
        // An IPv4 packet, whose source is looked at.
        let mut packet = frame(0);
        packet[HEADER_SIZE + 12..].copy_from_slice(&[8, 0, 0x45]);
        packet.extend([0; 40]);
        packet[HEADER_SIZE + 26..HEADER_SIZE + 30].copy_from_slice(&[10, 0, 0, 9]);
        device.send(&packet);
        let addresses = pair.addresses().unwrap();
        let (next, _device, elsewhere) = guest();
        next.know_addresses(&addresses).unwrap();
        next.announce(&[GUEST]);
        let sent = std::mem::take(&mut elsewhere.wire().sent);
        assert_eq!(sent.len(), 2, "one for its interface, one for its address");
        let arp = &sent[1][HEADER_SIZE..];
        assert_eq!(
            (&arp[6..12], &arp[28..32]),
            (&GUEST[..], &[10, 0, 0, 9][..])
        );
        assert!(next.know_addresses(b"nothing").is_err());
        let many = vec![0xc0; ADDRESSES_LENGTH_MAX + 1];
        let told = next.know_addresses(&many).unwrap_err().to_string();
        assert!(told.contains("allowed are"), "{told}");
    }

    #[test]
    fn a_checkpoint_keeps_a_bounded_part_of_what_is_held() {
        let (pair, mut device, _outside) = guest();
        pair.hold_outputs();
        let large = [frame(0), vec![7; 60_000]].concat();
        for _ in 0..40 {
            device.send(&large);
        }
        let bytes = pair.explain().to_bytes().unwrap();
        assert!(bytes.len() <= FRAMES_KEPT + 4096, "{}", bytes.len());
        assert!(bytes.len() > FRAMES_KEPT / 2, "{}", bytes.len());
    }
}
