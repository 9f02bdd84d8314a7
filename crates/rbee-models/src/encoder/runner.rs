//! An encoder behind the engine's seam: whole texts in, an embedding for each out.

use rbee_engine::runner::{
    Chunk, Logits, ModelLimits, ModelRunner, Reading, RunnerError, StepBatch, StepCounter, Wanted,
};
use rbee_kernels::attention::{BLOCK, PARTIAL};
use rbee_kernels::compute::Compute;
use rbee_weights::config::GenerationDefaults;
use rbee_weights::config::sentence::Embedding;
use rbee_weights::needs::Needs;

use super::plan::{Opened, open};
use super::{Encoder, embedding};
use crate::about::{About, numerics_id};
use crate::error::Error;
use crate::files::ModelFiles;
use crate::runner::{RunnerOptions, isa, threads};

/// Rises with every change of the arithmetic: it is part of the numerics id.
const NUMERICS: u32 = 1;

/// A loaded encoder.
pub struct EncoderRunner {
    limits: ModelLimits,
    encoder: Encoder,
    embedding: Embedding,
    compute: Compute,
    steps: StepCounter,
    about: About,
}

/// Loads an encoder. `steps` advances with each layer of each step; `progress` is told bytes done and bytes in all.
///
/// # Errors
/// Whatever is wrong with the files or the options.
pub fn load_encoder(
    files: &ModelFiles,
    options: &RunnerOptions,
    steps: &StepCounter,
    progress: &dyn Fn(u64, u64),
) -> Result<EncoderRunner, Error> {
    let isa = isa(options.isa.as_deref())?;
    let threads = threads(options)?;
    Opened::check(options)?;
    let opened = open(files, options)?;
    let context = opened.context(options.context)?;
    let compute = Compute::new(threads, isa);
    let encoder = opened.encoder(context, &compute, progress)?;
    let (needs, digest) = (opened.needs(context), opened.weights.digest());
    let Opened { config, embedding, .. } = opened;
    let numerics = format!(
        "encoder {NUMERICS} {:?} {} {PARTIAL} {digest} {config:?} {embedding:?}",
        options.quantize, options.exact
    );
    let about = About {
        generation: GenerationDefaults::default(),
        unknown_keys: config.unknown.clone(),
        eos: Vec::new(),
        needs,
        digest,
        numerics_id: numerics_id(&numerics),
    };
    let limits = ModelLimits { vocab: config.vocab, context, block_size: BLOCK, kv_blocks: 0, reading: Reading::Whole };
    Ok(EncoderRunner { limits, encoder, embedding, compute, steps: steps.clone(), about })
}

/// What an encoder needs in memory, from its headers alone.
pub(crate) fn inspect(files: &ModelFiles, options: &RunnerOptions) -> Result<Needs, Error> {
    Opened::check(options)?;
    let opened = open(files, options)?;
    Ok(opened.needs(opened.context(options.context)?))
}

impl EncoderRunner {
    /// What is known of the model.
    pub fn about(&self) -> &About {
        &self.about
    }

    /// Bytes of weights as they are in memory.
    pub fn held(&self) -> u64 {
        self.encoder.held()
    }
}

impl ModelRunner for EncoderRunner {
    fn limits(&self) -> &ModelLimits {
        &self.limits
    }

    fn set_threads(&mut self, threads: usize) {
        self.compute.set_threads(threads);
    }

    fn step(&mut self, batch: &StepBatch<'_>, logits: &mut Logits) -> Result<(), RunnerError> {
        let ModelLimits { vocab, context, .. } = self.limits;
        let sound = |chunk: &Chunk<'_>| {
            chunk.start == 0
                && (1..=context).contains(&chunk.tokens.len())
                && chunk.wanted == Wanted::Embedding
                && chunk.tokens.iter().all(|&token| (token as usize) < vocab)
        };
        if let Some(chunk) = batch.chunks.iter().find(|chunk| !sound(chunk)) {
            let problem = format!("{} tokens from {} are no whole text", chunk.tokens.len(), chunk.start);
            return Err(RunnerError::Forward(problem));
        }
        let texts: Vec<&[u32]> = batch.chunks.iter().map(|chunk| chunk.tokens).collect();
        let states = self.encoder.states(&texts, &self.steps);
        let hidden = self.encoder.words.k();
        let width = hidden * self.embedding.poolings.len();
        let mut rest = &states[..];
        for (text, out) in texts.iter().zip(logits.hidden_mut(texts.len(), width).chunks_exact_mut(width)) {
            let (own, others) = rest.split_at(text.len() * hidden);
            rest = others;
            out.copy_from_slice(&embedding(&self.embedding, own, hidden));
        }
        logits.resize(0, vocab);
        Ok(())
    }
}
