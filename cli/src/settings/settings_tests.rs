use std::fs;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tandem_ft::mode::Choice;
use tandem_ft::runtime::{Budget, ResyncMode};
use tandem_vmm::config::{DiskEngine, MacAddr, Pace};

use super::*;

const FULL: &str = r#"
name = "web"
kernel = "vmlinux"
cmdline = "console=ttyS0"
cpus = 2
memory = "512MiB"
console = "file=out.log"
no-reboot = true
pin = [0, 1]
rng-seed = 18446744073709551615

[[disk]]
path = "root.img"
readonly = true

[[disk]]
path = "/data.img"
id = "data"
engine = "threads"

[[net]]
tap = "tap0"
mac = "52:54:00:12:34:56"

[vsock]
cid = 3
path = "v.sock"
"#;

fn lines(text: &str) -> Vec<String> {
    let (_, problems) = file::parse(text);
    let file = Some(Path::new("vm.toml"));
    problems
        .iter()
        .map(|p| p.display(file).to_string())
        .collect()
}

#[test]
fn a_full_file_is_read() {
    let (settings, problems) = file::parse(FULL);
    assert_eq!(problems, []);
    assert_eq!(settings.memory.as_ref().map(|m| m.value), Some(512 << 20));
    assert_eq!(settings.rng_seed.as_ref().map(|s| s.value), Some(u64::MAX));
    assert_eq!(settings.disks[1].config.engine, DiskEngine::Threads);
    assert_eq!(
        settings.disks[1].id_at,
        Origin::File {
            line: 18,
            column: 6
        }
    );
    assert_eq!(settings.vsock.map(|v| v.value.cid), Some(3));
}

