//! The runner: a decoder, its KV and its options behind the engine's seam.

use std::sync::{Mutex, PoisonError};

use candle_core::Tensor;
use half::{bf16, f16};
use rbee_engine::runner::{
    Logits, ModelLimits, ModelRunner, Reading, Regime, RunnerError, StepBatch, StepCounter, Wanted,
};
use rbee_kernels::Isa;
use rbee_kernels::attention::{BLOCK, PARTIAL};
use rbee_kernels::candle::Compute;
use rbee_kernels::kv_form::{KvForm, Q8Kv};
use rbee_weights::config::ModelConfig;

use crate::about::{About, check, regime};
use crate::decoder::{Decoder, Pass, Ropes, rows};
use crate::error::Error;
use crate::files::ModelFiles;
use crate::kv::{KvStore, KvType, bytes_per_token};
use crate::loader::{self, Opened};
use crate::weights::Quantize;

/// Rises with every change of the arithmetic: it is part of the numerics id.
const NUMERICS: u32 = 4;

/// Most compute threads.
const MAX_THREADS: usize = 1024;

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
    /// Instruction set to use instead of the widest: `avx512`, `avx2` or `scalar`.
    pub isa: Option<String>,
}

/// A loaded model.
pub struct CandleRunner {
    limits: ModelLimits,
    config: ModelConfig,
    decoder: Decoder,
    ropes: Ropes,
    compute: Compute,
    kv: Kv,
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
) -> Result<CandleRunner, Error> {
    let isa = isa(options.isa.as_deref())?;
    let threads = threads(options)?;
    let opened: Opened = loader::open(files, options.quantize)?;
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
    let numerics = format!("{NUMERICS} {:?} {kv_type:?} {PARTIAL}", options.quantize);
    let about = About::new(&config, generation, needs, digest, &numerics);
    Ok(CandleRunner {
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

impl CandleRunner {
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

    fn forward<F: KvForm>(&self, kv: &Mutex<KvStore<F>>, batch: &StepBatch<'_>) -> candle_core::Result<Tensor> {
        let rows = rows(&batch.chunks);
        let pass = Pass {
            config: &self.config,
            compute: &self.compute,
            ropes: &self.ropes,
            kv,
            rows: &rows,
            steps: &self.steps,
        };
        self.decoder.forward(&pass)
    }
}

impl ModelRunner for CandleRunner {
    fn limits(&self) -> &ModelLimits {
        &self.limits
    }

    fn regime(&self, prompt: usize) -> Regime {
        regime(&self.config, prompt)
    }

    fn step(&mut self, batch: &StepBatch<'_>, logits: &mut Logits) -> Result<(), RunnerError> {
        check(&self.limits, batch)?;
        let failed = |error: candle_core::Error| RunnerError::Forward(error.to_string());
        let hidden = match &self.kv {
            Kv::F32(kv) => self.forward(kv, batch),
            Kv::F16(kv) => self.forward(kv, batch),
            Kv::Bf16(kv) => self.forward(kv, batch),
            Kv::Q8_0(kv) => self.forward(kv, batch),
        }
        .map_err(failed)?;
        let mut row = 0u32;
        let mut wanted = Vec::new();
        let mut states = Vec::new();
        for chunk in &batch.chunks {
            let first = row;
            row += chunk.tokens.len() as u32;
            match chunk.wanted {
                // A decoder makes no embedding of its own; `check` refuses it.
                Wanted::Nothing | Wanted::Embedding => {}
                Wanted::Logits => wanted.push(row - 1),
                Wanted::Hidden => states.extend(first..row),
            }
        }
        let count = states.len();
        let out = logits.hidden_mut(count, self.config.hidden);
        if count > 0 {
            let states = Tensor::from_vec(states, count, hidden.device())
                .and_then(|rows| hidden.index_select(&rows, 0))
                .and_then(|rows| self.decoder.states(&rows))
                .map_err(failed)?;
            out.copy_from_slice(&states);
        }
        logits.resize(wanted.len(), self.limits.vocab);
        if wanted.is_empty() {
            return Ok(());
        }
        let count = wanted.len();
        let picked = Tensor::from_vec(wanted, count, hidden.device())
            .and_then(|rows| hidden.index_select(&rows, 0))
            .and_then(|rows| self.decoder.logits(&self.config, &rows))
            .map_err(failed)?;
        logits.as_mut_slice().copy_from_slice(&picked);
        Ok(())
    }
}
