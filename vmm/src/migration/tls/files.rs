//! The files by which a host proves who it is, read anew for each connection.

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustls::client::WebPkiServerVerifier;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use super::{AUTHORITY_FILE, HOST_FILE, KEY_FILE};

/// Longest file, in bytes: some certificates, or a key.
pub const FILE_LEN_MAX: u64 = 16 << 10;

/// Why a directory's files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// It cannot be read.
    #[error("cannot read `{}`", .0.display())]
    Read(PathBuf, #[source] std::io::Error),
    /// It is too long.
    #[error("`{}` is longer than {FILE_LEN_MAX} bytes", .0.display())]
    TooLong(PathBuf),
    /// It holds something else.
    #[error("`{}` holds no {what} in PEM", path.display())]
    Holds {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
    },
    /// The files do not fit each other, or are no keys that can be used.
    #[error("the keys in `{}` cannot be used", .0.display())]
    Unfit(PathBuf, #[source] rustls::Error),
    /// None of the authorities' certificates can be used.
    #[error("`{}` holds no authority's certificate that can be used: {why}", path.display())]
    Authority {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// A host's keys as they were read at some time. They can be told to a process that cannot read files.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Material {
    authorities: Vec<ByteBuf>,
    chain: Vec<ByteBuf>,
    key: ByteBuf,
}

impl fmt::Debug for Material {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The key is nobody's business.
        f.debug_struct("Material").finish_non_exhaustive()
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn read(path: &Path) -> Result<Vec<u8>, KeysError> {
    let failed = |error| KeysError::Read(path.to_owned(), error);
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(FILE_LEN_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > FILE_LEN_MAX {
        return Err(KeysError::TooLong(path.to_owned()));
    }
    Ok(bytes)
}

/// All certificates of a file, at least one.
fn certificates(path: PathBuf) -> Result<Vec<ByteBuf>, KeysError> {
    let bytes = read(&path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match found {
        Ok(found) if !found.is_empty() => {
            let bytes = found.iter().map(|one| ByteBuf::from(one.as_ref()));
            Ok(bytes.collect())
        }
        _ => Err(KeysError::Holds {
            path,
            what: "certificate",
        }),
    }
}

fn private_key(path: PathBuf) -> Result<ByteBuf, KeysError> {
    match PrivateKeyDer::from_pem_slice(&read(&path)?) {
        Ok(key) => Ok(ByteBuf::from(key.secret_der())),
        Err(_) => Err(KeysError::Holds {
            path,
            what: "private key",
        }),
    }
}

impl Material {
    /// Reads the files of `directory`, and sees whether they can be used together.
    fn read(directory: &Path) -> Result<Self, KeysError> {
        let material = Self {
            authorities: certificates(directory.join(AUTHORITY_FILE))?,
            chain: certificates(directory.join(HOST_FILE))?,
            key: private_key(directory.join(KEY_FILE))?,
        };
        material
            .roots()
            .and_then(|roots| {
                let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider());
                verifier.build().map_err(|error| error.to_string())
            })
            .map_err(|why| KeysError::Authority {
                path: directory.join(AUTHORITY_FILE),
                why,
            })?;
        // A certificate and a key that belong to different renewals are found out here.
        material
            .client()
            .map_err(|error| KeysError::Unfit(directory.to_owned(), error))?;
        Ok(material)
    }

    fn roots(&self) -> Result<Arc<RootCertStore>, String> {
        let mut roots = RootCertStore::empty();
        for authority in &self.authorities {
            let certificate = CertificateDer::from(authority.as_slice());
            roots.add(certificate).map_err(|error| error.to_string())?;
        }
        Ok(Arc::new(roots))
    }

    fn chain(&self) -> Vec<CertificateDer<'static>> {
        let chain = self.chain.iter();
        chain
            .map(|one| CertificateDer::from(one.to_vec()))
            .collect()
    }

    fn private_key(&self) -> Result<PrivateKeyDer<'static>, rustls::Error> {
        let key = PrivateKeyDer::try_from(self.key.as_slice());
        key.map(|key| key.clone_key())
            .map_err(|why| rustls::Error::General(why.into()))
    }

    /// What who connects needs.
    pub(super) fn client(&self) -> Result<Arc<ClientConfig>, rustls::Error> {
        let roots = self.roots().map_err(rustls::Error::General)?;
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])?
            .with_root_certificates(roots)
            .with_client_auth_cert(self.chain(), self.private_key()?)?;
        config.resumption = rustls::client::Resumption::disabled();
        Ok(Arc::new(config))
    }

    /// What who listens needs.
    pub(super) fn server(&self) -> Result<Arc<ServerConfig>, rustls::Error> {
        let roots = self.roots().map_err(rustls::Error::General)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain(), self.private_key()?)?;
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }
}

/// The directory of a host's keys, [`AUTHORITY_FILE`], [`HOST_FILE`] and [`KEY_FILE`]. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Keys(Arc<Kept>);

#[derive(Debug)]
struct Kept {
    directory: PathBuf,
    /// What was read when all of it could be used.
    last: Mutex<Arc<Material>>,
}

impl Keys {
    /// Reads the keys in `directory`.
    ///
    /// # Errors
    /// When they cannot be read, or not be used together.
    pub fn open(directory: &Path) -> Result<Self, KeysError> {
        // Whoever reads them again may have another working directory.
        let directory = std::path::absolute(directory)
            .map_err(|error| KeysError::Read(directory.to_owned(), error))?;
        let last = Mutex::new(Arc::new(Material::read(&directory)?));
        Ok(Self(Arc::new(Kept { directory, last })))
    }

    /// The keys as they are now; if they cannot be used, those that could be the last time.
    pub fn current(&self) -> Arc<Material> {
        let read = Material::read(&self.0.directory);
        let mut last = self.0.last.lock().unwrap_or_else(PoisonError::into_inner);
        match read {
            Ok(material) => *last = Arc::new(material),
            Err(error) => {
                let why = crate::error::causes(&error);
                tracing::warn!(%why, "the keys of links are kept as they were read before");
            }
        }
        Arc::clone(&last)
    }

    /// Where they are.
    pub fn directory(&self) -> &Path {
        &self.0.directory
    }
}
