//! What a token says, once it is known to be good.
//!
//! Owns how claims are found and what they mean: application, user, roles. Whether the token may be believed is
//! decided elsewhere, before.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};

use mirai_ledger::Scopes;
use mirai_ledger::identity::is_client_id;

use super::caller::User;
use super::config::ClaimsConfig;

/// Longest path that is followed, in members.
const MAX_DEPTH: usize = 8;

/// Claims that were verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// What the provider calls the application.
    pub(super) client: Arc<str>,
    pub(super) user: Option<User>,
    /// What roles give; `None` if they are not asked for.
    pub(super) scopes: Option<Scopes>,
}

/// The value at a path. A claim whose own name has dots is found too.
pub(super) fn find<'a>(claims: &'a Map<String, Value>, path: &str) -> Option<&'a Value> {
    fn step<'a>(claims: &'a Map<String, Value>, path: &str, depth: usize) -> Option<&'a Value> {
        if let Some(value) = claims.get(path) {
            return Some(value);
        }
        if depth == MAX_DEPTH {
            return None;
        }
        path.match_indices('.').find_map(|(at, _)| {
            let inner = claims.get(&path[..at])?.as_object()?;
            step(inner, &path[at + 1..], depth + 1)
        })
    }
    step(claims, path, 0)
}

/// Whether a value names a role: a word of a text, an element of a list, a member of an object.
fn has_role(value: &Value, role: &str) -> bool {
    match value {
        Value::String(text) => text.split_ascii_whitespace().any(|word| word == role),
        Value::Array(list) => list.iter().any(|word| word.as_str() == Some(role)),
        Value::Object(map) => map.contains_key(role),
        _ => false,
    }
}

/// Whether `aud`, a text or a list, has one of these.
pub(super) fn is_for(claims: &Map<String, Value>, audiences: &[String]) -> bool {
    let wanted = |value: &Value| value.as_str().is_some_and(|text| audiences.iter().any(|a| a == text));
    match claims.get("aud") {
        Some(Value::Array(list)) => list.iter().any(wanted),
        Some(value) => wanted(value),
        None => false,
    }
}

/// A time of RFC 7519: seconds since 1970, perhaps with a fraction. `Err` if the claim is there and is no time.
pub(super) fn time(claims: &Map<String, Value>, name: &str) -> Result<Option<f64>, ()> {
    match claims.get(name) {
        None => Ok(None),
        Some(value) => value.as_f64().filter(|time| time.is_finite()).map(Some).ok_or(()),
    }
}

/// Who is meant. `None` without an application.
pub(super) fn identity(
    claims: &Map<String, Value>,
    config: &ClaimsConfig,
    application: &str,
) -> Option<Identity> {
    let application = config.application.as_deref().unwrap_or(application);
    let client = find(claims, application)?.as_str().filter(|id| is_client_id(id))?;
    let user = find(claims, config.user.as_deref().unwrap_or("sub"));
    let roles = config.roles.as_deref().and_then(|path| find(claims, path));
    Some(Identity {
        client: client.into(),
        user: user.and_then(Value::as_str).and_then(User::new),
        scopes: config.scopes(|role| roles.is_some_and(|value| has_role(value, role))),
    })
}

/// Seconds since 1970.
pub(super) fn unix_now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    fn map(value: &Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn paths_lead_into_objects_and_names_may_have_dots() {
        let claims = map(&json!({
            "azp": "chat",
            "resource_access": {"mirai": {"roles": ["user", "usage"]}, "my.app": {"roles": ["x"]}},
            "https://example.org/roles": ["dots"],
            "a": {"b": 1}, "a.b": 2,
            "list": [1],
        }));
        assert_eq!(find(&claims, "azp"), Some(&json!("chat")));
        assert_eq!(find(&claims, "resource_access.mirai.roles"), Some(&json!(["user", "usage"])));
        assert_eq!(find(&claims, "resource_access.my.app.roles"), Some(&json!(["x"])));
        assert_eq!(find(&claims, "https://example.org/roles"), Some(&json!(["dots"])));
        assert_eq!(find(&claims, "a.b"), Some(&json!(2)), "the exact name first");
        for missing in ["", ".", "b", "azp.x", "list.0", "resource_access..roles", &"a.".repeat(500)] {
            assert_eq!(find(&claims, missing), None, "{missing}");
        }
    }

    #[test]
    fn roles_come_in_three_shapes() {
        for roles in [json!("user usage"), json!(["user", "usage"]), json!({"usage": {"1": "org"}})] {
            assert!(has_role(&roles, "usage"), "{roles}");
            assert!(!has_role(&roles, "usag") && !has_role(&roles, "user usage"), "{roles}");
        }
        assert!(!has_role(&json!(1), "1") && !has_role(&json!([["usage"]]), "usage"));
    }

    #[test]
    fn an_identity_needs_an_application() {
        let config = ClaimsConfig {
            roles: Some("scope".into()),
            admin_role: Some("root".into()),
            ..ClaimsConfig::default()
        };
        let claims = map(&json!({"azp": "chat", "sub": "u-1", "scope": "root x"}));
        let found = identity(&claims, &config, "azp").unwrap();
        assert_eq!((&*found.client, found.user.unwrap().name()), ("chat", "u-1"));
        assert_eq!(found.scopes.unwrap().words().collect::<Vec<_>>(), ["infer", "admin"]);
        for bad in
            [json!({}), json!({"azp": 1}), json!({"azp": ""}), json!({"azp": "a b"}), json!({"azp": ["a"]})]
        {
            assert_eq!(identity(&map(&bad), &config, "azp"), None, "{bad}");
        }
        let anonymous = identity(&map(&json!({"azp": "chat", "sub": "a\nb"})), &config, "azp").unwrap();
        assert_eq!(anonymous.user, None);
    }

    #[test]
    fn audiences_and_times_are_read_strictly() {
        let audiences = ["mirai".to_owned(), "other".to_owned()];
        for (aud, good) in [
            (json!("mirai"), true),
            (json!(["x", "other"]), true),
            (json!("mirai x"), false),
            (json!([]), false),
            (json!({"mirai": 1}), false),
            (json!(null), false),
        ] {
            assert_eq!(is_for(&map(&json!({"aud": aud})), &audiences), good, "{aud}");
        }
        assert!(!is_for(&Map::new(), &audiences));
        let times = map(&json!({"a": 1.5, "b": "1", "c": null}));
        assert_eq!((time(&times, "a"), time(&times, "z")), (Ok(Some(1.5)), Ok(None)));
        assert_eq!((time(&times, "b"), time(&times, "c")), (Err(()), Err(())), "no time is not no limit");
    }
}
