//! The engine's thread from outside: what callers may rely on, with a simulated device.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use mirai_engine::hooks::{Injection, Victim};
use mirai_engine::sim::{Check, SimConfig, SimExecutor, default_draw, reference};
use mirai_engine::{
    AdmissionError, DeviceFault, EnergyCounter, EnergyMethod, EngineConfig, EngineHandle, EngineHealth,
    EngineRequest, Event, Executor, FinishReason, Geometry, GroupKind, RequestId, RowFault, SamplingParams,
    SeqUsage, StartError, StepOutcome, StepPlan, Task, TenantId, TokenId, start,
};

/// Long enough that only a hang reaches it.
const HANG: Duration = Duration::from_secs(60);

fn geometry() -> Geometry {
    Geometry {
        groups: vec![GroupKind::Full, GroupKind::Window(24)],
        blocks: 400,
        slots: 16,
        snapshots: 0,
        max_step_tokens: 64,
        max_context: 512,
        vocab: 1000,
        generates: true,
        pools: true,
        whole_prompts: false,
    }
}

fn launch(config: EngineConfig, change: impl FnOnce(&mut SimConfig)) -> (EngineHandle, Receiver<Vec<Event>>) {
    let mut sim = SimConfig { check: Check::All, ..SimConfig::new(geometry()) };
    change(&mut sim);
    start(config, move || Ok(Box::new(SimExecutor::new(sim)))).unwrap()
}

fn request(id: u64, prompt: usize, max_tokens: u32) -> EngineRequest {
    EngineRequest {
        id: RequestId(id),
        task: Task::Generate,
        tenant: TenantId(id % 3),
        weight: 1,
        cache_salt: 0,
        priority: 0,
        deadline: None,
        prompt: (0..prompt as u32).map(|i| (i * 31 + id as u32) % 1000).collect(),
        max_tokens,
        choices: 1,
        sampling: Arc::new(SamplingParams { seed: id, ..SamplingParams::default() }),
    }
}

type Ends = BTreeMap<(RequestId, u32), (Vec<TokenId>, FinishReason, SeqUsage)>;

/// Listens until `count` sequences have ended.
fn listen(events: &Receiver<Vec<Event>>, count: usize) -> Ends {
    let mut tokens: BTreeMap<(RequestId, u32), Vec<TokenId>> = BTreeMap::new();
    let mut ends = Ends::new();
    while ends.len() < count {
        for event in events.recv_timeout(HANG).expect("the engine answers") {
            match event {
                Event::Token { request, choice, token, .. } => {
                    tokens.entry((request, choice)).or_default().push(token);
                }
                Event::Finished { request, choice, reason, usage } => {
                    let got = tokens.remove(&(request, choice)).unwrap_or_default();
                    assert!(ends.insert((request, choice), (got, reason, usage)).is_none(), "ended twice");
                }
                Event::Prefilled { .. } | Event::Pooled { .. } => {}
            }
        }
    }
    ends
}

/// Waits until the counters say what is asked. The engine beats at least once a second.
fn until(handle: &EngineHandle, what: &str, test: impl Fn(&EngineHandle) -> bool) {
    let start = Instant::now();
    while !test(handle) {
        assert!(start.elapsed() < HANG, "{what} never came: {:?}", handle.counters());
        std::thread::yield_now();
    }
}

/// Freezes the thread and waits until it stands still.
fn freeze(handle: &EngineHandle) {
    handle.hooks().freeze();
    until(handle, "a standstill", |handle| handle.hooks().is_frozen());
}

#[test]
fn both_loops_serve_many_at_once() {
    for (asynchronous, look_ahead) in [(true, None), (false, None), (true, Some(false)), (false, Some(true))]
    {
        let config = EngineConfig { look_ahead, ..EngineConfig::default() };
        let (handle, events) = launch(config, |sim| sim.asynchronous = asynchronous);
        let requests: Vec<EngineRequest> = (0..40)
            .map(|id| EngineRequest { choices: 1 + id as u32 % 3, ..request(id, 10 + id as usize, 30) })
            .collect();
        let count = requests.iter().map(|request| request.choices as usize).sum();
        requests.iter().for_each(|request| handle.submit(request.clone()).unwrap());
        let ends = listen(&events, count);
        for request in &requests {
            for choice in 0..request.choices {
                let (tokens, reason) = reference(request, choice, 1000, default_draw);
                let (got, how, usage) = &ends[&(request.id, choice)];
                assert_eq!((got, how), (&tokens, &reason));
                assert_eq!(usage.completion_tokens, 30);
            }
        }
        until(&handle, "rest", |handle| handle.counters().running == 0);
        let counters = handle.counters();
        assert_eq!((counters.generated_tokens, counters.finished), (30 * count as u64, count as u64));
        assert_eq!((counters.blocks_used, counters.queued_requests, counters.integrity_failures), (0, 0, 0));
        assert_eq!(handle.geometry(), &geometry());
    }
}

