//! A guest and its copy, under `tandem run --protect` and `tandem standby`: each in a runtime directory
//! of its own, on one network, with a [`Link`] between them and an arbiter that both reach.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::guest::{Guest, GuestBuilder, PATIENCE, temporary};
use crate::keys::Authority;
use crate::link::{Direction, Link};
use crate::network;

/// The term under which a guest is first run.
const FIRST_TERM: u64 = 1;
/// Where a standby listens on its network.
const TCP_PLACE: &str = "10.99.0.1:7000";
/// The host of that.
pub const TCP_HOST: &str = "10.99.0.1";
/// Pause before something is looked at again.
const LOOK: Duration = Duration::from_millis(5);

/// A side of a pair, as it began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The guest that the outside talked to first.
    Primary,
    /// Its copy.
    Secondary,
}

impl Side {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Primary, Self::Secondary];

    /// The other one.
    pub fn other(self) -> Self {
        match self {
            Self::Primary => Self::Secondary,
            Self::Secondary => Self::Primary,
        }
    }
}

/// A guest and its copy; all of it is gone when dropped.
pub struct Pair {
    primary: Guest,
    secondary: Guest,
    /// Between the two, unless that is TCP.
    link: Option<Arc<Link>>,
    /// The second path between the two, if there is one.
    second: Option<Link>,
    /// Where the arbiter and the sockets are.
    place: TempDir,
    /// Namespace of the guest's network.
    network: Option<String>,
    /// Sides that stand still, which answer nobody.
    frozen: Vec<Side>,
    /// Whose keys the links are encrypted by, if nobody else keeps it.
    _authority: Option<Authority>,
}

fn arbiter_in(place: &Path) -> PathBuf {
    place.join("arbiter")
}

fn make_arbiter(place: &TempDir) -> PathBuf {
    let arbiter = arbiter_in(place.path());
    fs::create_dir(&arbiter).expect("the directory is new");
    arbiter
}

/// Asks until there is an answer.
fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(LOOK);
    }
}

impl Pair {
    /// Starts a guest and its copy.
    pub fn start(guest: GuestBuilder) -> Self {
        Self::start_prepared(guest, |standby| standby)
    }

    /// As [`Pair::start`]; `prepare` adds to the copy's what the test wants.
    pub fn start_prepared(
        guest: GuestBuilder,
        prepare: impl FnOnce(GuestBuilder) -> GuestBuilder,
    ) -> Self {
        let place = temporary();
        let (far, near) = (place.path().join("standby"), place.path().join("link"));
        let standby = prepare(guest.standby(&far, &make_arbiter(&place)));
        let link = Link::new(&near, &far);
        Self {
            link: Some(Arc::new(link)),
            ..Self::start_both(guest, standby, place, &near)
        }
    }

    /// Starts a guest and its copy, which reach each other by two paths.
    pub fn start_by_two_paths(guest: GuestBuilder) -> Self {
        let place = temporary();
        let path = |name: &str| place.path().join(name);
        let [far, first, second] = ["standby", "first", "second"].map(path);
        let standby = guest.standby(&far, &make_arbiter(&place));
        let link = Link::new(&first, &far);
        let beside = Link::new(&second, &far);
        let both = format!("{},second={}", first.display(), second.display());
        Self {
            link: Some(Arc::new(link)),
            second: Some(beside),
            ..Self::start_both(guest, standby, place, Path::new(&both))
        }
    }

    /// Starts a guest and its copy, of which the first path is not there.
    pub fn start_by_the_second(guest: GuestBuilder) -> Self {
        let place = temporary();
        let (far, first) = (place.path().join("standby"), place.path().join("first"));
        let standby = guest.standby(&far, &make_arbiter(&place));
        let both = format!("{},second={}", first.display(), far.display());
        Self::start_both(guest, standby, place, Path::new(&both))
    }

    /// Starts a guest and its copy over `link`, which others use too; the copy is in this direction.
    pub fn start_on(guest: GuestBuilder, link: &Arc<Link>, direction: Direction) -> Self {
        let place = temporary();
        let (far, near) = (place.path().join("standby"), place.path().join("link"));
        let standby = guest.standby(&far, &make_arbiter(&place));
        link.lead(&near, &far, direction);
        Self {
            link: Some(Arc::clone(link)),
            ..Self::start_both(guest, standby, place, &near)
        }
    }

