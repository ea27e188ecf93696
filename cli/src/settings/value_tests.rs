use proptest::prelude::*;

use tandem_ft::runtime::Budget;
use tandem_store::CheckpointId;
use tandem_store::capture::Every;

use super::*;

fn message<T: std::fmt::Debug>(result: Result<T, ValueError>) -> String {
    result.expect_err("the value should be refused").to_string()
}

#[test]
fn intervals_are_times_or_follow_a_budget() {
    let auto = |pause_ppm, mib: u64| {
        Ok(Every::Auto(Budget {
            pause_ppm,
            bandwidth: mib << 20,
        }))
    };
    assert_eq!(every("50ms"), Ok(Every::Fixed(Duration::from_millis(50))));
    assert_eq!(every("auto"), auto(10_000, 32));
    assert_eq!(every("auto,pause=2.5%"), auto(25_000, 32));
    assert_eq!(every("auto,bandwidth=8MiB,pause=0.01%"), auto(100, 8));
    assert_eq!(
        every_text(Every::Auto(Budget::default())),
        "auto,pause=1%,bandwidth=32MiB"
    );
    assert_eq!(
        (percent(100), percent(500_000)),
        ("0.01%".into(), "50%".into())
    );
    for (bad, told) in [
        ("auto,", "auto[,pause=PERCENT]"),
        ("auto,rate=1", "auto[,pause=PERCENT]"),
        ("auto,pause=2", "0.01% to 50%"),
        ("auto,pause=51%", "0.01% to 50%"),
        ("auto,pause=0.001%", "0.01% to 50%"),
        ("auto,pause=1.00001%", "0.01% to 50%"),
        ("auto,pause=+1%", "0.01% to 50%"),
        ("auto,bandwidth=1KiB", "64KiB to 1TiB"),
        ("1ms", "10ms to 1440m"),
    ] {
        assert!(message(every(bad)).contains(told), "{bad}");
    }
}

#[test]
fn memory_reads_sizes_and_refuses_the_rest() {
    assert_eq!(memory("512MiB"), Ok(512 << 20));
    assert_eq!(memory("2GiB"), Ok(2 << 30));
    assert_eq!(memory("2097152"), Ok(2 << 20));
    for bad in [
        "",
        "x",
        "1MiB",
        "512MB",
        "-1",
        "1.0001GiB",
        "99999999999TiB",
    ] {
        assert!(
            message(memory(bad)).contains("a size such as 512MiB"),
            "{bad}"
        );
    }
}

#[test]
fn names_are_safe_as_directories() {
    assert_eq!(name("vm-1.a_B"), Ok("vm-1.a_B".into()));
    let long = "a".repeat(NAME_LEN_MAX + 1);
    for bad in ["", ".", "..", ".x", "-x", "a/b", "a b", "ä", long.as_str()] {
        assert!(name(bad).is_err(), "{bad}");
    }
}

#[test]
fn numbers_have_ranges() {
    assert_eq!(cpus("32"), Ok(32));
    assert!(message(cpus("33")).contains("from 1 to 32"));
    assert!(cpus("0").is_err() && cpus("two").is_err());
    assert!(realtime("0").is_err() && realtime("100").is_err());
    assert!(cid("2").is_err() && cid("4294967295").is_err());
    assert_eq!(rng_seed("18446744073709551615"), Ok(u64::MAX));
    assert_eq!(pin("0, 3,1"), Ok(vec![0, 3, 1]));
    assert!(pin("0,,1").is_err() && pin("0-3").is_err());
}

#[test]
fn durations_have_units_and_a_limit() {
    assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
    assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
    for bad in [
        "",
        "10",
        "s",
        "-1s",
        "1.5s",
        "2000m",
        "18446744073709551615m",
        "1h",
    ] {
        assert!(duration(bad).is_err(), "{bad}");
    }
}

#[test]
fn control_keys_are_bytes() {
    assert_eq!(control_key("ctrl-]"), Ok(0x1d));
    assert_eq!(control_key("Ctrl-A"), Ok(1));
    assert_eq!(control_key("^x"), Ok(0x18));
    assert_eq!(control_key(&control_key_text(0x1d)), Ok(0x1d));
    for bad in ["", "a", "ctrl-", "ctrl-aa", "ctrl-1", "^"] {
        assert!(control_key(bad).is_err(), "{bad}");
    }
}

