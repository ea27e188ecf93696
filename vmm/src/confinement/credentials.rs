//! Whom a thread acts for: user, groups and capabilities.
//!
//! The kernel keeps credentials per thread, and so do we: each thread gives up its own, by system
//! calls rather than by the C library's calls, which change all threads of the process by signals
//! that confined threads do not take.

use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Gid, Uid, geteuid, set_dumpable_behavior};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};

use super::{ConfinementError, ThreadKind};

/// A user and its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// Number of the user.
    pub uid: u32,
    /// Number of the group.
    pub gid: u32,
}

/// Whether this process may take on another user.
pub fn may_take_on() -> bool {
    geteuid().is_root()
}

/// The capabilities that a thread of the superuser keeps.
///
/// The device loop connects the guest to sockets of other users, and removes the guest's own files
/// from directories of other users; it cannot open files, so that is all it can override.
fn kept(kind: ThreadKind) -> CapabilitySet {
    match kind {
        ThreadKind::DeviceLoop => CapabilitySet::DAC_OVERRIDE,
        ThreadKind::Vcpu
        | ThreadKind::BlockWorker
        | ThreadKind::MemoryLoader
        | ThreadKind::Api
        | ThreadKind::Protection
        | ThreadKind::Keeper
        | ThreadKind::Checkpoints
        | ThreadKind::StoreLoader
        | ThreadKind::Bucket => CapabilitySet::empty(),
    }
}

/// Makes the calling thread one of `user`, if given, and takes capabilities from it.
pub(super) fn give_up(user: Option<User>, kind: ThreadKind) -> Result<(), ConfinementError> {
    let refused = ConfinementError::refused;
    let held = capabilities(None).map_err(refused("read capabilities"))?;
    let kept = match user {
        Some(_) => CapabilitySet::empty(),
        None => held.permitted & kept(kind),
    };
    take_on(user)?;
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets).map_err(refused("give up capabilities"))
}

/// Takes from the calling thread, and from those that it starts, the capabilities that they could gain
/// by executing a program; those that they hold stay.
pub(super) fn bound() -> Result<(), ConfinementError> {
    let refused = ConfinementError::refused;
    let held = capabilities(None).map_err(refused("read capabilities"))?;
    if !held.permitted.contains(CapabilitySet::SETPCAP) {
        return Ok(());
    }
    clear_ambient_capability_set().map_err(refused("clear the ambient capabilities"))?;
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The kernel knows of no more.
            Err(Errno::INVAL) => break,
            Err(error) => return Err(refused("bound the capabilities")(error)),
        }
    }
    Ok(())
}

/// Makes the calling thread one of `user`, and the process one that others of that user cannot look
/// into.
pub(super) fn take_on(user: Option<User>) -> Result<(), ConfinementError> {
    let Some(user) = user else {
        return Ok(());
    };
    let refused = ConfinementError::refused;
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    set_thread_groups(&[]).map_err(refused("leave the groups"))?;
    set_thread_res_gid(gid, gid, gid).map_err(refused("take on the group"))?;
    set_thread_res_uid(uid, uid, uid).map_err(refused("take on the user"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(refused("shut the process off from others of the user"))
}
