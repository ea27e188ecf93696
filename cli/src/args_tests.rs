use clap::CommandFactory;
use proptest::prelude::*;
use tandem_vmm::config::NetBackendConfig;

use super::*;
use crate::exit::Exit;
use crate::settings::file;
use crate::settings::tests::some_settings;

fn run_args(args: &[&str]) -> Result<RunArgs, clap::Error> {
    let argv = ["tandem", "run"].into_iter().chain(args.iter().copied());
    match Cli::try_parse_from(argv)?.verb {
        Verb::Run(run) => Ok(*run),
        other => panic!("parsed as {other:?}"),
    }
}

#[test]
fn the_command_is_well_formed() {
    Cli::command().debug_assert();
}

#[test]
fn help_names_every_exit_code() {
    let mut command = Cli::command();
    let run = command.find_subcommand_mut("run").expect("run");
    let help = run.render_long_help().to_string();
    for exit in Exit::ALL {
        let line = format!("{:>3}  {:<15} {}", exit.code(), exit.name(), exit.meaning());
        assert!(help.contains(line.trim_end()), "{line} is not in the help");
    }
}

#[test]
fn every_flag_is_a_key_of_the_file_and_the_other_way_round() {
    let (_, problems) = file::parse("no-such-key = 1\n");
    let (_, keys) = problems[0]
        .message
        .split_once("allowed keys: ")
        .expect("the list of keys");
    let mut keys: Vec<&str> = keys.split(", ").collect();
    let command = Cli::command();
    let run = command.find_subcommand("run").expect("run");
    let mut flags: Vec<&str> = run
        .get_arguments()
        .filter_map(clap::Arg::get_long)
        .filter(|flag| !["config", "dry-run", "help", "anew", "incomplete-disks"].contains(flag))
        .collect();
    keys.sort_unstable();
    flags.sort_unstable();
    assert_eq!(keys, flags);
}

#[test]
fn a_guest_is_resumed_from_a_store_or_where_it_stands() {
    let resume = |args: &[&str]| {
        let argv = ["tandem", "resume", "web"];
        match Cli::try_parse_from(argv.into_iter().chain(args.iter().copied()))?.verb {
            Verb::Resume(resume) => Ok::<_, clap::Error>(*resume),
            other => panic!("parsed as {other:?}"),
        }
    };
    let paused = resume(&["--dry-run"]).expect("no more is needed");
    let change = paused.change().expect("it says nothing of a place");
    assert_eq!((change.name.as_str(), change.dry_run), ("web", true));
    let lost = resume(&["--from", "/s", "--every", "2m", "--pin", "0"]).expect("flags");
    assert_eq!(lost.from, Some(Place::Directory("/s".into())));
    assert_eq!(lost.every, Some(Every::Fixed(Duration::from_secs(120))));
    assert!(resume(&["--every", "1s"]).is_err());
    let placed = resume(&["--pin", "0"]).expect("flags").change();
    let told = placed.expect_err("there is no store").report();
    assert!(told.contains("--from"), "{told}");
}

#[test]
fn switches_can_be_turned_off() {
    let on = run_args(&["--no-reboot", "--hugepages=true"]).expect("flags");
    assert_eq!((on.no_reboot, on.hugepages), (Some(true), Some(true)));
    let off = run_args(&["--no-reboot=false"]).expect("flags");
    assert_eq!((off.no_reboot, off.hugepages), (Some(false), None));
    assert!(run_args(&["--no-reboot=maybe"]).is_err());
}

#[test]
fn a_wrong_value_is_named_with_its_flag() {
    let error = run_args(&["--cpus", "99"])
        .expect_err("too many")
        .to_string();
    assert!(
        error.contains("--cpus <N>") && error.contains("1 to 32"),
        "{error}"
    );
}

