//! The engine as a value: requests in, [`Engine::step`] by step, outputs out.
//!
//! A request becomes one sequence per choice. Sequences wait in one FIFO queue until there are a slot and
//! KV blocks for their tokens; from then on they run and take further blocks as they grow, and new ones join the
//! running batch at any step. When there is no block left, the sequence that was admitted last gives its blocks up and
//! waits to be computed again: its tokens are the same then, as a draw depends on seed, choice and position alone. The
//! oldest is never preempted while another runs, so there is always progress. For the same reason tokens can be guessed: a step
//! computes some of what probably comes next beside a sequence's token, a guess counts where it is the token that is drawn in its
//! place, and what was computed after one that is not is as if it had never been. A request ends in one place, `Engine::end`, which takes it out of the table of requests
//! first: that is why its terminal output cannot come twice.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crate::error::{EngineError, Overloaded};
use crate::gate::{Gate, Permit};
use crate::kv::block_pool::{BlockPool, Root};
use crate::pace::Pace;
use crate::request::{Finish, Output, Request, RequestId, Spec};
use crate::runner::{Chunk, Logits, ModelLimits, ModelRunner, Reading, RunnerError, StepBatch, Wanted};
use crate::sampling::Sampler;
use crate::schedule::{self, Bounds, Planned};
use crate::sequence::Sequence;
use crate::speculation::{Costs, MOST_ROWS, Speculation};

/// Steps without trouble after which a budget that was cut for want of memory is doubled again.
const CALM_STEPS: u32 = 64;

/// Sizes that are fixed for the engine's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Sequences that run at once, at least 1.
    pub slots: usize,
    /// Most tokens of one step, at least `slots`; a text that is read whole may have more, alone.
    pub step_tokens: usize,
    /// Most tokens of one prompt in one step, at least 1.
    pub prefill_chunk: usize,
    /// Sequences that may wait beyond those that run.
    pub queue: usize,
    /// Whether tokens are guessed; it changes times and no tokens.
    pub speculation: Speculation,
}

/// Where the engine stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Sequences that can run at once.
    pub slots_total: usize,
    /// Sequences that run.
    pub slots_used: usize,
    /// Sequences that wait for a slot or for KV blocks.
    pub waiting: usize,
    /// KV blocks in all.
    pub kv_blocks_total: usize,
    /// KV blocks that sequences have.
    pub kv_blocks_used: usize,
    /// KV blocks that no sequence has, kept for prompts that begin alike.
    pub kv_blocks_cached: usize,
    /// Given tokens of all admissions since the start.
    pub prefix_queries: u64,
    /// Those of them whose KV was there.
    pub prefix_hits: u64,
    /// Sequences that had to give their blocks up, since the start.
    pub preemptions: u64,
    /// The runner's units of work done; filled in by the handle.
    pub steps: u64,
    /// Given tokens computed since the start.
    pub prompt_tokens: u64,
    /// Tokens generated since the start.
    pub generated_tokens: u64,
    /// Guessed tokens computed since the start.
    pub drafted_tokens: u64,
    /// Those of them that were right.
    pub accepted_tokens: u64,
    /// Whether there is anything to do: then `steps` must move.
    pub working: bool,
}

/// A request that has not ended.
struct Live {
    spec: Arc<Spec>,
    finish: Vec<Option<Finish>>,
    /// Choices without a finish.
    open: usize,
    started: bool,
    completion_tokens: usize,
    prefilled: usize,
    to_prefill: usize,
    /// Of the first choice's prompt.
    cached_tokens: usize,
    permit: Permit,
}

/// What the last step was made of.
#[derive(Clone, Copy, Debug, Default)]
struct Makeup {
    /// Sequences that decoded.
    decoding: usize,
    /// Their drafted tokens.
    drafted: usize,
    /// Tokens of prompts.
    prompt: usize,
}

