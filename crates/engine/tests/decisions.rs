//! Decisions of the scheduler, one at a time, on a simulated device.
#![allow(clippy::unwrap_used, unreachable_pub, missing_docs)]

mod bed;

use std::sync::Arc;
use std::time::Duration;

use bed::{Bed, request, room};
use mirai_engine::sim::{default_draw, reference};
use mirai_engine::{
    AdmissionError, CommitError, EngineConfig, EngineRequest, Event, FinishReason, Geometry, GroupKind,
    RequestId, RowInput, SamplingParams, StepOutcome, TenantId, TokenId,
};

/// koboldcpp 2493: a prompt as long as the batch plus a few tokens never ended.
#[test]
fn every_length_around_a_boundary_ends_with_exact_counts() {
    for groups in
        [vec![GroupKind::Full], vec![GroupKind::Full, GroupKind::Window(16)], vec![GroupKind::Window(17)]]
    {
        for budget in [1, 15, 16, 17, 32, 64] {
            for look_ahead in [false, true] {
                let config = EngineConfig { max_step_tokens: budget, ..EngineConfig::default() };
                let mut bed = Bed::new(room(&groups), &config);
                bed.look_ahead = look_ahead;
                let edges = (1..=4).map(|k| k * 16).chain([budget as usize, 2 * budget as usize]);
                let lengths = edges.flat_map(|edge| edge.saturating_sub(2).max(1)..=edge + 8);
                for (id, length) in (0..).zip(lengths) {
                    let request = request(id, length, 3);
                    bed.add(request.clone());
                    bed.finish();
                    let usage = bed.usage(id);
                    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (length as u32, 3));
                    assert_eq!((usage.wasted_tokens, usage.preemptions), (0, 0));
                    assert_eq!(bed.tokens_of(id, 0), reference(&request, 0, 1000, default_draw).0);
                }
            }
        }
    }
}

/// SGLang 28530: a request that can never fit waited for ever. Each one is refused, or ends.
#[test]
fn what_passes_the_door_ends() {
    for groups in
        [vec![GroupKind::Full], vec![GroupKind::Window(20), GroupKind::Full], vec![GroupKind::Window(40)]]
    {
        let (mut ended, mut refused) = (0, 0);
        for blocks in [4, 7, 12] {
            for (id, length) in (0..).zip((1..200).step_by(3)) {
                for max_tokens in [0, 1, 2, 17, 60] {
                    let geometry = Geometry { blocks, ..room(&groups) };
                    let mut bed = Bed::new(geometry, &EngineConfig::default());
                    bed.look_ahead = id % 2 == 0;
                    match bed.scheduler.add(request(id, length, max_tokens), bed.now) {
                        Err(AdmissionError::NeverFits { needed, have }) => {
                            assert!(needed > have && have == blocks - 1);
                            refused += 1;
                        }
                        other => {
                            assert_eq!(other, Ok(()));
                            bed.finish();
                            assert_eq!(
                                (bed.usage(id).completion_tokens, bed.usage(id).preemptions),
                                (max_tokens, 0)
                            );
                            ended += 1;
                        }
                    }
                }
            }
        }
        assert!(ended > 100 && refused > 100, "{ended} ended, {refused} refused");
    }
}

/// vllm-ascend 16315: preempt, admit, preempt, without end.
#[test]
fn too_little_memory_for_all_still_serves_all() {
    for look_ahead in [false, true] {
        let geometry = Geometry { blocks: 12, ..room(&[GroupKind::Full]) };
        let config = EngineConfig { prefix_caching: false, ..EngineConfig::default() };
        let mut bed = Bed::new(geometry, &config);
        bed.look_ahead = look_ahead;
        for id in 0..20 {
            bed.add(EngineRequest { tenant: TenantId(id % 2), ..request(id, 10, 150) });
        }
        let steps = bed.finish();
        assert!(bed.counters().preemptions > 0);
        assert_eq!(bed.ends.len(), 20);
        assert!(bed.ends.iter().all(|end| end.2 == FinishReason::Length && end.3.preemptions <= 8));
        // Alone, one after the other, it would be 20 x 150 steps.
        assert!(steps < 3000, "{steps} steps");
        let wasted: u32 = bed.ends.iter().map(|end| end.3.wasted_tokens).sum();
        assert!(wasted > 0);
    }
}

