//! Plays scripted sequences through an executor.
//!
//! Owns a pool of pages, which it gives out again as soon as a window has passed or a sequence was preempted, and the
//! bookkeeping of prefixes. It is no scheduler: every sequence that still has something to do gets a row in every step.

use std::sync::Arc;

use mirai_engine::{
    BLOCK_TOKENS, BlockAppend, BlockId, Executor, GroupKind, Row, RowInput, RowOutcome, RowOutput,
    SamplingParams, SeqId, SlotId, SlotOpen, SnapshotId, SnapshotSave, StepOutcome, StepPlan, TokenLogprobs,
};

/// What is there of a prompt before a sequence starts.
#[derive(Clone, Debug)]
pub struct Prefix {
    /// Its first tokens, whole blocks.
    pub computed: usize,
    /// The table of each group.
    pub blocks: Vec<Vec<BlockId>>,
    /// The recurrent groups' state after those tokens.
    pub restore: Option<SnapshotId>,
}

/// A sequence of a script.
#[derive(Clone, Debug)]
pub struct Script {
    /// Its prompt.
    pub prompt: Vec<u32>,
    /// Prompt tokens a step.
    pub chunk: usize,
    /// Tokens to draw after it.
    pub draw: usize,
    /// How.
    pub sampling: SamplingParams,
    /// Whether the model's pooling head answers after the prompt; then nothing is drawn.
    pub pool: bool,
    /// What is already there of the prompt.
    pub prefix: Option<Prefix>,
    /// Once so many tokens are computed, the sequence loses its slot and its pages, and starts again.
    pub preempt_at: Option<usize>,
}

impl Script {
    fn new(prompt: &[u32], chunk: usize, draw: usize, sampling: SamplingParams) -> Self {
        let prompt = prompt.to_vec();
        Self { prompt, chunk, draw, sampling, pool: false, prefix: None, preempt_at: None }
    }

    /// Computes the prompt's log-probabilities, and draws one token.
    #[must_use]
    pub fn teacher_forced(prompt: &[u32], chunk: usize) -> Self {
        let sampling = SamplingParams { prompt_logprobs: Some(0), ..SamplingParams::default() };
        Self::new(prompt, chunk, 1, sampling)
    }

    /// Draws greedily, with the log-probabilities of the most likely tokens.
    #[must_use]
    pub fn greedy(prompt: &[u32], draw: usize, top: u32) -> Self {
        let sampling = SamplingParams { logprobs: Some(top), ..SamplingParams::default() };
        Self::new(prompt, usize::MAX, draw, sampling)
    }

    /// Asks the pooling head.
    #[must_use]
    pub fn pooled(prompt: &[u32], chunk: usize) -> Self {
        Self { pool: true, ..Self::new(prompt, chunk, 0, SamplingParams::default()) }
    }

    /// The same behind a prefix.
    #[must_use]
    pub fn after(self, prefix: Prefix) -> Self {
        Self { prefix: Some(prefix), ..self }
    }

    /// The same with a preemption.
    #[must_use]
    pub fn preempted_at(self, tokens: usize) -> Self {
        Self { preempt_at: Some(tokens), ..self }
    }
}

/// What became of a sequence.
#[derive(Clone, Debug, Default)]
pub struct Played {
    /// Of the prompt's tokens but the first; behind a prefix, of those after its end but one.
    pub prompt: Vec<TokenLogprobs>,
    /// Of the drawn tokens, if asked for.
    pub drawn: Vec<TokenLogprobs>,
    /// Drawn tokens.
    pub tokens: Vec<u32>,
    /// The pooling head's answer.
    pub pooled: Option<Vec<f32>>,
}

impl Played {
    /// Log-probabilities of the prompt.
    #[must_use]
    pub fn prompt_logprobs(&self) -> Vec<f32> {
        self.prompt.iter().map(|t| t.logprob).collect()
    }
}

struct Actor<'a> {
    script: &'a Script,
    slot: u32,
    /// Whether its slot is open.
    open: bool,
    computed: usize,
    /// For each group the pages it owns, by entry of its table.
    pages: Vec<Vec<Option<BlockId>>>,
    preempted: bool,
    played: Played,
}

impl<'a> Actor<'a> {
    fn new(slot: usize, script: &'a Script, groups: usize) -> Self {
        let pages = vec![Vec::new(); groups];
        let played = Played::default();
        Self { script, slot: slot as u32, open: false, computed: 0, pages, preempted: false, played }
    }

    /// Prompt and drawn tokens.
    fn known(&self) -> usize {
        self.script.prompt.len() + self.played.tokens.len()
    }

    /// Tokens of its next row; 0 when it is done.
    fn next_len(&self) -> usize {
        let done = self.computed >= self.script.prompt.len() && self.played.tokens.len() >= self.script.draw;
        if done { 0 } else { (self.known() - self.computed).min(self.script.chunk) }
    }