/// The engine; see the module for how it works.
pub struct Engine {
    runner: Box<dyn ModelRunner>,
    limits: ModelLimits,
    config: EngineConfig,
    gate: Arc<Gate>,
    pool: BlockPool,
    live: BTreeMap<RequestId, Live>,
    waiting: VecDeque<Sequence>,
    /// In order of admission; each has its blocks.
    running: Vec<Sequence>,
    /// Outputs that arose between steps.
    pending: Vec<(RequestId, Output)>,
    /// Tokens of a step for now: below the configured number after the device ran out of memory.
    budget: usize,
    calm: u32,
    pace: Pace,
    costs: Costs,
    makeup: Makeup,
    steps: u64,
    last_request: u64,
    prompt_tokens: u64,
    generated_tokens: u64,
    drafted_tokens: u64,
    accepted_tokens: u64,
    prefix_queries: u64,
    prefix_hits: u64,
    preemptions: u64,
    failed: bool,
    plan: Vec<Planned>,
    /// Drafted tokens that could be computed: how likely each is, and its place in the plan.
    odds: Vec<(f32, usize)>,
    logits: Logits,
    sampler: Sampler,
}

impl Engine {
    /// An engine over `runner`. The context is what the model can take and the KV can hold.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] for sizes that cannot work.
    pub fn new(mut runner: Box<dyn ModelRunner>, config: EngineConfig) -> Result<Self, EngineError> {
        let mut limits = runner.limits().clone();
        if limits.reading == Reading::Causal {
            limits.context = limits.context.min(limits.kv_blocks.saturating_mul(limits.block_size));
        }
        let check = |field, ok: bool, problem| if ok { Ok(()) } else { Err(EngineError::invalid(field, problem)) };
        check("slots", (1..=1 << 20).contains(&config.slots), "must be 1 to 1048576")?;
        check("queue", config.queue <= 1 << 20, "must be at most 1048576")?;
        check("step_tokens", config.step_tokens >= config.slots, "must be at least the number of slots")?;
        check("prefill_chunk", config.prefill_chunk >= 1, "must be at least 1")?;
        check("vocab", (1..=1 << 31).contains(&limits.vocab), "must be 1 to 2^31")?;
        check("context", limits.context >= 2, "the KV must hold at least 2 positions")?;
        Ok(Self {
            gate: Gate::new(config.slots + config.queue),
            pool: BlockPool::new(limits.kv_blocks),
            logits: runner.logits(),
            runner,
            limits,
            config,
            live: BTreeMap::new(),
            waiting: VecDeque::new(),
            running: Vec::with_capacity(config.slots),
            pending: Vec::new(),
            budget: config.step_tokens,
            calm: 0,
            pace: Pace::default(),
            costs: Costs::default(),
            makeup: Makeup::default(),
            steps: 0,
            last_request: 0,
            prompt_tokens: 0,
            generated_tokens: 0,
            drafted_tokens: 0,
            accepted_tokens: 0,
            prefix_queries: 0,
            prefix_hits: 0,
            preemptions: 0,
            failed: false,
            plan: Vec::new(),
            odds: Vec::new(),
            sampler: Sampler::default(),
        })
    }

    /// What the model can take here: `context` is bounded by the KV.
    pub fn limits(&self) -> &ModelLimits {
        &self.limits
    }

    /// The sizes it was made with.
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// Changes whether tokens are guessed, from the next step on.
    pub fn set_speculation(&mut self, speculation: Speculation) {
        self.config.speculation = speculation;
    }

    pub(crate) fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// Takes a request on.
    ///
    /// # Errors
    /// [`EngineError::Overloaded`] without a place, [`EngineError::ContextLength`] and
    /// [`EngineError::Invalid`] for one that can never run. Nothing of it is kept then.
    pub fn submit(&mut self, request: Request) -> Result<RequestId, EngineError> {
        let permit = self.gate.acquire(request.choices.len())?;
        self.accept(request, permit)
    }

