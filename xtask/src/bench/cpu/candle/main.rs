//! Cases of CPU speed over a GGUF file with candle-transformers: what `cargo xtask bench cpu --beside candle` builds beside our
//! own. No part of our workspace.
//!
//! `candle-cpu FILE CASE...` with cases and lines of JSON as `rbee-models`' bench `cpu` has them, and measured alike: after a step
//! of 16 tokens each case but `load` runs twice, and the second time counts. Threads are `RAYON_NUM_THREADS`.

use std::error::Error;
use std::fs::File;
use std::io::BufReader;
use std::time::Instant;

use candle_core::quantized::gguf_file::Content;
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;

struct Session {
    model: ModelWeights,
    vocab: usize,
}

impl Session {
    fn open(path: &str) -> Result<Self, Box<dyn Error>> {
        let mut file = BufReader::new(File::open(path)?);
        let content = Content::read(&mut file)?;
        let embedding = content.tensor_infos.get("token_embd.weight").ok_or("no embedding")?;
        let vocab = embedding.shape.dims()[0];
        Ok(Self { model: ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?, vocab })
    }

    /// A step of so many tokens from this position on; the first forgets what was before.
    fn step(&mut self, start: usize, tokens: usize) -> candle_core::Result<()> {
        let ids: Vec<u32> =
            (start..start + tokens).map(|i| ((i * 7919 + 104_729) % self.vocab) as u32).collect();
        self.model.forward(&Tensor::new(&ids[..], &Device::Cpu)?.unsqueeze(0)?, start)?;
        Ok(())
    }

    /// Tokens that are counted, and their seconds.
    fn run(&mut self, kind: &str, sizes: &[usize]) -> Result<(usize, f64), Box<dyn Error>> {
        let mut taken = Err("no such case".into());
        for _ in 0..if kind == "load" { 1 } else { 2 } {
            let before = Instant::now();
            let tokens = match (kind, sizes) {
                ("prefill", &[tokens]) => {
                    self.step(0, tokens)?;
                    tokens
                }
                ("decode", &[tokens, 0]) => {
                    for position in 0..tokens {
                        self.step(position, 1)?;
                    }
                    tokens
                }
                ("load", &[tokens]) => {
                    self.step(0, tokens)?;
                    self.step(tokens, 1)?;
                    tokens + 1
                }
                _ => return taken,
            };
            taken = Ok((tokens, before.elapsed().as_secs_f64()));
        }
        taken
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    candle_core::utils::init_global_threadpool();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [file, cases @ ..] = &args[..] else { return Err("usage: candle-cpu FILE CASE...".into()) };
    let mut session = Session::open(file)?;
    session.step(0, 16)?;
    for case in cases {
        let (kind, sizes) = case.split_once(':').ok_or("a case without sizes")?;
        let sizes: Vec<usize> = sizes.split('x').map(str::parse).collect::<Result<_, _>>()?;
        let (tokens, seconds) = session.run(kind, &sizes)?;
        println!("{{\"case\":\"{case}\",\"tokens\":{tokens},\"seconds\":{seconds}}}");
    }
    Ok(())
}
