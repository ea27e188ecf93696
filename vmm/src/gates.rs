//! What may stand between a guest's devices and the outside: nothing, or what protects the guest.
//!
//! A device cannot tell. It hands outputs to its backend and gets inputs from there; gates put
//! backends of their own in between when the devices are built.

use tandem_devices::virtio::net::NetBackend;

use crate::confinement::Confinement;
use crate::console::ConsoleHub;
use std::sync::Arc;

/// Stands between devices and the outside.
pub trait Gates: Send + Sync {
    /// What network device `index` gets as its backend in place of `outside`. Called again for the same
    /// device when its backend was let go and opened anew.
    fn net(&self, index: usize, outside: Box<dyn NetBackend>) -> Box<dyn NetBackend>;

    /// The guest's console, before the guest runs.
    fn console(&self, console: &ConsoleHub);
}

/// No gates: devices talk to the outside.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoGates;

impl Gates for NoGates {
    fn net(&self, _index: usize, outside: Box<dyn NetBackend>) -> Box<dyn NetBackend> {
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