    /// [`Engine::submit`] for a request that has its place.
    pub(crate) fn accept(&mut self, request: Request, permit: Permit) -> Result<RequestId, EngineError> {
        if self.failed {
            return Err(Overloaded::Dead.into());
        }
        let spec = Arc::new(request.spec(&self.limits)?);
        let id = RequestId(self.last_request + 1);
        let root = Root { tenant: request.tenant, regime: self.runner.regime(request.prompt.len()) };
        let mut live = Live {
            spec: Arc::clone(&spec),
            finish: Vec::with_capacity(request.choices.len()),
            open: 0,
            started: false,
            completion_tokens: 0,
            prefilled: 0,
            to_prefill: 0,
            cached_tokens: 0,
            permit,
        };
        let mut sequences = Vec::with_capacity(request.choices.len());
        for (number, choice) in (0..).zip(request.choices) {
            let sequence = Sequence::new(id, number, root, &spec, &request.prompt, choice)?;
            live.completion_tokens += sequence.output_tokens();
            live.finish.push(sequence.finish());
            if sequence.finish().is_none() {
                live.to_prefill += sequence.given_tokens();
                sequences.push(sequence);
            }
        }
        live.open = sequences.len();
        live.permit.shrink_to(live.open);
        self.last_request = id.0;
        self.waiting.extend(sequences);
        let finished = live.open == 0;
        self.live.insert(id, live);
        if finished {
            let mut outputs = std::mem::take(&mut self.pending);
            self.start(id, &mut outputs);
            self.end(id, Ending::Done, &mut outputs);
            self.pending = outputs;
        }
        Ok(id)
    }

    /// Ends a request, wherever it is; its blocks are free when this returns. Its `Done` comes out of the
    /// next step. Nothing happens to one that has ended.
    pub fn cancel(&mut self, id: RequestId) {
        let mut outputs = std::mem::take(&mut self.pending);
        self.end(id, Ending::Done, &mut outputs);
        self.pending = outputs;
    }

    /// Whether [`Engine::step`] has anything to do.
    pub fn has_work(&self) -> bool {
        !self.pending.is_empty() || !self.running.is_empty() || !self.waiting.is_empty()
    }

    /// Whether a forward pass has failed: the engine takes nothing more.
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    /// Where it stands.
    pub fn stats(&self) -> EngineStats {
        EngineStats {
            slots_total: self.config.slots,
            slots_used: self.running.len(),
            waiting: self.waiting.len(),
            kv_blocks_total: self.pool.total(),
            kv_blocks_used: self.pool.used(),
            kv_blocks_cached: self.pool.cached(),
            prefix_queries: self.prefix_queries,
            prefix_hits: self.prefix_hits,
            preemptions: self.preemptions,
            steps: 0,
            prompt_tokens: self.prompt_tokens,
            generated_tokens: self.generated_tokens,
            drafted_tokens: self.drafted_tokens,
            accepted_tokens: self.accepted_tokens,
            working: self.has_work(),
        }
    }

    /// There is nothing to compute until a request comes.
    pub(crate) fn rest(&mut self) {
        self.runner.rest();
    }

    /// Admits what fits, computes one batch and appends what came of it to `outputs`.
    pub fn step(&mut self, outputs: &mut Vec<(RequestId, Output)>) {
        outputs.append(&mut self.pending);
        self.admit(outputs);
        loop {
            let (budget, chunk) = (self.budget, self.config.prefill_chunk);
            schedule::plan(&self.running, Bounds { budget, chunk, beside: self.pace.most() }, &mut self.plan);
            if self.grow() {
                break;
            }
            self.preempt();
        }
        self.speculate();
        self.makeup = Makeup::default();
        if self.plan.is_empty() {
            return;
        }
        self.steps += 1;
        for planned in &self.plan {
            if self.running[planned.sequence].is_decoding() {
                self.makeup.decoding += 1;
                self.makeup.drafted += planned.drafted();
            } else {
                self.makeup.prompt += planned.count;
            }
        }
        match self.compute() {
            Ok(()) => {
                self.calm += 1;
                if self.calm >= CALM_STEPS {
                    self.calm = 0;
                    self.budget = self.budget.saturating_mul(2).min(self.config.step_tokens);
                }
                self.harvest(outputs);
            }
            Err(RunnerError::OutOfMemory(reason)) => self.shrink(reason, outputs),
            Err(RunnerError::Forward(reason)) => self.fail(&EngineError::Forward(reason), outputs),
        }
    }

