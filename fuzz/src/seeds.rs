//! Inputs to begin with: what well-behaved users send, and what is known to be nasty. They are made
//! here and kept in the corpus, so that an input stays what it was when a format moves on.

mod devices;
mod files;
mod pairs;
mod peers;
mod stores;

use crate::Target;

/// A name and an input.
pub type Seed = (&'static str, Vec<u8>);

/// The inputs that a target begins with.
pub fn of(target: &Target) -> Vec<Seed> {
    match target.name {
        "queue" => devices::queue(),
        "block" => devices::block(),
        "net" => devices::net(),
        "console" => devices::console(),
        "rng" => devices::rng(),
        "vsock" => devices::vsock(),
        "net_stream" => files::net_stream(),
        "vsock_host" => files::vsock_host(),
        "snapshot" => files::snapshot(),
        "config" => files::config(),
        "api" => files::api(),
        "frames" => peers::frames(),
        "deltas" => peers::deltas(),
        "link" => peers::link(),
        "outputs" => peers::outputs(),
        "joining" => pairs::joining(),
        "pairing" => pairs::pairing(),
        "paths" => peers::paths(),
        "mirror" => pairs::mirror(),
        "keeper" => pairs::keeper(),
        "store" => stores::store(),
        _ => files::kernel(),
    }
}
