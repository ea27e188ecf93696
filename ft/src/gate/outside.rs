//! What is behind the gate of a disk in tests.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::LazyLock;

use tandem_devices::GuestMemory;
use tandem_devices::event::Poller;
use tandem_devices::virtio::block::{BlockBackend, BlockIo, Operation, SECTOR};
use tandem_devices::virtio::buffers::Buffers;
use vm_memory::GuestAddress;

/// Requests from this token on fail.
pub(super) const BROKEN: usize = 100;

/// Memory for requests whose content is of no interest.
static MEMORY: LazyLock<Arc<GuestMemory>> =
    LazyLock::new(|| Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 4096)]).unwrap()));

/// Buffers without anything.
pub(super) fn no_buffers() -> Buffers {
    Buffers::new(&MEMORY)
}

/// Does requests, to an image if there is one, when it is asked what is done.
pub(super) struct Outside {
    bytes: u64,
    image: Option<File>,
    requests: VecDeque<BlockIo>,
}

impl Outside {
    /// A disk of so many bytes.
    pub(super) fn new(bytes: u64, image: Option<File>) -> Self {
        Self {
            bytes,
            image,
            requests: VecDeque::new(),
        }
    }

    fn carry_out(&self, io: &BlockIo) {
        let Some(image) = &self.image else { return };
        let mut content = vec![0; io.len as usize];
        match io.operation {
            Operation::Read => {
                image.read_exact_at(&mut content, io.offset).unwrap();
                io.buffers.write_at(0, &content);
            }
            Operation::Write { .. } => {
                io.buffers.read_at(0, &mut content);
                image.write_all_at(&content, io.offset).unwrap();
            }
            Operation::WriteZeroes { .. } => image.write_all_at(&content, io.offset).unwrap(),
            Operation::Flush | Operation::Discard => {}
        }
    }
}

impl BlockBackend for Outside {
    fn sectors(&self) -> u64 {
        self.bytes / SECTOR
    }

    fn block_size(&self) -> u32 {
        SECTOR as u32
    }

    fn is_readonly(&self) -> bool {
        false
    }

    fn start(&mut self, _poller: &mut dyn Poller, _token: u32) -> io::Result<()> {
        Ok(())
    }

    fn stop(&mut self, _poller: &mut dyn Poller) {}

    fn has_room(&self) -> bool {
        true
    }

    fn submit(&mut self, io: BlockIo) {
        self.requests.push_back(io);
    }

    fn flush_batch(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn next_completed(&mut self) -> Option<(usize, io::Result<()>)> {
        let io = self.requests.pop_front()?;
        if io.token >= BROKEN {
            return Some((io.token, Err(io::ErrorKind::StorageFull.into())));
        }
        self.carry_out(&io);
        Some((io.token, Ok(())))
    }

    fn wait(&mut self) -> io::Result<()> {
        Ok(())
    }
}
