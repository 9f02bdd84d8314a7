//! The decoder on the GPU behind the engine's seam.

use std::collections::HashMap;

use rbee_cuda::{BLOCK, Error as GpuError, Gpu, Graph, Padded, Picked, Pinned, RopeTable, Rows, Stretch, Which};
use rbee_engine::runner::{
    Chunk, Logits, ModelLimits, ModelRunner, Reading, Regime, RunnerError, StepBatch, StepCounter, Wanted,
};
use rbee_weights::config::ModelConfig;
use rbee_weights::needs::{Needs, Positions};

use super::decoder::{GpuDecoder, GpuPass, GpuRopes, Room, Scratch};
use super::loader::Dims;
use crate::about::{About, check, regime};
use crate::decoder::Ropes;
use crate::error::Error;
use crate::files::ModelFiles;
use crate::kv::KvType;
use crate::loader::{self, Opened};
use crate::runner::RunnerOptions;

/// Rises with every change of the arithmetic: it is part of the numerics id.
const NUMERICS: u32 = 1;

/// Rows that are computed at once, a chunk of a prompt beside those that decode; what a batch has more of is computed after them.
const ROWS: usize = 1024 + 64;

/// Rows of the steps that are recorded, ascending: a step that only decodes is padded to the next of them.
const RECORDED: [usize; 9] = [1, 2, 4, 8, 16, 24, 32, 48, 64];

/// Bytes that the driver takes for a program's context and for kernels and recordings, on an H200 with driver 580.
const CONTEXT: u64 = 640 << 20;

/// A loaded model on an NVIDIA GPU.
pub struct CudaRunner {
    limits: ModelLimits,
    config: ModelConfig,
    about: About,
    steps: StepCounter,
    dims: Dims,
    room: Room,
    /// Recordings of steps, by their sizes. They come first, so that they end before what they use.
    graphs: HashMap<Padded, Graph>,
    decoder: GpuDecoder,
    ropes: GpuRopes,
    rows: Rows,
    scratch: Scratch,
    /// Where logits are best fetched to; whoever drives the runner has it.
    output: Option<Pinned<f32>>,
    blocks: Vec<u32>,
    taken: u64,
    gpu: Gpu,
}

/// What a load of these options is.
struct Plan {
    dims: Dims,
    room: Room,
    blocks: usize,
    needs: Needs,
}

impl Plan {
    fn of(opened: &Opened, options: &RunnerOptions) -> Result<Self, Error> {
        if let Some(kv_type) = options.kv_type.filter(|kv_type| *kv_type != KvType::Bf16) {
            return Err(Error::Option(format!("KV of type {kv_type:?} is for the CPU; on a GPU it is bf16")));
        }
        if options.quantize.is_some() {
            return Err(Error::Option("weights of fewer bits are for the CPU; on a GPU they are kept in bf16".into()));
        }
        let config = &opened.config;
        let dims = Dims::of(config)?;
        let context = opened.context(options.context)?;
        let kv_per_token = dims.kv_per_token(config.layers.len());
        let blocks = opened.kv_blocks(context, options, kv_per_token)?;
        let recorded = RECORDED.into_iter().find(|rows| *rows >= options.slots).unwrap_or(options.slots);
        let room = Room { rows: ROWS.max(recorded), sequences: recorded, context };
        let tables: usize =
            config.ropes.iter().map(|rope| rope.dims * if rope.original().is_some() { 2 } else { 1 }).sum();
        let ropes = (tables as u64 * size_of::<f32>() as u64).saturating_mul(context as u64);
        let scratch = CONTEXT.saturating_add(Scratch::bytes(config, &dims, room)).saturating_add(ropes);
        let positions = Positions {
            one: context.next_multiple_of(BLOCK) as u64,
            all: (BLOCK as u64).saturating_mul(blocks as u64),
        };
        let needs = Needs::of(opened.gpu_weights(&dims), kv_per_token, context as u64, positions, scratch);
        Ok(Self { dims, room, blocks, needs })
    }
}

/// What a model needs in a GPU's memory, from its headers alone. No GPU is asked.
///
/// # Errors
/// When the files cannot be read or are damaged, or ask for what the GPU's kernels do not do.
pub fn inspect_cuda(files: &ModelFiles, options: &RunnerOptions) -> Result<Needs, Error> {
    Ok(Plan::of(&loader::open(files, options)?, options)?.needs)
}

