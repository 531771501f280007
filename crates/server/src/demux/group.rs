//! One HTTP request in the demultiplexer: all choices of all its prompts, and where their output goes.
//!
//! Owns the order of events on a stream and the moment an answer is complete; it never blocks and never waits
//! for a client.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mirai_engine::{Event, FinishReason, RequestId, RowFault, SamplingParams, SeqUsage, Time, TokenLogprobs};

use super::choice::{Choice, Pushed};
use super::clock::Clock;
use super::outcome::outcome;
use super::settle::Settlement;
use super::sink::Sink;
use super::ticket::Ticket;
use super::{Context, Fallible};
use crate::account::Account;
use crate::error::ApiError;
use crate::format::chunk::{self, Events, Finish, Piece, UsageCounts, UsageField};
use crate::format::logprobs::{self, Names};
use crate::format::whole::{self, Identity, PromptDetails, WholeChoice};
use crate::metrics::Ended;
use crate::validate::{Kind, OutputOptions, Prompt};

/// A request on its way into the demultiplexer.
#[derive(Debug)]
pub(crate) struct Registration {
    pub(crate) kind: Kind,
    /// `chatcmpl-...` or `cmpl-...`.
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: Arc<str>,
    /// The engine's id of the first prompt; the others follow.
    pub(crate) first: RequestId,
    pub(crate) prompts: Vec<Prompt>,
    pub(crate) n: u32,
    pub(crate) sampling: Arc<SamplingParams>,
    pub(crate) output: OutputOptions,
    pub(crate) sink: Sink,
    pub(crate) ticket: Arc<Ticket>,
    /// The request's row.
    pub(crate) account: Account,
    /// When the head of the request arrived.
    pub(crate) arrived: Instant,
    /// The same on the engine's clock.
    pub(crate) arrived_engine: Time,
}

struct PromptState {
    ids: Arc<[u32]>,
    echo: Option<String>,
    cached: u32,
    /// For an echo that shows log-probabilities.
    entries: Vec<TokenLogprobs>,
    /// As JSON.
    logprobs: Option<Vec<u8>>,
}

/// One request and its answer so far.
pub(crate) struct Group {
    kind: Kind,
    id: String,
    created: u64,
    model: Arc<str>,
    pub(crate) first: RequestId,
    n: u32,
    sampling: Arc<SamplingParams>,
    output: OutputOptions,
    prompts: Vec<PromptState>,
    choices: Vec<Choice>,
    clocks: Vec<Clock>,
    before_text: Vec<Vec<u8>>,
    events: Events,
    sink: Sink,
    pub(crate) ticket: Arc<Ticket>,
    settlement: Settlement,
    arrived: Instant,
    arrived_engine: Time,
    /// Bytes of this batch.
    out: Vec<u8>,
    pub(crate) last_sent: Instant,
    /// Choices of which the engine will still speak.
    open: u32,
    usage: UsageCounts,
    /// The answer is complete, or broken; later events only count.
    closed: bool,
    failed: bool,
    pub(crate) dirty: bool,
}

impl Group {
    pub(crate) fn new(registration: Registration, cx: &Context, now: Instant) -> Self {
        let r = registration;
        let events = Events::new(r.kind, &r.id, r.created, &r.model);
        let count = r.prompts.len() as u32 * r.n;
        let mut choices = Vec::with_capacity(count as usize);
        for prompt in &r.prompts {
            choices.extend((0..r.n).map(|_| Choice::new(r.kind, prompt, &r.output, &cx.model)));
        }
        let streams = matches!(r.sink, Sink::Stream(_));
        let before_text =
            if streams { (0..count).map(|i| events.before_text(i)).collect() } else { Vec::new() };
        let prompt_tokens = r.prompts.iter().map(|p| p.ids.len() as u64).sum();
        let prompts = r
            .prompts
            .into_iter()
            .map(|p| PromptState { ids: p.ids, echo: p.echo, cached: 0, entries: Vec::new(), logprobs: None })
            .collect();
        Self {
            kind: r.kind,
            id: r.id,
            created: r.created,
            model: r.model,
            first: r.first,
            n: r.n,
            sampling: r.sampling,
            output: r.output,
            prompts,
            choices,
            clocks: vec![Clock::default(); count as usize],
            before_text,
            events,
            sink: r.sink,
            ticket: r.ticket,
            settlement: Settlement::new(r.account, streams),
            arrived: r.arrived,
            arrived_engine: r.arrived_engine,
            out: Vec::new(),
            last_sent: now,
            open: count,
            usage: UsageCounts { prompt: prompt_tokens, ..UsageCounts::default() },
            closed: false,
            failed: false,
            dirty: false,
        }
    }

