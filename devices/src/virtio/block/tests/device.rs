//! The device against a disk in memory, which tests can hold back.

use super::*;
use crate::virtio::VirtioDevice;
use crate::virtio::block::memory::MemoryBackend;
use crate::virtio::block::{Operation, QUEUE_SIZE, ZERO_SECTORS_MAX};
use crate::virtio::conformance::check_working;
use crate::virtio::registers::offset;

const READ_ONLY_FEATURE: u64 = 1 << 5;

fn started() -> (Disk, MemoryBackend) {
    let backend = MemoryBackend::new(SECTORS);
    (Disk::new(Box::new(backend.clone())), backend)
}

#[test]
fn identifier_is_cut_to_its_field() {
    let (mut disk, _) = started();
    assert_eq!(disk.request(GET_ID, 0, &[(DATA, 20, true)]), (OK, 21));
    assert_eq!(disk.driver.bytes(DATA, 20), b"serial-number-of-dis");
    disk.driver.put(DATA, &[0; 20]);
    assert_eq!(disk.request(GET_ID, 0, &[(DATA, 8, true)]), (OK, 9));
    assert_eq!(disk.driver.bytes(DATA, 12), b"serial-n\0\0\0\0");
}

#[test]
fn config_space_tells_size_and_blocks() {
    let backend = MemoryBackend::new(SECTORS);
    backend.contents().block_size = 4096;
    let mut disk = Disk::new(Box::new(backend));
    assert_eq!(disk.driver.get(offset::CONFIG), SECTORS as u32);
    assert_eq!(disk.driver.get(offset::CONFIG + 4), 0);
    assert_eq!(disk.driver.get(offset::CONFIG + 12), 254, "segments");
    assert_eq!(disk.driver.get(offset::CONFIG + 20), 4096, "block size");
}

#[test]
fn what_the_disk_does_not_allow_is_an_error_and_never_reaches_it() {
    let (mut disk, backend) = started();
    let data = [(DATA, 1024, true)];
    for sector in [SECTORS - 1, SECTORS, u64::MAX / 512, u64::MAX] {
        assert_eq!(disk.request(IN, sector, &data), (IOERR, 1), "{sector}");
    }
    for (what, kind, data) in [
        ("not a whole sector", IN, &[(DATA, 100, true)][..]),
        ("nothing to read into", IN, &[]),
        ("nothing to write", OUT, &[]),
        ("room where data should be", OUT, &[(DATA, 512, true)]),
        ("data where room should be", IN, &[(DATA, 512, false)]),
        ("half a segment", DISCARD, &[(DATA, 8, false)]),
        ("two segments", DISCARD, &[(DATA, 32, false)]),
        ("no segment", WRITE_ZEROES, &[]),
    ] {
        assert_eq!(disk.request(kind, 0, data), (IOERR, 1), "{what}");
    }
    for (sector, sectors) in [
        (0, 0),
        (SECTORS, 1),
        (SECTORS - 1, 2),
        (u64::MAX, 1),
        (0, ZERO_SECTORS_MAX + 1),
        (0, u32::MAX),
    ] {
        let status = disk.zero(WRITE_ZEROES, sector, sectors, 0);
        assert_eq!(status, IOERR, "{sectors} at {sector}");
    }
    assert_eq!(disk.request(99, 0, &data), (UNSUPPORTED, 1));
    assert_eq!(disk.zero(DISCARD, 0, 8, 1), UNSUPPORTED, "unmap flag");
    assert_eq!(
        disk.zero(WRITE_ZEROES, 0, 8, 2),
        UNSUPPORTED,
        "unknown flag"
    );
    assert!(!disk.driver.needs_reset());
    assert!(backend.contents().log.is_empty());
    assert_eq!(disk.request(IN, 0, &data), (OK, 1025));
}