/// Loads a model to a GPU. `steps` advances with each step; `progress` is told bytes done and bytes in all.
///
/// # Errors
/// Whatever is wrong with the files or the options; when there is no such GPU, or not enough of its memory is free.
pub fn load_cuda(
    files: &ModelFiles,
    which: &Which,
    options: &RunnerOptions,
    steps: &StepCounter,
    progress: &dyn Fn(u64, u64),
) -> Result<CudaRunner, Error> {
    let opened = loader::open(files, options)?;
    let Plan { dims, room, blocks, needs } = Plan::of(&opened, options)?;
    if !opened.is_bf16() {
        tracing::warn!("weights of other types are rounded to bf16 on a GPU");
    }
    let gpu = Gpu::open(which)?;
    let (free, _) = gpu.memory()?;
    // The context is there already.
    let need = needs.total - CONTEXT;
    if need > free as u64 {
        return Err(Error::OutOfMemory { need, free: free as u64 });
    }
    let decoder = opened.gpu_decoder(&gpu, &dims, blocks, progress)?;
    let digest = opened.digest();
    let Opened { config, generation, .. } = opened;
    let ropes = Ropes::new(&config, room.context);
    let tables = ropes.0.into_iter().map(|(mut usual, long)| {
        if let Some(long) = long {
            usual.cos.extend(long.cos);
            usual.sin.extend(long.sin);
        }
        RopeTable::new(&gpu, &usual.cos, &usual.sin, usual.half)
    });
    let ropes = GpuRopes { tables: tables.collect::<Result<_, _>>()?, none: RopeTable::new(&gpu, &[], &[], 0)? };
    let width = room.context.div_ceil(BLOCK);
    let rows = Rows::new(&gpu, room.rows, room.sequences, width)?;
    let scratch = Scratch::new(&gpu, &config, &dims, room)?;
    let output = Some(gpu.pinned(room.sequences * config.vocab)?);
    let ((after, _), (major, minor)) = (gpu.memory()?, gpu.capability());
    let about = About::new(&config, generation, needs, digest, &format!("cuda {NUMERICS} {major}.{minor}"));
    Ok(CudaRunner {
        limits: ModelLimits {
            vocab: config.vocab,
            context: room.context,
            block_size: BLOCK,
            kv_blocks: blocks,
            reading: Reading::Causal,
        },
        config,
        about,
        steps: steps.clone(),
        dims,
        room,
        graphs: HashMap::new(),
        decoder,
        ropes,
        rows,
        scratch,
        output,
        blocks: Vec::new(),
        taken: CONTEXT + free.saturating_sub(after) as u64,
        gpu,
    })
}

fn failed(error: GpuError) -> RunnerError {
    match error {
        GpuError::OutOfMemory { .. } => RunnerError::OutOfMemory(error.to_string()),
        other => RunnerError::Forward(other.to_string()),
    }
}

/// Part of a chunk, and what is wanted of it.
#[derive(Clone, Copy)]
struct Piece<'a> {
    chunk: Chunk<'a>,
    /// From this token of it on.
    from: usize,
    /// To before this one.
    to: usize,
}

impl Piece<'_> {
    fn wanted(&self) -> Wanted {
        let whole = self.to == self.chunk.tokens.len();
        if self.chunk.wanted == Wanted::Logits && !whole { Wanted::Nothing } else { self.chunk.wanted }
    }
}

/// Guesses as chunks of one token each: K and V of all rows of a step are written before any of them are read, so that they are
/// steps of decoding, which are recorded.
fn singly<'a>(chunks: &[Chunk<'a>]) -> Vec<Chunk<'a>> {
    let single = |chunk: &Chunk<'a>| {
        let chunk = *chunk;
        let singles = (chunk.wanted == Wanted::LogitsOfAll).then(|| {
            (0..).zip(chunk.tokens.chunks(1)).map(move |(i, tokens)| Chunk {
                tokens,
                start: chunk.start + i,
                wanted: Wanted::Logits,
                ..chunk
            })
        });
        let whole = (chunk.wanted != Wanted::LogitsOfAll).then_some(chunk);
        singles.into_iter().flatten().chain(whole)
    };
    chunks.iter().flat_map(single).collect()
}

