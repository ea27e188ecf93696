//! What a hostile keeper says to a copy, before and after that took over; what a hostile copy says to a keeper; and
//! calls of hostile primaries.
//!
//! Checksums find damage, not forgery, so every input is tried twice: as it is, and with lengths and checksums set
//! right.

use std::time::{Duration, Instant};

use tandem_devices::virtio::net::NetBackend;
use tandem_devices::virtio::net::memory::MemoryBackend;
use tandem_ft::keeper::is_told_of_takeover;
use tandem_ft::runtime::hostile::{link_with, take_late_frames};
use tandem_ft::runtime::{CALL_SIZE, Pair, token_of};
use tandem_vmm::gates::Gates;

use crate::input::Input;
use crate::link::sealed;

/// Bytes of memory that a copy keeps of what a keeper sends, at most.
const MEMORY_MAX: u64 = 8 << 20;
/// How long the guest may take what came.
const PATIENCE: Duration = Duration::from_secs(5);

pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let end = input.u8();
    let said = input.rest();
    for said in [said.to_vec(), sealed(said)] {
        match end % 3 {
            0 => late_frames(&said, false),
            1 => late_frames(&said, true),
            _ => takeover(&said),
        }
    }
    if let Some(call) = said.first_chunk::<CALL_SIZE>()
        && let Some(token) = token_of(call)
    {
        assert_eq!(call[CALL_SIZE - 16..], token.to_le_bytes());
    }
}

fn late_frames(said: &[u8], is_live: bool) {
    let pair = Pair::new("fuzz", 2, 0).expect("gates");
    let outside = MemoryBackend::default();
    let mut device = pair.net(0, Box::new(outside));
    pair.become_secondary();
    if is_live {
        pair.let_outputs_go(Duration::ZERO);
    }
    let why = take_late_frames(&pair, said).expect("a connection");
    assert!(!why.to_string().is_empty());
    assert!(pair.status().protection_memory_bytes <= MEMORY_MAX);
    drain(device.as_mut());
}

/// The guest takes what there is.
fn drain(device: &mut dyn NetBackend) {
    let end = Instant::now() + PATIENCE;
    while let Some(length) = device.next_room() {
        device.take(&mut vec![0; length]);
        assert!(Instant::now() < end, "frames have an end");
    }
}

fn takeover(said: &[u8]) {
    let (link, _far) = link_with(said).expect("a connection");
    let told = is_told_of_takeover(&link);
    // Nothing but a term says so.
    assert!(!told || said.first() == Some(&12));
}
