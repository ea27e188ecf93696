//! The keys by which hosts know each other: an authority, hosts' keys that it signed, and what they say.
//!
//! Keys are ECDSA over P-256. A host's certificate is for connecting and for listening, for its name and for all
//! addresses under which others reach it. A private key's file can be read by its owner only.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use tandem_vmm::migration::tls::{AUTHORITY_FILE, FILE_LEN_MAX, HOST_FILE, KEY_FILE};
use time::{Duration, OffsetDateTime};
use x509_parser::extensions::GeneralName;
use x509_parser::pem::Pem;

/// The private key of an authority.
pub const AUTHORITY_KEY_FILE: &str = "ca.key";
/// How much earlier than they are made keys are valid: clocks of hosts differ.
const EARLIER: Duration = Duration::minutes(10);

/// Why keys were not made or cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum KeysFailure {
    /// They would take the place of others.
    #[error("`{}` is there already; --replace puts new keys in its place", .0.display())]
    There(PathBuf),
    /// A file cannot be read or written.
    #[error("cannot {action} `{}`", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file is something else.
    #[error("`{}` holds no {what} in PEM", path.display())]
    Holds {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
    },
    /// There are no keys.
    #[error("`{}` has neither {HOST_FILE} nor {AUTHORITY_FILE}", .0.display())]
    None(PathBuf),
    /// A key or a certificate cannot be made.
    #[error("the keys cannot be made")]
    Make(#[from] rcgen::Error),
    /// An authority that is over signs nothing that is of use.
    #[error("the authority in `{}` is valid only until {until}", path.display())]
    Over {
        /// Its directory.
        path: PathBuf,
        /// When it ends.
        until: String,
    },
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> KeysFailure + 'a {
    move |source| KeysFailure::File {
        action,
        path: path.to_owned(),
        source,
    }
}

/// What keys are made for.
#[derive(Clone, Debug)]
pub struct Order<'a> {
    /// Where they go.
    pub directory: &'a Path,
    /// Whose they are.
    pub name: &'a str,
    /// How long they are valid, in days.
    pub days: u16,
    /// Whether they may take the place of others.
    pub replace: bool,
}

/// Makes an authority.
///
/// # Errors
/// When there is one already, or files cannot be written.
pub fn new_authority(order: &Order<'_>) -> Result<(), KeysFailure> {
    let mut params = order.params(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate()?;
    let certificate = params.self_signed(&key)?;
    order.write(&[
        (AUTHORITY_KEY_FILE, &key.serialize_pem(), Readers::Owner),
        (AUTHORITY_FILE, &certificate.pem(), Readers::All),
    ])
}

/// Makes a host's keys, which the authority in `authority` signs, for its name and `addresses`.
///
/// # Errors
/// When there are some already, there is no such authority, or files cannot be written.
pub fn new_host(
    order: &Order<'_>,
    authority: &Path,
    addresses: &[String],
) -> Result<(), KeysFailure> {
    let mut names = vec![order.name.to_owned()];
    names.extend(addresses.iter().filter(|a| *a != order.name).cloned());
    let mut params = order.params(names)?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ClientAuth,
        ExtendedKeyUsagePurpose::ServerAuth,
    ];
    params.use_authority_key_identifier_extension = true;
    let trusted = read(&authority.join(AUTHORITY_FILE))?;
    let until = shown_first(&authority.join(AUTHORITY_FILE))?;
    if until.days_left < 0 {
        return Err(KeysFailure::Over {
            path: authority.to_owned(),
            until: until.until,
        });
    }
    let key_file = authority.join(AUTHORITY_KEY_FILE);
    let authority_key = KeyPair::from_pem(&read(&key_file)?).map_err(|_| KeysFailure::Holds {
        path: key_file,
        what: "private key",
    })?;
    let issuer = Issuer::from_ca_cert_pem(&trusted, authority_key)?;
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, &issuer)?;
    order.write(&[
        (AUTHORITY_FILE, &trusted, Readers::All),
        (KEY_FILE, &key.serialize_pem(), Readers::Owner),
        (HOST_FILE, &certificate.pem(), Readers::All),
    ])
}