/// Cuts a batch into steps of at most so many rows and sequences. What has hidden states wanted shares a step only with its like.
fn cut<'a>(chunks: &[Chunk<'a>], room: Room) -> Vec<Vec<Piece<'a>>> {
    let mut steps: Vec<Vec<Piece<'a>>> = Vec::new();
    let (mut rows, mut hidden) = (0, false);
    for chunk in chunks {
        let mut from = 0;
        while from < chunk.tokens.len() {
            let fits = steps.last().is_some_and(|step| {
                rows < room.rows && step.len() < room.sequences && hidden == (chunk.wanted == Wanted::Hidden)
            });
            if !fits {
                steps.push(Vec::new());
                (rows, hidden) = (0, chunk.wanted == Wanted::Hidden);
            }
            let to = chunk.tokens.len().min(from + room.rows - rows);
            rows += to - from;
            let piece = Piece { chunk: *chunk, from, to };
            steps.last_mut().expect("one was pushed").push(piece);
            from = to;
        }
    }
    steps
}

impl CudaRunner {
    /// What is known of the model.
    pub fn about(&self) -> &About {
        &self.about
    }

    /// The GPU's name.
    pub fn device(&self) -> &str {
        self.gpu.name()
    }

    /// Bytes of weights and of KV as they are on the GPU.
    pub fn held(&self) -> (u64, u64) {
        self.decoder.held()
    }

