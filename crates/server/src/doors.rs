//! The table of doors: for every route and every kind of credential, whether it opens.
//!
//! Owns the table's derivation from the routes and its published form, `docs/doors.md`. It decides nothing: requests
//! are judged by the routes and by who calls, and a test walks the table against a running server.

use std::fmt::Write as _;

use mirai_ledger::{Scope, Scopes};

use crate::routes::{Access, ROUTES, Target};

/// Which listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listener {
    /// `--host`, `--port`.
    Main,
    /// `--metrics-listen`; without it these routes are at the main one.
    Metrics,
    /// `identity.admin_listen`.
    Admin,
}

/// What may be presented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is described in `CREDENTIALS`")]
pub enum Credential {
    Nothing,
    Wrong,
    PlainKey,
    ApplicationKey,
    UsageKey,
    AdminKey,
    Signed,
    SignedExpired,
    SignedStranger,
    Opaque,
    OpaqueInactive,
    Gateway,
}

/// What a credential is worth: what its bearer may do, or the status of the refusal.
type Worth = Result<Scopes, u16>;

const USAGE: Scopes = Scopes { infer: false, read_usage: true, admin: false };
const BOTH: Scopes = Scopes { infer: true, read_usage: true, admin: false };
const ALL: Scopes = Scopes { infer: true, read_usage: true, admin: true };

/// Every kind: the table's column, what it is, what it is worth.
pub const CREDENTIALS: [(Credential, &str, &str, Worth); 12] = [
    (Credential::Nothing, "none", "no `Authorization` header", Err(401)),
    (Credential::Wrong, "wrong", "a key that nobody has, another scheme, two headers", Err(401)),
    (Credential::PlainKey, "key", "one of `--api-key` or `--api-key-file`", Ok(BOTH)),
    (
        Credential::ApplicationKey,
        "app",
        "a key of an application without a word on scopes",
        Ok(Scopes::INFER),
    ),
    (Credential::UsageKey, "usage", "a key of an application with `scopes = [\"read-usage\"]`", Ok(USAGE)),
    (Credential::AdminKey, "admin", "a key of an application with all scopes", Ok(ALL)),
    (
        Credential::Signed,
        "jwt",
        "a good signed token of an application without a word on scopes",
        Ok(Scopes::INFER),
    ),
    (Credential::SignedExpired, "expired", "the same after its time, or with another's signature", Err(401)),
    (Credential::SignedStranger, "stranger", "a good token of an application that is in no file", Err(403)),
    (Credential::Opaque, "opaque", "a token that introspection calls active", Ok(Scopes::INFER)),
    (Credential::OpaqueInactive, "inactive", "a token that introspection does not know", Err(401)),
    (
        Credential::Gateway,
        "gateway",
        "a gateway's key with the name of an application with all scopes",
        Ok(Scopes::INFER),
    ),
];

/// One route at one listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Door {
    /// Where.
    pub listener: Listener,
    /// Its method; `GET` answers `HEAD` too.
    pub method: &'static str,
    /// Its path; `{model}` takes the rest.
    pub path: String,
    /// What its callers need, in a word.
    pub needs: &'static str,
    access: Access,
}

impl Door {
    /// `None` if it opens, else the status of the refusal.
    pub fn refusal(&self, worth: Worth) -> Option<u16> {
        match (self.access, worth) {
            (Access::Open, _) | (Access::Key, Ok(_)) => None,
            (_, Err(status)) => Some(status),
            (Access::Needs(scope), Ok(scopes)) => (!scopes.has(scope)).then_some(403),
        }
    }
}

/// Every door of a server whose callers have to say who they are.
pub fn doors() -> Vec<Door> {
    let mut all = Vec::new();
    for route in ROUTES {
        let listener = match (route.target, route.access.is_admin()) {
            (Target::Metrics, _) => Listener::Metrics,
            (_, true) => Listener::Admin,
            (_, false) => Listener::Main,
        };
        let needs = match route.access {
            Access::Open => "nothing",
            Access::Key => "any credential",
            Access::Needs(scope) => {
                Scope::ALL.into_iter().find(|(s, _)| *s == scope).map_or("", |(_, word)| word)
            }
        };
        let longer = route.v1.then(|| format!("/v1{}", route.path));
        for path in [longer, Some(route.path.to_owned())].into_iter().flatten() {
            all.push(Door { listener, method: route.method, path, needs, access: route.access });
        }
    }
    all
}

/// The table as it is published.
pub fn markdown() -> String {
    let mut out = String::from(
        "# Doors\n\n\
         Who gets in where, once the server has credentials to ask for. This page is made from the table of routes; a test\n\
         walks every cell against a running server, with every method, and fails where the two differ\n\
         (`MIRAI_BLESS=1 cargo test -p mirai-server --test suite doors` writes it anew).\n\n\
         `in`: the request is answered. A number: the status of the refusal. `HEAD` is `GET` without a body.\n\
         A method that a path does not have, and a path that does not exist, are 405 and 404 for whoever has a good\n\
         credential, and the refusal of the credential for everybody else. Paths are taken exactly as written: `//`, `/./`, `%2e`, capitals and a\n\
         slash at the end are other paths.\n\n| credential | what it is |\n|---|---|\n",
    );
    for (_, name, what, _) in CREDENTIALS {
        let _ = writeln!(out, "| {name} | {what} |");
    }
    for (listener, title) in [
        (Listener::Main, "Main listener"),
        (
            Listener::Metrics,
            "Metrics (at the main listener unless `--metrics-listen` moves them; the probes are there too then)",
        ),
        (Listener::Admin, "Admin listener (`identity.admin_listen`; without it these routes do not exist)"),
    ] {
        let _ = write!(out, "\n## {title}\n\n| method | path | needs |");
        for (_, name, ..) in CREDENTIALS {
            let _ = write!(out, " {name} |");
        }
        let _ = writeln!(out, "\n|---|---|---|{}", "---|".repeat(CREDENTIALS.len()));
        for door in doors().iter().filter(|door| door.listener == listener) {
            let _ = write!(out, "| {} | `{}` | {} |", door.method, door.path, door.needs);
            for (.., worth) in CREDENTIALS {
                let _ = match door.refusal(worth) {
                    None => write!(out, " in |"),
                    Some(status) => write!(out, " {status} |"),
                };
            }
            out.push('\n');
        }
    }
    out
}
