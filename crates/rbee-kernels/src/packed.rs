//! Weight matrices, packed once at load.
//!
//! A matrix stands in panels of [`PANEL`] columns (its outputs). Within a panel, for each input the weights of all columns
//! stand side by side, so a lone row reads one sequential stream and still has four independent chains of sums.
//! [`Stored`] says how a kernel reads a panel; [`crate::quantized`] has the forms of few bits.

#![expect(unsafe_code, reason = "SIMD loads from raw pointers")]

use std::sync::atomic::{AtomicBool, Ordering};

use half::{bf16, f16};

use crate::ggml::{self, Blocks};
use crate::pool::{Pool, SharedOut};
use crate::quantized::{self, Q4K, Q8, Quantization};
use crate::simd::{Element, LANES, Lanes};

/// Columns of a panel.
pub(crate) const PANEL: usize = 64;

/// Vectors of a panel.
pub(crate) const VECTORS: usize = PANEL / LANES;

/// The type of stored weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightType {
    /// 4 bytes each.
    F32,
    /// 2 bytes each, IEEE half.
    F16,
    /// 2 bytes each, upper half of an f32.
    Bf16,
    /// Blocks of few bits, as ggml makes them.
    Blocks(Blocks),
}

impl WeightType {
    /// Bytes of a row of `k` weights, which is whole blocks.
    pub fn row(self, k: usize) -> usize {
        match self {
            Self::F32 => 4 * k,
            Self::F16 | Self::Bf16 => 2 * k,
            Self::Blocks(blocks) => k / blocks.weights() * blocks.bytes(),
        }
    }

    /// What weights of this type are kept in.
    pub fn kept(self) -> Kept {
        match self {
            Self::F32 => Kept::F32,
            Self::F16 => Kept::F16,
            Self::Bf16 => Kept::Bf16,
            Self::Blocks(blocks) => blocks.form().map_or(Kept::F16, Kept::Quantized),
        }
    }
}

/// What a packed matrix is kept in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// As f32.
    F32,
    /// As IEEE half.
    F16,
    /// As the upper half of an f32.
    Bf16,
    /// With few bits.
    Quantized(Quantization),
}

impl Kept {
    /// What matrices of these types, one below the other, are kept in: what each is kept in alone, if that is one; else all
    /// are f16 where all were blocks, whose values have fewer bits than that, and f32 where not.
    pub fn of(mut kinds: impl Iterator<Item = WeightType> + Clone) -> Self {
        let Some(first) = kinds.clone().next() else { return Self::F32 };
        let blocks = kinds.clone().all(|kind| matches!(kind, WeightType::Blocks(_)));
        match first.kept() {
            kept if kinds.all(|kind| kind.kept() == kept) => kept,
            _ if blocks => Self::F16,
            _ => Self::F32,
        }
    }

    /// Bytes of a packed matrix of `n` by `k`.
    pub fn bytes(self, n: u64, k: u64) -> u64 {
        let plain = |size: u64| n.next_multiple_of(PANEL as u64) * k * size;
        match self {
            Self::F32 => plain(4),
            Self::F16 | Self::Bf16 => plain(2),
            Self::Quantized(form) => {
                n.div_ceil(PANEL as u64) * (k / form.block() as u64) * form.panel(form.block()) as u64
            }
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) enum Data {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    Quantized(Quantization, Vec<u8>),
}

/// How the weights of a matrix stand in memory.
pub(crate) trait Stored: Copy + Sync {
    /// Where a run of inputs is.
    type At: Copy;
    /// What the inputs of a run share, for one vector of columns.
    type Scale<L: Lanes>: Copy;
    /// Inputs of a run; divides all there are.
    fn run(self) -> usize;
    /// # Safety
    /// There is such a panel, with such a run. So for all of these.
    unsafe fn at(self, panel: usize, run: usize) -> Self::At;
    /// # Safety
    /// As above, and there is such a vector; the instruction set of `L` is there.
    unsafe fn scale<L: Lanes>(at: Self::At, vector: usize) -> Self::Scale<L>;
    /// The weights of input `i` of the run, for one vector of columns.
    ///
    /// # Safety
    /// As above, and `i` is less than the run.
    unsafe fn load<L: Lanes>(at: Self::At, i: usize, vector: usize, scale: Self::Scale<L>) -> L;
}

/// Weights as they are, in one run of `k` inputs.
#[derive(Clone, Copy)]
pub(crate) struct Plain<'a, T> {
    pub(crate) data: &'a [T],
    pub(crate) k: usize,
}

impl<T: Element> Stored for Plain<'_, T> {
    type At = *const T;
    type Scale<L: Lanes> = ();

    #[inline(always)]
    fn run(self) -> usize {
        self.k
    }
    #[inline(always)]
    unsafe fn at(self, panel: usize, _: usize) -> *const T {
        // SAFETY: the caller's: each panel has `k` groups of 64 weights.
        unsafe { self.data.as_ptr().add(panel * self.k * PANEL) }
    }
    #[inline(always)]
    unsafe fn scale<L: Lanes>(_: *const T, _: usize) {}
    #[inline(always)]
    unsafe fn load<L: Lanes>(at: *const T, i: usize, vector: usize, (): ()) -> L {
        // SAFETY: the caller's.
        unsafe { L::load(at.add(i * PANEL + vector * LANES)) }
    }
}