    /// Bytes of the GPU's memory that the load has taken, by what was free before and after it, with the driver's own.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// The sizes that a step of these pieces is padded to, if it only decodes.
    fn padded(&self, pieces: &[Piece<'_>]) -> Option<Padded> {
        let decodes = |piece: &Piece<'_>| piece.chunk.tokens.len() == 1 && piece.chunk.wanted == Wanted::Logits;
        if !pieces.iter().all(decodes) {
            return None;
        }
        let rows =
            RECORDED.into_iter().find(|rows| *rows >= pieces.len()).filter(|rows| *rows <= self.room.sequences)?;
        let longest = pieces.iter().map(|piece| piece.chunk.start + 1).max().unwrap_or(1);
        let most = Padded::parts(self.room.context);
        Some(Padded { rows, parts: Padded::parts(longest).next_power_of_two().min(most) })
    }

    /// Computes some pieces; what is wanted of them is in the scratch then, on its way.
    fn launch(&mut self, pieces: &[Piece<'_>], wanted: Wanted) -> Result<(), GpuError> {
        self.blocks.clear();
        let mut ends = Vec::with_capacity(pieces.len());
        for piece in pieces {
            let needed = (piece.chunk.start + piece.to).div_ceil(BLOCK);
            self.blocks.extend(piece.chunk.blocks[..needed].iter().map(|block| block.0));
            ends.push(self.blocks.len());
        }
        let mut start = 0;
        let stretches: Vec<Stretch<'_>> = pieces
            .iter()
            .zip(ends)
            .map(|(piece, end)| {
                let blocks = &self.blocks[std::mem::replace(&mut start, end)..end];
                Stretch {
                    tokens: &piece.chunk.tokens[piece.from..piece.to],
                    start: piece.chunk.start + piece.from,
                    blocks,
                    // Long texts' angles stand behind those of usual ones.
                    shift: if piece.chunk.regime == Regime::Long { self.limits.context } else { 0 },
                    picked: match piece.wanted() {
                        Wanted::Nothing | Wanted::Embedding => Picked::None,
                        Wanted::Logits | Wanted::LogitsOfAll => Picked::Last,
                        Wanted::Hidden => Picked::All,
                    },
                }
            })
            .collect();
        let padded = self.padded(pieces);
        self.rows.set(&self.gpu, self.dims.heads, &stretches, padded)?;
        let pass = GpuPass {
            gpu: &self.gpu,
            config: &self.config,
            dims: &self.dims,
            ropes: &self.ropes,
            rows: &self.rows,
            wanted,
        };
        let (decoder, scratch) = (&mut self.decoder, &mut self.scratch);
        let Some(padded) = padded else { return decoder.forward(&pass, scratch) };
        if !self.graphs.contains_key(&padded) {
            let graph = self.gpu.record(|| decoder.forward(&pass, scratch))?;
            self.graphs.insert(padded, graph);
        }
        #[expect(unsafe_code, reason = "a recording does not keep its buffers alive")]
        // SAFETY: all buffers are this runner's own, reserved at load and dropped after the recordings.
        unsafe {
            self.graphs[&padded].launch()
        }
    }

    fn compute(&mut self, batch: &StepBatch<'_>, logits: &mut Logits) -> Result<(), GpuError> {
        self.gpu.bind()?;
        let (vocab, hidden) = (self.limits.vocab, self.config.hidden);
        let chunks = singly(&batch.chunks);
        let of = |wanted: Wanted| chunks.iter().filter(move |chunk| chunk.wanted == wanted);
        let states: usize = of(Wanted::Hidden).map(|chunk| chunk.tokens.len()).sum();
        logits.hidden_mut(states, hidden);
        logits.resize(of(Wanted::Logits).count(), vocab);
        let (mut row, mut state) = (0, 0);
        for pieces in cut(&chunks, self.room) {
            let count = |wanted: Wanted| pieces.iter().filter(move |piece| piece.wanted() == wanted);
            let rows = count(Wanted::Logits).count();
            let states_here: usize = count(Wanted::Hidden).map(|piece| piece.to - piece.from).sum();
            if states_here > 0 {
                self.launch(&pieces, Wanted::Hidden)?;
                let all = logits.hidden_mut(states, hidden);
                self.gpu.fetch(&self.scratch.y, &mut all[state * hidden..][..states_here * hidden])?;
            } else if rows > 0 {
                self.launch(&pieces, Wanted::Logits)?;
                self.gpu.fetch(&self.scratch.logits, &mut logits.as_mut_slice()[row * vocab..][..rows * vocab])?;
            } else {
                self.launch(&pieces, Wanted::Nothing)?;
                self.gpu.wait()?;
            }
            self.steps.advance();
            (row, state) = (row + rows, state + states_here);
        }
        Ok(())
    }
}

impl ModelRunner for CudaRunner {
    fn limits(&self) -> &ModelLimits {
        &self.limits
    }

    fn logits(&mut self) -> Logits {
        self.output.take().map_or_else(Logits::default, |output| Logits::on(Box::new(output)))
    }

    fn regime(&self, prompt: usize) -> Regime {
        regime(&self.config, prompt)
    }

    fn step(&mut self, batch: &StepBatch<'_>, logits: &mut Logits) -> Result<(), RunnerError> {
        check(&self.limits, batch)?;
        self.compute(batch, logits).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows and sequences of each step, and what is wanted of it.
    fn shapes(chunks: &[(usize, Wanted)], rows: usize, sequences: usize) -> Vec<(usize, usize, Vec<Wanted>)> {
        let tokens = [0; 100];
        let chunk = |(len, wanted): &(usize, Wanted)| Chunk {
            tokens: &tokens[..*len],
            start: 0,
            blocks: &[],
            regime: Regime::Usual,
            wanted: *wanted,
        };
        let steps = cut(&chunks.iter().map(chunk).collect::<Vec<_>>(), Room { rows, sequences, context: 100 });
        let shape = |step: Vec<Piece<'_>>| {
            let rows = step.iter().map(|piece| piece.to - piece.from).sum();
            (rows, step.len(), step.iter().map(Piece::wanted).collect())
        };
        steps.into_iter().map(shape).collect()
    }

    #[test]
    fn a_batch_is_cut_to_the_room_there_is() {
        use Wanted::{Hidden, Logits, Nothing};
        assert_eq!(shapes(&[(1, Logits), (7, Nothing)], 8, 4), [(8, 2, vec![Logits, Nothing])]);
        assert_eq!(shapes(&[(1, Logits); 5], 8, 4), [(4, 4, vec![Logits; 4]), (1, 1, vec![Logits])]);
        assert_eq!(
            shapes(&[(5, Logits), (12, Logits)], 8, 4),
            [(8, 2, vec![Logits, Nothing]), (8, 1, vec![Nothing]), (1, 1, vec![Logits])]
        );
        assert_eq!(
            shapes(&[(5, Logits), (10, Hidden), (1, Hidden), (2, Nothing)], 8, 4),
            [(5, 1, vec![Logits]), (8, 1, vec![Hidden]), (3, 2, vec![Hidden, Hidden]), (2, 1, vec![Nothing])]
        );
    }

    #[test]
    fn guesses_are_rows_of_their_own() {
        let tokens = [4, 5, 6];
        let guessed =
            Chunk { tokens: &tokens, start: 7, blocks: &[], regime: Regime::Long, wanted: Wanted::LogitsOfAll };
        let chunks = singly(&[Chunk { wanted: Wanted::Logits, ..guessed }, guessed]);
        let rows: Vec<_> = chunks.iter().map(|c| (c.tokens, c.start, c.regime, c.wanted)).collect();
        let single = |i: usize| (&tokens[i..=i], 7 + i, Regime::Long, Wanted::Logits);
        assert_eq!(rows, [(&tokens[..], 7, Regime::Long, Wanted::Logits), single(0), single(1), single(2)]);
    }
}
