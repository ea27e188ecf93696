//! Protection of a guest by a second copy of it: `tandem run --protect` and `tandem standby`.

use std::sync::Arc;
use std::time::Instant;

use tandem_ft::arbiter::{ArbiterError, DirectoryArbiter};
use tandem_ft::keeper::Keeper;
use tandem_ft::runtime::{
    Claims, Guest, Invitation, Pair, Protect, ProtectionError, Protector, Standby,
};
use tandem_vmm::confinement::{Confinement, ThreadKind};
use tandem_vmm::gates::Surroundings;
use tandem_vmm::machine::{Machine, SavedMemory};
use tandem_vmm::memory;
use tandem_vmm::migration::Peer;

use crate::args::StandbyArgs;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output;
use crate::receive::{first_heard, listen, plan, tell_of_plain_link};
use crate::run::{Beside, RunContext, run_machine};
use crate::settings::{Launch, Protection, describe};

/// Runs `launch` as a guest that can be protected, and is if its settings say so.
///
/// # Errors
/// When the guest cannot be started or protected, or does not end well.
pub(crate) fn run(launch: Launch, context: &RunContext) -> Result<Exit, Failure> {
    let name = launch.machine.name.clone();
    let protect = match &launch.protection {
        Some(protection) => {
            tell_of_plain_link(&protection.to, protection.tls.as_deref(), context.quiet);
            Some(claim(protection, &name)?)
        }
        None => None,
    };
    let pair = Pair::new(&name, launch.machine.nets.len(), launch.machine.disks.len())
        .map_err(Failure::host("make gates for the guest"))?;
    let pair = Arc::new(pair);
    let started = context.started;
    run_machine(launch, context, |config, confinement| {
        let description = describe(&config);
        let keeper = match &protect {
            // As long as this process has one thread.
            Some(_) => Some(keeper(confinement)?),
            None => None,
        };
        let surroundings = surroundings(confinement, &pair);
        let machine = Machine::open(config, surroundings, started)?;
        let guest = Guest {
            pair: Arc::clone(&pair),
            handle: machine.handle(),
            description,
            confinement: confinement.entry(ThreadKind::Protection),
            keeper,
        };
        let protector = Protector::start(guest, protect)?;
        let beside = Beside {
            pair: Some(pair),
            desk: Some(protector.desk()),
            begin: Box::new(move || Box::new(move || protector.finish())),
        };
        Ok::<_, Failure>((machine, beside))
    })
}

fn keeper(confinement: &Confinement) -> Result<Keeper, Failure> {
    Keeper::start(&confinement.entry(ThreadKind::Keeper)).map_err(Failure::host(
        "start the process that holds the guest's taps",
    ))
}

fn claim(protection: &Protection, name: &str) -> Result<Protect, Failure> {
    let to = Peer::find(&protection.to, protection.tls.clone())?.open()?;
    let claims = Claims::open(&protection.arbiter, name)?;
    match claims.claim_next()? {
        Some(term) => Ok(Protect {
            to,
            claims,
            term,
            mode: protection.resync,
        }),
        None => Err(Failure::Owned { name: name.into() }),
    }
}

/// Waits for a guest that is to be protected, and runs its copy.
///
/// # Errors
/// When no guest comes, its copy cannot run here, or does not end well.
pub fn standby(args: &StandbyArgs, context: &RunContext) -> Result<Exit, Failure> {
    // Before anybody comes: what is wrong with it is told now.
    drop(DirectoryArbiter::open(&args.arbiter)?);
    let listener = listen(&args.listen, args.tls.as_deref(), context.quiet)?;
    if !context.quiet {
        output::tell(&format!("tandem: standing by on {}", listener.address()));
    }
    let invitation = first_heard(&listener, "primary", Invitation::hear)?;
    let claims = Claims::open(&args.arbiter, &invitation.offer.hello.hardware.name)?;
    let launch = match plan(&args.place, &invitation.offer.hello) {
        Ok(launch) => launch,
        Err(failure) => {
            invitation.refuse(&failure.report());
            return Err(failure);
        }
    };
    let mut invitation = Some(invitation);
    let ran = run_machine(launch, context, |config, confinement| {
        let memory = memory::allocate(config.memory, config.hugepages)?;
        // What is only staged is to be given back page by page.
        let huge = config.hugepages && invitation.as_ref().is_none_or(Invitation::keeps_image);
        let beside = memory::allocate(config.memory, huge)?;
        let pair = Pair::new(&config.name, config.nets.len(), config.disks.len())
            .map_err(Failure::host("make gates for the guest"))?;
        let pair = Arc::new(pair);
        let Some(invitation) = invitation.take() else {
            return Err(Failure::host("take a guest")(
                std::io::ErrorKind::NotFound.into(),
            ));
        };
        let standby = Standby {
            claims,
            disks: config.disks.iter().map(|disk| disk.path.clone()).collect(),
            confinement: confinement.entry(ThreadKind::Protection),
        };
        let joined = invitation.accept(&listener, &memory, beside, standby, &pair)?;
        let surroundings = surroundings(confinement, &pair);
        let memory = SavedMemory::Loaded(memory);
        let restored =
            Machine::restore(config, &joined.state, memory, surroundings, Instant::now());
        let mut machine = match restored {
            Ok(machine) => machine,
            Err(error) => {
                let failure = Failure::from(error);
                joined.refuse(&failure.report());
                return Err(failure);
            }
        };
        machine.become_copy();
        machine.start_paused();
        let handle = machine.handle();
        let beside = Beside {
            pair: Some(pair),
            desk: None,
            begin: Box::new(move || {
                if let Err(error) = joined.start(handle) {
                    tracing::error!(%error, "the copy stands: it cannot follow its primary");
                }
                Box::new(|| {})
            }),
        };
        Ok((machine, beside))
    });
    if let (Some(invitation), Err(failure)) = (invitation, &ran) {
        invitation.refuse(&failure.report());
    }
    ran
}

fn surroundings(confinement: &Confinement, pair: &Arc<Pair>) -> Surroundings {
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
