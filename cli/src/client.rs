//! The clients' side of a guest's API: one request, one connection.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::body::Bytes;
use axum::http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tandem_vmm::control::ANSWER_TIMEOUT;
use tokio::net::UnixStream;

use crate::api::types::ErrorBody;
use crate::runtime_dir::Guest;

/// Longest wait for an answer: what the guest's VMM may take, and a little.
pub const REQUEST_TIMEOUT: Duration = ANSWER_TIMEOUT.saturating_add(Duration::from_secs(2));
/// Longest answer that is read, in bytes.
pub const ANSWER_LEN_MAX: usize = 16 << 20;

/// Why a guest did not answer as it should.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("cannot reach the guest's API at `{}`", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// No answer in time.
    #[error("no answer from `{}` within {} s", path.display(), timeout.as_secs_f32())]
    Timeout {
        /// The socket.
        path: PathBuf,
        /// How long was waited for it.
        timeout: Duration,
    },
    /// What came back is no answer.
    #[error("`{}` gave no proper answer: {reason}", path.display())]
    Garbled {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The guest refused.
    #[error("{0}")]
    Refused(String),
    /// The client could not be set up.
    #[error("cannot set a client up")]
    Setup(#[source] io::Error),
}

/// A guest's socket, for those who wait for many guests at once.
#[derive(Clone, Debug)]
pub struct Socket {
    path: PathBuf,
    timeout: Duration,
}

/// A client of one guest.
#[derive(Debug)]
pub struct Client {
    socket: Socket,
    runtime: tokio::runtime::Runtime,
}

impl Client {
    /// A client of `guest`.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn new(guest: &Guest) -> Result<Self, ClientError> {
        Self::at(&guest.api())
    }

    /// A client of the guest whose API listens at `path`.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn at(path: &Path) -> Result<Self, ClientError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .map_err(ClientError::Setup)?;
        let socket = Socket::at(path, REQUEST_TIMEOUT);
        Ok(Self { socket, runtime })
    }

    /// The same client with another limit to its patience.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.socket.timeout = timeout;
        self
    }

    /// What is at `path`, as it came.
    ///
    /// # Errors
    /// When there is no answer, or the guest refuses.
    pub fn get(&self, path: &str) -> Result<Bytes, ClientError> {
        self.wait(Method::GET, path, Bytes::new())
    }

    /// What is at `path`, read from JSON.
    ///
    /// # Errors
    /// When there is no answer, it cannot be read, or the guest refuses.
    pub fn get_json<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.socket.read(&self.get(path)?)
    }

    /// Asks for what `path` stands for, with `body` as JSON.
    ///
    /// # Errors
    /// When there is no answer, or the guest refuses.
    pub fn post<T: Serialize>(&self, path: &str, body: &T) -> Result<Bytes, ClientError> {
        let body = serde_json::to_vec(body).map_err(|e| self.socket.garbled(&e))?;
        self.wait(Method::POST, path, body.into())
    }

    /// As [`Client::post`], with the answer read from JSON.
    ///
    /// # Errors
    /// When there is no answer, it cannot be read, or the guest refuses.
    pub fn post_json<T: Serialize, A: DeserializeOwned>(
        &self,
        path: &str,
        body: &T,
    ) -> Result<A, ClientError> {
        self.socket.read(&self.post(path, body)?)
    }

    fn wait(&self, method: Method, path: &str, body: Bytes) -> Result<Bytes, ClientError> {
        self.runtime
            .block_on(self.socket.request(method, path, body))
    }
}

impl Socket {
    /// The socket at `path`, whose guest may take `timeout` to answer.
    pub fn at(path: &Path, timeout: Duration) -> Self {
        let path = path.to_owned();
        Self { path, timeout }
    }

    /// What is at `path`, read from JSON.
    ///
    /// # Errors
    /// When there is no answer, it cannot be read, or the guest refuses.
    pub async fn get_json<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let body = self.request(Method::GET, path, Bytes::new()).await?;
        self.read(&body)
    }

    fn read<T: DeserializeOwned>(&self, body: &[u8]) -> Result<T, ClientError> {
        serde_json::from_slice(body).map_err(|e| self.garbled(&e))
    }

    fn garbled(&self, reason: &dyn std::fmt::Display) -> ClientError {
        ClientError::Garbled {
            path: self.path.clone(),
            reason: reason.to_string(),
        }
    }

    async fn request(&self, method: Method, path: &str, body: Bytes) -> Result<Bytes, ClientError> {
        let answer = tokio::time::timeout(self.timeout, self.exchange(method, path, body));
        let (status, body) = answer.await.map_err(|_| self.too_late())??;
        if status.is_success() {
            return Ok(body);
        }
        let error: ErrorBody = self.read(&body)?;
        Err(ClientError::Refused(error.message))
    }

    fn too_late(&self) -> ClientError {
        ClientError::Timeout {
            path: self.path.clone(),
            timeout: self.timeout,
        }
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        let stream = UnixStream::connect(&self.path).await.map_err(|source| {
            let path = self.path.clone();
            ClientError::Connect { path, source }
        })?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "localhost")
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::CONNECTION, "close")
            .body(Full::new(body))
            .map_err(|e| self.garbled(&e))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| self.garbled(&e))?;
        let answer = async {
            let response = sender.send_request(request).await;
            self.body(response.map_err(|e| self.garbled(&e))?).await
        };
        // The connection moves the bytes; its own error is the answer's error too.
        let mut answer = std::pin::pin!(answer);
        tokio::select! {
            result = answer.as_mut() => result,
            _ = connection => answer.await,
        }
    }

    async fn body(&self, response: Response<Incoming>) -> Result<(StatusCode, Bytes), ClientError> {
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_LEN_MAX);
        let body = body.collect().await.map_err(|e| self.garbled(&e))?;
        Ok((status, body.to_bytes()))
    }
}
