//! Weight matrices, packed once at load.
//!
//! A matrix of f32, f16 or bf16 stands in panels of [`PANEL`] columns (its outputs). Within a panel, for each input the weights of
//! all columns stand side by side, so a lone row reads one sequential stream and still has four independent chains of sums. One of
//! whole numbers stands in tiles of sixteen columns: [`crate::quantized`], [`crate::block_float`].

#![expect(unsafe_code, reason = "tasks write disjoint panels of one matrix")]

use std::sync::atomic::{AtomicBool, Ordering};

use bytemuck::{AnyBitPattern, NoUninit};
use half::{bf16, f16};

use crate::block_float;
use crate::ggml::{self, Blocks};
use crate::memory::Memory;
use crate::pool::{Pool, SharedOut};
use crate::quantized::{self, Quantization};
use crate::rounded::RUN;
use crate::simd::{Element, Isa, LANES};

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
    /// As whole numbers of twelve bits with an exponent for every 32 inputs.
    BlockFloat,
    /// With few bits.
    Quantized(Quantization),
}

impl Kept {
    /// Inputs that share an exponent or a scale: of [`Kept::BlockFloat`], and of the smallest blocks of few bits.
    pub const RUN: usize = RUN;

    /// Bytes of packed matrices of `k` inputs, one below the other: what each is kept in, and its outputs.
    pub fn bytes(parts: &[(Self, u64)], k: u64) -> u64 {
        let of = |(kept, n): (Self, u64)| match kept {
            Self::F32 => n.next_multiple_of(PANEL as u64) * k * 4,
            Self::F16 | Self::Bf16 => n.next_multiple_of(PANEL as u64) * k * 2,
            Self::BlockFloat => n.div_ceil(LANES as u64) * block_float::tile(k as usize) as u64,
            Self::Quantized(form) => n.div_ceil(LANES as u64) * form.tile(k as usize) as u64,
        };
        let segments = parts.chunk_by(|(a, _), (b, _)| a == b);
        segments.map(|parts| of((parts[0].0, parts.iter().map(|(_, n)| n).sum()))).sum()
    }
}

/// A packed weight matrix of `n` outputs by `k` inputs.
#[derive(Debug)]
pub struct Packed {
    pub(crate) n: usize,
    pub(crate) k: usize,
    /// One below the other.
    pub(crate) segments: Vec<Segment>,
}

/// Outputs that are kept in one thing.
#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) n: usize,
    pub(crate) kept: Kept,
    pub(crate) data: Memory,
}

/// A row-major matrix of little-endian bytes, and what it is to be kept in.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// What it becomes.
    pub kept: Kept,
    /// What its bytes are.
    pub kind: WeightType,
    /// Whole rows.
    pub bytes: &'a [u8],
}

impl<'a> Part<'a> {
    /// One that loses nothing: see [`WeightType::kept`].
    pub fn own(kind: WeightType, bytes: &'a [u8]) -> Self {
        Self { kept: kind.kept(), kind, bytes }
    }
}

/// The tiles of a matrix of whole numbers.
#[derive(Clone, Copy)]
pub(crate) struct Tiles<'a> {
    data: &'a [u8],
    bytes: usize,
}

impl<'a> Tiles<'a> {
    /// Tiles of so many bytes.
    pub(crate) fn new(data: &'a [u8], bytes: usize) -> Self {
        Self { data, bytes }
    }

    /// The tile of an output.
    fn of(self, output: usize) -> &'a [u8] {
        &self.data[output / LANES * self.bytes..][..self.bytes]
    }

    /// Bytes from one to the next.
    pub(crate) fn bytes(self) -> usize {
        self.bytes
    }

    /// # Safety
    /// There is such a tile.
    #[inline(always)]
    pub(crate) unsafe fn start(self, tile: usize) -> *const u8 {
        // SAFETY: the caller's.
        unsafe { self.data.as_ptr().add(tile * self.bytes) }
    }
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

/// A row of a file: its type and its bytes.
type Row<'a> = (WeightType, &'a [u8]);

