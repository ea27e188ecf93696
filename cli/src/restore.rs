//! `tandem restore`: a guest goes on where it was saved.

use std::io;

use tandem_vmm::confinement::ThreadKind;
use tandem_vmm::machine::{Machine, SavedMemory};
use tandem_vmm::memory;
use tandem_vmm::memory_image::{self, Loader};
use tandem_vmm::snapshot::SnapshotError;
use tandem_vmm::snapshot::directory::{self, DESCRIPTION, Snapshot};

use crate::args::RestoreArgs;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::protect;
use crate::run::{RunContext, accept, run_machine};
use crate::settings::{Launch, describe, file};

/// Runs a guest on from a snapshot until it ends.
///
/// # Errors
/// When the snapshot cannot be used, or the guest not be started or does not end well. Nothing is
/// left behind.
pub fn restore(args: &RestoreArgs, context: &RunContext) -> Result<Exit, Failure> {
    let snapshot = directory::open_snapshot(&args.directory)?;
    let launch = plan(args, &snapshot)?;
    protect::expect_whole(&launch.machine, false)?;
    let (paused, eager) = (args.paused, args.eager);
    run_machine(launch, context, |config, confinement, place| {
        let made = (protect::pair(&config, false)?, describe(&config));
        let surroundings = protect::surroundings(confinement, &made.0);
        let Snapshot {
            state,
            memory,
            checksums,
        } = snapshot;
        let guest_memory = memory::allocate(config.memory, config.hugepages)?;
        // The kernel copies what is missing in pages of its own size only.
        let saved = if eager || config.hugepages {
            memory_image::load_all(&memory, &checksums, &guest_memory)
                .map_err(SnapshotError::from)?;
            SavedMemory::Loaded(guest_memory)
        } else {
            let to = guest_memory.clone();
            let confine = confinement.entry(ThreadKind::MemoryLoader);
            let begin = move || confine.enter().map_err(io::Error::other);
            let start = Box::new(move |on_failure| {
                Loader::start_beginning_with(memory, checksums, to, on_failure, begin)
            });
            SavedMemory::OnDemand(guest_memory, start)
        };
        let macs = protect::macs(&config);
        let mut machine = Machine::restore(config, &state, saved, surroundings, context.started)?;
        if paused {
            machine.start_paused();
        }
        made.0.announce(&macs);
        let guest = protect::guest(&machine, made, confinement, place, None);
        Ok::<_, Failure>((machine, protect::beside(guest, None, |_| {})?))
    })
}

/// Lays the flags over the snapshot's description.
fn plan(args: &RestoreArgs, snapshot: &Snapshot) -> Result<Launch, Failure> {
    let path = args.directory.join(DESCRIPTION);
    let (described, problems) = file::read(&path)?;
    let name = snapshot.state.hardware.name.clone();
    let settings = described.replace(args.place.settings());
    accept(settings.launch_restored(name), problems, Some(path))
}
