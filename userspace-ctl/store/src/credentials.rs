// SPDX-License-Identifier: GPL-2.0

//! How a client of a web server shows who it is, and whom it trusts: a token, a client certificate, an authority.

use std::fmt;
use std::path::{Path, PathBuf};

use ureq::http::header::{HeaderValue, AUTHORIZATION};
use ureq::middleware::MiddlewareNext;
use ureq::{Body, SendBody};

use crate::error::{Error, Result};
use crate::http::HttpOptions;

/// The environment's variable with a token.
pub const TOKEN_VARIABLE: &str = "PRISTINE_TOKEN";
const TOKEN: &str = TOKEN_VARIABLE;
/// A file with the token.
const TOKEN_FILE: &str = "PRISTINE_TOKEN_FILE";
/// A client certificate, and its key.
const CLIENT_CERT: &str = "PRISTINE_CLIENT_CERT";
const CLIENT_KEY: &str = "PRISTINE_CLIENT_KEY";
/// The authorities to trust.
const CA_FILE: &str = "PRISTINE_CA_FILE";

/// A secret text that a server knows this client by.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(HeaderValue);

impl Token {
    /// Takes a token as text; white space around it does not count.
    ///
    /// # Errors
    /// [`Error::Credentials`] if it has characters that no token has.
    pub fn new(text: &str) -> Result<Self> {
        let text = text.trim();
        let visible = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
        let value = HeaderValue::from_str(&format!("Bearer {text}")).ok();
        let mut value = value
            .filter(|_| visible)
            .ok_or_else(|| Error::Credentials {
                what: "the token".to_owned(),
                why: "it is not one word of visible ASCII".to_owned(),
            })?;
        value.set_sensitive(true);
        Ok(Token(value))
    }

    /// Reads a token from a file that has nothing else.
    ///
    /// # Errors
    /// [`Error::Credentials`].
    pub fn read(path: &Path) -> Result<Self> {
        Token::new(&read_text(path)?)
    }

    /// The token itself; not to be shown.
    pub fn as_str(&self) -> &str {
        let text = self.0.to_str().unwrap_or_default();
        text.strip_prefix("Bearer ").unwrap_or_default()
    }

    /// Adds the token to each request.
    pub(crate) fn middleware(
        self,
    ) -> impl Fn(
        ureq::http::Request<SendBody>,
        MiddlewareNext,
    ) -> std::result::Result<ureq::http::Response<Body>, ureq::Error> {
        move |mut request, next| {
            request.headers_mut().insert(AUTHORIZATION, self.0.clone());
            next.handle(request)
        }
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// A client certificate and its key, in PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientFiles {
    /// The certificate, and those between it and the root.
    pub certificate: PathBuf,
    /// The private key.
    pub key: PathBuf,
}

impl HttpOptions {
    /// The default, with the credentials that the environment names: `PRISTINE_TOKEN` or `PRISTINE_TOKEN_FILE`,
    /// `PRISTINE_CLIENT_CERT` with `PRISTINE_CLIENT_KEY`, and `PRISTINE_CA_FILE`.
    ///
    /// # Errors
    /// [`Error::Credentials`].
    pub fn from_environment() -> Result<Self> {
        HttpOptions::from_variables(|name| std::env::var_os(name).filter(|value| !value.is_empty()))
    }

    fn from_variables(variable: impl Fn(&str) -> Option<std::ffi::OsString>) -> Result<Self> {
        let file = |name| variable(name).map(PathBuf::from);
        let token = match (variable(TOKEN), file(TOKEN_FILE)) {
            (Some(token), _) => Some(Token::new(&token.to_string_lossy())?),
            (None, Some(path)) => Some(Token::read(&path)?),
            (None, None) => None,
        };
        let client = match (file(CLIENT_CERT), file(CLIENT_KEY)) {
            (Some(certificate), Some(key)) => Some(ClientFiles { certificate, key }),
            (None, None) => None,
            _ => {
                return Err(Error::Credentials {
                    what: "the client certificate".to_owned(),
                    why: format!("{CLIENT_CERT} and {CLIENT_KEY} belong together"),
                });
            }
        };
        Ok(HttpOptions {
            token,
            client,
            ca_file: file(CA_FILE),
            ..HttpOptions::default()
        })
    }
}

fn unusable(path: &Path, why: impl fmt::Display) -> Error {
    Error::Credentials {
        what: path.display().to_string(),
        why: why.to_string(),
    }
}

fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|error| unusable(path, error))
}

/// The client certificate that these options name.
#[cfg(feature = "tls")]
pub(crate) fn client_certificate(options: &HttpOptions) -> Result<Option<ureq::tls::ClientCert>> {
    use ureq::tls::{ClientCert, PrivateKey};

    let Some(ClientFiles { certificate, key }) = &options.client else {
        return Ok(None);
    };
    let text = read_text(key)?;
    let private = PrivateKey::from_pem(text.as_bytes()).map_err(|why| unusable(key, why))?;
    let chain = certificates(certificate)?;
    Ok(Some(ClientCert::new_with_certs(&chain, private)))
}

#[cfg(feature = "tls")]
fn certificates(path: &Path) -> Result<Vec<ureq::tls::Certificate<'static>>> {
    use ureq::tls::{parse_pem, PemItem};

    let text = read_text(path)?;
    let mut found = Vec::new();
    for item in parse_pem(text.as_bytes()) {
        if let PemItem::Certificate(certificate) = item.map_err(|why| unusable(path, why))? {
            found.push(certificate);
        }
    }
    match found.is_empty() {
        true => Err(unusable(path, "it has no certificate in PEM form")),
        false => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_words_and_are_not_shown() {
        let token = Token::new(" abc\n").unwrap();
        assert_eq!(token.0.to_str().unwrap(), "Bearer abc");
        assert_eq!(token.as_str(), "abc");
        assert_eq!(format!("{token:?}"), "Token(..)");
        for bad in ["", " ", "a b", "a\r\nb", "ä"] {
            assert!(Token::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_environment_names_credentials() {
        let options = |set: &[(&str, &str)]| {
            HttpOptions::from_variables(|name| {
                let found = set.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| value.into())
            })
        };
        let none = options(&[]).unwrap();
        assert!(none.token.is_none() && none.client.is_none() && none.ca_file.is_none());
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "secret\n").unwrap();
        let path = file.path().to_str().unwrap();
        let read = options(&[(TOKEN_FILE, path)]).unwrap();
        assert_eq!(read.token, Some(Token::new("secret").unwrap()));
        let both = options(&[(TOKEN_FILE, "/nowhere"), (TOKEN, "x")]).unwrap();
        assert_eq!(both.token, Some(Token::new("x").unwrap()));
        let error = options(&[(TOKEN_FILE, "/nowhere")]).unwrap_err();
        assert!(error.to_string().contains("/nowhere"), "{error}");
        assert!(options(&[(CLIENT_CERT, "x")]).is_err());
        let client = options(&[(CLIENT_CERT, "x"), (CLIENT_KEY, "y")]).unwrap();
        assert_eq!(client.client.unwrap().key, PathBuf::from("y"));
    }
}
