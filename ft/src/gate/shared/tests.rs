//! Writes through gates of both copies, to one image.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use tandem_devices::GuestMemory;
use tandem_devices::virtio::block::BlockBackend;
use tandem_devices::virtio::buffers::Buffers;
use vm_memory::GuestAddress;

use super::super::outside::Outside;
use super::copy::LOCK_LOOK;
use super::*;
use crate::mirror::BLOCK;
use crate::pair::Gate;

const BYTES: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_millis(50);
const WRITE: Operation = Operation::Write { durable: false };

/// One host's side of a disk.
struct Host {
    gate: Arc<SharedGate>,
    disk: SharedDisk,
    permit: Arc<Permit>,
    memory: Arc<GuestMemory>,
}

impl Host {
    fn new(image: &tempfile::NamedTempFile) -> Self {
        let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let permit = Arc::new(Permit::new(event));
        let gate = SharedGate::new(2, Arc::new(Outbox::default()), Arc::clone(&permit));
        let gate = Arc::new(gate.unwrap());
        let open = || File::options().read(true).write(true).open(image).unwrap();
        let outside = Outside::new(BYTES, Some(open()));
        let disk = SharedDisk::new(Arc::clone(&gate), Box::new(outside), open());
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap();
        Self {
            gate,
            disk,
            permit,
            memory: Arc::new(memory),
        }
    }

    /// Asks for a block to be written with `value`; the request has its number for a token.
    fn write(&mut self, block: u64, value: u8) {
        let buffers = self.buffers(block);
        buffers.write_at(0, &[value; BLOCK_SIZE]);
        self.ask(block, WRITE, buffers);
    }

    fn buffers(&self, block: u64) -> Buffers {
        let mut buffers = Buffers::new(&self.memory);
        assert!(buffers.push(GuestAddress(block * BLOCK), BLOCK_SIZE));
        buffers
    }

    fn ask(&mut self, block: u64, operation: Operation, buffers: Buffers) {
        self.disk.submit(BlockIo {
            token: block as usize,
            operation,
            offset: block * BLOCK,
            len: BLOCK,
            buffers,
        });
        self.disk.flush_batch().unwrap();
    }

    fn done(&mut self) -> Vec<usize> {
        let done = std::iter::from_fn(|| self.disk.next_completed());
        done.map(|(token, result)| result.map(|()| token).unwrap())
            .collect()
    }

    /// What the guest reads in a block.
    fn read(&mut self, block: u64) -> u8 {
        let buffers = self.buffers(block);
        self.ask(block, Operation::Read, buffers.clone());
        assert_eq!(self.done(), [block as usize]);
        buffers.to_vec()[0]
    }

    /// What a copy's message says of a block with `value`, written since checkpoint `epoch`.
    fn told(&self, epoch: u64, block: u64, value: u8) -> Vec<u8> {
        let digest = xxh3_128_with_seed(&[value; BLOCK_SIZE], 0);
        let mut message = epoch.to_le_bytes().to_vec();
        message.extend((block * BLOCK).to_le_bytes());
        message.extend(BLOCK.to_le_bytes());
        message.extend(digest.to_le_bytes());
        message
    }

    /// The copy wrote `value` to a block. Whether that differs.
    fn hear(&self, block: u64, value: u8) -> bool {
        self.hear_since(1, block, value)
    }

    fn hear_since(&self, epoch: u64, block: u64, value: u8) -> bool {
        let told = self.told(epoch, block, value);
        self.gate.secondary_write(&told).unwrap()
    }
}

fn image() -> tempfile::NamedTempFile {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(BYTES).unwrap();
    image
}

fn in_image(image: &tempfile::NamedTempFile, block: u64) -> u8 {
    let mut byte = [0];
    image
        .as_file()
        .read_exact_at(&mut byte, block * BLOCK)
        .unwrap();
    byte[0]
}

/// A primary that is protected in `mode`.
fn primary(image: &tempfile::NamedTempFile, mode: Mode) -> Host {
    let host = Host::new(image);
    host.gate.cut(1, PATIENCE, mode);
    assert!(!host.gate.commit(Instant::now()));
    host
}

fn copy(image: &tempfile::NamedTempFile) -> Host {
    let host = Host::new(image);
    host.gate.become_secondary();
    assert!(host.gate.load(1));
    host
}

