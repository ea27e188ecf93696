//! A disk whose completions are paced, as its driver sees it.

use super::*;
use crate::pace::{Pace, PaceState, Safepoint};
use crate::state::{DeviceState, RestoreError, TransportState};
use crate::virtio::block::QUEUE_SIZE;
use crate::virtio::block::memory::MemoryBackend;
use crate::virtio::transport::pacing::{PACE_TOKEN, PaceFigures};

const EVENT_IDX: u64 = 1 << 29;
/// So slow that nothing matures in a test.
const SLOW: &str = "custom+latency-us:60000000";
/// As that, where nothing counts but halted vCPUs.
const SLOW_UNTIL_HALTED: &str = "custom+latency-us:60000000+safepoints:halted";

fn pace(text: &str) -> Pace {
    text.parse().unwrap()
}

fn paced_without(text: &str, without: u64) -> Disk {
    let mut disk = Disk::without(Box::new(MemoryBackend::new(SECTORS)), without);
    disk.set_pace(text);
    disk
}

fn paced(text: &str) -> Disk {
    paced_without(text, 0)
}

impl Disk {
    /// Sends a read as request `head`.
    fn read(&mut self, head: u16) {
        let number = u64::from(head);
        let (header, status) = self.prepare(number, IN, number % SECTORS);
        let parts = [header, (DATA + number * 512, 512, true), status];
        // Three descriptors each, indirect ones out of the way of their rings.
        self.driver.send(0, head * 3 % 255, &parts);
    }

    fn set_pace(&mut self, text: &str) {
        let driver = &mut self.driver;
        assert!(driver.transport.set_pace(pace(text), &mut driver.poller));
    }

    fn reach(&mut self, kind: Safepoint) {
        let driver = &mut self.driver;
        driver.transport.safepoint(kind, &mut driver.poller);
    }

    fn used(&mut self) -> usize {
        std::iter::from_fn(|| self.driver.take_used(0)).count()
    }

    fn figures(&self) -> PaceFigures {
        self.driver.transport.pace_figures().unwrap()
    }
}

#[test]
fn a_device_without_a_pace_has_no_figures_of_one() {
    let disk = paced("none");
    assert_eq!(disk.driver.transport.pace_figures(), None);
    assert_eq!(disk.driver.transport.save_pace(), None);
}

#[test]
fn completions_wait_for_a_safepoint_and_come_together() {
    let mut disk = paced(SLOW_UNTIL_HALTED);
    (0..3).for_each(|head| disk.read(head));
    assert_eq!((disk.used(), disk.driver.interrupts()), (0, 0));
    assert!(disk.driver.transport.awaits(Safepoint::Halted));
    assert!(disk.driver.poller.again.contains(&PACE_TOKEN));
    disk.reach(Safepoint::Halted);
    assert_eq!((disk.used(), disk.driver.interrupts()), (3, 1));
    let figures = disk.figures();
    assert_eq!(figures.counters.early, [3, 0, 0, 0, 0]);
    assert_eq!(figures.waiting, 0);
    assert!(figures.counters.saved.as_secs() > 3 * 50);
}

#[test]
fn what_matured_is_delivered_by_the_timer() {
    const NOMINAL: Duration = Duration::from_millis(3);
    let mut disk = paced("custom+latency-us:3000+safepoints:");
    let begun = Instant::now();
    disk.read(0);
    while disk.used() == 0 {
        assert!(
            begun.elapsed() < Duration::from_secs(10),
            "it never matures"
        );
        disk.driver.ready(PACE_TOKEN);
    }
    assert!(begun.elapsed() >= NOMINAL);
    assert_eq!(disk.driver.interrupts(), 1);
}

#[test]
fn nothing_is_early_while_an_interrupt_is_in_service() {
    for without in [0, EVENT_IDX] {
        let mut disk = paced_without(SLOW, without);
        disk.read(0);
        disk.reach(Safepoint::Halted);
        assert_eq!(disk.used(), 1);
        disk.read(1);
        disk.reach(Safepoint::Halted);
        assert_eq!(disk.used(), 0, "it was not acknowledged");
        disk.driver.rearm(0);
        disk.reach(Safepoint::Halted);
        assert_eq!((disk.used(), disk.driver.interrupts()), (1, 2));
    }
}

#[test]
fn a_kick_is_a_safepoint_for_what_waits_and_not_for_what_it_brings() {
    let mut disk = paced(SLOW);
    disk.read(0);
    disk.read(1);
    assert_eq!(
        disk.used(),
        1,
        "the first one waited when the second was kicked"
    );
    assert_eq!(disk.figures().counters.early[Safepoint::Kick as usize], 1);
    assert_eq!(disk.figures().waiting, 1);
}

#[test]
fn to_go_on_after_a_pause_is_no_kick() {
    let mut disk = paced(SLOW);
    disk.read(0);
    let driver = &mut disk.driver;
    driver.transport.kick_all(&mut driver.poller);
    assert_eq!((disk.used(), disk.figures().waiting), (0, 1));
}