    /// Starts a guest and its copy, which reach each other by TCP; `prepare` adds to the copy's what the
    /// test wants.
    pub fn start_over_tcp(
        guest: GuestBuilder,
        prepare: impl FnOnce(GuestBuilder) -> GuestBuilder,
    ) -> Self {
        let place = temporary();
        let standby = prepare(guest.standby(Path::new(TCP_PLACE), &make_arbiter(&place)));
        Self::start_both(guest, standby, place, Path::new(TCP_PLACE))
    }

    /// As [`Pair::start_over_tcp`], by links that are encrypted by new keys.
    pub fn start_over_tls(guest: GuestBuilder) -> Self {
        let authority = Authority::new();
        let mut pair = Self::start_with_keys(guest, &authority, |standby| standby);
        pair._authority = Some(authority);
        pair
    }

    /// As [`Pair::start_over_tcp`], by links that are encrypted by keys of `authority`. It must outlive the pair, or
    /// new links fall back on the keys that were read before.
    pub fn start_with_keys(
        guest: GuestBuilder,
        authority: &Authority,
        prepare: impl FnOnce(GuestBuilder) -> GuestBuilder,
    ) -> Self {
        let [near, far] = ["a", "b"].map(|name| authority.host(name, TCP_HOST));
        Self::start_over_tcp(guest.arg("--tls").arg(near), |standby| {
            prepare(standby.arg("--tls").arg(far))
        })
    }

    /// A new standby for `guest` where one is awaited by TCP; the one before is gone.
    pub fn stand_by_again(
        &mut self,
        guest: &GuestBuilder,
        prepare: impl FnOnce(GuestBuilder) -> GuestBuilder,
    ) {
        let standby = guest.standby(Path::new(TCP_PLACE), &arbiter_in(self.place.path()));
        self.secondary = prepare(standby).start();
    }

    /// Starts `standby`, which is reached at `to`, and a guest that it is for.
    fn start_both(guest: GuestBuilder, standby: GuestBuilder, place: TempDir, to: &Path) -> Self {
        let mut secondary = standby.start();
        wait_for("a standby", || {
            let said = secondary.messages();
            assert!(secondary.runs(), "the standby ended: {said:#?}");
            said.iter()
                .find(|line| line.contains("standing by"))
                .cloned()
        });
        let network = guest.namespace().map(str::to_owned);
        let guest = guest.arg("--protect").arg(to).arg("--arbiter");
        Self {
            primary: guest.arg(arbiter_in(place.path())).start(),
            secondary,
            link: None,
            second: None,
            place,
            network,
            frozen: Vec::new(),
            _authority: None,
        }
    }

    /// What is between the two.
    ///
    /// # Panics
    /// When that is TCP.
    pub fn link(&self) -> &Link {
        self.link.as_deref().expect("there is a link to be cut")
    }

    /// The first path between the two, or the second.
    ///
    /// # Panics
    /// When there is none.
    pub fn path(&self, number: usize) -> &Link {
        match number {
            0 => self.link(),
            _ => self.second.as_ref().expect("there is a second path"),
        }
    }

    /// Starts a guest and its copy and waits for both.
    pub fn ready(guest: GuestBuilder, ready: &str) -> Self {
        let mut pair = Self::start(guest);
        pair.wait_ready(ready);
        pair
    }

    /// Waits until the guest's console says `ready` and the guest is protected.
    pub fn wait_ready(&mut self, ready: &str) {
        self.primary.wait_for(ready);
        self.wait_protected();
    }

    /// A side.
    pub fn side(&mut self, side: Side) -> &mut Guest {
        match side {
            Side::Primary => &mut self.primary,
            Side::Secondary => &mut self.secondary,
        }
    }

    /// Waits until either side could go on without the other.
    pub fn wait_protected(&mut self) {
        for side in Side::BOTH {
            self.wait_status(side, |status| status["protected"] == true);
        }
    }

