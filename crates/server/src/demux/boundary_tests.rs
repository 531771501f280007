//! The boundary of a request in the demultiplexer: a panic inside it ends that request and no other.

use std::sync::Arc;
use std::sync::mpsc;
use std::task::{Wake, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use mirai_engine::sim::{SimConfig, SimExecutor};
use mirai_engine::{EngineConfig, Event, FinishReason, Geometry, GroupKind, RequestId, SamplingParams};
use mirai_text::Tokenizer;
use serde_json::{Value, json};
use tokio::sync::{oneshot, watch};

use super::sink::Sink;
use super::stream::{Polled, StreamBuffer};
use super::ticket::{LeaveGuard, Ticket};
use super::{CallRegistration, Context, Demux, Pooled, Registration};
use crate::account::Account;
use crate::error::ApiError;
use crate::metrics::Metrics;
use crate::model::{GenerationDefaults, ModelInfo, ServedModel};
use crate::task::Task;
use crate::validate::{Kind, OutputOptions, Prompt};

/// Longest that the test waits for the thread.
const PATIENCE: Duration = Duration::from_secs(60);

fn served() -> ServedModel {
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "ignore_merges": false, "vocab": {"a": 0, "b": 1}, "merges": []},
    });
    let geometry = Geometry {
        groups: vec![GroupKind::Full],
        blocks: 16,
        slots: 4,
        snapshots: 0,
        max_step_tokens: 16,
        max_context: 64,
        vocab: 2,
        generates: true,
        pools: false,
        whole_prompts: false,
    };
    let (engine, events) = mirai_engine::start(EngineConfig::default(), move || {
        Ok(Box::new(SimExecutor::new(SimConfig::new(geometry))))
    })
    .unwrap();
    ServedModel {
        names: vec!["m".to_owned()],
        revision: String::new(),
        estimate: None,
        footprint: None,
        task: Task::Generate,
        max_model_len: 64,
        tokenizer: Tokenizer::from_json_bytes(tokenizer.to_string().as_bytes()).unwrap(),
        template: None,
        reasoning: None,
        eos_token_ids: Vec::new(),
        bos_token_id: None,
        generation_defaults: GenerationDefaults::default(),
        vocab: 2,
        created: 0,
        fim: None,
        engine,
        events,
    }
}

fn stream(first: u64, buffer: &Arc<StreamBuffer>) -> Registration {
    Registration {
        kind: Kind::Completion,
        id: format!("cmpl-{first}"),
        created: 0,
        model: "m".into(),
        first: RequestId(first),
        prompts: vec![Prompt { ids: [0].into(), echo: None, max_tokens: 8, reasoning: None }],
        n: 1,
        sampling: Arc::new(SamplingParams::default()),
        output: OutputOptions { stream: true, ..OutputOptions::default() },
        sink: Sink::Stream(buffer.clone()),
        ticket: Arc::new(Ticket::new(1)),
        account: Account::default(),
        arrived: Instant::now(),
        arrived_engine: Duration::ZERO,
    }
}

fn token(request: u64, index: u32) -> Event {
    Event::Token { request: RequestId(request), choice: 0, index, token: 1, logprobs: None }
}

/// Whoever waits for this stream panics when it is told of bytes: inside the request's own code.
struct Bomb;

impl Wake for Bomb {
    fn wake(self: Arc<Self>) {
        panic!("injected into one request");
    }
}

/// Tells the test's thread.
struct Unpark(std::thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// The stream to its end, or to `least` bytes.
fn read(buffer: &StreamBuffer, least: Option<usize>) -> String {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let start = Instant::now();
    let mut all = Vec::<u8>::new();
    while least.is_none_or(|least| all.len() < least) {
        match buffer.poll(&std::task::Context::from_waker(&waker)) {
            Polled::Bytes(bytes) => all.extend_from_slice(&bytes),
            Polled::End => break,
            Polled::Held(_) => unreachable!("there is no row"),
            Polled::Nothing => std::thread::park_timeout(PATIENCE.saturating_sub(start.elapsed())),
        }
        assert!(start.elapsed() < PATIENCE, "{}", String::from_utf8_lossy(&all));
    }
    String::from_utf8(Bytes::from(all).to_vec()).unwrap()
}

fn data(text: &str) -> Vec<Value> {
    let lines = text.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|line| *line != "[DONE]");
    lines.map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A demultiplexer whose events the test makes.
fn start() -> (Demux, mpsc::SyncSender<Vec<Event>>, Arc<Metrics>) {
    let (info, engine, _own_events) = ModelInfo::split(served());
    let metrics = Arc::new(Metrics::new());
    let context = Context {
        model: Arc::new(info),
        engine,
        metrics: metrics.clone(),
        max_stream_buffer: 1 << 20,
        error_message_copy: false,
    };
    let (events, received) = mpsc::sync_channel(8);
    (Demux::start(context, received, None).unwrap(), events, metrics)
}

/// A call of `items` items, and its two ends: progress and answer.
type CallEnds = (watch::Receiver<u32>, oneshot::Receiver<Result<Pooled, ApiError>>);

fn call(demux: &Demux, first: u64, items: u32) -> CallEnds {
    call_of(demux, first, items, Arc::new(Ticket::new(1)))
}

fn call_of(demux: &Demux, first: u64, items: u32, ticket: Arc<Ticket>) -> CallEnds {
    let ((progress, ended), (sink, answer)) = (watch::channel(0), oneshot::channel());
    let registration = CallRegistration {
        first: RequestId(first),
        items,
        ticket,
        account: Account::default(),
        arrived: Instant::now(),
        arrived_engine: Duration::ZERO,
        progress,
        sink,
    };
    demux.register(registration).unwrap();
    (ended, answer)
}

/// Both events with which an item ends.
fn pooled(request: u64) -> [Event; 2] {
    let (request, usage) = (RequestId(request), mirai_engine::SeqUsage::default());
    let values = Box::new([request.0 as f32]);
    [
        Event::Pooled { request, values },
        Event::Finished { request, choice: 0, reason: FinishReason::Pooled, usage },
    ]
}

fn wait_for(what: &str, check: impl Fn() -> bool) {
    let start = Instant::now();
    while !check() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        std::thread::yield_now();
    }
}