#[test]
fn a_write_is_done_when_both_copies_made_it_and_the_lease_holds() {
    let image = image();
    let mut host = primary(&image, Mode::Lockstep);
    host.write(1, 11);
    assert!(host.done().is_empty() && in_image(&image, 1) == 0);
    host.permit.set(Gate::Shut, Gate::Shut);
    assert!(!host.hear(1, 11));
    assert!(
        host.done().is_empty() && in_image(&image, 1) == 0,
        "nobody owns the guest surely"
    );
    host.permit.set(Gate::Open, Gate::Open);
    assert_eq!(host.done(), [1]);
    assert_eq!(in_image(&image, 1), 11);
    // The copy may be ahead.
    assert!(!host.hear(2, 22));
    host.write(2, 22);
    assert_eq!(host.done(), [2]);
    assert!(!host.gate.owes() && host.gate.mismatch().is_none());
    host.write(3, 33);
    assert!(host.hear(3, 34));
    assert!(host.done().is_empty() && in_image(&image, 3) == 0);
    assert!(host.gate.mismatch().unwrap().starts_with("disk 2: "));
}

#[test]
fn what_waits_when_the_guest_stands_is_covered_and_done_once_that_is_loaded() {
    let image = image();
    let mut host = primary(&image, Mode::Lockstep);
    host.write(1, 11);
    host.disk.wait().unwrap();
    assert_eq!(host.done(), [1]);
    assert!(host.gate.mismatch().is_some(), "a checkpoint is due");
    assert_eq!((host.read(1), in_image(&image, 1)), (11, 0));
    host.gate.cut(2, PATIENCE, Mode::Lockstep);
    // What comes later stays behind it, whatever the copy says.
    host.write(1, 12);
    assert!(!host.hear_since(1, 1, 99), "that was before");
    assert!(!host.hear_since(2, 1, 12));
    assert!(host.gate.write_covered().unwrap() && in_image(&image, 1) == 0);
    assert!(host.done().is_empty(), "it is not loaded");
    assert!(host.gate.commit(Instant::now()));
    assert!(host.done().is_empty());
    host.permit.set(Gate::Shut, Gate::Shut);
    assert!(!host.gate.write_covered().unwrap() && in_image(&image, 1) == 0);
    host.permit.set(Gate::Open, Gate::Open);
    assert!(host.gate.write_covered().unwrap() && in_image(&image, 1) == 11);
    assert_eq!(host.done(), [1]);
    assert_eq!(in_image(&image, 1), 12);
}

#[test]
fn in_the_mode_checkpoint_writes_complete_and_wait() {
    let image = image();
    let mut host = primary(&image, Mode::Checkpoint);
    host.write(1, 11);
    let zeros = host.buffers(2);
    host.ask(2, Operation::WriteZeroes { unmap: true }, zeros);
    assert_eq!(host.done(), [1, 2]);
    assert!(host.gate.waiting().is_some() && host.gate.owes());
    assert_eq!((host.read(1), in_image(&image, 1)), (11, 0));
    host.gate.cut(2, PATIENCE, Mode::Checkpoint);
    // The copy gets them with the checkpoint.
    let mut other = copy(&image);
    for part in host.gate.covered().encode(2, 1 << 16) {
        for (disk, blocks) in super::super::overlay::decode(&part).unwrap() {
            assert!(disk == 2 && other.gate.stage(blocks));
        }
    }
    assert_eq!(other.read(1), 0, "it has yet to load that");
    assert!(other.gate.load(2));
    assert_eq!((other.read(1), in_image(&image, 1)), (11, 0));
    other.gate.settle(1);
    assert_eq!(other.read(1), 0, "it is told that this is done");
}

#[test]
fn a_guest_without_its_copy_goes_on_with_all_it_was_told() {
    let image = image();
    let mut host = primary(&image, Mode::Lockstep);
    host.write(1, 11);
    host.disk.wait().unwrap();
    assert_eq!(host.done(), [1]);
    host.write(1, 12);
    host.write(2, 22);
    assert!(host.done().is_empty());
    host.gate.open().unwrap();
    assert_eq!(in_image(&image, 1), 11);
    assert_eq!(host.done(), [1, 2]);
    assert_eq!((in_image(&image, 1), in_image(&image, 2)), (12, 22));
}