/// A packed weight matrix of `n` outputs by `k` inputs.
#[derive(Clone, Debug)]
pub struct Packed {
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) data: Data,
}

/// Weights that are not numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotFinite;

/// The values of little-endian bytes as f32, whatever their type.
///
/// # Errors
/// When one is infinite or not a number.
pub fn widen(kind: WeightType, bytes: &[u8]) -> Result<Vec<f32>, NotFinite> {
    fn all<const SIZE: usize>(bytes: &[u8], value: impl Fn([u8; SIZE]) -> f32) -> Vec<f32> {
        bytes.as_chunks().0.iter().map(|bytes| value(*bytes)).collect()
    }
    let values = match kind {
        WeightType::F32 => all(bytes, f32::from_le_bytes),
        WeightType::F16 => all(bytes, |bytes| f16::from_le_bytes(bytes).to_f32()),
        WeightType::Bf16 => all(bytes, |bytes| bf16::from_le_bytes(bytes).to_f32()),
        WeightType::Blocks(blocks) => return ggml::widen(blocks, bytes),
    };
    if values.iter().all(|value| value.is_finite()) { Ok(values) } else { Err(NotFinite) }
}

/// Packs matrices of `k` inputs, one below the other; `value` reads one weight, `finite` says whether it is a number.
fn pack<T: Element, const SIZE: usize>(
    parts: &[(WeightType, &[u8])],
    n: usize,
    k: usize,
    value: impl Fn([u8; SIZE]) -> T,
    finite: impl Fn(T) -> bool,
) -> Result<Vec<T>, NotFinite> {
    let mut data = vec![T::default(); n.div_ceil(PANEL) * k * PANEL];
    let rows = parts.iter().flat_map(|(_, bytes)| bytes.chunks_exact(k * SIZE));
    let mut sound = true;
    for (row, bytes) in rows.enumerate() {
        let base = (row / PANEL) * k * PANEL + row % PANEL;
        for (to, bytes) in data[base..].iter_mut().step_by(PANEL).zip(bytes.as_chunks().0) {
            *to = value(*bytes);
            sound &= finite(*to);
        }
    }
    if sound { Ok(data) } else { Err(NotFinite) }
}

/// Packs matrices of `k` inputs of any types, row by row by way of f32.
fn pack_wide<T: Element>(
    parts: &[(WeightType, &[u8])],
    n: usize,
    k: usize,
    narrow: impl Fn(f32) -> T,
) -> Result<Vec<T>, NotFinite> {
    let mut data = vec![T::default(); n.div_ceil(PANEL) * k * PANEL];
    let rows = parts.iter().flat_map(|(kind, bytes)| bytes.chunks_exact(kind.row(k)).map(|row| (*kind, row)));
    for (row, (kind, bytes)) in rows.enumerate() {
        let base = (row / PANEL) * k * PANEL + row % PANEL;
        for (to, value) in data[base..].iter_mut().step_by(PANEL).zip(widen(kind, bytes)?) {
            *to = narrow(value);
            if !to.widen().is_finite() {
                return Err(NotFinite);
            }
        }
    }
    Ok(data)
}

impl Packed {
    /// Packs row-major matrices `[*, k]` of little-endian bytes, one below the other, in what [`Kept::of`] says.
    ///
    /// # Errors
    /// When a weight is infinite or not a number, in the type it is kept in.
    ///
    /// # Panics
    /// When a matrix does not have whole rows, or there are none.
    pub fn new(parts: &[(WeightType, &[u8])], k: usize) -> Result<Self, NotFinite> {
        let mut n = 0;
        for (kind, bytes) in parts {
            let row = kind.row(k);
            assert!(row > 0 && bytes.len().is_multiple_of(row), "{} bytes are not rows of {k} {kind:?}", bytes.len());
            n += bytes.len() / row;
        }
        assert!(n > 0, "a matrix without rows");
        let one = parts[0].0;
        let same = parts.iter().all(|(kind, _)| *kind == one);
        let data = match (Kept::of(parts.iter().map(|(kind, _)| *kind)), one) {
            (Kept::Quantized(form), _) => return Self::quantized(&mut Pool::new(1), form, parts, k),
            (_, WeightType::F32) if same => Data::F32(pack(parts, n, k, f32::from_le_bytes, f32::is_finite)?),
            (_, WeightType::F16) if same => Data::F16(pack(parts, n, k, f16::from_le_bytes, f16::is_finite)?),
            (_, WeightType::Bf16) if same => Data::Bf16(pack(parts, n, k, bf16::from_le_bytes, bf16::is_finite)?),
            (Kept::F16, _) => Data::F16(pack_wide(parts, n, k, f16::from_f32)?),
            (Kept::F32 | Kept::Bf16, _) => Data::F32(pack_wide(parts, n, k, |value| value)?),
        };
        Ok(Self { n, k, data })
    }

