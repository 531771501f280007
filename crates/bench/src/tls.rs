//! TLS for `https` targets: which certificate authorities are trusted. Server certificates are always
//! verified; there is no switch to turn that off.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use tokio_rustls::TlsConnector;

use crate::BenchError;

/// Where distributions keep their bundle.
const SYSTEM_BUNDLES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// A connector that trusts the bundle given, else `SSL_CERT_FILE`, else the system's bundle.
pub(crate) fn connector(ca_bundle: Option<&Path>) -> Result<TlsConnector, BenchError> {
    let path = ca_bundle
        .map(Path::to_owned)
        .or_else(|| std::env::var_os("SSL_CERT_FILE").map(PathBuf::from))
        .or_else(|| SYSTEM_BUNDLES.iter().map(PathBuf::from).find(|path| path.is_file()));
    let Some(path) = path else {
        let reason = "https needs certificate authorities, and the system has none".to_owned();
        return Err(BenchError::BadOption { flag: "ca-bundle", reason });
    };
    let pem = std::fs::read(&path).map_err(|source| BenchError::Io {
        path: path.clone(),
        action: "read",
        source,
    })?;
    let bad = |reason: String| BenchError::BadOption {
        flag: "ca-bundle",
        reason: format!("{}: {reason}", path.display()),
    };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|error| bad(error.to_string()))?;
        // System bundles hold certificates that no longer parse; those are skipped.
        roots.add_parsable_certificates([certificate]);
    }
    if roots.is_empty() {
        return Err(bad("holds no usable certificate".into()));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| bad(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn message(result: Result<TlsConnector, BenchError>) -> String {
        result.err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn bad_bundles_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        assert!(message(connector(Some(&path))).contains("ca.pem: cannot read"));
        std::fs::write(&path, "nothing").unwrap();
        assert!(message(connector(Some(&path))).contains("no usable certificate"));
        std::fs::write(&path, "-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n").unwrap();
        assert!(message(connector(Some(&path))).contains("--ca-bundle"));
    }
}
