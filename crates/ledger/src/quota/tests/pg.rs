//! The same suite on PostgreSQL.

use super::*;
use crate::store::tests::pg::Server;

#[test]
fn the_suite_of_quotas_holds_on_postgresql() {
    let Some(server) = Server::start() else { return };
    rules::all(|| server.database());
    history::agrees_with_the_oracle(if cfg!(coverage) { 2 } else { 4 }, || server.database());
    two_processes_do_not_exceed_a_limit(&server);
}

/// Two replicas with threads of their own, as two processes have them.
fn two_processes_do_not_exceed_a_limit(server: &Server) {
    let schema = server.database();
    let config = || QuotaConfig { max_wait: Duration::from_secs(60), ..config() };
    let quotas: Vec<Arc<Quotas>> =
        (0..2).map(|_| Arc::new(Quotas::start(schema.connect(), config()).unwrap())).collect();
    let app = application("a", "tokens_per_day = 50000\nconcurrent_requests = 40");
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
    let streams: Vec<_> = (0..64usize)
        .map(|n| {
            let (quotas, app) = (quotas[n % 2].clone(), app.clone());
            runtime.spawn(async move {
                let mut used = 0;
                loop {
                    match quotas.reserve(&app.name, &app.quota, demand(10, 190)).await {
                        Ok(held) => {
                            let tokens = 10 + n as u64;
                            used += tokens;
                            held.settle(tokens);
                        }
                        Err(Refusal::Exceeded(no)) if no.kind == Kind::TokensPerDay => return used,
                        Err(_) => tokio::task::yield_now().await,
                    }
                }
            })
        })
        .collect();
    let used: u64 = streams.into_iter().map(|stream| runtime.block_on(stream).unwrap()).sum();
    assert!(used <= 50_000, "{used}");
    assert!(used > 30_000, "{used}");
    drop(quotas);
    let world = World { db: schema, ..World::new(server.database(), 0, super::config()) };
    assert_eq!(world.stored("a", Kind::TokensPerDay), (used, 0));
    assert_eq!(world.stored("a", Kind::ConcurrentRequests), (0, 0));
}