#[test]
fn a_call_that_was_given_up_is_no_disconnect_and_one_that_was_left_is() {
    let (demux, _events, metrics) = start();
    let (_, engine, _engines_events) = ModelInfo::split(served());
    for (given_up, disconnects) in [(true, 0), (false, 1)] {
        let ticket = Arc::new(Ticket::new(1));
        let _ends = call_of(&demux, 1, 2, ticket.clone());
        wait_for("the call is known", || metrics.streams.get() == 1);
        let guard = LeaveGuard::new(ticket, engine.clone(), RequestId(1));
        if given_up {
            guard.give_up(503);
        }
        drop(guard);
        wait_for("the call is forgotten", || metrics.streams.get() == 0);
        assert_eq!(metrics.disconnects.get(), disconnects);
    }
}

#[test]
fn a_panic_in_one_call_ends_that_call_alone() {
    let (demux, events, metrics) = start();
    let bomb = Waker::from(Arc::new(Bomb));
    let (mut victims_progress, victim) = call(&demux, 1, 2);
    let (_progress, neighbour) = call(&demux, 3, 1);
    let mut waits = std::pin::pin!(victims_progress.changed());
    assert!(waits.as_mut().poll(&mut std::task::Context::from_waker(&bomb)).is_pending());
    // In one batch, the victim first: what comes after it must not be lost.
    events.send(pooled(1).into_iter().chain(pooled(3)).collect()).unwrap();
    assert_eq!(neighbour.blocking_recv().unwrap().unwrap().values, [Box::from([3.0])]);
    assert_eq!(victim.blocking_recv().unwrap().unwrap_err().code, "internal_error");
    assert_eq!(metrics.panics.get(), 1);
}

#[test]
fn a_panic_while_calls_are_aborted_spares_the_others() {
    let (demux, events, metrics) = start();
    let bomb = Waker::from(Arc::new(Bomb));
    let (mut victims_progress, victim) = call(&demux, 1, 1);
    let (_progress, neighbour) = call(&demux, 2, 1);
    let mut waits = std::pin::pin!(victims_progress.changed());
    assert!(waits.as_mut().poll(&mut std::task::Context::from_waker(&bomb)).is_pending());
    demux.abort_all(ApiError::draining("over"));
    assert_eq!(neighbour.blocking_recv().unwrap().unwrap_err().code, "draining");
    assert_eq!(victim.blocking_recv().unwrap().unwrap_err().code, "draining");
    assert_eq!(metrics.panics.get(), 1);
    // The thread lives, and serves the next one.
    let (_progress, next) = call(&demux, 3, 1);
    events.send(pooled(3).into()).unwrap();
    assert_eq!(next.blocking_recv().unwrap().unwrap().values.len(), 1);
}

#[test]
fn a_panic_in_one_request_ends_that_request_alone() {
    let (demux, events, metrics) = start();
    let [victim, neighbour] = [Arc::new(StreamBuffer::default()), Arc::new(StreamBuffer::default())];
    demux.register(stream(1, &victim)).unwrap();
    demux.register(stream(2, &neighbour)).unwrap();
    let bomb = Waker::from(Arc::new(Bomb));
    assert_eq!(victim.poll(&std::task::Context::from_waker(&bomb)), Polled::Nothing);
    // Both in one batch, the victim first: what comes after it in the same batch must not be lost either.
    events.send(vec![token(1, 0), token(2, 0)]).unwrap();
    let before = read(&neighbour, Some(1));
    events.send(vec![token(1, 1), token(2, 1)]).unwrap();
    let usage = mirai_engine::SeqUsage { prompt_tokens: 1, completion_tokens: 2, ..Default::default() };
    events
        .send(vec![Event::Finished { request: RequestId(2), choice: 0, reason: FinishReason::Length, usage }])
        .unwrap();
    let whole = data(&(before + &read(&neighbour, None)));
    let text: String = whole.iter().filter_map(|v| v["choices"][0]["text"].as_str()).collect();
    // Without a decoder the tokenizer joins tokens with spaces.
    assert_eq!(text, " b b", "{whole:?}");
    assert_eq!(whole.iter().filter(|v| v["choices"][0]["finish_reason"] == "length").count(), 1, "{whole:?}");
    let ended = data(&read(&victim, None));
    assert_eq!(ended.last().unwrap()["error"]["code"], "internal_error", "{ended:?}");
    assert_eq!(metrics.panics.get(), 1);
}
