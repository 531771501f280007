//! What administrators may see and do, on a listener of their own.
//!
//! Owns the answers; who is an administrator is decided before. Never shows a key, a hash or a secret.

use std::sync::Arc;

use hyper::StatusCode;
use serde::Serialize;

use mirai_ledger::Scopes;
use mirai_ledger::identity::Quota;

use crate::error::ApiError;
use crate::http::reply::{JSON, Reply};
use crate::metrics::Reloaded;
use crate::state::State;

#[derive(Serialize)]
struct Applications {
    object: &'static str,
    data: Vec<Entry>,
}

#[derive(Serialize)]
struct Entry {
    name: String,
    weight: u32,
    scopes: Scopes,
    gateway: bool,
    cache_group: Option<String>,
    quota: Quota,
    key_ids: Vec<String>,
    clients: Vec<Client>,
}

#[derive(Serialize)]
struct Client {
    provider: String,
    id: String,
}

/// `GET /admin/applications`: what is in force.
pub(super) fn applications(state: &State) -> Reply {
    let all = state.auth.applications();
    let data = all.iter().map(|known| {
        let application = &known.application;
        let client =
            |(provider, id): (&str, &str)| Client { provider: provider.to_owned(), id: id.to_owned() };
        Entry {
            name: application.name.clone(),
            weight: application.weight,
            scopes: application.scopes,
            gateway: application.gateway,
            cache_group: application.cache_group.clone(),
            quota: application.quota,
            key_ids: application.key_ids().map(str::to_owned).collect(),
            clients: application.clients().map(client).collect(),
        }
    });
    Reply::json(&Applications { object: "list", data: data.collect() })
}

/// `POST /admin/reload`: takes what the files hold now, all of it or nothing.
pub(super) async fn reload(state: &Arc<State>) -> Result<Reply, ApiError> {
    let auth = state.auth.clone();
    let read = tokio::task::spawn_blocking(move || auth.reload()).await;
    let result = read.map_err(|_| ApiError::internal("this request failed; others are not affected"))?;
    state.metrics.reloaded(Reloaded::Identity, result.is_ok());
    if let Err(error) = result {
        tracing::error!(%error, "applications and their secrets not reloaded; the old ones stay");
        // It names files: for the log, not for the network.
        return Err(ApiError::reload_refused("a file cannot be used; the log says which. The old ones stay"));
    }
    Ok(Reply::new(StatusCode::OK, JSON, &b"{\"status\":\"ok\"}"[..]))
}
