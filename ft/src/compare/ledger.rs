//! What waits: in the order of arrival, and per flow.
//!
//! An entry is in two lists: that of its flow, which is emptied from the front, and one of two by age:
//! `fresh`, or `late` for what its patience ended for but may wait for longer. All steps take the
//! same few links; slots are used again, so nothing is allocated once the ledger has grown.

use std::time::Instant;

/// No slot.
const NONE: u32 = u32::MAX;

/// First and last entry of a list.
#[derive(Clone, Copy, Debug)]
pub(super) struct Queue {
    first: u32,
    last: u32,
}

impl Default for Queue {
    fn default() -> Self {
        Self {
            first: NONE,
            last: NONE,
        }
    }
}

impl Queue {
    pub(super) fn is_empty(&self) -> bool {
        self.first == NONE
    }
}

/// Which list by age an entry is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Age {
    Fresh,
    Late,
}

/// All that waits of one side.
#[derive(Debug)]
pub(super) struct Ledger<T> {
    slots: Vec<Entry<T>>,
    free: Vec<u32>,
    ages: [Queue; 2],
    len: usize,
}

#[derive(Debug)]
pub(super) struct Entry<T> {
    item: Option<T>,
    /// The flow it belongs to.
    pub(super) flow: u32,
    /// Its number among all of its side.
    pub(super) serial: u64,
    /// When it came.
    pub(super) since: Instant,
    age: Age,
    older: u32,
    newer: u32,
    /// The next one of its flow.
    behind: u32,
}

impl<T> Entry<T> {
    pub(super) fn item(&self) -> &T {
        self.item.as_ref().expect("an entry in a list has its item")
    }
}

impl<T> Ledger<T> {
    pub(super) fn new() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            ages: [Queue::default(); 2],
            len: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Adds an entry at the end of `queue`. Serials grow.
    pub(super) fn push(
        &mut self,
        queue: &mut Queue,
        flow: u32,
        (serial, since): (u64, Instant),
        item: T,
    ) {
        let entry = Entry {
            item: Some(item),
            flow,
            serial,
            since,
            age: Age::Fresh,
            older: NONE,
            newer: NONE,
            behind: NONE,
        };
        let id = if let Some(id) = self.free.pop() {
            self.slots[id as usize] = entry;
            id
        } else {
            self.slots.push(entry);
            (self.slots.len() - 1) as u32
        };
        match queue.last {
            NONE => queue.first = id,
            last => self.slots[last as usize].behind = id,
        }
        queue.last = id;
        self.link(id, Age::Fresh);
        self.len += 1;
    }

    /// The first of `queue`.
    pub(super) fn first(&self, queue: &Queue) -> Option<&Entry<T>> {
        self.slots.get(queue.first as usize)
    }

    /// Takes the first of `queue` out.
    pub(super) fn pop(&mut self, queue: &mut Queue) -> Option<T> {
        let id = queue.first;
        let slot = self.slots.get_mut(id as usize)?;
        let item = slot.item.take();
        queue.first = slot.behind;
        if queue.first == NONE {
            queue.last = NONE;
        }
        self.unlink(id);
        self.free.push(id);
        self.len -= 1;
        item
    }

    /// The oldest entry of a list by age.
    pub(super) fn oldest(&self, age: Age) -> Option<&Entry<T>> {
        self.slots.get(self.ages[age as usize].first as usize)
    }

    /// Number of the oldest entry of all.
    pub(super) fn first_serial(&self) -> Option<u64> {
        let serials = [Age::Fresh, Age::Late].map(|age| self.oldest(age).map(|entry| entry.serial));
        serials.into_iter().flatten().min()
    }

    /// Lets the oldest fresh entry wait for longer.
    pub(super) fn defer(&mut self) {
        let id = self.ages[Age::Fresh as usize].first;
        if id != NONE {
            self.unlink(id);
            self.link(id, Age::Late);
        }
    }

    /// Flows of all entries, in the order of arrival of the fresh ones, and late ones first.
    pub(super) fn flows(&self) -> Vec<u32> {
        let mut flows = Vec::with_capacity(self.len);
        for queue in [
            self.ages[Age::Late as usize],
            self.ages[Age::Fresh as usize],
        ] {
            let mut next = queue.first;
            while let Some(entry) = self.slots.get(next as usize) {
                flows.push(entry.flow);
                next = entry.newer;
            }
        }
        flows
    }

    /// Takes all entries out, in the order of arrival. The queues of flows are void from then on.
    pub(super) fn take_all(&mut self) -> Vec<T> {
        let mut items = Vec::with_capacity(self.len);
        let mut heads = self.ages.map(|queue| queue.first);
        while let Some(age) = self.earlier(heads) {
            let slot = &mut self.slots[heads[age] as usize];
            heads[age] = slot.newer;
            items.extend(slot.item.take());
        }
        self.slots.clear();
        self.free.clear();
        self.ages = [Queue::default(); 2];
        self.len = 0;
        items
    }

    /// Which of two entries came first.
    fn earlier(&self, heads: [u32; 2]) -> Option<usize> {
        let serial = |id: u32| self.slots.get(id as usize).map(|slot| slot.serial);
        match heads.map(serial) {
            [None, None] => None,
            [Some(_), None] => Some(0),
            [None, Some(_)] => Some(1),
            [Some(one), Some(two)] => Some(usize::from(two < one)),
        }
    }

    fn link(&mut self, id: u32, age: Age) {
        let queue = &mut self.ages[age as usize];
        let before = std::mem::replace(&mut queue.last, id);
        match before {
            NONE => queue.first = id,
            before => self.slots[before as usize].newer = id,
        }
        let slot = &mut self.slots[id as usize];
        (slot.age, slot.older, slot.newer) = (age, before, NONE);
    }

    fn unlink(&mut self, id: u32) {
        let Entry {
            age, older, newer, ..
        } = self.slots[id as usize];
        let queue = &mut self.ages[age as usize];
        match older {
            NONE => queue.first = newer,
            older => self.slots[older as usize].newer = newer,
        }
        match newer {
            NONE => self.ages[age as usize].last = older,
            newer => self.slots[newer as usize].older = older,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_are_emptied_from_the_front_and_ages_stay_in_order() {
        let now = Instant::now();
        let mut ledger = Ledger::new();
        let (mut one, mut two) = (Queue::default(), Queue::default());
        ledger.push(&mut one, 1, (1, now), 'a');
        ledger.push(&mut two, 2, (2, now), 'b');
        ledger.push(&mut one, 1, (3, now), 'c');
        ledger.defer();
        assert_eq!(ledger.oldest(Age::Late).unwrap().serial, 1);
        assert_eq!(ledger.oldest(Age::Fresh).unwrap().serial, 2);
        assert_eq!(ledger.flows(), [1, 2, 1]);
        assert_eq!(ledger.pop(&mut one), Some('a'));
        assert_eq!(ledger.first_serial(), Some(2));
        assert_eq!(ledger.pop(&mut one), Some('c'));
        assert_eq!(ledger.pop(&mut one), None);
        assert!(one.is_empty() && ledger.oldest(Age::Late).is_none());
        ledger.push(&mut one, 1, (4, now), 'd');
        ledger.push(&mut two, 2, (5, now), 'e');
        assert_eq!(ledger.slots.len(), 3, "slots are used again");
        assert_eq!(ledger.len(), 3);
        // b and d are late, e and f fresh.
        ledger.defer();
        ledger.push(&mut one, 1, (6, now), 'f');
        assert_eq!(ledger.take_all(), ['b', 'd', 'e', 'f']);
        assert_eq!((ledger.len(), ledger.first_serial()), (0, None));
    }
}