#[test]
fn a_full_queue_refuses_at_once() {
    let config = EngineConfig { max_queued_requests: 3, max_queued_tokens: 100, ..EngineConfig::default() };
    let (handle, events) = launch(config, |_| {});
    freeze(&handle);
    (0..3).for_each(|id| handle.submit(request(id, 10, 4)).unwrap());
    assert_eq!(handle.submit(request(3, 10, 4)), Err(AdmissionError::QueueFull { queued: 3, limit: 3 }));
    handle.cancel(RequestId(0));
    handle.hooks().thaw();
    assert_eq!(listen(&events, 3).len(), 3);
    freeze(&handle);
    handle.submit(request(4, 70, 4)).unwrap();
    let full = AdmissionError::QueueTokensFull { queued: 70, request: 31, limit: 100 };
    assert_eq!(handle.submit(EngineRequest { tenant: TenantId(1), ..request(5, 31, 4) }), Err(full));
    handle.submit(request(6, 30, 4)).unwrap();
    handle.hooks().thaw();
    listen(&events, 2);
    until(&handle, "an empty queue", |handle| handle.counters().queued_tokens == 0);
}

#[test]
fn room_is_held_for_all_or_for_none_and_comes_back() {
    let config = EngineConfig { max_queued_requests: 4, ..EngineConfig::default() };
    let (handle, events) = launch(config, |_| {});
    freeze(&handle);
    let own = |request| EngineRequest { tenant: TenantId(0), ..request };
    let batch = |ids: std::ops::Range<u64>| ids.map(|id| own(request(id, 10, 4))).collect::<Vec<_>>();
    let held = handle.reserve(batch(0..3)).unwrap();
    let full = |queued| Some(AdmissionError::QueueFull { queued, limit: 4 });
    assert_eq!(handle.reserve(batch(3..5)).err(), full(3), "held room is taken");
    let counters = handle.counters();
    assert_eq!(
        (counters.queued_requests, counters.queued_tokens),
        (3, 30),
        "a refusal leaves nothing behind"
    );
    drop(held);
    let counters = handle.counters();
    assert_eq!((counters.queued_requests, counters.queued_tokens), (0, 0));
    let mut one_wrong = batch(0..2);
    one_wrong[1].choices = 0;
    assert!(handle.reserve(one_wrong).is_err(), "all or none");
    handle.reserve(batch(0..4)).unwrap().submit().unwrap();
    assert_eq!(handle.submit(request(9, 10, 4)).err(), full(4));
    let other = EngineRequest { tenant: TenantId(1), ..request(10, 10, 4) };
    handle.submit(other.clone()).expect("another tenant has room in a queue that one has filled");
    handle.submit(EngineRequest { id: RequestId(11), ..other.clone() }).unwrap();
    assert_eq!(handle.submit(EngineRequest { id: RequestId(12), ..other }).err(), full(6), "its half");
    handle.hooks().thaw();
    assert_eq!(listen(&events, 6).len(), 6);
    until(&handle, "an empty queue", |handle| handle.counters().queued_tokens == 0);
    let late = handle.reserve(batch(5..6)).unwrap();
    handle.shutdown(Duration::ZERO);
    until(&handle, "the end", |handle| handle.health() == EngineHealth::Stopped);
    assert_eq!(late.submit(), Err(AdmissionError::Stopping));
    assert_eq!(handle.counters().queued_requests, 0);
}

#[test]
fn what_can_never_fit_is_refused_at_the_door() {
    let (handle, events) = launch(EngineConfig::default(), |sim| sim.geometry.blocks = 40);
    let long = AdmissionError::TooLong { prompt: 500, max_tokens: 13, limit: 512 };
    assert_eq!(handle.submit(request(1, 500, 13)), Err(long));
    assert!(matches!(handle.submit(request(1, 500, 12)), Err(AdmissionError::NeverFits { have: 39, .. })));
    assert_eq!(handle.submit(request(1, 0, 12)), Err(AdmissionError::EmptyPrompt));
    for choices in [0, 1025] {
        let refused = handle.submit(EngineRequest { choices, ..request(1, 5, 5) });
        assert_eq!(refused, Err(AdmissionError::Choices { choices, limit: 1024 }));
    }
    let foreign = EngineRequest { prompt: [5, 1000].into(), ..request(1, 1, 1) };
    assert_eq!(handle.submit(foreign), Err(AdmissionError::UnknownToken { token: 1000, vocab: 1000 }));
    handle.submit(request(2, 5, 5)).unwrap();
    assert_eq!(listen(&events, 1).len(), 1);
}

