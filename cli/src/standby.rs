//! `tandem standby`: the copy of one guest. `reception` starts a process for each.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;
use tandem_ft::arbiter::DirectoryArbiter;
use tandem_ft::mirror;
use tandem_ft::runtime::status::{Role, Status};
use tandem_ft::runtime::{
    CALLS_TIMEOUT, Calls, Claims, Invitation, ProtectionError, Standby, Standbys, Taker,
};
use tandem_store::capture::{Begin, Owned};
use tandem_vmm::config::ConsoleConfig;
use tandem_vmm::confinement::ThreadKind;
use tandem_vmm::error::causes;
use tandem_vmm::machine::{Machine, SavedMemory};
use tandem_vmm::memory;

use crate::args::StandbyArgs;
use crate::bucket::Bounds;
use crate::checkpoints::{self, Opened};
use crate::client::Client;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::protect::{self, keeper, routes, surroundings};
use crate::receive::{keys, listen};
use crate::run::{RunContext, accept, run_machine};
use crate::runtime_dir::{PlaceError, Root};
use crate::settings::{Launch, Located, Origin, Problem, Settings, describe, file, value};
use crate::{output, reception};

/// How long a copy that is here already may take to say what it is.
const OLD_ANSWER: Duration = Duration::from_secs(2);
/// How long it may take to end.
const OLD_END: Duration = Duration::from_secs(5);
/// Pause before it is looked again whether it did.
const LOOK: Duration = Duration::from_millis(10);

/// Waits for guests that are to be protected, and runs their copies.
///
/// # Errors
/// When nobody can be waited for, or, where this process is for one guest, that does not end well.
pub fn standby(args: &StandbyArgs, context: &RunContext) -> Result<Exit, Failure> {
    // Before anybody comes: what is wrong with it is told now.
    drop(DirectoryArbiter::open(&args.arbiter)?);
    if args.handed {
        // It was started by a path that says nothing of what it is. Only `ps` knows it by this.
        let _ = rustix::thread::set_name(c"tandem");
        let taker = Taker::new(
            take_input().map_err(Failure::host("take what was handed over"))?,
            keys(args.tls.as_deref())?,
        );
        let deadline = Some(Instant::now() + CALLS_TIMEOUT);
        let invitation = Invitation::hear(taker.next(deadline, None)?)?;
        return one(args, context, invitation, Box::new(taker));
    }
    check_console(args)?;
    let listener = listen(&args.listen, args.tls.as_deref(), context.quiet)?;
    if !context.quiet {
        output::tell(&format!("tandem: standing by on {}", listener.address()));
    }
    if !args.once {
        return reception::serve(args, listener);
    }
    let invitation = loop {
        match listener.next(None, None).and_then(Invitation::hear) {
            Ok(invitation) => break invitation,
            Err(error) => {
                let why = causes(&error);
                output::tell(&format!("tandem: a primary was refused: {why}"));
            }
        }
    };
    one(args, context, invitation, Box::new(listener))
}

/// The console of several guests cannot be one terminal.
fn check_console(args: &StandbyArgs) -> Result<(), Failure> {
    if args.once || args.place.console != Some(ConsoleConfig::Stdio) {
        return Ok(());
    }
    let message = "several guests cannot share it; `stdio` is allowed with --once";
    Err(problem("console", message.into(), None))
}

fn problem(key: &str, message: String, file: Option<PathBuf>) -> Failure {
    let problems = vec![Problem::new(Origin::Flag, key, message)];
    Failure::Settings { file, problems }
}

/// The descriptor of standard input, which is nothing from now on.
pub(crate) fn take_input() -> io::Result<std::os::fd::OwnedFd> {
    let taken = io::stdin().as_fd().try_clone_to_owned()?;
    let nothing = std::fs::File::open("/dev/null")?;
    rustix::stdio::dup2_stdin(&nothing)?;
    Ok(taken)
}

/// Runs the copy of the guest of `invitation`, whose other connections come from `calls`.
fn one(
    args: &StandbyArgs,
    context: &RunContext,
    invitation: Invitation,
    calls: Box<dyn Calls>,
) -> Result<Exit, Failure> {
    let prepared = prepare(args, context, &invitation);
    let (launch, claims, standbys, store) = match prepared {
        Ok(prepared) => prepared,
        Err(failure) => {
            invitation.refuse(&failure.report());
            return Err(failure);
        }
    };
    let plan = launch.checkpoints.as_ref().map(|store| store.plan);
    let (mut invitation, mut calls) = (Some(invitation), Some(calls));
    let ran = run_machine(launch, context, |config, confinement, place| {
        // As long as this process has one thread.
        let keeper = keeper(confinement)?;
        let description = describe(&config);
        // Replicas of disks are written before they are the guest's.
        let may_reserve = config.disks.iter().all(|disk| disk.readonly);
        let reserve = || Machine::reserve(&config, confinement);
        let reserved = may_reserve.then(reserve).transpose()?;
        let memory = memory::allocate(config.memory, config.hugepages)?;
        // What is only staged is to be given back page by page.
        let huge = config.hugepages && invitation.as_ref().is_none_or(Invitation::keeps_image);
        let beside = memory::allocate(config.memory, huge)?;
        let pair = protect::pair(&config, true)?;
        let (Some(invitation), Some(calls)) = (invitation.take(), calls.take()) else {
            return Err(Failure::host("take a guest")(
                io::ErrorKind::NotFound.into(),
            ));
        };
        let standby = Standby {
            claims,
            standbys,
            keys: keys(args.tls.as_deref())?,
            disks: config.disks.iter().map(|disk| disk.path.clone()).collect(),
            confinement: confinement.entry(ThreadKind::Protection),
        };
        let joined = invitation.accept(calls, &memory, beside, standby, &pair)?;
        let surroundings = surroundings(confinement, &pair);
        let memory = SavedMemory::Loaded(memory);
        let (state, now) = (&joined.state, Instant::now());
        let restored = match reserved {
            Some(resources) => {
                Machine::restore_on(resources, config, state, memory, surroundings, now)
            }
            None => Machine::restore(config, state, memory, surroundings, now),
        };
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
        let made = (pair, description.clone());
        let guest = protect::guest(&machine, made, confinement, place, Some(keeper));
        let beside = protect::beside(guest, None, move |desk| {
            if let Err(error) = joined.start(handle, desk) {
                tracing::error!(%error, "the copy stands: it cannot follow its primary");
            }
        })?;
        let beside = match store.zip(plan) {
            Some((owned, plan)) => {
                let how = (plan, Begin::Follows);
                checkpoints::beside(beside, &machine, description, confinement, owned, how)
            }
            None => beside,
        };
        Ok((machine, beside))
    });
    if let (Some(invitation), Err(failure)) = (invitation, &ran) {
        invitation.refuse(&failure.report());
    }
    ran
}

