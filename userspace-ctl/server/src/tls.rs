// SPDX-License-Identifier: GPL-2.0

//! TLS: certificates from files, HTTP/2 by ALPN, and the names in clients' certificates.

use std::fmt::Display;
use std::path::Path;
use std::sync::Arc;

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::error::ServeError;
use crate::settings::TlsFiles;

/// HTTP/2's name in ALPN.
const H2: &[u8] = b"h2";

/// Makes a configuration of these files. TLS 1.2 and 1.3, with the provider's safe defaults.
pub(crate) fn config(files: &TlsFiles) -> Result<Arc<ServerConfig>, ServeError> {
    let bad = |file: &Path, why: &dyn Display| ServeError::Tls {
        file: file.to_owned(),
        why: why.to_string(),
    };
    let certificates = certificates(&files.certificate)?;
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| bad(&files.key, &error))?;
    let provider = Arc::new(ring::default_provider());
    let config = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| bad(&files.certificate, &error))?;
    let config = match &files.client_ca {
        None => config.with_no_client_auth(),
        Some(file) => {
            let mut roots = RootCertStore::empty();
            for certificate in self::certificates(file)? {
                roots.add(certificate).map_err(|error| bad(file, &error))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider)
                .allow_unauthenticated()
                .build()
                .map_err(|error| bad(file, &error))?;
            config.with_client_cert_verifier(verifier)
        }
    };
    let mut config = config
        .with_single_cert(certificates, key)
        .map_err(|error| bad(&files.certificate, &error))?;
    config.alpn_protocols = vec![H2.to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, ServeError> {
    let bad = |why: String| ServeError::Tls {
        file: file.to_owned(),
        why,
    };
    let read = CertificateDer::pem_file_iter(file).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(found) if found.is_empty() => Err(bad("it has no certificate".to_owned())),
        Ok(found) => Ok(found),
        Err(error) => Err(bad(error.to_string())),
    }
}

/// Whether the client chose HTTP/2.
pub(crate) fn is_h2(connection: &rustls::ServerConnection) -> bool {
    connection.alpn_protocol() == Some(H2)
}

/// The names in the client's certificate, which was verified in the handshake: DNS names, e-mail addresses and the common name,
/// in lower case.
pub(crate) fn client_names(connection: &rustls::ServerConnection) -> Vec<String> {
    let certificate = connection
        .peer_certificates()
        .and_then(|certificates| certificates.first());
    let Some(certificate) = certificate else {
        return Vec::new();
    };
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else {
        return Vec::new();
    };
    let mut names = Vec::new();
    if let Ok(Some(alternative)) = certificate.subject_alternative_name() {
        for name in &alternative.value.general_names {
            if let GeneralName::DNSName(name) | GeneralName::RFC822Name(name) = name {
                names.push(name.to_ascii_lowercase());
            }
        }
    }
    let common = certificate.subject().iter_common_name();
    names.extend(common.filter_map(|name| Some(name.as_str().ok()?.to_ascii_lowercase())));
    names
}
