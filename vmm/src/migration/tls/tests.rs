//! Who is refused, and what a link does once nobody is.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, date_time_ymd,
};
use rustls::ClientConfig;
use tempfile::TempDir;

use super::*;
use crate::error::causes;
use crate::migration::address::{Address, Listener};
use crate::migration::frame::{self, Kind, Purpose};
use crate::migration::{Link, MigrationError, Peer};

/// Where tests connect to.
const HERE: &str = "127.0.0.1";

type Authority = CertifiedIssuer<'static, KeyPair>;

/// All authorities are called the same: it is their keys that differ.
fn authority() -> Authority {
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::CommonName, "authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// When a certificate is valid.
#[derive(Clone, Copy)]
enum Valid {
    Now,
    Before,
    Later,
}

/// Writes the keys of a host at `name` that `signer` signed and that trusts `trusted`.
fn keys_in(place: &Path, signer: &Authority, trusted: &[&Authority], name: &str, valid: Valid) {
    let mut params = CertificateParams::new([name.to_owned()]).unwrap();
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ClientAuth,
        ExtendedKeyUsagePurpose::ServerAuth,
    ];
    match valid {
        Valid::Now => {}
        Valid::Before => params.not_after = date_time_ymd(2020, 1, 1),
        Valid::Later => params.not_before = date_time_ymd(3000, 1, 1),
    }
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, signer).unwrap();
    let trusted: String = trusted.iter().map(|authority| authority.pem()).collect();
    fs::write(place.join(AUTHORITY_FILE), trusted).unwrap();
    fs::write(place.join(HOST_FILE), certificate.pem()).unwrap();
    fs::write(place.join(KEY_FILE), key.serialize_pem()).unwrap();
}

fn host(signer: &Authority, trusted: &[&Authority], name: &str, valid: Valid) -> TempDir {
    let place = tempfile::tempdir().unwrap();
    keys_in(place.path(), signer, trusted, name, valid);
    place
}

fn good(authority: &Authority) -> TempDir {
    host(authority, &[authority], HERE, Valid::Now)
}

fn listener(keys: Option<&TempDir>) -> Listener {
    let address = Address::Tcp(format!("{HERE}:0"));
    let keys = keys.map(|place| Keys::open(place.path()).unwrap());
    address.listen().unwrap().verifying(keys)
}

/// Takes the next who connects.
fn accept(listener: Listener) -> JoinHandle<Result<Link, MigrationError>> {
    std::thread::spawn(move || listener.accept().unwrap().verified())
}

fn connect(to: &str, keys: Option<&TempDir>) -> Result<Link, MigrationError> {
    let address: Address = to.parse().unwrap();
    let tls = keys.map(|place| place.path().to_owned());
    Peer::find(&address.into(), tls)?.open()?.connect()
}

/// What both sides have: who connects, and who listens.
fn meet(
    client: Option<&TempDir>,
    server: Option<&TempDir>,
) -> (Result<Link, MigrationError>, Result<Link, MigrationError>) {
    let listener = listener(server);
    let to = listener.address();
    let accepting = accept(listener);
    (connect(&to, client), accepting.join().unwrap())
}

fn pair() -> (Link, Link) {
    let authority = authority();
    let (client, server) = meet(Some(&good(&authority)), Some(&good(&authority)));
    (client.unwrap(), server.unwrap())
}

#[track_caller]
fn assert_says(result: &Result<Link, MigrationError>, words: &[&str]) {
    let said = causes(result.as_ref().expect_err("a refusal"));
    for word in words {
        assert!(said.contains(word), "`{word}` is not in: {said}");
    }
}

#[test]
fn hosts_of_one_authority_have_a_link() {
    let (mut client, mut server) = pair();
    client.write_all(b"from here").unwrap();
    server.write_all(b"from there").unwrap();
    let mut said = [0; 9];
    server.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"from here");
    let mut said = [0; 10];
    client.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"from there");
}

#[test]
fn certificates_of_another_authority_are_refused_by_either_side() {
    let (ours, other) = (authority(), authority());
    let trusts_both = host(&other, &[&ours, &other], HERE, Valid::Now);
    let (client, server) = meet(Some(&trusts_both), Some(&good(&ours)));
    assert_says(
        &server,
        &["no link with 127.0.0.1:", "of another authority"],
    );
    assert_says(
        &client,
        &["refuses the certificate", "of another authority"],
    );
    let (client, server) = meet(Some(&good(&ours)), Some(&trusts_both));
    assert_says(&client, &["its certificate is of another authority"]);
    assert_says(
        &server,
        &["refuses the certificate", "of another authority"],
    );
}