    /// How long the last step took: from this the engine learns how many prompt tokens may join those that decode, and how
    /// many guesses.
    pub fn took(&mut self, time: Duration) {
        let Makeup { decoding, drafted, prompt } = std::mem::take(&mut self.makeup);
        if decoding > 0 && prompt == 0 {
            self.costs.learn(decoding + drafted, time);
        }
        if drafted == 0 {
            self.pace.learn(decoding, prompt, time);
        }
    }

    /// Moves waiting sequences, in order, to free slots with blocks for all their tokens.
    fn admit(&mut self, outputs: &mut Vec<(RequestId, Output)>) {
        let mut next = 0;
        while self.running.len() < self.config.slots
            && let Some(sequence) = self.waiting.get_mut(next)
        {
            // What another answer to the same prompt is computing need not be computed twice.
            if self.running.iter().any(|other| other.request == sequence.request && other.shares_with(sequence)) {
                next += 1;
                continue;
            }
            let Some(cached) = sequence.admit(&self.pool, self.limits.block_size) else { return };
            let Some(sequence) = self.waiting.remove(next) else { return };
            let live = self.live.get_mut(&sequence.request).expect("a waiting sequence belongs to a live request");
            if !sequence.recomputes {
                self.prefix_queries += sequence.given_tokens() as u64;
                self.prefix_hits += cached as u64;
                live.prefilled += cached;
                if !live.started {
                    live.cached_tokens = cached.min(live.spec.prompt_tokens);
                }
            }
            self.start(sequence.request, outputs);
            self.running.push(sequence);
        }
    }

    /// Takes the blocks that the plan needs; false when there are too few.
    fn grow(&mut self) -> bool {
        let size = self.limits.block_size;
        // The oldest first: they are the last to be preempted.
        let mut plan: Vec<&Planned> = self.plan.iter().collect();
        plan.sort_by_key(|planned| planned.sequence);
        plan.into_iter().all(|planned| self.running[planned.sequence].grow(planned.count, size))
    }

    /// Adds to the plan drafted tokens that it pays to compute, where all that runs decodes: a prompt has a better use for the
    /// rows. They take blocks that nobody has, and no sequence gives any up for them.
    fn speculate(&mut self) {
        self.running.iter_mut().for_each(Sequence::forget_draft);
        let decoding = self.plan.len();
        let room = self.budget.min(MOST_ROWS).saturating_sub(decoding);
        let all_decode = decoding == self.running.len() && self.running.iter().all(Sequence::is_decoding);
        if self.config.speculation == Speculation::Off || room == 0 || !all_decode {
            return;
        }
        self.odds.clear();
        for (place, planned) in self.plan.iter().enumerate() {
            self.odds.extend(self.running[planned.sequence].draft().map(|odds| (odds, place)));
        }
        self.odds.sort_by(|a, b| b.0.total_cmp(&a.0));
        self.odds.truncate(room);
        let count = match self.config.speculation {
            Speculation::Always => self.odds.len(),
            _ => self.costs.best(decoding, self.odds.iter().map(|(odds, _)| *odds)),
        };
        // A token is never likelier than the one before it, so these are the first of each draft.
        for (_, place) in &self.odds[..count] {
            self.plan[*place].count += 1;
        }
        for planned in self.plan.iter_mut().filter(|planned| planned.count > 1) {
            let sequence = &mut self.running[planned.sequence];
            while !sequence.grow(planned.count, self.limits.block_size) {
                planned.count -= 1;
            }
            if planned.count > 1 {
                planned.wanted = Wanted::LogitsOfAll;
            }
        }
    }

