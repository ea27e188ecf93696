//! Debian's stock kernel as a guest, on an emulated host: the KVM there has nested paging, as most
//! users' has, and runs a whole kernel.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use tandem_tests::emulated::{EmulatedHost, HostBuilder};

/// The guest's root image as a disk of the emulated host.
const ROOT: &str = "/dev/vdb";
/// Bytes read back from the disk and compared.
const COMPARED: usize = 8 << 20;

fn host() -> Option<EmulatedHost> {
    let host = HostBuilder::new()?
        .program("redis-cli")?
        .program("redis-benchmark")?
        .file("bzImage")?
        .file("vmlinux")?
        .file("initramfs")?
        .disk("rootfs.ext4")?;
    Some(host.start())
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
    let Some(mut host) = host() else { return };
    serves_a_network(&mut host);
    uses_every_cpu_and_powers_off(&mut host);
    keeps_its_disk_when_it_reboots(&mut host);
}

fn serves_a_network(host: &mut EmulatedHost) {
    host.succeed("tunctl -t tap0 && ip addr add 10.99.0.1/24 dev tap0 && ip link set tap0 up");
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
    assert!(interrupts > 400, "{metrics}");
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
