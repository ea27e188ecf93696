//! A standby that is invited by a hostile primary: what each of its connections begins with, its guest, its disk, and
//! its first checkpoint; and the checkpoints of one that has its guest.
//!
//! ```text
//!   input:  flags, 1 | lengths of the first two parts, 2 each | call and checkpoints | pairing | keeping
//! ```
//!
//! Checksums find damage, not forgery, so every input is tried twice: as it is, and with lengths and checksums set
//! right.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use tandem_ft::runtime::hostile::{self, link_with, open_link_with};
use tandem_ft::runtime::{
    CALL_SIZE, Calls, Invitation, Pair, ProtectionError, ResyncMode, Standby, token_of,
};
use tandem_vmm::dirty::PageSet;
use tandem_vmm::memory;
use tandem_vmm::migration::Link;

use crate::frames::{MEMORY, sealed};
use crate::input::Input;

/// Bytes of what a connection says before its first frame.
const PREFACE: usize = 12;
/// Bytes of the disk that the guest may have.
const DISK: u64 = 256 << 10;
/// Flags of an input.
const HAS_DISK: u8 = 1;
const STAGES: u8 = 2;

/// The parts of an input.
struct Parts<'a> {
    flags: u8,
    said: [&'a [u8]; 3],
}

impl<'a> Parts<'a> {
    fn of(data: &'a [u8]) -> Self {
        let mut input = Input::new(data);
        let (flags, first, second) = (input.u8(), input.u16(), input.u16());
        let (checkpoints, pairing) = (input.take(first.into()), input.take(second.into()));
        let said = [checkpoints, pairing, input.rest()];
        Self { flags, said }
    }
}

pub(crate) fn run(data: &[u8]) {
    let Parts { flags, said } = Parts::of(data);
    join(flags, &said.map(<[u8]>::to_vec));
    join(flags, &said.map(with_frames));
    follow(flags, said[0]);
    follow(flags, &sealed(said[0]));
}

/// The same, with frames that are right behind call and preface.
fn with_frames(said: &[u8]) -> Vec<u8> {
    let (head, frames) = said.split_at(said.len().min(CALL_SIZE + PREFACE));
    [head, &sealed(frames)].concat()
}

/// Connections that were made already.
struct Made {
    calls: Mutex<Vec<(u128, Link)>>,
}

/// The other ends of connections: open until nobody reads what was said on them.
type Ends = Vec<UnixStream>;

impl Made {
    /// The one that says what there is, and all of it.
    fn first(said: &[u8]) -> (Self, Ends) {
        Self::new(&[said], link_with)
    }

    /// The others, in the order in which they are heard, which may say more for as long as their ends live.
    fn others(said: [&[u8]; 2]) -> (Self, Ends) {
        Self::new(&said, open_link_with)
    }

    fn new(said: &[&[u8]], make: fn(&[u8]) -> io::Result<(Link, UnixStream)>) -> (Self, Ends) {
        let (mut calls, mut ends) = (Vec::new(), Vec::new());
        for said in said {
            let Some((call, rest)) = said.split_first_chunk::<CALL_SIZE>() else {
                continue;
            };
            if let Some(token) = token_of(call) {
                let (link, end) = make(rest).expect("a connection");
                calls.push((token, link));
                ends.push(end);
            }
        }
        calls.reverse();
        let calls = Mutex::new(calls);
        (Self { calls }, ends)
    }
}

impl Calls for Made {
    fn next(
        &self,
        _deadline: Option<Instant>,
        _first: Option<&Link>,
    ) -> Result<(u128, Link), ProtectionError> {
        let next = self.calls.lock().expect("nobody panics with it").pop();
        next.ok_or_else(|| ProtectionError::Garbled("nobody".into()))
    }
}

/// A standby joins who says this, or says why not. Whether it does.
fn join(flags: u8, said: &[Vec<u8>; 3]) -> bool {
    let [first, others @ ..] = said;
    let (calls, _ends) = Made::first(first);
    let Ok(invited) = calls.next(None, None).and_then(Invitation::hear) else {
        return false;
    };
    let place = tempfile::tempdir().expect("a directory");
    let disks = match flags & HAS_DISK {
        0 => Vec::new(),
        _ => vec![place.path().join("disk")],
    };
    let offered = invited.offer.disks.iter();
    if offered.clone().any(|(_, bytes)| *bytes > DISK) {
        // Sizes are its host's to bear.
        invited.refuse("it is too large");
        return false;
    }
    let standby = Standby {
        disks,
        ..hostile::standby()
    };
    let [memory, beside] = [(); 2].map(|()| memory::allocate(MEMORY, false).expect("memory"));
    let pair = Arc::new(Pair::new("fuzz", 1, 1).expect("gates"));
    let (others, _others_ends) = Made::others([&others[0], &others[1]]);
    let joined = invited.accept(Box::new(others), &memory, beside, standby, &pair);
    assert!(!pair.status().protected, "nothing runs");
    let has_joined = joined.is_ok();
    match joined {
        Ok(joined) => joined.refuse("it is not run here"),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    has_joined
}

/// A standby that has its guest takes checkpoints. How many.
fn follow(flags: u8, said: &[u8]) -> u64 {
    let [memory, beside] = [(); 2].map(|()| memory::allocate(MEMORY, false).expect("memory"));
    let mode = match flags & STAGES {
        0 => ResyncMode::Running,
        _ => ResyncMode::Stopped,
    };
    let mut own = PageSet::all_of(&memory);
    for frame in (0..own.limit()).filter(|frame| frame % 3 != 0) {
        own.remove(frame);
    }
    let (taken, why) = hostile::take_checkpoints(mode, &memory, beside, &own, said);
    assert!(!why.to_string().is_empty());
    taken
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Target, seeds};

    #[test]
    fn good_primaries_are_joined_and_followed_and_no_others() {
        for (name, bytes) in seeds::of(&Target::named("joining")) {
            let parts = Parts::of(&bytes);
            let taken = follow(parts.flags, parts.said[0]);
            let joined = join(parts.flags, &parts.said.map(<[u8]>::to_vec));
            let expected = match name {
                "plain" | "disk-and-keeper" => (true, 0),
                "later" | "later-staged" => (false, 1),
                _ => (false, 0),
            };
            assert_eq!((joined, taken), expected, "{name}");
        }
    }
}
