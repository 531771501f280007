//! Calls that end in pooling: their items' numbers, until all are there.
//!
//! Owns the count of items that have ended; it never writes an answer (the handler does, off this thread).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use mirai_engine::{Event, FinishReason, RequestId, RowFault, SamplingParams, SeqUsage, Time};
use tokio::sync::{oneshot, watch};

use super::outcome::outcome;
use super::settle::Settlement;
use super::ticket::Ticket;
use super::{Context, Fallible, guarded};
use crate::account::Account;
use crate::error::ApiError;
use crate::format::chunk::UsageCounts;
use crate::metrics::Ended;

/// What a call gave, and took.
#[derive(Debug)]
pub(crate) struct Pooled {
    /// Of each item, in their order.
    pub(crate) values: Vec<Box<[f32]>>,
    /// In the price list's currency, where its model has a price.
    pub(crate) cost: Option<f64>,
    /// kWh and kgCO2eq, where the site says what energy means.
    pub(crate) impacts: Option<(f64, f64)>,
}

/// A call on its way into the demultiplexer.
#[derive(Debug)]
pub(crate) struct Registration {
    /// The engine's id of the first item; the others follow.
    pub(crate) first: RequestId,
    pub(crate) items: u32,
    pub(crate) ticket: Arc<Ticket>,
    /// The call's row.
    pub(crate) account: Account,
    /// When the head of the request arrived.
    pub(crate) arrived: Instant,
    /// The same on the engine's clock.
    pub(crate) arrived_engine: Time,
    /// Told how many items have ended; dropped when the call is decided.
    pub(crate) progress: watch::Sender<u32>,
    pub(crate) sink: oneshot::Sender<Result<Pooled, ApiError>>,
}

/// One call.
struct Call {
    first: RequestId,
    items: u32,
    ticket: Arc<Ticket>,
    settlement: Settlement,
    arrived: Instant,
    arrived_engine: Time,
    progress: Option<watch::Sender<u32>>,
    sink: Option<oneshot::Sender<Result<Pooled, ApiError>>>,
    values: Vec<Option<Box<[f32]>>>,
    scheduled: Vec<Option<Instant>>,
    /// Items of which the engine has said its last word.
    ended: u32,
    cached: u64,
    failed: bool,
}

impl Call {
    fn new(registration: Registration) -> Self {
        let r = registration;
        Self {
            first: r.first,
            items: r.items,
            ticket: r.ticket,
            settlement: Settlement::new(r.account, false),
            arrived: r.arrived,
            arrived_engine: r.arrived_engine,
            progress: Some(r.progress),
            sink: Some(r.sink),
            values: (0..r.items).map(|_| None).collect(),
            scheduled: vec![None; r.items as usize],
            ended: 0,
            cached: 0,
            failed: false,
        }
    }

    /// Whether nothing more will be heard of it: items that the engine never took do not end.
    fn is_over(&self) -> bool {
        self.ended >= self.ticket.submitted().unwrap_or(self.items).min(self.items)
    }

    fn on_event(&mut self, index: usize, event: &Event, cx: &Context, now: Instant) {
        match event {
            Event::Prefilled { cached_tokens, scheduled, .. } => {
                let waited = scheduled.saturating_sub(self.arrived_engine);
                cx.metrics.queue.observe_time(waited);
                cx.metrics.cached_tokens.add(u64::from(*cached_tokens));
                self.cached += u64::from(*cached_tokens);
                self.ticket.cached_tokens.store(self.cached, Ordering::Relaxed);
                self.scheduled[index] = Some(self.arrived + waited);
            }
            Event::Pooled { values, .. } => {
                if let Some(scheduled) = self.scheduled[index] {
                    cx.metrics.prefill.observe_time(now.saturating_duration_since(scheduled));
                }
                self.values[index] = Some(values.clone());
            }
            Event::Finished { reason, usage, .. } => self.finished(index, reason, usage, cx, now),
            Event::Token { .. } => {}
        }
    }

    fn finished(
        &mut self,
        index: usize,
        reason: &FinishReason,
        usage: &SeqUsage,
        cx: &Context,
        now: Instant,
    ) {
        self.ended += 1;
        cx.metrics.engine_requests_ended(1);
        if let Err(mut error) = outcome(reason, &SamplingParams::default(), cx, 0) {
            if self.items > 1 {
                error.message = format!("item {index}: {}", error.message);
            }
            self.fail(&error, cx);
        }
        self.count_end(index, reason, usage, cx, now);
        if let Some(progress) = &self.progress {
            progress.send_replace(self.ended);
        }
        if self.ended == self.items {
            self.complete(cx);
            cx.metrics.e2e.observe_time(now.saturating_duration_since(self.arrived));
        }
    }