#[test]
fn standbys_are_one_or_a_list_of_bounded_length() {
    let places = |text: &str| {
        let (settings, problems) = file::parse(text);
        assert_eq!(problems, [], "{text}");
        let protect = settings.protect.expect("it is said").value;
        protect.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(places("protect = \"h:1\""), ["h:1"]);
    assert_eq!(places("protect = \"h:1,second=g:1\""), ["h:1,second=g:1"]);
    assert_eq!(places("protect = [\"h:1\", \"/run/x\"]"), ["h:1", "/run/x"]);
    for wrong in ["[]", "7", "[\"h:1\", 7]", "[\"nowhere\"]", "{}"] {
        let lines = lines(&format!("protect = {wrong}"));
        assert!(lines[0].starts_with("vm.toml:1:"), "{lines:?}");
        assert!(lines[0].contains("protect"), "{lines:?}");
    }
    let many = vec!["\"h:1\""; 17].join(", ");
    let text = format!("kernel = \"x\"\narbiter = \"a\"\nprotect = [{many}]");
    let problems = file::parse(&text)
        .0
        .launch("web".into())
        .expect_err("too many");
    let told = problems.iter().map(|problem| problem.message.as_str());
    assert!(
        told.collect::<String>().contains("at most 16"),
        "{problems:?}"
    );
}

#[test]
fn checkpoints_need_a_store_and_nothing_that_others_have_too() {
    let place = tempfile::tempdir().expect("a directory");
    let image = place.path().join("kernel");
    fs::write(&image, "x").expect("a file");
    let problems = |text: &str| {
        let text = format!("kernel = '{}'\n{text}", image.display());
        let (settings, problems) = file::parse(&text);
        assert_eq!(problems, [], "{text}");
        match settings.launch("web".into()) {
            Ok(launch) => Ok(launch.checkpoints),
            Err(problems) => Err(problems
                .into_iter()
                .map(|p| p.key + ": " + &p.message)
                .collect::<String>()),
        }
    };
    let there = place.path().display();
    let found = problems(&format!(
        "checkpoint = '{there}'\nevery = '50ms'\ncommit = true"
    ));
    let plan = found.expect("they fit").expect("there is a store").plan;
    assert_eq!(
        (plan.interval, plan.commit),
        (Duration::from_millis(50), true)
    );
    assert_eq!(problems("").expect("nothing is said"), None);
    let bucket = problems("checkpoint = 's3://bucket/x'\nevery = 'auto'").expect("they fit");
    let plan = bucket.expect("there is a store").plan;
    assert_eq!(plan.budget, Some(Budget::default()));
    let both = format!("checkpoint = '{there}'\nprotect = 'h:1'\narbiter = '{there}'");
    assert!(problems(&both).expect("they fit").is_some());
    for (text, told) in [
        (
            "every = 'auto,pause=1%'".to_owned(),
            "every: there are no checkpoints",
        ),
        (
            "checkpoint = '/no/such/place'".to_owned(),
            "checkpoint: `/no/such/place` is no directory",
        ),
        ("every = '1s'".to_owned(), "every: there are no checkpoints"),
        (
            "commit = false".to_owned(),
            "commit: there are no checkpoints",
        ),
        (
            format!("checkpoint = '{there}'\nstore-key = '/no/key'"),
            "store-key: it cannot be used",
        ),
        (
            format!("{both}\ncommit = true"),
            "commit: outputs of a guest that has a copy wait for that",
        ),
        (
            format!("{both}\nresync = 'stopped'"),
            "resync: the copy makes the checkpoints",
        ),
    ] {
        let found = problems(&text).expect_err(&text);
        assert!(found.contains(told), "{text}: {found}");
    }
    let lines = lines("every = '1ms'\ncheckpoint = 'http://x'");
    assert!(
        lines
            .iter()
            .any(|line| line.contains("must be 10ms to 1440m")),
        "{lines:?}"
    );
    assert!(
        lines.iter().any(|line| line.contains("s3://BUCKET/PREFIX")),
        "{lines:?}"
    );
}

#[test]
fn a_pace_is_text_or_a_table() {
    let pace = |text: &str| {
        let (settings, problems) = file::parse(&format!("[[disk]]\npath = 'a'\npace = {text}\n"));
        assert_eq!(problems, [], "{text}");
        settings.disks[0].config.pace.to_string()
    };
    assert_eq!(pace("'hdd'"), "hdd");
    assert_eq!(
        pace("{ profile = 'ssd', latency-us = 5, safepoints = ['halted'] }"),
        "ssd+latency-us:5+safepoints:halted"
    );
    assert_eq!(
        pace("{ completions-per-second = 9, coalesce = true, safepoints = [] }"),
        "custom+completions-per-second:9+coalesce:true+safepoints:"
    );
    for (wrong, told) in [
        (
            "'tape'",
            "disk.pace`: `tape` is not allowed: must be `none`, `hdd`",
        ),
        (
            "3",
            "disk.pace`: must be text in quotes, or a table of values",
        ),
        (
            "{ latency-us = -1 }",
            "pace.latency-us`: `-1` is not allowed",
        ),
        (
            "{ latency-us = 99999999 }",
            "pace.latency-us`: `99999999` is not allowed",
        ),
        (
            "{ safepoints = ['lunch'] }",
            "pace.safepoints`: `lunch` is not allowed: must be one of halted, user-mode, kick, poll",
        ),
        ("{ latency = 3 }", "did you mean `latency-us`?"),
    ] {
        let lines = lines(&format!("[[disk]]\npath = 'a'\npace = {wrong}\n"));
        assert!(
            lines[0].starts_with("vm.toml:3:") && lines[0].contains(told),
            "{lines:?}"
        );
    }
}

#[test]
fn what_may_differ_per_host_is_told_from_the_rest() {
    let parse = |text| file::parse(text).0;
    let place = parse("console = \"off\"\nprotect = \"h:1\"\n[[net]]\ntap = \"tap7\"\n");
    assert_eq!(place.of_place(), place);
    for other in ["kernel = \"x\"", "memory = \"1GiB\"", "arbiter = \"a\""] {
        assert_ne!(parse(other).of_place(), parse(other), "{other}");
    }
}

#[test]
fn every_problem_is_named_with_its_place() {
    let text = "memroy = \"1GiB\"\ncpus = 99\nmemory = 512\nkernel = [\n\"x\"]\n\
                [[disk]]\nid = \"a,b\"\n[[net]]\nmac = 3\n[[net]]\ntap = \"a\"\nsocket = \"b\"\n";
    let lines = lines(text);
    let starts = [
        "vm.toml:1:1: key `memroy`: unknown, did you mean `memory`? allowed keys: name, kernel,",
        "vm.toml:2:8: key `cpus`: `99` is not allowed: must be a whole number from 1 to 32",
        "vm.toml:3:10: key `memory`: must be text in quotes, not a whole number",
        "vm.toml:4:10: key `kernel`: must be text in quotes, not a list",
        "vm.toml:6:1: key `disk.path`: missing",
        "vm.toml:7:6: key `disk.id`: `a,b` is not allowed",
        "vm.toml:8:1: key `net`: must have `tap` or `socket`, and not both",
        "vm.toml:9:7: key `net.mac`: must be text in quotes",
        "vm.toml:10:1: key `net`: must have `tap` or `socket`, and not both",
    ];
    assert_eq!(lines.len(), starts.len(), "{lines:#?}");
    for (line, start) in lines.iter().zip(starts) {
        assert!(
            line.starts_with(start),
            "{line} does not start with {start}"
        );
    }
}

#[test]
fn broken_toml_is_named_and_the_rest_still_read() {
    let lines = lines("cpus = = 3\nmemory = \"1\"\n");
    assert!(lines[0].starts_with("vm.toml:1:8: not TOML: "), "{lines:?}");
    assert!(lines[1].contains("2:10: key `memory`"), "{lines:?}");
    assert_eq!(lines.len(), 2, "{lines:?}");
}

#[test]
fn flags_win_and_devices_add_up() {
    let (file, _) = file::parse(FULL);
    let over = Settings {
        cpus: Some(Located::flag(4)),
        no_reboot: Some(Located::flag(false)),
        disks: vec![value::disk("path=more.img").expect("a disk").into()],
        ..Settings::default()
    };
    let merged = file.merge(over);
    assert_eq!(merged.cpus.map(|c| c.value), Some(4));
    assert_eq!(merged.no_reboot.map(|n| n.value), Some(false));
    assert_eq!(merged.memory.map(|m| m.value), Some(512 << 20));
    assert_eq!(merged.disks.len(), 3);
}

#[test]
fn paths_of_a_file_are_relative_to_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("vm.toml");
    fs::write(&path, FULL).expect("written");
    let (settings, _) = file::read(&path).expect("read");
    assert_eq!(settings.disks[0].config.path, dir.path().join("root.img"));
    assert_eq!(settings.disks[1].config.path, Path::new("/data.img"));
    let console = settings.console.map(|c| c.value);
    assert_eq!(
        console,
        Some(ConsoleConfig::File(dir.path().join("out.log")))
    );
}

