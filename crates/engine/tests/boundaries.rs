//! Prompt lengths around blocks, windows and snapshots, after a prefix-cache hit at every block boundary and after
//! a preemption at every step, for every mixture of layer groups and both tasks.
#![allow(clippy::unwrap_used, unreachable_pub, missing_docs)]

mod bed;

use std::collections::BTreeSet;

use bed::{Bed, encoder, pooling, request, room};
use mirai_engine::sim::{default_draw, default_pool, reference};
use mirai_engine::{
    EngineConfig, EngineRequest, FinishReason, Geometry, GroupKind, RequestId, Task, TokenId,
};

const BLOCK: usize = 16;
const INTERVAL: usize = 32;
const OUTPUT: u32 = 3;

fn mixtures() -> Vec<Vec<GroupKind>> {
    use GroupKind::{Full, Recurrent, Window};
    vec![
        vec![Full],
        vec![Window(1)],
        vec![Window(16)],
        vec![Window(33)],
        vec![Recurrent],
        vec![Full, Window(17)],
        vec![Full, Recurrent],
        vec![Window(20), Recurrent],
        vec![Window(16), Window(33), Full],
        vec![Recurrent, Window(17), Full],
    ]
}

/// Around the edges of blocks and snapshots up to 80, and around the end of every window of the mixture.
fn lengths(groups: &[GroupKind]) -> BTreeSet<usize> {
    let windows = groups.iter().filter_map(|group| match group {
        GroupKind::Window(window) => Some(*window as usize),
        _ => None,
    });
    let edges = (0..=80).step_by(BLOCK).chain(windows);
    edges.flat_map(|edge| [edge.saturating_sub(1), edge, edge + 1]).filter(|&length| length > 0).collect()
}

fn bed(groups: &[GroupKind], max_step_tokens: u32, prefix_caching: bool, look_ahead: bool) -> Bed {
    let geometry = Geometry { blocks: 60, slots: 2, ..room(groups) };
    let snapshot_interval = INTERVAL as u32;
    let config =
        EngineConfig { max_step_tokens, prefix_caching, snapshot_interval, ..EngineConfig::default() };
    let mut bed = Bed::new(geometry, &config);
    bed.look_ahead = look_ahead;
    bed
}

fn wanted(task: Task, length: usize) -> EngineRequest {
    match task {
        Task::Generate => request(1, length, OUTPUT),
        Task::Pool => pooling(1, length),
    }
}

/// The request's answer is what it would be alone.
fn check(bed: &Bed, request: &EngineRequest) {
    let end = bed.ends.iter().find(|end| end.0 == request.id).unwrap();
    match request.task {
        Task::Generate => {
            let expected = reference(request, 0, 1000, default_draw);
            assert_eq!((bed.tokens_of(request.id.0, 0), &end.2), (expected.0, &expected.1));
        }
        Task::Pool => {
            assert_eq!(bed.pooled.last().unwrap(), &(request.id, default_pool(&request.prompt, 8)));
            assert_eq!(end.2, FinishReason::Pooled);
        }
    }
}

/// Tokens that the index can serve after a prompt of which the first `hit` blocks are shared: as many blocks as
/// leave a token to compute; recurrent groups go on from a snapshot, which lie at the interval and at the end of
/// the other prompt's full blocks.
fn naive_hit(groups: &[GroupKind], hit: usize, length: usize) -> usize {
    let most = hit.min((length - 1) / BLOCK);
    let snapshot = |blocks: &usize| (blocks * BLOCK).is_multiple_of(INTERVAL) || *blocks == hit;
    let recurrent = groups.contains(&GroupKind::Recurrent);
    (0..=most).rev().find(|blocks| !recurrent || snapshot(blocks)).unwrap_or(0) * BLOCK
}

