//! What kind of KVM the host has.

use std::path::Path;
use std::sync::OnceLock;

/// How the host runs guest code, as far as a guest's processor depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlatformKind {
    /// Hardware virtualisation: VMX or SVM.
    Hardware,
    /// `kvm_pvm`: no hardware virtualisation. Ring 0 is emulated, instructions that the emulator does
    /// not know end the guest, and hypercalls never return.
    Pvm,
}

impl PlatformKind {
    /// Looks at the host.
    pub fn detect() -> Self {
        let loaded = |module: &str| Path::new("/sys/module").join(module).exists();
        let cpu_flags = || std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Self::classify(loaded, cpu_flags)
    }

    /// Whether KVM keeps page tables of its own that shadow those of guests, rather than have the processor
    /// walk both. Looks once: later the process may not.
    pub fn shadows_page_tables() -> bool {
        static SHADOWS: OnceLock<bool> = OnceLock::new();
        *SHADOWS.get_or_init(|| {
            let on = |parameter: &str| {
                let path = Path::new("/sys/module").join(parameter);
                std::fs::read_to_string(path).is_ok_and(|text| text.trim() == "Y")
            };
            !["kvm_intel/parameters/ept", "kvm_amd/parameters/npt"]
                .into_iter()
                .any(on)
        })
    }

    /// Decides by the modules of KVM, of which one at most is there, else by the processor's flags.
    fn classify(loaded: impl Fn(&str) -> bool, cpuinfo: impl FnOnce() -> String) -> Self {
        if loaded("kvm_intel") || loaded("kvm_amd") {
            return Self::Hardware;
        }
        if loaded("kvm_pvm") {
            return Self::Pvm;
        }
        let cpuinfo = cpuinfo();
        let flags = cpuinfo
            .lines()
            .find(|line| line.starts_with("flags"))
            .unwrap_or_default();
        if flags
            .split_whitespace()
            .any(|flag| flag == "vmx" || flag == "svm")
        {
            Self::Hardware
        } else {
            Self::Pvm
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn classify(modules: &[&str], flags: &str) -> PlatformKind {
        let cpuinfo = format!("processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: svm vmx\n");
        PlatformKind::classify(|m| modules.contains(&m), || cpuinfo)
    }

    #[test]
    fn modules_decide_before_flags() {
        assert_eq!(
            classify(&["kvm", "kvm_intel"], "fpu"),
            PlatformKind::Hardware
        );
        assert_eq!(classify(&["kvm", "kvm_amd"], "fpu"), PlatformKind::Hardware);
        assert_eq!(classify(&["kvm", "kvm_pvm"], "fpu vmx"), PlatformKind::Pvm);
    }

    #[test]
    fn flags_decide_where_no_module_is_known() {
        assert_eq!(classify(&["kvm"], "fpu vmx sse"), PlatformKind::Hardware);
        assert_eq!(classify(&[], "fpu svm"), PlatformKind::Hardware);
        assert_eq!(classify(&[], "fpu svm_lock"), PlatformKind::Pvm);
    }
}
