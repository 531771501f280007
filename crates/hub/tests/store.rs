//! Whole directories and stores: what is found, what is refused, and that nothing leads out.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use mirai_hub::{HubError, ModelRef, StoreOptions, Weights, pull, resolve};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn put(dir: &Path, files: &[(&str, &str)]) {
    for (name, text) in files {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
}

fn dir_of(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), files);
    dir
}

fn resolve_dir(dir: &Path) -> Result<mirai_hub::LocalModel, HubError> {
    resolve(&ModelRef::Dir(dir.to_owned()), &StoreOptions::default())
}

fn names(model: &mirai_hub::LocalModel) -> Vec<String> {
    let name = |path: &std::path::PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
    model.weight_files().iter().map(name).collect()
}

/// A store with one repository whose files are links into `blobs`, as the hub's tools make it.
fn store_with_repo() -> (tempfile::TempDir, StoreOptions) {
    let store = tempfile::tempdir().unwrap();
    let repo = store.path().join("models--org--tiny");
    put(&repo, &[("refs/main", COMMIT), ("blobs/aaa", "{}"), ("blobs/bbb", "weights")]);
    let snapshot = repo.join("snapshots").join(COMMIT);
    fs::create_dir_all(&snapshot).unwrap();
    symlink("../../blobs/aaa", snapshot.join("config.json")).unwrap();
    symlink("../../blobs/bbb", snapshot.join("model.safetensors")).unwrap();
    let options = StoreOptions { cache_dir: Some(store.path().to_owned()), ..StoreOptions::default() };
    (store, options)
}

#[test]
fn a_complete_directory() {
    let dir = dir_of(&[
        ("config.json", "{}"),
        ("generation_config.json", "{}"),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "{}"),
        ("special_tokens_map.json", "{}"),
        ("added_tokens.json", "{}"),
        ("tokenizer.model", "x"),
        ("tekken.json", "{}"),
        ("vocab.json", "{}"),
        ("merges.txt", "x"),
        ("chat_template.json", "{}"),
        ("chat_template.jinja", "x"),
        ("model.safetensors", "x"),
        ("pytorch_model.bin", "never opened"),
    ]);
    let model = resolve_dir(dir.path()).unwrap();
    assert_eq!(model.root, dir.path().canonicalize().unwrap());
    assert_eq!(names(&model), ["model.safetensors"]);
    assert!(model.chat_template.unwrap().ends_with("chat_template.jinja"));
    assert!(model.config.is_some() && model.generation_config.is_some());
    let tokenizer = model.tokenizer;
    for file in [
        tokenizer.tokenizer_json,
        tokenizer.tokenizer_config,
        tokenizer.special_tokens_map,
        tokenizer.added_tokens,
        tokenizer.sentencepiece,
        tokenizer.tekken,
        tokenizer.vocab,
        tokenizer.merges,
    ] {
        assert!(file.unwrap().is_file());
    }
}

