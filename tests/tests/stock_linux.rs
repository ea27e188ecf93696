//! Debian's stock kernel as a guest, on an emulated host: the KVM there has nested paging, as most
//! users' has, and runs a whole kernel.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use tandem_tests::emulated::{EmulatedHost, GuestConsole, HostBuilder};

/// The guest's root image as a disk of the emulated host.
const ROOT: &str = "/dev/vdb";
/// Bytes read back from the disk and compared.
const COMPARED: usize = 8 << 20;

fn builder() -> Option<HostBuilder> {
    HostBuilder::new()?
        .program("redis-cli")?
        .program("redis-benchmark")?
        .file("bzImage")?
        .file("vmlinux")?
        .file("initramfs")?
        .disk("rootfs.ext4")
}

/// The words of `tandem run` that all guests share.
fn words(kernel: &str, cpus: u32, cmdline: &str) -> String {
    format!(
        "--kernel /mnt/{kernel} --initrd /mnt/initramfs --cpus {cpus} --memory 256MiB \
         --disk path={ROOT},readonly --cmdline 'console=ttyS0 quiet root=/dev/vda {cmdline}'"
    )
}

/// One host serves for all, since booting it is most of the time.
#[test]
fn stock_linux_works_on_an_emulated_host() {
    let Some(builder) = builder() else { return };
    let mut host = builder.start();
    serves_a_network(&mut host);
    uses_every_cpu_and_powers_off(&mut host);
    keeps_its_disk_when_it_reboots(&mut host);
}

/// Makes the tap of the guest's network, the same on each host.
fn make_tap(host: &mut EmulatedHost) {
    host.succeed(
        "tunctl -t tap0 && ip link set tap0 address 02:00:00:00:99:01 && \
         ip addr add 10.99.0.1/24 dev tap0 && ip link set tap0 up",
    );
}

fn serves_a_network(host: &mut EmulatedHost) {
    make_tap(host);
    let words = words("bzImage", 2, "ip=10.99.0.2/24");
    let guest = host.start_guest("server", &format!("{words} --net tap=tap0"));
    guest.wait_for("READY", 1);
    let redis = "redis-cli --raw -h 10.99.0.2";
    assert_eq!(host.succeed(&format!("{redis} SET key value")), "OK\n");
    assert_eq!(host.succeed(&format!("{redis} GET key")), "value\n");
    let load = "redis-benchmark -h 10.99.0.2 -t set,get -n 1500 -c 20 -P 8 --csv";
    let table = host.succeed(load);
    assert_eq!(table.matches("ET\"").count(), 2, "{table}");
    let size = host.succeed("wget -q -O - http://10.99.0.2/1m | wc -c");
    assert_eq!(size.trim(), "1048576");
    notifications_stay_in_the_kernel(host);
    // The power button: the guest itself says that it goes down.
    host.succeed("tandem stop server");
    assert_eq!(guest.wait(), 0, "{}", guest.text());
    assert!(
        guest.text().contains("reboot: Power down"),
        "{}",
        guest.text()
    );
}

/// Device registers are read from memory; kicks and acknowledgements do not leave the kernel, so
/// exits are few and come from setting up the devices.
fn notifications_stay_in_the_kernel(host: &mut EmulatedHost) {
    let metrics = host.succeed("tandem metrics server");
    let sum = |name: &str, part: &str| -> u64 {
        metrics
            .lines()
            .filter(|line| line.starts_with(name) && line.contains(part))
            .filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok())
            .sum()
    };
    let exits = |kind| sum("tandem_vcpu_exits_total", kind);
    assert_eq!(exits("mmio_read"), 0, "{metrics}");
    let interrupts = sum("tandem_device_interrupts_total", "");
    assert!(interrupts > 150, "{metrics}");
    assert!(exits("mmio_write") < interrupts / 2, "{metrics}");
}

fn uses_every_cpu_and_powers_off(host: &mut EmulatedHost) {
    let run = format!(
        "echo cpus $(nproc); \
         echo random $(dd if=/dev/hwrng bs=64 count=4 2>/dev/null | wc -c); \
         for cpu in 0 1 2 3; do \
         taskset -c $cpu dd if=/dev/vda of=/dev/null bs=16k skip=$((cpu * 512)) count=512 iflag=direct 2>/dev/null & \
         done; wait; \
         echo sum $(head -c {COMPARED} /dev/vda | md5sum | cut -c1-32)"
    );
    let words = words("bzImage", 4, &format!("linux.run=\"{run}\""));
    let guest = host.start_guest("worker", &words);
    assert_eq!(guest.wait(), 0, "{}", guest.text());
    let text = guest.text();
    let sum = host.succeed(&format!("head -c {COMPARED} {ROOT} | md5sum | cut -c1-32"));
    for wanted in ["cpus 4\n", "random 256\n", &format!("sum {sum}")] {
        assert!(text.contains(wanted), "no `{wanted}`: {text}");
    }
}

