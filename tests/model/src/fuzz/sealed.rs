// SPDX-License-Identifier: GPL-2.0

//! Encrypted objects and wrapped keys: good ones that were changed, with their digests made right where the input asks for
//! that. Whatever is read is what was sealed, or is refused.

use std::ops::Range;
use std::sync::OnceLock;

use arbitrary::Arbitrary;
use pristine_image::{Digest, PackId};
use pristine_seal::age::{decrypt, Identities};
use pristine_seal::object::{self, Head, Public, HEAD_LEN};
use pristine_seal::{pack, StoreKey};

const PATH: &str = "images/x.manifest";
const IDENTITY: &str = "AGE-SECRET-KEY-1XMWWC06LY3EE5RYTXM9MFLAZ2U56JJJ36S0MYPDRWSVLUL66MV4QX3S7F6";

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    flips: Vec<(u16, u8)>,
    cut: Option<u16>,
    good_head: bool,
    good_digest: bool,
    from: u16,
    len: u16,
    public: &'a [u8],
    text: &'a str,
}

struct Good {
    key: StoreKey,
    content: Vec<u8>,
    object: Vec<u8>,
    pack: Vec<u8>,
    wrapped: Vec<u8>,
    identities: Identities,
}

fn good() -> &'static Good {
    static GOOD: OnceLock<Good> = OnceLock::new();
    GOOD.get_or_init(|| {
        let key = StoreKey::from_bytes([7; 32]);
        let content: Vec<u8> = (0..9000).map(|n| (n % 251) as u8).collect();
        let public = Public {
            size: Some(4096),
            recipients: vec!["age1".to_owned()],
            packs: vec![(PackId::from_bytes([3; 32]), 5)],
        };
        let identities: Identities = IDENTITY.parse().unwrap();
        Good {
            object: object::seal(&key, PATH, &public, &content).unwrap(),
            pack: pack::seal(&key, &PackId::new(Digest::of(&content)), &content).unwrap(),
            wrapped: key.wrap(&[identities.0[0].recipient()]).unwrap(),
            key,
            content,
            identities,
        }
    })
}

fn changed(good: &[u8], input: &Input<'_>) -> Vec<u8> {
    let mut bytes = good.to_vec();
    for &(at, bits) in &input.flips {
        let len = bytes.len();
        bytes[usize::from(at) % len] ^= bits;
    }
    if let Some(cut) = input.cut {
        bytes.truncate(usize::from(cut));
    }
    if input.good_digest && bytes.len() > 32 {
        let at = bytes.len() - 32;
        let digest = Digest::of(&bytes[..at]);
        bytes[at..].copy_from_slice(digest.as_bytes());
    }
    bytes
}

pub(super) fn run(data: &[u8]) {
    let _ = Head::check_all(data);
    let _ = decrypt(data, &good().identities.0);
    let Some(input) = super::read::<Input<'_>>(data) else {
        return;
    };
    let _ = input.text.parse::<Identities>();
    let start = u64::from(input.from) % 9000;
    let range = start..(start + u64::from(input.len)).min(9000);
    run_object(&input, &range);
    run_pack(&input, &range);
    let file = changed(&good().wrapped, &input);
    if let Ok(key) = StoreKey::unwrap(&file, &good().identities.0, good().key.id()) {
        assert_eq!(key.blinding(), good().key.blinding());
    }
    if let Ok(public) = Public::parse(input.public) {
        assert_eq!(Public::parse(&public.encode()).as_ref(), Ok(&public));
    }
}

fn run_object(input: &Input<'_>, range: &Range<u64>) {
    let good = good();
    let mut bytes = changed(&good.object, input);
    if input.good_head && bytes.len() as u64 > HEAD_LEN {
        let check = Digest::of(&bytes[..128]);
        bytes[128..160].copy_from_slice(check.as_bytes());
    }
    let Ok(head) = Head::parse(&bytes) else {
        return;
    };
    let _ = Head::check_all(&bytes);
    let Ok(stored) = head.range(range) else {
        return;
    };
    let stored = bytes.get(stored.start as usize..stored.end as usize);
    let opened = head.open(&good.key, PATH, range, stored.unwrap_or_default());
    if let Ok(opened) = opened {
        assert_eq!(
            opened,
            good.content[range.start as usize..range.end as usize]
        );
    }
}

fn run_pack(input: &Input<'_>, range: &Range<u64>) {
    let good = good();
    let id = PackId::new(Digest::of(&good.content));
    let bytes = changed(&good.pack, input);
    if let Ok(opened) = pack::open(&good.key, &id, &bytes) {
        assert_eq!(opened, good.content);
    }
    let stored = pristine_seal::chunks::sealed_range(range);
    let stored = bytes.get(stored.start as usize..stored.end as usize);
    if let Ok(part) = pack::open_range(&good.key, &id, range, stored.unwrap_or_default()) {
        assert_eq!(part, good.content[range.start as usize..range.end as usize]);
    }
    if let Ok((last, count)) = pack::last_chunk(bytes.len() as u64) {
        let last = &bytes[last.start as usize..last.end as usize];
        if let Ok(len) = pack::content_len(&good.key, &id, count, last) {
            assert_eq!(len, 9000);
        }
    }
}
