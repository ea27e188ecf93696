//! `tandem receive`: a guest that is migrated here goes on.

use std::error::Error;
use std::path::Path;
use std::time::Instant;

use tandem_ft::runtime::{Heir, Pair, Protect, Standbys};
use tandem_vmm::error::causes;
use tandem_vmm::machine::{Machine, SavedMemory};
use tandem_vmm::memory;
use tandem_vmm::migration::address::Listener;
use tandem_vmm::migration::target::Offer;
use tandem_vmm::migration::tls::Keys;
use tandem_vmm::migration::{Address, Hello, Link, MigrationError};

use crate::args::{PlaceArgs, ReceiveArgs};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output;
use crate::protect::{self, keeper, routes};
use crate::run::{RunContext, accept, run_machine};
use crate::settings::{Launch, describe, file};

/// Waits for a guest and runs it until it ends.
///
/// # Errors
/// When no guest comes, it cannot run here, or does not end well.
pub fn receive(args: &ReceiveArgs, context: &RunContext) -> Result<Exit, Failure> {
    let offer = wait_for_source(args, context.quiet)?;
    let (launch, heir) = match prepare(args, &offer.hello) {
        Ok(prepared) => prepared,
        Err(failure) => {
            offer.refuse(&failure.report());
            return Err(failure);
        }
    };
    let mut offer = Some(offer);
    let ran = run_machine(launch, context, |config, confinement, place| {
        let keeper = match &heir {
            // As long as this process has one thread.
            Some(_) => Some(keeper(confinement)?),
            None => None,
        };
        let made = (protect::pair(&config, heir.is_some())?, describe(&config));
        let surroundings = protect::surroundings(confinement, &made.0);
        let (pair, macs) = (made.0.clone(), protect::macs(&config));
        let memory = memory::allocate(config.memory, config.hugepages)?;
        let mut received = match offer.take() {
            Some(offer) => offer.accept(&memory)?,
            None => return Err(MigrationError::Closed.into()),
        };
        let started = Instant::now();
        let memory = SavedMemory::Loaded(memory);
        let outputs = received.outputs.take();
        let restored = Machine::restore(config, &received.state, memory, surroundings, started)
            .map_err(Failure::from)
            .and_then(|machine| Ok((machine, own(args, heir, &made.0, outputs.as_deref())?)));
        match restored {
            Ok((machine, protect)) => {
                let guest = protect::guest(&machine, made, confinement, place, keeper);
                let beside = protect::beside(guest, protect, move |_| {
                    received.announce();
                    // Those who have its addresses know the interfaces, which are the same ones.
                    pair.announce(&macs);
                })?;
                Ok::<_, Failure>((machine, beside))
            }
            Err(failure) => {
                received.refuse(&failure.report());
                Err(failure)
            }
        }
    });
    if let (Some(offer), Err(failure)) = (offer, &ran) {
        offer.refuse(&failure.report());
    }
    ran
}

/// What the guest needs here, and who may own it next if it is protected.
fn prepare(args: &ReceiveArgs, hello: &Hello) -> Result<(Launch, Option<Heir>), Failure> {
    let launch = plan(&args.place, hello)?;
    protect::expect_whole(&launch.machine, false)?;
    let Some(company) = &hello.company else {
        return Ok((launch, None));
    };
    let told = Heir::told(company)?;
    let name = &hello.hardware.name;
    let heir = Heir::find(told, args.arbiter.as_deref(), name)?;
    Ok((launch, Some(heir)))
}

/// All of the guest is here, and nothing is missing: it is this host's from now on, if it can be had, and what its source
/// held leaves. How it is to be protected, if it is.
fn own(
    args: &ReceiveArgs,
    heir: Option<Heir>,
    pair: &Pair,
    outputs: Option<&[u8]>,
) -> Result<Option<Protect>, Failure> {
    let standbys = match &args.protect[..] {
        [] => None,
        places => Some(Standbys::new(routes(places, args.tls.as_deref())?)),
    };
    let keys = keys(args.tls.as_deref())?;
    let protect = heir.map(|heir| heir.inherit(standbys, keys.as_ref()));
    let protect = protect.transpose()?;
    pair.go_on_from(outputs)?;
    Ok(protect)
}

/// The keys in `tls`, if it is given.
pub(crate) fn keys(tls: Option<&Path>) -> Result<Option<Keys>, Failure> {
    let keys = tls.map(Keys::open).transpose();
    Ok(keys.map_err(MigrationError::from)?)
}

fn wait_for_source(args: &ReceiveArgs, quiet: bool) -> Result<Offer, Failure> {
    let listener = listen(&args.listen, args.tls.as_deref(), quiet)?;
    if !quiet {
        output::tell(&format!(
            "tandem: waiting for a guest on {}",
            listener.address()
        ));
    }
    first_heard(&listener, "source", Offer::hear)
}

/// Listens at `to`, for whom the keys in `tls` verify if it is given.
pub(crate) fn listen(to: &Address, tls: Option<&Path>, quiet: bool) -> Result<Listener, Failure> {
    tell_of_plain_link(to, tls, quiet);
    Ok(to.listen()?.verifying(keys(tls)?))
}

/// Says what a link by TCP without TLS is not.
pub(crate) fn tell_of_plain_link(to: &Address, tls: Option<&Path>, quiet: bool) {
    if let (Address::Tcp(_), None, false) = (to, tls, quiet) {
        output::tell(&format!(
            "tandem: links with {to} are neither encrypted nor authenticated; see `tandem keys --help`"
        ));
    }
}

/// The first who connects and is a `who`, as `hear` finds out. Whoever is none is told so, and does not keep
/// others from coming.
pub(crate) fn first_heard<T, E: Error + 'static>(
    listener: &Listener,
    who: &str,
    hear: impl Fn(Link) -> Result<T, E>,
) -> Result<T, Failure> {
    loop {
        let caller = listener
            .accept()
            .map_err(Failure::host("wait for a connection"))?;
        let refused = match caller.verified().map(&hear) {
            Ok(Ok(heard)) => return Ok(heard),
            Ok(Err(error)) => causes(&error),
            Err(error) => causes(&error),
        };
        output::tell(&format!("tandem: a {who} was refused: {refused}"));
    }
}

/// Lays the flags over what the other side says of its guest.
pub(crate) fn plan(place: &PlaceArgs, hello: &Hello) -> Result<Launch, Failure> {
    let (described, problems) = file::parse(&hello.description);
    let name = hello.hardware.name.clone();
    let settings = described.replace(place.settings());
    accept(settings.launch_restored(name), problems, None)
}