#[test]
fn readonly_disks_refuse_writes() {
    let backend = MemoryBackend::new(SECTORS);
    backend.contents().readonly = true;
    let mut disk = Disk::new(Box::new(backend.clone()));
    assert_eq!(disk.request(OUT, 0, &[(DATA, 512, false)]), (IOERR, 1));
    assert_eq!(disk.zero(DISCARD, 0, 8, 0), IOERR);
    assert_eq!(disk.zero(WRITE_ZEROES, 0, 8, 0), IOERR);
    assert_eq!(disk.request(IN, 3, &[(DATA, 512, true)]), (OK, 513));
    assert_eq!(backend.contents().log, [(Operation::Read, 3 * SECTOR, 512)]);
    assert_ne!(disk.driver.offered() & READ_ONLY_FEATURE, 0);
}

#[test]
fn a_request_without_header_or_status_asks_for_a_reset() {
    for parts in [
        &[(HEADER, 8, false), (STATUS, 1, true)][..],
        &[(HEADER, 16, false)],
        &[(STATUS, 1, true)],
        &[(HEADER, 16, false), (STATUS, 0, true)],
    ] {
        let (mut disk, _) = started();
        disk.prepare(0, IN, 1);
        disk.driver.send(0, 0, parts);
        assert!(disk.driver.needs_reset(), "{parts:?}");
        let features = disk.driver.offered();
        disk.driver.start(features);
        assert_eq!(disk.request(IN, 1, &[(DATA, 512, true)]).0, OK);
    }
}

#[test]
fn header_and_status_may_be_scattered() {
    let (mut disk, backend) = started();
    backend.contents().bytes[512..1024].fill(7);
    disk.prepare(0, IN, 1);
    let parts = [
        (HEADER, 3, false),
        (HEADER + 3, 13, false),
        (DATA, 100, true),
        (DATA + 100, 413, true),
    ];
    disk.driver.send(0, 0, &parts);
    assert_eq!(disk.completed(), (0, 513));
    assert_eq!(disk.driver.bytes(DATA, 513), [&[7; 512][..], &[0]].concat());
}

#[test]
fn writes_are_durable_at_once_for_a_driver_that_does_not_flush() {
    for (without, durable) in [(0, false), (FLUSH_FEATURE, true)] {
        let backend = MemoryBackend::new(SECTORS);
        let mut disk = Disk::without(Box::new(backend.clone()), without);
        assert_eq!(disk.request(OUT, 0, &[(DATA, 512, false)]).0, OK);
        let log = &backend.contents().log;
        assert_eq!(log[..], [(Operation::Write { durable }, 0, 512)]);
    }
}

/// Offers `count` reads of a sector each and kicks once.
fn offer_reads(disk: &mut Disk, count: u64) {
    for number in 0..count {
        let (header, status) = disk.prepare(number, IN, number);
        let data = (DATA + number * 512, 512, true);
        let chain = [header, data, status];
        disk.driver.write_chain(0, number as u16 * 3, &chain);
        disk.driver.offer(0, number as u16 * 3);
    }
    disk.driver.kick(0);
}

#[test]
fn a_batch_is_handed_over_at_once_and_answered_by_one_interrupt() {
    let (mut disk, backend) = started();
    offer_reads(&mut disk, 32);
    assert_eq!(backend.contents().batches, 1);
    assert_eq!(disk.driver.interrupts(), 1);
    assert_eq!(backend.contents().log.len(), 32);
}

const EVENT_IDX_FEATURE: u64 = 1 << 29;

/// The driver has looked at the first `used` completions and waits for the next (2.7.10).
fn look(disk: &Disk, used: u16) {
    let at = disk.driver.avail_ring(0) + 4 + u64::from(disk.driver.size(0)) * 2;
    disk.driver.put(at, &used.to_le_bytes());
}

/// Whether the device wants a kick for the next request, when `offered` were offered so far.
fn wants_kick(disk: &Disk, offered: u16) -> bool {
    let at = disk.driver.used_ring(0) + 4 + u64::from(disk.driver.size(0)) * 8;
    disk.driver.bytes(at, 2) == offered.to_le_bytes()
}

