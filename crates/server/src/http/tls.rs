//! TLS by rustls with the ring provider.
//!
//! Owns the certificates in use. When a file changes, a pair that cannot be read leaves the old one in place.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio_rustls::TlsAcceptor;

use crate::config::TlsConfig;
use crate::file::{self, FileError};
use crate::metrics::{Metrics, Reloaded};
use crate::reload::Watch;

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file that cannot be read.
    #[error(transparent)]
    Unreadable(#[from] FileError),
    /// A file cannot be read as PEM.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// Key and certificate do not belong together, or rustls refuses them.
    #[error("certificate {} with key {}: {reason}", certfile.display(), keyfile.display())]
    Pair {
        /// The chain.
        certfile: PathBuf,
        /// The key.
        keyfile: PathBuf,
        /// Why not.
        reason: String,
    },
}

/// The certificates in use.
pub(crate) struct Tls {
    config: TlsConfig,
    watch: Watch,
    current: ArcSwap<ServerConfig>,
}

impl Tls {
    /// Reads the certificates. Blocks meanwhile.
    ///
    /// # Errors
    /// A file is missing or malformed, or key and chain do not belong together.
    pub(crate) fn load(config: TlsConfig) -> Result<Self, TlsError> {
        let files = [Some(&config.certfile), Some(&config.keyfile), config.ca_certs.as_ref()];
        let watch = Watch::new(files.into_iter().flatten().cloned().collect());
        let current = ArcSwap::new(Arc::new(build(&config)?));
        Ok(Self { config, watch, current })
    }

    /// For the next connection.
    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.current.load_full())
    }

    /// Takes what the files hold whenever they change, if it is usable. Never returns.
    pub(crate) async fn watch(self: Arc<Self>, every: Duration, metrics: &Metrics) {
        let this = self.clone();
        let reload = move || build(&this.config).map(|config| this.current.store(Arc::new(config)));
        self.watch.run(Reloaded::Certificates, every, metrics, reload).await;
    }
}

/// Most bytes of a file of certificates.
const MAX_PEM: u64 = 1 << 20;

fn file_error(path: &Path, reason: impl Into<String>) -> TlsError {
    TlsError::File { path: path.to_owned(), reason: reason.into() }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    Ok(file::read(path, MAX_PEM)?)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let list = CertificateDer::pem_slice_iter(&read(path)?)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| file_error(path, e.to_string()))?;
    if list.is_empty() {
        return Err(file_error(path, "no certificate in it"));
    }
    Ok(list)
}

fn build(config: &TlsConfig) -> Result<ServerConfig, TlsError> {
    let chain = certificates(&config.certfile)?;
    let key = PrivateKeyDer::from_pem_slice(&read(&config.keyfile)?)
        .map_err(|e| file_error(&config.keyfile, e.to_string()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let pair = |reason: String| TlsError::Pair {
        certfile: config.certfile.clone(),
        keyfile: config.keyfile.clone(),
        reason,
    };
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|e| pair(e.to_string()))?;
    let builder = match &config.ca_certs {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for certificate in certificates(path)? {
                roots.add(certificate).map_err(|e| file_error(path, e.to_string()))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .map_err(|e| file_error(path, e.to_string()))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut server = builder.with_single_cert(chain, key).map_err(|e| pair(e.to_string()))?;
    server.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(server)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const EVERY: Duration = Duration::from_secs(2);

    fn pair(directory: &Path, name: &str) -> TlsConfig {
        let made = rcgen::generate_simple_self_signed(vec![name.to_owned()]).unwrap();
        let (certfile, keyfile) = (directory.join("cert.pem"), directory.join("key.pem"));
        std::fs::write(&certfile, made.cert.pem()).unwrap();
        std::fs::write(&keyfile, made.signing_key.serialize_pem()).unwrap();
        TlsConfig { certfile, keyfile, ca_certs: None }
    }

    #[test]
    fn unusable_files_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let good = pair(directory.path(), "localhost");
        let missing = TlsConfig { certfile: directory.path().join("none.pem"), ..good.clone() };
        let swapped = TlsConfig { certfile: good.keyfile.clone(), ..good.clone() };
        let no_key = TlsConfig { keyfile: good.certfile.clone(), ..good.clone() };
        let bad_ca = TlsConfig { ca_certs: Some(good.keyfile.clone()), ..good.clone() };
        let device = TlsConfig { keyfile: "/dev/null".into(), ..good.clone() };
        for (config, file) in [
            (missing, "none.pem"),
            (swapped, "key.pem"),
            (no_key, "cert.pem"),
            (bad_ca, "key.pem"),
            (device, "/dev/null: not a regular file"),
        ] {
            let error = Tls::load(config).err().unwrap().to_string();
            assert!(error.contains(file), "{error}");
        }
        Tls::load(TlsConfig { ca_certs: Some(good.certfile.clone()), ..good.clone() }).unwrap();
        let other = tempfile::tempdir().unwrap();
        let stranger = pair(other.path(), "localhost");
        let mixed = TlsConfig { keyfile: stranger.keyfile, ..good };
        assert!(matches!(Tls::load(mixed), Err(TlsError::Pair { .. })));
    }

    #[tokio::test(start_paused = true)]
    async fn a_changed_pair_is_taken_and_a_broken_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let config = pair(directory.path(), "localhost");
        let tls = Arc::new(Tls::load(config.clone()).unwrap());
        let first = tls.current.load_full();
        let watching = tokio::spawn({
            let tls = tls.clone();
            async move { tls.watch(EVERY, &Metrics::new()).await }
        });
        std::fs::write(&config.certfile, "broken").unwrap();
        tokio::time::sleep(EVERY * 3).await;
        assert!(Arc::ptr_eq(&first, &tls.current.load_full()));
        pair(directory.path(), "localhost.localdomain");
        tokio::time::sleep(EVERY * 3).await;
        assert!(!Arc::ptr_eq(&first, &tls.current.load_full()));
        watching.abort();
    }
}
