//! The official Python client's embeddings, and rerank and score in the shapes of gateways:
//! `tests/python/test_pooling.py`.
//!
//! `MIRAI_TEST_PYTHON` names a Python that has the package `openai` (`.ci/run` makes one); without it this test says
//! so and does nothing.

use std::path::Path;
use std::process::Command;

use crate::pooling::{embedder, scorer};
use crate::support::*;

#[tokio::test(flavor = "multi_thread")]
async fn python_clients_embed_rerank_and_score() {
    let Some(python) = std::env::var_os("MIRAI_TEST_PYTHON") else {
        println!("skipped: MIRAI_TEST_PYTHON names no Python with the package openai");
        return;
    };
    let start = async |mut options: Options| {
        options.config.api_keys = vec!["k1".to_owned()];
        TestServer::start(options).await
    };
    let (embedder, scorer) = (start(embedder()).await, start(scorer()).await);
    let url = |server: &TestServer| format!("http://{}", server.address);
    let mut command = Command::new(python);
    command
        .args(["-m", "unittest", "-v", "test_pooling"])
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/python"))
        .envs([("MIRAI_EMBED_URL", url(&embedder)), ("MIRAI_SCORE_URL", url(&scorer))])
        .envs([("MIRAI_KEY", "k1"), ("PYTHONDONTWRITEBYTECODE", "1")]);
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let report = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{report}");
    assert!(report.contains("\nOK") && !report.contains("skipped"), "{report}");
    embedder.stop().await;
    scorer.stop().await;
}