#[test]
fn a_hit_at_every_block_boundary() {
    // Chunks that end within blocks, on their edges, and beyond the prompt.
    let mut ways = [(7, false), (16, true), (64, false), (7, true), (16, false), (64, true)].iter().cycle();
    let mut hits = 0;
    for groups in mixtures() {
        for length in lengths(&groups) {
            for hit in 0..=length / BLOCK {
                for task in [Task::Generate, Task::Pool] {
                    let &(budget, look_ahead) = ways.next().unwrap();
                    let mut bed = bed(&groups, budget, true, look_ahead);
                    let wanted = wanted(task, length);
                    let shared = wanted.prompt[..hit * BLOCK].iter().copied();
                    let prompt: Vec<TokenId> = shared.chain([999; 5]).collect();
                    bed.add(EngineRequest { prompt: prompt.into(), ..request(0, 1, 2) });
                    bed.finish();
                    bed.add(wanted.clone());
                    bed.finish();
                    let context = format!("{groups:?}, {length} tokens, {hit} blocks shared, {task:?}");
                    let cached = bed.usage(1).cached_tokens as usize;
                    assert_eq!(cached, naive_hit(&groups, hit, length), "{context}");
                    check(&bed, &wanted);
                    hits += usize::from(cached > 0);
                }
            }
        }
    }
    assert!(hits > 500, "{hits} hits");
}

#[test]
fn a_preemption_at_every_step() {
    let mut ways = [(7, true, false), (16, false, true), (64, true, true), (7, false, false)].iter().cycle();
    let mut met = [0; 2];
    for groups in mixtures() {
        for length in lengths(&groups) {
            for (task, seen) in [Task::Generate, Task::Pool].into_iter().zip(&mut met) {
                let &(budget, prefix_caching, look_ahead) = ways.next().unwrap();
                let wanted = wanted(task, length);
                for turn in 1.. {
                    let mut bed = bed(&groups, budget, prefix_caching, look_ahead);
                    bed.add(wanted.clone());
                    (0..turn).for_each(|_| bed.step());
                    let over = !bed.ends.is_empty();
                    // With look-ahead a step is under way: nothing may be planned before it is collected.
                    while !over && bed.scheduler.steps_in_flight() > 0 {
                        bed.collect();
                    }
                    let preempted = bed.scheduler.preempt_now(RequestId(1));
                    bed.scheduler.audit().unwrap();
                    bed.finish();
                    *seen += preempted;
                    assert_eq!(bed.usage(1).preemptions as usize, preempted, "{groups:?}, {length} tokens");
                    check(&bed, &wanted);
                    if over {
                        break;
                    }
                }
            }
        }
    }
    assert!(met.iter().all(|&count| count > 200), "{met:?} preemptions");
}

/// One that preempts its own memory twice finds what it had put into the index.
#[test]
fn a_preempted_prompt_is_found_again() {
    let mut bed = bed(&[GroupKind::Full], 16, true, false);
    bed.add(pooling(1, 70));
    (0..3).for_each(|_| bed.step());
    assert_eq!(bed.scheduler.preempt_now(RequestId(1)), 1);
    bed.step();
    assert_eq!((bed.plan.opens[0].computed, bed.plan.rows[0].len), (48, 16));
    bed.finish();
    let usage = bed.usage(1);
    assert_eq!((usage.cached_tokens, usage.wasted_tokens, usage.preemptions), (0, 0, 1));
}

#[test]
fn every_length_of_a_whole_prompt() {
    for groups in [vec![], vec![GroupKind::Full], vec![GroupKind::Window(17), GroupKind::Recurrent]] {
        for look_ahead in [false, true] {
            let mut bed = Bed::new(encoder(&groups), &EngineConfig::default());
            bed.look_ahead = look_ahead;
            for length in 1..=64 {
                let wanted = EngineRequest { id: RequestId(length as u64), ..pooling(0, length) };
                bed.add(wanted.clone());
                bed.finish();
                check(&bed, &wanted);
                assert_eq!(bed.usage(length as u64).cached_tokens, 0);
            }
        }
    }
}