#[test]
fn disks_name_the_wrong_part() {
    let disk = disk("path=a.img,readonly,id=root,engine=threads").expect("a disk");
    assert!(disk.readonly && !disk.direct);
    assert_eq!(disk.id.as_deref(), Some("root"));
    assert!(message(super::disk("path=a,cache=on")).contains("`cache`"));
    assert!(message(super::disk("path=a,path=b")).contains("`path` twice"));
    assert!(message(super::disk("path=a,engine=x")).contains("`engine` must be `auto`"));
    assert!(message(super::disk("readonly")).contains("path=FILE"));
    assert!(message(super::disk("path=a,pace=tape")).contains("`pace` must be `none`, `hdd`"));
    assert_eq!(
        super::disk("path=a,pace=hdd").map(|d| d.pace.to_string()),
        Ok("hdd".into())
    );
    assert!(message(super::disk("path")).contains("path=VALUE"));
}

#[test]
fn nets_have_one_backend() {
    assert!(net("tap=tap0,mac=52:54:00:12:34:56").is_ok());
    assert!(net("tap=tap0,socket=/s").is_err());
    assert!(net("mac=52:54:00:12:34:56").is_err());
    assert!(message(net("tap=a-name-that-is-too-long")).contains("1 to 15"));
    assert!(message(net("tap=t,mac=1")).contains("six bytes"));
    assert_eq!(
        net("tap=t,pace=nic-1g").map(|n| n.pace.to_string()),
        Ok("nic-1g".into())
    );
}

#[test]
fn vsock_needs_both_parts() {
    assert!(vsock("cid=3,path=/tmp/v").is_ok());
    assert!(vsock("cid=3").is_err() && vsock("path=/tmp/v").is_err());
}

#[test]
fn consoles_have_three_forms() {
    assert_eq!(console("stdio"), Ok(ConsoleConfig::Stdio));
    assert_eq!(console("file=a=b"), Ok(ConsoleConfig::File("a=b".into())));
    for bad in ["", "file", "file=", "pty", "stdio=1"] {
        assert!(message(console(bad)).contains("`stdio`, `off` or `file=PATH`"));
    }
}

#[test]
fn users_have_names_or_numbers_and_are_not_root() {
    assert_eq!(user("12345:7"), Ok(User { uid: 12345, gid: 7 }));
    assert_eq!(user("12345:root"), Ok(User { uid: 12345, gid: 0 }));
    for root in ["root", "0", "0:5", "root:root"] {
        assert!(message(user(root)).contains("superuser"), "{root}");
    }
    for unknown in ["no-such-user", "4294967290", "", ":"] {
        assert!(user(unknown).is_err(), "{unknown}");
    }
    assert!(message(user("12345:no-such-group")).contains("no such group"));
}

#[test]
fn confinement_has_three_modes() {
    for text in ["on", "log", "off"] {
        assert_eq!(confine(text).map(confine_text), Ok(text));
    }
    assert!(message(confine("yes")).contains("`on`, `log` or `off`"));
}

#[test]
fn ages_have_a_unit_up_to_days() {
    let ages = ["30s", "90m", "12h", "7d", "0s"].map(|text| age(text).map(|age| age.as_secs()));
    assert_eq!(ages, [30, 5400, 43_200, 604_800, 0].map(Ok));
    for text in ["7", "d", "1w", "36501d", "99999999999999999999d", "-1d"] {
        let error = message(age(text));
        assert!(error.contains("7d"), "{error}");
    }
}

#[test]
fn checkpoints_are_named_by_guest_and_number() {
    let id = CheckpointId {
        term: 3,
        sequence: 17,
    };
    let chosen = |id| Chosen {
        guest: "web".to_owned(),
        id,
    };
    assert_eq!(checkpoint("web"), Ok(chosen(None)));
    assert_eq!(checkpoint("web@3-17"), Ok(chosen(Some(id))));
    for text in [
        "web@",
        "web@3",
        "web@3-x",
        "web@3-17-1",
        "@3-17",
        "a b@3-17",
    ] {
        assert!(checkpoint(text).is_err(), "{text}");
    }
    assert_eq!(keep("2"), Ok(2));
    assert!(keep("1").is_err() && keep("x").is_err());
}

proptest! {
    #[test]
    fn sizes_read_back(mib in 2u64..=1 << 24) {
        prop_assert_eq!(memory(&size(mib << 20)), Ok(mib << 20));
    }

    #[test]
    fn no_text_breaks_a_parser(text in ".{0,40}") {
        let _ = (name(&text), memory(&text), cpus(&text), console(&text), duration(&text));
        let _ = (disk(&text), net(&text), vsock(&text), pin(&text), mac(&text));
        let _ = (control_key(&text), disk_id(&text), tap(&text), log_level(&text), cid(&text));
        let _ = (user(&text), confine(&text), pace(&text), safepoint(&text));
        let _ = (age(&text), checkpoint(&text), keep(&text), store(&text), every(&text));
    }
}
