//! A race of a backend against itself: storage on which two writers get one name can hold no
//! checkpoints, whatever it is called.

use std::sync::Barrier;
use std::thread;

use super::{Backend, BackendError, Created};
use crate::names::random_name;

/// Where names are raced for.
pub(super) const PROBES: &str = "probes/";
/// Who race for one name.
const RACERS: usize = 4;
/// Names that are raced for.
const ROUNDS: usize = 4;
/// Bytes that a racer writes.
const LENGTH: usize = 4096;

/// Races for some names in `backend`, and looks that what is there then is the winner's, for all
/// who look.
///
/// # Errors
/// When the storage fails, or two won, or none.
pub fn race(backend: &dyn Backend) -> Result<(), BackendError> {
    let id = random_name();
    let names: Vec<_> = (0..ROUNDS).map(|n| format!("{PROBES}{id}-{n}")).collect();
    let raced = names.iter().try_for_each(|name| race_for(backend, name));
    names.iter().try_for_each(|name| backend.remove(name))?;
    raced
}

fn race_for(backend: &dyn Backend, name: &str) -> Result<(), BackendError> {
    let start = Barrier::new(RACERS);
    let run = |racer: usize| {
        let content = content_of(racer);
        start.wait();
        backend.create(name, &content)
    };
    let ends: Vec<_> = thread::scope(|scope| {
        let racers: Vec<_> = (0..RACERS)
            .map(|racer| scope.spawn(move || run(racer)))
            .collect();
        let ends = racers.into_iter().map(|racer| racer.join());
        ends.map(|end| end.expect("a backend does not panic"))
            .collect()
    });
    let ends: Vec<Created> = ends.into_iter().collect::<Result<_, _>>()?;
    let winners: Vec<usize> = (0..RACERS).filter(|n| ends[*n] == Created::Yes).collect();
    let [winner] = winners[..] else {
        let winners = winners.len();
        return unfit(
            backend,
            format!("of {RACERS} who made one object, {winners} did"),
        );
    };
    look(backend, name, &content_of(winner))
}

/// What all must see after a race.
fn look(backend: &dyn Backend, name: &str, content: &[u8]) -> Result<(), BackendError> {
    let late = content_of(RACERS);
    if backend.create(name, &late)? != Created::Taken {
        return unfit(backend, "it made an object that was there".to_owned());
    }
    if backend.get(name, LENGTH as u64)?.as_deref() != Some(content) {
        return unfit(backend, "it shows another object than was made".to_owned());
    }
    let listed = backend.list(PROBES)?;
    if !listed
        .iter()
        .any(|e| e.name == name && e.length == LENGTH as u64)
    {
        return unfit(
            backend,
            "it does not list an object that was made".to_owned(),
        );
    }
    Ok(())
}

fn content_of(racer: usize) -> Vec<u8> {
    vec![racer as u8; LENGTH]
}

fn unfit<T>(backend: &dyn Backend, what: String) -> Result<T, BackendError> {
    let place = backend.place();
    Err(BackendError::Unfit { place, what })
}
