//! The bytes of a model's tensors: where each is in its file, and how it becomes a packed matrix or a vector.

use std::borrow::Cow;
use std::collections::HashMap;
use std::str::FromStr;
use std::sync::Arc;

use rbee_kernels::compute::{Compute, Linear};
use rbee_kernels::packed::widen;
use rbee_kernels::{Kept, Packed, Part, Quantization, WeightType};
use rbee_weights::Error as FileError;
use sha2::{Digest, Sha256};

use crate::arch::{Matrix, Role};
use crate::error::Error;
use crate::files::WeightBytes;
use crate::runner::RunnerOptions;

/// Weight files up to this long go into the digest whole.
const WHOLE: usize = 64 << 20;

/// Of longer ones, the first [`PAGE`] bytes of every so many.
const STRIDE: usize = 64 << 10;

const PAGE: usize = 4 << 10;

/// What matrices are kept in when the files' own type is too large.
///
/// Routers keep their type: they are small, and which expert a row goes to hangs on small differences. So does any matrix
/// whose rows are not whole blocks of 32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Quantize {
    /// 8.5 bits per weight.
    Q8_0,
    /// 4.5 bits per weight; 8.5 for embedding and head, and where rows are not whole blocks of 256.
    Q4K,
}

impl FromStr for Quantize {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "q8_0" => Ok(Self::Q8_0),
            "q4_k" => Ok(Self::Q4K),
            _ => Err(Error::Option(format!("quantization `{}` is not q8_0 or q4_k", text.escape_debug()))),
        }
    }
}

/// The files of a model's weights, and the places of all tensors of its plan: each was found in its shape when they were opened.
pub(crate) struct Weights {
    pub(crate) files: Vec<WeightFile>,
    pub(crate) tensors: HashMap<String, Place>,
    pub(crate) quantize: Option<Quantize>,
    exact: bool,
}

/// A file of weights.
pub(crate) struct WeightFile {
    pub(crate) name: String,
    /// Bytes at its beginning that say what all the rest means.
    pub(crate) header: usize,
    pub(crate) bytes: WeightBytes,
}

/// Where a tensor is.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) file: usize,
    pub(crate) start: usize,
    pub(crate) len: usize,
    pub(crate) kind: WeightType,
    pub(crate) pairs: Option<Pairs>,
}

/// Rows that stand as neighbouring rotary pairs within each head: row `2i` of a head of `n` rows is our row `i`, and row
/// `2i + 1` is our row `i + n / 2`.
#[derive(Clone, Copy)]
pub(crate) struct Pairs {
    pub(crate) heads: usize,
    /// Of all heads together.
    pub(crate) rows: usize,
}

impl Pairs {
    /// The bytes with the rows in our order.
    fn sorted(self, bytes: &[u8]) -> Vec<u8> {
        let (row, head) = (bytes.len() / self.rows, self.rows / self.heads);
        let mut out = Vec::with_capacity(bytes.len());
        for of_head in bytes.chunks_exact(head * row) {
            for first in 0..2 {
                of_head.chunks_exact(row).skip(first).step_by(2).for_each(|bytes| out.extend_from_slice(bytes));
            }
        }
        out
    }
}

impl Weights {
    pub(crate) fn new(files: Vec<WeightFile>, tensors: HashMap<String, Place>, options: &RunnerOptions) -> Self {
        Self { files, tensors, quantize: options.quantize, exact: options.exact }
    }

    pub(crate) fn place(&self, name: &str) -> Place {
        *self.tensors.get(name).expect("all tensors of the plan were found when the files were opened")
    }

    /// The bytes of a tensor of the plan, its rows in our order, and their type.
    pub(crate) fn tensor(&self, name: &str) -> (WeightType, Cow<'_, [u8]>) {
        let place = self.place(name);
        let bytes = &self.files[place.file].bytes[place.start..place.start + place.len];
        (place.kind, place.pairs.map_or(Cow::Borrowed(bytes), |pairs| Cow::Owned(pairs.sorted(bytes))))
    }

    pub(crate) fn not_finite(&self, name: &str) -> Error {
        let file = &self.files[self.place(name).file].name;
        FileError::corrupt(file, format!("tensor `{name}` holds values that are not numbers, or too large")).into()
    }