fn offer_read_without_kick(disk: &mut Disk) {
    let (header, status) = disk.prepare(0, IN, 0);
    let chain = [header, (DATA, 512, true), status];
    disk.driver.write_chain(0, 0, &chain);
    disk.driver.offer(0, 0);
}

fn takes_used(disk: &mut Disk) -> usize {
    std::iter::from_fn(|| disk.driver.take_used(0)).count()
}

#[test]
fn requests_of_a_driver_that_is_behind_gather_until_there_are_no_more() {
    let (mut disk, backend) = started();
    offer_reads(&mut disk, 1);
    assert!(disk.driver.poller.again.is_empty(), "nobody was behind");
    assert!(wants_kick(&disk, 1));
    // Without having looked at the first.
    offer_reads(&mut disk, 1);
    assert_eq!(
        takes_used(&mut disk),
        2,
        "what came with a kick is not late"
    );
    for _ in 0..5 {
        let later = std::mem::take(&mut disk.driver.poller.again);
        assert_eq!(later.len(), 1, "a look at what gathers");
        assert!(!wants_kick(&disk, 2));
        (0..3).for_each(|_| offer_read_without_kick(&mut disk));
        let batches = backend.contents().batches;
        disk.driver.ready(later[0]);
        assert_eq!(takes_used(&mut disk), 3);
        assert_eq!(backend.contents().batches, batches + 1);
    }
    let later = std::mem::take(&mut disk.driver.poller.again);
    disk.driver.ready(later[0]);
    assert!(disk.driver.poller.again.is_empty(), "nothing gathered");
    assert!(wants_kick(&disk, 17));
    assert_eq!(disk.driver.interrupts(), 1, "until the driver looks");
}

/// Such a driver has one request in flight and nothing to do but to wait for the look.
#[test]
fn a_driver_that_finds_completions_without_interrupts_waits_for_few_looks() {
    let (mut disk, _) = started();
    let mut looks = 0;
    for offered in 0..1000 {
        if wants_kick(&disk, offered) {
            offer_reads(&mut disk, 1);
        } else {
            offer_read_without_kick(&mut disk);
            look(&disk, offered);
            let later = std::mem::take(&mut disk.driver.poller.again);
            assert_eq!(later.len(), 1, "request {offered} waits for a look");
            disk.driver.ready(later[0]);
            looks += 1;
            assert_eq!(disk.driver.interrupts(), 1 + looks);
        }
        assert_eq!(takes_used(&mut disk), 1);
    }
    assert!((1..=12).contains(&looks), "{looks} looks");
}

#[test]
fn a_driver_that_keeps_up_kicks_for_each_request() {
    for without in [0, EVENT_IDX_FEATURE] {
        let backend = MemoryBackend::new(SECTORS);
        let mut disk = Disk::without(Box::new(backend), without);
        for number in 1..10 {
            offer_reads(&mut disk, 1);
            assert_eq!(takes_used(&mut disk), 1);
            look(&disk, number);
            assert_eq!(disk.driver.interrupts(), u64::from(number));
            assert!(disk.driver.poller.again.is_empty());
            assert!(without != 0 || wants_kick(&disk, number));
        }
    }
}

#[test]
fn requests_that_gather_survive_a_pause_and_go_with_a_reset() {
    let (mut disk, _) = started();
    (0..2).for_each(|_| offer_reads(&mut disk, 1));
    offer_read_without_kick(&mut disk);
    let Driver {
        transport, poller, ..
    } = &mut disk.driver;
    transport.quiesce(poller);
    transport.save().unwrap();
    transport.kick_all(poller);
    assert_eq!(takes_used(&mut disk), 3);
    let later = std::mem::take(&mut disk.driver.poller.again);
    let features = disk.driver.offered();
    disk.driver.start(features);
    later.iter().for_each(|token| disk.driver.ready(*token));
    assert_eq!(disk.request(IN, 1, &[(DATA, 512, true)]).0, OK);
    assert!(disk.driver.poller.again.is_empty(), "the driver is new");
}