/// What the copy needs, once there is a place for it.
fn prepare(
    args: &StandbyArgs,
    context: &RunContext,
    invitation: &Invitation,
) -> Result<(Launch, Claims, Option<Standbys>, Option<Owned>), Failure> {
    let hello = &invitation.offer.hello;
    let name = hello.hardware.name.clone();
    if let Err(error) = value::name(&name) {
        let text = name.escape_debug();
        return Err(ProtectionError::Garbled(format!("a guest named `{text}`: {error}")).into());
    }
    let own = match &args.guests {
        Some(directory) => own_settings(directory, &name)?,
        None => Settings::default(),
    };
    let (described, problems) = file::parse(&hello.description);
    let mut settings = described.replace(own).replace(args.place.settings());
    let stdio = settings.console.as_ref().map(|console| &console.value);
    if args.handed && matches!(stdio, None | Some(ConsoleConfig::Stdio)) {
        settings.console = Some(Located::flag(ConsoleConfig::Off));
    }
    let claims = Claims::open(&args.arbiter, &name)?;
    // Flags and file of this host say where others stand by; the primary's description does not.
    let standbys = match (&args.protect[..], settings.protect.take()) {
        ([], None) => None,
        ([], Some(places)) => Some(routes(&places.value, args.tls.as_deref())?),
        (places, _) => Some(routes(places, args.tls.as_deref())?),
    };
    for (number, bytes) in &invitation.offer.disks {
        if let Some(disk) = settings.disks.get(usize::from(*number)) {
            mirror::make(&disk.config.path, *bytes).map_err(ProtectionError::from)?;
        }
    }
    let mut launch = accept(settings.launch_restored(name.clone()), problems, None)?;
    let store = match &invitation.offer.store {
        Some(stored) => {
            let told = checkpoints::told(stored)?;
            let bounds = Bounds {
                confine: launch.confine,
                user: launch.user,
            };
            let opened = Opened::find(&told, &name, bounds)?;
            launch.checkpoints = Some(told);
            Some(opened.follow(stored.kin)?)
        }
        None => None,
    };
    let root = Root::new(context.runtime_dir.clone())?;
    make_way(&root, &launch.machine.name, invitation, &claims)?;
    Ok((launch, claims, standbys.map(Standbys::new), store))
}

/// What the file of the guest `name` says is another here than at the primary.
fn own_settings(directory: &Path, name: &str) -> Result<Settings, Failure> {
    let path = directory.join(format!("{name}.toml"));
    if !path.exists() {
        return Ok(Settings::default());
    }
    let (settings, problems) = file::read(&path)?;
    if !problems.is_empty() {
        let file = Some(path);
        return Err(Failure::Settings { file, problems });
    }
    if settings != settings.of_place() {
        let message = "only what is another here than at the primary can be said: name, disk, net, vsock, \
                       console, no-reboot, pin, realtime, api, log-level, confine, user, protect";
        return Err(problem("", message.into(), Some(path)));
    }
    Ok(settings)
}

/// Ends an older copy of the guest that is here, if it is surely that: it believes in an owner before the one of
/// `invitation`, or was left by that itself.
fn make_way(
    root: &Root,
    name: &str,
    invitation: &Invitation,
    claims: &Claims,
) -> Result<(), Failure> {
    let Ok(old) = root.find(name) else {
        return Ok(());
    };
    let pid = old.pid();
    let taken = || {
        let name = name.to_owned();
        Failure::from(PlaceError::NameTaken { name, pid })
    };
    let term = invitation.offer.term;
    let client = Client::new(&old)?.with_timeout(OLD_ANSWER);
    let status: Status = client.get_json("/api/v1/protection").map_err(|_| taken())?;
    let is_older = match status.role {
        Role::Secondary => status.term <= term,
        // One that nobody protects is another guest.
        Role::Primary => status.term > 0 && status.term < term,
    };
    if !is_older || claims.current()?.map(|tenure| tenure.term.0) != Some(term) {
        return Err(taken());
    }
    output::tell(&format!(
        "tandem: the copy of guest `{name}` of term {} gives way to that of term {term}",
        status.term
    ));
    // It may have ended by itself.
    drop(client.post("/api/v1/stop", &json!({"force": true})));
    let deadline = Instant::now() + OLD_END;
    while root.find(name).is_ok() {
        if Instant::now() >= deadline {
            return Err(taken());
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}