    /// What a matrix is kept in, if not in its own type.
    fn quantization(&self, matrix: &Matrix) -> Option<Quantization> {
        let asked = self.quantize.filter(|_| matrix.role != Role::Router)?;
        let form = match asked {
            Quantize::Q4K if matrix.role == Role::Inner && matrix.inputs.is_multiple_of(Quantization::Q4K.block()) => {
                Quantization::Q4K
            }
            Quantize::Q4K | Quantize::Q8_0 => Quantization::Q8_0,
        };
        matrix.inputs.is_multiple_of(form.block()).then_some(form)
    }

    /// What a part of a matrix is kept in if no fewer bits are asked for. A router's weights and an embedding's alone stay as they are.
    fn own(&self, matrix: &Matrix, name: &str) -> Kept {
        let multiplied = matches!(matrix.role, Role::Head | Role::Inner);
        match self.place(name).kind.kept() {
            Kept::Bf16 if multiplied && !self.exact && matrix.inputs.is_multiple_of(Kept::RUN) => Kept::BlockFloat,
            own => own,
        }
    }

    /// What each part of a matrix is kept in: with the fewer bits of what its file has and what is asked for.
    fn kept<'a>(&'a self, matrix: &'a Matrix) -> impl Iterator<Item = Kept> + 'a {
        let asked = self.quantization(matrix).map(Kept::Quantized);
        matrix.parts.iter().map(move |(name, outputs)| {
            let own = self.own(matrix, name);
            let bytes = |kept: &Kept| Kept::bytes(&[(*kept, *outputs as u64)], matrix.inputs as u64);
            asked.filter(|asked| bytes(asked) < bytes(&own)).unwrap_or(own)
        })
    }

    /// Bytes that a matrix takes in memory.
    pub(crate) fn held(&self, matrix: &Matrix) -> u64 {
        let outputs = matrix.parts.iter().map(|(_, outputs)| *outputs as u64);
        Kept::bytes(&self.kept(matrix).zip(outputs).collect::<Vec<_>>(), matrix.inputs as u64)
    }

    /// A matrix, packed.
    pub(crate) fn packed(&self, matrix: &Matrix, compute: &Compute) -> Result<Packed, Error> {
        let parts: Vec<_> = matrix.parts.iter().map(|(name, _)| self.tensor(name)).collect();
        let parts = parts.iter().zip(self.kept(matrix)).map(|((kind, bytes), kept)| Part { kept, kind: *kind, bytes });
        let packed = compute.packed(&parts.collect::<Vec<_>>(), matrix.inputs);
        for (name, _) in &matrix.parts {
            let place = self.place(name);
            self.files[place.file].bytes.release(place.start..place.start + place.len);
        }
        packed.map_err(|_| self.not_finite(&matrix.parts[0].0))
    }

    /// A vector as f32.
    pub(crate) fn vector(&self, name: &str) -> Result<Vec<f32>, Error> {
        let (kind, bytes) = self.tensor(name);
        widen(kind, &bytes).map_err(|_| self.not_finite(name))
    }

    /// The biases of a matrix, if it has some.
    pub(crate) fn bias(&self, matrix: &Matrix) -> Result<Option<Vec<f32>>, Error> {
        let mut bias = Vec::new();
        for (name, _) in matrix.biases() {
            bias.extend(self.vector(&name)?);
        }
        Ok(matrix.biased.then_some(bias))
    }

    pub(crate) fn linear(&self, matrix: &Matrix, compute: &Compute) -> Result<Linear, Error> {
        let (bias, weights) = (self.bias(matrix)?, Arc::new(self.packed(matrix, compute)?));
        Ok(Linear { weights, bias, compute: compute.clone() })
    }

    /// Bytes of all files of weights.
    pub(crate) fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes.len() as u64).sum()
    }

    /// Digest of the weights: name, length and content of each file. Of a large file 4 KiB in every 64 KiB: whatever
    /// changes a tensor as a whole, as training and merging do, changes some of it, and reading it is no second load.
    pub(crate) fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for WeightFile { name, header, bytes } in &self.files {
            hash.update((name.len() as u64).to_le_bytes());
            hash.update(name.as_bytes());
            hash.update((bytes.len() as u64).to_le_bytes());
            if bytes.len() <= WHOLE {
                hash.update(&**bytes);
                continue;
            }
            // The header is not sampled: it says what all the rest means.
            hash.update(&bytes[..*header]);
            for (i, stretch) in bytes.chunks(STRIDE).enumerate() {
                hash.update(&stretch[..PAGE.min(stretch.len())]);
                bytes.release(i * STRIDE..i * STRIDE + stretch.len());
            }
        }
        hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
    }
}