/// Packs the rows of one panel that are stored as they are kept; `value` reads one weight, `finite` says whether it is a number.
fn copy<T: Element, const SIZE: usize>(
    rows: &[Row<'_>],
    panel: &mut [T],
    value: impl Fn([u8; SIZE]) -> T,
    finite: impl Fn(T) -> bool,
) -> Result<(), NotFinite> {
    let mut sound = true;
    for (column, (_, bytes)) in rows.iter().enumerate() {
        for (to, bytes) in panel[column..].iter_mut().step_by(PANEL).zip(bytes.as_chunks().0) {
            *to = value(*bytes);
            sound &= finite(*to);
        }
    }
    if sound { Ok(()) } else { Err(NotFinite) }
}

/// Packs the rows of one panel, of any types, by way of f32.
fn convert<T: Element>(rows: &[Row<'_>], panel: &mut [T]) -> Result<(), NotFinite> {
    for (column, (kind, bytes)) in rows.iter().enumerate() {
        for (to, value) in panel[column..].iter_mut().step_by(PANEL).zip(widen(*kind, bytes)?) {
            *to = T::narrow(value);
            if !to.widen().is_finite() {
                return Err(NotFinite);
            }
        }
    }
    Ok(())
}

/// Packs rows of `k` inputs in panels or tiles of so many rows, each of `unit` values, shared out over the pool's threads.
fn each<T: AnyBitPattern + NoUninit + Send>(
    pool: &mut Pool,
    rows: &[Row<'_>],
    (columns, unit): (usize, usize),
    pack: impl Fn(&[Row<'_>], &mut [T]) -> Result<(), NotFinite> + Sync,
) -> Result<Memory, NotFinite> {
    let units: Vec<_> = rows.chunks(columns).collect();
    let mut data = Memory::zeroed(units.len() * unit * size_of::<T>());
    let out = SharedOut::new(data.values_mut::<T>());
    let unsound = AtomicBool::new(false);
    pool.run(units.len(), &|i| {
        // SAFETY: this unit belongs to this task alone.
        let out = unsafe { out.part(i * unit..(i + 1) * unit) };
        if pack(units[i], out).is_err() {
            unsound.store(true, Ordering::Relaxed);
        }
    });
    if unsound.into_inner() { Err(NotFinite) } else { Ok(data) }
}

impl Packed {
    /// Packs matrices of `k` inputs, one below the other; the work is shared out over the pool's threads.
    ///
    /// # Errors
    /// When a weight is infinite or not a number, or too large for what it is kept in.
    ///
    /// # Panics
    /// When a matrix does not have whole rows of whole blocks ([`Quantization::block`]), or there are none; when the machine does
    /// not have the instruction set.
    pub fn new(pool: &mut Pool, isa: Isa, parts: &[Part<'_>], k: usize) -> Result<Self, NotFinite> {
        assert!(isa.is_here(), "this machine has no {isa:?}");
        let segments = parts.chunk_by(|a, b| a.kept == b.kept).map(|parts| Segment::new(pool, isa, parts, k));
        let segments = segments.collect::<Result<Vec<_>, _>>()?;
        assert!(!segments.is_empty(), "a matrix without rows");
        Ok(Self { n: segments.iter().map(|segment| segment.n).sum(), k, segments })
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
        self.segments.iter().map(|segment| segment.data.len() as u64).sum()
    }

    /// Row `i` (the weights of output `i`) as f32.
    ///
    /// # Panics
    /// When there is no such row, or `out` does not have `k` values.
    pub fn row(&self, i: usize, out: &mut [f32]) {
        assert!(i < self.n && out.len() == self.k, "row {i} of {} x {}", self.n, self.k);
        let mut row = i;
        for segment in &self.segments {
            if row < segment.n {
                return segment.row(row, out);
            }
            row -= segment.n;
        }
    }
}

impl Segment {
    fn new(pool: &mut Pool, isa: Isa, parts: &[Part<'_>], k: usize) -> Result<Self, NotFinite> {
        let rows: Vec<Row<'_>> = parts
            .iter()
            .flat_map(|Part { kind, bytes, .. }| {
                let row = kind.row(k);
                assert!(
                    row > 0 && bytes.len().is_multiple_of(row),
                    "{} bytes are not rows of {k} {kind:?}",
                    bytes.len()
                );
                bytes.chunks_exact(row).map(|bytes| (*kind, bytes))
            })
            .collect();
        assert!(!rows.is_empty(), "a matrix without rows");
        let all = |of: WeightType| rows.iter().all(|(kind, _)| *kind == of);
        let (panel, kept) = ((PANEL, PANEL * k), parts[0].kept);
        let data = match kept {
            Kept::F32 if all(WeightType::F32) => {
                each(pool, &rows, panel, |rows, out| copy(rows, out, f32::from_le_bytes, f32::is_finite))
            }
            Kept::F16 if all(WeightType::F16) => {
                each(pool, &rows, panel, |rows, out| copy(rows, out, f16::from_le_bytes, f16::is_finite))
            }
            Kept::Bf16 if all(WeightType::Bf16) => {
                each(pool, &rows, panel, |rows, out| copy(rows, out, bf16::from_le_bytes, bf16::is_finite))
            }
            Kept::F32 => each(pool, &rows, panel, convert::<f32>),
            Kept::F16 => each(pool, &rows, panel, convert::<f16>),
            Kept::Bf16 => each(pool, &rows, panel, convert::<bf16>),
            Kept::BlockFloat => {
                assert!(k.is_multiple_of(RUN), "rows of {k} are not runs of {RUN}");
                each(pool, &rows, (LANES, block_float::tile(k)), |rows, out| block_float::pack(isa, rows, k, out))
            }
            Kept::Quantized(form) => {
                assert!(k.is_multiple_of(form.block()), "rows of {k} are not blocks of {form:?}");
                each(pool, &rows, (LANES, form.tile(k)), |rows, out| quantized::pack(form, rows, k, out))
            }
        };
        Ok(Self { n: rows.len(), kept, data: data? })
    }

    /// They, of a matrix that stands in such.
    pub(crate) fn tiles(&self) -> Tiles<'_> {
        let data: &[u8] = self.data.values();
        Tiles::new(data, data.len() / self.n.div_ceil(LANES))
    }

    fn row(&self, i: usize, out: &mut [f32]) {
        fn gather<T: Element>(data: &[T], out: &mut [f32]) {
            for (out, value) in out.iter_mut().zip(data.iter().step_by(PANEL)) {
                *out = value.widen();
            }
        }
        let k = out.len();
        let base = (i / PANEL) * k * PANEL + i % PANEL;
        match self.kept {
            Kept::F32 => gather(&self.data.values::<f32>()[base..], out),
            Kept::F16 => gather(&self.data.values::<f16>()[base..], out),
            Kept::Bf16 => gather(&self.data.values::<bf16>()[base..], out),
            Kept::BlockFloat => block_float::read(self.tiles().of(i), i % LANES, out),
            Kept::Quantized(form) => quantized::read(form, self.tiles().of(i), i % LANES, out),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, bytes, values};

    const KINDS: [WeightType; 3] = [WeightType::F32, WeightType::F16, WeightType::Bf16];

    #[test]
    fn rows_come_back_and_matrices_of_two_types_lose_nothing() {
        let (k, one, two) = (33, values(1, 33 * 60), values(2, 33 * 10));
        let narrow = bytes(WeightType::Bf16, &two);
        let wide = bytes(WeightType::F32, &one);
        let parts = [Part::own(WeightType::F32, &wide), Part::own(WeightType::Bf16, &narrow)];
        let packed = testing::packed(&parts, k);
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
                assert_eq!(testing::packed(&[Part::own(kind, &bytes(kind, &values))], 8).err(), Some(NotFinite));
                assert_eq!(widen(kind, &bytes(kind, &values)).err(), Some(NotFinite));
            }
        }
    }
}
