//! `tandem resume --from`: a guest that was lost goes on from its newest checkpoint.

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tandem_devices::GuestMemory;
use tandem_devices::virtio::block::redo::Chain;
use tandem_ft::mirror;
use tandem_ft::runtime::ProtectionError;
use tandem_store::capture::disks::image_name;
use tandem_store::capture::{Begin, Owned, Plan, addresses_of, outputs_of};
use tandem_store::disk;
use tandem_store::manifest::Manifest;
use tandem_store::memory::{SavedMemory as StoredMemory, state_of};
use tandem_store::{Place, StoreError, redo};
use tandem_vmm::config::MachineConfig;
use tandem_vmm::confinement::{Confinement, ThreadKind};
use tandem_vmm::error::causes;
use tandem_vmm::machine::{Machine, SavedMemory};
use tandem_vmm::memory;
use tandem_vmm::memory_image::Loader;

use crate::args::ResumeArgs;
use crate::bucket::Bounds;
use crate::checkpoints::{self, Opened};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output;
use crate::protect;
use crate::run::{RunContext, accept, print_plan, run_machine};
use crate::settings::{Checkpoints, Launch, Located, Settings, describe, file};

/// Runs a guest on from its newest checkpoint in `from` until it ends.
///
/// # Errors
/// When there is none, another has taken it, it cannot run here, or does not end well.
pub fn resume(args: &ResumeArgs, from: &Place, context: &RunContext) -> Result<Exit, Failure> {
    let store = Checkpoints {
        store: from.clone(),
        key: args.store_key.clone(),
        plan: Plan::default(),
    };
    let bounds = Bounds {
        confine: args.place.confine.unwrap_or_default(),
        user: args.place.user,
    };
    let opened = Opened::find(&store, &args.guest, bounds)?;
    // Nothing is taken from anybody before it is known that the guest can go on here.
    let newest = opened.newest()?;
    let launch = plan(args, from, &opened, &newest.manifest)?;
    if args.dry_run {
        return print_plan(launch, context.format);
    }
    let settings = launch.checkpoints.clone().unwrap_or(store);
    let plan = settings.plan;
    run_machine(launch, context, |config, confinement, place| {
        let made = (protect::pair(&config, false)?, describe(&config));
        let surroundings = protect::surroundings(confinement, &made.0);
        let resources = Machine::reserve(&config, confinement)?;
        let logs = resources.redo_disks();
        redo::expect(&newest.manifest, &logs)?;
        let room = memory::allocate(config.memory, config.hugepages)?;
        // The kernel copies what is missing in pages of its own size only.
        let eager = args.eager || config.hugepages;
        let (owned, chains) = take(opened, eager.then_some(&room), &logs)?;
        let manifest = owned.base.clone().ok_or(Failure::NothingTaken)?;
        let state = state_of(&owned.guest, &manifest)?;
        restore_disks(&owned, &manifest, &config)?;
        redo::begin(&logs, chains, &owned)?;
        let saved = match eager {
            true => SavedMemory::Loaded(room),
            false => on_demand(&owned, &manifest, room, confinement)?,
        };
        let macs = protect::macs(&config);
        let started = context.started;
        let mut machine =
            Machine::restore_on(resources, config, &state, saved, surroundings, started)?;
        machine.start_paused();
        made.0
            .go_on_from(outputs_of(&manifest))
            .map_err(|error| Failure::Protection(Box::new(error)))?;
        checkpoints::tell_copies(&made.0, &settings, &owned);
        if let Some(addresses) = addresses_of(&manifest)
            && let Err(error) = made.0.know_addresses(addresses)
        {
            // It is found by the addresses of its interfaces, and by what it sends.
            tracing::warn!(why = %causes(&error), "the guest's addresses are not announced");
        }
        made.0.announce(&macs);
        tell(&owned, &manifest, context.quiet);
        let description = made.1.clone();
        let begin = match args.paused {
            true => Begin::Stands,
            false => Begin::LetRun,
        };
        let guest = protect::guest(&machine, made, confinement, place, None);
        let beside = protect::beside(guest, None, |_| {})?;
        let how = (plan, begin);
        let beside = checkpoints::beside(beside, &machine, description, confinement, owned, how);
        Ok::<_, Failure>((machine, beside))
    })
}