#[test]
fn certificates_that_are_over_are_refused_by_either_side() {
    let ours = authority();
    let over = host(&ours, &[&ours], HERE, Valid::Before);
    let (client, server) = meet(Some(&over), Some(&good(&ours)));
    assert_says(&server, &["its certificate has expired"]);
    assert_says(&client, &["refuses the certificate", "it has expired"]);
    let (client, server) = meet(Some(&good(&ours)), Some(&over));
    assert_says(&client, &["its certificate has expired"]);
    assert_says(&server, &["refuses the certificate", "it has expired"]);
}

#[test]
fn certificates_that_have_yet_to_begin_are_refused() {
    let ours = authority();
    let later = host(&ours, &[&ours], HERE, Valid::Later);
    let (_, server) = meet(Some(&later), Some(&good(&ours)));
    assert_says(&server, &["not valid yet"]);
}

#[test]
fn a_host_is_not_another_host() {
    let ours = authority();
    let other = host(&ours, &[&ours], "10.1.2.3", Valid::Now);
    let (client, server) = meet(Some(&good(&ours)), Some(&other));
    assert_says(&client, &["not for `127.0.0.1`", "10.1.2.3"]);
    assert!(server.is_err());
    // Who connects has no name that could be wrong.
    let (client, server) = meet(Some(&other), Some(&good(&ours)));
    assert!(client.is_ok() && server.is_ok());
}

#[test]
fn a_client_without_a_certificate_is_refused() {
    let ours = authority();
    let listener = listener(Some(&good(&ours)));
    let to = listener.address();
    let accepting = accept(listener);
    let mut roots = rustls::RootCertStore::empty();
    roots.add(ours.der().clone()).unwrap();
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = HERE.to_owned().try_into().unwrap();
    let mut tls = rustls::ClientConnection::new(config.into(), name).unwrap();
    let mut stream = TcpStream::connect(to).unwrap();
    let mut stream = rustls::Stream::new(&mut tls, &mut stream);
    let ended = stream.read(&mut [0; 9]).unwrap_err().to_string();
    assert!(ended.contains("CertificateRequired"), "{ended}");
    assert_says(&accepting.join().unwrap(), &["it has no certificate"]);
}

#[test]
fn a_plain_side_and_an_encrypted_one_know_why_they_have_no_link() {
    let ours = good(&authority());
    let listener_ = listener(Some(&ours));
    let mut client = connect(&listener_.address(), None).unwrap();
    let accepting = accept(listener_);
    frame::send_preface(&mut client, Purpose::Protection).unwrap();
    let heard = frame::expect(&mut client, Kind::Accept);
    assert!(matches!(heard, Err(MigrationError::WantsTls)), "{heard:?}");
    assert_says(&accepting.join().unwrap(), &["does not speak TLS"]);

    let listener = listener(None);
    let to = listener.address();
    let accepting = std::thread::spawn(move || {
        let mut link = listener.accept().unwrap().verified().unwrap();
        let heard = frame::receive_preface(&mut link, Purpose::Protection);
        frame::refuse(&mut link, "it is none");
        heard
    });
    assert_says(&connect(&to, Some(&ours)), &["does not speak TLS"]);
    let heard = accepting.join().unwrap();
    assert!(matches!(heard, Err(MigrationError::WantsTls)), "{heard:?}");
}

#[test]
fn a_silent_client_is_not_waited_for_forever() {
    let listener = listener(Some(&good(&authority())));
    let _silent = TcpStream::connect(listener.address()).unwrap();
    let refused = accept(listener).join().unwrap();
    assert_says(&refused, &["did not finish the handshake"]);
}

/// A link whose other side takes nothing takes no more than its limits, and loses nothing.
#[test]
fn back_pressure_is_passed_on_and_no_byte_is_lost() {
    let (near, far) = pair();
    let chunk: Vec<u8> = (0..100_003_u32).map(|n| (n % 251) as u8).collect();
    let mut sent = 0_usize;
    loop {
        match near.send(&chunk[sent % chunk.len()..]) {
            Ok(count) => sent += count,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                break;
            }
        }
    }
    assert!(near.owes(), "the last batch waits");
    let mut received = 0_usize;
    let mut room = vec![0; 30_011];
    while received < sent {
        match far.recv(&mut room) {
            Ok(count) => {
                for (at, byte) in room[..count].iter().enumerate() {
                    assert_eq!(*byte, chunk[(received + at) % chunk.len()]);
                }
                received += count;
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        if near.owes() {
            drop(near.send(&[]));
        }
    }
    assert!(!near.owes());
}

fn wait_end(link: &Link) -> std::io::Result<usize> {
    loop {
        match link.recv(&mut [0; 16]) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_micros(50));
            }
            Ok(1..) => {}
            ended => return ended,
        }
    }
}

