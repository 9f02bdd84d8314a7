//! The runner: a decoder, its KV and its options behind the engine's seam.

use std::sync::{Mutex, PoisonError};

use half::{bf16, f16};
use rbee_engine::runner::{
    Logits, ModelLimits, ModelRunner, Reading, Regime, RunnerError, StepBatch, StepCounter, Wanted,
};
use rbee_kernels::Isa;
use rbee_kernels::attention::{BLOCK, PARTIAL};
use rbee_kernels::compute::Compute;
use rbee_kernels::kv_form::{KvForm, Q8Kv};
use rbee_weights::config::ModelConfig;

use crate::about::{About, check, regime};
use crate::decoder::{Decoder, Pass, Ropes, StepScratch, rows};
use crate::error::Error;
use crate::files::ModelFiles;
use crate::kv::{KvStore, KvType, bytes_per_token};
use crate::loader::{self, Opened};
use crate::weights::Quantize;

/// Rises with every change of the arithmetic: it is part of the numerics id.
const NUMERICS: u32 = 5;

/// Most compute threads.
pub const MAX_THREADS: usize = 1024;

/// How a model is loaded.
#[derive(Clone, Debug)]
pub struct RunnerOptions {
    /// Compute threads.
    pub threads: usize,
    /// Sequences that have room for a whole context each, if `kv_bytes` does not say less.
    pub slots: usize,
    /// Most tokens of one sequence; the model's own, but at most 4096, unless given.
    pub context: Option<usize>,
    /// Most bytes of KV. With less than a context for each slot, sequences that grow make others wait.
    pub kv_bytes: Option<u64>,
    /// Type of the KV cache; the weights' own unless given, f16 beside quantized weights.
    pub kv_type: Option<KvType>,
    /// Keeps the matrices with fewer bits than the files have.
    pub quantize: Option<Quantize>,
    /// Multiplies weights of bf16 with activations as they are, in f32, which takes twice as long: what the products of
    /// [`BlockFloat`](rbee_kernels::Kept::BlockFloat) are measured against.
    pub exact: bool,
    /// Instruction set to use instead of the widest: `avx512`, `avx2` or `scalar`.
    pub isa: Option<String>,
}

/// A loaded model.
pub struct CpuRunner {
    limits: ModelLimits,
    config: ModelConfig,
    decoder: Decoder,
    ropes: Ropes,
    compute: Compute,
    kv: Kv,
    scratch: StepScratch,
    steps: StepCounter,
    about: About,
}

/// KV of one of the types.
enum Kv {
    F32(Mutex<KvStore<f32>>),
    F16(Mutex<KvStore<f16>>),
    Bf16(Mutex<KvStore<bf16>>),
    Q8_0(Mutex<KvStore<Q8Kv>>),
}

/// Loads a model. `steps` advances with each layer of each step; `progress` is told bytes done and bytes in all.
///
/// # Errors
/// Whatever is wrong with the files or the options.
pub fn load(
    files: &ModelFiles,
    options: &RunnerOptions,
    steps: &StepCounter,
    progress: &dyn Fn(u64, u64),
) -> Result<CpuRunner, Error> {
    let isa = isa(options.isa.as_deref())?;
    let threads = threads(options)?;
    let opened: Opened = loader::open(files, options)?;
    let context = opened.context(options.context)?;
    let kv_type = opened.kv_type(options.kv_type);
    let blocks = opened.kv_blocks(context, options, bytes_per_token(&opened.config, kv_type))?;
    let needs = opened.needs(context, blocks, kv_type);
    let compute = Compute::new(threads, isa);
    let decoder = opened.decoder(&compute, progress)?;
    let digest = opened.digest();
    let Opened { config, generation, .. } = opened;
    let kv = match kv_type {
        KvType::F32 => Kv::F32(Mutex::new(KvStore::new(&config, blocks)?)),
        KvType::F16 => Kv::F16(Mutex::new(KvStore::new(&config, blocks)?)),
        KvType::Bf16 => Kv::Bf16(Mutex::new(KvStore::new(&config, blocks)?)),
        KvType::Q8_0 => Kv::Q8_0(Mutex::new(KvStore::new(&config, blocks)?)),
    };
    // All instruction sets give the same bits, so none is part of the id.
    let numerics = format!("{NUMERICS} {:?} {} {kv_type:?} {PARTIAL}", options.quantize, options.exact);
    let about = About::new(&config, generation, needs, digest, &numerics);
    Ok(CpuRunner {
        limits: ModelLimits {
            vocab: config.vocab,
            context,
            block_size: BLOCK,
            kv_blocks: blocks,
            reading: Reading::Causal,
        },
        ropes: Ropes::new(&config, context),
        config,
        decoder,
        compute,
        kv,
        scratch: StepScratch::default(),
        steps: steps.clone(),
        about,
    })
}

