//! Which certificates of registries are believed: those of the system (or of `SSL_CERT_FILE`), and of `--registry-ca`.
//!
//! A certificate that is itself among them is believed as it is, as docker and skopeo do. The one that distribution's
//! documentation tells to make is marked as an authority, and webpki refuses to take it for a server's.

use std::fmt;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error as TlsError, OtherError, RootCertStore,
    SignatureScheme,
};

use crate::error::{Error, Result};
use crate::printable::Printable;
use crate::registry_config::{open_plain, read_plain};

/// Longest file of certificates; that of a system has 220 KB.
const LIMIT: u64 = 4 << 20;

/// Whose certificates are believed.
#[derive(Default)]
pub struct Trust {
    named: Vec<CertificateDer<'static>>,
    config: OnceLock<std::result::Result<Arc<ClientConfig>, String>>,
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the system's certificates and {} more", self.named.len())
    }
}

impl Trust {
    /// The system's, and those in `file`.
    pub fn with(file: &Path) -> Result<Trust> {
        let refuse = |what: &str| {
            let text =
                "--registry-ca wants certificates in PEM, each from BEGIN CERTIFICATE to END CERTIFICATE";
            Error::invalid(format!("{} {what}; {text}", file.printable()))
        };
        let bytes = open_plain(file)
            .and_then(|opened| read_plain(opened, LIMIT))
            .map_err(|e| Error::io("read the certificates in", file, e))?
            .ok_or_else(|| refuse("is larger than 4 MiB"))?;
        let named = CertificateDer::pem_slice_iter(&bytes)
            .collect::<std::result::Result<Vec<_>, _>>()
            .map_err(|_| refuse("is damaged"))?;
        if named.is_empty() {
            return Err(refuse("holds no certificate"));
        }
        Ok(Trust { named, ..Trust::default() })
    }

    /// What TLS goes by; the system's certificates are read when the first registry wants to speak it.
    pub(super) fn client_config(&self) -> std::result::Result<Arc<ClientConfig>, String> {
        self.config.get_or_init(|| self.build()).clone()
    }

    fn build(&self) -> std::result::Result<Arc<ClientConfig>, String> {
        let system = rustls_native_certs::load_native_certs();
        for e in &system.errors {
            log::warn!("{e}");
        }
        let believed: Vec<CertificateDer<'static>> = self.named.iter().cloned().chain(system.certs).collect();
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(believed.iter().cloned());
        let provider = Arc::new(ring::default_provider());
        let inner = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .build()
            .map_err(|_| "this system trusts no certificate; give the registry's with --registry-ca FILE")?;
        let verifier = Verifier { inner, believed };
        Ok(Arc::new(config(provider, verifier)?))
    }
}

fn config(provider: Arc<CryptoProvider>, verifier: Verifier) -> std::result::Result<ClientConfig, String> {
    let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = versions.map_err(|e| e.to_string())?.dangerous();
    Ok(builder.with_custom_certificate_verifier(Arc::new(verifier)).with_no_client_auth())
}

/// Verifies as webpki does, but for certificates that are believed themselves.
#[derive(Debug)]
struct Verifier {
    inner: Arc<WebPkiServerVerifier>,
    believed: Vec<CertificateDer<'static>>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, TlsError> {
        match self.inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            // webpki looks at the dates before either, and at the name after.
            Err(e) if self.believed.contains(end_entity) && is_about_issuer(&e) => {
                rustls::client::verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
                Ok(ServerCertVerified::assertion())
            }
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, TlsError> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, TlsError> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// Whether all that is wrong with a certificate is who issued it: itself, as an authority, or somebody unknown, who may have
/// the name of one that is known.
fn is_about_issuer(e: &TlsError) -> bool {
    match e {
        TlsError::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            true
        }
        TlsError::InvalidCertificate(CertificateError::Other(OtherError(inner))) => {
            matches!(inner.downcast_ref::<webpki::Error>(), Some(webpki::Error::CaUsedAsEndEntity))
        }
        _ => false,
    }
}

/// What is wrong, and what to do, in words; `None` where TLS has nothing to do with it.
pub(super) fn explain(e: &TlsError) -> String {
    use CertificateError as Bad;
    let TlsError::InvalidCertificate(bad) = e else {
        return match e {
            TlsError::InvalidMessage(_) => {
                "it does not speak TLS; write http:// instead of https://".to_string()
            }
            e => format!("TLS failed ({e})"),
        };
    };
    let what = match bad {
        Bad::UnknownIssuer | Bad::BadSignature => "is signed by nobody whom this system trusts",
        Bad::Expired | Bad::ExpiredContext { .. } => return outdated("has expired"),
        Bad::NotValidYet | Bad::NotValidYetContext { .. } => return outdated("is not valid yet"),
        Bad::NotValidForName => return other_name(""),
        Bad::NotValidForNameContext { presented, .. } => {
            // `DnsName("hub.example")`
            let name = |name: &String| name.split('"').nth(1).unwrap_or(name).to_string();
            return other_name(&presented.iter().map(name).collect::<Vec<_>>().join(", "));
        }
        _ if is_about_issuer(e) => "is marked as an authority, and this system does not trust it itself",
        _ => return format!("its certificate is not accepted ({e})"),
    };
    format!("its certificate {what}; give it, or that of who signed it, with --registry-ca FILE")
}

fn outdated(what: &str) -> String {
    format!("its certificate {what}; renew it, or mend the clock of this machine")
}

fn other_name(names: &str) -> String {
    let names = if names.is_empty() { String::new() } else { format!(" ({names})") };
    format!(
        "its certificate is for another name{names}; give a URL with a name that stands in it, with --registry"
    )
}
