//! How a primary's guest gets a secondary: it is invited by a way that leads there, and the connections of the pair are
//! made (see [`super::checkpoint`] for what is said).

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use tandem_vmm::error::causes;
use tandem_vmm::migration::frame::{self, Kind, Purpose};
use tandem_vmm::migration::tls::Keys;
use tandem_vmm::migration::{Link, MigrationError, Route};

use super::calls::{call, call_of};
use super::checkpoint::{Greeting, Offer, greet};
use super::paths::dial::dial;
use super::paths::{self, Connections, Told};
use super::{Pair, ProtectionError};
use crate::keeper::{Keeper, Verification};

/// Offers the guest to who stands by at `to`, by the first way that leads there. That way, and the connection of
/// checkpoints; what a standby of an older version does not know, `offer` does without.
pub(super) fn invite<'a>(
    to: &'a Route,
    offer: &mut Offer,
) -> Result<(&'a Route, Link), ProtectionError> {
    let refused = |error: &ProtectionError| {
        matches!(error, ProtectionError::Transfer(MigrationError::Refused(_)))
    };
    let (error, second) = match (invite_as_it_knows(to, offer), to.second()) {
        (Err(error), Some(second)) if !refused(&error) => (error, second),
        (invited, _) => return invited.map(|link| (to, link)),
    };
    tracing::debug!(%to, why = %causes(&error), "the second path is tried");
    offer.path = Some(1);
    Ok((second, invite_as_it_knows(second, offer)?))
}

/// As [`invite_by`]; what a standby of an older version does not know, `offer` does without.
fn invite_as_it_knows(to: &Route, offer: &mut Offer) -> Result<Link, ProtectionError> {
    loop {
        match invite_by(to, offer) {
            Err(error) if offer.forgo(&error) => {}
            invited => return invited,
        }
    }
}

/// Says what there is to who stands by at `to`, and hears that it is taken.
fn invite_by(to: &Route, offer: &Offer) -> Result<Link, ProtectionError> {
    let mut link = call(to, offer.token)?;
    greet(&mut link, Purpose::Protection, offer)?;
    frame::expect(&mut link, Kind::Accept)?;
    Ok(link)
}

/// A further connection of the pair with `token`, to the secondary at `to`.
pub(super) fn connect(to: &Route, token: u128, purpose: Purpose) -> Result<Link, ProtectionError> {
    let mut link = call(to, token)?;
    greet(&mut link, purpose, &Greeting { token })?;
    Ok(link)
}

/// Carries connections to a secondary over two paths, if there are two and it knows of that: that of messages, and that of
/// checkpoints. The pair says that it has both until what is returned with them is dropped.
pub(super) fn carry(
    pair: &Arc<Pair>,
    to: &Route,
    offer: &Offer,
    messages: Link,
    checkpoints: Link,
) -> Result<(Link, Link, Option<Told>), ProtectionError> {
    let Some((path, second)) = offer.path.zip(to.second()) else {
        return Ok((messages, checkpoints, None));
    };
    let connections = Connections {
        messages,
        checkpoints,
        path: usize::from(path),
    };
    let routes = [to.clone(), second.clone()];
    let names = [to, second].map(|route| Some(route.to_string()));
    // The thread may do what this one may.
    let (messages, checkpoints, paths) = paths::carry(pair, connections, names, || true)?;
    let told = Told::of(pair);
    dial(paths, routes, offer.token)?;
    Ok((messages, checkpoints, Some(told)))
}

/// Gives the guest's taps to its keeper, with a connection of its own. Without a keeper what waits in them is
/// lost when this process dies, as on a host that dies.
pub(super) fn entrust(
    pair: &Pair,
    keeper: &Keeper,
    to: &Route,
    token: u128,
) -> Result<(), ProtectionError> {
    let taps = pair.descriptors();
    let untold = |error: &dyn std::error::Error| {
        tracing::warn!(why = %causes(error), "the guest's taps have no keeper");
    };
    let Some((keys, name)) = to.keys() else {
        let link = connect(to, token, Purpose::Keeping)?;
        let entrusted = link.plain().map(|link| keeper.entrust(link, &taps));
        if let Some(Err(error)) = entrusted {
            untold(&error);
        }
        return Ok(());
    };
    if let Err(error) = introduce(keeper, to, &taps, token, keys, name) {
        untold(&error);
        // The secondary waits for a connection.
        connect(to, token, Purpose::Keeping)?;
    }
    Ok(())
}

/// Lets the keeper make an encrypted connection: what is agreed on by one process is not known to another.
fn introduce(
    keeper: &Keeper,
    to: &Route,
    taps: &[(u8, OwnedFd)],
    token: u128,
    keys: &Keys,
    name: &str,
) -> Result<(), ProtectionError> {
    let stream = to.dial(&call_of(token))?;
    let mut greeting = Vec::new();
    greet(&mut greeting, Purpose::Keeping, &Greeting { token })?;
    let verification = Verification {
        material: keys.current().as_ref().clone(),
        name: name.to_owned(),
        greeting,
    };
    keeper
        .introduce(stream.as_fd(), taps, &verification)
        .map_err(ProtectionError::host("let the keeper connect"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::runtime::hostile;

    #[test]
    fn a_pair_has_paths_only_while_somebody_uses_them() {
        let pair = Arc::new(Pair::new("guest", 0, 0).unwrap());
        let place = tempfile::tempdir().unwrap();
        let route = |name: &str| {
            let path = place.path().join(name).display().to_string();
            Route::new(path.parse().unwrap(), None)
        };
        let to = route("first").or(Some(route("second")));
        let offer = Offer {
            path: Some(0),
            ..hostile::offer()
        };
        let links = [(), ()].map(|()| UnixStream::pair().unwrap());
        let [messages, checkpoints] = links.map(|(near, _)| Link::of(near).unwrap());
        let used = carry(&pair, &to, &offer, messages, checkpoints).unwrap();
        // As when what comes next fails.
        assert!(pair.has_paths());
        drop(used);
        assert!(!pair.has_paths());
    }
}
