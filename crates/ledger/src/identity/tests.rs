use super::*;

fn pepper(version: u32) -> Pepper {
    Pepper::new(version, &[version as u8; 32]).unwrap()
}

#[test]
fn a_new_key_is_found_and_its_stanza_does_not_tell_it() {
    let (old, new) = (pepper(1), pepper(2));
    let (a, b, c) = (
        NewKey::new("a-1", &old).unwrap(),
        NewKey::new("a-2", &new).unwrap(),
        NewKey::new("b-1", &new).unwrap(),
    );
    let file = format!(
        "[[application]]\nname = \"a\"\n{}{}\n[[application]]\nname = \"b\"\nweight = 3\n\
         [application.quota]\ntokens_per_day = 30000000\n{}",
        a.stanza, b.stanza, c.stanza
    );
    let all = Applications::parse(&file).unwrap();
    let peppers = [new.clone(), old.clone()];
    let who = |key: &str, peppers: &[Pepper]| {
        let caller = all.caller(key, peppers)?;
        Some((caller.application.name.clone(), caller.key_id.to_string(), caller.key_version))
    };
    assert_eq!(who(&a.key, &peppers), Some(("a".into(), "a-1".into(), 1)));
    assert_eq!(who(&b.key, &peppers), Some(("a".into(), "a-2".into(), 2)));
    assert_eq!(who(&c.key, &peppers), Some(("b".into(), "b-1".into(), 2)));
    assert_eq!(all.all()[1].quota.tokens_per_day, Some(30_000_000));
    assert_eq!((all.all()[0].weight, all.all()[1].weight), (1, 3));
    // Without its pepper, altered, or as what the file holds, a key is nothing.
    assert_eq!(who(&a.key, &[new]), None);
    assert_eq!(who(&a.key, &[Pepper::new(1, &[9; 32]).unwrap()]), None);
    let long = "k".repeat(MAX_KEY + 1);
    for wrong in ["", "mirai-", &a.key[1..], &a.key.to_uppercase(), &old.hash(&a.key).to_string(), &long] {
        assert_eq!(who(wrong, &peppers), None, "{wrong}");
    }
    for key in [&a, &b, &c] {
        assert!(key.key.len() == 70 && !file.contains(&key.key[6..]));
        assert!(!format!("{key:?}").contains(&key.key));
    }
    assert!(NewKey::new("No", &old).is_none());
    assert_eq!(format!("{old:?}"), "Pepper { version: 1, .. }");
}

#[test]
fn applications_are_found_by_name_and_by_their_names_elsewhere() {
    let hash = |digit: char| digit.to_string().repeat(64);
    let file = format!(
        "[[application]]\nname = \"a\"\ncache_group = \"g\"\nscopes = [\"infer\", \"admin\"]\n\
         [[application.client]]\nprovider = \"keycloak\"\nid = \"Chat@1\"\n\
         [[application.key]]\nid = \"a1\"\npepper = 1\nhash = \"{}\"\nscopes = [\"read-usage\"]\n\
         [[application.key]]\nid = \"a2\"\npepper = 1\nhash = \"{}\"\n\
         [[application]]\nname = \"b\"\ngateway = true\n\
         [[application.client]]\nprovider = \"zitadel\"\nid = \"Chat@1\"\n",
        hash('1'),
        hash('2'),
    );
    let all = Applications::parse(&file).unwrap();
    let client = |provider: &str, id: &str| all.client(provider, id).map(|found| found.name.as_str());
    assert_eq!((client("keycloak", "Chat@1"), client("zitadel", "Chat@1")), (Some("a"), Some("b")));
    assert_eq!(
        (client("keycloak", "chat@1"), client("other", "Chat@1"), client("zitadel", "b")),
        (None, None, None)
    );
    let a = all.named("a").unwrap();
    assert_eq!(a.key_ids().collect::<Vec<_>>(), ["a1", "a2"]);
    assert_eq!(a.clients().collect::<Vec<_>>(), [("keycloak", "Chat@1")]);
    assert_eq!((a.cache_group.as_deref(), a.gateway, all.keys()), (Some("g"), false, 2));
    assert!(all.named("b").unwrap().gateway && all.named("c").is_none());
    let scopes = |digit: char| {
        let hash = hash(digit).parse().unwrap();
        all.callers[&(1, hash)].scopes.words().collect::<Vec<_>>()
    };
    assert_eq!(scopes('1'), ["read-usage"], "a key's own");
    assert_eq!(scopes('2'), ["infer", "admin"], "its application's");
    assert_eq!(all.named("b").unwrap().scopes, Scopes::INFER);
}

