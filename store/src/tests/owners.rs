//! Who owns a guest, and what an old owner writes.

use std::sync::Barrier;
use std::thread;

use super::*;
use crate::guest::Tenancy;
use crate::owner::{are_kin, kin_of, this_host, this_host_of};
use crate::write::Writer;
use crate::{CheckpointId, Options, Store, StoreError};

#[test]
fn of_hosts_that_resume_a_guest_at_once_one_does() {
    let root = directory();
    let place = root.path().to_str().unwrap();
    let store = Store::open(place, Options::default()).unwrap();
    let guest = store.guest(GUEST).unwrap();
    let first = store.arbiter().unwrap();
    let tenancy = guest.begin_anew(first.as_ref(), &owner("a")).unwrap();
    let mut writer = crate::write::Writer::open(&guest, first, tenancy.tenure, None).unwrap();
    let mut memory = Memory::new(50, 10);
    memory.run(60);
    memory.checkpoint(&mut writer).unwrap();
    for round in 0..6 {
        let start = Barrier::new(3);
        let resume = |host: &str| {
            let store = Store::open_to_read(place, Options::default()).unwrap();
            let (guest, arbiter) = (store.guest(GUEST).unwrap(), store.arbiter().unwrap());
            start.wait();
            guest.resume(arbiter.as_ref(), &owner(host))
        };
        let ends: Vec<_> = thread::scope(|scope| {
            let hosts = ["b", "c", "d"].map(|host| scope.spawn(move || resume(host)));
            hosts.map(|host| host.join().unwrap()).into()
        });
        let newest = store.arbiter().unwrap().current(GUEST).unwrap().unwrap();
        let winners: Vec<_> = ends.iter().flatten().collect();
        // Who was overtaken right after it won does not own the guest: whoever does has the newest term.
        assert_eq!(
            winners.iter().filter(|w| w.tenure == newest).count(),
            winners.len()
        );
        assert!(winners.len() <= 1, "round {round}");
        for end in ends {
            assert!(
                matches!(
                    end,
                    Ok(_)
                        | Err(StoreError::Lost { .. }
                            | StoreError::Overtaken { .. }
                            | StoreError::Arbiter(_))
                ),
                "{end:?}"
            );
        }
    }
    // The old owner wakes minutes later, and harms nothing.
    memory.run(10);
    let late = memory.checkpoint(&mut writer).unwrap_err();
    assert!(matches!(late, StoreError::Overtaken { .. }), "{late}");
}

#[test]
fn hosts_that_have_a_guest_together_make_its_checkpoints_in_turn() {
    let root = directory();
    let store = store_in(root.path());
    let (guest, arbiter) = (store.guest(GUEST).unwrap(), store.arbiter().unwrap());
    let primary = this_host().unwrap();
    let copy = this_host_of(kin_of(&primary)).unwrap();
    assert!(are_kin(&primary, &copy) && primary.claimant != copy.claimant);
    assert!(!are_kin(&primary, &this_host().unwrap()));
    let first = guest.begin_anew(arbiter.as_ref(), &primary).unwrap().tenure;
    let open = |tenancy: Tenancy| {
        let base = tenancy.from.map(|whole| whole.manifest);
        Writer::open(&guest, store.arbiter().unwrap(), tenancy.tenure, base).unwrap()
    };
    let mut memory = Memory::new(80, 12);
    memory.run(100);
    let mut own = open(Tenancy {
        tenure: first.clone(),
        from: None,
    });
    let base = memory.checkpoint(&mut own).unwrap();
    let mut copys = open(guest.succeed(arbiter.as_ref(), &copy, first.term).unwrap());
    memory.run(10);
    let newer = memory.checkpoint(&mut copys).unwrap();
    assert_eq!(guest.checkpoints().unwrap(), [newer.id, base.id]);
    // What the primary still writes does not count, and it knows whose the guest is.
    let late = memory.checkpoint(&mut own).unwrap_err();
    let StoreError::Overtaken { owner, .. } = late else {
        panic!("{late}");
    };
    assert!(are_kin(&owner.owner, &primary));
    // It is alone again, and its copy, which does not know yet, is told of a term that is gone.
    let second = owner.term;
    let alone = guest.succeed(arbiter.as_ref(), &primary, second).unwrap();
    assert_eq!(alone.from.as_ref().unwrap().manifest.id, newer.id);
    let late = guest.succeed(arbiter.as_ref(), &copy, second).unwrap_err();
    assert!(matches!(late, StoreError::Overtaken { .. }), "{late}");
    // Somebody resumes it.
    guest
        .resume(arbiter.as_ref(), &this_host().unwrap())
        .unwrap();
    let third = alone.tenure.term;
    let lost = guest
        .succeed(arbiter.as_ref(), &primary, third)
        .unwrap_err();
    let StoreError::Overtaken { owner, .. } = lost else {
        panic!("{lost}");
    };
    assert!(!are_kin(&owner.owner, &primary));
}

#[test]
fn what_an_old_owner_writes_late_does_not_count() {
    let root = directory();
    let store = store_in(root.path());
    let guest = store.guest(GUEST).unwrap();
    let mut old = new_writer(&store);
    let mut memory = Memory::new(80, 11);
    memory.run(100);
    let base = memory.checkpoint(&mut old).unwrap();
    let mut new = resumed_writer(&store, "b").unwrap();
    // Before the new owner has made any checkpoint, and after.
    let mut late = memory.clone();
    late.run(30);
    assert!(matches!(
        late.checkpoint(&mut old),
        Err(StoreError::Overtaken { .. })
    ));
    assert_eq!(newest(&guest).unwrap().unwrap().0.id, base.id);
    assert!(old.begin(&[]).is_err() && old.reopen().is_err());
    memory.run(30);
    let made = memory.checkpoint(&mut new).unwrap();
    let expected = CheckpointId {
        term: 2,
        sequence: base.id.sequence + 1,
    };
    assert_eq!(made.id, expected);
    assert_eq!(guest.checkpoints().unwrap(), [made.id, base.id]);
    assert!(newest(&guest).unwrap().unwrap().1 == memory.pages);
}

#[test]
fn a_guest_that_begins_anew_leaves_its_checkpoints_behind() {
    let root = directory();
    let store = store_in(root.path());
    let guest = store.guest(GUEST).unwrap();
    let mut memory = Memory::new(20, 12);
    memory.run(30);
    memory.checkpoint(&mut new_writer(&store)).unwrap();
    let mut writer = new_writer(&store);
    assert_eq!(guest.checkpoints().unwrap(), []);
    assert!(guest.newest_whole().unwrap().is_none());
    let error = resumed_writer(&store, "b").err().unwrap();
    assert!(matches!(error, StoreError::NoCheckpoint { .. }), "{error}");
    // That took a term, and started nothing.
    memory.dirty_all();
    assert!(memory.checkpoint(&mut writer).is_err());
}