    /// Engine ids of its prompts.
    pub(crate) fn requests(&self) -> impl Iterator<Item = RequestId> + use<> {
        let first = self.first.0;
        (0..self.prompts.len() as u64).map(move |i| RequestId(first + i))
    }

    /// Whether the engine has said its last word on every choice.
    pub(crate) fn is_over(&self) -> bool {
        self.open == 0
    }

    /// Ends the request's row.
    pub(crate) fn settle(&self) {
        self.settlement.close(self.usage, &self.ticket);
    }

    /// Ends the row of a request that has failed, if the engine does not confirm its end.
    pub(crate) fn settle_late(&self, now: Instant) {
        if self.settlement.is_overdue(now) {
            self.settle();
        }
    }

    /// Takes one event of prompt `prompt`.
    pub(crate) fn on_event(&mut self, prompt: u32, event: &Event, cx: &Context, now: Instant) {
        let choice = match event {
            Event::Prefilled { choice, .. }
            | Event::Token { choice, .. }
            | Event::Finished { choice, .. } => *choice,
            Event::Pooled { .. } => 0,
        };
        let index = (prompt * self.n + choice) as usize;
        if index >= self.choices.len() {
            return;
        }
        match event {
            Event::Prefilled { cached_tokens, scheduled, prompt_logprobs, .. } => {
                let waited = scheduled.saturating_sub(self.arrived_engine);
                let scheduled = self.arrived + waited;
                self.clocks[index].schedule(scheduled);
                if choice == 0 {
                    cx.metrics.queue.observe_time(waited);
                    self.prefilled(prompt as usize, *cached_tokens, prompt_logprobs, cx);
                }
                self.start(index, cx);
            }
            Event::Token { token, logprobs, .. } => {
                self.start(index, cx);
                self.token(index, *token, logprobs.as_deref(), cx, now);
            }
            Event::Pooled { .. } => {}
            Event::Finished { reason, usage, .. } => self.finished(index, reason, usage, cx, now),
        }
    }

    fn prefilled(&mut self, prompt: usize, cached: u32, entries: &[TokenLogprobs], cx: &Context) {
        let state = &mut self.prompts[prompt];
        state.cached = cached;
        self.usage.cached += u64::from(cached);
        self.ticket.cached_tokens.store(self.usage.cached, Ordering::Relaxed);
        cx.metrics.cached_tokens.add(u64::from(cached));
        if self.output.prompt_logprobs {
            let mut out = Vec::new();
            logprobs::prompt(&mut out, entries, &cx.model.tokenizer);
            state.logprobs = Some(out);
        }
        if self.output.echo && self.output.logprobs {
            state.entries = entries.to_vec();
        }
    }

    /// The first thing that is heard of a choice.
    fn start(&mut self, index: usize, cx: &Context) {
        if self.choices[index].started || self.closed {
            return;
        }
        self.choices[index].started = true;
        let prompt = &self.prompts[index / self.n as usize];
        if let Some(text) = &prompt.echo {
            let names = Names { tokenizer: &cx.model.tokenizer, as_ids: self.output.tokens_as_ids };
            let names = self.output.logprobs.then_some(names);
            self.choices[index].echo(text, &prompt.ids, &prompt.entries, names);
        }
        let ids = self.output.return_token_ids.then_some(&*prompt.ids);
        if !matches!(self.sink, Sink::Stream(_)) {
            return;
        }
        match self.kind {
            Kind::Chat => {
                self.events.role(&mut self.out, index as u32, ids, usage_field(&self.output, self.usage));
                self.dirty = true;
            }
            Kind::Completion if ids.is_some() || prompt.echo.is_some() => {
                let pending = &mut self.choices[index].pending;
                let piece = Piece {
                    text: &pending.text,
                    logprobs: Some(&pending.logprobs),
                    prompt_token_ids: ids,
                    ..Piece::default()
                };
                let usage = usage_field(&self.output, self.usage);
                self.events.text(&mut self.out, &self.before_text[index], &piece, usage);
                pending.clear();
                self.dirty = true;
            }
            Kind::Completion => {}
        }
    }

