use ring::hmac;
use serde_json::json;

use super::*;

#[path = "../../tests/suite/signer.rs"]
#[allow(unreachable_pub, reason = "shared with the black-box suite, where all is public")]
mod signer;

use signer::{Signer, encode};

const ALL: [Algorithm; 4] = [Algorithm::RS256, Algorithm::PS256, Algorithm::ES256, Algorithm::EdDSA];
const ISSUER: &str = "https://idp.example/";

fn keys(list: &[Value]) -> KeySet {
    KeySet::parse(json!({"keys": list}).to_string().as_bytes()).unwrap()
}

fn good_claims() -> Value {
    json!({"iss": ISSUER, "aud": "mirai", "exp": 2000, "azp": "chat"})
}

/// Everything at second 1000, with 10 seconds of skew.
fn judge(token: &str, keys: &KeySet, accepted: &[Algorithm]) -> Result<Map<String, Value>, TokenError> {
    let token = Compact::parse(token).ok_or(TokenError::Malformed)?;
    let algorithm = token.algorithm(accepted)?;
    token.verify(keys, algorithm)?;
    token.claims(ISSUER, &["mirai".to_owned()], 1000.0, 10.0)
}

#[test]
fn each_algorithm_verifies_its_own_signatures_and_no_others() {
    let signers = ["RS256", "PS256", "ES256", "EdDSA"].map(Signer::new);
    for (signer, own) in signers.iter().zip(ALL) {
        let (name, set) = (signer.algorithm(), keys(&[signer.jwk("k")]));
        let token = signer.token("k", &good_claims());
        assert_eq!(judge(&token, &set, &[own]).unwrap()["azp"], "chat", "{name}");
        assert_eq!(judge(&token, &set, &ALL).unwrap()["azp"], "chat", "{name}");
        let others: Vec<Algorithm> = ALL.into_iter().filter(|other| *other != own).collect();
        assert_eq!(judge(&token, &set, &others), Err(TokenError::Algorithm), "{name}");
        // One bit of each part.
        for part in 0..3 {
            let mut parts: Vec<Vec<u8>> = token.split('.').map(|part| decode(part).unwrap()).collect();
            let last = parts[part].len() - 3;
            parts[part][last] ^= 1;
            let forged = parts.iter().map(encode).collect::<Vec<_>>().join(".");
            assert!(judge(&forged, &set, &ALL).is_err(), "{name} {part}");
        }
        let stranger = Signer::new(if name == "EdDSA" { "ES256" } else { "EdDSA" });
        let forged = stranger.token_with(&json!({"alg": name, "kid": "k"}), &good_claims());
        assert_eq!(judge(&forged, &set, &ALL), Err(TokenError::Signature), "{name}");
        assert_eq!(
            judge(&signer.token("other", &good_claims()), &set, &ALL),
            Err(TokenError::UnknownKey),
            "{name}"
        );
    }
    // The same RSA key, named for one of its two algorithms.
    let mut jwk = signers[0].jwk("k");
    jwk["alg"] = "PS256".into();
    assert_eq!(
        judge(&signers[0].token("k", &good_claims()), &keys(&[jwk.clone()]), &ALL),
        Err(TokenError::UnknownKey)
    );
    assert!(judge(&signers[1].token("k", &good_claims()), &keys(&[jwk]), &ALL).is_ok());
    assert_eq!(
        judge(
            &signers[0].token_with(&json!({"alg": "PS256"}), &good_claims()),
            &keys(&[signers[0].jwk("k")]),
            &ALL
        ),
        Err(TokenError::Signature)
    );
}

#[test]
fn no_signature_and_one_made_with_a_public_key_are_refused() {
    let signer = Signer::new("RS256");
    let set = keys(&[signer.jwk("k")]);
    for alg in ["none", "None", "NONE", "", "HS256", "HS512", "RS1", "RS512", "rs256", "ES256K", "dir"] {
        let unsigned = format!(
            "{}.{}.",
            encode(json!({"alg": alg, "kid": "k"}).to_string()),
            encode(good_claims().to_string())
        );
        assert_eq!(judge(&unsigned, &set, &ALL), Err(TokenError::Algorithm), "{alg}");
    }
    // The public key as a secret, in the spellings that attackers try.
    let jwk = signer.jwk("k");
    for secret in [decode(jwk["n"].as_str().unwrap()).unwrap(), jwk.to_string().into_bytes()] {
        let head = json!({"alg": "HS256", "kid": "k", "typ": "JWT"});
        let signed = format!("{}.{}", encode(head.to_string()), encode(good_claims().to_string()));
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &secret), signed.as_bytes());
        assert_eq!(judge(&format!("{signed}.{}", encode(tag)), &set, &ALL), Err(TokenError::Algorithm));
    }
    // An empty signature under a good name.
    let empty = signer.token("k", &good_claims());
    let empty = &empty[..=empty.rfind('.').unwrap()];
    assert_eq!(judge(empty, &set, &ALL), Err(TokenError::Signature));
}