/// The first boot writes and ends by a reset, the second one finds it and powers off.
fn keeps_its_disk_when_it_reboots(host: &mut EmulatedHost) {
    host.succeed("truncate -s 4M /tmp/scratch");
    let run = "case $(dd if=/dev/vdb bs=7 count=1 2>/dev/null) in written) \
               echo found; poweroff -f;; esac; \
               echo written | dd of=/dev/vdb conv=fsync 2>/dev/null";
    let words = words(
        "vmlinux",
        1,
        &format!("linux.end=reboot linux.run=\"{run}\""),
    );
    let guest = host.start_guest("writer", &format!("{words} --disk path=/tmp/scratch"));
    assert_eq!(guest.wait(), 0, "{}", guest.text());
    let text = guest.text();
    assert_eq!(text.matches("linux: start").count(), 2, "{text}");
    assert!(text.contains("found"), "{text}");
    let written = host.succeed("head -c 8 /tmp/scratch");
    assert_eq!(written, "written\n");
}

/// A guest is saved, goes on in another process, and then on another host.
#[test]
fn stock_linux_moves_between_processes_and_hosts() {
    let (Some(one), Some(other)) = (builder(), builder()) else {
        return;
    };
    let wires = tempfile::tempdir().unwrap();
    let ends = ["one", "other"].map(|end| wires.path().join(end));
    let mut one = one.wire(&ends[0], &ends[1]).start();
    let mut other = other.wire(&ends[1], &ends[0]).start();
    for (host, address) in [(&mut one, "10.55.0.1/24"), (&mut other, "10.55.0.2/24")] {
        host.succeed(&format!(
            "ip addr add {address} dev eth0 && ip link set eth0 up"
        ));
        make_tap(host);
    }
    let words = words("bzImage", 2, "ip=10.99.0.2/24");
    let guest = one.start_guest("server", &format!("{words} --net tap=tap0"));
    guest.wait_for("READY", 1);
    let redis = "redis-cli --raw -h 10.99.0.2";
    let load = "redis-benchmark -h 10.99.0.2 -t set -n 300 -c 10 -P 4 -q";
    one.succeed(&format!("{redis} SET key value; {load}"));
    goes_on_in_another_process(&mut one, &guest, redis);
    goes_on_on_another_host(&mut one, &mut other, redis);
}

fn goes_on_in_another_process(host: &mut EmulatedHost, guest: &GuestConsole, redis: &str) {
    let said = host.succeed("tandem snapshot server /tmp/saved && tandem stop --force server");
    assert!(said.contains("saved to `/tmp/saved`"), "{said}");
    assert_eq!(guest.wait(), 0, "{}", guest.text());
    host.start_tandem("server", "restore /tmp/saved --console off");
    let got = host.succeed(&format!(
        "until {redis} GET key; do sleep 1; done; {redis} SET other one; {redis} GET other"
    ));
    assert!(got.ends_with("value\nOK\none\n"), "{got}");
}

fn goes_on_on_another_host(one: &mut EmulatedHost, other: &mut EmulatedHost, redis: &str) {
    let there = other.start_tandem("server", "receive --listen 10.55.0.2:7000 --console stdio");
    there.wait_for("waiting for a guest", 1);
    let said = one.succeed("tandem migrate server --to 10.55.0.2:7000");
    assert!(said.contains("runs at `10.55.0.2:7000`"), "{said}");
    let list = one.succeed("tandem list -q");
    assert_eq!(list, "", "the source is gone");
    let got = other.succeed(&format!(
        "{redis} GET key; {redis} GET other; {redis} INCR n"
    ));
    assert_eq!(got, "value\none\n1\n");
    other.succeed("tandem stop server");
    assert_eq!(there.wait(), 0, "{}", there.text());
    assert!(
        there.text().contains("reboot: Power down"),
        "{}",
        there.text()
    );
}
