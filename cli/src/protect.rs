//! Protection of a guest by a second copy of it: `tandem run --protect`.

use std::io;
use std::path::Path;
use std::sync::Arc;

use tandem_ft::arbiter::ArbiterError;
use tandem_ft::keeper::Keeper;
use tandem_ft::mirror;
use tandem_ft::runtime::{
    Claims, Desk, Guest, Pair, Protect, ProtectionError, Protector, Standbys,
};
use tandem_store::capture::Begin;
use tandem_vmm::config::{MacAddr, MachineConfig};
use tandem_vmm::confinement::{Confinement, ThreadKind};
use tandem_vmm::gates::Surroundings;
use tandem_vmm::machine::Machine;
use tandem_vmm::migration::{Addresses, Peer, Route};

use crate::bucket::Bounds;
use crate::checkpoints::{self, Opened};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::receive::tell_of_plain_link;
use crate::run::{Beside, RunContext, run_machine};
use crate::runtime_dir::{Guest as Place, KEEPER_SOCKET};
use crate::settings::{Launch, Protection, describe};

/// Runs `launch` as a guest that can be protected, and is if its settings say so; or that has checkpoints in a store,
/// which may begin `anew`. Disks have to be whole unless `incomplete` ones may be used.
///
/// # Errors
/// When the guest cannot be started or protected, or does not end well.
pub(crate) fn run(
    launch: Launch,
    anew: bool,
    incomplete: bool,
    context: &RunContext,
) -> Result<Exit, Failure> {
    expect_whole(&launch.machine, incomplete)?;
    let name = launch.machine.name.clone();
    let protect = match &launch.protection {
        Some(protection) => {
            for to in protection.to.iter().flat_map(Addresses::all) {
                tell_of_plain_link(to, protection.tls.as_deref(), context.quiet);
            }
            Some(claim(protection, &name)?)
        }
        None => None,
    };
    let store = match &launch.checkpoints {
        Some(checkpoints) => {
            let bounds = Bounds {
                confine: launch.confine,
                user: launch.user,
            };
            let opened = Opened::open(checkpoints, &name, bounds)?;
            Some((opened, checkpoints.clone()))
        }
        None => None,
    };
    let started = context.started;
    run_machine(launch, context, |config, confinement, place| {
        let made = (pair(&config, protect.is_some())?, describe(&config));
        let keeper = match &protect {
            // As long as this process has one thread.
            Some(_) => Some(keeper(confinement)?),
            None => None,
        };
        let machine = Machine::open(config, surroundings(confinement, &made.0), started)?;
        let description = made.1.clone();
        let store = match store {
            Some((opened, settings)) => {
                // Before anything is taken from anybody.
                checkpoints::expect_alone(&machine)?;
                let owned = opened.begin_anew(anew)?;
                checkpoints::begin_logs(&machine, &owned)?;
                checkpoints::tell_copies(&made.0, &settings, &owned);
                Some((owned, settings.plan))
            }
            None => None,
        };
        let guest = guest(&machine, made, confinement, place, keeper);
        let beside = beside(guest, protect, |_| {})?;
        let Some((owned, plan)) = store else {
            return Ok((machine, beside));
        };
        // It runs before it answers.
        let how = (plan, Begin::Runs);
        let beside = checkpoints::beside(beside, &machine, description, confinement, owned, how);
        Ok::<_, Failure>((machine, beside))
    })
}

/// The gates of a guest. It is kept which blocks of its disks change where it was before, and where it is not if it is
/// `protected`.
pub(crate) fn pair(machine: &MachineConfig, protected: bool) -> Result<Arc<Pair>, Failure> {
    let failed = Failure::host("make gates for the guest");
    let pair = gates(machine, protected).map_err(failed)?;
    Ok(Arc::new(pair))
}

