//! Who calls: applications of a file, signed and opaque tokens, gateways; what each may do, and what happens when
//! the identity provider fails.

use std::time::Duration;

use mirai_ledger::identity::UserKey;
use mirai_server::Unknown;
use serde_json::json;

use crate::accounting::{ledger, row_of};
use crate::client::{Answer, request};
use crate::provider::{AUDIENCE, Provider, now};
use crate::signer::Signer;
use crate::support::*;
use crate::world::{USER_KEY, World};

fn outcome(answer: &Answer) -> (u16, String) {
    let code = answer.json()["error"]["code"].as_str().unwrap_or_default().to_owned();
    (answer.status, code)
}

fn cached(answer: &Answer) -> u64 {
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_credential_of_one_application_is_the_same_tenant() {
    let world = World::start().await;
    let none = json!({});
    let opaque = world.opaque("opaque-chat", world.active("4711@chat"));
    let gateway = |name: &'static str| [("X-Consumer-Username", name)];
    // The first to come computes; whoever shares its application finds its prefix.
    assert_eq!(cached(&world.post(&world.keys[1], &[], &none).await), 0);
    assert!(cached(&world.post(&world.signed("chat-app", &none), &[], &none).await) > 0);
    assert!(cached(&world.post(&opaque, &[], &none).await) > 0);
    assert!(cached(&world.post(&world.keys[4], &gateway("chat"), &none).await) > 0);
    assert!(cached(&world.post(&world.keys[4], &gateway("Consumer-1"), &none).await) > 0);
    let by_body = json!({"metadata": {"application": "chat"}, "user": "u"});
    assert!(cached(&world.post(&world.keys[4], &[], &by_body).await) > 0);
    // And nobody else does: headers and bodies of others mean nothing.
    assert_eq!(cached(&world.post(&world.keys[0], &gateway("chat"), &by_body).await), 0);
    assert_eq!(cached(&world.post(&world.keys[3], &gateway("chat"), &by_body).await), 0);
    assert_eq!(cached(&world.post(&world.keys[4], &[], &none).await), 0, "the gateway itself");
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn applications_of_one_group_share_prefixes_and_a_changed_file_counts() {
    let world = World::start().await;
    let (chat, ops) = (world.keys[1].clone(), world.keys[3].clone());
    let path = world.path().join("applications.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let taken = async |least: f64| {
        let name = "mirai_file_reloads_total{files=\"identity\",result=\"taken\"}";
        world.server.until("the file to be taken", PATIENCE, async |s| s.metric(name).await >= least).await;
    };
    let grouped = ["chat", "ops"].iter().fold(text.clone(), |text, name| {
        text.replace(
            &format!("name = \"{name}\"\n"),
            &format!("name = \"{name}\"\ncache_group = \"shared\"\n"),
        )
    });
    std::fs::write(&path, &grouped).unwrap();
    taken(1.0).await;
    assert_eq!(cached(&world.post(&chat, &[], &json!({})).await), 0);
    assert!(cached(&world.post(&ops, &[], &json!({})).await) > 0);
    // What cannot be used changes nothing, and is counted.
    std::fs::write(&path, grouped.replace("weight = 3", "weight = 0")).unwrap();
    let refused = "mirai_file_reloads_total{files=\"identity\",result=\"refused\"}";
    world.server.until("the file to be refused", PATIENCE, async |s| s.metric(refused).await >= 1.0).await;
    assert_eq!(world.models(&chat).await.status, 200);
    // A withdrawn application is out.
    let rest =
        text.split("[[application]]").filter(|part| !part.contains("name = \"chat\"")).collect::<Vec<_>>();
    std::fs::write(&path, rest.join("[[application]]")).unwrap();
    taken(2.0).await;
    assert_eq!(outcome(&world.models(&chat).await), (401, "invalid_api_key".into()));
    assert_eq!(
        outcome(&world.models(&world.signed("chat-app", &json!({}))).await),
        (403, "unknown_application".into())
    );
    assert_eq!(world.models(&ops).await.status, 200);
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn signed_tokens_are_judged() {
    let world = World::start().await;
    let good = world.signed("chat-app", &json!({}));
    assert_eq!(world.models(&good).await.status, 200);
    let stranger = Signer::new("ES256");
    let rsa = Signer::new("RS256");
    let (head, body) = good.split_once('.').unwrap();
    let none = format!(
        "{}.{}.",
        crate::signer::encode(r#"{"alg":"none","kid":"k0"}"#),
        body.split('.').next().unwrap()
    );
    let cases = [
        (world.signed("chat-app", &json!({"exp": now() - 61})), 401),
        (world.signed("chat-app", &json!({"exp": now() - 30})), 200),
        (world.signed("chat-app", &json!({"nbf": now() + 300})), 401),
        (world.signed("chat-app", &json!({"aud": "other"})), 401),
        (world.signed("chat-app", &json!({"exp": null})), 401),
        (world.signed("chat-app", &json!({"typ": "ID"})), 401),
        (world.signed("nobody", &json!({})), 403),
        (world.signed("", &json!({})), 401),
        (stranger.token("k0", &world.provider.claims("chat-app")), 401),
        (rsa.token("k0", &world.provider.claims("chat-app")), 401),
        (none, 401),
        (format!("{head}.{}", body.replace('.', "A.")), 401),
    ];
    for (token, status) in cases {
        let answer = world.models(&token).await;
        assert_eq!(answer.status, status, "{token}: {}", answer.text());
        if status != 200 {
            assert!(
                !answer.text().contains("nobody") && !answer.text().contains(&token),
                "{}",
                answer.text()
            );
        }
    }
    // Another issuer's token is not sent there, but is an opaque one for introspection, which does not know it.
    let asked = world.provider.asked()[2];
    assert_eq!(
        world.models(&world.signed("chat-app", &json!({"iss": "https://other.example"}))).await.status,
        401
    );
    assert_eq!(world.provider.asked()[2], asked + 1);
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_rotate_and_unknown_ones_do_not_flood_the_issuer() {
    let world = World::with(|options| options.config.identity.issuer[0].refetch_seconds = 0.3).await;
    let claims = world.provider.claims("chat-app");
    assert_eq!(world.models(&world.signed("chat-app", &json!({}))).await.status, 200);
    let next = Signer::new("ES256");
    world.provider.publish(&[&world.signer, &next]);
    let rotated = next.token("k1", &claims);
    world.server.until("the new key", PATIENCE, async |_| world.models(&rotated).await.status == 200).await;
    // Withdrawn keys are out after the next fetch, which any unknown key triggers.
    world.provider.change(|behaviour| behaviour.keys = vec![next.jwk("k1")]);
    let unknown = next.token("k9", &claims);
    let old = world.signed("chat-app", &json!({}));
    world
        .server
        .until("the old key to go", PATIENCE, async |_| {
            world.models(&unknown).await;
            world.models(&old).await.status == 401
        })
        .await;
    assert_eq!(world.models(&rotated).await.status, 200);
    let (start, before) = (std::time::Instant::now(), world.provider.asked()[1]);
    for i in 0..200 {
        let token = next.token(&format!("k{}", i + 10), &claims);
        assert_eq!(world.models(&token).await.status, 401);
    }
    let most = 2 + (start.elapsed().as_secs_f64() / 0.3) as usize;
    let asked = world.provider.asked()[1] - before;
    assert!(asked <= most, "{asked} fetches in {:?}", start.elapsed());
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_issuer_that_is_away_lets_nobody_new_in_and_known_keys_stay() {
    let world = World::start().await;
    let good = world.signed("chat-app", &json!({}));
    assert_eq!(world.models(&good).await.status, 200);
    for broken in
        [(500, "".into()), (302, "".into()), (200, "no json".into()), (200, vec![b' '; 300 << 10].into())]
    {
        world.provider.change(|behaviour| behaviour.broken = Some(broken.clone()));
        assert_eq!(world.models(&good).await.status, 200, "{}", broken.0);
        let unknown = world.signer.token("k7", &world.provider.claims("chat-app"));
        world
            .server
            .until("the failure to be seen", PATIENCE, async |_| {
                let answer = world.models(&unknown).await;
                assert!(answer.status == 401 || answer.header("retry-after").is_some());
                answer.status == 503
            })
            .await;
    }
    world.server.stop().await;
    // Never seen: nobody gets in; and an issuer that says it is another is none.
    let world = World::with(|options| {
        let away = "http://127.0.0.1:1/realms/test".to_owned();
        options.config.identity.issuer[0].issuer = away;
    })
    .await;
    let token = world.signed("chat-app", &json!({"iss": "http://127.0.0.1:1/realms/test"}));
    assert_eq!(outcome(&world.models(&token).await), (503, "identity_unavailable".into()));
    assert_eq!(world.models(&world.keys[1]).await.status, 200, "keys do not depend on it");
    world.server.stop().await;
    let provider = Provider::start().await;
    let signer = Signer::new("ES256");
    provider.publish(&[&signer]);
    provider.change(|behaviour| behaviour.issuer = Some("http://127.0.0.1:9/realms/test".into()));
    let issuer = provider.issuer();
    let world = World::with(|options| options.config.identity.issuer[0].issuer = issuer).await;
    let token = signer.token("k0", &provider.claims("chat-app"));
    assert_eq!(world.models(&token).await.status, 503);
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn opaque_tokens_are_looked_up_once() {
    let world = World::start().await;
    let token = world.opaque("opaque-1", world.active("4711@chat"));
    world.provider.change(|behaviour| behaviour.delay = Duration::from_millis(100));
    let before = world.provider.asked()[2];
    let answers = async |token: &str| {
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..20 {
            let (address, bearer) = (world.server.address, format!("Bearer {token}"));
            tasks.spawn(async move {
                request(address, "GET", "/v1/models", &[("Authorization", &bearer)], None).await.status
            });
        }
        tasks.join_all().await
    };
    assert_eq!(answers(&token).await, [200; 20]);
    assert_eq!(world.provider.asked()[2], before + 1, "twenty at once are one call");
    assert_eq!(answers("opaque-wrong").await, [401; 20]);
    assert_eq!(answers("opaque-wrong").await, [401; 20]);
    assert_eq!(world.provider.asked()[2], before + 2);
    world.provider.change(|behaviour| behaviour.delay = Duration::ZERO);
    let cases = [
        (json!({"active": true, "client_id": "4711@chat"}), 401),
        (json!({"active": true, "client_id": "4711@chat", "aud": "other"}), 401),
        (json!({"active": true, "aud": [AUDIENCE]}), 401),
        (json!({"active": true, "client_id": "nobody", "aud": [AUDIENCE]}), 403),
        (json!({"active": true, "client_id": "4711@chat", "aud": [AUDIENCE]}), 200),
        (json!({"active": true, "client_id": "4711@chat", "aud": [AUDIENCE], "exp": now() - 1}), 401),
        (json!({"active": true, "client_id": "4711@chat", "aud": [AUDIENCE], "exp": "never"}), 401),
        (json!({"active": true, "client_id": "4711@chat", "aud": [AUDIENCE], "nbf": now() + 100}), 401),
        (json!({"active": "true", "client_id": "4711@chat", "aud": [AUDIENCE]}), 503),
        (json!([true]), 503),
    ];
    for (i, (answer, status)) in cases.into_iter().enumerate() {
        let token = world.opaque(&format!("case-{i}"), answer.clone());
        assert_eq!(world.models(&token).await.status, status, "{answer}");
    }
    // Keys of ours are never shown to the provider.
    let before = world.provider.asked()[2];
    assert_eq!(world.models("mirai-0000").await.status, 401);
    assert_eq!(world.provider.asked()[2], before);
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_forgotten_in_time_and_never_outlive_their_token() {
    let world = World::with(|options| {
        let introspection = options.config.identity.introspection.as_mut().unwrap();
        (introspection.positive_seconds, introspection.negative_seconds) = (0.05, 0.05);
    })
    .await;
    let token = world.opaque("withdrawn", world.active("4711@chat"));
    assert_eq!(world.models(&token).await.status, 200);
    world.opaque("withdrawn", json!({"active": false}));
    world
        .server
        .until("the token to be out", PATIENCE, async |w| {
            let bearer = "Bearer withdrawn";
            request(w.address, "GET", "/v1/models", &[("Authorization", bearer)], None).await.status == 401
        })
        .await;
    world.opaque("withdrawn", world.active("4711@chat"));
    world
        .server
        .until("the token to be in again", PATIENCE, async |w| {
            let bearer = "Bearer withdrawn";
            request(w.address, "GET", "/v1/models", &[("Authorization", bearer)], None).await.status == 200
        })
        .await;
    world.server.stop().await;
    // Longer memory than life.
    let world = World::start().await;
    let mut short = world.active("4711@chat");
    short["exp"] = json!(now() + 2);
    let token = world.opaque("short", short);
    assert_eq!(world.models(&token).await.status, 200);
    world
        .server
        .until("the token to die", PATIENCE, async |_| world.models(&token).await.status == 401)
        .await;
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_nobody_can_be_asked_nobody_gets_in() {
    let world = World::with(|options| {
        let introspection = options.config.identity.introspection.as_mut().unwrap();
        (introspection.max_calls, introspection.timeout_seconds) = (2, 1.0);
    })
    .await;
    let known = world.opaque("known", world.active("4711@chat"));
    assert_eq!(world.models(&known).await.status, 200);
    for (status, body) in [(500, ""), (401, ""), (200, "no json"), (302, "")] {
        world.provider.change(|behaviour| behaviour.broken = Some((status, body.into())));
        let answer = world.models(&format!("unknown-{status}")).await;
        assert_eq!(outcome(&answer), (503, "identity_unavailable".into()));
        assert!(answer.header("retry-after").is_some());
        assert_eq!(world.models(&known).await.status, 200, "what is remembered holds");
        assert_eq!(world.models(&world.keys[1]).await.status, 200, "keys do not depend on it");
    }
    // It was no answer, so it is not remembered.
    world.provider.change(|behaviour| behaviour.broken = None);
    assert_eq!(world.models("unknown-500").await.status, 401);
    // A provider that hangs holds two callers, until their time is over; others hear at once.
    world.provider.change(|behaviour| behaviour.delay = Duration::from_secs(3600));
    let mut tasks = tokio::task::JoinSet::new();
    for i in 0..6 {
        let (address, bearer) = (world.server.address, format!("Bearer hang-{i}"));
        tasks.spawn(async move {
            request(address, "GET", "/v1/models", &[("Authorization", &bearer)], None).await.status
        });
    }
    assert_eq!(tasks.join_all().await, [503; 6]);
    let failed = "mirai_identity_lookups_total{result=\"failed\",what=\"token\"}";
    assert!(
        (world.server.metric(failed).await - 6.0).abs() < 0.1,
        "four answers that are none, two that never came"
    );
    let away = "mirai_identity_decisions_total{credential=\"opaque\",decision=\"unavailable\"}";
    assert!((world.server.metric(away).await - 10.0).abs() < 0.1);
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_gateway_speaks_for_others_and_only_clearly() {
    let world = World::start().await;
    let gateway = world.keys[4].clone();
    let name = "X-Consumer-Username";
    let cases: [(&[(&str, &str)], u16); 11] = [
        (&[(name, "chat")], 200),
        (&[(name, "chat"), (name, "ops")], 400),
        (&[(name, "chat"), (name, "chat")], 400),
        (&[(name, "chat,ops")], 400),
        (&[(name, "")], 400),
        (&[(name, "cha t")], 400),
        (&[(name, "ch\u{e4}t")], 400),
        (&[(name, "nobody")], 403),
        (&[(name, "chat"), ("X-End-User", "zo\u{e9}@example.org")], 200),
        (&[(name, "chat"), ("X-End-User", "a"), ("X-End-User", "b")], 400),
        (&[("X_Consumer_Username", "nobody"), ("X-Consumer-Username2", "nobody")], 200),
    ];
    for (headers, status) in cases {
        assert_eq!(world.get(&gateway, headers).await.status, status, "{headers:?}");
        // From anybody else they mean nothing, whatever they are.
        for key in &world.keys[..3] {
            assert_eq!(world.get(key, headers).await.status, 200, "{headers:?}");
        }
    }
    // What both may do: the gateway may not administer, `batch` may not infer.
    let admin = world.server.admin_address.unwrap();
    let bearer = format!("Bearer {gateway}");
    let headers = [("Authorization", bearer.as_str()), (name, "ops")];
    assert_eq!(
        outcome(&request(admin, "GET", "/admin/applications", &headers, None).await).1,
        "insufficient_scope"
    );
    assert_eq!(outcome(&world.post(&gateway, &[(name, "batch")], &json!({})).await).1, "insufficient_scope");
    for (metadata, status) in [
        (json!({"application": "nobody"}), 403),
        (json!({"application": "a b"}), 400),
        (json!({"application": 1}), 200),
        (json!({"other": "chat"}), 200),
        (json!(null), 200),
    ] {
        assert_eq!(
            world.post(&gateway, &[], &json!({"metadata": metadata})).await.status,
            status,
            "{metadata}"
        );
    }
    let batch = world.post(&gateway, &[], &json!({"metadata": {"application": "batch"}})).await;
    assert_eq!(outcome(&batch), (403, "insufficient_scope".into()), "a body gives no way around");
    world.server.stop().await;
    let lenient = World::with(|options| {
        options.config.identity.gateway.unknown_application = Unknown::Gateway;
    })
    .await;
    assert_eq!(lenient.post(&lenient.keys[4], &[(name, "nobody")], &json!({})).await.status, 200);
    lenient.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn administrators_have_a_door_of_their_own() {
    let world = World::start().await;
    let admin = world.server.admin_address.unwrap();
    let ask = async |method: &str, path: &str, token: &str| {
        let bearer = format!("Bearer {token}");
        let body = (method == "POST").then_some(b"".as_slice());
        request(admin, method, path, &[("Authorization", &bearer)], body).await
    };
    let list = ask("GET", "/admin/applications", &world.keys[3]).await;
    assert_eq!(list.status, 200);
    let data = list.json()["data"].clone();
    assert_eq!(data[0]["name"], "chat");
    assert_eq!((&data[0]["weight"], &data[0]["quota"]["tokens_per_day"]), (&json!(3), &json!(1000)));
    assert_eq!((&data[0]["key_ids"], &data[1]["scopes"]), (&json!(["chat-1"]), &json!(["read-usage"])));
    let file = std::fs::read_to_string(world.path().join("applications.toml")).unwrap();
    for hash in file.lines().filter_map(|line| line.strip_prefix("hash = ")) {
        assert!(!list.text().contains(hash.trim_matches('"')), "no hash leaves");
    }
    // Roles of a token count within what its application may do.
    let operator = json!({"resource_access": {"mirai-api": {"roles": ["operator"]}}});
    assert_eq!(ask("GET", "/admin/applications", &world.signed("ops-app", &operator)).await.status, 200);
    assert_eq!(ask("GET", "/admin/applications", &world.signed("ops-app", &json!({}))).await.status, 403);
    assert_eq!(ask("GET", "/admin/applications", &world.signed("chat-app", &operator)).await.status, 403);
    assert_eq!(ask("POST", "/admin/reload", &world.keys[3]).await.status, 200);
    std::fs::write(world.path().join("pepper"), "1 short\n").unwrap();
    let refused = ask("POST", "/admin/reload", &world.keys[3]).await;
    assert_eq!(outcome(&refused), (409, "reload_refused".into()));
    assert!(!refused.text().contains("pepper"), "no path leaves");
    assert_eq!(
        ask("GET", "/admin/applications", &world.keys[3]).await.status,
        200,
        "what was in force stays"
    );
    // Nothing else is here, and none of this is elsewhere.
    for path in ["/v1/models", "/metrics", "/health", "/v1/chat/completions"] {
        assert_eq!(ask("GET", path, &world.keys[3]).await.status, 404, "{path}");
    }
    let bearer = format!("Bearer {}", world.keys[3]);
    for path in ["/admin/applications", "/admin/reload", "/v1/admin/applications"] {
        let answer = request(world.server.address, "GET", path, &[("Authorization", &bearer)], None).await;
        assert_eq!(answer.status, 404, "{path}");
    }
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_say_who_called_and_never_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("ledger.db");
    let world =
        World::with(|options| options.ledger = Some(ledger(&file, &mirai_ledger::LedgerConfig::default())))
            .await;
    let opaque = world.opaque("row-opaque", world.active("4711@chat"));
    let consumer = ("X-Consumer-Username", "Consumer-1");
    let body = json!({"user": "zoe-in-body"});
    /// Token, headers, more of the body; application and key, version, user of the row.
    type Case<'a> =
        (&'a str, &'a [(&'a str, &'a str)], serde_json::Value, [&'a str; 2], u32, Option<&'a str>);
    let cases: [Case<'_>; 7] = [
        (&world.keys[0], &[], json!({}), ["default", "key-1"], 0, None),
        (&world.keys[1], &[], body.clone(), ["chat", "chat-1"], 1, Some("zoe-in-body")),
        (&world.signed("chat-app", &json!({})), &[], body.clone(), ["chat", "keycloak"], 0, Some("user-1")),
        (&opaque, &[], json!({}), ["chat", "zitadel"], 0, Some("user-2")),
        (&world.keys[4], &[consumer], json!({}), ["chat", "gateway-1"], 1, None),
        (
            &world.keys[4],
            &[consumer, ("X-End-User", "zoe-in-header")],
            body,
            ["chat", "gateway-1"],
            1,
            Some("zoe-in-header"),
        ),
        (
            &world.keys[4],
            &[],
            json!({"metadata": {"application": "ops", "user": "zoe-in-metadata"}}),
            ["ops", "gateway-1"],
            1,
            Some("zoe-in-metadata"),
        ),
    ];
    let key = UserKey::new(1, USER_KEY.as_bytes()).unwrap();
    for (token, headers, more, [application, key_id], version, user) in cases {
        let answer = world.post(token, headers, &more).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        let row = row_of(&file, answer.json()["id"].as_str().unwrap());
        assert_eq!(
            (row.application.as_str(), row.key_id.as_str(), row.key_version),
            (application, key_id, version)
        );
        assert_eq!(row.user, user.map(|user| key.pseudonym(application, user)), "{more}");
        assert_eq!(row.user_key_version, u32::from(user.is_some()));
    }
    world.server.stop().await;
    for entry in std::fs::read_dir(folder.path()).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        for name in ["zoe-in", "user-1", "user-2"] {
            assert!(crate::client::find(&bytes, name.as_bytes()).is_none(), "{name} is on disk");
        }
    }
}
