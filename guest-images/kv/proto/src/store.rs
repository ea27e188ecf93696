//! Keys and values in memory, within a budget.
//!
//! Every growth is either paid from the budget first or refused as [`OutOfMemory`], and the large
//! allocations are tried rather than assumed, so that a client that fills the guest gets an error
//! and not a dead server.

use alloc::boxed::Box;
use alloc::rc::Rc;
use alloc::vec::Vec;

use foldhash::fast::FixedState;
use hashbrown::HashMap;

/// Values up to this many octets are copied into replies; longer ones are shared with them.
pub(crate) const SHORT_VALUE_BYTES_MAX: usize = 4096;
/// What an allocation is taken to cost beyond its octets.
const ALLOCATION_OVERHEAD_BYTES: usize = 32;
/// Part of the budget that keys and values leave to the connections' buffers: one in this many.
const BUFFERS_SHARE: usize = 16;
/// Where the hashes start: fixed, as two runs over the same commands have to agree.
const HASH_SEED: u64 = 0x7461_6e64_656d_6b76;

/// The store is full: the command was not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the memory budget of the store is used up")]
pub struct OutOfMemory;

/// A value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// Up to 4,096 octets.
    Short(Vec<u8>),
    /// More; a reply under way keeps it alive after it was replaced.
    Long(Rc<Vec<u8>>),
}

impl Value {
    /// The octets.
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Short(octets) => octets,
            Self::Long(octets) => octets,
        }
    }

    fn new(octets: &[u8]) -> Result<Self, OutOfMemory> {
        let copy = copied(octets)?;
        Ok(if octets.len() <= SHORT_VALUE_BYTES_MAX {
            Self::Short(copy)
        } else {
            Self::Long(Rc::new(copy))
        })
    }

    /// Octets of memory that the value takes.
    fn cost(&self) -> usize {
        let capacity = match self {
            Self::Short(octets) => octets.capacity(),
            Self::Long(octets) => octets.capacity() + ALLOCATION_OVERHEAD_BYTES,
        };
        capacity + ALLOCATION_OVERHEAD_BYTES
    }
}

fn copied(octets: &[u8]) -> Result<Vec<u8>, OutOfMemory> {
    let mut copy = Vec::new();
    copy.try_reserve_exact(octets.len())
        .map_err(|_| OutOfMemory)?;
    copy.extend_from_slice(octets);
    Ok(copy)
}

/// The keys and values, and the memory that they, and the connections' buffers, may take.
#[derive(Debug)]
pub struct Store {
    map: HashMap<Box<[u8]>, Value, FixedState>,
    used: usize,
    limit: usize,
    /// Microseconds since boot that commands may tell, if they may.
    time: Option<u64>,
}

impl Store {
    /// An empty store that may take `limit` octets of memory.
    pub fn new(limit: usize) -> Self {
        Self {
            map: HashMap::with_hasher(FixedState::with_seed(HASH_SEED)),
            used: 0,
            limit,
            time: None,
        }
    }

    /// Commands may tell that so many microseconds have passed since boot.
    pub fn set_time(&mut self, time: u64) {
        self.time = Some(time);
    }