/// Lays the flags over the checkpoint's description.
fn plan(
    args: &ResumeArgs,
    from: &Place,
    opened: &Opened,
    manifest: &Manifest,
) -> Result<Launch, Failure> {
    let (described, problems) = file::parse(&opened.guest.description(manifest)?);
    let before = Plan::of(manifest);
    let mut settings = described.replace(args.place.settings());
    if !args.dry_run {
        make_images(&settings, manifest)?;
    }
    settings.checkpoint = Some(Located::flag(from.clone()));
    settings.store_key = args.store_key.clone().map(Located::flag);
    settings.every = Some(Located::flag(args.every.unwrap_or(before.every())));
    settings.commit = Some(Located::flag(args.commit.unwrap_or(before.commit)));
    accept(settings.launch_restored(args.guest.clone()), problems, None)
}

/// Makes the images that are not there of disks that the checkpoint has.
fn make_images(settings: &Settings, manifest: &Manifest) -> Result<(), Failure> {
    for (number, disk) in (0..).zip(&settings.disks) {
        if let Some(bytes) = disk::bytes_of(manifest, &image_name(number)) {
            disk::make(&disk.config.path, bytes)?;
        }
    }
    Ok(())
}

/// Makes the guest's disks, which this process has locked, what they were at the checkpoint.
fn restore_disks(
    owned: &Owned,
    manifest: &Manifest,
    config: &MachineConfig,
) -> Result<(), Failure> {
    for (number, disk) in (0..).zip(&config.disks) {
        let name = image_name(number);
        if !disk.readonly && disk::bytes_of(manifest, &name).is_some() {
            // What a replica of it has is another thing now.
            mirror::forget(&disk.path).map_err(ProtectionError::from)?;
            let written = disk::restore(&owned.guest, manifest, &name, &disk.path)?;
            tracing::info!(name, written, "a disk is what it was at the checkpoint");
        }
    }
    Ok(())
}

/// Takes the guest, whose disks' redo logs are read and checked before the checkpoint is settled on; and, with `room`,
/// its memory, which is loaded there. Returns what was read of the logs too.
fn take(
    opened: Opened,
    room: Option<&Arc<GuestMemory>>,
    logs: &[redo::Logged],
) -> Result<(Owned, Vec<Chain>), Failure> {
    let guest = opened.guest.clone();
    let mut chains = Vec::new();
    let owned = opened.go_on(&mut |manifest| {
        chains = redo::chains(manifest, logs)?;
        let Some(room) = room else {
            return Ok(());
        };
        let loaded = StoredMemory::open(&guest, manifest.clone())?.load(room);
        if loaded.is_err() {
            // What of it was loaded is not another checkpoint's.
            memory::clear(room).map_err(|source| StoreError::Ended {
                what: format!("guest memory cannot be emptied: {source}"),
            })?;
        }
        loaded
    })?;
    Ok((owned, chains))
}

/// Memory that is loaded when it is touched.
fn on_demand(
    owned: &Owned,
    manifest: &Manifest,
    room: Arc<GuestMemory>,
    confinement: &Confinement,
) -> Result<SavedMemory, Failure> {
    let stored = Box::new(StoredMemory::open(&owned.guest, manifest.clone())?);
    let confine = confinement.entry(ThreadKind::StoreLoader);
    let begin = move || confine.enter().map_err(io::Error::other);
    let to = Arc::clone(&room);
    let start = Box::new(move |on_failure| Loader::start_from(stored, to, on_failure, begin));
    Ok(SavedMemory::OnDemand(room, start))
}

/// Says from when the guest goes on.
fn tell(owned: &Owned, manifest: &Manifest, quiet: bool) {
    let begun = UNIX_EPOCH + Duration::from_millis(manifest.begun_ms);
    let age = SystemTime::now().duration_since(begun).unwrap_or_default();
    let id = manifest.id;
    let term = owned.tenure.as_ref().map_or(id.term, |own| own.term.0);
    let name = owned.guest.name();
    let seconds = age.as_secs_f64();
    tracing::info!(%id, %term, seconds, "the guest goes on from a checkpoint");
    if !quiet {
        output::tell(&format!(
            "tandem: guest `{name}` goes on from checkpoint {id}, which is {seconds:.1} s old; term {term}"
        ));
    }
}