/// Who can read a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Readers {
    Owner,
    All,
}

impl Readers {
    fn mode(self) -> u32 {
        match self {
            Self::Owner => 0o600,
            Self::All => 0o644,
        }
    }
}

impl Order<'_> {
    fn params(&self, names: Vec<String>) -> Result<CertificateParams, KeysFailure> {
        let mut params = CertificateParams::new(names)?;
        let now = OffsetDateTime::now_utc();
        params.not_before = now - EARLIER;
        params.not_after = now + Duration::days(self.days.into());
        params.distinguished_name = rcgen::DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CommonName, self.name);
        Ok(params)
    }

    /// Puts files in their places, each whole, the certificate after its key: whoever reads them in between takes
    /// those from before.
    fn write(&self, files: &[(&str, &str, Readers)]) -> Result<(), KeysFailure> {
        let directory = self.directory;
        let made = fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory);
        made.map_err(failed("make", directory))?;
        let there = files.iter().map(|(name, ..)| directory.join(name));
        if let Some(there) = there.filter(|_| !self.replace).find(|path| path.exists()) {
            return Err(KeysFailure::There(there));
        }
        for (name, text, readers) in files {
            put(&directory.join(name), text, *readers)?;
        }
        Ok(())
    }
}

/// Writes a file beside `path`, and gives it its name when it is whole.
fn put(path: &Path, text: &str, readers: Readers) -> Result<(), KeysFailure> {
    let unfinished = path.with_added_extension("new");
    // What is left of an attempt that failed may be readable by others.
    drop(fs::remove_file(&unfinished));
    let mut options = OpenOptions::new();
    let options = options.write(true).create_new(true).mode(readers.mode());
    let written = options.open(&unfinished).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    written.map_err(failed("write", &unfinished))?;
    fs::rename(&unfinished, path).map_err(failed("write", path))
}

fn read(path: &Path) -> Result<String, KeysFailure> {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| {
        io::Read::read_to_string(&mut io::Read::take(file, FILE_LEN_MAX), &mut text)
    });
    read.map_err(failed("read", path))?;
    Ok(text)
}

/// What a certificate says.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Shown {
    /// The file that it is in.
    pub file: PathBuf,
    /// Whose it is.
    pub name: String,
    /// Who signed it.
    pub authority: String,
    /// Where others connect to the host.
    pub addresses: Vec<String>,
    /// From when it is valid.
    pub from: String,
    /// Until when it is valid.
    pub until: String,
    /// How many days that is from now; less than 0 if it is over.
    pub days_left: i64,
}

/// What the certificates in `directory` say: a host's, and those of the authorities that it trusts.
///
/// # Errors
/// When there are none, or something else.
pub fn show(directory: &Path) -> Result<Vec<Shown>, KeysFailure> {
    let mut all = Vec::new();
    for name in [HOST_FILE, AUTHORITY_FILE] {
        let path = directory.join(name);
        if path.exists() {
            all.extend(shown(&path)?);
        }
    }
    if all.is_empty() {
        return Err(KeysFailure::None(directory.to_owned()));
    }
    Ok(all)
}

fn shown_first(path: &Path) -> Result<Shown, KeysFailure> {
    Ok(shown(path)?.swap_remove(0))
}

/// What the certificates in a file say, at least one.
fn shown(path: &Path) -> Result<Vec<Shown>, KeysFailure> {
    let holds = || KeysFailure::Holds {
        path: path.to_owned(),
        what: "certificate",
    };
    let text = read(path)?;
    let mut all = Vec::new();
    for pem in Pem::iter_from_buffer(text.as_bytes()) {
        let pem = pem.map_err(|_| holds())?;
        let certificate = pem.parse_x509().map_err(|_| holds())?;
        all.push(said(path, &certificate));
    }
    if all.is_empty() {
        return Err(holds());
    }
    Ok(all)
}