#[test]
fn whom_when_and_what_for_are_judged() {
    let signer = Signer::new("EdDSA");
    let set = keys(&[signer.jwk("k")]);
    let with = |changes: Value| {
        let mut claims = good_claims();
        for (name, value) in changes.as_object().unwrap() {
            if value.is_null() {
                claims.as_object_mut().unwrap().remove(name);
            } else {
                claims[name] = value.clone();
            }
        }
        judge(&signer.token("k", &claims), &set, &ALL).map(|_| ())
    };
    assert_eq!(with(json!({})), Ok(()));
    assert_eq!(with(json!({"aud": ["other", "mirai"], "nbf": 1010, "iat": 1010.0, "exp": 990.5})), Ok(()));
    for (changes, error) in [
        (json!({"iss": "https://idp.example"}), TokenError::Issuer),
        (json!({"iss": null}), TokenError::Issuer),
        (json!({"iss": [ISSUER]}), TokenError::Issuer),
        (json!({"aud": "Mirai"}), TokenError::Audience),
        (json!({"aud": null}), TokenError::Audience),
        (json!({"aud": []}), TokenError::Audience),
        (json!({"exp": 990}), TokenError::Expired),
        (json!({"exp": null}), TokenError::Expired),
        (json!({"exp": "2000"}), TokenError::Malformed),
        (json!({"exp": -1e300}), TokenError::Expired),
        (json!({"nbf": 1011}), TokenError::Early),
        (json!({"nbf": "1"}), TokenError::Malformed),
        (json!({"iat": 1011}), TokenError::Early),
        (json!({"typ": "ID"}), TokenError::Kind),
        (json!({"typ": "Refresh"}), TokenError::Kind),
    ] {
        assert_eq!(with(changes.clone()), Err(error), "{changes}");
    }
    for (header, error) in [
        (json!({"alg": "EdDSA", "typ": "dpop+jwt"}), TokenError::Kind),
        (json!({"alg": "EdDSA", "crit": ["exp"]}), TokenError::Malformed),
        (json!({"alg": "EdDSA", "kid": "k".repeat(257)}), TokenError::Malformed),
        (json!({"alg": ["EdDSA"]}), TokenError::Malformed),
        (json!({}), TokenError::Malformed),
        (json!([]), TokenError::Malformed),
    ] {
        assert_eq!(judge(&signer.token_with(&header, &good_claims()), &set, &ALL), Err(error), "{header}");
    }
    for header in [json!({"alg": "EdDSA"}), json!({"alg": "EdDSA", "typ": "at+JWT", "kid": "k"})] {
        assert!(judge(&signer.token_with(&header, &good_claims()), &set, &ALL).is_ok(), "{header}");
    }
}

#[test]
fn what_is_no_token_is_not_taken_for_one() {
    let token = Signer::new("EdDSA").token("k", &good_claims());
    let (signed, signature) = token.rsplit_once('.').unwrap();
    let twice = format!("{}.{}.{signature}", encode(r#"{"alg":"EdDSA","alg":"EdDSA"}"#), encode("{}"));
    for bad in [
        "",
        ".",
        "..",
        "a.b",
        "mirai-0123",
        signed,
        &format!("{token}."),
        &format!("{token}="),
        &format!("{token}.x"),
        &format!(" {token}"),
        &token.replace('.', "+"),
        &format!("{signed}./w=="),
        &format!("{}.{}.{signature}", encode("[]"), encode("{}")),
        &format!("{}.{}.{signature}", encode(r#"{"alg":"EdDSA"}"#), encode("1")),
        &twice,
        &format!("{}.{}.{signature}", encode(r#"{"alg":"EdDSA"}"#), encode("[".repeat(5000))),
        &"a".repeat(MAX_TOKEN + 1),
    ] {
        assert!(Compact::parse(bad).is_none(), "{bad}");
    }
    assert_eq!(Compact::parse(&token).unwrap().issuer(), Some(ISSUER));
}

#[test]
fn sets_keep_what_is_usable() {
    let (rsa, ec, ed) = (Signer::new("RS256"), Signer::new("ES256"), Signer::new("EdDSA"));
    let with = |mut jwk: Value, name: &str, value: Value| {
        jwk[name] = value;
        jwk
    };
    let unusable = [
        json!({"kty": "oct", "kid": "k", "k": "c2VjcmV0"}),
        json!({"kty": "RSA", "kid": "k"}),
        json!({"kty": "EC", "kid": "k", "crv": "P-384", "x": "AA", "y": "AA"}),
        json!("text"),
        with(rsa.jwk("k"), "use", json!("enc")),
        with(rsa.jwk("k"), "key_ops", json!(["sign"])),
        with(ec.jwk("k"), "x", json!("AAAA")),
        with(ed.jwk("k"), "x", json!("not base64!")),
        with(ed.jwk("k"), "crv", json!("X25519")),
        with(ed.jwk("k"), "kid", json!("k".repeat(257))),
    ];
    assert_eq!(KeySet::parse(json!({"keys": unusable}).to_string().as_bytes()), None);
    let mut list = unusable.to_vec();
    list.push(with(rsa.jwk("r"), "key_ops", json!(["verify"])));
    list.push(ec.jwk("e"));
    let set = keys(&list);
    assert_eq!(set.0.len(), 2);
    assert!(set.has(Some("r"), Algorithm::RS256) && set.has(Some("r"), Algorithm::PS256));
    assert!(set.has(None, Algorithm::ES256) && !set.has(Some("r"), Algorithm::ES256));
    assert!(!set.has(None, Algorithm::EdDSA));
    let many: Vec<Value> = (0..100).map(|i| ed.jwk(&format!("k{i}"))).collect();
    assert_eq!(keys(&many).0.len(), MAX_KEYS);
    for bad in ["", "[]", "{}", r#"{"keys": {}}"#, r#"{"keys": []}"#] {
        assert_eq!(KeySet::parse(bad.as_bytes()), None, "{bad}");
    }
}

/// RFC 8037, appendix A.4 and A.5: a signature that we did not make.
#[test]
fn the_published_example_verifies() {
    let set =
        keys(&[json!({"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"})]);
    let key = set.fitting(None, Algorithm::EdDSA).next().unwrap();
    let signed = b"eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc";
    let signature = "hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg";
    assert!(key.verifies(Algorithm::EdDSA, signed, &decode(signature).unwrap()));
    assert!(!key.verifies(Algorithm::EdDSA, &signed[1..], &decode(signature).unwrap()));
}