#[test]
fn the_youngest_of_the_tenant_most_over_its_share_gives_way() {
    let geometry = Geometry { blocks: 17, ..room(&[GroupKind::Full]) };
    let mut bed = Bed::new(geometry, &EngineConfig { prefix_caching: false, ..EngineConfig::default() });
    // Tenant 1 holds two thirds of the blocks but has a weight of 9: tenant 0 is over its share. When all six
    // need a third block there are four left, so that one of them gives way.
    for (id, tenant, weight) in [(0, 0, 1), (1, 1, 9), (2, 0, 1), (3, 1, 9), (4, 1, 9), (5, 1, 9)] {
        bed.add(EngineRequest { tenant: TenantId(tenant), weight, ..request(id, 30, 30) });
    }
    while bed.counters().preemptions == 0 {
        bed.step();
    }
    assert_eq!(bed.counters().preemptions, 1);
    assert_eq!(bed.plan.rows.iter().map(|row| row.seq.0).collect::<Vec<_>>(), [0, 1, 3, 4, 5]);
    bed.finish();
}

#[test]
fn choices_share_the_blocks_of_their_prompt() {
    for prefix_caching in [true, false] {
        for look_ahead in [true, false] {
            let config = EngineConfig { prefix_caching, ..EngineConfig::default() };
            let mut bed = Bed::new(room(&[GroupKind::Full]), &config);
            bed.look_ahead = look_ahead;
            let request = EngineRequest { choices: 4, ..request(1, 69, 20) };
            bed.add(request.clone());
            let mut most = 0;
            while !bed.scheduler.is_idle() {
                bed.step();
                most = most.max(bed.counters().blocks_used);
            }
            bed.finish();
            // 4 shared blocks; each choice has one for the rest of the prompt and one more for its output.
            assert_eq!(most, 4 + 4 * 2);
            for (_, choice, _, usage) in &bed.ends {
                assert_eq!(usage.cached_tokens, if *choice == 0 { 0 } else { 64 });
                assert_eq!(bed.tokens_of(1, *choice), reference(&request, *choice, 1000, default_draw).0);
            }
            assert_ne!(bed.tokens_of(1, 0), bed.tokens_of(1, 1));
            // The next request finds the prompt only where prompts are cached for everybody.
            bed.add(EngineRequest { id: RequestId(2), choices: 1, ..request });
            bed.finish();
            assert_eq!(bed.usage(2).cached_tokens, if prefix_caching { 64 } else { 0 });
        }
    }
}

#[test]
fn if_the_first_choice_fails_the_next_computes_the_prompt() {
    use mirai_engine::hooks::{Injection, TestHooks, Victim};
    let mut bed = Bed::with(&[GroupKind::Full]);
    let hooks = Arc::new(TestHooks::default());
    hooks.inject(Victim::Choice(RequestId(1), 0), 0, Injection::Fault(mirai_engine::RowFault::NonFinite));
    bed.scheduler.set_hooks(hooks);
    bed.add(EngineRequest { choices: 3, ..request(1, 100, 5) });
    bed.finish();
    let cached: Vec<(u32, u32)> = bed.ends.iter().map(|end| (end.1, end.3.cached_tokens)).collect();
    // The first choice's early chunks were fine; what the faulty row computed is never shared.
    assert_eq!(cached, [(0, 0), (1, 64), (2, 96)]);
}

