//! Why a link was refused, in words.

use std::io;

use rustls::{AlertDescription, CertificateError, Error, InvalidMessage};

/// Why there is no link with another side.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// It speaks without TLS.
    #[error("it does not speak TLS: it runs without --tls, or is no tandem")]
    Plain,
    /// It has no certificate.
    #[error("it has no certificate")]
    NoCertificate,
    /// Its certificate is of no authority that is trusted here.
    #[error("its certificate is of another authority than those in ca.pem")]
    OtherAuthority,
    /// Its certificate is over.
    #[error("its certificate has expired{0}")]
    Expired(String),
    /// Its certificate has yet to begin.
    #[error("its certificate is not valid yet: one of the clocks is wrong")]
    NotYet,
    /// Its certificate is another host's.
    #[error("its certificate is not for `{expected}`: it is for {presented}")]
    OtherName {
        /// Where was connected to.
        expected: String,
        /// What the certificate is for.
        presented: String,
    },
    /// It did not accept the certificate here.
    #[error("it refuses the certificate in host.pem here: {0}")]
    Theirs(&'static str),
    /// It said nothing for so long, in seconds.
    #[error("it did not finish the handshake within {0} s")]
    Slow(u64),
    /// It ended the connection.
    #[error("it ended the connection before the handshake was over")]
    Ended,
    /// The connection failed.
    #[error("the connection failed")]
    Broken(#[source] io::Error),
    /// TLS does not work for another reason.
    #[error("TLS failed")]
    Tls(#[source] Error),
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        match error {
            Error::InvalidMessage(InvalidMessage::InvalidContentType)
            | Error::InvalidMessage(InvalidMessage::UnknownProtocolVersion) => Self::Plain,
            Error::NoCertificatesPresented => Self::NoCertificate,
            Error::InvalidCertificate(why) => certificate(why),
            Error::AlertReceived(alert) => alerted(alert),
            other => Self::Tls(other),
        }
    }
}

fn certificate(why: CertificateError) -> Refusal {
    match why {
        CertificateError::Expired => Refusal::Expired(String::new()),
        CertificateError::ExpiredContext { time, not_after } => {
            let over = time.as_secs().saturating_sub(not_after.as_secs());
            Refusal::Expired(format!(", {over} s ago"))
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            Refusal::NotYet
        }
        // The same name for an authority, and another key.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => Refusal::OtherAuthority,
        CertificateError::NotValidForNameContext {
            expected,
            presented,
        } => Refusal::OtherName {
            expected: expected.to_str().into_owned(),
            presented: match presented.is_empty() {
                true => "nothing".into(),
                false => presented.join(", "),
            },
        },
        other => Refusal::Tls(Error::InvalidCertificate(other)),
    }
}

/// What the other side says of the certificate here (RFC 8446, section 6.2).
fn alerted(alert: AlertDescription) -> Refusal {
    Refusal::Theirs(match alert {
        AlertDescription::CertificateExpired => "it has expired, by the other side's clock",
        AlertDescription::UnknownCA | AlertDescription::DecryptError => {
            "it is of another authority than those in the other side's ca.pem"
        }
        AlertDescription::CertificateRequired => "there is none",
        AlertDescription::BadCertificate
        | AlertDescription::CertificateUnknown
        | AlertDescription::UnsupportedCertificate => "it is not for what it is used for",
        other => return Refusal::Tls(Error::AlertReceived(other)),
    })
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::TimedOut => Self::Slow(super::HANDSHAKE_TIMEOUT.as_secs()),
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe => Self::Ended,
            _ => match error.downcast::<Error>() {
                Ok(error) => error.into(),
                Err(error) => Self::Broken(error),
            },
        }
    }
}