/// The threads that are asked for.
pub(crate) fn threads(options: &RunnerOptions) -> Result<usize, Error> {
    match options.threads {
        threads if threads > MAX_THREADS => {
            Err(Error::Option(format!("{threads} threads are more than {MAX_THREADS}")))
        }
        threads => Ok(threads.max(1)),
    }
}

/// The instruction set that is asked for, else the widest.
pub(crate) fn isa(asked: Option<&str>) -> Result<Isa, Error> {
    let Some(name) = asked else { return Ok(Isa::detect()) };
    match Isa::named(name) {
        Some(isa) if isa.is_here() => Ok(isa),
        Some(_) => Err(Error::Option(format!("this machine has no {name}"))),
        None => Err(Error::Option(format!("instruction set `{}` is not avx512, avx2 or scalar", name.escape_debug()))),
    }
}

impl CpuRunner {
    /// What is known of the model.
    pub fn about(&self) -> &About {
        &self.about
    }

    /// Bytes of weights and of KV as they are in memory.
    pub fn held(&self) -> (u64, u64) {
        fn kv<F: KvForm>(kv: &Mutex<KvStore<F>>) -> u64 {
            kv.lock().unwrap_or_else(PoisonError::into_inner).held()
        }
        let kv = match &self.kv {
            Kv::F32(store) => kv(store),
            Kv::F16(store) => kv(store),
            Kv::Bf16(store) => kv(store),
            Kv::Q8_0(store) => kv(store),
        };
        (self.decoder.held(), kv)
    }

    fn forward<F: KvForm>(&self, kv: &Mutex<KvStore<F>>, batch: &StepBatch<'_>, scratch: &mut StepScratch) {
        let rows = rows(&batch.chunks);
        let pass = Pass {
            config: &self.config,
            compute: &self.compute,
            ropes: &self.ropes,
            kv,
            rows: &rows,
            steps: &self.steps,
        };
        self.decoder.forward(&pass, scratch);
    }
}

impl ModelRunner for CpuRunner {
    fn limits(&self) -> &ModelLimits {
        &self.limits
    }

    fn regime(&self, prompt: usize) -> Regime {
        regime(&self.config, prompt)
    }

    fn set_threads(&mut self, threads: usize) {
        self.compute.set_threads(threads);
    }

    fn step(&mut self, batch: &StepBatch<'_>, logits: &mut Logits) -> Result<(), RunnerError> {
        check(&self.limits, batch)?;
        let mut scratch = std::mem::take(&mut self.scratch);
        match &self.kv {
            Kv::F32(kv) => self.forward(kv, batch, &mut scratch),
            Kv::F16(kv) => self.forward(kv, batch, &mut scratch),
            Kv::Bf16(kv) => self.forward(kv, batch, &mut scratch),
            Kv::Q8_0(kv) => self.forward(kv, batch, &mut scratch),
        }
        let mut row = 0;
        let (mut wanted, mut states) = (Vec::new(), Vec::new());
        for chunk in &batch.chunks {
            let first = row;
            row += chunk.tokens.len();
            match chunk.wanted {
                // A decoder makes no embedding of its own; `check` refuses it.
                Wanted::Nothing | Wanted::Embedding => {}
                Wanted::Logits => wanted.push(row - 1),
                Wanted::LogitsOfAll => wanted.extend(first..row),
                Wanted::Hidden => states.extend(first..row),
            }
        }
        let out = logits.hidden_mut(states.len(), self.config.hidden);
        if !states.is_empty() {
            self.decoder.states(&mut scratch, &states, out);
        }
        logits.resize(wanted.len(), self.limits.vocab);
        if !wanted.is_empty() {
            self.decoder.logits(&self.config, &mut scratch, &wanted, logits.as_mut_slice());
        }
        self.scratch = scratch;
        Ok(())
    }
}
