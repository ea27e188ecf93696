//! `tandem run`: from flags to a running guest, and back to an exit code.
//!
//! The order matters for the time to the first guest instruction: what a run can do without, such as
//! serving the API, is left to a thread that starts when the machine is ready.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use serde_json::json;
use tandem_ft::runtime::{Desk, Pair};
use tandem_vmm::config::{ConsoleConfig, MachineConfig};
use tandem_vmm::confinement::{Confinement, ThreadKind};
use tandem_vmm::control::Outcome;
use tandem_vmm::machine::Machine;

use crate::api::server::{Service, Sources};
use crate::api::{Facts, Guest};
use crate::args::{Format, RunArgs};
use crate::control::Commander;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::runtime_dir::{Claim, Guest as Place, Root, VMM_LOG, VMM_LOG_OLD};
use crate::settings::{Launch, Problem, Settings, default_name, file, value};
use crate::terminal::{Keys, RawTerminal};
use crate::{confine, logging, output, signals};

/// Byte of the key that stops a guest on the terminal.
const STOP_KEY: u8 = 0x1d;

/// What the global flags say about a run.
#[derive(Clone, Debug)]
pub struct RunContext {
    /// When the process started.
    pub started: Instant,
    /// Directory of the running guests, if given.
    pub runtime_dir: Option<PathBuf>,
    /// How a dry run prints.
    pub format: Format,
    /// Whether hints and warnings are left out.
    pub quiet: bool,
}

/// Runs a guest until it ends.
///
/// # Errors
/// When the guest cannot be started or does not end well. Nothing is left behind.
pub fn run(args: RunArgs, context: &RunContext) -> Result<Exit, Failure> {
    let (dry_run, anew, incomplete) = (args.dry_run, args.anew, args.incomplete_disks);
    let launch = plan(args)?;
    if dry_run {
        return print_plan(launch, context.format);
    }
    crate::protect::run(launch, anew, incomplete, context)
}

/// Reads file and flags.
fn plan(mut args: RunArgs) -> Result<Launch, Failure> {
    let path = args.config.take();
    let (from_file, problems) = match &path {
        Some(path) => file::read(path)?,
        None => Default::default(),
    };
    let settings = from_file.merge(args.settings());
    let launch = settings.launch(default_name(path.as_deref()));
    accept(launch, problems, path)
}

/// The launch, if nothing was found to be wrong with it: neither by itself nor in `file`.
///
/// # Errors
/// All that is wrong.
pub(crate) fn accept(
    launch: Result<Launch, Vec<Problem>>,
    mut problems: Vec<Problem>,
    file: Option<PathBuf>,
) -> Result<Launch, Failure> {
    match launch {
        Ok(launch) if problems.is_empty() => return Ok(launch),
        Ok(_) => {}
        Err(more) => problems.extend(more),
    }
    Err(Failure::Settings { file, problems })
}

/// Prints the settings that would be used.
///
/// # Errors
/// When they cannot be printed.
pub(crate) fn print_plan(launch: Launch, format: Format) -> Result<Exit, Failure> {
    let printed = match format {
        Format::Table => output::print(Settings::from(launch).to_string()),
        Format::Json => output::print_json(&json!({
            "config": launch.machine,
            "api": launch.api,
            "log_level": launch.log_level.to_string(),
            "confine": value::confine_text(launch.confine),
            "user": launch.user.map(value::user_text),
            "protect": launch.protection.as_ref().map(|p| {
                p.to.iter().map(ToString::to_string).collect::<Vec<_>>()
            }),
            "arbiter": launch.protection.as_ref().map(|p| &p.arbiter),
            "tls": launch.protection.as_ref().and_then(|p| p.tls.as_ref()),
            "checkpoint": launch.checkpoints.as_ref().map(|c| c.store.to_string()),
            "every": launch.checkpoints.as_ref().map(|c| value::every_text(c.plan.every())),
            "commit": launch.checkpoints.as_ref().map(|c| c.plan.commit),
            "store_key": launch.checkpoints.as_ref().and_then(|c| c.key.as_ref()),
        })),
    };
    printed.map_err(Failure::host("print the settings"))?;
    Ok(Exit::Ok)
}

