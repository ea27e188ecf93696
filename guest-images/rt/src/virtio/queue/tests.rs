use proptest::prelude::*;

use super::*;

/// The device's side, written from the standard rather than from the code above.
struct Device {
    taken: u16,
    used: u16,
}

impl Device {
    const fn new() -> Self {
        Self { taken: 0, used: 0 }
    }

    /// Head and parts of the next request that the driver published.
    fn take(&mut self, queue: &Queue) -> Option<(u16, Vec<Part>)> {
        let memory = &queue.memory;
        if memory.read::<u16>(queue.at.avail + 2) == self.taken {
            return None;
        }
        let slot = usize::from(self.taken % queue.size);
        let head: u16 = memory.read(queue.at.avail + 4 + 2 * slot);
        self.taken = self.taken.wrapping_add(1);
        let first = usize::from(head) * DESCRIPTOR_BYTES;
        if memory.read::<u16>(first + 12) & FLAG_INDIRECT == 0 {
            return Some((head, chain(memory, 0, head)));
        }
        let table = (memory.read::<u64>(first) - memory.address(0)) as usize;
        let parts = chain(memory, table, 0);
        assert_eq!(
            memory.read::<u32>(first + 8) as usize,
            parts.len() * DESCRIPTOR_BYTES
        );
        Some((head, parts))
    }

    fn complete(&mut self, queue: &Queue, head: u32, len: u32) {
        let at = queue.at.used + 4 + 8 * usize::from(self.used % queue.size);
        queue.memory.write(at, head);
        queue.memory.write(at + 4, len);
        self.used = self.used.wrapping_add(1);
        queue.memory.write(queue.at.used + 2, self.used);
    }
}

fn chain(memory: &Dma, table: usize, head: u16) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut next = Some(head);
    while let Some(descriptor) = next {
        let at = table + usize::from(descriptor) * DESCRIPTOR_BYTES;
        let flags: u16 = memory.read(at + 12);
        parts.push(Part {
            address: memory.read(at),
            len: memory.read(at + 8),
            device_writes: flags & FLAG_WRITE != 0,
        });
        next = (flags & FLAG_NEXT != 0).then(|| memory.read(at + 14));
    }
    parts
}

fn add(queue: &mut Queue, parts: &[Part]) -> Option<u16> {
    // SAFETY: no device dereferences these addresses.
    unsafe { queue.add(parts) }
}

fn parts(count: usize, seed: u64) -> Vec<Part> {
    let part = |i| Part {
        address: seed << 8 | i,
        len: i as u32 + 1,
        device_writes: i % 2 == 1,
    };
    (0..count as u64).map(part).collect()
}

proptest! {
    /// Whatever the order of adding, publishing and completing, the device sees every
    /// request once and whole, and each comes back under its own number.
    #[test]
    fn requests_arrive_whole_and_come_back_once(
        indirect: bool,
        event: bool,
        steps in proptest::collection::vec((0..3u8, 1..=PARTS_MAX, any::<proptest::sample::Index>()), 1..400),
    ) {
        let features = u64::from(indirect) * RING_INDIRECT + u64::from(event) * RING_EVENT_INDEX;
        let mut queue = Queue::new(0, 8, features);
        let mut device = Device::new();
        let (mut expected, mut held) = (alloc::collections::VecDeque::new(), Vec::new());
        for (number, (step, count, choice)) in steps.into_iter().enumerate() {
            match step {
                0 => {
                    let request = parts(count, number as u64);
                    let room = queue.free.len() >= queue.descriptors_for(count);
                    let head = add(&mut queue, &request);
                    prop_assert_eq!(head.is_some(), room);
                    expected.extend(head.map(|head| (head, request)));
                }
                1 => {
                    queue.publish();
                    while let Some(request) = device.take(&queue) {
                        held.push(request.0);
                    prop_assert_eq!(Some(request), expected.pop_front());
                    }
                }
                _ if !held.is_empty() => {
                    let head = held.swap_remove(choice.index(held.len()));
                    device.complete(&queue, head.into(), number as u32);
                    prop_assert_eq!(queue.pop(), Some(Used { head, len: number as u32 }));
                }
                _ => prop_assert_eq!(queue.pop(), None),
            }
            prop_assert_eq!(usize::from(queue.in_flight()), expected.len() + held.len());
        }
    }

    /// The definition: some index in (before, after] equals event + 1.
    #[test]
    fn passing_an_event_is_what_the_standard_says(event: u16, before: u16, steps in 0..300u16) {
        let by_hand = (0..steps).any(|i| before.wrapping_add(i) == event);
        prop_assert_eq!(passed(event, before, before.wrapping_add(steps)), by_hand);
    }
}

#[test]
fn notification_follows_the_event_index() {
    let mut queue = Queue::new(0, 8, RING_EVENT_INDEX);
    assert!(!queue.publish(), "nothing was added");
    add(&mut queue, &parts(1, 0));
    assert!(queue.publish(), "the device waits for index 0");
    add(&mut queue, &parts(1, 1));
    assert!(!queue.publish(), "the device has not asked again");
    queue.avail_event().store(2, Relaxed);
    add(&mut queue, &parts(1, 2));
    assert!(queue.publish());
}

#[test]
fn notification_follows_the_flag_without_event_index() {
    let mut queue = Queue::new(0, 8, 0);
    add(&mut queue, &parts(1, 0));
    assert!(queue.publish());
    queue.memory.write(queue.at.used, USED_NO_NOTIFY);
    add(&mut queue, &parts(1, 1));
    assert!(!queue.publish());
}

#[test]
fn arming_notices_what_is_already_there() {
    for features in [0, RING_EVENT_INDEX] {
        let mut queue = Queue::new(0, 8, features);
        let head = add(&mut queue, &parts(1, 0)).expect("an empty queue has room");
        queue.publish();
        assert!(queue.arm());
        Device::new().complete(&queue, head.into(), 0);
        assert!(!queue.arm());
    }
}

#[test]
#[should_panic(expected = "descriptor 3, not in flight")]
fn a_completion_of_nothing_panics() {
    let mut queue = Queue::new(0, 8, 0);
    Device::new().complete(&queue, 3, 0);
    queue.pop();
}

#[test]
#[should_panic(expected = "descriptor 70000, not in flight")]
fn a_completion_out_of_range_panics() {
    let mut queue = Queue::new(0, 8, 0);
    Device::new().complete(&queue, 70_000, 0);
    queue.pop();
}
