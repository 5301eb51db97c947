//! How buckets and web servers are reached: as `object_store` does, with more certificates to trust.

use object_store::client::{HttpClient, HttpConnector, ReqwestConnector};
use object_store::{Certificate, ClientOptions, Result};
use rustls::crypto::ring;
use webpki_root_certs::TLS_SERVER_ROOT_CERTS;

/// Trusts the system's certificates and Mozilla's. Without the latter a system that has none, as small images of containers
/// are, could not so much as ask over plain HTTP: no client can be made that trusts nobody.
#[derive(Debug)]
pub struct Connector;

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> Result<HttpClient> {
        // Fails where one is installed already, which will do.
        let _ = ring::default_provider().install_default();
        let trusting = TLS_SERVER_ROOT_CERTS.iter().try_fold(options.clone(), |options, certificate| {
            Ok::<_, object_store::Error>(options.with_root_certificate(Certificate::from_der(certificate)?))
        });
        ReqwestConnector::default().connect(&trusting?)
    }
}
