//! Models that read texts whole: one chunk for a text, no KV, an embedding.

use std::sync::{Arc, Mutex};

use rbee_engine::runner::{Logits, StepBatch, Wanted};
use rbee_engine::{
    Engine, EngineConfig, EngineError, Goal, ModelLimits, ModelRunner, Output, Reading, Request, RunnerError, TokenId,
};

use crate::{CONFIG, answer, choice, in_use, request, run};

/// An embedding is a text's length and the sum of its tokens.
struct Whole {
    limits: ModelLimits,
    /// The lengths of the texts of each step.
    steps: Arc<Mutex<Vec<Vec<usize>>>>,
    /// Tokens of a step beyond which there is no memory.
    most: usize,
}

impl ModelRunner for Whole {
    fn limits(&self) -> &ModelLimits {
        &self.limits
    }

    fn step(&mut self, batch: &StepBatch<'_>, logits: &mut Logits) -> Result<(), RunnerError> {
        let lengths: Vec<usize> = batch.chunks.iter().map(|chunk| chunk.tokens.len()).collect();
        if lengths.iter().sum::<usize>() > self.most {
            return Err(RunnerError::OutOfMemory("as told".into()));
        }
        self.steps.lock().unwrap().push(lengths);
        let rows = logits.hidden_mut(batch.chunks.len(), 2).chunks_exact_mut(2);
        for (chunk, row) in batch.chunks.iter().zip(rows) {
            assert!(chunk.start == 0 && chunk.blocks.is_empty() && chunk.wanted == Wanted::Embedding, "{chunk:?}");
            row.copy_from_slice(&[chunk.tokens.len() as f32, chunk.tokens.iter().sum::<u32>() as f32]);
        }
        Ok(())
    }
}

/// Context 100; steps of 32 tokens.
fn engine(most: usize, config: EngineConfig) -> (Engine, Arc<Mutex<Vec<Vec<usize>>>>) {
    let limits = ModelLimits { vocab: 50, context: 100, block_size: 16, kv_blocks: 0, reading: Reading::Whole };
    let steps = Arc::default();
    let runner = Whole { limits, steps: Arc::clone(&steps), most };
    (Engine::new(Box::new(runner), config).unwrap(), steps)
}

fn embed(text: &[TokenId]) -> Request {
    Request { goal: Goal::Embedding, max_tokens: None, choices: vec![choice()], ..request(text, 1) }
}

fn vectors(outputs: &[Output]) -> Vec<Vec<f32>> {
    let of = |output: &Output| if let Output::Embedding { values } = output { Some(values.clone()) } else { None };
    outputs.iter().filter_map(of).collect()
}

#[test]
fn texts_are_never_cut_and_short_ones_go_beside_the_oldest() {
    let (mut engine, steps) = engine(1000, CONFIG);
    let lengths = [20, 90, 6, 5, 100];
    let ids: Vec<_> = lengths.map(|len| engine.submit(embed(&vec![3; len])).unwrap()).into();
    let outputs = run(&mut engine);
    // The oldest and the shortest that fit; four run at once. Then the longer ones, beyond a step's tokens, alone.
    assert_eq!(*steps.lock().unwrap(), [vec![20, 5, 6], vec![90], vec![100]]);
    for (id, len) in ids.iter().zip(lengths) {
        assert_eq!(vectors(&outputs[id]), [[len as f32, 3.0 * len as f32]]);
        assert!(
            matches!(outputs[id].last(), Some(Output::Done { prompt_tokens, cached_tokens: 0, .. }) if *prompt_tokens == len)
        );
    }
    assert_eq!(in_use(&engine), (0, 0, 0));
    // The same text again: nothing was kept of it.
    let again = answer(&mut engine, embed(&[3; 20]));
    assert_eq!(vectors(&again), [[20.0, 60.0]]);
}

#[test]
fn what_is_no_text_to_embed_is_refused() {
    let (mut engine, _) = engine(1000, CONFIG);
    let refusal = engine.submit(request(&[1, 2], 5)).unwrap_err();
    assert!(matches!(&refusal, EngineError::Invalid { problem, .. } if problem.contains("only embeds")), "{refusal}");
    let refusal = engine.submit(embed(&[1; 101])).unwrap_err();
    assert_eq!(refusal, EngineError::ContextLength { prompt: 101, max_tokens: None, context: 100 });
    assert!(matches!(engine.submit(embed(&[50])), Err(EngineError::Invalid { .. })));
    assert!(matches!(engine.submit(embed(&[])), Err(EngineError::Invalid { .. })));
    assert_eq!(in_use(&engine), (0, 0, 0));
}

#[test]
fn want_of_memory_makes_steps_smaller_and_ends_a_text_that_is_alone() {
    let (mut engine, steps) = engine(25, CONFIG);
    let ids = [10, 10, 10, 60].map(|len| engine.submit(embed(&vec![1; len])).unwrap());
    let outputs = run(&mut engine);
    assert_eq!(steps.lock().unwrap().iter().flatten().sum::<usize>(), 30);
    for id in &ids[..3] {
        assert_eq!(vectors(&outputs[id]), [[10.0, 10.0]]);
    }
    assert_eq!(outputs[&ids[3]].last(), Some(&Output::Failed(EngineError::OutOfMemory("as told".into()))));
    assert_eq!(in_use(&engine), (0, 0, 0));
}

#[test]
fn a_cancelled_text_makes_room_at_once() {
    let (mut engine, steps) = engine(1000, EngineConfig { slots: 1, ..CONFIG });
    let first = engine.submit(embed(&[1; 30])).unwrap();
    let second = engine.submit(embed(&[2; 30])).unwrap();
    engine.cancel(first);
    let outputs = run(&mut engine);
    assert!(vectors(&outputs[&first]).is_empty());
    assert_eq!(vectors(&outputs[&second]), [[30.0, 60.0]]);
    assert_eq!(steps.lock().unwrap().len(), 1);
}