#[test]
fn a_copy_writes_nothing_until_it_takes_over_and_has_the_lock() {
    let image = image();
    let mut host = copy(&image);
    host.write(1, 11);
    host.write(2, 22);
    host.ask(3, Operation::Flush, host.buffers(3));
    assert_eq!(host.done(), [1, 2, 3]);
    assert_eq!((host.read(1), in_image(&image, 1)), (11, 0));
    // The primary's same write is done, and the copy was told.
    image
        .as_file()
        .write_all_at(&[11; BLOCK_SIZE], BLOCK)
        .unwrap();
    host.gate.settle(2);
    assert_eq!(host.read(1), 11);
    let owner = File::open(image.path()).unwrap();
    flock(&owner, FlockOperation::LockExclusive).unwrap();
    let gate = Arc::clone(&host.gate);
    let takes = std::thread::spawn(move || gate.take_over(|_| {}));
    std::thread::sleep(10 * LOCK_LOOK);
    assert!(!takes.is_finished() && in_image(&image, 2) == 0);
    host.write(4, 44);
    assert_eq!(host.done(), [4]);
    drop(owner);
    takes.join().unwrap().unwrap();
    let blocks = [1, 2, 4].map(|block| in_image(&image, block));
    assert_eq!(blocks, [11, 22, 44]);
    host.write(1, 12);
    assert_eq!(host.done(), [1]);
    assert_eq!(in_image(&image, 1), 12);
}

#[test]
fn messages_that_are_no_writes_to_the_disk_are_refused() {
    let image = image();
    let host = primary(&image, Mode::Lockstep);
    let good = host.told(1, 1, 1);
    for cut in [0, 8, 16, 23, 24, 28, 39] {
        host.gate.secondary_write(&good[..cut]).unwrap_err();
    }
    host.gate
        .secondary_write(&[&good[..], &[0; 16]].concat())
        .unwrap_err();
    host.gate
        .secondary_write(&host.told(1, BYTES / BLOCK, 1))
        .unwrap_err();
    host.gate
        .secondary_write(&host.told(1, u64::MAX / BLOCK, 1))
        .unwrap_err();
    host.gate.secondary_write(&good).unwrap();
}

/// There is no room for what the gate writes to the image.
fn fill(host: &Host) {
    let full = File::options().read(true).write(true).open("/dev/full");
    set_image(host, full.unwrap());
}

fn mend(host: &Host, image: &tempfile::NamedTempFile) {
    set_image(host, image.reopen().unwrap());
}

fn set_image(host: &Host, file: File) {
    host.gate.set_image(SharedImage {
        file: Arc::new(file),
        bytes: BYTES,
    });
}

#[test]
fn what_a_guest_was_told_is_done_is_kept_until_its_image_can_be_written() {
    let image = image();
    let mut host = primary(&image, Mode::Checkpoint);
    host.write(1, 11);
    assert_eq!(host.done(), [1]);
    fill(&host);
    let error = host.gate.open().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    assert!(host.gate.owes() && !host.gate.has_copy());
    assert_eq!(host.read(1), 11);
    host.write(1, 12);
    host.write(2, 22);
    assert!(host.done().is_empty(), "nothing passes what is owed");
    host.gate.open().unwrap_err();
    // The guest is saved, for which its writes have to complete.
    host.disk.wait().unwrap();
    assert_eq!(host.done(), [1, 2]);
    assert_eq!(
        (host.read(1), host.read(2), in_image(&image, 1)),
        (12, 22, 0)
    );
    host.write(3, 33);
    mend(&host, &image);
    host.gate.open().unwrap();
    assert!(!host.gate.owes());
    assert_eq!((in_image(&image, 1), in_image(&image, 2)), (12, 22));
    assert_eq!(host.done(), [3]);
    assert_eq!(in_image(&image, 3), 33);
}

#[test]
fn a_takeover_that_cannot_write_is_tried_again() {
    let image = image();
    let mut host = copy(&image);
    host.write(1, 11);
    fill(&host);
    host.gate.take_over(|_| {}).unwrap_err();
    host.write(2, 22);
    assert_eq!(host.done(), [1, 2]);
    assert!(host.gate.is_copy() && host.gate.owed_bytes() == 2 * BLOCK_SIZE);
    mend(&host, &image);
    host.gate.take_over(|_| {}).unwrap();
    assert_eq!((in_image(&image, 1), in_image(&image, 2)), (11, 22));
    assert!(!host.gate.is_copy());
}
