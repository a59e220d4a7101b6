// SPDX-License-Identifier: GPL-2.0

//! Where a store in an object store is, and how to get there.
//!
//! `s3://BUCKET[/PREFIX][?OPTION=VALUE[&...]]`. What the location does not say comes from the environment variables
//! that other programs of S3 use: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, `AWS_REGION`,
//! `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`, `AWS_CA_BUNDLE`, and those for roles of machines and containers. Secrets
//! are no options: locations get into logs.

use std::path::PathBuf;

use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::{BackoffConfig, Certificate, ClientOptions, RetryConfig};

use crate::error::{Error, Result};
use crate::http::HttpOptions;
use crate::retry::RetryPolicy;

/// The options of a location, for messages.
const OPTIONS: &str = "endpoint, region, style (path or host), ca, anonymous (yes or no)";

/// A location, taken apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Location {
    pub(super) bucket: String,
    /// Without slashes at the ends; empty for the whole bucket.
    pub(super) prefix: String,
    endpoint: Option<String>,
    region: Option<String>,
    host_style: bool,
    ca: Option<PathBuf>,
    anonymous: bool,
}

impl Location {
    pub(super) fn parse(location: &str) -> Result<Self> {
        Location::take_apart(location).map_err(|why| Error::BadLocation {
            location: location.to_owned(),
            why,
        })
    }

    fn take_apart(location: &str) -> std::result::Result<Self, String> {
        let rest = location
            .strip_prefix("s3://")
            .ok_or("it does not begin with s3://")?;
        let (path, options) = rest.split_once('?').unwrap_or((rest, ""));
        let (bucket, prefix) = path.split_once('/').unwrap_or((path, ""));
        let good = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        if bucket.is_empty() || !bucket.chars().all(good) {
            return Err("it names no bucket: s3://BUCKET/PREFIX".to_owned());
        }
        let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
        let part =
            |part: &str| !part.is_empty() && part != "." && part != ".." && part.chars().all(good);
        if !prefix.is_empty() && !prefix.split('/').all(part) {
            return Err(
                "its prefix may have letters, digits, '-', '.', '_' and single slashes".to_owned(),
            );
        }
        let mut parsed = Location {
            bucket: bucket.to_owned(),
            prefix: prefix.to_owned(),
            ..Location::default()
        };
        for option in options.split('&').filter(|option| !option.is_empty()) {
            let (key, value) = option.split_once('=').unwrap_or((option, ""));
            parsed.set(key, value)?;
        }
        Ok(parsed)
    }

    fn set(&mut self, key: &str, value: &str) -> std::result::Result<(), String> {
        let bad = || format!("{value:?} is no value of the option {key}");
        match (key, value) {
            ("endpoint", url) => {
                let http = ["http://", "https://"]
                    .iter()
                    .any(|scheme| url.starts_with(scheme));
                self.endpoint = Some(Some(url).filter(|_| http).ok_or_else(bad)?.to_owned());
            }
            ("region", "") | ("ca", "") => return Err(bad()),
            ("region", region) => self.region = Some(region.to_owned()),
            ("ca", path) => self.ca = Some(PathBuf::from(path)),
            ("style", "path") => self.host_style = false,
            ("style", "host") => self.host_style = true,
            ("anonymous", "yes") => self.anonymous = true,
            ("anonymous", "no") => self.anonymous = false,
            ("style" | "anonymous", _) => return Err(bad()),
            _ => return Err(format!("there is no option {key:?}, only {OPTIONS}")),
        }
        Ok(())
    }

    /// Makes the client; nothing is contacted.
    pub(super) fn client(&self, location: &str, options: &HttpOptions) -> Result<AmazonS3> {
        let bad = |why: String| Error::BadLocation {
            location: location.to_owned(),
            why,
        };
        let retry = RetryPolicy::default();
        let mut builder = AmazonS3Builder::from_env()
            .with_bucket_name(&self.bucket)
            .with_virtual_hosted_style_request(self.host_style)
            .with_client_options(self.client_options(options)?)
            .with_retry(RetryConfig {
                backoff: BackoffConfig {
                    init_backoff: retry.first_delay,
                    max_backoff: retry.max_delay,
                    base: 2.0,
                },
                max_retries: RETRIES,
                retry_timeout: options.read_timeout * 4,
            });
        if let Some(endpoint) = self.endpoint() {
            builder = builder.with_endpoint(endpoint);
        }
        if let Some(region) = &self.region {
            builder = builder.with_region(region);
        }
        if self.anonymous {
            builder = builder.with_skip_signature(true);
        }
        builder.build().map_err(|error| bad(error.to_string()))
    }

    fn endpoint(&self) -> Option<String> {
        let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let endpoint = self.endpoint.clone();
        endpoint
            .or_else(|| variable("AWS_ENDPOINT_URL_S3"))
            .or_else(|| variable("AWS_ENDPOINT_URL"))
    }

    fn client_options(&self, options: &HttpOptions) -> Result<ClientOptions> {
        let mut client = ClientOptions::new()
            // Only what the endpoint says: https stays https.
            .with_allow_http(
                self.endpoint()
                    .is_some_and(|url| url.starts_with("http://")),
            )
            .with_connect_timeout(options.connect_timeout)
            .with_read_timeout(options.read_timeout)
            .with_timeout(options.read_timeout * 8)
            .with_pool_max_idle_per_host(options.connections);
        let ca = self.ca.clone().or_else(|| options.ca_file.clone());
        let variable = std::env::var_os("AWS_CA_BUNDLE").filter(|value| !value.is_empty());
        if let Some(path) = ca.or_else(|| variable.map(PathBuf::from)) {
            let what = format!("cannot read the certificates in {}", path.display());
            let pem = std::fs::read(&path).map_err(|error| Error::io(&what, error))?;
            let bundle = Certificate::from_pem_bundle(&pem)
                .map_err(|error| Error::io(&what, std::io::Error::other(error)))?;
            for certificate in bundle {
                client = client.with_root_certificate(certificate);
            }
        }
        Ok(client)
    }
}

/// How often the client itself repeats a request that failed for the moment: a node of a cluster may be gone.
const RETRIES: usize = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_taken_apart() {
        let parsed = Location::parse(
            "s3://images.lab/a/b/?endpoint=http://127.0.0.1:3900&region=garage&style=path",
        );
        let parsed = parsed.unwrap();
        assert_eq!(
            (parsed.bucket.as_str(), parsed.prefix.as_str()),
            ("images.lab", "a/b")
        );
        assert_eq!(parsed.endpoint.as_deref(), Some("http://127.0.0.1:3900"));
        assert_eq!(parsed.region.as_deref(), Some("garage"));
        assert_eq!(Location::parse("s3://bucket").unwrap().prefix, "");
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in [
            "s3://",
            "s3:///prefix",
            "s3://bucket/../other",
            "s3://bucket//x",
            "s3://bucket/a b",
            "s3://bucket?secret=x",
            "s3://bucket?endpoint=ftp://x",
            "s3://bucket?region=",
            "s3://bucket?style=odd",
            "s3://user:word@bucket/",
        ] {
            let error = Location::parse(bad).unwrap_err();
            assert!(matches!(error, Error::BadLocation { .. }), "{bad}: {error}");
        }
    }
}