    /// The sequence that was admitted last waits again, before all others.
    fn preempt(&mut self) {
        let mut sequence = self.running.pop().expect("one that is alone finds blocks: the KV holds a whole context");
        sequence.preempt();
        self.preemptions += 1;
        self.waiting.push_front(sequence);
    }

    /// One forward pass over the plan.
    fn compute(&mut self) -> Result<(), RunnerError> {
        let chunk = |planned: &Planned| {
            let sequence = &self.running[planned.sequence];
            let (tokens, start) = sequence.chunk(planned.count);
            let blocks = sequence.blocks(start + tokens.len(), self.limits.block_size);
            Chunk { tokens, start, blocks, regime: sequence.root.regime, wanted: planned.wanted }
        };
        let batch = StepBatch { chunks: self.plan.iter().map(chunk).collect() };
        self.runner.step(&batch, &mut self.logits)?;
        let wanted = self.plan.iter().map(Planned::rows).sum::<usize>();
        if wanted > 0 && (self.logits.rows() != wanted || self.logits.row(0).len() != self.limits.vocab) {
            return Err(RunnerError::Forward(format!("{} rows of logits for {wanted}", self.logits.rows())));
        }
        let wanted = self.plan.iter().map(Planned::states).sum::<usize>();
        if wanted > 0 && self.logits.hidden().len() != wanted {
            return Err(RunnerError::Forward(format!("{} hidden states for {wanted}", self.logits.hidden().len())));
        }
        Ok(())
    }

    /// Turns the logits of the plan into tokens, and its hidden states into embeddings.
    fn harvest(&mut self, outputs: &mut Vec<(RequestId, Output)>) {
        let mut rows = 0;
        let mut hidden = self.logits.hidden();
        let mut failures: Vec<(RequestId, EngineError)> = Vec::new();
        for planned in &self.plan {
            let sequence = &mut self.running[planned.sequence];
            let id = sequence.request;
            let live = self.live.get_mut(&id).expect("a running sequence belongs to a live request");
            let was_decoding = sequence.is_decoding();
            sequence.last_step = self.steps;
            // Of a draft nothing is known to be in the text yet.
            sequence.advance(planned.count - planned.drafted(), self.limits.block_size);
            self.drafted_tokens += planned.drafted() as u64;
            if !was_decoding && !sequence.recomputes {
                self.prompt_tokens += planned.count as u64;
                live.prefilled += planned.count;
                outputs.push((id, Output::Prefill { done: live.prefilled, total: live.to_prefill }));
            }
            match planned.wanted {
                Wanted::Nothing => continue,
                Wanted::Hidden | Wanted::Embedding => {
                    let Some(values) = sequence.pool(hidden.by_ref().take(planned.states())) else { continue };
                    live.finish[sequence.choice as usize] = sequence.finish();
                    live.open -= 1;
                    live.permit.shrink_to(live.open);
                    if values.iter().all(|value| value.is_finite()) {
                        outputs.push((id, Output::Embedding { values }));
                    } else {
                        failures.push((id, EngineError::BadLogits { choice: sequence.choice, index: 0 }));
                    }
                    continue;
                }
                Wanted::Logits | Wanted::LogitsOfAll => {}
            }
            let first = rows;
            rows += planned.rows();
            for i in 0..planned.rows() {
                let token = match sequence.generate(self.logits.row(first + i), &mut self.sampler) {
                    Ok(token) => token,
                    Err(error) => {
                        failures.push((id, error));
                        break;
                    }
                };
                self.generated_tokens += 1;
                live.completion_tokens += 1;
                if let Some(finish) = sequence.finish() {
                    live.finish[sequence.choice as usize] = Some(finish);
                    live.open -= 1;
                    live.permit.shrink_to(live.open);
                }
                let right = sequence.meets(i, token.id);
                outputs.push((
                    id,
                    Output::Token {
                        choice: sequence.choice,
                        index: token.index,
                        id: token.id,
                        piece: token.piece,
                        logprobs: token.logprobs,
                    },
                ));
                // The next row is that of the next token only where this one is the one that it was computed with.
                if i == planned.drafted() || !right {
                    break;
                }
                self.accepted_tokens += 1;
                if sequence.finish().is_some() {
                    break;
                }
                sequence.advance(1, self.limits.block_size);
            }
        }
        for (id, error) in failures {
            self.end(id, Ending::Failed(error), outputs);
        }
        let mut done = Vec::new();
        self.running.retain(|sequence| {
            let finished = sequence.finish().is_some();
            if finished && self.live.get(&sequence.request).is_some_and(|live| live.open == 0) {
                done.push(sequence.request);
            }
            !finished
        });
        for id in done {
            self.end(id, Ending::Done, outputs);
        }
    }

