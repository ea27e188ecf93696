//! What concurrent clients asked of the key-value store, and whether there is one order in which all
//! of it can have taken effect.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use tandem_tests::kv::Kv;
use tandem_tests::network::{GUEST, Network};
use todc_utils::linearizability::WGLChecker;
use todc_utils::linearizability::history::{Action, History as Actions};
use todc_utils::specifications::Specification;

use super::clients::{Chance, KV};

/// Keys that they share. Each key's history is checked by itself: linearizability is local.
const KEYS: usize = 8;

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Crowd {
    /// Clients at a time.
    pub(crate) clients: usize,
    /// Pause between two requests of a client, so that histories stay short enough to be checked.
    pub(crate) pause: Duration,
}

/// Of a guest that has nothing else to do.
const CROWD: Crowd = Crowd {
    clients: 6,
    pause: Duration::from_millis(2),
};

/// An operation on a key that holds a number, with its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Set(u64),
    /// Nothing as long as nothing was set.
    Get(Option<u64>),
    /// To what it was counted up.
    Increment(u64),
}

/// A key of the store.
struct Key;

impl Specification for Key {
    type State = Option<u64>;
    type Operation = Operation;

    fn init() -> Self::State {
        None
    }

    fn apply(operation: &Operation, state: &Self::State) -> (bool, Self::State) {
        match operation {
            Operation::Set(value) => (true, Some(*value)),
            Operation::Get(value) => (value == state, *state),
            Operation::Increment(value) => (*value == state.unwrap_or(0) + 1, Some(*value)),
        }
    }
}

/// When something was asked, or answered, and by whom.
type Entry = (usize, Action<Operation>);

/// By key, in the order in which it happened.
#[derive(Clone, Debug, Default)]
pub(crate) struct History(BTreeMap<usize, Vec<Entry>>);

impl History {
    fn add(&mut self, key: usize, client: usize, action: Action<Operation>) {
        self.0.entry(key).or_default().push((client, action));
    }

    /// The key whose operations fit in no order.
    fn contradiction(&self) -> Option<usize> {
        let contradicts = |entries: &Vec<Entry>| {
            !WGLChecker::<Key>::is_linearizable(Actions::from_actions(entries.clone()))
        };
        let mut keys = self.0.iter();
        keys.find(|(_, entries)| contradicts(entries))
            .map(|(key, _)| *key)
    }

    /// Asserts that there is such an order.
    pub(crate) fn expect_linearizable(&self) {
        assert!(self.0.len() == KEYS, "keys that nobody asked for");
        self.check().unwrap_or_else(|why| panic!("{why}"));
    }

    /// How many operations there are; an error if they fit in no order.
    pub(crate) fn check(&self) -> Result<usize, String> {
        match self.contradiction() {
            Some(key) => Err(format!("key {key} was in no order: {:#?}", self.0[&key])),
            None => Ok(self.0.values().map(|entries| entries.len() / 2).sum()),
        }
    }
}

/// Clients that ask, and write down what.
pub(crate) struct Recording {
    stop: Arc<AtomicBool>,
    history: Arc<Mutex<History>>,
    clients: Vec<JoinHandle<Result<(), String>>>,
}

impl Recording {
    /// Lets clients ask the store in the guest in `network`.
    pub(crate) fn start(network: &Network) -> Self {
        Self::start_next(network, 0)
    }

    /// As [`Recording::start`], and the keys are other ones than those of recordings of other numbers.
    pub(crate) fn start_next(network: &Network, recording: usize) -> Self {
        Self::start_at(network, GUEST, recording, CROWD)
    }