#[test]
fn a_driver_that_wants_no_interrupt_gets_its_completions_at_once() {
    let mut disk = paced(SLOW);
    disk.driver.want_interrupt_at(0, 0x8000);
    disk.read(0);
    assert_eq!((disk.used(), disk.driver.interrupts()), (1, 0));
    let mut disk = paced_without(SLOW, EVENT_IDX);
    let flags = disk.driver.avail_ring(0);
    disk.driver.put(flags, &[1, 0]);
    disk.read(0);
    assert_eq!((disk.used(), disk.driver.interrupts()), (1, 0));
    assert_eq!(disk.figures().counters.early[Safepoint::Poll as usize], 1);
}

#[test]
fn a_pace_can_be_changed_while_completions_wait() {
    let mut disk = paced("custom+latency-us:60000000+safepoints:");
    disk.read(0);
    disk.set_pace("none+safepoints:");
    disk.read(1);
    assert_eq!(
        (disk.used(), disk.figures().waiting),
        (1, 1),
        "the second one"
    );
    disk.driver.rearm(0);
    disk.set_pace(SLOW_UNTIL_HALTED);
    disk.reach(Safepoint::Halted);
    assert_eq!((disk.used(), disk.figures().waiting), (1, 0));
}

#[test]
fn a_reset_forgets_what_waits() {
    let mut disk = paced(SLOW);
    disk.read(0);
    disk.driver.start(0);
    assert_eq!(disk.figures().waiting, 0);
    disk.reach(Safepoint::Halted);
    assert_eq!(disk.used(), 0);
}

#[test]
fn a_driver_that_gives_out_requests_twice_needs_a_reset() {
    let mut disk = paced("custom+latency-us:60000000+safepoints:");
    for _ in 0..QUEUE_SIZE {
        disk.read(0);
    }
    assert_eq!(
        (disk.figures().waiting, disk.driver.needs_reset()),
        (256, false)
    );
    disk.read(0);
    assert!(disk.driver.needs_reset());
    assert_eq!(disk.figures().waiting, 0);
}

type Saved = (TransportState, DeviceState, PaceState);

fn save(disk: &mut Disk) -> Saved {
    let driver = &mut disk.driver;
    driver.transport.quiesce(&mut driver.poller);
    let (transport, device) = driver.transport.save().unwrap();
    (transport, device, driver.transport.save_pace().unwrap())
}

fn restore(from: &Disk, saved: &Saved) -> (Disk, Result<(), RestoreError>) {
    let device = Block::new(Box::new(MemoryBackend::new(SECTORS)), "");
    let mut driver = Driver::new(Box::new(device));
    driver.take_place_of(&from.driver);
    let (transport, device, pace) = saved;
    let mut restored = driver
        .transport
        .restore(transport, device, &mut driver.poller);
    if restored.is_ok() {
        restored = driver.transport.restore_pace(pace, &mut driver.poller);
    }
    if restored.is_ok() {
        driver.transport.kick_all(&mut driver.poller);
    }
    (Disk { driver }, restored)
}

#[test]
fn what_waits_is_saved_and_comes_once() {
    let mut disk = paced(SLOW_UNTIL_HALTED);
    (0..4).for_each(|head| disk.read(head));
    let saved = save(&mut disk);
    assert_eq!((disk.used(), saved.2.queues[0].waiting.len()), (0, 4));
    let (mut other, restored) = restore(&disk, &saved);
    restored.unwrap();
    assert_eq!(other.used(), 0);
    assert_eq!(other.driver.transport.pace(), Some(pace(SLOW_UNTIL_HALTED)));
    other.reach(Safepoint::Halted);
    assert_eq!((other.used(), other.driver.interrupts()), (4, 1));
    other.driver.rearm(0);
    other.reach(Safepoint::Halted);
    assert_eq!(other.used(), 0);
}

#[test]
fn a_state_that_cannot_be_is_refused() {
    let mut disk = paced(SLOW);
    disk.read(0);
    let saved = save(&mut disk);
    let changes: [fn(&mut PaceState); 4] = [
        |state| state.safepoints.push("lunch".into()),
        |state| state.queues[0].queue = 1,
        |state| state.queues[0].waiting[0].entries[0].0 = 256,
        |state| {
            let one = state.queues[0].waiting[0].clone();
            state.queues[0].waiting = vec![one; 257];
        },
    ];
    for change in changes {
        let mut broken = saved.clone();
        change(&mut broken.2);
        let (mut other, restored) = restore(&disk, &broken);
        assert!(
            matches!(restored, Err(RestoreError::Value { .. })),
            "{restored:?}"
        );
        assert_eq!(other.driver.status(), 0, "at power-on");
    }
    assert!(restore(&disk, &saved).1.is_ok());
}
