//! The table of routes: which path and method exist, who may call them, and what answers.
//!
//! Owns the table and the match. Everything that depends on a route (authentication, the metric's label, the
//! OpenAPI document's tests) looks here, never at a URL's text.

use hyper::Method;
use mirai_ledger::Scope;

/// Who may call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Anybody: probes and metrics.
    Open,
    /// Holders of any good credential, if there are credentials.
    Key,
    /// Of these, who has a scope.
    Needs(Scope),
}

impl Access {
    /// What the caller's credential must allow.
    pub(crate) fn scope(self) -> Option<Scope> {
        match self {
            Self::Open | Self::Key => None,
            Self::Needs(scope) => Some(scope),
        }
    }

    /// Whether it answers at the admin listener, and only there.
    pub(crate) fn is_admin(self) -> bool {
        self == Self::Needs(Scope::Admin)
    }
}

/// What answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Chat,
    Completion,
    Embeddings,
    Rerank,
    /// The same under its other version.
    RerankV2,
    Score,
    Models,
    Model,
    Tokenize,
    Detokenize,
    /// Sums of requests.
    Usage,
    Version,
    OpenApi,
    Health,
    HealthLive,
    HealthReady,
    HealthStartup,
    Metrics,
    AdminApplications,
    AdminReload,
}

/// One row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Route {
    pub(crate) method: &'static str,
    /// Without `/v1`. `{model}` at the end takes the rest of the path.
    pub(crate) path: &'static str,
    /// Answers under `/v1` too; that is then its name.
    pub(crate) v1: bool,
    pub(crate) access: Access,
    pub(crate) target: Target,
}

impl Route {
    /// Its name in metrics, logs and the OpenAPI document.
    pub(crate) fn name(&self) -> &'static str {
        match self.target {
            Target::Chat => "/v1/chat/completions",
            Target::Completion => "/v1/completions",
            Target::Embeddings => "/v1/embeddings",
            Target::Rerank => "/v1/rerank",
            Target::Score => "/v1/score",
            Target::Models => "/v1/models",
            Target::Model => "/v1/models/{model}",
            Target::Usage => "/v1/organization/usage/completions",
            _ => self.path,
        }
    }
}

/// Index into [`ROUTES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RouteId(pub(crate) usize);

impl RouteId {
    pub(crate) fn route(self) -> &'static Route {
        &ROUTES[self.0]
    }
}

const fn row(method: &'static str, path: &'static str, v1: bool, access: Access, target: Target) -> Route {
    Route { method, path, v1, access, target }
}

const INFER: Access = Access::Needs(Scope::Infer);
const ADMIN: Access = Access::Needs(Scope::Admin);

/// Every route. The two parts of a `{model}` path are split at its brace.
pub(crate) const ROUTES: &[Route] = &[
    row("POST", "/chat/completions", true, INFER, Target::Chat),
    row("POST", "/completions", true, INFER, Target::Completion),
    row("POST", "/embeddings", true, INFER, Target::Embeddings),
    row("POST", "/rerank", true, INFER, Target::Rerank),
    row("POST", "/v2/rerank", false, INFER, Target::RerankV2),
    row("POST", "/score", true, INFER, Target::Score),
    row("GET", "/models", true, Access::Key, Target::Models),
    row("GET", "/models/{model}", true, Access::Key, Target::Model),
    row("POST", "/tokenize", true, INFER, Target::Tokenize),
    row("POST", "/detokenize", true, INFER, Target::Detokenize),
    row("GET", "/organization/usage/completions", true, Access::Needs(Scope::ReadUsage), Target::Usage),
    row("GET", "/version", false, Access::Key, Target::Version),
    row("GET", "/openapi.json", false, Access::Key, Target::OpenApi),
    row("GET", "/health", false, Access::Open, Target::Health),
    row("GET", "/health/live", false, Access::Open, Target::HealthLive),
    row("GET", "/health/ready", false, Access::Open, Target::HealthReady),
    row("GET", "/health/startup", false, Access::Open, Target::HealthStartup),
    row("GET", "/metrics", false, Access::Open, Target::Metrics),
    row("GET", "/admin/applications", false, ADMIN, Target::AdminApplications),
    row("POST", "/admin/reload", false, ADMIN, Target::AdminReload),
];

