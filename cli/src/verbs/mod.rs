//! What the verbs do, each in one function; `run` has a module of its own.

mod attach;
mod change;
mod keys;
mod protection;
mod saved;
mod show;
mod stores;
mod writing;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use tandem_ft::mode::LATENCY_BUDGET;

use crate::api::types::{ModeBody, PaceBody};
use crate::args::{Cli, Format, InspectArgs, StoreArgs, StoreVerb, Verb};
use crate::bucket;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output;
use crate::receive;
use crate::restore;
use crate::resume;
use crate::run::{self, RunContext};
use crate::runtime_dir::Root;
use crate::standby;
use crate::top;

/// What the global flags say.
#[derive(Clone, Copy, Debug)]
struct Style {
    format: Format,
    quiet: bool,
}

impl Style {
    fn json(self) -> bool {
        self.format == Format::Json
    }

    /// Tells the user something that was not asked for.
    fn hint(self, text: &str) {
        if !self.quiet {
            output::tell(&format!("tandem: {text}"));
        }
    }
}

/// Does what the command line says; `started` is when the process started.
pub fn dispatch(cli: Cli, started: Instant) -> ExitCode {
    let exit = carry_out(cli, started).unwrap_or_else(|failure| {
        output::tell(&failure.report());
        failure.exit()
    });
    exit.into()
}

fn context(started: Instant, runtime_dir: &Option<PathBuf>, style: Style) -> RunContext {
    RunContext {
        started,
        runtime_dir: runtime_dir.clone(),
        format: style.format,
        quiet: style.quiet,
    }
}

fn carry_out(cli: Cli, started: Instant) -> Result<Exit, Failure> {
    let style = Style {
        format: cli.format,
        quiet: cli.quiet,
    };
    let root = || Root::new(cli.runtime_dir.clone());
    match cli.verb {
        Verb::Run(args) => {
            let context = context(started, &cli.runtime_dir, style);
            return run::run(*args, &context);
        }
        Verb::Check { file } => return show::check(&file, style),
        Verb::Bucket(args) => return bucket::speak(&args),
        Verb::List => show::list(&root()?, style)?,
        Verb::Info { name } => show::info(&root()?.find(&name)?, style)?,
        Verb::Top(args) => top::top(&root()?, &args, style.format)?,
        Verb::Metrics { name } => show::metrics(&root()?.find(&name)?)?,
        Verb::Version => show::version(style)?,
        Verb::Console { name, detach_key } => {
            attach::console(&root()?.find(&name)?, detach_key, style)?;
        }
        Verb::Logs { name, follow, vmm } => {
            let guest = root()?.find(&name)?;
            if vmm {
                attach::vmm_log(&guest, follow)?;
            } else {
                attach::logs(&guest, follow)?;
            }
        }
        Verb::Pause(change) => change::pause(&root()?.find(&change.name)?, &change, style)?,
        Verb::Resume(args) => {
            if let Some(from) = &args.from {
                let context = context(started, &cli.runtime_dir, style);
                return resume::resume(&args, from, &context);
            }
            let change = args.change()?;
            change::resume(&root()?.find(&change.name)?, &change, style)?;
        }
        Verb::Stop {
            change,
            force,
            timeout,
        } => {
            let stop = change::Stop { force, timeout };
            change::stop(&root()?.find(&change.name)?, &change, stop, style)?;
        }
        Verb::Pace {
            change,
            device,
            pace,
        } => {
            let guest = root()?.find(&change.name)?;
            change::pace(&guest, &change, &PaceBody { device, pace }, style)?;
        }
        Verb::Snapshot { change, directory } => {
            saved::snapshot(&root()?.find(&change.name)?, &change, &directory, style)?;
        }
        Verb::Restore(args) => {
            let context = context(started, &cli.runtime_dir, style);
            return restore::restore(&args, &context);
        }
        Verb::Migrate {
            change,
            to,
            downtime,
            tls,
        } => {
            let asked = saved::Move { to, downtime, tls };
            saved::migrate(&root()?.find(&change.name)?, &change, &asked, style)?;
        }
        Verb::Receive(args) => {
            let context = context(started, &cli.runtime_dir, style);
            return receive::receive(&args, &context);
        }
        Verb::Standby(args) => {
            let context = context(started, &cli.runtime_dir, style);
            return standby::standby(&args, &context);
        }
        Verb::Protect {
            change,
            to,
            arbiter,
            mode,
            latency_budget,
            resync,
            timeout,
            tls,
        } => {
            let guest = root()?.find(&change.name)?;
            let Some(arbiter) = arbiter else {
                let body = ModeBody {
                    mode,
                    latency_budget_us: latency_budget.map(|time| time.as_micros() as u64),
                };
                return protection::set_mode(&guest, &change, body, timeout, style)
                    .map(|()| Exit::Ok);
            };
            let ask = protection::Ask {
                mode: mode.unwrap_or_default(),
                latency_budget: latency_budget.unwrap_or(LATENCY_BUDGET),
                to,
                tls,
                arbiter,
                resync,
                timeout,
            };
            protection::protect(&guest, &change, &ask, style)?;
        }
        Verb::Unprotect(change) => {
            protection::unprotect(&root()?.find(&change.name)?, &change, style)?;
        }
        Verb::Resync(change) => {
            protection::resync(&root()?.find(&change.name)?, &change, style)?;
        }
        Verb::Failover(change) => {
            protection::fail_over(&root()?.find(&change.name)?, &change, style)?;
        }
        Verb::Events { name, follow } => {
            protection::events(&root()?.find(&name)?, follow, style)?;
        }
        Verb::Status { name } => protection::status(&root()?.find(&name)?, style)?,
        Verb::Keys { keys } => keys::carry_out(&keys, style)?,
        Verb::Inspect(args) => inspect(&args, style)?,
        Verb::Checkpoints(args) => stores::list(&args, style)?,
        Verb::Verify(args) => return stores::verify(&args, style),
        Verb::Prune(args) => stores::prune(&args, style)?,
        Verb::Export(args) => stores::export(&args, style)?,
        Verb::Import(args) => stores::import(&args, style)?,
        Verb::Store {
            store: StoreVerb::Init { place, encrypt },
        } => stores::init(&place, encrypt.as_deref(), style)?,
        Verb::Man { directory } => writing::man(&directory)?,
        Verb::Completions { shell } => writing::completions(shell)?,
    }
    Ok(Exit::Ok)
}

/// Shows a snapshot, or a checkpoint.
fn inspect(args: &InspectArgs, style: Style) -> Result<(), Failure> {
    match &args.from {
        None => saved::inspect(Path::new(&args.what), args.verify, style),
        Some(from) => {
            let store = StoreArgs {
                from: from.clone(),
                key: args.key.clone(),
            };
            stores::inspect(&args.what, &store, style)
        }
    }
}
