//! A hostile side of a pair at the connection of inputs and outputs: both roles with their gates, between the socket
//! and the machine that decides who owns the guest. Each must end as that machine says, and serve afterwards.
//!
//! Checksums find damage, not forgery, so every input is tried twice: as it is, and with lengths and checksums set
//! right.

use std::sync::Arc;

use tandem_devices::virtio::net::memory::MemoryBackend;
use tandem_devices::virtio::net::{HEADER_SIZE, NetBackend};
use tandem_ft::runtime::Pair;
use tandem_ft::runtime::hostile::{PrimaryEnd, SecondaryEnd};
use tandem_ft::runtime::status::Role;
use tandem_vmm::gates::Gates;

use crate::input::Input;
use crate::link::sealed;

/// Bytes of a frame that the guest sends.
const FRAME: usize = HEADER_SIZE + 60;
/// Bytes of memory that gates take for what the other side said, at most: twice of that, and what an entry costs.
const MEMORY_MAX: u64 = 8 << 20;

pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let is_primary = input.u8() & 1 == 0;
    let said = input.rest();
    for said in [said.to_vec(), sealed(said)] {
        let guest = Guest::new();
        if is_primary {
            guest.hear_secondary(&said);
        } else {
            guest.hear_primary(&said);
        }
    }
}

/// A guest's gates, its network device's backend, and the outside.
struct Guest {
    pair: Arc<Pair>,
    device: Box<dyn NetBackend>,
    outside: MemoryBackend,
}

impl Guest {
    fn new() -> Self {
        let pair = Pair::new("fuzz", 1, 0).expect("gates");
        let outside = MemoryBackend::default();
        let device = pair.net(0, Box::new(outside.clone()));
        Self {
            pair: Arc::new(pair),
            device,
            outside,
        }
    }

    fn send(&mut self, mark: u8) {
        let mut frame = vec![mark; FRAME];
        frame[..HEADER_SIZE].fill(0);
        self.device.send(&frame);
    }

    fn hear_secondary(mut self, said: &[u8]) {
        let primary = PrimaryEnd::new(&self.pair).expect("a primary");
        self.send(1);
        assert!(self.sent().is_empty(), "nothing leaves without a match");
        assert!(primary.hear(said).expect("a connection"), "it is alone");
        self.serves(1);
    }

    fn hear_primary(mut self, said: &[u8]) {
        let secondary = SecondaryEnd::new(&self.pair, said).expect("a secondary");
        self.send(1);
        assert!(self.sent().is_empty(), "nothing of a copy leaves");
        assert!(secondary.hear(), "it is live or ended");
        let status = self.pair.status();
        assert!(status.protection_memory_bytes <= MEMORY_MAX, "{status:?}");
        if status.role == Role::Primary {
            self.serves(0);
        }
    }

    /// What the guest sends leaves, and `before` at least what it had sent.
    fn serves(mut self, before: usize) {
        assert!(self.sent().len() >= before);
        self.send(2);
        let sent = self.sent();
        assert!(
            sent.iter().any(|frame| frame.last() == Some(&2)),
            "it leaves"
        );
    }

    fn sent(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.outside.wire().sent)
    }
}
