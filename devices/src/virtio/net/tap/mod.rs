//! Tap interfaces: a network card of the host whose cable leads into the guest.
//!
//! A tap with a header before every frame speaks the device's own format, so a frame goes between
//! guest memory and the host's network stack with one system call and no copy of ours.

mod backend;
mod interface;
#[cfg(test)]
mod tests;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::Offloads;
pub use backend::TapBackend;
use interface::{
    attach, control_socket, interface_driver, interface_flags, interface_index, interface_mtu,
    set_header_size, set_offloads, take_up,
};

/// Most bytes of an interface's name, without the end mark.
pub const NAME_MAX: usize = libc::IFNAMSIZ - 1;
/// Where taps are opened.
const TUN_DEVICE: &str = "/dev/net/tun";

/// Why a tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name cannot be that of an interface.
    #[error(
        "`{name}` cannot be the name of a tap interface: {reason} \
         (1 to 15 characters, no `/`, `:`, `%` and no spaces)"
    )]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The host's tun device cannot be opened.
    #[error(
        "tap interfaces are not available: cannot open /dev/net/tun (is the tun module loaded, and \
         may you use it?)"
    )]
    Unavailable(#[source] io::Error),
    /// There is no such interface and it may not be created.
    #[error(
        "there is no tap interface `{name}` and creating one is not permitted; create it with \
         `ip tuntap add {name} mode tap user $USER && ip link set {name} up`"
    )]
    Missing {
        /// The name.
        name: String,
    },
    /// The interface belongs to someone else.
    #[error(
        "the tap interface `{name}` may not be used: it belongs to another user; its owner is set \
         by `ip tuntap add {name} mode tap user $USER`"
    )]
    NotPermitted {
        /// The name.
        name: String,
    },
    /// Another process has it.
    #[error("the tap interface `{name}` is in use by another guest or program")]
    Busy {
        /// The name.
        name: String,
    },
    /// The interface is not a tap that can be used.
    #[error("the interface `{name}` cannot be used as a tap: it is {found}")]
    NotATap {
        /// The name.
        name: String,
        /// What it is.
        found: String,
    },
    /// Anything else.
    #[error("cannot {action} the tap interface `{name}`")]
    Failed {
        /// What was tried.
        action: &'static str,
        /// The name.
        name: String,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

/// An open tap, attached to this process until it is dropped.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    mtu: usize,
    created: bool,
}

impl Tap {
    /// Opens the tap `name` with vnet headers, non-blocking, no offloads.
    ///
    /// A tap that does not exist is created, taken up, and goes away with the process; creating
    /// needs CAP_NET_ADMIN. An existing one is left up or down as it is found.
    ///
    /// # Errors
    /// See [`TapError`]; nothing is left behind.
    pub fn open(name: &str) -> Result<Self, TapError> {
        check_name(name)?;
        let failed = |action| {
            move |source| TapError::Failed {
                action,
                name: name.to_owned(),
                source,
            }
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(TUN_DEVICE)
            .map_err(TapError::Unavailable)?;
        let control = control_socket().map_err(failed("look at"))?;
        let existed = interface_index(name).is_some();
        attach(&file, name).map_err(|error| explain(name, existed, error, &control))?;
        set_header_size(&file).map_err(failed("set the header size of"))?;
        set_offloads(&file, Offloads::empty()).map_err(failed("set the offloads of"))?;
        if !existed {
            take_up(&control, name).map_err(failed("take up"))?;
        }
        let flags = interface_flags(&control, name).map_err(failed("look at"))?;
        if flags & libc::IFF_UP == 0 {
            tracing::warn!(
                "the tap interface `{name}` is down and takes no frames from the guest; \
                 take it up with `ip link set {name} up`"
            );
        }
        let mtu = interface_mtu(&control, name).map_err(failed("read the MTU of"))?;
        Ok(Self {
            file,
            name: name.to_owned(),
            mtu,
            created: !existed,
        })
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Largest packet of the interface in bytes, when it was opened.
    pub fn mtu(&self) -> usize {
        self.mtu
    }

    /// Whether it did not exist before.
    pub fn created(&self) -> bool {
        self.created
    }

    /// Whether the interface is up: while it is down, the host takes no frames from the guest.
    ///
    /// # Errors
    /// When the host cannot say.
    pub fn is_up(&self) -> io::Result<bool> {
        interface_flags(&control_socket()?, &self.name).map(|flags| flags & libc::IFF_UP != 0)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn check_name(name: &str) -> Result<(), TapError> {
    let reason = if name.is_empty() {
        "it is empty"
    } else if name.len() > NAME_MAX {
        "it is too long"
    } else if name == "." || name == ".." {
        "it names a directory"
    } else if name.contains(|c: char| "/:%".contains(c) || c.is_whitespace() || c.is_control()) {
        "it has a character that is not allowed"
    } else {
        return Ok(());
    };
    Err(TapError::Name {
        name: name.to_owned(),
        reason,
    })
}

/// What the host's refusal to attach to `name` means.
fn explain(name: &str, existed: bool, error: io::Error, control: &OwnedFd) -> TapError {
    let name = name.to_owned();
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) if existed => TapError::NotPermitted { name },
        Some(libc::EPERM | libc::EACCES) => TapError::Missing { name },
        Some(libc::EBUSY) => TapError::Busy { name },
        Some(libc::EINVAL) if existed => TapError::NotATap {
            found: describe(control, &name),
            name,
        },
        _ => TapError::Failed {
            action: "attach to",
            name,
            source: error,
        },
    }
}

/// What kind of interface `name` is, by its driver.
fn describe(control: &OwnedFd, name: &str) -> String {
    match interface_driver(control, name) {
        Ok((driver, bus)) if driver == "tun" && bus == "tap" => {
            "a tap made with `multi_queue`, which guests here do not use".to_owned()
        }
        Ok((driver, _)) if driver == "tun" => "a tun interface (mode tun, not tap)".to_owned(),
        Ok((driver, _)) => format!("an interface of the driver `{driver}`"),
        Err(_) => "an interface of another kind".to_owned(),
    }
}
