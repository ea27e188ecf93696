//! Writes settings as the TOML file that says the same.

use std::fmt::{self, Display, Write};
use std::path::Path;

use tandem_vmm::config::{DiskEngine, NetBackendConfig, Pace};

use super::value;
use super::{Launch, Located, Settings};

struct Quoted<'a>(&'a str);

impl Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        toml::Value::String(self.0.to_owned()).fmt(f)
    }
}

fn quoted_path(path: &Path) -> String {
    Quoted(&path.to_string_lossy()).to_string()
}

struct Writer(String);

impl Writer {
    fn line(&mut self, key: &str, value: impl Display) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "{key} = {value}");
    }

    fn header(&mut self, header: &str) {
        let _ = writeln!(self.0, "\n{header}");
    }

    fn text(&mut self, key: &str, value: Option<&str>) {
        if let Some(value) = value {
            self.line(key, Quoted(value));
        }
    }

    fn pace(&mut self, pace: Pace) {
        if !pace.is_none() {
            self.text("pace", Some(&pace.to_string()));
        }
    }

    fn path(&mut self, key: &str, value: Option<&Path>) {
        if let Some(value) = value {
            self.line(key, quoted_path(value));
        }
    }

    fn plain<T: Display>(&mut self, key: &str, value: Option<&Located<T>>) {
        if let Some(value) = value {
            self.line(key, &value.value);
        }
    }
}

impl Display for Settings {
    /// The TOML file that says the same; paths must be UTF-8.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = Writer(String::new());
        self.write_scalars(&mut out);
        self.write_devices(&mut out);
        f.write_str(&out.0)
    }
}

impl Settings {
    fn write_scalars(&self, out: &mut Writer) {
        let text = |s: &Option<Located<String>>| s.as_ref().map(|s| s.value.clone());
        out.text("name", text(&self.name).as_deref());
        out.path("kernel", self.kernel.as_ref().map(|p| p.value.as_path()));
        out.path("initrd", self.initrd.as_ref().map(|p| p.value.as_path()));
        out.text("cmdline", text(&self.cmdline).as_deref());
        out.text(
            "boot",
            self.boot.as_ref().map(|b| value::boot_text(b.value)),
        );
        out.plain("acpi", self.acpi.as_ref());
        out.plain("cpus", self.cpus.as_ref());
        let memory = self.memory.as_ref().map(|m| value::size(m.value));
        out.text("memory", memory.as_deref());
        out.plain("hugepages", self.hugepages.as_ref());
        let console = self.console.as_ref().map(|c| value::console_text(&c.value));
        out.text("console", console.as_deref());
        out.plain("virtio-console", self.virtio_console.as_ref());
        out.plain("rng-seed", self.rng_seed.as_ref());
        out.plain("no-reboot", self.no_reboot.as_ref());
        if let Some(pin) = &self.pin {
            out.line("pin", format_args!("{:?}", pin.value));
        }
        out.plain("realtime", self.realtime.as_ref());
        out.path("api", self.api.as_ref().map(|p| p.value.as_path()));
        let level = self.log_level.as_ref().map(|l| l.value.to_string());
        out.text("log-level", level.as_deref());
        let confine = self.confine.as_ref().map(|c| value::confine_text(c.value));
        out.text("confine", confine);
        let user = self.user.as_ref().map(|u| value::user_text(u.value));
        out.text("user", user.as_deref());
        if let Some(protect) = &self.protect {
            match &protect.value[..] {
                [one] => out.text("protect", Some(&one.to_string())),
                all => {
                    let all: Vec<String> = all.iter().map(ToString::to_string).collect();
                    out.line("protect", toml::Value::from(all));
                }
            }
        }
        out.path("arbiter", self.arbiter.as_ref().map(|p| p.value.as_path()));
        out.text("resync", self.resync.as_ref().map(|mode| mode.value.name()));
        out.text("mode", self.mode.as_ref().map(|mode| mode.value.name()));
        let budget = self.latency_budget.as_ref();
        let budget = budget.map(|time| value::latency_budget_text(time.value));
        out.text("latency-budget", budget.as_deref());
        out.path("tls", self.tls.as_ref().map(|p| p.value.as_path()));
        let store = self.checkpoint.as_ref().map(|s| s.value.to_string());
        out.text("checkpoint", store.as_deref());
        let every = self.every.as_ref().map(|e| value::every_text(e.value));
        out.text("every", every.as_deref());
        out.plain("commit", self.commit.as_ref());
        let key = self.store_key.as_ref().map(|p| p.value.as_path());
        out.path("store-key", key);
    }