/// Problems that only show when settings are held against each other and the host.
fn launch_problems(text: &str) -> Vec<String> {
    let (settings, problems) = file::parse(text);
    assert_eq!(problems, []);
    let problems = settings.launch("x".into()).expect_err("problems");
    problems
        .iter()
        .map(|p| p.display(None).to_string())
        .collect()
}

#[test]
fn what_does_not_fit_together_is_found() {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("a.img");
    fs::write(&image, "x").expect("written");
    let image = image.display();
    let text = format!(
        "kernel = '/no/such'\nmemory = '1TiB'\ncpus = 2\npin = [9999]\napi = '/no/dir/s'\n\
         [[disk]]\npath = '{image}'\nid = 'a'\n[[disk]]\npath = '{image}'\nid = 'a'\n\
         [[disk]]\npath = '/tmp'\n\
         [[net]]\ntap = 't'\nmac = '02:00:00:00:00:01'\n[[net]]\ntap = 't'\nmac = '02:00:00:00:00:01'\n"
    );
    let found = launch_problems(&text);
    let wanted = [
        "--kernel: `/no/such` cannot be read",
        "--memory: `1TiB` is more than this host has",
        "--pin: has 1 host CPUs for 2 vCPUs",
        "--pin: `9999` is no host CPU",
        "--api: `/no/dir/s` cannot be made",
        &format!("--disk: `{image}` is given twice; an image"),
        "--disk: `a` is given twice",
        "--disk: `/tmp` is of the wrong kind; must be a regular file or a block device",
        "--net: `t` is given twice",
        "--net: `02:00:00:00:00:01` is given twice",
    ];
    for start in wanted {
        assert!(
            found.iter().any(|f| f.starts_with(start)),
            "{start} not in {found:#?}"
        );
    }
    assert_eq!(found.len(), wanted.len(), "{found:#?}");
}

#[test]
fn a_kernel_is_needed_and_devices_are_limited() {
    let odd = "memory = '3MiB'\nhugepages = true\n";
    let disks: String = (0..16).map(|_| "[[disk]]\npath = '/dev/null'\n").collect();
    let found = launch_problems(&format!("{odd}{disks}"));
    assert!(
        found
            .iter()
            .any(|f| f.contains("`3MiB` is no multiple of 2MiB"))
    );
    assert!(found.iter().any(|f| f.starts_with("--kernel: missing")));
    assert!(found.iter().any(|f| f.contains("17 virtio devices")));
}