#[test]
fn what_is_wrong_is_named_by_place_and_never_quoted() {
    let key =
        |id: &str, hash: &str| format!("[[application.key]]\nid = \"{id}\"\npepper = 1\nhash = \"{hash}\"\n");
    let (h, other) = ("ab".repeat(32), "cd".repeat(32));
    let app = "[[application]]\nname = \"a\"\n";
    let many: String = (0..17).map(|i| key(&format!("k{i}"), &format!("{i:064x}"))).collect();
    let client = |provider: &str, id: &str| {
        format!("[[application.client]]\nprovider = \"{provider}\"\nid = \"{id}\"\n")
    };
    let clients: String = (0..65).map(|i| client("p", &format!("c{i}"))).collect();
    let cases = [
        ("x = 'canary'".to_owned(), "line 1: unknown field"),
        (format!("{app}weight = \"canary\"\n"), "line 3: invalid type"),
        (format!("{app}canary = 1\n"), "line 3: unknown field"),
        (format!("{app}{}", key("a", "canary")), "line 6: expected hexadecimal digits"),
        (format!("{app}{}", key("Canary", &h)), "number 1: a key's id must be"),
        (format!("{app}weight = 0"), "number 1: weight 0"),
        ("[[application]]\nname = \"canary!\"".to_owned(), "number 1: the name must be"),
        (format!("{app}{app}"), "number 2: the name was there before"),
        (format!("{app}{}{}", key("k", &h), key("k", &other)), "the key id was there before"),
        (format!("{app}{}{}", key("k", &h), key("l", &h)), "the key's hash was there before"),
        (format!("{app}{many}"), "17 keys, at most 16"),
        ("[[application]]\n".repeat(2), "line 1: missing field"),
        (format!("{app}scopes = [\"canary\"]"), "line 3: a scope is infer"),
        (format!("{app}cache_group = \"Canary\""), "number 1: the cache group must be"),
        (format!("{app}{}", client("Canary", "x")), "number 1: a client's provider must be"),
        (format!("{app}{}", client("p", "cana ry")), "number 1: a client's id must be"),
        (format!("{app}{0}{0}", client("p", "canary")), "number 1: the client was there before"),
        (format!("{app}{clients}"), "65 clients, at most 64"),
        ("[[application]]\nname = \"default\"".to_owned(), "number 1: the name is kept"),
        ("# ".to_owned() + &"x".repeat(MAX_FILE), "at most 4194304"),
    ];
    for (text, words) in cases {
        let error = Applications::parse(&text).unwrap_err().to_string();
        assert!(error.contains(words), "{error} has no {words:?}");
        assert!(!error.to_lowercase().contains("canary"), "{error}");
    }
    let many: String =
        (0..=MAX_APPLICATIONS).map(|i| format!("[[application]]\nname = \"a{i}\"\n")).collect();
    assert_eq!(Applications::parse(&many).unwrap_err(), ApplicationsError::Applications(10_001));
    assert!(Applications::parse("").unwrap().all().is_empty());
}

#[test]
fn pseudonyms_differ_by_application_user_and_secret() {
    let key = UserKey::new(1, &[1; 32]).unwrap();
    let other = UserKey::new(2, &[2; 32]).unwrap();
    let all = [
        key.pseudonym("a", "alice"),
        key.pseudonym("b", "alice"),
        key.pseudonym("a", "bob"),
        key.pseudonym("aa", "lice"),
        other.pseudonym("a", "alice"),
        // The same secret, by mistake, for the pepper.
        Pepper::new(1, &[1; 32]).unwrap().hash("alice").to_string(),
    ];
    assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
    assert_eq!(key.pseudonym("a", "alice"), all[0]);
    assert!(all[0].len() <= crate::row::MAX_TEXT);
    assert_eq!(UserKey::new(1, &[0; 31]).unwrap_err(), ShortSecret(31));
}