fn said(path: &Path, certificate: &x509_parser::certificate::X509Certificate<'_>) -> Shown {
    let name = |of: &x509_parser::x509::X509Name<'_>| {
        let first = of.iter_common_name().next();
        let name = first.and_then(|name| name.as_str().ok());
        name.map_or_else(|| of.to_string(), str::to_owned)
    };
    let names = certificate.subject_alternative_name().ok().flatten();
    let names = names.map_or(&[][..], |names| &names.value.general_names[..]);
    let validity = certificate.validity();
    let (from, until) = (validity.not_before, validity.not_after);
    let left = until.to_datetime() - OffsetDateTime::now_utc();
    Shown {
        file: path.to_owned(),
        name: name(certificate.subject()),
        authority: name(certificate.issuer()),
        addresses: names.iter().filter_map(address).collect(),
        from: day(from.to_datetime()),
        until: day(until.to_datetime()),
        days_left: left.as_seconds_f64().div_euclid(86_400.0) as i64,
    }
}

fn day(at: OffsetDateTime) -> String {
    format!(
        "{} {:02}:{:02} UTC",
        at.date(),
        at.time().hour(),
        at.time().minute()
    )
}

fn address(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(*bytes)
                .ok()
                .map(|bytes| std::net::Ipv4Addr::from(bytes).to_string()),
            _ => <[u8; 16]>::try_from(*bytes)
                .ok()
                .map(|bytes| std::net::Ipv6Addr::from(bytes).to_string()),
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use tandem_vmm::migration::tls::Keys;

    use super::*;

    fn order<'a>(directory: &'a Path, name: &'a str) -> Order<'a> {
        Order {
            directory,
            name,
            days: 30,
            replace: false,
        }
    }

    #[test]
    fn keys_of_a_host_can_be_used_and_say_whose_they_are() {
        let place = tempfile::tempdir().unwrap();
        let (authority, host) = (place.path().join("ca"), place.path().join("a/host"));
        new_authority(&order(&authority, "ours")).unwrap();
        let addresses = ["10.0.0.1", "::1", "a.example"].map(str::to_owned);
        new_host(&order(&host, "a"), &authority, &addresses).unwrap();
        Keys::open(&host).unwrap();
        let all = show(&host).unwrap();
        assert_eq!(all[0].addresses, ["a", "10.0.0.1", "::1", "a.example"]);
        assert_eq!((&*all[0].name, &*all[0].authority), ("a", "ours"));
        assert_eq!(all[0].days_left, 29);
        assert_eq!((&*all[1].name, all[1].addresses.len()), ("ours", 0));
        for (file, mode) in [
            (host.join(KEY_FILE), 0o600),
            (authority.join(AUTHORITY_KEY_FILE), 0o600),
            (host.clone(), 0o700),
        ] {
            let found = fs::metadata(&file).unwrap().permissions().mode();
            assert_eq!(found & 0o777, mode, "{}", file.display());
        }
        assert!(!host.join(AUTHORITY_KEY_FILE).exists());
    }

    #[test]
    fn keys_are_replaced_only_when_that_is_said() {
        let place = tempfile::tempdir().unwrap();
        let authority = place.path().join("ca");
        new_authority(&order(&authority, "ours")).unwrap();
        let key = authority.join(AUTHORITY_KEY_FILE);
        let before = fs::read(&key).unwrap();
        let again = new_authority(&order(&authority, "ours"));
        assert!(matches!(again, Err(KeysFailure::There(_))), "{again:?}");
        assert_eq!(fs::read(&key).unwrap(), before);
        let replace = Order {
            replace: true,
            ..order(&authority, "ours")
        };
        new_authority(&replace).unwrap();
        assert_ne!(fs::read(&key).unwrap(), before);
    }

    #[test]
    fn what_is_no_authority_and_no_keys_is_named() {
        let place = tempfile::tempdir().unwrap();
        let host = place.path().join("host");
        let made = new_host(&order(&host, "a"), place.path(), &[]);
        assert!(made.unwrap_err().to_string().contains("ca.pem"));
        assert!(!host.exists());
        assert!(matches!(show(place.path()), Err(KeysFailure::None(_))));
        fs::write(place.path().join(HOST_FILE), "x").unwrap();
        let holds = show(place.path()).unwrap_err().to_string();
        assert!(holds.contains("holds no certificate"), "{holds}");
    }
}
