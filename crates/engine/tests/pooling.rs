//! Requests that end in pooling: what the door says, what a step holds, and how they end.
#![allow(clippy::unwrap_used, unreachable_pub, missing_docs)]

mod bed;

use std::sync::Arc;
use std::time::Duration;

use bed::{Bed, encoder, pooling, request, room};
use mirai_engine::hooks::{Injection, TestHooks, Victim};
use mirai_engine::sim::{SimConfig, SimExecutor, default_pool};
use mirai_engine::{
    AdmissionError, EngineConfig, EngineRequest, FinishReason, Geometry, GroupKind, HashKey, RequestId,
    RowFault, RowOutcome, RowOutput, SamplingParams, Scheduler, StepOutcome, Task, TenantId,
};

fn refusal(geometry: &Geometry, request: EngineRequest) -> Option<AdmissionError> {
    Bed::new(geometry.clone(), &EngineConfig::default()).scheduler.add(request, Duration::ZERO).err()
}

#[test]
fn the_door_says_what_cannot_be_pooled() {
    let (decoder, encoder) = (room(&[GroupKind::Full]), encoder(&[]));
    let generator = Geometry { pools: false, ..decoder.clone() };
    assert_eq!(refusal(&generator, pooling(1, 5)), Some(AdmissionError::WrongTask(Task::Pool)));
    assert_eq!(refusal(&encoder, request(1, 5, 1)), Some(AdmissionError::WrongTask(Task::Generate)));
    assert_eq!(AdmissionError::WrongTask(Task::Pool).to_string(), "the model cannot pool");
    assert_eq!(AdmissionError::WrongTask(Task::Generate).to_string(), "the model cannot generate");
    for (max_tokens, choices) in [(1, 1), (0, 0), (0, 2)] {
        let shape = EngineRequest { max_tokens, choices, ..pooling(1, 5) };
        assert_eq!(refusal(&decoder, shape), Some(AdmissionError::PoolingShape { max_tokens, choices }));
    }
    // 64 tokens are one step: a decoder goes on in the next, an encoder cannot.
    assert_eq!(refusal(&encoder, pooling(1, 64)), None);
    assert_eq!(refusal(&decoder, pooling(1, 65)), None);
    let too_long = AdmissionError::PromptTooLong { prompt: 65, limit: 64 };
    assert_eq!(refusal(&encoder, pooling(1, 65)), Some(too_long));
    let context = Geometry { max_step_tokens: 8192, ..encoder };
    assert!(matches!(refusal(&context, pooling(1, 4097)), Some(AdmissionError::TooLong { .. })));
}

#[test]
fn a_geometry_that_contradicts_itself_is_refused() {
    let (decoder, encoder) = (room(&[GroupKind::Full]), encoder(&[]));
    for bad in [
        Geometry { pools: false, ..encoder.clone() },
        Geometry { generates: true, ..encoder.clone() },
        Geometry { whole_prompts: false, ..encoder.clone() },
        Geometry { generates: false, pools: false, ..decoder.clone() },
        Geometry { blocks: 1, ..decoder.clone() },
    ] {
        assert!(
            Scheduler::new(&EngineConfig::default(), &bad, HashKey::default()).is_err(),
            "{bad:?} has no sense"
        );
    }
    for good in [encoder, Geometry { blocks: 2, ..decoder }] {
        Scheduler::new(&EngineConfig::default(), &good, HashKey::default()).unwrap();
    }
}

/// A step takes as many prompts as fit, in order, and none in part.
#[test]
fn whole_prompts_are_packed_into_steps() {
    for groups in [vec![], vec![GroupKind::Full], vec![GroupKind::Window(20), GroupKind::Recurrent]] {
        for look_ahead in [false, true] {
            let mut bed = Bed::new(encoder(&groups), &EngineConfig::default());
            bed.look_ahead = look_ahead;
            let lengths = [10, 20, 30, 40, 64, 1, 63, 2];
            for (id, &length) in (0..).zip(&lengths) {
                bed.add(pooling(id, length));
            }
            let mut steps = Vec::new();
            while !bed.scheduler.is_idle() {
                bed.step();
                let rows = bed.plan.rows.iter();
                assert!(rows.clone().all(|row| row.start == 0 && row.output == RowOutput::Pool));
                let lengths: Vec<u32> = rows.map(|row| row.len).collect();
                if !lengths.is_empty() {
                    steps.push(lengths);
                }
            }
            assert_eq!(steps, [vec![10, 20, 30], vec![40], vec![64], vec![1, 63], vec![2]]);
            bed.finish();
            for (id, &length) in (0..).zip(&lengths) {
                let prompt = pooling(id, length).prompt;
                let own = bed.pooled.iter().find(|(request, _)| *request == RequestId(id)).unwrap();
                assert_eq!(own.1, default_pool(&prompt, 8));
            }
            assert!(bed.ends.iter().all(|end| end.2 == FinishReason::Pooled && end.3.cached_tokens == 0));
            let counters = bed.counters();
            assert_eq!((counters.blocks_cached, counters.prefix_query_tokens), (0, 0));
        }
    }
}

