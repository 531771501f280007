//! Taking memory back: whose, and when.

use super::Scheduler;
use crate::ids::{BLOCK_TOKENS, BlockId};
use crate::sequence::{Sequence, Stage};

impl Scheduler {
    /// Pages without which the sequence's next token cannot be computed, its promise aside.
    fn shortfall(&self, seq: &Sequence) -> u32 {
        let full = self.table_len(seq) * BLOCK_TOKENS as u32 <= seq.planned;
        if full && seq.wants_row() { (self.paged.len() as u32).saturating_sub(seq.outstanding) } else { 0 }
    }

    /// Sees to it that every running sequence can have its next block, as far as that is possible now. A victim
    /// that a submitted step names is left out of this plan and preempted in the next, when it is collected.
    /// Returns whether anything was preempted or left out.
    pub(super) fn make_room(&mut self) -> bool {
        let mut preferred = std::mem::take(&mut self.marked);
        // An index may have passed to another sequence meanwhile, which is not marked then.
        preferred.retain(|&s| self.seqs.get(s).is_some_and(|seq| seq.marked && seq.stage == Stage::Running));
        for &s in &preferred {
            self.seqs[s].marked = false;
        }
        if self.spare_pages() as usize >= self.running.len() * self.paged.len() {
            return false;
        }
        let mut demand: u32 = self.running.iter().map(|&s| self.shortfall(&self.seqs[s])).sum();
        let mut expected = 0;
        let mut any = false;
        while self.spare_pages() + expected < demand {
            let collected = preferred.iter().rposition(|&s| self.seqs[s].inflight == 0);
            let victim = collected.map(|at| preferred.swap_remove(at)).or_else(|| self.victim());
            let Some(victim) = victim else { break };
            any = true;
            let seq = &self.seqs[victim];
            demand -= self.shortfall(seq);
            if seq.inflight == 0 {
                self.preempt(victim);
            } else {
                let own = |block: &&BlockId| **block != BlockId::NULL && self.pool.refs(block.0) == 1;
                expected += seq.tables.iter().flatten().filter(own).count() as u32 + seq.outstanding;
                self.seqs[victim].marked = true;
                self.marked.push(victim);
            }
        }
        any
    }

    /// The youngest sequence of the tenant furthest over its fair share, among those that are neither secured
    /// nor chosen already.
    fn victim(&self) -> Option<u32> {
        let mut excluded: Vec<u32> = Vec::new();
        loop {
            let tenant = self.fair.most_over(&excluded)?;
            let youngest = self
                .running
                .iter()
                .copied()
                .filter(|&s| {
                    let seq = &self.seqs[s];
                    seq.tenant == tenant && seq.stage == Stage::Running && !seq.secured && !seq.marked
                })
                .max_by_key(|&s| (self.requests[self.seqs[s].request].arrival, self.seqs[s].choice));
            if youngest.is_some() {
                return youngest;
            }
            excluded.push(tenant);
        }
    }

    /// Takes slot and memory of a collected sequence and queues it again.
    fn preempt(&mut self, s: u32) {
        self.release_memory(s);
        self.stop_running(s);
        let seq = &mut self.seqs[s];
        debug_assert!(seq.inflight == 0 && seq.drawing == 0, "only collected sequences are preempted");
        seq.lost = seq.committed;
        (seq.planned, seq.committed, seq.saved_at) = (0, 0, 0);
        seq.slot_drew = false;
        if !seq.prefilled {
            seq.prompt_logprobs.clear();
        }
        seq.usage.preemptions += 1;
        self.slots.push(seq.slot);
        self.requests[seq.request].preemptions += 1;
        self.counters.preemptions += 1;
        self.enqueue(s);
    }

    /// The sequence can no longer be preempted: it was, or it ended.
    pub(super) fn stop_running(&mut self, s: u32) {
        let seq = &mut self.seqs[s];
        seq.marked = false;
        self.untidy = true;
        if !seq.secured {
            self.requests[seq.request].preemptible -= 1;
            self.fair.tenant_mut(seq.tenant).preemptible -= 1;
        }
    }

    /// Preempts what runs of a request, as if memory were short. Returns how many sequences that met: neither
    /// secured ones nor those that a submitted step names.
    #[cfg(feature = "test-hooks")]
    pub fn preempt_now(&mut self, id: crate::ids::RequestId) -> usize {
        self.tidy();
        let met = |s: &u32| {
            let seq = &self.seqs[*s];
            seq.request_id == id && seq.inflight == 0 && !seq.secured
        };
        let victims: Vec<u32> = self.running.iter().copied().filter(met).collect();
        victims.iter().for_each(|&s| self.preempt(s));
        self.tidy();
        victims.len()
    }
}
