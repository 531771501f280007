//! How sequences end.

use super::Scheduler;
use crate::energy::Pending;
use crate::ids::RequestId;
use crate::request::{Event, FinishReason};
use crate::sequence::Stage;
use crate::time::Time;

impl Scheduler {
    /// Ends all choices of a request. Unknown or ended ones are ignored.
    pub fn cancel(&mut self, id: RequestId) {
        if let Some(&request) = self.by_id.get(&id) {
            self.end_request(request, &FinishReason::Cancelled);
        }
    }

    /// Ends one choice after `kept_tokens` output tokens; an ended one is ignored. See
    /// [`crate::EngineHandle::stop`].
    pub fn stop(&mut self, id: RequestId, choice: u32, kept_tokens: u32) {
        let Some(&request) = self.by_id.get(&id) else { return };
        let alive = self.requests[request].alive.iter().copied().find(|&s| self.seqs[s].choice == choice);
        if let Some(s) = alive {
            let drawn = self.seqs[s].output.len() as u32;
            self.end_with(s, FinishReason::Stopped, kept_tokens.min(drawn));
        }
    }

    /// Ends everything: the device failed, or the time to go on is over.
    pub fn end_all(&mut self, reason: &FinishReason) {
        let mut requests: Vec<(u64, u32)> =
            self.requests.iter().map(|(r, entry)| (entry.arrival, r)).collect();
        requests.sort_unstable();
        for (_, request) in requests {
            self.end_request(request, reason);
        }
    }

    /// Ends the requests whose deadline has come.
    pub(super) fn expire(&mut self, now: Time) {
        while let Some(&(deadline, request)) = self.deadlines.first()
            && deadline <= now
        {
            self.deadlines.pop_first();
            self.end_request(request, &FinishReason::Deadline);
        }
    }

    fn end_request(&mut self, request: u32, reason: &FinishReason) {
        // The last one to end may take the request with it.
        let alive = std::mem::take(&mut self.requests[request].alive);
        self.requests[request].leader = None;
        for s in alive {
            self.end(s, reason.clone());
        }
    }

    /// Ends a sequence with all tokens that it has.
    pub(super) fn end(&mut self, s: u32, reason: FinishReason) {
        let kept = self.seqs[s].output.len() as u32;
        self.end_with(s, reason, kept);
    }

    /// Ends a sequence with its first `kept` tokens. Its memory stays until no submitted step names it.
    fn end_with(&mut self, s: u32, reason: FinishReason, kept: u32) {
        let seq = &mut self.seqs[s];
        seq.usage.completion_tokens = kept;
        seq.usage.wasted_tokens += seq.output.len() as u32 - kept + u32::from(seq.drawing);
        let pending = self.inflight.iter().filter_map(|flight| {
            let row = flight.rows.iter().find(|row| row.seq == s)?;
            let step_tokens = flight.rows.iter().map(|row| u64::from(row.len)).sum();
            Some(Pending { tokens: row.len, step_tokens })
        });
        let bill = self.meter.bill(s, pending);
        (seq.usage.device_micros, seq.usage.energy_microjoules) =
            (bill.device_micros, bill.energy_microjoules);
        seq.usage.energy_method = bill.method;
        let (usage, choice, request, before) = (seq.usage, seq.choice, seq.request, seq.stage);
        let entry = &mut self.requests[request];
        self.counters.finished += 1;
        self.counters.faults += u64::from(matches!(reason, FinishReason::Fault(_)));
        self.counters.prompt_tokens += u64::from(usage.prompt_tokens);
        self.counters.cached_tokens += u64::from(usage.cached_tokens);
        self.counters.completion_tokens += u64::from(usage.completion_tokens);
        self.counters.wasted_tokens += u64::from(usage.wasted_tokens);
        self.events.push(Event::Finished { request: entry.id, choice, reason, usage });
        entry.alive.retain(|&other| other != s);
        match before {
            Stage::Held => {}
            Stage::Waiting => self.dequeue(s),
            Stage::Running => self.stop_running(s),
            Stage::Draining => unreachable!("a sequence ends once"),
        }
        self.seqs[s].stage = Stage::Draining;
        self.draining += 1;
        if self.requests[request].leader == Some(s) {
            self.promote(request);
        }
        if self.seqs[s].inflight == 0 {
            self.remove(s, before == Stage::Running);
        }
    }

    /// The leader ended before its prompt was computed: the next choice computes it.
    fn promote(&mut self, request: u32) {
        let next = self.requests[request].alive.first().copied();
        self.requests[request].leader = next;
        if let Some(next) = next {
            self.enqueue(next);
        }
    }

    /// The leader's prompt is in the index: the other choices may come.
    pub(super) fn release_choices(&mut self, request: u32) {
        self.requests[request].leader = None;
        for at in 0..self.requests[request].alive.len() {
            let s = self.requests[request].alive[at];
            if self.seqs[s].stage == Stage::Held {
                self.enqueue(s);
            }
        }
    }

    /// Nothing names the ended sequence any more.
    pub(super) fn remove(&mut self, s: u32, had_slot: bool) {
        if had_slot {
            self.release_memory(s);
            self.slots.push(self.seqs[s].slot);
        }
        self.draining -= 1;
        self.meter.close(s);
        let seq = self.seqs.remove(s);
        self.fair.leave(seq.tenant);
        let entry = &mut self.requests[seq.request];
        entry.remaining -= 1;
        if entry.remaining == 0 {
            self.leave_queue(seq.request);
            let entry = self.requests.remove(seq.request);
            self.by_id.remove(&entry.id);
            if let Some(deadline) = entry.body.deadline {
                self.deadlines.remove(&(deadline, seq.request));
            }
        }
    }
}
