//! The guests of a soak.

use crate::protection::clients::{ECHO, HTTP, KV, Service};

/// The disk of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Disk {
    /// It has none.
    None,
    /// A replica on each host.
    Mirrored,
    /// One image that both hosts reach.
    Shared,
}

/// A guest. Its primary begins on the host of its number's parity.
#[derive(Clone, Copy)]
pub(crate) struct Member {
    pub(crate) number: usize,
    pub(crate) name: &'static str,
    pub(crate) image: &'static str,
    /// What its clients ask; one without is watched by its console.
    pub(crate) service: Option<Service>,
    pub(crate) cpus: u8,
    pub(crate) memory: &'static str,
    pub(crate) mode: &'static str,
    pub(crate) disk: Disk,
    /// Bytes of that.
    pub(crate) disk_bytes: u64,
    /// What a guest without clients is told to do.
    pub(crate) words: &'static str,
    /// Its links are encrypted, by TCP.
    pub(crate) keyed: bool,
}

/// What a guest with a disk does: it waits for each of its writes to be durable.
const WRITES: &str = "blocks=2048 ops=0 depth=2 flush=2 write=70 report=20";
/// What it does when all is over.
pub(crate) const VERIFIES: &str = "blocks=2048 ops=200 verify";
/// What it says then.
pub(crate) const VERIFIED: [&str; 3] = [
    "disk: continued",
    "disk: verified blocks=2048 errors=0",
    "disk: done ops=200 errors=0",
];

/// The pace of its disk: it is to leave time to the others.
pub(crate) const PACED: &str = "custom+latency-us:15000+safepoints:user-mode";
const PACES: &[&str] = &[
    PACED,
    "custom+latency-us:8000+safepoints:user-mode",
    "custom+latency-us:25000+safepoints:user-mode",
];

impl Member {
    pub(crate) const fn server(number: usize, name: &'static str, service: Service) -> Self {
        Self {
            number,
            name,
            image: service.image,
            service: Some(service),
            cpus: 1,
            memory: "64MiB",
            mode: "auto",
            disk: Disk::None,
            disk_bytes: 32 << 20,
            words: "",
            keyed: false,
        }
    }

    pub(crate) const fn writer(number: usize, name: &'static str, disk: Disk) -> Self {
        Self {
            image: "disk",
            service: None,
            disk,
            words: WRITES,
            ..Self::server(number, name, KV)
        }
    }

    pub(crate) const fn mode(self, mode: &'static str) -> Self {
        Self { mode, ..self }
    }

    const fn two_vcpus(self) -> Self {
        Self { cpus: 2, ..self }
    }

    const fn keyed(self) -> Self {
        Self {
            keyed: true,
            ..self
        }
    }

    /// Its address on the network.
    pub(crate) fn address(&self) -> String {
        format!("10.99.0.{}", 10 + self.number)
    }

    /// The words that it is started with.
    pub(crate) fn cmdline(&self) -> String {
        match self.service {
            Some(_) => format!("ip={}/24 gw=10.99.0.1", self.address()),
            None => self.words.to_owned(),
        }
    }

    /// A device whose pace can be changed, and paces for it.
    pub(crate) fn paces(&self) -> (&'static str, &'static [&'static str]) {
        match self.disk {
            Disk::None => ("net0", &["none", "nic-1g"]),
            Disk::Mirrored | Disk::Shared => ("disk0", PACES),
        }
    }
}

/// All of them. A short soak takes the first ones.
pub(crate) const FLEET: [Member; 8] = [
    Member::server(0, "ledger", KV).mode("lockstep"),
    Member::writer(1, "volume", Disk::Mirrored).mode("lockstep"),
    Member::server(2, "vault", KV).keyed(),
    Member::writer(3, "common", Disk::Shared),
    Member::server(4, "notes", KV)
        .mode("checkpoint")
        .two_vcpus(),
    Member::server(5, "pages", HTTP).two_vcpus(),
    Member::server(6, "stream", ECHO).mode("lockstep"),
    Member::writer(7, "archive", Disk::Mirrored)
        .mode("checkpoint")
        .two_vcpus(),
];
