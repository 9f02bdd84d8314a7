//! `key create|list|revoke`. A key's secret is made here and shown once; the queen is told its SHA-256 and nothing more.

use std::io::{self, Read};

use rbee_wire::job::OfKey;
use rbee_wire::key::{Hex, KeyCreate, KeyDigest, KeyLimits};
use rbee_wire::{JobRequest, Scope};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{call, the_one};
use crate::cli::{KeyArgs, KeyVerb};
use crate::connect::Start;
use crate::exit::Failure;
use crate::printer::{Outcome, Shown};
use crate::render;
use crate::settings::Context;

/// What every secret begins with, so that people and scanners for leaked secrets know it.
const PREFIX: &str = "rbee-";

/// Letters, digits, `-` and `_`: six bits each, none of which a URL, a header or a shell takes for something else.
const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

pub(crate) async fn key(context: &Context, verb: KeyVerb) -> Result<Outcome, Failure> {
    match verb {
        KeyVerb::Create(args) => create(context, args).await,
        KeyVerb::List => {
            let values = call(context, Start::Never, &JobRequest::KeyList {}).await?;
            let text = render::keys(&values);
            Ok(Shown::new(Value::Array(values), text).into())
        }
        KeyVerb::Revoke { key } => {
            let text = format!("{key} is revoked\n");
            // Where no queen runs, the file of the next one is what must change.
            let job = JobRequest::KeyRevoke(OfKey { key_id: key });
            Ok(Shown::new(the_one(call(context, Start::IfNeeded, &job).await?), text).into())
        }
    }
}

async fn create(context: &Context, args: KeyArgs) -> Result<Outcome, Failure> {
    let secret = secret()?;
    let new = KeyCreate {
        name: args.name,
        digest: digest(&secret),
        scopes: if args.scope.is_empty() { vec![Scope::Inference] } else { args.scope },
        limits: KeyLimits { max_concurrent: args.max_concurrent, rate: args.rate },
    };
    let mut made = the_one(call(context, Start::IfNeeded, &JobRequest::KeyCreate(new)).await?);
    let id = made["key_id"].as_str().unwrap_or_default().to_owned();
    context.printer.note(&format!(
        "this is the secret of {id}, which nothing shows again: pass it with --api-key or RBEE_API_KEY"
    ));
    if let Some(map) = made.as_object_mut() {
        map.insert("secret".into(), json!(secret));
    }
    Ok(Shown::new(made, format!("{secret}\n")).into())
}

fn digest(secret: &str) -> KeyDigest {
    let digest = Sha256::digest(secret.as_bytes());
    Hex(std::array::from_fn(|i| digest[i]))
}

/// 256 random bits of the operating system.
fn secret() -> io::Result<String> {
    let mut random = [0u8; 32];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut random)?;
    Ok(format!("{PREFIX}{}", base64url(&random)))
}

/// Six bits a letter, the last one's missing bits 0.
fn base64url(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let at = |i: usize| u32::from(three.get(i).copied().unwrap_or(0));
        let bits = at(0) << 16 | at(1) << 8 | at(2);
        for letter in 0..=three.len() {
            out.push(char::from(ALPHABET[(bits >> (18 - 6 * letter) & 63) as usize]));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_have_256_bits_and_no_two_are_the_same() {
        // Of RFC 4648, section 10, without the padding.
        for (bytes, text) in [("f", "Zg"), ("fo", "Zm8"), ("foo", "Zm9v"), ("foob", "Zm9vYg"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64url(bytes.as_bytes()), text);
        }
        assert_eq!(base64url(&[0xfb, 0xff]), "-_8");
        let (one, other) = (secret().unwrap(), secret().unwrap());
        assert!(one.len() == PREFIX.len() + 43 && one.starts_with(PREFIX), "{one}");
        assert_ne!(one, other);
        // As `printf %s abc | sha256sum` has it.
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(digest("abc").to_string(), abc);
    }
}
