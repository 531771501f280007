//! Decides what every step computes.
//!
//! Owns all sequences, blocks, slots and snapshots, and every decision about them. It is pure: no clock (`now` is
//! an argument), no I/O and no randomness of its own, so that one history of calls gives one history of plans and
//! events. It never waits and never talks to a device.
//!
//! The caller's loop is `plan`, submit, collect, `commit`; with look-ahead one more plan may be made before the
//! oldest outcome is committed. Lifetimes: a block or slot is released when the last submitted step that names
//! it is committed; only a sequence that no submitted step names is preempted.
//!
//! Memory is promised before it is used: every admitted sequence has a quota of blocks, and what is obtainable
//! but promised is given to nobody else. A first admission is promised its prompt, so that a prefill never
//! fails for lack of memory; a sequence that was preempted too often is promised all that it can ever need and
//! is never preempted again. That is why nothing is preempted more than [`MAX_PREEMPTIONS`] times.

mod admit;
mod audit;
mod commit;
mod finish;
mod memory;
mod plan;
mod preempt;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use crate::config::EngineConfig;
use crate::door::{AdmissionError, Door, chunk_limit};
use crate::energy::Meter;
use crate::fair::{FairShare, Place};
use crate::ids::{BLOCK_TOKENS, RequestId, SeqId, SlotId, SnapshotId, TenantId};
use crate::params::{SamplingParams, Task};
use crate::pool::PagePool;
use crate::prefix::{NodeId, PrefixIndex, Room};
use crate::request::{EngineRequest, Event};
use crate::sequence::{Request, Sequence, Stage};
use crate::slab::Slab;
use crate::stats::Counters;
use crate::step::{Geometry, GroupKind, RowOutput};
use crate::time::Time;

pub use audit::IntegrityError;
pub use commit::CommitError;

/// Most preemptions of all sequences of one request together.
pub const MAX_PREEMPTIONS: u32 = 8;

/// What the engine's configuration leaves open.
#[derive(Clone, Copy, Debug)]
pub struct HashKey {
    /// Key of the prefix index's hash; random in a server, so that nobody can aim for collisions.
    pub key: (u64, u64),
    /// Bits of the hash that are used: all, but for tests that want collisions.
    pub mask: u64,
}

impl Default for HashKey {
    fn default() -> Self {
        Self { key: (0, 0), mask: u64::MAX }
    }
}

/// A row of a submitted step.
#[derive(Clone, Copy, Debug)]
struct FlightRow {
    seq: u32,
    /// Its tokens.
    len: u32,
    /// Position after its last token.
    end: u32,
    output: RowOutput,
}

/// A submitted step.
#[derive(Debug, Default)]
struct Flight {
    step: u64,
    rows: Vec<FlightRow>,
    /// Snapshots that this step saves.
    saves: Vec<Save>,
}

/// A snapshot under way. Its sequence may have no row in the same step, and so may be gone, or computed again,
/// when the step is collected: that is why it is named by what never changes.
#[derive(Clone, Copy, Debug)]
struct Save {
    seq: u32,
    id: SeqId,
    position: u32,
    snapshot: SnapshotId,
}

/// The scheduler. See the module's documentation.
#[derive(Debug)]
pub struct Scheduler {
    geometry: Geometry,
    door: Door,
    /// Tokens of a step.
    budget: u32,
    max_running: usize,
    /// Longest chunk of one row.
    chunk: u32,
    prefix_caching: bool,
    /// A multiple of the block length; 0 without recurrent groups or snapshots.
    snapshot_interval: u32,
    /// Groups with blocks.
    paged: Vec<usize>,
    windows: Vec<(usize, u32)>,

    pool: PagePool,
    snapshots: PagePool,
    index: PrefixIndex,
    /// Sum of the sequences' outstanding promises; never more than the pool can give.
    reserved: u32,
    slots: Vec<SlotId>,

    seqs: Slab<Sequence>,
    requests: Slab<Request>,
    by_id: HashMap<RequestId, u32>,
    fair: FairShare,
    /// In order of admission. While `untidy`, it may also name sequences that ended or were preempted.
    running: Vec<u32>,
    untidy: bool,
    /// Sequences that were left out of the last plan so that they can be preempted.
    marked: Vec<u32>,
    deadlines: BTreeSet<(Time, u32)>,
    /// Requests without a slot so far: arrival to time and prompt tokens.
    queued: BTreeMap<u64, (Time, usize)>,
    /// Requests that left the queue since [`Scheduler::take_dequeued`]: whose, and their prompt tokens.
    dequeued: Vec<(TenantId, usize)>,
    /// Ended sequences that a submitted step still names.
    draining: usize,

    inflight: VecDeque<Flight>,
    spare: Vec<Flight>,
    arrivals: u64,
    next_seq: u64,
    next_step: u64,
    plans: u64,
    events: Vec<Event>,
    counters: Counters,
    meter: Meter,
    /// The last time that anybody said.
    now: Time,
    /// Scratch: the nodes of a hit, and the prefilling sequences of a plan.
    path: Vec<NodeId>,
    prefilling: Vec<u32>,
    #[cfg(feature = "test-hooks")]
    hooks: Option<std::sync::Arc<crate::hooks::TestHooks>>,
}