/// What a request's line leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Match<'a> {
    /// A route, and the rest of the path where it takes one.
    Found(RouteId, Option<&'a str>),
    /// The path exists, with these methods.
    OtherMethod(&'static str),
    /// No such path.
    None,
}

/// Finds the route of a path among those that are `here`, exactly as written: nothing is decoded, merged or made
/// lower case.
pub(crate) fn find<'a>(method: &Method, path: &'a str, here: impl Fn(&Route) -> bool) -> Match<'a> {
    let mut other = Match::None;
    for (index, route) in ROUTES.iter().enumerate().filter(|(_, route)| here(route)) {
        let Some(rest) = matches(route, path) else { continue };
        let head = *method == Method::HEAD && route.method == "GET";
        if method.as_str() == route.method || head {
            return Match::Found(RouteId(index), rest);
        }
        other = Match::OtherMethod(if route.method == "GET" { "GET, HEAD" } else { route.method });
    }
    other
}

/// `Some(rest)` if the path is the route's.
fn matches<'a>(route: &Route, path: &'a str) -> Option<Option<&'a str>> {
    let short = match path.strip_prefix("/v1") {
        Some(short) if route.v1 && short.starts_with('/') => short,
        _ => path,
    };
    match route.path.strip_suffix("{model}") {
        None => (short == route.path).then_some(None),
        Some(prefix) => short.strip_prefix(prefix).filter(|rest| !rest.is_empty()).map(Some),
    }
}

/// Percent-decoding, for the one path that ends in a name. `None` for what is not UTF-8 or has NUL.
pub(crate) fn decode(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let digit = |b: Option<u8>| b.and_then(|b| char::from(b).to_digit(16));
        let (high, low) = (digit(bytes.next())?, digit(bytes.next())?);
        out.push((high * 16 + low) as u8);
    }
    String::from_utf8(out).ok().filter(|text| !text.contains('\0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_is_found_under_each_of_its_paths() {
        for (index, route) in ROUTES.iter().enumerate() {
            let path = route.path.replace("{model}", "a/b");
            let method: Method = route.method.parse().unwrap_or_default();
            let rest = route.path.contains('{').then_some("a/b");
            assert_eq!(find(&method, &path, |_| true), Match::Found(RouteId(index), rest));
            let with_v1 = format!("/v1{path}");
            let expected = if route.v1 { Match::Found(RouteId(index), rest) } else { Match::None };
            assert_eq!(find(&method, &with_v1, |_| true), expected, "{with_v1}");
            assert!(matches!(find(&Method::TRACE, &path, |_| true), Match::OtherMethod(_)));
            assert!(find(&method, route.name(), |_| true) != Match::None);
        }
        assert!(matches!(find(&Method::HEAD, "/health", |_| true), Match::Found(..)));
        assert_eq!(find(&Method::PUT, "/health", |route| route.access != Access::Open), Match::None);
        assert!(matches!(find(&Method::HEAD, "/completions", |_| true), Match::OtherMethod("POST")));
    }

    #[test]
    fn other_spellings_are_other_paths() {
        for path in [
            "",
            "/",
            "*",
            "//v1/models",
            "/v1//models",
            "/v1/./models",
            "/v1/%6dodels",
            "/V1/models",
            "/v1/Models",
            "/v1/models/",
            "/v1models",
            "/v1/v1/models",
            "/health/",
            "/v1/metrics",
            "/models?x",
            "/v1",
        ] {
            assert_eq!(find(&Method::GET, path, |_| true), Match::None, "{path}");
        }
    }

    #[test]
    fn names_are_decoded_once() {
        assert_eq!(decode("org%2Fname").as_deref(), Some("org/name"));
        assert_eq!(decode("a%252e").as_deref(), Some("a%2e"));
        for bad in ["%", "%2", "%zz", "%ff", "%00"] {
            assert_eq!(decode(bad), None, "{bad}");
        }
    }
}