#[test]
fn shards_by_the_index() {
    let index = r#"{"metadata":{"total_size":1},"weight_map":{"a":"m-2.safetensors","b":"m-1.safetensors","c":"m-2.safetensors"}}"#;
    let dir = dir_of(&[
        ("config.json", "{}"),
        ("model.safetensors.index.json", index),
        ("m-1.safetensors", "x"),
        ("m-2.safetensors", "x"),
        ("consolidated.safetensors", "the same again"),
    ]);
    let model = resolve_dir(dir.path()).unwrap();
    assert_eq!(names(&model), ["m-1.safetensors", "m-2.safetensors"]);
    assert!(matches!(model.weights, Weights::Safetensors { index: Some(_), .. }));

    fs::remove_file(dir.path().join("m-2.safetensors")).unwrap();
    let error = resolve_dir(dir.path()).unwrap_err().to_string();
    assert!(
        error.contains("missing file m-2.safetensors") && error.contains(r#"weight_map["a"]"#),
        "{error}"
    );
    let dummy = StoreOptions { allow_missing_weights: true, ..StoreOptions::default() };
    let model = resolve(&ModelRef::Dir(dir.path().to_owned()), &dummy).unwrap();
    assert_eq!(model.weights, Weights::Absent);
}

#[test]
fn corrupt_indexes_name_the_field() {
    for (index, word) in [
        ("", "weight_map: EOF"),
        ("[]", "weight_map: invalid length"),
        ("{}", "missing field `weight_map`"),
        (r#"{"weight_map":{}}"#, "names no tensor"),
        (r#"{"weight_map":{"t":7}}"#, "invalid type"),
        (
            r#"{"weight_map":{"t":"../../etc/passwd"}}"#,
            r#"weight_map["t"]: "../../etc/passwd": must be a plain"#,
        ),
        (r#"{"weight_map":{"t":"/etc/passwd"}}"#, "plain file name"),
        (r#"{"weight_map":{"t":"sub/x.safetensors"}}"#, "plain file name"),
        (r#"{"weight_map":{"t":".."}}"#, "plain file name"),
        (r#"{"weight_map":{"t":""}}"#, "empty file name"),
        (r#"{"weight_map":{"t":"a\u0000b"}}"#, "NUL"),
        (r#"{"weight_map":{"t":"x.bin"}}"#, "safetensors/GGUF only"),
    ] {
        let dir = dir_of(&[("config.json", "{}"), ("model.safetensors.index.json", index), ("x.bin", "x")]);
        let error = resolve_dir(dir.path()).unwrap_err();
        assert!(matches!(error, HubError::BadIndex { .. }), "{index}: {error}");
        let text = error.to_string();
        assert!(text.contains(word) && text.contains("model.safetensors.index.json"), "{index}: {text}");
    }
}

#[test]
fn choice_of_weights() {
    let one = dir_of(&[("config.json", "{}"), ("weights.safetensors", "x")]);
    assert_eq!(names(&resolve_dir(one.path()).unwrap()), ["weights.safetensors"]);
    let gguf = dir_of(&[("tiny.gguf", "GGUF")]);
    assert!(matches!(resolve_dir(gguf.path()).unwrap().weights, Weights::Gguf(_)));
    let cases: [(&[(&str, &str)], &str); 6] = [
        (&[("a.safetensors", "x"), ("b.safetensors", "x")], "2 candidates"),
        (&[("model-00001-of-00002.safetensors", "x")], "missing file model.safetensors.index.json"),
        (&[("a.gguf", "x"), ("b.gguf", "x")], "give the path of one"),
        (&[("config.json", "{}"), ("pytorch_model.bin", "x")], "safetensors/GGUF only"),
        (&[("config.json", "{}")], "no weights found"),
        (&[("model.safetensors", "x")], "missing file config.json"),
    ];
    for (files, word) in cases {
        let error = resolve_dir(dir_of(files).path()).unwrap_err().to_string();
        assert!(error.contains(word), "{files:?}: {error}");
    }
    for extension in ["bin", "pt", "pth", "pkl", "pickle", "ckpt"] {
        let dir = dir_of(&[("config.json", "{}")]);
        fs::write(dir.path().join(format!("w.{extension}")), "x").unwrap();
        assert!(matches!(resolve_dir(dir.path()), Err(HubError::PickleOnly { .. })), "{extension}");
    }
}

#[test]
fn dummy_weights_need_only_the_configuration() {
    let options = StoreOptions { allow_missing_weights: true, ..StoreOptions::default() };
    let dir = dir_of(&[("config.json", "{}")]);
    let model = resolve(&ModelRef::Dir(dir.path().to_owned()), &options).unwrap();
    assert_eq!(model.weights, Weights::Absent);
    assert!(model.weight_files().is_empty());
    let empty = dir_of(&[]);
    let error = resolve(&ModelRef::Dir(empty.path().to_owned()), &options).unwrap_err();
    assert!(error.to_string().contains("config.json"), "{error}");
}

#[test]
fn gguf_file_by_path() {
    let dir = dir_of(&[("a.gguf", "GGUF")]);
    let file = dir.path().join("a.gguf");
    let model = resolve(&ModelRef::parse(file.to_str().unwrap()).unwrap(), &StoreOptions::default()).unwrap();
    assert_eq!(model.weight_files(), [file.canonicalize().unwrap()]);
    let absent = resolve(&ModelRef::Gguf(dir.path().join("b.gguf")), &StoreOptions::default()).unwrap_err();
    assert!(absent.to_string().contains("b.gguf"), "{absent}");
    fs::create_dir(dir.path().join("d.gguf")).unwrap();
    let folder = resolve(&ModelRef::Gguf(dir.path().join("d.gguf")), &StoreOptions::default()).unwrap_err();
    assert!(matches!(folder, HubError::NotAFile { .. }), "{folder}");
    let no_dir = resolve_dir(&dir.path().join("nowhere")).unwrap_err();
    assert!(matches!(no_dir, HubError::Io { .. }), "{no_dir}");
    assert!(matches!(resolve_dir(&file), Err(HubError::Io { .. })));
}

#[test]
fn links_may_not_leave_the_directory() {
    let outside = dir_of(&[("secret.safetensors", "x"), ("config.json", "{}")]);
    let dir = dir_of(&[("config.json", "{}"), ("real.data", "x")]);
    symlink(outside.path().join("secret.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let error = resolve_dir(dir.path()).unwrap_err();
    assert!(matches!(error, HubError::Escapes { .. }), "{error}");
    assert!(error.to_string().contains("model.safetensors"), "{error}");

    // Within the directory (as Kubernetes mounts volumes) they are fine.
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    symlink("real.data", dir.path().join("model.safetensors")).unwrap();
    assert_eq!(names(&resolve_dir(dir.path()).unwrap()), ["model.safetensors"]);

    // A dangling link is an error that names it, not an absent file.
    fs::remove_file(dir.path().join("real.data")).unwrap();
    let error = resolve_dir(dir.path()).unwrap_err().to_string();
    assert!(error.contains("model.safetensors"), "{error}");
    // A directory in place of a file.
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    assert!(matches!(resolve_dir(dir.path()), Err(HubError::NotAFile { .. })));
}

#[test]
fn the_store_by_branch_and_commit() {
    let (store, options) = store_with_repo();
    for text in ["org/tiny", "org/tiny@main", &format!("org/tiny@{COMMIT}")] {
        let reference = ModelRef::parse(text).unwrap();
        let model = resolve(&reference, &options).unwrap();
        assert_eq!(model.revision.as_deref(), Some(COMMIT));
        assert_eq!(names(&model), ["model.safetensors"]);
        assert_eq!(model.reference, reference);
    }
    // The snapshot's own path works too.
    let path = store.path().join("models--org--tiny/snapshots").join(COMMIT);
    assert_eq!(names(&resolve_dir(&path).unwrap()), ["model.safetensors"]);

    let missing = |text: &str| resolve(&ModelRef::parse(text).unwrap(), &options).unwrap_err().to_string();
    assert!(missing("org/other").contains("mirai pull org/other"), "{}", missing("org/other"));
    assert!(missing("org/tiny@v2").contains("refs/v2"), "{}", missing("org/tiny@v2"));
}

#[test]
fn the_configuration_of_a_pooling_module_is_found_and_may_not_be_elsewhere() {
    let files = [
        ("config.json", "{}"),
        ("model.safetensors", "x"),
        ("1_Pooling/config.json", "{}"),
        ("2_Normalize/README", "x"),
    ];
    let dir = dir_of(&files);
    assert!(resolve_dir(dir.path()).unwrap().modules.is_empty(), "nothing names it");
    put(dir.path(), &[("modules.json", "[]")]);
    let root = dir.path().canonicalize().unwrap();
    let expected = [root.join("modules.json"), root.join("1_Pooling/config.json")];
    assert_eq!(resolve_dir(dir.path()).unwrap().modules, expected);

    let outside = dir_of(&[("config.json", "{}")]);
    fs::remove_dir_all(dir.path().join("1_Pooling")).unwrap();
    symlink(outside.path(), dir.path().join("1_Pooling")).unwrap();
    let error = resolve_dir(dir.path()).unwrap_err();
    assert!(matches!(error, HubError::Escapes { .. }), "{error}");
    assert!(error.to_string().contains("1_Pooling/config.json"), "{error}");

    // As the store has it: a link to a blob of the same repository.
    let (store, options) = store_with_repo();
    let repo = store.path().join("models--org--tiny");
    put(&repo, &[("blobs/ccc", "[]")]);
    let snapshot = repo.join("snapshots").join(COMMIT);
    fs::create_dir(snapshot.join("1_Pooling")).unwrap();
    symlink("../../blobs/ccc", snapshot.join("modules.json")).unwrap();
    symlink("../../../blobs/aaa", snapshot.join("1_Pooling/config.json")).unwrap();
    assert_eq!(resolve(&ModelRef::parse("org/tiny").unwrap(), &options).unwrap().modules.len(), 2);
}

#[test]
fn a_store_cannot_lead_out_of_itself() {
    let (store, options) = store_with_repo();
    let reference = ModelRef::parse("org/tiny").unwrap();
    let repo = store.path().join("models--org--tiny");
    let outside = dir_of(&[("x", "x")]);

    let shard = repo.join("snapshots").join(COMMIT).join("model.safetensors");
    fs::remove_file(&shard).unwrap();
    symlink(outside.path().join("x"), &shard).unwrap();
    assert!(matches!(resolve(&reference, &options), Err(HubError::Escapes { .. })));

    // `blobs` being a link elsewhere widens nothing.
    fs::remove_file(&shard).unwrap();
    symlink("../../blobs/x", &shard).unwrap();
    fs::remove_dir_all(repo.join("blobs")).unwrap();
    symlink(outside.path(), repo.join("blobs")).unwrap();
    assert!(resolve(&reference, &options).is_err());

    for evil in ["../../../etc", "/etc", "..", "", "a/b"] {
        fs::write(repo.join("refs/main"), evil).unwrap();
        let error = resolve(&reference, &options).unwrap_err();
        assert!(matches!(error, HubError::NotInStore { .. }), "{evil}: {error}");
    }
    fs::write(repo.join("refs/main"), "x".repeat(1000)).unwrap();
    assert!(matches!(resolve(&reference, &options), Err(HubError::TooLarge { .. })));
}

#[test]
fn offline_opens_no_socket() {
    let hub = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    hub.set_nonblocking(true).unwrap();
    let endpoint = format!("http://{}", hub.local_addr().unwrap());
    let (store, _) = store_with_repo();
    let cache = store.path().to_str().unwrap().to_owned();
    let options = StoreOptions::from_lookup(|name| match name {
        "HF_HUB_OFFLINE" => Some("1".into()),
        "HF_HUB_CACHE" => Some(cache.clone()),
        "HF_ENDPOINT" => Some(endpoint.clone()),
        _ => None,
    });
    // What is in the store is found, what is not is an error that says why.
    pull(&ModelRef::parse("org/tiny").unwrap(), &options, |_| {}).unwrap();
    let error = pull(&ModelRef::parse("org/absent").unwrap(), &options, |_| {}).unwrap_err();
    assert!(matches!(error, HubError::Offline { .. }));
    assert!(error.to_string().starts_with("offline (HF_HUB_OFFLINE is set): org/absent"), "{error}");
    let accepted = hub.accept().unwrap_err();
    assert_eq!(accepted.kind(), std::io::ErrorKind::WouldBlock, "a connection was opened");
}

#[test]
fn only_repositories_are_pulled() {
    let error = pull(&ModelRef::Dir("/x".into()), &StoreOptions::default(), |_| {}).unwrap_err();
    assert!(matches!(error, HubError::NotARepository { .. }), "{error}");
    if cfg!(not(feature = "download")) {
        let (_store, options) = store_with_repo();
        let error = pull(&ModelRef::parse("org/tiny").unwrap(), &options, |_| {}).unwrap_err().to_string();
        assert!(error.contains("--features download"), "{error}");
    }
}