impl Scheduler {
    /// An empty scheduler for an executor of this geometry.
    ///
    /// # Errors
    /// The geometry has no room for one token of one sequence; the text says what is missing.
    pub fn new(config: &EngineConfig, geometry: &Geometry, hash: HashKey) -> Result<Self, String> {
        let budget = config.max_step_tokens.min(geometry.max_step_tokens);
        let max_running = config.max_running.min(geometry.slots).min(budget);
        let paged: Vec<usize> = (0..geometry.groups.len())
            .filter(|&group| geometry.groups[group] != GroupKind::Recurrent)
            .collect();
        if max_running == 0 || geometry.max_context == 0 {
            return Err(format!("{budget} tokens a step, {} slots", geometry.slots));
        }
        if !(geometry.generates || geometry.pools) || (geometry.generates && geometry.whole_prompts) {
            return Err(String::from(
                "a model generates or pools, and one that needs whole prompts only pools",
            ));
        }
        if geometry.groups.is_empty() && !geometry.whole_prompts {
            return Err(String::from("without layer groups a prompt can only be computed whole"));
        }
        let pages = geometry.blocks.saturating_sub(1);
        if !paged.is_empty() && pages < u32::try_from(paged.len()).unwrap_or(u32::MAX) {
            return Err(format!(
                "{} blocks for {} groups and the reserved block",
                geometry.blocks,
                paged.len()
            ));
        }
        if geometry.groups.contains(&GroupKind::Window(0)) {
            return Err(String::from("a window of 0 tokens sees nothing"));
        }
        let recurrent = geometry.groups.contains(&GroupKind::Recurrent);
        let block = BLOCK_TOKENS as u32;
        let interval = config.snapshot_interval.max(1).div_ceil(block).saturating_mul(block);
        let max_nodes = (geometry.blocks as usize * 4).max(1 << 16);
        Ok(Self {
            door: Door::new(config, geometry),
            budget,
            max_running: max_running as usize,
            chunk: chunk_limit(geometry, budget),
            prefix_caching: config.prefix_caching && !geometry.whole_prompts,
            snapshot_interval: if recurrent && geometry.snapshots > 0 { interval } else { 0 },
            windows: (0..)
                .zip(&geometry.groups)
                .filter_map(|(group, kind)| match *kind {
                    GroupKind::Window(window) => Some((group, window)),
                    GroupKind::Full | GroupKind::Recurrent => None,
                })
                .collect(),
            paged,
            pool: PagePool::new(1, pages),
            snapshots: PagePool::new(0, if recurrent { geometry.snapshots } else { 0 }),
            index: PrefixIndex::new(&geometry.groups, hash.key, hash.mask, max_nodes),
            reserved: 0,
            slots: (0..geometry.slots).rev().map(SlotId).collect(),
            seqs: Slab::default(),
            requests: Slab::default(),
            by_id: HashMap::new(),
            fair: FairShare::default(),
            running: Vec::new(),
            untidy: false,
            marked: Vec::new(),
            deadlines: BTreeSet::new(),
            queued: BTreeMap::new(),
            dequeued: Vec::new(),
            draining: 0,
            inflight: VecDeque::new(),
            spare: Vec::new(),
            arrivals: 0,
            next_seq: 0,
            next_step: 0,
            plans: 0,
            events: Vec::new(),
            counters: Counters { blocks_total: u64::from(pages), ..Counters::default() },
            meter: Meter::new(config.devices),
            now: Time::ZERO,
            path: Vec::new(),
            prefilling: Vec::new(),
            #[cfg(feature = "test-hooks")]
            hooks: None,
            geometry: geometry.clone(),
        })
    }

    /// Lets tests inject faults.
    #[cfg(feature = "test-hooks")]
    pub fn set_hooks(&mut self, hooks: std::sync::Arc<crate::hooks::TestHooks>) {
        self.hooks = Some(hooks);
    }