    /// Microseconds since boot, if they may be told.
    pub(crate) fn time(&self) -> Option<u64> {
        self.time
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether there are no keys.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Octets of memory taken, as estimated.
    pub fn used_bytes(&self) -> usize {
        self.used + self.map.allocation_size()
    }

    /// Octets of memory that may be taken.
    pub fn limit_bytes(&self) -> usize {
        self.limit
    }

    /// Takes `octets` from the budget, for a buffer.
    ///
    /// # Errors
    /// [`OutOfMemory`] if there are not as many; nothing is taken then.
    pub fn charge(&mut self, octets: usize) -> Result<(), OutOfMemory> {
        if octets > self.limit.saturating_sub(self.used_bytes()) {
            return Err(OutOfMemory);
        }
        self.used += octets;
        Ok(())
    }

    /// Whether keys and values may take `octets` more.
    fn has_room(&self, octets: usize) -> Result<(), OutOfMemory> {
        let limit = self.limit - self.limit / BUFFERS_SHARE;
        let fits = octets <= limit.saturating_sub(self.used_bytes());
        fits.then_some(()).ok_or(OutOfMemory)
    }

    /// Gives `octets` back to the budget.
    pub fn release(&mut self, octets: usize) {
        debug_assert!(octets <= self.used);
        self.used = self.used.saturating_sub(octets);
    }

    /// The value of `key`.
    pub fn get(&self, key: &[u8]) -> Option<&Value> {
        self.map.get(key)
    }

    /// Whether `key` exists.
    pub fn contains(&self, key: &[u8]) -> bool {
        self.map.contains_key(key)
    }

    /// Sets `key` to `octets`.
    ///
    /// # Errors
    /// [`OutOfMemory`]; the key then is what it was.
    pub fn set(&mut self, key: &[u8], octets: &[u8]) -> Result<(), OutOfMemory> {
        match self.map.get_mut(key) {
            Some(Value::Short(old)) if octets.len() <= old.capacity() => {
                old.clear();
                old.extend_from_slice(octets);
                Ok(())
            }
            Some(_) => self.replace(key, octets),
            None => self.insert(key, octets),
        }
    }

    /// Gives an existing key another value. Both exist for a moment, so both must fit.
    fn replace(&mut self, key: &[u8], octets: &[u8]) -> Result<(), OutOfMemory> {
        let value = self.paid_value(octets)?;
        let old = self
            .map
            .get_mut(key)
            .map(|place| core::mem::replace(place, value));
        self.release(old.map_or(0, |old| old.cost()));
        Ok(())
    }

    fn insert(&mut self, key: &[u8], octets: &[u8]) -> Result<(), OutOfMemory> {
        self.grow()?;
        let key_cost = key.len() + ALLOCATION_OVERHEAD_BYTES;
        self.has_room(key_cost)?;
        self.used += key_cost;
        let entry = copied(key).and_then(|key| Ok((key, self.paid_value(octets)?)));
        match entry {
            Ok((key, value)) => {
                self.map.insert(key.into_boxed_slice(), value);
                Ok(())
            }
            Err(error) => {
                self.release(key_cost);
                Err(error)
            }
        }
    }

    /// A value of its own whose cost has been taken from the budget.
    fn paid_value(&mut self, octets: &[u8]) -> Result<Value, OutOfMemory> {
        self.has_room(octets.len() + 2 * ALLOCATION_OVERHEAD_BYTES)?;
        let value = Value::new(octets)?;
        // The exact cost; the allocator may have given a little more than was asked.
        self.used += value.cost();
        Ok(value)
    }

    /// Makes room for one more key. The table doubles, and both tables exist for a moment.
    fn grow(&mut self) -> Result<(), OutOfMemory> {
        if self.map.len() < self.map.capacity() {
            return Ok(());
        }
        self.has_room(2 * self.map.allocation_size())?;
        self.map.try_reserve(1).map_err(|_| OutOfMemory)
    }

    /// Removes `key`; tells whether it existed.
    pub fn remove(&mut self, key: &[u8]) -> bool {
        let Some((key, value)) = self.map.remove_entry(key) else {
            return false;
        };
        self.release(key.len() + ALLOCATION_OVERHEAD_BYTES + value.cost());
        true
    }

    /// Removes every key.
    pub fn clear(&mut self) {
        let map = core::mem::take(&mut self.map);
        self.map = HashMap::with_hasher(FixedState::with_seed(HASH_SEED));
        let freed: usize = map
            .iter()
            .map(|(key, value)| key.len() + ALLOCATION_OVERHEAD_BYTES + value.cost())
            .sum();
        self.release(freed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const ROOM: usize = 64 << 20;

    #[derive(Clone, Debug)]
    enum Operation {
        Set(u8, usize),
        Remove(u8),
        Clear,
    }

    fn operation() -> impl Strategy<Value = Operation> {
        prop_oneof![
            20 => (any::<u8>(), 0..9000usize).prop_map(|(key, length)| Operation::Set(key, length)),
            10 => any::<u8>().prop_map(Operation::Remove),
            1 => Just(Operation::Clear),
        ]
    }

    proptest! {
        #[test]
        fn holds_what_a_map_holds_and_gives_all_memory_back(
            operations in vec(operation(), 0..200),
        ) {
            let (mut store, mut model) = (Store::new(ROOM), BTreeMap::new());
            for operation in operations {
                match operation {
                    Operation::Set(key, length) => {
                        let value = vec![key ^ length as u8; length];
                        prop_assert_eq!(store.set(&[key], &value), Ok(()));
                        model.insert(key, value);
                    }
                    Operation::Remove(key) => {
                        prop_assert_eq!(store.remove(&[key]), model.remove(&key).is_some());
                    }
                    Operation::Clear => {
                        store.clear();
                        model.clear();
                    }
                }
                prop_assert_eq!(store.len(), model.len());
            }
            for (key, value) in &model {
                prop_assert_eq!(store.get(&[*key]).map(Value::as_bytes), Some(&value[..]));
            }
            for key in model.keys() {
                prop_assert!(store.remove(&[*key]));
            }
            prop_assert_eq!(store.used, 0);
        }

        #[test]
        fn never_exceeds_its_budget(lengths in vec(0..20_000usize, 1..100)) {
            let mut store = Store::new(256 * 1024);
            for (index, length) in lengths.iter().enumerate() {
                let before = store.len();
                let result = store.set(&index.to_le_bytes(), &vec![7; *length]);
                prop_assert_eq!(store.len() - before, usize::from(result.is_ok()));
                prop_assert!(store.used_bytes() <= store.limit_bytes());
            }
        }
    }

    #[test]
    fn a_full_store_keeps_what_it_has() {
        let mut store = Store::new(100_000);
        assert_eq!(store.set(b"a", &[1; 60_000]), Ok(()));
        assert_eq!(store.set(b"b", &[2; 36_000]), Err(OutOfMemory));
        assert_eq!(
            store.charge(36_000),
            Ok(()),
            "buffers have a part of their own"
        );
        store.release(36_000);
        assert_eq!(store.set(b"a", &[3; 60_000]), Err(OutOfMemory));
        assert_eq!(store.get(b"a").map(Value::as_bytes), Some(&[1; 60_000][..]));
        assert!(!store.contains(b"b"));
        assert!(store.remove(b"a"));
        assert_eq!(store.set(b"b", &[2; 60_000]), Ok(()));
    }
}