    fn token(&mut self, index: usize, token: u32, entry: Option<&TokenLogprobs>, cx: &Context, now: Instant) {
        if self.closed || self.choices[index].finish.is_some() {
            return;
        }
        let request = RequestId(self.first.0 + index as u64 / u64::from(self.n));
        let number = index as u32 % self.n;
        if self.output.echo_only {
            self.choices[index].finish = Some(Finish { reason: "length", stop: None });
            cx.engine.stop(request, number, 0);
            self.end_chunk(index);
            return;
        }
        self.clocks[index].token(self.arrived, now, &self.ticket, &cx.metrics);
        self.usage.completion += 1;
        self.ticket.completion_tokens.store(self.usage.completion, Ordering::Relaxed);
        cx.metrics.generation_tokens.inc();
        let names = Names { tokenizer: &cx.model.tokenizer, as_ids: self.output.tokens_as_ids };
        let choice = &mut self.choices[index];
        let pushed = choice.push(token, entry, &self.sampling, &self.output, names);
        self.usage.reasoning += u64::from(choice.new_reasoning_tokens());
        self.text_chunk(index);
        if pushed == Pushed::Stopped {
            cx.engine.stop(request, number, self.choices[index].tokens);
            self.end_chunk(index);
        }
    }

    /// Sends what a choice has, if it streams.
    fn text_chunk(&mut self, index: usize) {
        let pending = &mut self.choices[index].pending;
        if pending.is_empty() || !matches!(self.sink, Sink::Stream(_)) {
            return;
        }
        let piece = Piece {
            text: &pending.text,
            reasoning: &pending.reasoning,
            logprobs: Some(&pending.logprobs),
            token_ids: self.output.return_token_ids.then_some(&pending.token_ids),
            prompt_token_ids: None,
        };
        let usage = usage_field(&self.output, self.usage);
        self.events.text(&mut self.out, &self.before_text[index], &piece, usage);
        pending.clear();
        self.dirty = true;
    }