#[test]
fn a_cancelled_request_holds_nothing() {
    let (handle, events) = launch(EngineConfig::default(), |_| {});
    for id in 0..50 {
        handle.submit(EngineRequest { choices: 2, ..request(id, 40, 400) }).unwrap();
        handle.cancel(RequestId(id));
    }
    let ends = listen(&events, 100);
    assert!(ends.values().all(|(_, reason, _)| *reason == FinishReason::Cancelled));
    until(&handle, "baseline", |handle| handle.counters().blocks_used == 0 && handle.counters().running == 0);
}

#[test]
fn a_stop_keeps_what_the_caller_says() {
    let (handle, events) = launch(EngineConfig::default(), |sim| sim.step_time = Duration::from_millis(1));
    handle.submit(request(1, 20, 450)).unwrap();
    let mut seen = 0;
    let (mut tokens, mut end) = (0, None);
    while end.is_none() {
        for event in events.recv_timeout(HANG).unwrap() {
            match event {
                Event::Token { .. } => {
                    tokens += 1;
                    if tokens == 5 {
                        seen = 3;
                        handle.stop(RequestId(1), 0, 3);
                        handle.stop(RequestId(1), 0, 4);
                        handle.stop(RequestId(9), 0, 4);
                    }
                }
                Event::Finished { reason, usage, .. } => end = Some((reason, usage)),
                Event::Prefilled { .. } | Event::Pooled { .. } => {}
            }
        }
    }
    let (reason, usage) = end.unwrap();
    assert_eq!((reason, usage.completion_tokens, seen), (FinishReason::Stopped, 3, 3));
    // At least the two after the stop; what was in flight comes on top.
    assert!(
        usage.wasted_tokens >= tokens - 3 && usage.wasted_tokens <= tokens - 3 + 1,
        "{usage:?}, {tokens} seen"
    );
}

#[test]
fn a_deadline_ends_a_sequence_in_the_queue_and_on_the_device() {
    let config = EngineConfig { max_running: 1, ..EngineConfig::default() };
    let (handle, events) = launch(config, |sim| sim.step_time = Duration::from_millis(1));
    let deadline = Some(handle.now() + Duration::from_millis(50));
    (0..2).for_each(|id| handle.submit(EngineRequest { deadline, ..request(id, 20, 450) }).unwrap());
    let ends = listen(&events, 2);
    assert!(ends.values().all(|(_, reason, _)| *reason == FinishReason::Deadline), "{ends:?}");
    assert!(ends[&(RequestId(1), 0)].0.is_empty());
    // While nothing else runs, one that comes too late wakes the engine and is ended.
    until(&handle, "rest", |handle| handle.counters().running == 0);
    handle.submit(EngineRequest { deadline: Some(Duration::ZERO), ..request(2, 20, 450) }).unwrap();
    assert_eq!(listen(&events, 1)[&(RequestId(2), 0)].1, FinishReason::Deadline);
}

#[test]
fn a_fault_of_one_request_touches_no_other() {
    let (handle, events) = launch(EngineConfig::default(), |_| {});
    handle.hooks().inject(Victim::Request(RequestId(3)), 5, Injection::Panic);
    handle.hooks().inject(Victim::Seed(4), 2, Injection::Fault(RowFault::NonFinite));
    handle.hooks().inject(Victim::Choice(RequestId(5), 1), 0, Injection::Fault(RowFault::NothingAllowed));
    for id in 0..8 {
        handle.submit(EngineRequest { choices: 2, ..request(id, 33, 20) }).unwrap();
    }
    let ends = listen(&events, 16);
    for ((id, choice), (tokens, reason, usage)) in ends {
        let faulty = match id.0 {
            3 => Some((5, RowFault::Panic(String::from("injected")))),
            4 => Some((2, RowFault::NonFinite)),
            5 if choice == 1 => Some((0, RowFault::NothingAllowed)),
            _ => None,
        };
        let (length, expected) = match faulty {
            Some((length, fault)) => (length, FinishReason::Fault(fault)),
            None => (20, FinishReason::Length),
        };
        assert_eq!(
            (tokens.len(), reason, usage.completion_tokens),
            (length, expected, length as u32),
            "{id}"
        );
    }
    assert_eq!(handle.counters().faults, 5);
    assert!(matches!(handle.health(), EngineHealth::Running { .. }));
}