#[test]
fn a_prompt_is_found_again_within_its_salt_only() {
    let mut bed = Bed::with(&[GroupKind::Full]);
    for (id, salt, prompt, cached) in
        [(0, 0, 80, 0), (1, 0, 80, 64), (2, 0, 81, 80), (3, 7, 81, 0), (4, 7, 33, 32)]
    {
        bed.add(EngineRequest { cache_salt: salt, ..request(id, prompt, 2) });
        bed.finish();
        assert_eq!(bed.usage(id).cached_tokens, cached, "request {id}");
    }
    let counters = bed.counters();
    assert_eq!(
        (counters.prefix_hit_tokens, counters.prefix_query_tokens),
        (64 + 80 + 32, 80 + 80 + 81 + 81 + 33)
    );
    // One that wants the prompt's log-probabilities must compute it.
    let sampling = Arc::new(SamplingParams { prompt_logprobs: Some(1), ..SamplingParams::default() });
    bed.add(EngineRequest { sampling, ..request(5, 81, 2) });
    bed.finish();
    assert_eq!(bed.usage(5).cached_tokens, 0);
}

#[test]
fn answers_are_found_again_by_the_next_turn() {
    let mut bed = Bed::with(&[GroupKind::Full, GroupKind::Window(40)]);
    let first = request(1, 30, 40);
    bed.add(first.clone());
    bed.finish();
    let prompt: Vec<TokenId> =
        first.prompt.iter().copied().chain(bed.tokens_of(1, 0)).chain([5; 20]).collect();
    bed.add(EngineRequest { prompt: prompt.into(), ..request(2, 1, 3) });
    bed.finish();
    // 30 + 40 tokens, the last of which was never computed: 4 full blocks.
    assert_eq!(bed.usage(2).cached_tokens, 64);
}

#[test]
fn recurrent_state_is_found_at_snapshots_only() {
    let config = EngineConfig { snapshot_interval: 48, ..EngineConfig::default() };
    for groups in [vec![GroupKind::Full, GroupKind::Recurrent], vec![GroupKind::Recurrent]] {
        for look_ahead in [false, true] {
            let mut bed = Bed::new(room(&groups), &config);
            bed.look_ahead = look_ahead;
            // Snapshots at 48 (regular) and 80 (end of the prompt's full blocks).
            for (id, prompt, cached) in
                [(1, 90, 0), (2, 60, 48), (3, 81, 80), (4, 80, 48), (5, 300, 80), (6, 300, 288)]
            {
                bed.add(request(id, prompt, 2));
                bed.finish();
                assert_eq!(bed.usage(id).cached_tokens, cached, "request {id}");
            }
            assert!(bed.counters().snapshots_cached > 0);
        }
    }
}

#[test]
fn snapshots_are_given_up_least_recently_used_first() {
    let geometry = Geometry { snapshots: 2, ..room(&[GroupKind::Recurrent]) };
    let mut bed = Bed::new(geometry, &EngineConfig::default());
    let other = |id, first: TokenId| {
        let mut request = request(id, 40, 2);
        request.prompt = std::iter::once(first).chain(request.prompt.iter().copied().skip(1)).collect();
        request
    };
    let turns = [(1, 500, 0), (2, 501, 0), (3, 500, 32), (4, 502, 0), (5, 500, 32), (6, 501, 0)];
    for (id, first, cached) in turns {
        bed.add(other(id, first));
        bed.finish();
        assert_eq!(bed.usage(id).cached_tokens, cached, "request {id}");
    }
}

/// vLLM 31731: a long prompt must not stop the others.
#[test]
fn a_long_prompt_stops_nobody() {
    let mut bed = Bed::new(Geometry { blocks: 1000, ..room(&[GroupKind::Full]) }, &EngineConfig::default());
    bed.add(request(1, 20, 300));
    bed.step();
    bed.add(EngineRequest { tenant: TenantId(1), ..request(2, 4000, 5) });
    bed.step();
    for tenant in [1, 2] {
        let (before, short) = (bed.tokens.len(), 10 + tenant);
        let mut prompt = request(short, 20, 300);
        prompt.tenant = TenantId(tenant);
        prompt.prompt = [9; 20].into();
        bed.add(prompt);
        bed.step();
        bed.step();
        assert!(!bed.tokens_of(short, 0).is_empty(), "the short prompt of tenant {tenant} waits");
        assert!(bed.tokens.len() >= before + 3, "a running stream stood still");
    }
    assert!(bed.tokens_of(2, 0).is_empty(), "the long prompt was not so long");
    bed.finish();
}