#[test]
fn the_end_of_a_side_ends_the_link_and_clones_end_it_together() {
    let (near, far) = pair();
    near.send(b"the last words").unwrap();
    drop(near);
    assert_eq!(wait_end(&far).unwrap(), 0);
    let (near, far) = pair();
    let shared = near.try_clone().unwrap();
    shared.shut_down();
    assert_eq!(wait_end(&far).unwrap(), 0);
    assert_eq!(wait_end(&near).unwrap(), 0);
}

#[test]
fn an_end_in_one_direction_leaves_the_other() {
    let (near, mut far) = pair();
    let Link::Tls(session) = &near else {
        panic!("it is encrypted")
    };
    session.send(b"done").unwrap();
    rustix::net::shutdown(session.waits_for(), rustix::net::Shutdown::Write).unwrap();
    let mut all = Vec::new();
    far.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"done");
    far.write_all(b"answer").unwrap();
    let mut near = near;
    let mut answer = [0; 6];
    near.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
}

#[test]
fn a_reset_stays_a_reset_after_what_came_before() {
    let (near, far) = pair();
    far.send(b"unread").unwrap();
    rustix::event::poll(
        &mut [rustix::event::PollFd::from_borrowed_fd(
            near.waits_for(),
            rustix::event::PollFlags::IN,
        )],
        None,
    )
    .unwrap();
    // Closed with something unread.
    drop(near);
    let ended = wait_end(&far).unwrap_err();
    assert_eq!(ended.kind(), ErrorKind::ConnectionReset);
    let again = wait_end(&far).unwrap_err();
    assert_eq!(again.kind(), ErrorKind::ConnectionReset);
}

#[test]
fn changed_bytes_end_the_link() {
    let (near, far) = pair();
    rustix::net::send(
        near.waits_for(),
        &[0x17, 3, 3, 0, 32, 1, 2, 3],
        rustix::net::SendFlags::empty(),
    )
    .unwrap();
    near.send(&[7; 64]).unwrap();
    assert_eq!(wait_end(&far).unwrap_err().kind(), ErrorKind::InvalidData);
}

/// Whether a link by what `keys` has now is one with who trusts `authority` only.
fn fits(keys: &Keys, authority: &Authority) -> bool {
    let listener = listener(Some(&good(authority)));
    let to = listener.address();
    let accepting = accept(listener);
    let session = Session::connect(TcpStream::connect(to).unwrap(), &keys.current(), HERE);
    accepting.join().unwrap().is_ok() && session.is_ok()
}

#[test]
fn keys_are_read_anew_and_damaged_ones_are_not_used() {
    let (before, after) = (authority(), authority());
    let place = good(&before);
    let keys = Keys::open(place.path()).unwrap();
    assert!(fits(&keys, &before));
    let file = |name: &str| place.path().join(name);
    let whole = fs::read_to_string(file(HOST_FILE)).unwrap();
    fs::write(file(HOST_FILE), &whole[..whole.len() / 2]).unwrap();
    assert!(fits(&keys, &before), "a half-written file is not used");
    fs::write(file(HOST_FILE), &whole).unwrap();
    fs::write(file(KEY_FILE), KeyPair::generate().unwrap().serialize_pem()).unwrap();
    assert!(
        fits(&keys, &before),
        "a key of another certificate is not used"
    );
    fs::remove_file(file(AUTHORITY_FILE)).unwrap();
    assert!(fits(&keys, &before), "a missing file is not used");
    keys_in(place.path(), &after, &[&after], HERE, Valid::Now);
    assert!(fits(&keys, &after));
    assert!(!fits(&keys, &before));
}

#[test]
fn what_is_wrong_with_keys_is_named() {
    let place = good(&authority());
    let file = |name: &str| place.path().join(name);
    fs::write(file(KEY_FILE), "x").unwrap();
    let said = causes(&Keys::open(place.path()).unwrap_err());
    assert!(said.contains("host.key` holds no private key"), "{said}");
    fs::write(file(KEY_FILE), KeyPair::generate().unwrap().serialize_pem()).unwrap();
    let said = causes(&Keys::open(place.path()).unwrap_err());
    assert!(
        said.contains("cannot be used: keys may not be consistent"),
        "{said}"
    );
    fs::write(file(AUTHORITY_FILE), vec![b'x'; FILE_LEN_MAX as usize + 1]).unwrap();
    let said = causes(&Keys::open(place.path()).unwrap_err());
    assert!(said.contains("ca.pem` is longer"), "{said}");
}