    fn token(&self, position: usize) -> u32 {
        let prompt = &self.script.prompt;
        prompt.get(position).copied().unwrap_or_else(|| self.played.tokens[position - prompt.len()])
    }

    fn output(&self, end: usize) -> RowOutput {
        match (end >= self.known(), self.script.pool) {
            (true, true) => RowOutput::Pool,
            (true, false) if self.script.draw > 0 => RowOutput::Sample,
            _ => RowOutput::Nothing,
        }
    }

    fn take(&mut self, row: &Row, out: &RowOutcome, tokens: &[u32]) {
        assert_eq!(out.fault, None, "slot {}", self.slot);
        self.computed += row.len as usize;
        let drawn = &tokens[out.tokens.start as usize..out.tokens.end as usize];
        assert_eq!(drawn.len(), usize::from(row.output == RowOutput::Sample));
        assert_eq!(out.pooled.is_some(), row.output == RowOutput::Pool);
        self.played.tokens.extend(drawn);
        if let Some(logprobs) = &out.logprobs {
            self.played.prompt.extend(logprobs.prompt.iter().cloned());
            self.played.drawn.extend(logprobs.drawn.iter().cloned());
        }
        self.played.pooled = out.pooled.as_deref().map(<[f32]>::to_vec);
    }
}

/// Plays scripts side by side: in every step each unfinished one has a row.
pub struct Driver<E> {
    /// The executor.
    pub executor: E,
    step: u64,
    /// Pages that nobody has; the last one is given out first, so that pages change hands at once.
    free: Vec<BlockId>,
    next_snapshot: u32,
    /// Goes into the next plan.
    saves: Vec<SnapshotSave>,
}

impl<E: Executor> Driver<E> {
    /// Takes an executor that nobody used yet.
    pub fn new(executor: E) -> Self {
        let free = (1..executor.geometry().blocks).rev().map(BlockId).collect();
        Self { executor, step: 0, free, next_snapshot: 0, saves: Vec::new() }
    }

    /// Plays all scripts to their ends.
    ///
    /// # Panics
    /// The device or a row fails, or the pool is too small.
    pub fn play(&mut self, scripts: &[Script]) -> Vec<Played> {
        let groups = self.executor.geometry().groups.len();
        let actors = scripts.iter().enumerate().map(|(slot, script)| Actor::new(slot, script, groups));
        let mut actors: Vec<_> = actors.collect();
        while actors.iter().any(|a| a.next_len() > 0) {
            self.run_step(&mut actors);
            for actor in &mut actors {
                self.release_passed(actor);
                self.preempt(actor);
            }
        }
        for actor in &mut actors {
            self.release_all(actor);
        }
        actors.into_iter().map(|a| a.played).collect()
    }

    /// Plays a prompt block by block, and keeps what a later sequence needs to go on at the end of each block but the
    /// last: at least one token of the prompt is left to compute.
    ///
    /// # Panics
    /// As [`Driver::play`], or there are too few snapshots.
    pub fn prefixes(&mut self, prompt: &[u32]) -> Vec<Prefix> {
        let kinds = self.executor.geometry().groups.clone();
        let recurrent = kinds.contains(&GroupKind::Recurrent);
        let mut script = Script::teacher_forced(prompt, BLOCK_TOKENS);
        (script.draw, script.pool) = (0, false);
        let mut actors = [Actor::new(0, &script, kinds.len())];
        let mut found: Vec<Prefix> = Vec::new();
        while actors[0].next_len() > 0 {
            self.run_step(&mut actors);
            let computed = actors[0].computed;
            if computed >= prompt.len() {
                break;
            }
            let restore = recurrent.then_some(SnapshotId(self.next_snapshot));
            if let Some(snapshot) = restore {
                assert!(self.next_snapshot < self.executor.geometry().snapshots, "too few snapshots");
                self.next_snapshot += 1;
                self.saves.push(SnapshotSave { slot: SlotId(0), snapshot });
            }
            let table = |(kind, pages): (&GroupKind, &Vec<Option<BlockId>>)| {
                let passed = passed_blocks(*kind, computed);
                let block = |(entry, block): (usize, &Option<BlockId>)| match block {
                    Some(block) if entry >= passed => *block,
                    _ => BlockId::NULL,
                };
                pages.iter().enumerate().map(block).collect()
            };
            let blocks = kinds.iter().zip(&actors[0].pages).map(table).collect();
            found.push(Prefix { computed, blocks, restore });
        }
        found
    }