    /// As [`Recording::start_next`], by others of the store in the guest at `address`.
    pub(crate) fn start_at(
        network: &Network,
        address: &str,
        recording: usize,
        crowd: Crowd,
    ) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let history = Arc::<Mutex<History>>::default();
        let clients = (0..crowd.clients).map(|number| {
            let connection = network.try_connect(address, KV.port);
            let (stop, history) = (Arc::clone(&stop), Arc::clone(&history));
            std::thread::spawn(move || {
                let connection = connection.map_err(|e| format!("no connection: {e}"))?;
                let client = Client {
                    recording,
                    number,
                    kv: Kv::new(&connection),
                    chance: Chance(number as u64),
                    asked: 0,
                    pause: crowd.pause,
                    history,
                };
                client.work(&stop)
            })
        });
        let clients = clients.collect();
        Self {
            stop,
            history,
            clients,
        }
    }

    /// Ends the clients, all of whose requests have to be answered.
    pub(crate) fn finish(self) -> History {
        self.end().unwrap_or_else(|why| panic!("{why}"))
    }

    /// Ends the clients. An error is a request that was not answered.
    pub(crate) fn end(self) -> Result<History, String> {
        self.stop.store(true, Ordering::SeqCst);
        for client in self.clients {
            client.join().expect("clients do not panic")?;
        }
        let history = self.history.lock().expect("nobody panics with it");
        Ok(history.clone())
    }
}

struct Client<'a> {
    recording: usize,
    number: usize,
    kv: Kv<'a>,
    chance: Chance,
    asked: u64,
    pause: Duration,
    history: Arc<Mutex<History>>,
}

impl Client<'_> {
    fn work(mut self, stop: &AtomicBool) -> Result<(), String> {
        while !stop.load(Ordering::SeqCst) {
            self.ask()?;
            std::thread::sleep(self.pause);
        }
        Ok(())
    }

    fn note(&self, key: usize, action: Action<Operation>) {
        let mut history = self.history.lock().expect("nobody panics with it");
        history.add(key, self.number, action);
    }

    fn ask(&mut self) -> Result<(), String> {
        self.asked += 1;
        let key = self.chance.below(KEYS);
        let name = format!("register-{}-{key}", self.recording);
        // Nobody else sets this number, and counting up does not reach it.
        let value = (self.asked << 32) | ((self.number as u64) << 24);
        let number = |reply: Option<String>| {
            let number = reply.as_ref().map(|text| text.parse::<u64>()).transpose();
            number.map_err(|_| format!("{name} is {reply:?}"))
        };
        // The call's result is not looked at.
        let operation = match self.chance.below(3) {
            0 => {
                self.note(key, Action::Call(Operation::Set(value)));
                let reply = self.kv.ask(&["SET", &name, &value.to_string()])?;
                if reply.as_deref() != Some("OK") {
                    return Err(format!("SET was answered by {reply:?}"));
                }
                Operation::Set(value)
            }
            1 => {
                self.note(key, Action::Call(Operation::Get(None)));
                Operation::Get(number(self.kv.ask(&["GET", &name])?)?)
            }
            _ => {
                self.note(key, Action::Call(Operation::Increment(0)));
                let reply = number(self.kv.ask(&["INCR", &name])?)?;
                Operation::Increment(reply.ok_or("INCR was answered by nothing")?)
            }
        };
        self.note(key, Action::Response(operation));
        Ok(())
    }
}

/// A history of one key.
#[cfg(test)]
fn history_of(entries: &[Entry]) -> History {
    History(BTreeMap::from([(0, entries.to_vec())]))
}

#[test]
fn a_write_that_is_lost_or_an_increment_that_is_repeated_is_found() {
    use Action::{Call, Response};
    use Operation::{Get, Increment, Set};
    let done = |client, operation| [(client, Call(operation)), (client, Response(operation))];
    let cases = [
        (vec![Set(1), Get(Some(1)), Increment(2), Get(Some(2))], true),
        (vec![Set(1), Set(2), Get(Some(1))], false),
        (vec![Set(1), Get(None)], false),
        (vec![Increment(1), Increment(3)], false),
        (vec![Increment(1), Increment(1)], false),
    ];
    for (operations, fits) in cases {
        let entries: Vec<Entry> = operations.iter().flat_map(|o| done(0, *o)).collect();
        let found = history_of(&entries).contradiction();
        assert_eq!(found.is_none(), fits, "{operations:?}");
    }
}

#[test]
fn operations_at_the_same_time_may_take_effect_in_either_order() {
    use Action::{Call, Response};
    use Operation::{Get, Set};
    for read in [1, 2] {
        let entries = [
            (0, Call(Set(1))),
            (1, Call(Set(2))),
            (1, Response(Set(2))),
            (0, Response(Set(1))),
            (2, Call(Get(None))),
            (2, Response(Get(Some(read)))),
        ];
        assert_eq!(history_of(&entries).contradiction(), None);
    }
}
