use super::*;
use hyper::header::HeaderValue;

fn headers(values: &[&[u8]]) -> HeaderMap {
    let mut map = HeaderMap::new();
    for value in values {
        map.append(AUTHORIZATION, HeaderValue::from_bytes(value).unwrap());
    }
    map
}

fn auth(config: &ServerConfig) -> Auth {
    Auth::load(config, Arc::new(Metrics::new())).unwrap()
}

#[tokio::test]
async fn a_plain_key_is_a_caller_and_anything_else_is_refused() {
    let auth =
        auth(&ServerConfig { api_keys: vec!["alpha".into(), "beta".into()], ..ServerConfig::default() });
    let who = async |values: &[&[u8]]| auth.check(&headers(values)).await;
    assert_eq!(who(&[b"Bearer alpha"]).await.unwrap().tenant.0, 1);
    assert_eq!(who(&[b"bearer beta"]).await.unwrap().tenant.0, 2);
    let long = [b"Bearer ".as_slice(), &[b'a'; 20_000]].concat();
    for bad in [
        &b"Bearer"[..],
        b"Bearer ",
        b"Bearer  alpha",
        b"alpha",
        b"Basic alpha",
        b"Bearer alph",
        b"Bearer alphaa",
        b"Bearer ' OR 1=1",
        b"Bearer ALPHA",
        b"Bearer alpha\t",
        b"\xff",
        &long,
    ] {
        assert_eq!(who(&[bad]).await.unwrap_err().status, 401, "{bad:?}");
    }
    assert_eq!(who(&[]).await.unwrap_err().status, 401);
    assert_eq!(who(&[b"Bearer alpha", b"Bearer alpha"]).await.unwrap_err().status, 401);
    let count = |credential, decision| auth.metrics.identity.decisions(credential, decision);
    assert_eq!(count(Credential::Key, Decision::Accepted), 2);
    assert!(
        count(Credential::None, Decision::Refused) > 0 && count(Credential::Unknown, Decision::Refused) > 0
    );
}

#[tokio::test]
async fn without_credentials_in_the_configuration_nobody_has_to_say() {
    let caller = auth(&ServerConfig::default()).check(&headers(&[])).await.unwrap();
    assert_eq!((caller.tenant.0, &*caller.application, caller.weight), (0, "", 1));
    assert!(caller.scopes.infer && !caller.scopes.admin);
}

#[tokio::test]
async fn an_empty_file_of_applications_opens_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("applications.toml");
    std::fs::write(&path, "").unwrap();
    let mut config = ServerConfig::default();
    config.identity.applications_file = Some(path);
    let auth = auth(&config);
    assert_eq!(auth.check(&headers(&[])).await.unwrap_err().status, 401);
    assert_eq!(auth.check(&headers(&[b"Bearer x"])).await.unwrap_err().status, 401);
}

#[test]
fn a_body_names_a_user_where_nobody_has() {
    let auth = auth(&ServerConfig::default());
    let name = |text: &str| Name(Some(text.to_owned()));
    let metadata = || Metadata(vec![("x".into(), "y".into()), ("user".into(), "in-metadata".into())]);
    let user = |attribution: &Attribution, caller: Caller| {
        auth.attributed(caller, attribution).unwrap().user.map(|user| user.name().to_owned())
    };
    let all = Attribution::of(name("in-user"), name("in-safety"), metadata());
    assert_eq!(user(&all, Caller::anybody()).as_deref(), Some("in-user"));
    let two = Attribution::of(Name(None), name("in-safety"), metadata());
    assert_eq!(user(&two, Caller::anybody()).as_deref(), Some("in-safety"));
    let one = Attribution::of(Name(None), Name(None), metadata());
    assert_eq!(user(&one, Caller::anybody()).as_deref(), Some("in-metadata"));
    let known = Caller { user: User::new("in-token"), ..Caller::anybody() };
    assert_eq!(user(&all, known).as_deref(), Some("in-token"));
    assert_eq!(user(&Attribution::default(), Caller::anybody()), None);
    assert!(!format!("{all:?}").contains("in-"), "{all:?}");
}