    fn run_step(&mut self, actors: &mut [Actor<'_>]) {
        let (plan, who) = self.plan(actors);
        self.executor.submit(&plan).expect("the device works");
        let mut outcome = StepOutcome::default();
        self.executor.collect(&mut outcome).expect("the device works");
        assert_eq!((outcome.step, outcome.rows.len()), (plan.step, plan.rows.len()));
        for ((row, out), index) in plan.rows.iter().zip(&outcome.rows).zip(who) {
            actors[index].take(row, out, &outcome.tokens);
        }
    }

    fn plan(&mut self, actors: &mut [Actor<'_>]) -> (StepPlan, Vec<usize>) {
        let saves = std::mem::take(&mut self.saves);
        let mut plan = StepPlan { step: self.step, saves, ..StepPlan::default() };
        self.step += 1;
        let (mut room, whole) =
            (self.executor.geometry().max_step_tokens as usize, self.executor.geometry().whole_prompts);
        let mut who = Vec::new();
        for (index, actor) in actors.iter_mut().enumerate() {
            let wanted = actor.next_len();
            let len = if whole && wanted > room { 0 } else { wanted.min(room) };
            if len == 0 {
                continue;
            }
            room -= len;
            if !actor.open {
                plan.opens.push(open(actor));
            }
            let (len, start) = (len.min(actor.next_len()), actor.computed);
            self.grow(&mut plan, actor, start + len);
            let drawn = start >= actor.script.prompt.len() && len == 1 && start + 1 == actor.known();
            let input = if drawn {
                RowInput::LastDrawn
            } else {
                let from = plan.tokens.len() as u32;
                plan.tokens.extend((start..start + len).map(|p| actor.token(p)));
                RowInput::Tokens(from)
            };
            plan.rows.push(Row {
                seq: SeqId(u64::from(actor.slot)),
                slot: SlotId(actor.slot),
                start: start as u32,
                len: len as u32,
                input,
                output: actor.output(start + len),
            });
            who.push(index);
        }
        (plan, who)
    }

    /// Gives a sequence pages up to a length.
    fn grow(&mut self, plan: &mut StepPlan, actor: &mut Actor<'_>, tokens: usize) {
        let kinds = &self.executor.geometry().groups;
        for (group, (kind, pages)) in kinds.iter().zip(&mut actor.pages).enumerate() {
            if *kind == GroupKind::Recurrent {
                continue;
            }
            for entry in pages.len()..tokens.div_ceil(BLOCK_TOKENS) {
                let block = self.free.pop().expect("the pool is large enough for the script");
                let (group, index) = (group as u16, entry as u32);
                plan.appends.push(BlockAppend { slot: SlotId(actor.slot), group, index, block });
                pages.push(Some(block));
            }
        }
    }

    /// Takes back the pages that no later query sees.
    fn release_passed(&mut self, actor: &mut Actor<'_>) {
        for (kind, pages) in self.executor.geometry().groups.iter().zip(&mut actor.pages) {
            let passed = passed_blocks(*kind, actor.computed).min(pages.len());
            self.free.extend(pages[..passed].iter_mut().filter_map(Option::take));
        }
    }

    fn release_all(&mut self, actor: &mut Actor<'_>) {
        self.free.extend(actor.pages.iter_mut().flat_map(std::mem::take).flatten());
    }

    fn preempt(&mut self, actor: &mut Actor<'_>) {
        let due = actor.script.preempt_at.is_some_and(|at| actor.computed >= at) && !actor.preempted;
        if due && actor.next_len() > 0 {
            self.release_all(actor);
            (actor.preempted, actor.open, actor.computed) = (true, false, 0);
            actor.played.prompt.clear();
        }
    }
}

/// Opens an actor's slot: behind its prefix the first time, from the start after a preemption.
fn open(actor: &mut Actor<'_>) -> SlotOpen {
    actor.open = true;
    let groups = actor.pages.len();
    let prefix = actor.script.prefix.as_ref().filter(|_| !actor.preempted);
    if let Some(prefix) = prefix {
        actor.computed = prefix.computed;
        // The pages belong to the sequence that made them.
        actor.pages = prefix.blocks.iter().map(|table| vec![None; table.len()]).collect();
    }
    SlotOpen {
        slot: SlotId(actor.slot),
        seq: SeqId(u64::from(actor.slot)),
        choice: 0,
        sampling: Arc::new(actor.script.sampling.clone()),
        prompt: actor.script.prompt.clone().into(),
        output: actor.played.tokens.clone(),
        computed: actor.computed as u32,
        blocks: prefix.map_or_else(|| vec![Vec::new(); groups], |p| p.blocks.clone()),
        restore: prefix.and_then(|p| p.restore),
    }
}

/// Entries of a table that no query after `computed` tokens sees.
fn passed_blocks(kind: GroupKind, computed: usize) -> usize {
    match kind {
        GroupKind::Window(n) => (computed + 1).saturating_sub(n as usize) / BLOCK_TOKENS,
        GroupKind::Full | GroupKind::Recurrent => 0,
    }
}