/// A file that is as long as may be, of the shortest values that there are.
#[test]
fn the_longest_files_are_looked_at_in_bounded_time() {
    let start = Instant::now();
    let tables: fn(usize) -> String = |number| format!("[[disk]]\npath='{number}'\n");
    let keys: fn(usize) -> String = |number| format!("k{number}=1\n");
    let items: fn(usize) -> String = |number| if number == 0 { "pin=[0" } else { ",0" }.to_owned();
    for part in [tables, keys, items] {
        let mut text = String::new();
        for number in 0.. {
            let next = part(number);
            if (text.len() + next.len()) as u64 > file::FILE_LEN_MAX {
                break;
            }
            text += &next;
        }
        let (settings, _) = file::parse(&text);
        assert!(settings.launch("x".into()).is_err());
    }
    assert!(start.elapsed() < Duration::from_secs(5), "hangs");
}

#[test]
fn readonly_images_can_be_shared_and_defaults_hold() {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("a.img");
    fs::write(&image, "x").expect("written");
    let image = image.display();
    let text = format!(
        "kernel = '{image}'\n[[disk]]\npath = '{image}'\nreadonly = true\n\
         [[disk]]\npath = '{image}'\nreadonly = true\n"
    );
    let (settings, _) = file::parse(&text);
    let launch = settings.launch("x".into()).expect("a launch");
    assert_eq!(
        (launch.machine.cpus, launch.machine.memory),
        (1, MEMORY_DEFAULT)
    );
    assert_eq!(launch.machine.name, "x");
}

#[test]
fn default_names_come_from_the_file() {
    assert_eq!(default_name(Some(Path::new("/etc/web.toml"))), "web");
    let by_pid = format!("vm-{}", std::process::id());
    assert_eq!(default_name(Some(Path::new("/etc/my vm.toml"))), by_pid);
    assert_eq!(default_name(None), by_pid);
}

/// Settings without their places, which differ between a file and flags.
fn bare(settings: &Settings) -> String {
    settings.to_string()
}

fn some_path() -> impl Strategy<Value = PathBuf> {
    "[a-zA-Z0-9 \"'\\\\äß=/.-]{1,20}".prop_map(PathBuf::from)
}

fn some_pace() -> impl Strategy<Value = Pace> {
    let texts = [
        "none",
        "hdd",
        "nic-1g",
        "nvme+coalesce:false",
        "ssd+latency-us:7+safepoints:",
    ];
    proptest::sample::select(texts.map(|text| text.parse().expect("a pace")).to_vec())
}

fn some_disk() -> impl Strategy<Value = DiskSetting> {
    let engine = prop_oneof![
        Just(DiskEngine::Auto),
        Just(DiskEngine::Uring),
        Just(DiskEngine::Threads)
    ];
    let id = proptest::option::of("[!-+\\--~]{1,20}");
    (
        some_path(),
        any::<bool>(),
        id,
        any::<bool>(),
        any::<bool>(),
        proptest::option::of(some_path()),
        engine,
        some_pace(),
    )
        .prop_map(|(path, readonly, id, direct, shared, redo, engine, pace)| {
            DiskSetting::from(DiskConfig {
                path,
                readonly,
                id,
                direct,
                shared,
                redo,
                engine,
                pace,
            })
        })
}

fn some_net() -> impl Strategy<Value = NetSetting> {
    let backend = prop_oneof![
        "[a-z][a-z0-9.]{0,14}".prop_map(NetBackendConfig::Tap),
        some_path().prop_map(NetBackendConfig::Socket),
    ];
    let mac = proptest::option::of(any::<[u8; 5]>());
    (backend, mac, some_pace()).prop_map(|(backend, mac, pace)| {
        let mac = mac.map(|[a, b, c, d, e]| MacAddr([2, a, b, c, d, e]));
        NetSetting::from(NetConfig { backend, mac, pace })
    })
}

fn some_every() -> impl Strategy<Value = Every> {
    let fixed = (10u64..86_400_000).prop_map(|ms| Every::Fixed(Duration::from_millis(ms)));
    let auto = (100u32..=500_000, 64u64 << 10..=1 << 40).prop_map(|(pause_ppm, bandwidth)| {
        Every::Auto(Budget {
            pause_ppm,
            bandwidth,
        })
    });
    prop_oneof![fixed, auto]
}

