//! TLS, mutual TLS.

use std::path::Path;
use std::sync::Arc;

use mirai_server::TlsConfig;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::client::{Answer, exchange, head};
use crate::support::*;

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Writes a certificate for `localhost` and its key.
    fn issue(&self, directory: &Path, name: &str) -> (std::path::PathBuf, std::path::PathBuf) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        let paths = (directory.join(format!("{name}.pem")), directory.join(format!("{name}.key")));
        std::fs::write(&paths.0, certificate.pem()).unwrap();
        std::fs::write(&paths.1, key.serialize_pem()).unwrap();
        paths
    }
}

async fn get(
    server: &TestServer,
    authority: &Authority,
    identity: Option<&(std::path::PathBuf, std::path::PathBuf)>,
) -> std::io::Result<Answer> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.0.pem().as_bytes()).unwrap()).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = match identity {
        None => builder.with_no_client_auth(),
        Some((chain, key)) => builder
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_file(chain).unwrap()],
                PrivateKeyDer::from_pem_file(key).unwrap(),
            )
            .unwrap(),
    };
    let stream = TcpStream::connect(server.address).await?;
    let name = ServerName::try_from("localhost").unwrap();
    let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
    exchange(stream, &head("GET", "/health", &[], None)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_and_mutual_tls() {
    let directory = tempfile::tempdir().unwrap();
    let (authority, stranger) = (Authority::new(), Authority::new());
    let (certfile, keyfile) = authority.issue(directory.path(), "server");
    let client = authority.issue(directory.path(), "client");
    let other = stranger.issue(directory.path(), "other");
    let ca = directory.path().join("ca.pem");
    std::fs::write(&ca, authority.0.pem()).unwrap();
    for ca_certs in [None, Some(ca)] {
        let mutual = ca_certs.is_some();
        let mut options = Options::default();
        options.config.tls =
            Some(TlsConfig { certfile: certfile.clone(), keyfile: keyfile.clone(), ca_certs });
        let server = TestServer::start(options).await;
        assert_eq!(get(&server, &authority, Some(&client)).await.unwrap().status, 200);
        assert_eq!(get(&server, &authority, None).await.is_ok(), !mutual);
        assert!(get(&server, &stranger, Some(&client)).await.is_err(), "the server is not who it should be");
        if mutual {
            assert!(get(&server, &authority, Some(&other)).await.is_err(), "a stranger's certificate");
        }
        assert!(crate::client::raw(server.address, b"GET / HTTP/1.1\r\n\r\n").await.is_err(), "plain text");
        server.stop().await;
    }
}