/// The flags that say the same as `settings`.
fn flags(settings: &Settings) -> Vec<String> {
    fn flag<T>(
        flags: &mut Vec<String>,
        name: &str,
        value: Option<&Located<T>>,
        text: impl Fn(&T) -> String,
    ) {
        flags.extend(value.map(|v| format!("--{name}={}", text(&v.value))));
    }
    let path = |p: &PathBuf| p.display().to_string();
    let mut all = Vec::new();
    flag(&mut all, "name", settings.name.as_ref(), String::clone);
    flag(&mut all, "kernel", settings.kernel.as_ref(), path);
    flag(
        &mut all,
        "cmdline",
        settings.cmdline.as_ref(),
        String::clone,
    );
    flag(&mut all, "boot", settings.boot.as_ref(), |b| {
        value::boot_text(*b).into()
    });
    flag(&mut all, "cpus", settings.cpus.as_ref(), u8::to_string);
    flag(&mut all, "memory", settings.memory.as_ref(), |m| {
        value::size(*m)
    });
    flag(
        &mut all,
        "console",
        settings.console.as_ref(),
        value::console_text,
    );
    flag(
        &mut all,
        "rng-seed",
        settings.rng_seed.as_ref(),
        u64::to_string,
    );
    flag(&mut all, "acpi", settings.acpi.as_ref(), bool::to_string);
    flag(
        &mut all,
        "no-reboot",
        settings.no_reboot.as_ref(),
        bool::to_string,
    );
    flag(
        &mut all,
        "realtime",
        settings.realtime.as_ref(),
        u8::to_string,
    );
    flag(
        &mut all,
        "log-level",
        settings.log_level.as_ref(),
        LevelFilter::to_string,
    );
    flag(&mut all, "confine", settings.confine.as_ref(), |c| {
        value::confine_text(*c).into()
    });
    flag(&mut all, "user", settings.user.as_ref(), |u| {
        value::user_text(*u)
    });
    let protect = settings.protect.iter().flat_map(|all| &all.value);
    all.extend(protect.map(|to| format!("--protect={to}")));
    flag(&mut all, "arbiter", settings.arbiter.as_ref(), |path| {
        path.display().to_string()
    });
    flag(&mut all, "resync", settings.resync.as_ref(), |mode| {
        mode.name().into()
    });
    flag(&mut all, "mode", settings.mode.as_ref(), |mode| {
        mode.name().into()
    });
    let budget = settings.latency_budget.as_ref();
    flag(&mut all, "latency-budget", budget, |time| {
        value::latency_budget_text(*time)
    });
    flag(&mut all, "tls", settings.tls.as_ref(), path);
    let store = settings.checkpoint.as_ref();
    flag(&mut all, "checkpoint", store, Place::to_string);
    flag(&mut all, "every", settings.every.as_ref(), |every| {
        value::every_text(*every)
    });
    flag(
        &mut all,
        "commit",
        settings.commit.as_ref(),
        bool::to_string,
    );
    flag(&mut all, "store-key", settings.store_key.as_ref(), path);
    flag(&mut all, "vsock", settings.vsock.as_ref(), |v| {
        format!("cid={},path={}", v.cid, v.path.display())
    });
    flag(&mut all, "pin", settings.pin.as_ref(), |cpus| {
        let cpus: Vec<String> = cpus.iter().map(usize::to_string).collect();
        cpus.join(",")
    });
    all.extend(settings.disks.iter().map(|d| disk_flag(&d.config)));
    all.extend(settings.nets.iter().map(|n| net_flag(&n.config)));
    all
}

fn disk_flag(disk: &DiskConfig) -> String {
    format!("--disk={}", value::disk_text(disk))
}

fn net_flag(net: &NetConfig) -> String {
    let backend = match &net.backend {
        NetBackendConfig::Tap(name) => format!("tap={name}"),
        NetBackendConfig::Socket(path) => format!("socket={}", path.display()),
    };
    let mac = net.mac.map_or(String::new(), |mac| format!(",mac={mac}"));
    format!("--net={backend}{mac},pace={}", net.pace)
}

proptest! {
    #[test]
    fn flags_and_file_say_the_same(settings in some_settings()) {
        let flags = flags(&settings);
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let parsed = run_args(&flags);
        prop_assert!(parsed.is_ok(), "{:?}: {:?}", flags, parsed.err());
        let from_flags = parsed.expect("checked").settings();
        prop_assert_eq!(&from_flags, &settings);
    }
}