#[test]
fn decoding_rows_come_first_and_the_budget_is_kept() {
    let config = EngineConfig { max_step_tokens: 20, max_running: 99, ..EngineConfig::default() };
    let mut bed = Bed::new(room(&[GroupKind::Full]), &config);
    (0..30).for_each(|id| bed.add(request(id, 5 + id as usize, 30)));
    while !bed.scheduler.is_idle() {
        bed.step();
        let tokens: u32 = bed.plan.rows.iter().map(|row| row.len).sum();
        assert!(tokens <= 20);
        let decodes = bed.plan.rows.iter().take_while(|row| row.input == RowInput::LastDrawn).count();
        assert!(bed.plan.rows[decodes..].iter().all(|row| row.input != RowInput::LastDrawn));
    }
    bed.finish();
}

#[test]
fn throughput_follows_weights() {
    let config = EngineConfig { max_running: 4, ..EngineConfig::default() };
    let mut bed = Bed::new(room(&[GroupKind::Full]), &config);
    for id in 0..400 {
        let (tenant, weight) = if id % 2 == 0 { (0, 1) } else { (1, 3) };
        bed.add(EngineRequest { tenant: TenantId(tenant), weight, ..request(id, 10, 20) });
    }
    (0..800).for_each(|_| bed.step());
    let heavy = bed.tokens.iter().filter(|(id, _, _)| id.0 % 2 == 1).count() as f64;
    let share = heavy / bed.tokens.len() as f64;
    assert!((0.70..0.80).contains(&share), "the tenant of weight 3 of 4 had {share} of the tokens");
    bed.scheduler.end_all(&FinishReason::EngineStopped);
    bed.finish();
    assert_eq!(bed.ends.len(), 400);
}

#[test]
fn who_waits_past_the_deadline_is_ended_by_the_next_plan() {
    let config = EngineConfig { max_running: 1, ..EngineConfig::default() };
    for look_ahead in [false, true] {
        let mut bed = Bed::new(room(&[GroupKind::Full]), &config);
        bed.look_ahead = look_ahead;
        // Nothing else runs: the first plan ends it, without a row.
        bed.now = Duration::from_secs(1);
        bed.add(EngineRequest { deadline: Some(bed.now), ..request(0, 20, 10) });
        bed.step();
        assert!(bed.plan.rows.is_empty() && bed.scheduler.is_idle());
        assert_eq!((&bed.ends[0].2, bed.usage(0).device_micros), (&FinishReason::Deadline, 0));
        // Behind one that runs.
        let deadline = bed.now + Duration::from_millis(20);
        bed.add(request(1, 20, 500));
        bed.step();
        bed.add(EngineRequest { deadline: Some(deadline), choices: 2, ..request(2, 20, 10) });
        while bed.now < deadline {
            assert_eq!(bed.ends.len(), 1);
            bed.step();
        }
        assert_eq!(bed.ends.len(), 3);
        assert!(bed.ends[1..].iter().all(|end| (end.0, &end.2) == (RequestId(2), &FinishReason::Deadline)));
        let counters = bed.counters();
        assert_eq!((counters.dequeued_requests, counters.dequeued_tokens), (3, 60));
        assert_eq!((counters.requests, counters.queued_requests), (3, 0));
        bed.finish();
    }
}

#[test]
fn priority_goes_before_age() {
    let config = EngineConfig { max_running: 1, ..EngineConfig::default() };
    let mut bed = Bed::new(room(&[GroupKind::Full]), &config);
    for (id, priority) in [(1, 0), (2, 0), (3, 5), (4, 5), (5, -1)] {
        bed.add(EngineRequest { priority, ..request(id, 10, 2) });
    }
    bed.finish();
    assert_eq!(bed.ends.iter().map(|end| end.0.0).collect::<Vec<_>>(), [3, 4, 1, 2, 5]);
}

