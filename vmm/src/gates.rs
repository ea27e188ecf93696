//! What may stand between a guest's devices and the outside: nothing, or what protects the guest.
//!
//! A device cannot tell. It hands outputs to its backend and gets inputs from there; gates put
//! backends of their own in between when the devices are built.

use std::fs::File;
use std::sync::{Arc, Weak};

use tandem_devices::virtio::block::BlockBackend;
use tandem_devices::virtio::net::NetBackend;

use crate::confinement::Confinement;
use crate::console::ConsoleHub;
use crate::until::Until;

/// Lets a guest's devices work on the calling thread, as the device loop does on its own.
pub trait Caller: Send + Sync {
    /// Network device `index` looks at what its backend has, which watches under `token`. False if the guest
    /// stands or there is no such device: nothing was done.
    fn call_net(&self, index: usize, token: u32) -> bool;
}

/// Stands between devices and the outside.
pub trait Gates: Send + Sync {
    /// By `caller` devices can be called, for as long as there is a machine.
    fn connect(&self, caller: Weak<dyn Caller>);

    /// What network device `index` gets as its backend in place of `outside`. Called again for the same
    /// device when its backend was let go and opened anew.
    fn net(&self, index: usize, outside: Box<dyn NetBackend>) -> Box<dyn NetBackend>;

    /// What disk `index`, which the guest may write to, gets as its backend in place of `outside`; `image` is
    /// the same image once more. Called again as [`Gates::net`] is.
    fn disk(
        &self,
        index: usize,
        outside: Box<dyn BlockBackend>,
        image: File,
    ) -> Box<dyn BlockBackend>;

    /// Whether this guest is to be the only one that uses the image of disk `index`, which is a shared one: that of a
    /// copy is its primary's.
    fn locks_disk(&self, _index: usize) -> bool {
        true
    }

    /// The guest's console, before the guest runs.
    fn console(&self, console: &ConsoleHub);

    /// Until when the guest may run. Its vCPUs look at this themselves, so that no thread that stood still has to
    /// stop them.
    fn limit(&self) -> Arc<Until> {
        Arc::default()
    }

    /// Whether outputs wait for another copy of the guest, so that each takes a while in any case.
    fn compare(&self) -> bool {
        false
    }
}

/// No gates: devices talk to the outside.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoGates;

impl Gates for NoGates {
    fn connect(&self, _caller: Weak<dyn Caller>) {}

    fn net(&self, _index: usize, outside: Box<dyn NetBackend>) -> Box<dyn NetBackend> {
        outside
    }

    fn disk(
        &self,
        _index: usize,
        outside: Box<dyn BlockBackend>,
        _image: File,
    ) -> Box<dyn BlockBackend> {
        outside
    }

    fn console(&self, _console: &ConsoleHub) {}
}

/// What a machine is put into: what its threads may do, and what stands around its devices.
#[derive(Clone)]
pub struct Surroundings {
    /// What threads may still do.
    pub confinement: Confinement,
    /// What stands between devices and the outside.
    pub gates: Arc<dyn Gates>,
}

impl From<&Confinement> for Surroundings {
    fn from(confinement: &Confinement) -> Self {
        Self {
            confinement: confinement.clone(),
            gates: Arc::new(NoGates),
        }
    }
}
