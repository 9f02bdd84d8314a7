//! The runner: a decoder, its KV and its options behind the engine's seam.

use std::sync::{Mutex, PoisonError};

use candle_core::Tensor;
use half::{bf16, f16};
use rbee_engine::runner::{Logits, ModelLimits, ModelRunner, Regime, RunnerError, StepBatch, StepCounter, Wanted};
use rbee_kernels::Isa;
use rbee_kernels::attention::{BLOCK, PARTIAL};
use rbee_kernels::candle::Compute;
use rbee_kernels::kv_form::{KvForm, Q8Kv};
use rbee_weights::config::{GenerationDefaults, ModelConfig};
use rbee_weights::needs::Needs;
use sha2::{Digest, Sha256};

use crate::decoder::{Decoder, Pass, Ropes, rows};
use crate::error::Error;
use crate::files::ModelFiles;
use crate::kv::{KvStore, KvType};
use crate::loader::{self, Opened, Quantize};

/// Rises with every change of the arithmetic: it is part of the numerics id.
const NUMERICS: u32 = 3;

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
    generation: GenerationDefaults,
    needs: Needs,
    digest: String,
    numerics_id: String,
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
    if options.threads > MAX_THREADS {
        return Err(Error::Option(format!("{} threads are more than {MAX_THREADS}", options.threads)));
    }
    let opened: Opened = loader::open(files, options.quantize)?;
    let context = opened.context(options.context)?;
    let kv_type = opened.kv_type(options.kv_type);
    let blocks = opened.kv_blocks(context, options, kv_type)?;
    let needs = opened.needs(context, blocks, kv_type);
    let compute = Compute::new(options.threads.max(1), isa);
    let decoder = opened.decoder(&compute, progress)?;
    let digest = opened.digest();
    let Opened { config, generation, .. } = opened;
    let kv = match kv_type {
        KvType::F32 => Kv::F32(Mutex::new(KvStore::new(&config, blocks)?)),
        KvType::F16 => Kv::F16(Mutex::new(KvStore::new(&config, blocks)?)),
        KvType::Bf16 => Kv::Bf16(Mutex::new(KvStore::new(&config, blocks)?)),
        KvType::Q8_0 => Kv::Q8_0(Mutex::new(KvStore::new(&config, blocks)?)),
    };
    // All instruction sets give the same bits, so none is part of the id. The config is: the same weights under another
    // rope are another model.
    let facts = format!(
        "{NUMERICS} {} {digest} {config:?} f32 {:?} {kv_type:?} {PARTIAL}",
        env!("CARGO_PKG_VERSION"),
        options.quantize
    );
    let numerics_id = Sha256::digest(facts).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    Ok(CandleRunner {
        limits: ModelLimits { vocab: config.vocab, context, block_size: BLOCK, kv_blocks: blocks },
        ropes: Ropes::new(&config, context),
        config,
        decoder,
        compute,
        kv,
        steps: steps.clone(),
        generation,
        needs,
        digest,
        numerics_id,
    })
}

/// The instruction set that is asked for, else the widest.
fn isa(asked: Option<&str>) -> Result<Isa, Error> {
    let Some(name) = asked else { return Ok(Isa::detect()) };
    match Isa::named(name) {
        Some(isa) if isa.is_here() => Ok(isa),
        Some(_) => Err(Error::Option(format!("this machine has no {name}"))),
        None => Err(Error::Option(format!("instruction set `{}` is not avx512, avx2 or scalar", name.escape_debug()))),
    }
}

impl CandleRunner {
    /// Sampling defaults and end tokens of the model's own files.
    pub fn generation(&self) -> &GenerationDefaults {
        &self.generation
    }

    /// Keys of the config that nothing here knows.
    pub fn unknown_keys(&self) -> &[String] {
        &self.config.unknown
    }

    /// Tokens that end a text: those of `generation_config.json`, else of `config.json`.
    pub fn eos(&self) -> &[u32] {
        if self.generation.eos.is_empty() { &self.config.eos } else { &self.generation.eos }
    }

    /// Bytes by the estimate.
    pub fn needs(&self) -> &Needs {
        &self.needs
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

    /// Digest of the weights.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Two runners of the same id give the same logits bit for bit.
    pub fn numerics_id(&self) -> &str {
        &self.numerics_id
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

    /// Refuses a batch that would read or write outside what there is: the engine never makes one.
    fn check(&self, batch: &StepBatch<'_>) -> Result<(), RunnerError> {
        let ModelLimits { vocab, context, block_size, kv_blocks } = self.limits;
        for chunk in &batch.chunks {
            let end = chunk.start.saturating_add(chunk.tokens.len());
            let sound = !chunk.tokens.is_empty()
                && end <= context
                && chunk.blocks.len() * block_size >= end
                && chunk.blocks.iter().all(|block| (block.0 as usize) < kv_blocks)
                && chunk.tokens.iter().all(|&token| (token as usize) < vocab);
            if !sound {
                return Err(RunnerError::Forward(format!("a chunk at {}..{end} is not sound", chunk.start)));
            }
        }
        Ok(())
    }
}

impl ModelRunner for CandleRunner {
    fn limits(&self) -> &ModelLimits {
        &self.limits
    }

    fn regime(&self, prompt: usize) -> Regime {
        match self.config.regime_length() {
            Some(length) if prompt > length => Regime::Long,
            _ => Regime::Usual,
        }
    }

    fn step(&mut self, batch: &StepBatch<'_>, logits: &mut Logits) -> Result<(), RunnerError> {
        self.check(batch)?;
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
                Wanted::Nothing => {}
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
