//! Giving a waiting sequence a slot, its cached prefix and a promise of memory.

use super::memory::last_full_block;
use super::{Flight, MAX_PREEMPTIONS, Scheduler};
use crate::door::{final_tokens, peak_blocks};
use crate::ids::{BLOCK_TOKENS, BlockId, SnapshotId};
use crate::prefix::{ROOT, window_start};
use crate::sequence::{Sequence, Stage};
use crate::step::{GroupKind, SlotOpen, StepPlan};
use crate::time::Time;

/// Preemptions after which a sequence is only admitted with all the memory that it can ever need.
const SECURE_AFTER: u32 = 3;

/// Admissions of other tenants that may go past a sequence that does not fit.
const MAX_BYPASS: u32 = 32;

/// Plans between two looks at a sequence that did not fit: the index may have learned something meanwhile.
const RETRY_PLANS: u64 = 16;

impl Scheduler {
    /// Most blocks that the sequence can hold at once before its end, when its chunks are at most `chunk` long.
    pub(super) fn lifetime_blocks(&self, seq: &Sequence, chunk: u32) -> u32 {
        peak_blocks(&self.geometry.groups, final_tokens(seq.prompt.len(), seq.max_tokens), chunk)
    }

    /// Admits what goes next while there are tokens, slots and memory. Returns the tokens that are left.
    pub(super) fn admit(
        &mut self,
        now: Time,
        plan: &mut StepPlan,
        flight: &mut Flight,
        mut left: u32,
    ) -> u32 {
        let mut blocked: Vec<u32> = Vec::new();
        self.fair.begin_round();
        while left > 0 && !self.slots.is_empty() && self.running.len() < self.max_running {
            let Some(s) = self.fair.next() else { break };
            if self.least_chunk(&self.seqs[s]) > left {
                // The next step begins with it.
                break;
            }
            let tenant = self.seqs[s].tenant;
            if blocked.iter().any(|&b| self.fair.lead(tenant, self.seqs[b].tenant) > u64::from(self.budget)) {
                // Whoever goes past takes the memory that the one behind waits for: no further than a step's
                // tokens, or tenants of short sequences would keep one of long ones from its share.
                break;
            }
            if self.try_admit(s, now, plan) {
                left -= self.plan_chunk(s, left, plan, flight);
                for &other in &blocked {
                    self.seqs[other].bypassed += 1;
                }
                continue;
            }
            let seq = &self.seqs[s];
            let patience = if seq.usage.preemptions >= SECURE_AFTER { 0 } else { MAX_BYPASS };
            if seq.bypassed >= patience {
                break;
            }
            self.fair.skip(seq.tenant);
            blocked.push(s);
        }
        left
    }

    /// Fewest tokens that make a row of a sequence which is not yet running.
    fn least_chunk(&self, seq: &Sequence) -> u32 {
        if self.geometry.whole_prompts { seq.known() } else { 1 }
    }

    fn try_admit(&mut self, s: u32, now: Time, plan: &mut StepPlan) -> bool {
        let seq = &self.seqs[s];
        let spare = self.spare_pages();
        if spare < seq.needs_obtainable && self.plans < seq.retry_at {
            return false;
        }
        let request = &self.requests[seq.request];
        let (known, looks_up) = (seq.known(), request.looks_up(self.prefix_caching));
        let mut path = std::mem::take(&mut self.path);
        path.clear();
        if looks_up {
            let most = last_full_block(known) / BLOCK_TOKENS as u32;
            self.index.longest(request.room, most, |block| seq.block_key(block), &mut path);
        }
        let (mut hits, mut idle_hits) = (0, 0);
        for &group in &self.paged {
            for &node in &path[self.first_needed(group, path.len())..] {
                hits += 1;
                idle_hits += u32::from(self.pool.refs(self.index.block(node, group).0) == 0);
            }
        }
        let secured = request.preemptions + request.preemptible + 1 > MAX_PREEMPTIONS
            || seq.usage.preemptions >= SECURE_AFTER;
        let quota = if secured {
            self.lifetime_blocks(seq, self.chunk)
        } else {
            peak_blocks(&self.geometry.groups, known, self.chunk)
        };
        // Room for those that run to grow a little, or the next step would take back what this one gives.
        let margin = if secured || self.running.is_empty() { 0 } else { self.pool.total() / 64 };
        let needed = quota.saturating_sub(hits) + idle_hits + margin;
        let fits = needed <= spare;
        if fits {
            self.open(s, now, &path, secured, quota, plan);
            if looks_up {
                self.counters.prefix_query_tokens += u64::from(known);
                self.counters.prefix_hit_tokens += (path.len() * BLOCK_TOKENS) as u64;
            }
        } else {
            let seq = &mut self.seqs[s];
            seq.needs_obtainable = needed;
            seq.retry_at = self.plans + RETRY_PLANS;
        }
        self.path = path;
        fits
    }

