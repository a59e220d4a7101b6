// SPDX-License-Identifier: GPL-2.0

//! The errors of the client of S3 as errors of stores.

use object_store::client::{HttpError, HttpErrorKind};

use crate::error::Error;

/// What `error` is for somebody who asked `location` for `what`.
pub(super) fn translate(location: &str, what: &str, error: object_store::Error) -> Error {
    let location = location.to_owned();
    let text = chain(&error);
    let object = what.to_owned();
    if text.contains("<Code>NoSuchBucket<") || text.contains("Code: NoSuchBucket") {
        let object = "the bucket".to_owned();
        return Error::NotFound { location, object };
    }
    match &error {
        object_store::Error::NotFound { .. } => return Error::NotFound { location, object },
        object_store::Error::PermissionDenied { .. }
        | object_store::Error::Unauthenticated { .. } => {
            let why = service_says(&text).unwrap_or_else(|| "it gives no reason".to_owned());
            return Error::Refused {
                location,
                object,
                why,
            };
        }
        object_store::Error::NotImplemented { .. } | object_store::Error::NotSupported { .. } => {
            return Error::Unsupported {
                location,
                what: format!("do what {what} needs: {text}"),
            };
        }
        _ => (),
    }
    if let Some(status) = status(&text) {
        return match status {
            // It may be a redirect to another region, or bad arguments: the service says what.
            300..=499 if !matches!(status, 408 | 416 | 425 | 429) => Error::Refused {
                location,
                object,
                why: service_says(&text).unwrap_or_else(|| format!("HTTP {status}")),
            },
            _ => Error::Status {
                location,
                object,
                status,
            },
        };
    }
    match transport(&error) {
        Some(HttpErrorKind::Timeout) => Error::Timeout {
            location,
            why: format!("timeout for {what}"),
        },
        Some(HttpErrorKind::Connect) => Error::Unreachable {
            location,
            why: innermost(&error),
        },
        Some(HttpErrorKind::Decode) => Error::Protocol {
            location,
            object,
            why: innermost(&error),
        },
        Some(_) => Error::Unreachable {
            location,
            why: format!("{} (for {what})", innermost(&error)),
        },
        // What is left are answers that make no sense, and credentials that are not found.
        None if text.contains("redential") || text.contains("169.254.") => Error::Refused {
            location,
            object,
            why: format!(
                "no credentials (set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY): {}",
                innermost(&error)
            ),
        },
        None => Error::Protocol {
            location,
            object,
            why: text,
        },
    }
}

fn sources<'a>(
    error: &'a object_store::Error,
) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    let first: &(dyn std::error::Error + 'static) = error;
    std::iter::successors(Some(first), |error| error.source())
}

fn chain(error: &object_store::Error) -> String {
    error.to_string()
}

fn innermost(error: &object_store::Error) -> String {
    sources(error)
        .last()
        .map(ToString::to_string)
        .unwrap_or_default()
}

fn transport(error: &object_store::Error) -> Option<HttpErrorKind> {
    let mut errors = sources(error).filter_map(|error| error.downcast_ref::<HttpError>());
    errors.next().map(HttpError::kind)
}

/// The HTTP status; the client's errors tell it in their text alone.
fn status(text: &str) -> Option<u16> {
    let (_, rest) = text.split_once("status code: ")?;
    rest.get(..3)?.parse().ok()
}

/// `Code: Message` of an answer in S3's XML.
fn service_says(text: &str) -> Option<String> {
    let element = |name: &str| {
        let (_, rest) = text.split_once(&format!("<{name}>"))?;
        let (value, _) = rest.split_once("</")?;
        Some(value.chars().take(200).collect::<String>())
    };
    let code = element("Code")?;
    match element("Message") {
        Some(message) if !message.is_empty() => Some(format!("{code}: {message}")),
        _ => Some(code),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn generic(text: &str) -> Error {
        let error = object_store::Error::Generic {
            store: "S3",
            source: text.to_owned().into(),
        };
        translate("s3://b", "pack 1", error)
    }

    #[test]
    fn statuses_are_classified() {
        let busy = generic("Server returned non-2xx status code: 503 Service Unavailable: ");
        assert!(busy.is_transient(), "{busy}");
        let bad = generic(
            "Server returned non-2xx status code: 400 Bad Request: <Error><Code>InvalidDigest</Code>\
             <Message>no</Message></Error>",
        );
        assert_eq!(bad.kind(), ErrorKind::Denied);
        assert!(bad.to_string().contains("InvalidDigest: no"), "{bad}");
        let odd = generic("who knows");
        assert!(odd.is_transient(), "{odd}");
    }
}