/// vLLM 46283 and others: memory that an abort leaves behind.
#[test]
fn a_cancel_in_any_phase_leaves_nothing() {
    for look_ahead in [false, true] {
        for turns in 0..12 {
            let groups = [GroupKind::Full, GroupKind::Window(20), GroupKind::Recurrent];
            let config = EngineConfig { max_step_tokens: 16, max_running: 3, ..EngineConfig::default() };
            let mut bed = Bed::new(room(&groups), &config);
            bed.look_ahead = look_ahead;
            (0..5).for_each(|id| bed.add(EngineRequest { choices: 2, ..request(id, 40, 6) }));
            (0..turns).for_each(|_| bed.step());
            let ended = bed.ends.len();
            (0..5).for_each(|id| bed.scheduler.cancel(RequestId(id)));
            bed.scheduler.cancel(RequestId(77));
            bed.finish();
            assert_eq!(bed.ends.len(), 10);
            assert!(bed.ends[ended..].iter().all(|end| end.2 == FinishReason::Cancelled));
        }
    }
}

#[test]
fn tokens_after_a_stop_are_wasted_and_counted() {
    for (look_ahead, in_flight) in [(false, 0), (true, 1)] {
        let mut bed = Bed::with(&[GroupKind::Full]);
        bed.look_ahead = look_ahead;
        bed.add(request(1, 10, 100));
        while bed.tokens.len() < 7 {
            bed.step();
        }
        bed.scheduler.stop(RequestId(1), 0, 5);
        bed.scheduler.stop(RequestId(1), 0, 6);
        bed.scheduler.stop(RequestId(1), 3, 6);
        bed.finish();
        let usage = bed.usage(1);
        assert_eq!((usage.completion_tokens, usage.wasted_tokens), (5, 2 + in_flight));
        // A stop token drawn while the next step is under way wastes that step's row.
        let plain = request(2, 10, 100);
        let stop = reference(&plain, 0, 1000, default_draw).0[4];
        let sampling = SamplingParams { stop_token_ids: vec![stop], ..SamplingParams::default() };
        bed.add(EngineRequest { sampling: Arc::new(sampling), ..plain });
        bed.finish();
        let usage = bed.usage(2);
        assert_eq!((usage.completion_tokens, usage.wasted_tokens), (5, in_flight));
        assert_eq!(bed.ends[1].2, FinishReason::StopToken(stop));
        assert_eq!(bed.counters().wasted_tokens, u64::from(2 + 2 * in_flight));
    }
}

#[test]
fn a_prompt_alone_may_be_computed() {
    let mut bed = Bed::with(&[GroupKind::Full]);
    bed.add(EngineRequest { choices: 2, ..request(1, 40, 0) });
    bed.finish();
    assert!(bed.tokens.is_empty());
    assert!(bed.ends.iter().all(|end| end.2 == FinishReason::Length && end.3.completion_tokens == 0));
}

#[test]
fn what_the_contract_forbids_is_noticed() {
    let mut bed = Bed::with(&[GroupKind::Full]);
    bed.add(request(1, 10, 10));
    assert_eq!(bed.scheduler.add(request(1, 5, 5), bed.now), Err(AdmissionError::DuplicateId(RequestId(1))));
    assert_eq!(bed.scheduler.commit(&mut StepOutcome::default()), Err(CommitError::Unexpected(0)));
    // A token outside the vocabulary, or none at all, is that request's fault alone.
    for tokens in [vec![1000], vec![]] {
        bed.scheduler.plan(bed.now, &mut bed.plan);
        let rows = vec![mirai_engine::RowOutcome { tokens: 0..tokens.len() as u32, ..Default::default() }];
        let mut outcome = StepOutcome { step: bed.plan.step, tokens, rows, device_time: Duration::ZERO };
        bed.scheduler.commit(&mut outcome).unwrap();
        let events = bed.scheduler.take_events();
        assert!(matches!(events[..], [Event::Finished { reason: FinishReason::Fault(_), .. }]), "{events:?}");
        bed.add(request(2, 10, 10));
    }
}