    fn write_devices(&self, out: &mut Writer) {
        for disk in self.disks.iter().map(|d| &d.config) {
            out.header("[[disk]]");
            out.path("path", Some(&disk.path));
            out.text("id", disk.id.as_deref());
            for (key, on) in [
                ("readonly", disk.readonly),
                ("direct", disk.direct),
                ("shared", disk.shared),
            ] {
                if on {
                    out.line(key, on);
                }
            }
            out.path("redo", disk.redo.as_deref());
            if disk.engine != DiskEngine::Auto {
                out.text("engine", Some(value::engine_text(disk.engine)));
            }
            out.pace(disk.pace);
        }
        for net in self.nets.iter().map(|n| &n.config) {
            out.header("[[net]]");
            match &net.backend {
                NetBackendConfig::Tap(name) => out.text("tap", Some(name)),
                NetBackendConfig::Socket(path) => out.path("socket", Some(path)),
            }
            let mac = net.mac.map(|mac| mac.to_string());
            out.text("mac", mac.as_deref());
            out.pace(net.pace);
        }
        if let Some(vsock) = &self.vsock {
            out.header("[vsock]");
            out.line("cid", vsock.value.cid);
            out.path("path", Some(&vsock.value.path));
        }
    }
}

impl From<Launch> for Settings {
    /// Settings that say everything about `launch`, defaults too.
    fn from(launch: Launch) -> Self {
        let machine = launch.machine;
        let pin = Some(machine.pin).filter(|pin| !pin.is_empty());
        let checkpoints = launch.checkpoints.as_ref();
        Self {
            name: Some(Located::flag(machine.name)),
            kernel: Some(Located::flag(machine.boot.kernel)),
            initrd: machine.boot.initrd.map(Located::flag),
            cmdline: Some(Located::flag(machine.boot.cmdline)),
            boot: Some(Located::flag(machine.boot.protocol)),
            acpi: Some(Located::flag(machine.boot.acpi)),
            cpus: Some(Located::flag(machine.cpus)),
            memory: Some(Located::flag(machine.memory)),
            hugepages: Some(Located::flag(machine.hugepages)),
            console: Some(Located::flag(machine.console)),
            virtio_console: Some(Located::flag(machine.virtio_console)),
            rng_seed: machine.rng_seed.map(Located::flag),
            no_reboot: Some(Located::flag(machine.no_reboot)),
            pin: pin.map(Located::flag),
            realtime: machine.realtime.map(Located::flag),
            api: launch.api.map(Located::flag),
            log_level: Some(Located::flag(launch.log_level)),
            confine: Some(Located::flag(launch.confine)),
            user: launch.user.map(Located::flag),
            protect: launch.protection.clone().map(|p| Located::flag(p.to)),
            resync: launch.protection.as_ref().map(|p| Located::flag(p.resync)),
            mode: launch
                .protection
                .as_ref()
                .map(|p| Located::flag(p.wish.mode)),
            latency_budget: launch
                .protection
                .as_ref()
                .map(|p| Located::flag(p.wish.budget())),
            tls: launch
                .protection
                .as_ref()
                .and_then(|p| p.tls.clone())
                .map(Located::flag),
            arbiter: launch.protection.map(|p| Located::flag(p.arbiter)),
            every: checkpoints.map(|c| Located::flag(c.plan.every())),
            commit: checkpoints.map(|c| Located::flag(c.plan.commit)),
            store_key: checkpoints.and_then(|c| c.key.clone()).map(Located::flag),
            checkpoint: checkpoints.map(|c| Located::flag(c.store.clone())),
            disks: machine.disks.into_iter().map(Into::into).collect(),
            nets: machine.nets.into_iter().map(Into::into).collect(),
            vsock: machine.vsock.map(Located::flag),
        }
    }
}