    /// Queues a request that arrived at `now`.
    ///
    /// # Errors
    /// It can never be served, or its id is being served already. The length of the queue is not checked here
    /// but at the handle, which must know it without asking this thread.
    pub fn add(&mut self, mut body: EngineRequest, now: Time) -> Result<(), AdmissionError> {
        self.door.check(&body)?;
        if body.task == Task::Pool {
            body.sampling = Arc::new(SamplingParams::default());
        }
        if self.by_id.contains_key(&body.id) {
            return Err(AdmissionError::DuplicateId(body.id));
        }
        let arrival = self.arrivals;
        self.arrivals += 1;
        let choices = body.choices;
        let tenant = self.fair.join(body.tenant, body.weight, choices);
        let private = if self.prefix_caching { 0 } else { arrival + 1 };
        let prompt_tokens = body.prompt.len();
        let request = self.requests.insert(Request {
            id: body.id,
            room: Room { salt: body.cache_salt, adapter: 0, private },
            arrival,
            alive: Vec::with_capacity(choices as usize),
            remaining: choices,
            leader: None,
            queued: true,
            preemptions: 0,
            preemptible: 0,
            body,
        });
        let entry = &self.requests[request];
        if let Some(deadline) = entry.body.deadline {
            self.deadlines.insert((deadline, request));
        }
        self.by_id.insert(entry.id, request);
        self.queued.insert(arrival, (now, prompt_tokens));
        self.counters.requests += 1;
        // The others wait for the first one's prompt only where a full block of it can be shared.
        let shares = entry.looks_up(self.prefix_caching) && prompt_tokens > BLOCK_TOKENS;
        for choice in 0..choices {
            let id = SeqId(self.next_seq);
            self.next_seq += 1;
            let groups = self.geometry.groups.len();
            let seq = Sequence::new(id, request, tenant, choice, &self.requests[request].body, groups);
            let s = self.seqs.insert(seq);
            self.meter.open(s);
            self.requests[request].alive.push(s);
            if choice == 0 || !shares {
                self.enqueue(s);
            }
        }
        self.requests[request].leader = (shares && choices > 1).then(|| self.requests[request].alive[0]);
        Ok(())
    }

    fn place(&self, s: u32) -> Place {
        let seq = &self.seqs[s];
        let request = &self.requests[seq.request];
        Place::new(request.body.priority, request.arrival, seq.choice)
    }

    fn enqueue(&mut self, s: u32) {
        let place = self.place(s);
        let seq = &mut self.seqs[s];
        seq.stage = Stage::Waiting;
        self.fair.enqueue(seq.tenant, place, s);
    }

    fn dequeue(&mut self, s: u32) {
        let place = self.place(s);
        self.fair.dequeue(self.seqs[s].tenant, place);
    }

    /// Whether nothing waits, runs or is in flight.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.requests.len() == 0 && self.inflight.is_empty()
    }

    /// Says what time it is, so that a step that is committed next counts as over by then; and what the energy
    /// counter showed, if it was read just now.
    pub fn observe(&mut self, now: Time, microjoules: Option<u64>) {
        self.now = self.now.max(now);
        if self.inflight.is_empty() {
            self.meter.rested(self.now);
        }
        if let Some(microjoules) = microjoules {
            self.meter.reading(self.now, microjoules);
        }
    }

    /// Submitted steps that are not committed.
    #[must_use]
    pub fn steps_in_flight(&self) -> usize {
        self.inflight.len()
    }

    /// Everything that happened since the last call, in order.
    pub fn take_events(&mut self) -> Vec<Event> {
        let capacity = self.events.len();
        std::mem::replace(&mut self.events, Vec::with_capacity(capacity))
    }

    /// The counters now.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let running = if self.untidy {
            self.running.iter().filter(|&&s| self.runs(s)).count()
        } else {
            self.running.len()
        };
        let oldest = self.queued.first_key_value().map_or(Time::ZERO, |(_, (since, _))| *since);
        Counters {
            running: running as u64,
            waiting: (self.seqs.len() - running - self.draining) as u64,
            queued_requests: self.queued.len() as u64,
            oldest_queued_nanos: u64::try_from(oldest.as_nanos()).unwrap_or(u64::MAX),
            blocks_used: u64::from(self.pool.used()),
            blocks_cached: u64::from(self.pool.cached()),
            snapshots_cached: u64::from(self.snapshots.cached()),
            energy_attributed_microjoules: self.meter.attributed_microjoules(),
            energy_idle_microjoules: self.meter.idle_microjoules(),
            ..self.counters
        }
    }

    fn runs(&self, s: u32) -> bool {
        self.seqs.get(s).is_some_and(|seq| seq.stage == Stage::Running)
    }

    /// Drops from `running` what no longer runs. An index that another sequence has taken over meanwhile is
    /// not running either: only [`Scheduler::plan`] admits, and it tidies first.
    fn tidy(&mut self) {
        if std::mem::take(&mut self.untidy) {
            let mut running = std::mem::take(&mut self.running);
            running.retain(|&s| self.runs(s));
            self.running = running;
        }
    }

    /// Requests that left the queue since the last call: whose, and their prompt tokens.
    pub fn take_dequeued(&mut self) -> Vec<(TenantId, usize)> {
        std::mem::take(&mut self.dequeued)
    }

    /// The request has its first slot, or ended without one.
    fn leave_queue(&mut self, request: u32) {
        let entry = &mut self.requests[request];
        if std::mem::take(&mut entry.queued) {
            self.queued.remove(&entry.arrival);
            self.dequeued.push((entry.body.tenant, entry.body.prompt.len()));
            self.counters.dequeued_requests += 1;
            self.counters.dequeued_tokens += entry.body.prompt.len() as u64;
        }
    }
}