    fn usage(&self) -> UsageCounts {
        UsageCounts { cached: self.cached, ..UsageCounts::default() }
    }

    /// Ends the call's row.
    fn settle(&self) {
        self.settlement.close(self.usage(), &self.ticket);
    }

    fn count_end(
        &mut self,
        index: usize,
        reason: &FinishReason,
        usage: &SeqUsage,
        cx: &Context,
        now: Instant,
    ) {
        let metrics = &cx.metrics;
        metrics.finished(if self.ticket.has_left() {
            Ended::Abort
        } else if self.failed || self.ticket.is_gone() {
            Ended::Error
        } else {
            Ended::Stop
        });
        if *reason == FinishReason::Fault(RowFault::NonFinite) {
            metrics.corrupted.inc();
        }
        metrics.wasted_tokens.add(self.settlement.part_ended(reason, true, usage, 0, None));
        metrics.preemptions.observe(f64::from(usage.preemptions));
        if let Some(scheduled) = self.scheduled[index] {
            metrics.inference.observe_time(now.saturating_duration_since(scheduled));
        }
    }

    /// Every item has ended.
    fn complete(&mut self, cx: &Context) {
        let Some(sink) = self.sink.take() else { return };
        self.progress = None;
        let values: Option<Vec<_>> = self.values.iter_mut().map(Option::take).collect();
        self.ticket.finish(if values.is_some() { 1 } else { 2 });
        let cost = self.settlement.cost(self.usage(), &self.ticket);
        let impacts = self.settlement.impacts(cx.model.footprint);
        // Before the answer: what it says of the application's limits has happened.
        self.settle();
        // A receiver that is gone was its client's.
        let pooled = values.map(|values| Pooled { values, cost, impacts });
        let _ = sink.send(pooled.ok_or_else(|| ApiError::internal("an item ended without its numbers")));
    }
}

impl Fallible for Call {
    /// Ends the call with an error, and its items with it.
    fn fail(&mut self, error: &ApiError, cx: &Context) {
        let Some(sink) = self.sink.take() else { return };
        self.failed = true;
        self.settlement.failed(error);
        for item in 0..u64::from(self.items) {
            cx.engine.cancel(RequestId(self.first.0 + item));
        }
        self.ticket.finish(if error.code == "deadline_exceeded" { 4 } else { 2 });
        let _ = sink.send(Err(error.clone()));
        self.progress = None;
    }
}

/// The open calls, by the id of their first item.
#[derive(Default)]
pub(super) struct Calls {
    open: BTreeMap<RequestId, Call>,
}

impl Calls {
    pub(super) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    pub(super) fn insert(&mut self, registration: Registration, cx: &Context) {
        cx.metrics.streams.add(1);
        self.open.insert(registration.first, Call::new(registration));
    }

    /// Takes an event, if it is one of a call.
    pub(super) fn take(&mut self, request: RequestId, event: &Event, cx: &Context, now: Instant) {
        let Some((&first, call)) = self.open.range_mut(..=request).next_back() else { return };
        let index = request.0 - first.0;
        if index >= u64::from(call.items) {
            return;
        }
        guarded(call, cx, |call, cx| call.on_event(index as usize, event, cx, now));
        if call.is_over() {
            self.remove(first, cx);
        }
    }

    /// Forgets calls that were refused or left half way, and ends rows whose engine is silent.
    pub(super) fn tick(&mut self, cx: &Context, now: Instant) {
        for call in self.open.values_mut().filter(|call| call.settlement.is_overdue(now)) {
            guarded(call, cx, |call, _| call.settle());
        }
        let over: Vec<RequestId> =
            self.open.iter().filter(|(_, call)| call.is_over()).map(|(&first, _)| first).collect();
        for first in over {
            self.remove(first, cx);
        }
    }

    /// Ends every call with this error.
    pub(super) fn fail_all(&mut self, error: &ApiError, cx: &Context) {
        for call in self.open.values_mut() {
            guarded(call, cx, |call, cx| call.fail(error, cx));
        }
    }

    /// The same, when the engine will say nothing more.
    pub(super) fn end(&mut self, error: &ApiError, cx: &Context) {
        self.fail_all(error, cx);
        while let Some((&first, _)) = self.open.first_key_value() {
            self.remove(first, cx);
        }
    }

    fn remove(&mut self, first: RequestId, cx: &Context) {
        let Some(mut call) = self.open.remove(&first) else { return };
        guarded(&mut call, cx, |call, _| call.settle());
        // Whoever still waits is woken by this, which runs code that is not ours.
        guarded(&mut call, cx, |call, _| {
            call.progress = None;
            call.sink = None;
        });
        if call.ticket.has_left() {
            cx.metrics.disconnects.inc();
        }
        cx.metrics.streams.add(-1);
    }
}