    /// First block of a hit that a group still needs.
    fn first_needed(&self, group: usize, blocks: usize) -> usize {
        match self.geometry.groups[group] {
            GroupKind::Full => 0,
            GroupKind::Window(window) => window_start(window, blocks),
            GroupKind::Recurrent => blocks,
        }
    }

    fn open(&mut self, s: u32, now: Time, path: &[u32], secured: bool, quota: u32, plan: &mut StepPlan) {
        self.dequeue(s);
        self.leave_queue(self.seqs[s].request);
        let computed = (path.len() * BLOCK_TOKENS) as u32;
        let slot = self.slots.pop().expect("the caller has seen a free slot");
        let mut held = 0;
        for &group in &self.paged {
            let first = self.first_needed(group, path.len());
            let seq = &mut self.seqs[s];
            seq.tables[group].resize(first, BlockId::NULL);
            seq.released[group] = first as u32;
            for &node in &path[first..] {
                let block = self.index.block(node, group);
                self.pool.retain(block.0);
                seq.tables[group].push(block);
                held += 1;
            }
        }
        let cursor = path.last().copied().unwrap_or(ROOT);
        self.index.pin(cursor);
        let restore = self.restore_point(cursor);
        let seq = &mut self.seqs[s];
        let request = &mut self.requests[seq.request];
        let tenant = self.fair.tenant_mut(seq.tenant);
        seq.stage = Stage::Running;
        seq.slot = slot;
        (seq.planned, seq.committed) = (computed, computed);
        (seq.held, seq.quota, seq.secured) = (held, quota, secured);
        seq.indexed = self.prefix_caching
            || (request.body.choices > 1 && request.body.sampling.prompt_logprobs.is_none());
        (seq.cursor, seq.cursor_blocks) = (cursor, path.len() as u32);
        // A state that came from a snapshot need not be saved again.
        seq.saved_at = computed;
        (seq.needs_obtainable, seq.retry_at, seq.bypassed) = (0, 0, 0);
        tenant.blocks += u64::from(held);
        if !secured {
            request.preemptible += 1;
            tenant.preemptible += 1;
        }
        if seq.scheduled.is_none() {
            seq.scheduled = Some(now);
            seq.usage.cached_tokens = computed.min(seq.prompt_len());
        } else {
            seq.usage.wasted_tokens += seq.lost.saturating_sub(computed);
        }
        plan.opens.push(SlotOpen {
            slot,
            seq: seq.id,
            choice: seq.choice,
            sampling: request.body.sampling.clone(),
            prompt: seq.prompt.clone(),
            output: seq.output.clone(),
            computed,
            blocks: seq.tables.clone(),
            restore,
        });
        self.running.push(s);
        self.rebalance(s);
    }

    /// The snapshot that recurrent groups start from after this node, made the most recently used.
    fn restore_point(&mut self, node: u32) -> Option<SnapshotId> {
        if node == ROOT || !self.geometry.groups.contains(&GroupKind::Recurrent) {
            return None;
        }
        let snapshot = self.index.snapshot(node)?;
        self.snapshots.retain(snapshot.0);
        self.snapshots.release(snapshot.0);
        Some(snapshot)
    }
}
