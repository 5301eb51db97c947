//! HTTPS: a certificate and its key from files, read again when they change.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use rustls::ServerConfig;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use super::stamp::Stamp;
use crate::{Error, Result};

/// The certificate that is shown now.
#[derive(Debug)]
pub struct Certificate {
    /// Chain, the server's own first; PEM.
    chain: PathBuf,
    /// PEM.
    key: PathBuf,
    provider: Arc<CryptoProvider>,
    stamp: RwLock<Stamp>,
    certified: RwLock<Arc<CertifiedKey>>,
}

impl Certificate {
    /// Errors: a file cannot be read or holds no such thing, or the key is another certificate's.
    pub fn open(chain: PathBuf, key: PathBuf) -> Result<Arc<Self>> {
        let provider = Arc::new(ring::default_provider());
        let stamp = Stamp::of([&chain, &key]);
        let certified = read(&chain, &key, &provider)?;
        let (stamp, certified) = (RwLock::new(stamp), RwLock::new(Arc::new(certified)));
        Ok(Arc::new(Certificate { chain, key, provider, stamp, certified }))
    }

    pub fn config(self: &Arc<Self>) -> Result<ServerConfig> {
        let versions = ServerConfig::builder_with_provider(self.provider.clone()).with_safe_default_protocol_versions();
        let builder = versions.map_err(Error::internal)?.with_no_client_auth();
        Ok(builder.with_cert_resolver(self.clone()))
    }

    /// Reads the files again if they have changed. Files that do not go together change nothing.
    pub fn refresh(&self) {
        let now = Stamp::of([&self.chain, &self.key]);
        if *self.stamp.read().unwrap_or_else(PoisonError::into_inner) == now {
            return;
        }
        *self.stamp.write().unwrap_or_else(PoisonError::into_inner) = now;
        match read(&self.chain, &self.key, &self.provider) {
            Ok(certified) => {
                tracing::info!("the certificate was read again");
                *self.certified.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(certified);
            }
            Err(e) => tracing::error!("the certificate stays as it is: {e}"),
        }
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello) -> Option<Arc<CertifiedKey>> {
        Some(self.certified.read().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

fn read(chain: &PathBuf, key: &PathBuf, provider: &CryptoProvider) -> Result<CertifiedKey> {
    let wrong = |path: &PathBuf, e: String| Error::bad_request(format!("{}: {e}", path.display()));
    let certificates = CertificateDer::pem_file_iter(chain)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| wrong(chain, e.to_string()))?;
    if certificates.is_empty() {
        return Err(wrong(chain, "holds no certificate in PEM".into()));
    }
    let secret = PrivateKeyDer::from_pem_file(key).map_err(|e| wrong(key, e.to_string()))?;
    CertifiedKey::from_der(certificates, secret, provider).map_err(|e| wrong(key, e.to_string()))
}