    fn end_chunk(&mut self, index: usize) {
        if let (Sink::Stream(_), Some(finish)) = (&self.sink, &self.choices[index].finish) {
            let usage = usage_field(&self.output, self.usage);
            self.events.finish(&mut self.out, index as u32, finish, usage);
            self.dirty = true;
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
        if self.choices[index].ended {
            return;
        }
        self.choices[index].ended = true;
        self.open -= 1;
        if !self.closed && self.choices[index].finish.is_none() {
            match outcome(reason, &self.sampling, cx, self.choices[index].tokens) {
                Ok(finish) => {
                    self.start(index, cx);
                    let choice = &mut self.choices[index];
                    choice.close(finish, &self.output);
                    self.usage.reasoning += u64::from(choice.new_reasoning_tokens());
                    self.text_chunk(index);
                    self.end_chunk(index);
                }
                Err(error) => self.fail(&error, cx),
            }
        }
        self.count_end(index, reason, usage, cx, now);
        if self.open == 0 && !self.closed {
            self.complete();
        }
        if self.open == 0 {
            cx.metrics.e2e.observe_time(now.saturating_duration_since(self.arrived));
            cx.metrics.engine_requests_ended(self.prompts.len() as u64);
        }
    }

    fn count_end(
        &mut self,
        index: usize,
        reason: &FinishReason,
        usage: &SeqUsage,
        cx: &Context,
        now: Instant,
    ) {
        let choice = &self.choices[index];
        let metrics = &cx.metrics;
        let ended = if self.ticket.has_left() {
            Ended::Abort
        } else if self.failed || self.ticket.is_gone() {
            Ended::Error
        } else if choice.finish.as_ref().is_some_and(|f| f.reason == "stop") {
            Ended::Stop
        } else {
            Ended::Length
        };
        metrics.finished(ended);
        if *reason == FinishReason::Fault(RowFault::NonFinite) {
            metrics.corrupted.inc();
        }
        let estimate = cx.model.estimate(choice.tokens, now.saturating_duration_since(self.arrived));
        let stopped = ended == Ended::Stop;
        let wasted = self.settlement.part_ended(reason, stopped, usage, choice.tokens, estimate);
        self.usage.impacts = self.settlement.impacts(cx.model.footprint);
        self.usage.cost = self.settlement.cost(self.usage, &self.ticket);
        metrics.wasted_tokens.add(wasted);
        metrics.preemptions.observe(f64::from(usage.preemptions));
        metrics.request_generation_tokens.observe(f64::from(choice.tokens));
        self.clocks[index].end(choice.tokens, now, metrics);
    }

    /// The answer is complete.
    fn complete(&mut self) {
        self.closed = true;
        self.ticket.finish(1);
        // Before the answer: what it says of the application's limits has happened.
        self.settle();
        match &mut self.sink {
            Sink::Stream(buffer) => {
                if self.output.include_usage {
                    self.events.usage(&mut self.out, self.usage);
                }
                self.out.extend_from_slice(chunk::DONE);
                buffer.finish(&self.out);
                self.out.clear();
                self.dirty = false;
            }
            Sink::Whole(sender) => {
                if let Some(sender) = sender.take() {
                    // A receiver that is gone was its client's.
                    let _ = sender.send(Ok(self.whole().into()));
                }
            }
        }
    }

    fn whole(&self) -> Vec<u8> {
        let identity = Identity { kind: self.kind, id: &self.id, created: self.created, model: &self.model };
        let ids = self.output.return_token_ids;
        let ended = Finish { reason: "length", stop: None };
        let choices = self.choices.iter().enumerate().map(|(index, choice)| {
            let prompt = &self.prompts[index / self.n as usize];
            WholeChoice {
                index: index as u32,
                text: &choice.pending.text,
                reasoning: &choice.pending.reasoning,
                logprobs: self.output.logprobs.then_some(&choice.pending.logprobs),
                finish: choice.finish.as_ref().unwrap_or(&ended),
                token_ids: ids.then_some(&choice.pending.token_ids),
                prompt: PromptDetails {
                    logprobs: prompt.logprobs.as_deref(),
                    ids: ids.then_some(&*prompt.ids),
                },
            }
        });
        whole::write(identity, choices, self.usage)
    }

    /// Hands the batch's bytes over. A client that lets too much wait loses its request.
    pub(crate) fn flush(&mut self, cx: &Context, now: Instant) {
        self.dirty = false;
        let Sink::Stream(buffer) = &self.sink else { return };
        self.last_sent = now;
        self.settlement.checkpoint(self.usage, &self.ticket);
        if !buffer.push(&mut self.out, self.usage.completion, cx.max_stream_buffer) {
            self.out.clear();
            cx.metrics.slow_readers.inc();
            self.fail(&ApiError::slow_reader("the client reads its stream too slowly"), cx);
        }
    }

    /// A comment, if nothing was sent for `every`.
    pub(crate) fn ping(&mut self, every: Duration, cx: &Context, now: Instant) {
        let silent = now.saturating_duration_since(self.last_sent) >= every;
        if silent && !self.closed && matches!(self.sink, Sink::Stream(_)) {
            self.out.extend_from_slice(chunk::PING);
            self.flush(cx, now);
        }
    }
}

impl Fallible for Group {
    /// Ends the request with an error, and its sequences with it.
    fn fail(&mut self, error: &ApiError, cx: &Context) {
        if self.closed {
            return;
        }
        self.closed = true;
        self.failed = true;
        self.settlement.failed(error);
        self.ticket.finish(if error.code == "deadline_exceeded" { 4 } else { 2 });
        match &mut self.sink {
            Sink::Stream(buffer) => {
                chunk::error(&mut self.out, error, cx.error_message_copy);
                self.out.extend_from_slice(chunk::DONE);
                buffer.finish(&self.out);
                self.out = Vec::new();
                self.dirty = false;
            }
            Sink::Whole(sender) => {
                if let Some(sender) = sender.take() {
                    let _ = sender.send(Err(error.clone()));
                }
            }
        }
        for request in self.requests() {
            cx.engine.cancel(request);
        }
    }
}

fn usage_field(output: &OutputOptions, usage: UsageCounts) -> UsageField {
    match (output.include_usage, output.continuous_usage) {
        (false, _) => UsageField::Left,
        (true, false) => UsageField::Null,
        (true, true) => UsageField::SoFar(usage),
    }
}