fn gates(machine: &MachineConfig, protected: bool) -> io::Result<Pair> {
    let numbered = || machine.disks.iter().enumerate();
    let shared = numbered().filter_map(|(number, disk)| disk.shared.then_some(number));
    let pair = Pair::new(&machine.name, machine.nets.len(), machine.disks.len())?;
    let pair = pair.sharing(shared)?;
    for (number, disk) in numbered() {
        if !disk.readonly && !disk.shared && disk.redo.is_none() {
            pair.keep_changes(number, &disk.path, protected)?;
        }
    }
    Ok(pair)
}

/// Sees that no disk of a guest is a part of a copy, or takes those that are as they are if `incomplete` ones may be
/// used.
pub(crate) fn expect_whole(machine: &MachineConfig, incomplete: bool) -> Result<(), Failure> {
    for disk in &machine.disks {
        match mirror::expect_whole(&disk.path) {
            Err(_) if incomplete => mirror::forget(&disk.path),
            checked => checked,
        }
        .map_err(ProtectionError::from)?;
    }
    Ok(())
}

/// The addresses of a guest's interfaces, by which the network is told where it is.
pub(crate) fn macs(config: &MachineConfig) -> Vec<[u8; 6]> {
    let nets = config.nets.iter().enumerate();
    nets.map(|(index, net)| {
        let derived = || MacAddr::derived(&config.name, index);
        net.mac.unwrap_or_else(derived).0
    })
    .collect()
}

/// The guest that `machine` runs, as what protects it knows it: with its gates and its description.
pub(crate) fn guest(
    machine: &Machine,
    (pair, description): (Arc<Pair>, String),
    confinement: &Confinement,
    place: &Place,
    keeper: Option<Keeper>,
) -> Guest {
    Guest {
        pair,
        handle: machine.handle(),
        description,
        confinement: confinement.entry(ThreadKind::Protection),
        keeper,
        keepers_place: place.path(KEEPER_SOCKET),
    }
}

/// What goes on beside a guest's machine: it can be protected, and is if `protect` says how. At its beginning `begin`
/// is called.
pub(crate) fn beside(
    guest: Guest,
    protect: Option<Protect>,
    begin: impl FnOnce(Desk) + 'static,
) -> Result<Beside, Failure> {
    let pair = Arc::clone(&guest.pair);
    let protector = Protector::start(guest, protect)?;
    let desk = protector.desk();
    Ok(Beside {
        pair,
        desk: desk.clone(),
        begin: Box::new(move || {
            begin(desk);
            Box::new(move |_| protector.finish())
        }),
    })
}

pub(crate) fn keeper(confinement: &Confinement) -> Result<Keeper, Failure> {
    Keeper::start(&confinement.entry(ThreadKind::Keeper)).map_err(Failure::host(
        "start the process that holds the guest's taps",
    ))
}

fn claim(protection: &Protection, name: &str) -> Result<Protect, Failure> {
    let to = routes(&protection.to, protection.tls.as_deref())?;
    let claims = Claims::open(&protection.arbiter, name)?;
    match claims.claim_next()? {
        Some(term) => Ok(Protect {
            to: Standbys::new(to),
            claims,
            term,
            resync: protection.resync,
            wish: protection.wish,
        }),
        None => Err(Failure::Owned { name: name.into() }),
    }
}

/// The ways to `places`, with hosts as numbers, as a confined VMM cannot look names up; verified by the keys in `tls`
/// if it is given.
pub(crate) fn routes(places: &[Addresses], tls: Option<&Path>) -> Result<Vec<Route>, Failure> {
    let all = places.iter().map(|place| {
        let peer = Peer::find(place, tls.map(Path::to_owned))?;
        peer.open()
    });
    Ok(all.collect::<Result<_, _>>()?)
}

pub(crate) fn surroundings(confinement: &Confinement, pair: &Arc<Pair>) -> Surroundings {
    Surroundings {
        confinement: confinement.clone(),
        gates: pair.clone(),
    }
}

impl From<ArbiterError> for Failure {
    fn from(error: ArbiterError) -> Self {
        Self::Protection(Box::new(error.into()))
    }
}

impl From<ProtectionError> for Failure {
    fn from(error: ProtectionError) -> Self {
        Self::Protection(Box::new(error))
    }
}
