//! GGUF files: a decoder's tensors from one file, or from all that a model was split into.

use std::collections::{HashMap, HashSet};

use rbee_kernels::{Blocks, WeightType};
use rbee_weights::Error as FileError;
use rbee_weights::config::{GenerationDefaults, ModelConfig};
use rbee_weights::gguf::config::model_config;
use rbee_weights::gguf::names::Architecture;
use rbee_weights::gguf::{GgmlType, Gguf, check_split};

use crate::arch::Plan;
use crate::error::Error;
use crate::files::{ModelFiles, WeightBytes};
use crate::loader::Opened;
use crate::runner::RunnerOptions;
use crate::weights::{Pairs, Place, WeightFile, Weights};

/// What `read` makes of the metadata, which are those of the first file; `None` for files of another kind.
///
/// # Errors
/// When the file cannot be read or is damaged.
pub fn metadata<T>(files: &ModelFiles, read: impl FnOnce(&Gguf<'_>) -> T) -> Result<Option<T>, Error> {
    let ModelFiles::Gguf { names, .. } = files else { return Ok(None) };
    let bytes = mapped(files, &names[0])?;
    let gguf = Gguf::parse(&names[0], &bytes, bytes.len() as u64)?;
    Ok(Some(read(&gguf)))
}

fn mapped(files: &ModelFiles, name: &str) -> Result<WeightBytes, Error> {
    files.weights(name)?.ok_or_else(|| FileError::Missing(name.to_owned()).into())
}

/// Reads and checks everything but the weights themselves.
pub(crate) fn open(files: &ModelFiles, names: &[String], options: &RunnerOptions) -> Result<Opened, Error> {
    let bytes: Vec<WeightBytes> = names.iter().map(|name| mapped(files, name)).collect::<Result<_, _>>()?;
    let mut ggufs = Vec::with_capacity(names.len());
    for (name, bytes) in names.iter().zip(&bytes) {
        ggufs.push(Gguf::parse(name, bytes, bytes.len() as u64)?);
    }
    check_split(&ggufs)?;
    let mut config = model_config(&ggufs)?;
    let arch = Architecture::of(&ggufs[0])?;
    if arch.norms_hold_one() {
        config.norms.plus_one = false;
    }
    let plan = Plan::of(&config);
    let tensors = places(&config, arch, &plan, &ggufs)?;
    let header = |gguf: &Gguf<'_>| {
        let first = gguf.tensors.values().map(|tensor| tensor.start).min();
        first.and_then(|first| usize::try_from(first).ok()).unwrap_or(usize::MAX)
    };
    let headers: Vec<usize> = ggufs.iter().map(header).collect();
    drop(ggufs);
    let files = names.iter().zip(bytes).zip(headers);
    let files =
        files.map(|((name, bytes), header)| WeightFile { name: name.clone(), header: header.min(bytes.len()), bytes });
    let weights = Weights::new(files.collect(), tensors, options);
    Ok(Opened { config, generation: GenerationDefaults::default(), plan, weights })
}

/// Where the plan's tensors are, each in its shape.
fn places(
    config: &ModelConfig,
    arch: Architecture,
    plan: &Plan,
    files: &[Gguf<'_>],
) -> Result<HashMap<String, Place>, FileError> {
    let mut used = HashSet::new();
    let mut places = HashMap::new();
    for (name, mut shape) in plan.tensors() {
        let first = files[0].file();
        let source = arch.source(&name).ok_or_else(|| {
            FileError::unsupported(first, format!("a GGUF of architecture {} has no place for `{name}`", arch.name()))
        })?;
        let find = |name: &str| files.iter().enumerate().find_map(|(at, gguf)| Some((at, gguf.tensors.get(name)?)));
        let alone = || source.alone().filter(|alone| find(&alone.name).is_some());
        let source = if find(&source.name).is_some() { source } else { alone().unwrap_or(source) };
        let Some((file, info)) = find(&source.name) else {
            return Err(FileError::corrupt(first, format!("tensor `{}` is missing", source.name)));
        };
        let gguf = &files[file];
        let rows = shape[0];
        let stack = match source.expert {
            None => 1,
            Some(expert) => {
                let experts = info.shape.first().copied().unwrap_or(0);
                if expert >= experts {
                    let problem = format!("tensor `{}` has {experts} experts, and more are asked for", source.name);
                    return Err(FileError::corrupt(gguf.file(), problem));
                }
                shape.insert(0, experts);
                experts
            }
        };
        if info.shape != shape {
            let problem =
                format!("tensor `{}` has shape {:?}, its metadata ask for {shape:?}", source.name, info.shape);
            return Err(FileError::corrupt(gguf.file(), problem));
        }
        let address = |at: u64| usize::try_from(at).map_err(|_| FileError::corrupt(gguf.file(), "it is too large"));
        let len = address(info.len)? / stack;
        let pairs = arch.permuted_heads(config, &name).map(|heads| Pairs { heads, rows });
        let start = address(info.start)? + source.expert.unwrap_or(0) * len;
        places.insert(name, Place { file, start, len, kind: kind(info.kind), pairs });
        used.insert(source.name);
    }
    // As with safetensors: a tensor without a use would have changed the result for whoever made it.
    let all = files.iter().flat_map(|gguf| gguf.tensors.keys().map(move |name| (name, gguf.file())));
    let extra = all.filter(|(name, _)| !used.contains(*name) && !Architecture::is_spare(name)).min();
    match extra {
        None => Ok(places),
        Some((name, file)) => {
            let problem = format!("tensor `{}` has no use in architecture {}", name.escape_debug(), arch.name());
            Err(FileError::unsupported(file, problem))
        }
    }
}

fn kind(kind: GgmlType) -> WeightType {
    WeightType::Blocks(match kind {
        GgmlType::F32 => return WeightType::F32,
        GgmlType::F16 => return WeightType::F16,
        GgmlType::BF16 => return WeightType::Bf16,
        GgmlType::Q4_0 => Blocks::Q4_0,
        GgmlType::Q4_1 => Blocks::Q4_1,
        GgmlType::Q5_0 => Blocks::Q5_0,
        GgmlType::Q5_1 => Blocks::Q5_1,
        GgmlType::Q8_0 => Blocks::Q8_0,
        GgmlType::Q2_K => Blocks::Q2K,
        GgmlType::Q3_K => Blocks::Q3K,
        GgmlType::Q4_K => Blocks::Q4K,
        GgmlType::Q5_K => Blocks::Q5K,
        GgmlType::Q6_K => Blocks::Q6K,
    })
}
