//! Making a step: decoding rows first, then prefill chunks, then admissions, within one token budget.

use super::{Flight, FlightRow, Scheduler};
use crate::ids::BLOCK_TOKENS;
use crate::step::{Row, RowInput, RowOutput, StepPlan};
use crate::time::Time;

impl Scheduler {
    /// Writes the next step over `plan`, whose allocations are reused. Without rows there is nothing to submit
    /// now: everything waits for a step in flight, or the scheduler is idle.
    ///
    /// # Panics
    /// If two steps are in flight already.
    pub fn plan(&mut self, now: Time, plan: &mut StepPlan) {
        assert!(self.inflight.len() < 2, "one step of look-ahead");
        self.plans += 1;
        self.observe(now, None);
        plan.saves.clear();
        plan.opens.clear();
        plan.appends.clear();
        plan.tokens.clear();
        plan.rows.clear();
        let mut flight = self.spare.pop().unwrap_or_default();
        flight.rows.clear();
        flight.saves.clear();

        self.expire(now);
        self.tidy();
        let preempted = self.make_room();
        self.tidy();

        self.plan_decodes(plan, &mut flight);
        let left = self.budget - plan.rows.len() as u32;
        self.plan_prefills(now, plan, &mut flight, left, preempted);

        if plan.rows.is_empty() {
            plan.saves.clear();
            for save in flight.saves.drain(..) {
                self.seqs[save.seq].saved_at = 0;
                self.snapshots.release(save.snapshot.0);
            }
            self.spare.push(flight);
            return;
        }
        plan.step = self.next_step;
        flight.step = self.next_step;
        self.next_step += 1;
        self.inflight.push_back(flight);
    }

    /// One row for each sequence whose last token was drawn in its slot.
    fn plan_decodes(&mut self, plan: &mut StepPlan, flight: &mut Flight) {
        let pages = self.paged.len() as u32;
        self.prefilling.clear();
        for at in 0..self.running.len() {
            let s = self.running[at];
            let seq = &self.seqs[s];
            if seq.marked || !seq.wants_row() {
                continue;
            }
            if !seq.decodes() {
                self.prefilling.push(s);
                continue;
            }
            if seq.planned.is_multiple_of(BLOCK_TOKENS as u32) {
                if self.table_len(seq) * BLOCK_TOKENS as u32 <= seq.planned && self.takeable(seq) < pages {
                    continue;
                }
                self.save_snapshot(s, plan, &mut flight.saves);
                self.grow(s, self.seqs[s].planned + 1, plan);
            }
            let seq = &mut self.seqs[s];
            plan.rows.push(Row {
                seq: seq.id,
                slot: seq.slot,
                start: seq.planned,
                len: 1,
                input: RowInput::LastDrawn,
                output: RowOutput::Sample,
            });
            seq.planned += 1;
            seq.inflight += 1;
            seq.drawing += 1;
            flight.rows.push(FlightRow { seq: s, len: 1, end: seq.planned, output: RowOutput::Sample });
            self.fair.charge(seq.tenant, 1);
        }
    }

    /// Chunks of running prefills and of newly admitted sequences. The first in turn always moves, and has at
    /// least half of the budget unless its tenant is ahead of those that wait; the rest lets short prompts pass
    /// a long one.
    fn plan_prefills(
        &mut self,
        now: Time,
        plan: &mut StepPlan,
        flight: &mut Flight,
        mut left: u32,
        preempted: bool,
    ) {
        let mut prefilling = std::mem::take(&mut self.prefilling);
        let turn = |s: &u32| {
            let seq = &self.seqs[*s];
            (self.fair.tenant(seq.tenant).served(), self.requests[seq.request].arrival, seq.choice)
        };
        prefilling.sort_by_cached_key(turn);
        // A step saves before it restores, so a save must not take a snapshot that an admission of the same
        // plan has found: all saves are decided first.
        for &s in &prefilling {
            self.save_snapshot(s, plan, &mut flight.saves);
        }
        let head = prefilling.first().copied();
        let mut kept = 0;
        if let Some(head) = head {
            let seq = &self.seqs[head];
            let ahead = self.fair.next().is_some_and(|other| {
                self.fair.tenant(self.seqs[other].tenant).served() < self.fair.tenant(seq.tenant).served()
            });
            let share = if ahead { left / 8 } else { left / 2 };
            kept = (seq.known() - seq.planned).min(share.max(1)).min(left);
        }
        left -= kept;
        for &s in prefilling.iter().skip(1) {
            left -= self.plan_chunk(s, left, plan, flight);
        }
        // Memory that was just taken from somebody is not given to a newcomer, unless nobody else can use it.
        if !(preempted && !(plan.rows.is_empty() && prefilling.is_empty())) {
            left = self.admit(now, plan, flight, left);
        }
        if let Some(head) = head {
            self.plan_chunk(head, left + kept, plan, flight);
        }
        self.prefilling = prefilling;
    }

    /// Plans up to `limit` known tokens of a sequence and returns how many. None where memory is short.
    pub(super) fn plan_chunk(&mut self, s: u32, limit: u32, plan: &mut StepPlan, flight: &mut Flight) -> u32 {
        let block = BLOCK_TOKENS as u32;
        let seq = &self.seqs[s];
        let (start, known) = (seq.planned, seq.known());
        let mut end = known.min(start + limit.min(self.chunk));
        if let Some(point) = self.next_snapshot_point(seq, start) {
            end = end.min(point);
        }
        if !self.paged.is_empty() {
            let blocks = self.takeable(seq) / self.paged.len() as u32;
            end = end.min((self.table_len(seq) + blocks).saturating_mul(block));
        }
        debug_assert!(!self.geometry.whole_prompts || end == known, "a prompt is computed whole");
        if end <= start {
            return 0;
        }
        self.grow(s, end, plan);
        let offset = plan.tokens.len() as u32;
        let seq = &mut self.seqs[s];
        seq.copy_tokens(start, end, &mut plan.tokens);
        let output = seq.output_at(end);
        let draws = output == RowOutput::Sample;
        plan.rows.push(Row {
            seq: seq.id,
            slot: seq.slot,
            start,
            len: end - start,
            input: RowInput::Tokens(offset),
            output,
        });
        seq.planned = end;
        seq.inflight += 1;
        seq.drawing += u8::from(draws);
        seq.slot_drew = draws;
        flight.rows.push(FlightRow { seq: s, len: end - start, end, output });
        let tenant = seq.tenant;
        self.fair.charge(tenant, end - start);
        if end == known {
            self.end_prefill(s);
        }
        end - start
    }

    /// The promise for the prompt has been used. What remains is the promise of a secured sequence, whose
    /// windows now move by single tokens.
    fn end_prefill(&mut self, s: u32) {
        let seq = &self.seqs[s];
        let quota = if seq.secured { seq.quota.min(self.lifetime_blocks(seq, 1)) } else { 0 };
        self.seqs[s].quota = quota;
        self.rebalance(s);
    }
}
