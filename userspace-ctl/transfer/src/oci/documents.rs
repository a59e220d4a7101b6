// SPDX-License-Identifier: GPL-2.0

//! The JSON documents of container images, as much of them as is used.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::DeserializeOwned;
use serde::Deserialize;

use crate::error::{Error, Result};

/// The longest document that is read.
pub(crate) const MAX_DOCUMENT: u64 = 4 << 20;

/// A reference to a blob.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub(crate) media_type: String,
    pub(crate) digest: String,
    pub(crate) size: u64,
    pub(crate) platform: Option<Platform>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

impl Descriptor {
    /// The name that a layout gives an image.
    pub(crate) fn name(&self) -> Option<String> {
        let long = self.annotations.get("io.containerd.image.name");
        let short = self.annotations.get("org.opencontainers.image.ref.name");
        long.or(short).cloned()
    }

    pub(crate) fn has_name(&self, name: &str) -> bool {
        [
            "io.containerd.image.name",
            "org.opencontainers.image.ref.name",
        ]
        .iter()
        .any(|key| {
            self.annotations
                .get(*key)
                .is_some_and(|found| found == name)
        })
    }

    /// Whether it is something about an image, like how it was built.
    pub(crate) fn is_attachment(&self) -> bool {
        let unknown = self.platform.as_ref().is_some_and(|p| p.os == "unknown");
        unknown || self.annotations.contains_key("vnd.docker.reference.type")
    }

    pub(crate) fn is_index(&self) -> bool {
        matches!(
            self.media_type.as_str(),
            "application/vnd.oci.image.index.v1+json"
                | "application/vnd.docker.distribution.manifest.list.v2+json"
        )
    }
}

#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Platform {
    pub(crate) os: String,
    pub(crate) architecture: String,
    pub(crate) variant: Option<String>,
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

/// `index.json`, or an image index.
#[derive(Debug, Deserialize)]
pub(crate) struct Index {
    pub(crate) manifests: Vec<Descriptor>,
}

/// An image manifest.
#[derive(Debug, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) config: Descriptor,
    pub(crate) layers: Vec<Descriptor>,
}

/// An image configuration.
#[derive(Debug, Deserialize)]
pub(crate) struct Config {
    pub(crate) rootfs: RootFs,
}

#[derive(Debug, Deserialize)]
pub(crate) struct RootFs {
    /// The digests of the layers, unpacked.
    pub(crate) diff_ids: Vec<String>,
}

/// An entry of the `manifest.json` that `docker save` writes.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct DockerImage {
    pub(crate) config: String,
    repo_tags: Option<Vec<String>>,
    pub(crate) layers: Vec<String>,
}

impl DockerImage {
    pub(crate) fn tags(&self) -> Vec<String> {
        self.repo_tags.clone().unwrap_or_default()
    }
}

pub(crate) fn parse<T: DeserializeOwned>(bytes: &[u8], name: &str, document: &str) -> Result<T> {
    serde_json::from_slice(bytes)
        .map_err(|error| Error::damaged(name, format!("{document}: {error}")))
}