#[test]
fn a_device_fault_ends_everything_and_is_said() {
    let (handle, events) = launch(EngineConfig::default(), |sim| sim.step_time = Duration::from_millis(1));
    (0..30).for_each(|id| handle.submit(request(id, 20, 450)).unwrap());
    until(&handle, "work", |handle| handle.counters().generated_tokens > 10);
    handle.hooks().fail_device();
    let ends = listen(&events, 30);
    assert!(ends.values().all(|(_, reason, _)| *reason == FinishReason::EngineStopped));
    assert!(events.recv().is_err(), "the thread has ended");
    let EngineHealth::Dead(reason) = handle.health() else { panic!("{:?}", handle.health()) };
    assert!(reason.contains("injected"), "{reason}");
    assert!(matches!(handle.submit(request(99, 5, 5)), Err(AdmissionError::Dead(_))));
    assert_eq!(handle.counters().queued_requests, 0);
}

#[test]
fn a_frozen_engine_shows_busy_or_not() {
    let (handle, events) = launch(EngineConfig::default(), |_| {});
    let stale = |handle: &EngineHandle| match handle.health() {
        EngineHealth::Running { last_progress, .. } => last_progress > Duration::from_millis(2500),
        other => panic!("{other:?}"),
    };
    handle.hooks().freeze();
    until(&handle, "a stale heartbeat", stale);
    handle.submit(request(1, 5, 5)).unwrap();
    assert!(matches!(handle.health(), EngineHealth::Running { busy: true, .. }));
    assert!(matches!(events.try_recv(), Err(TryRecvError::Empty)));
    handle.hooks().thaw();
    assert_eq!(listen(&events, 1).len(), 1);
    until(&handle, "a fresh heartbeat", |handle| !stale(handle));
}

#[test]
fn shutdown_waits_for_its_grace_and_no_longer() {
    let (handle, events) = launch(EngineConfig::default(), |sim| sim.step_time = Duration::from_millis(1));
    handle.submit(request(1, 20, 3)).unwrap();
    handle.shutdown(HANG);
    assert_eq!(handle.submit(request(2, 20, 3)), Err(AdmissionError::Stopping));
    assert_eq!(listen(&events, 1)[&(RequestId(1), 0)].1, FinishReason::Length);
    assert!(events.recv().is_err());
    until(&handle, "the end", |handle| handle.health() == EngineHealth::Stopped);

    let (handle, events) = launch(EngineConfig::default(), |sim| sim.step_time = Duration::from_millis(1));
    (0..20).for_each(|id| handle.submit(request(id, 20, 450)).unwrap());
    handle.shutdown(HANG);
    handle.shutdown(Duration::from_millis(20));
    let ends = listen(&events, 20);
    assert!(ends.values().all(|(_, reason, _)| *reason == FinishReason::EngineStopped));
    assert!(events.recv().is_err());
}

#[test]
fn without_handles_or_listener_the_engine_ends() {
    let (handle, events) = launch(EngineConfig::default(), |_| {});
    let other = handle.clone();
    handle.submit(request(1, 20, 450)).unwrap();
    drop(handle);
    drop(other);
    assert_eq!(listen(&events, 1)[&(RequestId(1), 0)].1, FinishReason::EngineStopped);
    assert!(events.recv().is_err());

    let (handle, events) = launch(EngineConfig::default(), |_| {});
    drop(events);
    handle.submit(request(1, 20, 450)).unwrap();
    until(&handle, "the end", |handle| matches!(handle.health(), EngineHealth::Dead(_)));
    assert!(format!("{handle:?}").contains("demultiplexer"));
}

/// 200 W since it was made, in jumps of 20 ms.
#[derive(Debug)]
struct Steady(Instant);

impl EnergyCounter for Steady {
    fn microjoules(&self) -> Option<u64> {
        Some(self.0.elapsed().as_millis() as u64 / 20 * 20 * 200_000)
    }
}