    /// The device had no memory for the plan: smaller steps from here on, and if it was as small as it gets
    /// the sequence cannot run. What was computed before stays; the same tokens are planned again.
    fn shrink(&mut self, reason: String, outputs: &mut Vec<(RequestId, Output)>) {
        self.calm = 0;
        let tokens: usize = self.plan.iter().map(|planned| planned.count).sum();
        let cuts = match self.limits.reading {
            Reading::Causal => tokens > 1,
            Reading::Whole => self.plan.len() > 1,
        };
        if cuts {
            // Guesses can be left out without anybody having to wait.
            let drafted = self.plan.iter().any(|planned| planned.drafted() > 0);
            self.budget = (tokens / 2).max(if drafted { self.plan.len() } else { 1 });
        } else if let Some(planned) = self.plan.first() {
            let id = self.running[planned.sequence].request;
            self.end(id, Ending::Failed(EngineError::OutOfMemory(reason)), outputs);
        }
    }

    /// The forward pass cannot be trusted any more: everything ends.
    fn fail(&mut self, error: &EngineError, outputs: &mut Vec<(RequestId, Output)>) {
        self.failed = true;
        self.gate.shut_dead();
        while let Some((id, _)) = self.live.first_key_value() {
            self.end(*id, Ending::Failed(error.clone()), outputs);
        }
    }

    fn start(&mut self, id: RequestId, outputs: &mut Vec<(RequestId, Output)>) {
        if let Some(live) = self.live.get_mut(&id)
            && !live.started
        {
            live.started = true;
            let prompt_tokens = live.spec.prompt_tokens;
            outputs.push((id, Output::Started { prompt_tokens, cached_tokens: live.cached_tokens }));
        }
    }

    /// The one end of a request: what still runs or waits of it goes, with its blocks and places.
    fn end(&mut self, id: RequestId, ending: Ending, outputs: &mut Vec<(RequestId, Output)>) {
        let Some(live) = self.live.remove(&id) else { return };
        if live.open > 0 {
            self.running.retain(|sequence| sequence.request != id);
            self.waiting.retain(|sequence| sequence.request != id);
        }
        let output = match ending {
            Ending::Failed(error) => Output::Failed(error),
            Ending::Done => Output::Done {
                finish: live.finish.into_iter().map(|finish| finish.unwrap_or(Finish::Cancelled)).collect(),
                prompt_tokens: live.spec.prompt_tokens,
                completion_tokens: live.completion_tokens,
                cached_tokens: live.cached_tokens,
            },
        };
        outputs.push((id, output));
    }
}

enum Ending {
    /// Choices that have not finished were cancelled.
    Done,
    Failed(EngineError),
}
