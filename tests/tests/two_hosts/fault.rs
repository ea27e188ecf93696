//! What goes wrong in a soak, or is asked for.

use std::fs;
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};

use super::fleet::Member;
use super::sites::{HOSTS, Sites};
use crate::protection::clients::Chance;

/// Longest time for which something stands still, is cut or is gone.
const AWAY: Duration = Duration::from_millis(600);
/// Longest time that a slow network takes.
const SLOW: Duration = Duration::from_millis(15);
/// How long an operator tries again what was refused, as it may be while a resync is under way.
const ASK_MAX: Duration = Duration::from_secs(20);
/// Pause before that.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    /// A guest's process ends.
    KillOwner,
    KillCopy,
    /// A guest's process stands still for a while.
    StopOwner,
    StopCopy,
    /// All processes of a host end, and those that listen there are started again.
    CrashHost,
    /// The network between the hosts is cut for a while, in both directions or in one.
    Cut,
    CutToOne,
    /// Connections end.
    Reset,
    /// The network is slow for a while.
    Slow,
    /// The operator asks for a takeover.
    FailOver,
    /// Protection ends, and begins anew.
    ProtectAnew,
    /// The copy is made the same once more.
    Resync,
    /// The guest is saved.
    Snapshot,
    /// The guest is protected in another mode.
    Mode,
    /// A device gets another pace.
    Pace,
}

use Fault::{
    CrashHost, Cut, CutToOne, FailOver, KillCopy, KillOwner, Mode, Pace, ProtectAnew, Reset,
    Resync, Slow, Snapshot, StopCopy, StopOwner,
};

/// All of them, those of a single guest more often.
pub(crate) const ALL: [Fault; 22] = [
    KillOwner,
    KillOwner,
    KillOwner,
    KillCopy,
    KillCopy,
    StopOwner,
    StopOwner,
    StopCopy,
    StopCopy,
    CrashHost,
    Cut,
    CutToOne,
    Reset,
    Slow,
    FailOver,
    FailOver,
    ProtectAnew,
    Resync,
    Snapshot,
    Mode,
    Pace,
    Pace,
];
/// Those that take no owner away, so that owners grow old, and what listens too.
pub(crate) const OLD_AGE: [Fault; 11] = [
    KillCopy,
    KillCopy,
    StopCopy,
    Slow,
    ProtectAnew,
    Resync,
    Resync,
    Snapshot,
    Mode,
    Pace,
    Pace,
];

impl Fault {
    /// Whether it strikes all guests.
    pub(crate) fn strikes_all(self) -> bool {
        matches!(self, CrashHost | Cut | CutToOne | Reset | Slow)
    }

    /// Whether the guest that is struck has another term afterwards for sure.
    pub(crate) fn changes_term(self) -> bool {
        matches!(self, KillOwner | KillCopy | FailOver)
    }
}

/// Where it happens.
pub(crate) struct Place<'a> {
    pub(crate) sites: &'a mut Sites,
    /// Whom it strikes, if it is one guest's.
    pub(crate) member: &'a Member,
    /// Host of that guest's owner.
    pub(crate) owner: usize,
}

impl Place<'_> {
    /// Lets it happen. An error is why an operator could not have what he asked for.
    pub(crate) fn happen(&mut self, fault: Fault, chance: &mut Chance) -> Result<(), String> {
        let away = chance.part_of(AWAY);
        let (owner, copy) = (self.owner, 1 - self.owner);
        match fault {
            KillOwner => self.signal(owner, Signal::KILL),
            KillCopy => self.signal(copy, Signal::KILL),
            StopOwner => self.stop(owner, away),
            StopCopy => self.stop(copy, away),
            CrashHost => {
                let host = chance.below(HOSTS.len());
                self.sites.crash(host);
                std::thread::sleep(away);
                self.sites.stand_by(host);
            }
            Cut => self.cut(&HOSTS, away),
            CutToOne => self.cut(&[chance.below(HOSTS.len())], away),
            Reset => self.sites.link.reset(),
            Slow => {
                self.sites.link.delay(chance.part_of(SLOW));
                std::thread::sleep(away);
                self.sites.link.delay(Duration::ZERO);
            }
            FailOver => return self.ask(&["failover", self.member.name]),
            ProtectAnew => return self.protect_anew(),
            Resync => return self.ask(&["resync", self.member.name]),
            Snapshot => return self.save(),
            Mode => {
                let mode = ["lockstep", "checkpoint", "auto"][chance.below(3)];
                return self.ask(&["protect", self.member.name, "--mode", mode]);
            }
            Pace => {
                let (device, paces) = self.member.paces();
                let pace = paces[chance.below(paces.len())];
                return self.ask(&["pace", self.member.name, device, pace]);
            }
        }
        Ok(())
    }

    fn signal(&self, host: usize, signal: Signal) {
        if let Some(vmm) = self.sites.vmm(host, self.member) {
            // It may have ended by itself.
            let _ = kill_process(vmm, signal);
        }
    }

    fn stop(&self, host: usize, time: Duration) {
        let Some(vmm) = self.sites.vmm(host, self.member) else {
            return;
        };
        let _ = kill_process(vmm, Signal::STOP);
        std::thread::sleep(time);
        let _ = kill_process(vmm, Signal::CONT);
    }

    fn cut(&self, hosts: &[usize], time: Duration) {
        self.sites.cut(hosts);
        std::thread::sleep(time);
        self.sites.mend();
    }

    /// Where the guest is now.
    fn owner_now(&self) -> usize {
        let roles = HOSTS.map(|host| self.sites.status(host, self.member));
        let owns = roles.iter().position(|status| {
            status
                .as_ref()
                .is_some_and(|status| status["role"] == "primary")
        });
        owns.unwrap_or(self.owner)
    }

    /// Asks the guest's owner for something until it is done.
    fn ask(&self, words: &[&str]) -> Result<(), String> {
        let deadline = Instant::now() + ASK_MAX;
        loop {
            let asked = self.sites.tandem(self.owner_now(), words);
            if asked.status.success() {
                return Ok(());
            }
            if Instant::now() > deadline {
                let said = String::from_utf8_lossy(&asked.stderr).into_owned();
                return Err(format!("{words:?}: {said}"));
            }
            std::thread::sleep(ASK_AGAIN);
        }
    }

    fn protect_anew(&self) -> Result<(), String> {
        self.ask(&["unprotect", self.member.name])?;
        let deadline = Instant::now() + ASK_MAX;
        loop {
            let owner = self.owner_now();
            let asked = self.sites.protect(owner, self.member, self.member.mode);
            if asked.status.success() {
                return Ok(());
            }
            let said = String::from_utf8_lossy(&asked.stderr).into_owned();
            // It was asked for before, and looks for a standby.
            if said.contains("already") {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(format!("protect {}: {said}", self.member.name));
            }
            std::thread::sleep(ASK_AGAIN);
        }
    }

    /// Saves the guest, and sees that what was saved is whole.
    fn save(&self) -> Result<(), String> {
        let directory = self.sites.path("saved");
        let path = tandem_tests::hosts::word(&directory);
        let saved = self.ask(&["snapshot", self.member.name, path]);
        let checked = saved.and_then(|()| {
            let asked = self.sites.tandem(0, &["inspect", path, "--verify"]);
            let said = String::from_utf8_lossy(&asked.stderr).into_owned();
            let whole = asked.status.success();
            whole
                .then_some(())
                .ok_or(format!("what was saved is not whole: {said}"))
        });
        // None may have been made.
        drop(fs::remove_dir_all(&directory));
        checked
    }
}