/// Many short prompts never keep a long one waiting for ever.
#[test]
fn a_long_whole_prompt_has_its_turn() {
    let mut bed = Bed::new(encoder(&[]), &EngineConfig::default());
    (0..20).for_each(|id| bed.add(EngineRequest { tenant: TenantId(id % 3), ..pooling(id, 9) }));
    bed.add(EngineRequest { tenant: TenantId(9), ..pooling(99, 64) });
    for id in 100..200 {
        bed.add(EngineRequest { tenant: TenantId(id % 3), ..pooling(id, 9) });
        bed.step();
        if bed.ends.iter().any(|end| end.0 == RequestId(99)) {
            return;
        }
    }
    panic!("a prompt of a whole step starved");
}

#[test]
fn generation_and_pooling_share_steps_and_prefixes() {
    for look_ahead in [false, true] {
        let mut bed = Bed::with(&[GroupKind::Full, GroupKind::Window(20)]);
        bed.look_ahead = look_ahead;
        bed.add(request(1, 80, 50));
        while bed.tokens.len() < 3 {
            bed.step();
        }
        // The prompt of both is the same; its last token is computed for each.
        bed.add(pooling(2, 80));
        bed.add(pooling(3, 81));
        bed.step();
        let outputs: Vec<RowOutput> = bed.plan.rows.iter().map(|row| row.output).collect();
        assert_eq!(outputs, [RowOutput::Sample, RowOutput::Pool, RowOutput::Pool]);
        bed.finish();
        assert_eq!((bed.usage(2).cached_tokens, bed.usage(3).cached_tokens), (64, 80));
        assert_eq!(bed.usage(2).completion_tokens, 0);
        for (id, values) in &bed.pooled {
            assert_eq!(*values, default_pool(&pooling(id.0, 78 + id.0 as usize).prompt, 8));
        }
        assert_eq!(bed.pooled.len(), 2);
    }
}

/// What one request asks of sampling must not reach a pooling row.
#[test]
fn sampling_parameters_of_a_pooling_request_are_ignored() {
    let sampling = SamplingParams {
        prompt_logprobs: Some(3),
        logprobs: Some(2),
        min_tokens: 7,
        allowed_token_ids: Some(vec![]),
        ..SamplingParams::default()
    };
    let mut bed = Bed::with(&[GroupKind::Full]);
    bed.add(pooling(1, 40));
    bed.finish();
    bed.add(EngineRequest { sampling: Arc::new(sampling), ..pooling(2, 40) });
    bed.step();
    assert_eq!(*bed.plan.opens[0].sampling, SamplingParams::default());
    bed.finish();
    assert_eq!(bed.usage(2).cached_tokens, 32);
}

#[test]
fn numbers_that_are_not_finite_end_their_request_alone() {
    for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for geometry in [encoder(&[]), room(&[GroupKind::Full])] {
            let mut bed = Bed::new(geometry.clone(), &EngineConfig::default());
            let mut sim = SimConfig::new(geometry);
            sim.pool = Arc::new(move |prompt| {
                let mut values = default_pool(prompt, 4);
                if prompt.len() == 11 {
                    values[3] = poison;
                }
                values
            });
            bed.executor = SimExecutor::new(sim);
            (10..13).for_each(|length| bed.add(pooling(length, length as usize)));
            bed.finish();
            let ends: Vec<&FinishReason> = bed.ends.iter().map(|end| &end.2).collect();
            let fault = FinishReason::Fault(RowFault::NonFinite);
            assert_eq!(ends, [&FinishReason::Pooled, &fault, &FinishReason::Pooled]);
            let pooled: Vec<u64> = bed.pooled.iter().map(|(id, _)| id.0).collect();
            assert_eq!(pooled, [10, 12]);
        }
    }
}

#[test]
fn an_executor_that_pools_nothing_fails_that_request() {
    for pooled in [None, Some(Box::default())] {
        let mut bed = Bed::new(encoder(&[]), &EngineConfig::default());
        bed.add(pooling(1, 5));
        bed.scheduler.plan(bed.now, &mut bed.plan);
        let rows = vec![RowOutcome { pooled, ..RowOutcome::default() }];
        let mut outcome = StepOutcome { step: bed.plan.step, rows, ..StepOutcome::default() };
        bed.scheduler.commit(&mut outcome).unwrap();
        bed.listen();
        assert!(matches!(bed.ends[0].2, FinishReason::Fault(RowFault::Panic(_))), "{:?}", bed.ends);
    }
}

#[test]
fn faults_cancels_and_deadlines_end_a_pooling_request() {
    let mut bed = Bed::new(encoder(&[]), &EngineConfig::default());
    bed.look_ahead = true;
    let hooks = Arc::new(TestHooks::default());
    hooks.inject(Victim::Request(RequestId(1)), 0, Injection::Fault(RowFault::NonFinite));
    bed.scheduler.set_hooks(hooks);
    bed.add(pooling(1, 60));
    bed.add(EngineRequest { deadline: Some(Duration::from_millis(1)), ..pooling(2, 60) });
    bed.add(pooling(3, 60));
    bed.add(pooling(4, 60));
    bed.step();
    // The first is under way, the others wait.
    bed.scheduler.cancel(RequestId(3));
    bed.finish();
    let mut ends: Vec<(u64, FinishReason)> = bed.ends.iter().map(|end| (end.0.0, end.2.clone())).collect();
    ends.sort_by_key(|end| end.0);
    assert_eq!(
        ends,
        [
            (1, FinishReason::Fault(RowFault::NonFinite)),
            (2, FinishReason::Deadline),
            (3, FinishReason::Cancelled),
            (4, FinishReason::Pooled),
        ]
    );
    assert_eq!(bed.pooled.len(), 1);
}
