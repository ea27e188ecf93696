//! Flows by name, bounded, in the order in which they were last used.
//!
//! Hostile peers choose the names, so the hash is keyed at random; nothing depends on the order of the
//! hash. Cost: one hash and two links per use.

use std::collections::HashMap;

use ahash::RandomState;

use crate::packet::Flow;

/// No slot.
const NONE: u32 = u32::MAX;

/// A map from flows to `V` with the order of use.
#[derive(Debug)]
pub(crate) struct FlowTable<V> {
    index: HashMap<Flow, u32, RandomState>,
    slots: Vec<Slot<V>>,
    free: Vec<u32>,
    newest: u32,
    oldest: u32,
    limit: usize,
}

#[derive(Debug)]
struct Slot<V> {
    flow: Flow,
    value: V,
    newer: u32,
    older: u32,
}

impl<V: Default> FlowTable<V> {
    /// A table for at most `limit` flows.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            index: HashMap::default(),
            slots: Vec::new(),
            free: Vec::new(),
            newest: NONE,
            oldest: NONE,
            limit: limit.clamp(1, NONE as usize - 1),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.index.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.len() >= self.limit
    }

    pub(crate) fn find(&self, flow: &Flow) -> Option<u32> {
        self.index.get(flow).copied()
    }

    pub(crate) fn flow(&self, id: u32) -> Flow {
        self.slots[id as usize].flow
    }

    pub(crate) fn get(&self, id: u32) -> &V {
        &self.slots[id as usize].value
    }

    pub(crate) fn get_mut(&mut self, id: u32) -> &mut V {
        &mut self.slots[id as usize].value
    }

    /// Puts a flow that is not there yet in, as the newest. There must be room.
    pub(crate) fn insert(&mut self, flow: Flow, value: V) -> u32 {
        assert!(!self.is_full(), "the caller makes room first");
        let slot = Slot {
            flow,
            value,
            newer: NONE,
            older: NONE,
        };
        let id = if let Some(id) = self.free.pop() {
            self.slots[id as usize] = slot;
            id
        } else {
            self.slots.push(slot);
            (self.slots.len() - 1) as u32
        };
        let before = self.index.insert(flow, id);
        assert!(before.is_none(), "a flow is there once");
        self.link(id);
        id
    }

    /// Takes a flow out.
    pub(crate) fn remove(&mut self, id: u32) -> V {
        self.unlink(id);
        let slot = &mut self.slots[id as usize];
        self.index.remove(&slot.flow);
        self.free.push(id);
        std::mem::take(&mut slot.value)
    }

    /// Makes a flow the newest.
    pub(crate) fn touch(&mut self, id: u32) {
        if self.newest != id {
            self.unlink(id);
            self.link(id);
        }
    }

    /// Flows from the one that was used longest ago.
    pub(crate) fn by_age(&self) -> impl Iterator<Item = u32> {
        let mut next = self.oldest;
        std::iter::from_fn(move || {
            let id = (next != NONE).then_some(next)?;
            next = self.slots[id as usize].newer;
            Some(id)
        })
    }

    pub(crate) fn clear(&mut self) {
        *self = Self::new(self.limit);
    }

    fn link(&mut self, id: u32) {
        let slot = &mut self.slots[id as usize];
        slot.newer = NONE;
        slot.older = self.newest;
        match self.newest {
            NONE => self.oldest = id,
            newest => self.slots[newest as usize].newer = id,
        }
        self.newest = id;
    }

    fn unlink(&mut self, id: u32) {
        let Slot { newer, older, .. } = self.slots[id as usize];
        match newer {
            NONE => self.newest = older,
            newer => self.slots[newer as usize].older = older,
        }
        match older {
            NONE => self.oldest = newer,
            older => self.slots[older as usize].newer = newer,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(number: u8) -> Flow {
        let mut bytes = [0; 42];
        bytes[31] = number;
        bytes[40] = 6;
        bytes[41] = 4;
        Flow::tcp_from_bytes(&bytes).unwrap()
    }

    fn ages(table: &FlowTable<u8>) -> Vec<u8> {
        table.by_age().map(|id| *table.get(id)).collect()
    }

    #[test]
    fn flows_come_in_the_order_of_use() {
        let mut table = FlowTable::new(3);
        let ids: Vec<u32> = (0..3).map(|n| table.insert(flow(n), n)).collect();
        assert!(table.is_full());
        table.touch(ids[0]);
        assert_eq!(ages(&table), [1, 2, 0]);
        table.touch(ids[0]);
        table.touch(ids[2]);
        assert_eq!(ages(&table), [1, 0, 2]);
        assert_eq!(table.remove(ids[0]), 0);
        assert_eq!(table.find(&flow(0)), None);
        assert_eq!(ages(&table), [1, 2]);
        let id = table.insert(flow(9), 9);
        assert_eq!(id, ids[0], "slots are used again");
        assert_eq!(ages(&table), [1, 2, 9]);
        assert_eq!(table.find(&flow(9)), Some(id));
        for id in [ids[1], ids[2], id] {
            table.remove(id);
        }
        assert!(table.is_empty());
        assert!(ages(&table).is_empty());
    }

    #[test]
    #[should_panic(expected = "makes room")]
    fn a_full_table_takes_no_more() {
        let mut table = FlowTable::new(1);
        table.insert(flow(0), 0);
        table.insert(flow(1), 1);
    }
}