/// Ends what goes on beside a machine, when its guest has ended: how, if it ended well.
pub type Finish = Box<dyn FnOnce(Option<Outcome>)>;

/// What goes on beside a machine.
pub struct Beside {
    /// Its gates.
    pub pair: Arc<Pair>,
    /// Where its protection is asked for.
    pub desk: Desk,
    /// Called when nothing but the guest itself can fail any more.
    pub begin: Box<dyn FnOnce() -> Finish>,
}

/// Runs the machine that `open` makes, with everything around it: its place among the running
/// guests, log, API, signals and terminal.
///
/// # Errors
/// When the guest cannot be started or does not end well. Nothing is left behind.
pub fn run_machine<E>(
    launch: Launch,
    context: &RunContext,
    open: impl FnOnce(MachineConfig, &Confinement, &Place) -> Result<(Machine, Beside), E>,
) -> Result<Exit, Failure>
where
    Failure: From<E>,
{
    let signals = signals::catch().map_err(Failure::host("catch signals"))?;
    let root = Root::new(context.runtime_dir.clone())?;
    let mut claim = root.claim(&launch.machine.name)?;
    start_log(&claim, &launch, context.quiet)?;
    let sources = Sources {
        api: claim.bind_api(launch.api.as_deref())?,
        console: claim.bind_console()?,
        signals,
    };
    let facts = Facts {
        config: launch.machine.clone(),
        directory: claim.guest().dir().to_owned(),
    };
    let confinement = confine::begin(&launch, &claim)?;
    let (machine, beside) = open(launch.machine, &confinement, claim.guest())?;
    if let Some(user) = launch.user {
        confine::give_files(user, &facts.config, &claim)?;
    }
    let terminal = enter_terminal(&facts, context.quiet)?;
    let logs = !machine.redo_disks().is_empty();
    let commander = Commander::new(machine.handle(), beside.pair, beside.desk, logs);
    let guest = Guest::new(Arc::new(commander), facts);
    let confine = confinement.entry(ThreadKind::Api);
    let sweep = move || root.sweep();
    let service = Service::start(guest, sources, !context.quiet, sweep, confine)
        .map_err(Failure::host("start the API's thread"))?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "the guest starts");
    let finish = (beside.begin)();
    let outcome = machine.run();
    finish(outcome.as_ref().ok().copied());
    service.finish();
    drop(terminal);
    tracing::info!(?outcome, "the guest ended");
    Ok(exit(outcome?, context.quiet))
}

fn start_log(claim: &Claim, launch: &Launch, quiet: bool) -> Result<(), Failure> {
    let path = |entry| claim.guest().path(entry);
    logging::start(&path(VMM_LOG), &path(VMM_LOG_OLD), launch.log_level, quiet)
        .map_err(Failure::host("make the VMM's log"))
}

/// Makes the terminal raw if the guest's console is on one, and says how to leave it.
fn enter_terminal(facts: &Facts, quiet: bool) -> Result<Option<RawTerminal>, Failure> {
    if facts.config.console != ConsoleConfig::Stdio {
        return Ok(None);
    }
    let terminal = RawTerminal::enter(Keys::Interrupt(STOP_KEY))
        .map_err(Failure::host("make the terminal raw"))?;
    if terminal.is_some() && !quiet {
        let key = value::control_key_text(STOP_KEY);
        let name = &facts.config.name;
        output::tell(&format!(
            "tandem: console of guest `{name}`; {key} stops it, twice by force"
        ));
    }
    Ok(terminal)
}

fn exit(outcome: Outcome, quiet: bool) -> Exit {
    let note = match outcome {
        Outcome::Reset => Some("the guest reset, which ends its run (--no-reboot)"),
        Outcome::Left => Some("the guest goes on elsewhere"),
        Outcome::PowerOff | Outcome::Stopped => None,
    };
    if let Some(note) = note.filter(|_| !quiet) {
        output::tell(&format!("tandem: {note}"));
    }
    Exit::Ok
}