#[test]
fn every_end_says_what_it_cost() {
    for look_ahead in [Some(false), Some(true)] {
        let energy: Arc<dyn EnergyCounter> = Arc::new(Steady(Instant::now()));
        let config = EngineConfig { look_ahead, devices: 2, energy: Some(energy), ..EngineConfig::default() };
        let (handle, events) = launch(config, |sim| sim.step_time = Duration::from_millis(2));
        (0..8).for_each(|id| handle.submit(request(id, 20, 300)).unwrap());
        until(&handle, "work", |handle| handle.counters().generated_tokens > 80);
        handle.cancel(RequestId(3));
        let ends = listen(&events, 8);
        // The last one's row that was under way, if any, is collected before the engine rests.
        until(&handle, "rest", |handle| handle.counters().running == 0 && handle.counters().waiting == 0);
        let counters = handle.counters();
        let micros: u64 = ends.values().map(|end| end.2.device_micros).sum();
        let all = counters.device_nanos * 2 / 1000;
        // A step's time is 2 ms; what bills were off by is at most a few.
        assert!(micros.abs_diff(all) < 20_000, "{micros} of {all}, {look_ahead:?}");
        let cancelled = ends[&(RequestId(3), 0)].2;
        assert!(cancelled.device_micros > 0 && cancelled.device_micros < micros / 8, "{cancelled:?}");
        // The cancelled one may have ended before the counter moved twice.
        for (_, reason, usage) in ends.values().filter(|end| end.1 != FinishReason::Cancelled) {
            assert_ne!(usage.energy_method, EnergyMethod::None, "{reason:?}");
            // 200 W for both devices together, whose time counts twice; and at most five times that, where the host's
            // gaps are taken for idle time of a lower power that is not known yet.
            let watts = usage.energy_microjoules as f64 / usage.device_micros as f64 * 2.0;
            assert!((100.0..1000.0).contains(&watts), "{watts} W, {usage:?}");
        }
        let charged: u64 = ends.values().map(|end| end.2.energy_microjoules).sum();
        assert!(charged.abs_diff(counters.energy_attributed_microjoules) <= 8, "{charged}: {counters:?}");
        assert_eq!(handle.counters().integrity_failures, 0);
    }
}

/// A device that breaks in its own way.
struct Broken(Geometry, u8);

impl Executor for Broken {
    fn geometry(&self) -> &Geometry {
        &self.0
    }

    fn is_asynchronous(&self) -> bool {
        false
    }

    fn submit(&mut self, plan: &StepPlan) -> Result<(), DeviceFault> {
        match self.1 {
            0 => Err(DeviceFault { step: plan.step, message: String::from("submit") }),
            1 => panic!("broken"),
            _ => Ok(()),
        }
    }

    fn collect(&mut self, outcome: &mut StepOutcome) -> Result<(), DeviceFault> {
        match self.1 {
            2 => return Err(DeviceFault { step: 0, message: String::from("collect") }),
            3 => outcome.step = 77,
            _ => outcome.rows.clear(),
        }
        Ok(())
    }
}

#[test]
fn however_an_executor_breaks_everybody_is_told() {
    let says =
        ["submit", "panic in the engine: broken", "collect", "submitted was 0", "has 1 rows, its outcome 0"];
    for (how, text) in (0..).zip(says) {
        let (handle, events) =
            start(EngineConfig::default(), move || Ok(Box::new(Broken(geometry(), how)))).unwrap();
        handle.submit(EngineRequest { choices: 3, ..request(1, 20, 5) }).unwrap();
        assert!(listen(&events, 3).values().all(|(_, reason, _)| *reason == FinishReason::EngineStopped));
        assert!(events.recv().is_err());
        let EngineHealth::Dead(reason) = handle.health() else { panic!("{:?}", handle.health()) };
        assert!(reason.contains(text), "{reason}");
    }
}

#[test]
fn an_executor_that_does_not_load_is_an_error() {
    let failed = start(EngineConfig::default(), || Err("no weights".into()));
    assert!(matches!(failed, Err(StartError::Executor(error)) if error.to_string() == "no weights"));
    let failed = start(EngineConfig::default(), || panic!("halfway"));
    assert!(matches!(failed, Err(StartError::Panic(text)) if text == "halfway"));
    for geometry in [
        Geometry { blocks: 2, ..geometry() },
        Geometry { slots: 0, ..geometry() },
        Geometry { groups: vec![GroupKind::Window(0)], ..geometry() },
    ] {
        let sim = SimConfig::new(geometry);
        let failed = start(EngineConfig::default(), move || Ok(Box::new(SimExecutor::new(sim))));
        assert!(matches!(failed, Err(StartError::Geometry(_))));
    }
}