prop_compose! {
    pub(crate) fn some_settings()(
        name in proptest::option::of("[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,62}"),
        kernel in proptest::option::of(some_path()),
        cmdline in proptest::option::of("[^\u{0}]{0,40}"),
        cpus in proptest::option::of(1u8..=32),
        mib in proptest::option::of(2u64..100_000),
        console in proptest::option::of(prop_oneof![
            Just(ConsoleConfig::Stdio),
            Just(ConsoleConfig::Off),
            some_path().prop_map(ConsoleConfig::File),
        ]),
        rng_seed in proptest::option::of(any::<u64>()),
        acpi in proptest::option::of(any::<bool>()),
        no_reboot in proptest::option::of(any::<bool>()),
        pin in proptest::option::of(proptest::collection::vec(0usize..64, 1..4)),
        realtime in proptest::option::of(1u8..=99),
        confine in proptest::option::of(prop_oneof![
            Just(Enforcement::On),
            Just(Enforcement::Log),
            Just(Enforcement::Off),
        ]),
        user in proptest::option::of((1u32.., any::<u32>())),
        protect in proptest::option::of(proptest::collection::vec(some_path(), 1..4)),
        arbiter in proptest::option::of(some_path()),
        resync in proptest::option::of(prop_oneof![
            Just(ResyncMode::Running),
            Just(ResyncMode::Stopped),
        ]),
        mode in proptest::option::of(proptest::sample::select(Choice::ALL.to_vec())),
        latency_budget in proptest::option::of(1..=1000u64),
        tls in proptest::option::of(some_path()),
        checkpoint in proptest::option::of("/[a-z]{1,9}|s3://[a-z]{3,9}/[a-z]{1,9}"),
        every in proptest::option::of(some_every()),
        commit in proptest::option::of(any::<bool>()),
        store_key in proptest::option::of(some_path()),
        disks in proptest::collection::vec(some_disk(), 0..3),
        nets in proptest::collection::vec(some_net(), 0..3),
        vsock in proptest::option::of((3u32..u32::MAX, some_path())),
    ) -> Settings {
        Settings {
            name: name.map(Located::flag),
            kernel: kernel.map(Located::flag),
            cmdline: cmdline.map(Located::flag),
            cpus: cpus.map(Located::flag),
            memory: mib.map(|m| Located::flag(m << 20)),
            console: console.map(Located::flag),
            rng_seed: rng_seed.map(Located::flag),
            no_reboot: no_reboot.map(Located::flag),
            acpi: acpi.map(Located::flag),
            pin: pin.map(Located::flag),
            realtime: realtime.map(Located::flag),
            log_level: Some(Located::flag(LevelFilter::DEBUG)),
            boot: Some(Located::flag(BootProtocol::Pvh)),
            confine: confine.map(Located::flag),
            user: user.map(|(uid, gid)| Located::flag(User { uid, gid })),
            protect: protect.map(|paths| {
                let absolute = |path| Addresses::from(tandem_vmm::migration::Address::Unix(Path::new("/").join(path)));
                Located::flag(paths.into_iter().map(absolute).collect())
            }),
            arbiter: arbiter.map(Located::flag),
            resync: resync.map(Located::flag),
            mode: mode.map(Located::flag),
            latency_budget: latency_budget.map(|ms| Located::flag(Duration::from_millis(ms))),
            tls: tls.map(Located::flag),
            checkpoint: checkpoint.map(|place| Located::flag(place.parse().expect("a place"))),
            every: every.map(Located::flag),
            commit: commit.map(Located::flag),
            store_key: store_key.map(Located::flag),
            disks,
            nets,
            vsock: vsock.map(|(cid, path)| Located::flag(VsockConfig { cid, path })),
            ..Settings::default()
        }
    }
}

proptest! {
    #[test]
    fn a_written_file_reads_back(settings in some_settings()) {
        let text = settings.to_string();
        let (read, problems) = file::parse(&text);
        prop_assert_eq!(&problems, &[], "{}", text);
        prop_assert_eq!(bare(&read), text);
    }

    #[test]
    fn no_file_breaks_the_reader(text in "[a-z=\\[\\]{}\"'0-9.\n #-]{0,200}") {
        let _ = file::parse(&text);
    }
}
