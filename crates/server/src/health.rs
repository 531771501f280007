//! The probes.
//!
//! Owns what each of them means. They tell the truth: a loop that does not move is not alive, whatever the
//! process says.

use hyper::StatusCode;

use crate::api::models::{Health, HealthStatus};
use crate::http::reply::{PROBLEM, Reply};
use crate::state::{Drain, State};

/// Which probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Probe {
    /// Loaded.
    Startup,
    /// Loaded, and the engine moves or is idle; also while draining or saturated.
    Live,
    /// Alive, and taking requests: also those that have to be accounted for.
    Ready,
}

/// Answers a probe.
pub(crate) fn answer(state: &State, probe: Probe) -> Reply {
    let draining = state.drain() != Drain::No;
    let ok = Health {
        status: HealthStatus::Word("ok".to_owned()),
        phase: None,
        percent: None,
        draining,
        kind: None,
        title: None,
        detail: None,
    };
    let Some(live) = state.live() else {
        if state.failed().is_some() {
            return problem(
                Health { detail: Some("the model could not be loaded".to_owned()), ..ok },
                "load failed",
            );
        }
        let loading = state.loading();
        let ok = Health { phase: Some(loading.phase), percent: Some(loading.percent), ..ok };
        return problem(ok, "loading");
    };
    if probe != Probe::Startup
        && let Err(reason) = state.engine_moves(&live.engine)
    {
        return problem(Health { detail: Some(reason), ..ok }, "not alive");
    }
    if let Some(accounting) = state.accounting().filter(|_| probe != Probe::Startup) {
        if accounting.ledger.health() == mirai_ledger::Health::Broken {
            return problem(Health { detail: Some("the ledger is broken".to_owned()), ..ok }, "not alive");
        }
        if probe == Probe::Ready && accounting.takes_more().is_err() {
            let detail = Some("requests cannot be accounted for now".to_owned());
            return problem(Health { detail, ..ok }, "not ready");
        }
    }
    if probe == Probe::Ready && draining {
        return problem(ok, "draining");
    }
    Reply::json(&ok)
}

fn problem(health: Health, title: &str) -> Reply {
    let status = StatusCode::SERVICE_UNAVAILABLE;
    let health = Health {
        status: HealthStatus::Code(status.as_u16()),
        kind: Some("about:blank".to_owned()),
        title: Some(title.to_owned()),
        ..health
    };
    let mut reply = Reply::json(&health);
    reply.status = status;
    reply.content_type = PROBLEM;
    reply.retry_after = Some(1);
    reply
}
