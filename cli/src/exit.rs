//! Exit codes of the command: one list, from which help, manual and code are made.

use std::fmt::Write as _;
use std::process::ExitCode;

use tandem_vmm::confinement::VIOLATION_EXIT_CODE;

/// How the command ended, as its parent process sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// The verb did what it was asked to; a guest powered off, was stopped, or reset under
    /// `--no-reboot`.
    Ok = 0,
    /// A request to a guest failed.
    Failed = 1,
    /// The command line, the file, or something they name does not fit.
    Usage = 2,
    /// The kernel or the initial RAM disk cannot be booted.
    Image = 10,
    /// A resource of the host is missing or taken.
    Resource = 11,
    /// KVM is missing or refuses.
    Kvm = 12,
    /// A saved guest is damaged, of another version, or does not fit.
    Snapshot = 13,
    /// A vCPU of the guest triple-faulted.
    TripleFault = 20,
    /// KVM could not run the guest any further.
    GuestInternal = 21,
    /// A fault of the VMM itself.
    Internal = 70,
    /// The VMM asked its host for something that its confinement forbids.
    Confinement = VIOLATION_EXIT_CODE as u8,
}

impl Exit {
    /// All codes, in the order of their numbers.
    pub const ALL: [Self; 11] = [
        Self::Ok,
        Self::Failed,
        Self::Usage,
        Self::Image,
        Self::Resource,
        Self::Kvm,
        Self::Snapshot,
        Self::TripleFault,
        Self::GuestInternal,
        Self::Internal,
        Self::Confinement,
    ];

    /// The number that the parent process gets.
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// A word for the code.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
            Self::Usage => "usage",
            Self::Image => "image",
            Self::Resource => "resource",
            Self::Kvm => "kvm",
            Self::Snapshot => "snapshot",
            Self::TripleFault => "triple-fault",
            Self::GuestInternal => "guest-internal",
            Self::Internal => "internal",
            Self::Confinement => "confinement",
        }
    }

    /// What the code says, in one line.
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Ok => "done; the guest powered off, was stopped, or reset under --no-reboot",
            Self::Failed => "no such guest, or the guest did not do what was asked",
            Self::Usage => "the flags, the file, or something they name does not fit",
            Self::Image => "the kernel or the initial RAM disk cannot be booted",
            Self::Resource => "a tap, disk, socket, name or memory is missing or taken",
            Self::Kvm => "KVM is missing or refuses",
            Self::Snapshot => "a saved guest is damaged, of another version, or does not fit here",
            Self::TripleFault => "a vCPU of the guest triple-faulted",
            Self::GuestInternal => "KVM cannot run the guest any further (internal error)",
            Self::Internal => "a fault of the VMM itself",
            Self::Confinement => "the VMM made a system call that its confinement forbids",
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// The list of exit codes as help text.
pub fn table() -> String {
    let mut text = String::from("Exit codes:\n");
    for exit in Exit::ALL {
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "  {:>3}  {:<15} {}",
            exit.code(),
            exit.name(),
            exit.meaning()
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_names_are_unique_and_in_order() {
        for pair in Exit::ALL.windows(2) {
            assert!(pair[0].code() < pair[1].code());
            assert_ne!(pair[0].name(), pair[1].name());
        }
    }

    #[test]
    fn table_names_every_code() {
        let table = table();
        for exit in Exit::ALL {
            assert!(table.contains(exit.name()) && table.contains(exit.meaning()));
        }
    }
}