#[test]
fn requests_wait_in_the_queue_while_the_backend_is_full() {
    let (mut disk, backend) = started();
    backend.contents().hold = true;
    backend.contents().room = 5;
    offer_reads(&mut disk, 20);
    for finished in 0..20 {
        assert_eq!(disk.driver.take_used(0), None);
        assert_eq!(backend.contents().held.len(), 5.min(20 - finished));
        backend.contents().release = 1;
        disk.driver.ready(0);
        assert_eq!(disk.driver.take_used(0), Some((finished as u32 * 3, 513)));
    }
    assert_eq!(disk.counter("in_flight"), 0);
}

#[test]
fn a_reset_waits_for_requests_in_flight_and_forgets_them() {
    let (mut disk, backend) = started();
    backend.contents().hold = true;
    offer_reads(&mut disk, 10);
    assert_eq!(disk.counter("in_flight"), 10);
    disk.driver.set(offset::STATUS, 0);
    assert!(backend.contents().held.is_empty());
    assert!(!backend.contents().started);
    assert_eq!(disk.counter("in_flight"), 0);
    let features = disk.driver.offered();
    disk.driver.start(features);
    disk.driver.ready(0);
    assert_eq!(disk.driver.take_used(0), None, "of the life before");
    backend.contents().hold = false;
    for _ in 0..2 * usize::from(QUEUE_SIZE) {
        assert_eq!(disk.request(IN, 1, &[(DATA, 512, true)]).0, OK);
    }
}

#[test]
fn quiesce_finishes_all_requests_in_flight() {
    let (mut disk, backend) = started();
    backend.contents().hold = true;
    offer_reads(&mut disk, 10);
    disk.driver.transport.quiesce(&mut disk.driver.poller);
    assert!(backend.contents().held.is_empty());
    let heads: Vec<_> = (0..10).map(|_| disk.completed().0).collect();
    assert_eq!(heads, (0..10).map(|n| n * 3).collect::<Vec<u32>>());
    assert!(disk.driver.interrupts() > 0);
}

#[test]
fn settling_takes_what_is_done_and_waits_for_nothing() {
    let (mut disk, backend) = started();
    backend.contents().hold = true;
    offer_reads(&mut disk, 10);
    let mut settled = || disk.driver.transport.settle(&mut disk.driver.poller);
    assert!(!settled());
    backend.contents().release = 4;
    assert!(!settled());
    backend.contents().release = 6;
    assert!(settled());
    let heads: Vec<_> = (0..10).map(|_| disk.completed().0).collect();
    assert_eq!(heads, (0..10).map(|n| n * 3).collect::<Vec<u32>>());
}

#[test]
fn failures_of_the_host_are_errors_of_the_request() {
    let (mut disk, backend) = started();
    backend.contents().broken = true;
    assert_eq!(disk.request(IN, 1, &[(DATA, 512, true)]), (IOERR, 1));
    assert_eq!(disk.request(FLUSH, 0, &[]), (IOERR, 1));
    backend.contents().broken = false;
    assert_eq!(disk.request(FLUSH, 0, &[]), (OK, 1));
    assert_eq!(disk.counter("errors"), 2);
}

#[test]
fn the_device_conforms_while_its_disk_answers_at_once_late_or_never() {
    for (hold, room) in [(false, 256), (true, 256), (true, 3)] {
        let make = || {
            let backend = MemoryBackend::new(SECTORS);
            backend.contents().hold = hold;
            backend.contents().room = room;
            // Late: some complete at the first event, the others when somebody waits.
            backend.contents().release = 40;
            Box::new(Block::new(Box::new(backend), "id")) as Box<dyn VirtioDevice>
        };
        check_working(make, |driver| {
            driver.put(HEADER, &[0; 16]);
            let parts = [(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)];
            driver.send(0, 0, &parts);
            driver.transport.quiesce(&mut driver.poller);
            assert_eq!(driver.take_used(0), Some((0, 513)));
        });
    }
}