    /// Packs matrices as [`Packed::new`] does, with fewer bits; panels are shared out over the pool's threads.
    ///
    /// # Errors
    /// When a weight is infinite or not a number, or too large for the form.
    ///
    /// # Panics
    /// As [`Packed::new`], and when rows are not whole blocks ([`Quantization::block`]).
    pub fn quantized(
        pool: &mut Pool,
        quantization: Quantization,
        parts: &[(WeightType, &[u8])],
        k: usize,
    ) -> Result<Self, NotFinite> {
        assert!(k > 0 && k.is_multiple_of(quantization.block()), "rows of {k} are not blocks of {quantization:?}");
        let rows: Vec<(WeightType, &[u8])> = parts
            .iter()
            .flat_map(|(kind, bytes)| {
                let row = kind.row(k);
                assert!(bytes.len().is_multiple_of(row), "{} bytes are not rows of {k} {kind:?}", bytes.len());
                bytes.chunks_exact(row).map(|bytes| (*kind, bytes))
            })
            .collect();
        let n = rows.len();
        assert!(n > 0, "a matrix without rows");
        let panels: Vec<_> = rows.chunks(PANEL).collect();
        let bytes = quantization.panel(k);
        let mut data = vec![0; panels.len() * bytes];
        let out = SharedOut::new(&mut data);
        let unsound = AtomicBool::new(false);
        pool.run(panels.len(), &|i| {
            // SAFETY: this panel belongs to this task alone.
            let out = unsafe { out.part(i * bytes..(i + 1) * bytes) };
            if quantized::pack(quantization, panels[i], out).is_err() {
                unsound.store(true, Ordering::Relaxed);
            }
        });
        if unsound.into_inner() { Err(NotFinite) } else { Ok(Self { n, k, data: Data::Quantized(quantization, data) }) }
    }

    /// Outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bytes that these weights have in memory.
    pub fn held(&self) -> u64 {
        let bytes = match &self.data {
            Data::F32(data) => size_of_val(&data[..]),
            Data::F16(data) => size_of_val(&data[..]),
            Data::Bf16(data) => size_of_val(&data[..]),
            Data::Quantized(_, data) => data.len(),
        };
        bytes as u64
    }

    /// Row `i` (the weights of output `i`) as f32.
    ///
    /// # Panics
    /// When there is no such row, or `out` does not have `k` values.
    pub fn row(&self, i: usize, out: &mut [f32]) {
        assert!(i < self.n && out.len() == self.k, "row {i} of {} x {}", self.n, self.k);
        fn gather<T: Element>(data: &[T], out: &mut [f32]) {
            for (out, value) in out.iter_mut().zip(data.iter().step_by(PANEL)) {
                *out = value.widen();
            }
        }
        let base = (i / PANEL) * self.k * PANEL + i % PANEL;
        match &self.data {
            Data::F32(data) => gather(&data[base..], out),
            Data::F16(data) => gather(&data[base..], out),
            Data::Bf16(data) => gather(&data[base..], out),
            Data::Quantized(Quantization::Q8_0, data) => self.read(Q8 { data, k: self.k }, i, out),
            Data::Quantized(Quantization::Q4K, data) => self.read(Q4K { data, k: self.k }, i, out),
        }
    }

    fn read<S: Stored>(&self, stored: S, row: usize, out: &mut [f32]) {
        let (panel, vector, lane) = (row / PANEL, row % PANEL / LANES, row % LANES);
        for (run, out) in out.chunks_exact_mut(stored.run()).enumerate() {
            // SAFETY: `row` is one of the matrix's, so there are its panel and all runs of it.
            unsafe {
                let at = stored.at(panel, run);
                let scale = S::scale::<[f32; LANES]>(at, vector);
                for (i, out) in out.iter_mut().enumerate() {
                    *out = S::load(at, i, vector, scale)[lane];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{bytes, values};

    const KINDS: [WeightType; 3] = [WeightType::F32, WeightType::F16, WeightType::Bf16];

    #[test]
    fn rows_come_back_and_matrices_of_two_types_lose_nothing() {
        let (k, one, two) = (33, values(1, 33 * 60), values(2, 33 * 10));
        let narrow = bytes(WeightType::Bf16, &two);
        let packed = Packed::new(&[(WeightType::F32, &bytes(WeightType::F32, &one)), (WeightType::Bf16, &narrow)], k);
        let (packed, two) = (packed.unwrap(), widen(WeightType::Bf16, &narrow).unwrap());
        let mut row = vec![0.0; k];
        for i in 0..70 {
            packed.row(i, &mut row);
            assert_eq!(row, if i < 60 { &one[i * k..][..k] } else { &two[(i - 60) * k..][..k] });
        }
    }

    #[test]
    fn weights_that_are_no_numbers_are_refused() {
        for kind in KINDS {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut values = values(3, 8 * 5);
                values[17] = bad;
                assert_eq!(Packed::new(&[(kind, &bytes(kind, &values))], 8).err(), Some(NotFinite));
                assert_eq!(widen(kind, &bytes(kind, &values)).err(), Some(NotFinite));
            }
        }
    }
}
