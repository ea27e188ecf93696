//! Asks guests how they are, many at a time, each for a limited time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

use super::process::Usage;
use super::sample::{InfoSaid, Sample, StatsSaid};
use crate::client::{ClientError, Socket};
use crate::runtime_dir::Guest;

/// Longest wait for all that one guest says.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// Guests that are asked at the same time.
const ASKED_MAX: usize = 32;

/// Who asks. Copies share the clock and the limit.
#[derive(Clone, Debug)]
pub(super) struct Inquirer {
    started: Instant,
    places: Arc<Semaphore>,
}

impl Inquirer {
    /// One whose clock begins now.
    pub(super) fn new() -> Self {
        Self {
            started: Instant::now(),
            places: Arc::new(Semaphore::new(ASKED_MAX)),
        }
    }

    /// Now, on the clock of the samples.
    pub(super) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// How the guest is.
    ///
    /// # Errors
    /// When it does not answer in time, or not as it should.
    pub(super) async fn ask(self, guest: Guest) -> Result<Sample, ClientError> {
        // Fails only when the places are closed, which nobody does; then there is no limit.
        let _place = self.places.acquire().await;
        let path = guest.api();
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, self.sample(&guest));
        answer.await.unwrap_or(Err(ClientError::Timeout {
            path,
            timeout: ANSWER_TIMEOUT,
        }))
    }

    async fn sample(&self, guest: &Guest) -> Result<Sample, ClientError> {
        let socket = Socket::at(&guest.api(), ANSWER_TIMEOUT);
        let info: InfoSaid = socket.get_json("/api/v1/guest").await?;
        let protection = socket.get_json("/api/v1/protection").await?;
        let stats: StatsSaid = socket.get_json("/api/v1/stats").await?;
        let usage = Usage::of(info.pid());
        let at = self.now();
        Ok(Sample::new(at, info, stats, protection, usage))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::runtime_dir::Root;

    #[tokio::test]
    async fn many_that_hang_hold_nobody_up_for_long() {
        let directory = tempfile::tempdir().expect("a directory");
        let root = Root::new(Some(directory.path().to_owned())).expect("a runtime directory");
        let claim = |index: usize| {
            let mut claim = root.claim(&format!("guest{index}")).expect("a place");
            // Connections are made, and nobody takes them.
            let listener: UnixListener = claim.bind_api(None).expect("a socket");
            (claim, listener)
        };
        let places: Vec<_> = (0..ASKED_MAX + 1).map(claim).collect();
        let inquirer = Inquirer::new();
        let mut asked = tokio::task::JoinSet::new();
        for guest in root.guests() {
            asked.spawn(inquirer.clone().ask(guest));
        }
        let answers = asked.join_all().await;
        assert_eq!(answers.len(), places.len());
        for answer in answers {
            let error = answer.expect_err("nobody answers").to_string();
            assert!(error.ends_with("within 1 s"), "{error}");
        }
        let waited = inquirer.now();
        assert!(waited >= 2 * ANSWER_TIMEOUT, "all were asked at once");
        assert!(waited < 60 * ANSWER_TIMEOUT, "{waited:?}");
    }

    #[tokio::test]
    async fn a_guest_without_a_socket_is_not_waited_for() {
        let directory = tempfile::tempdir().expect("a directory");
        let root = Root::new(Some(directory.path().to_owned())).expect("a runtime directory");
        let _claim = root.claim("web").expect("a place");
        let guest = root.find("web").expect("a guest");
        let answer = Inquirer::new().ask(guest).await;
        assert!(
            matches!(answer, Err(ClientError::Connect { .. })),
            "{answer:?}"
        );
    }
}
