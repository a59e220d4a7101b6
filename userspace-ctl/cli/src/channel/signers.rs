// SPDX-License-Identifier: GPL-2.0

//! Who signed a release, for people and for programs.

use pristine_store::{SignedRelease, TrustPolicy};
use pristine_trust::{Keys, Signature};
use serde::Serialize;

/// A signature.
#[derive(Clone, Debug, Serialize)]
pub struct SignedBy {
    /// The id of the key.
    pub key: String,
    /// What the key is called here, if it is trusted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Whether it is a good signature of a trusted key.
    pub trusted: bool,
}

/// Who signed a release, as far as can be told with these keys.
pub fn signed_by(release: &SignedRelease, keys: &Keys) -> Vec<SignedBy> {
    let text = release.text().as_bytes();
    let signatures = release.signatures().iter();
    let signatures = signatures.flat_map(|signature| signature.parse::<Signature>());
    let signed_by = |signature: Signature| {
        let mut good = keys.with_id(signature.key_id());
        let good = good.find(|key| signature.verify(key, text));
        SignedBy {
            key: signature.key_id().to_string(),
            label: good.and_then(|key| key.label()).map(str::to_owned),
            trusted: good.is_some(),
        }
    };
    signatures.map(signed_by).collect()
}

/// Why a release is not trusted; `None` if it is, or if nobody need have signed it.
pub fn distrust(release: &SignedRelease, policy: &TrustPolicy) -> Option<String> {
    match release.check(policy, "") {
        Ok(_) => None,
        Err(pristine_store::Error::Untrusted { error, .. }) => Some(error.to_string()),
        Err(error) => Some(error.to_string()),
    }
}

/// In one cell of a table.
pub fn cell(signed_by: &[SignedBy]) -> String {
    let one = |signer: &SignedBy| match (&signer.label, signer.trusted) {
        (Some(label), _) => label.clone(),
        (None, true) => signer.key.clone(),
        (None, false) => format!("{}?", signer.key),
    };
    match signed_by {
        [] => "-".to_owned(),
        several => several.iter().map(one).collect::<Vec<_>>().join(" "),
    }
}