    /// Waits until the status of a side is as wanted.
    pub fn wait_status(&mut self, side: Side, wanted: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let guest = self.side(side);
            let status = guest.status();
            if let Some(status) = status.clone().filter(&wanted) {
                return status;
            }
            if !guest.runs() || Instant::now() > deadline {
                panic!("{side:?} is not as it should be: {}", self.account());
            }
            std::thread::sleep(LOOK);
        }
    }

    /// The status of a side; nothing if it does not answer.
    pub fn status(&mut self, side: Side) -> Option<Value> {
        let answers = !self.frozen.contains(&side) && self.side(side).runs();
        answers.then(|| self.side(side).status())?
    }

    /// Whether the guest is protected, as both sides say.
    pub fn is_protected(&mut self) -> bool {
        Side::BOTH.iter().all(|side| {
            let status = self.status(*side);
            status.is_some_and(|status| status["protected"] == true)
        })
    }

    /// Waits until a side has won the guest's next term and is the only one; which one that is.
    pub fn wait_alone(&mut self) -> Side {
        let deadline = Instant::now() + PATIENCE;
        let alone = |status: Value| {
            status["role"] == "primary"
                && status["protected"] == false
                && status["term"].as_u64() > Some(FIRST_TERM)
        };
        loop {
            let mut sides = Side::BOTH.into_iter();
            let found = sides.find(|side| self.status(*side).is_some_and(alone));
            if let Some(side) = found {
                return side;
            }
            assert!(
                Instant::now() < deadline,
                "nobody has the guest: {}",
                self.account()
            );
            std::thread::sleep(LOOK);
        }
    }

    /// Fails if a side ever took the other for lost.
    ///
    /// # Panics
    /// That is how it fails.
    pub fn expect_no_alarm(&mut self) {
        for side in Side::BOTH {
            let events = self.side(side).succeed(&["events", "guest"]);
            assert!(!events.contains("suspected"), "{side:?}: {events}");
        }
    }

    /// What both sides say and said.
    pub fn account(&mut self) -> String {
        let both = Side::BOTH.map(|side| {
            let status = self.status(side);
            let runs = self.side(side).runs();
            let (messages, log) = (self.side(side).messages(), self.side(side).log());
            format!("{side:?}, runs: {runs}, status: {status:#?}, said {messages:#?}, logged {log}")
        });
        both.join("\n")
    }

    /// Waits for the end of a side's process, which it ends itself.
    pub fn wait_end(&mut self, side: Side) {
        let deadline = Instant::now() + PATIENCE;
        while self.side(side).runs() {
            let late = Instant::now() > deadline;
            assert!(!late, "{side:?} does not end: {}", self.account());
            std::thread::sleep(LOOK);
        }
    }

    /// Ends a side, as the end of its host would.
    pub fn kill(&mut self, side: Side) {
        self.side(side).signal(Signal::KILL);
    }

    /// Lets a side stand still.
    pub fn freeze(&mut self, side: Side) {
        self.side(side).signal(Signal::STOP);
        self.frozen.push(side);
    }

    /// Lets a side that stands still go on.
    pub fn thaw(&mut self, side: Side) {
        self.side(side).signal(Signal::CONT);
        self.frozen.retain(|other| *other != side);
    }

    /// Takes the arbiter away from both sides.
    pub fn hide_arbiter(&self) {
        let there = arbiter_in(self.place.path());
        fs::rename(&there, there.with_extension("away")).expect("it is there");
    }

    /// Gives the arbiter back to both sides.
    pub fn show_arbiter(&self) {
        let there = arbiter_in(self.place.path());
        fs::rename(there.with_extension("away"), &there).expect("it is away");
    }

    /// Makes the copy the same as the guest once again.
    pub fn resync(&mut self) {
        let resyncs = |status: &Value| status["resyncs"].as_u64();
        let before = self.primary.status().as_ref().and_then(resyncs);
        self.hold_copy();
        self.provoke();
        self.wait_status(Side::Primary, |status| resyncs(status) > before);
    }

    /// Lets the copy stand still: it cannot say what the guest says, and a resync is due soon after the
    /// guest said something. From then on the two are compared.
    pub fn hold_copy(&mut self) {
        self.primary
            .succeed(&["protect", "guest", "--mode", "lockstep"]);
        wait_for("a copy that runs", || {
            let paused = self.secondary.tandem(&["pause", "guest"]);
            paused.status.success().then_some(())
        });
    }

    /// Lets the guest say something.
    fn provoke(&mut self) {
        match &self.network {
            // A resync takes longer than it waits.
            Some(namespace) => {
                let mut ping = Command::new("ip");
                ping.args(["netns", "exec", namespace, "ping", "-c", "1", "-W", "1"]);
                ping.arg(network::GUEST).stdin(Stdio::null());
                drop(ping.output());
            }
            None => self.primary.type_in("\n"),
        }
    }

    /// A side, beside what is left of the other.
    pub fn into_side(self, side: Side) -> Guest {
        let (mut stays, other) = match side {
            Side::Primary => (self.primary, self.secondary),
            Side::Secondary => (self.secondary, self.primary),
        };
        stays.keep((other, self.link, self.place));
        stays
    }

    /// The guest is killed, and the copy goes on.
    pub fn fail_over(mut self) -> Guest {
        self.kill(Side::Primary);
        self.wait_alone();
        let mut survivor = self.secondary;
        survivor.succeed_to(self.primary);
        survivor.keep((self.link, self.place));
        survivor
    }
}
