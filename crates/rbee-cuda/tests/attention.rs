//! Paged attention against double precision, on a GPU. Without one each test says so.

#![cfg(feature = "cuda")]
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "support.rs"]
mod support;

use half::bf16;
use rbee_cuda::{BLOCK, Error, Gpu, Heads, Kv, Padded, Partials, Picked, RopeTable, Rows, Scores, Stretch};
use support::{error, gpu, values};

const PLAIN: Scores = Scores { scale: 0.3, cap: None, window: None };

fn rounded(value: f32) -> f64 {
    f64::from(bf16::from_f32(value))
}

/// A stretch whose tokens do not matter.
fn stretch<'a>(start: usize, tokens: &'static [u32], blocks: &'a [u32]) -> Stretch<'a> {
    Stretch { tokens, start, blocks, shift: 0, picked: Picked::None }
}

static TOKENS: [u32; 1000] = [0; 1000];

/// Rows of positions of sequences; neighbours of one sequence become one stretch.
fn rows(gpu: &Gpu, heads: Heads, step: &[(usize, usize)], tables: &[Vec<u32>], padded: Option<Padded>) -> Rows {
    let mut stretches: Vec<(usize, usize, usize)> = Vec::new();
    for (sequence, position) in step {
        match stretches.last_mut() {
            Some((s, start, len)) if s == sequence && *start + *len == *position => *len += 1,
            _ => stretches.push((*sequence, *position, 1)),
        }
    }
    let width = tables.iter().map(Vec::len).max().unwrap();
    let stretches: Vec<Stretch> =
        stretches.iter().map(|(s, start, len)| stretch(*start, &TOKENS[..*len], &tables[*s])).collect();
    let room = padded.map_or(step.len(), |padded| padded.rows);
    let mut rows = Rows::new(gpu, room, stretches.len(), width).unwrap();
    rows.set(gpu, heads, &stretches, padded).unwrap();
    rows
}

/// Two sequences' blocks, in no order.
fn tables(positions: usize) -> [Vec<u32>; 2] {
    let blocks = positions.div_ceil(BLOCK) as u32;
    [(0..blocks).map(|i| 2 * (blocks - 1 - i)).collect(), (0..blocks).map(|i| 2 * i + 1).collect()]
}

struct Case {
    heads: Heads,
    scores: Scores,
    half: usize,
    positions: usize,
}

impl Case {
    fn width(&self) -> usize {
        (self.heads.queries + 2 * self.heads.kv) * self.heads.dim
    }

    /// q, k and v of a position of a sequence.
    fn qkv(&self, sequence: usize, position: usize) -> Vec<f32> {
        values(1 + (sequence * 100_000 + position) as u64, self.width())
    }

    fn angles(&self, position: usize) -> Vec<f32> {
        (0..self.half).map(|i| position as f32 / 10f32.powi(i as i32 % 4)).collect()
    }

    /// q, k and v after rope, rounded as the kernels round them.
    fn turned(&self, sequence: usize, position: usize) -> Vec<f64> {
        let (dim, angles) = (self.heads.dim, self.angles(position));
        let mut all = self.qkv(sequence, position);
        for head in all.chunks_exact_mut(dim).take(self.heads.queries + self.heads.kv) {
            let before = head.to_vec();
            for (i, angle) in angles.iter().enumerate() {
                let (a, b, cos, sin) = (before[i], before[i + self.half], angle.cos(), angle.sin());
                head[i] = a * cos - b * sin;
                head[i + self.half] = b * cos + a * sin;
            }
        }
        all.into_iter().map(rounded).collect()
    }

    /// What a row's attention is.
    fn want(&self, sequence: usize, position: usize) -> Vec<f64> {
        let Heads { queries, kv, dim } = self.heads;
        let first = self.scores.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let all: Vec<Vec<f64>> = (first..=position).map(|p| self.turned(sequence, p)).collect();
        let own = all.last().unwrap();
        let mut out = Vec::new();
        for head in 0..queries {
            let q = &own[head * dim..][..dim];
            let shared = head / (queries / kv);
            let score = |row: &Vec<f64>| {
                let k = &row[(queries + shared) * dim..][..dim];
                let score = q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() * f64::from(self.scores.scale);
                self.scores.cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
            };
            let scores: Vec<f64> = all.iter().map(score).collect();
            let high = scores.iter().copied().fold(f64::MIN, f64::max);
            let shares: Vec<f64> = scores.iter().map(|score| (score - high).exp()).collect();
            let total: f64 = shares.iter().sum();
            out.extend((0..dim).map(|i| {
                let v = |row: &Vec<f64>| row[(queries + kv + shared) * dim + i];
                all.iter().zip(&shares).map(|(row, share)| share * v(row)).sum::<f64>() / total
            }));
        }
        out
    }

    fn rope(&self, gpu: &Gpu) -> RopeTable {
        let angles: Vec<f32> = (0..self.positions).flat_map(|position| self.angles(position)).collect();
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|angle| (angle.cos(), angle.sin())).unzip();
        RopeTable::new(gpu, &cos, &sin, self.half).unwrap()
    }

    /// Computes rows of both sequences in steps; gives what the last step's rows are.
    fn run(&self, gpu: &Gpu, kv: &mut Kv, steps: &[Vec<(usize, usize)>]) -> Vec<f32> {
        self.run_with(gpu, kv, steps, None, usize::MAX)
    }

    /// The same with padding, and with room for the partial sums of so many rows.
    fn run_with(
        &self,
        gpu: &Gpu,
        kv: &mut Kv,
        steps: &[Vec<(usize, usize)>],
        padded: Option<Padded>,
        most: usize,
    ) -> Vec<f32> {
        let Heads { queries, dim, .. } = self.heads;
        let (tables, rope) = (tables(self.positions), self.rope(gpu));
        let mut got = Vec::new();
        for step in steps {
            let rows = rows(gpu, self.heads, step, &tables, padded);
            let mut qkv: Vec<f32> = step.iter().flat_map(|(s, p)| self.qkv(*s, *p)).collect();
            qkv.resize(rows.count() * self.width(), f32::NAN);
            let mut q = gpu.zeroed(rows.count() * queries * dim).unwrap();
            let mut out = gpu.zeroed(rows.count() * queries * dim).unwrap();
            let context = padded.map_or(self.positions, |padded| padded.parts * 256);
            let mut partials = Partials::new(gpu, self.heads, step.len().min(most), context).unwrap();
            kv.write(gpu, &rows, &rope, &gpu.upload(&qkv).unwrap(), &mut q).unwrap();
            kv.attend(gpu, &rows, self.scores, &q, &mut partials, &mut out).unwrap();
            got = gpu.download(&out).unwrap().iter().map(|value: &bf16| value.to_f32()).collect();
        }
        got
    }

    fn kv(&self, gpu: &Gpu) -> Kv {
        Kv::new(gpu, self.heads, 2 * self.positions.div_ceil(BLOCK)).unwrap()
    }
}

fn heads(queries: usize, kv: usize, dim: usize) -> Heads {
    Heads { queries, kv, dim }
}

#[test]
fn attention_agrees_with_double_precision() {
    let Some(gpu) = gpu("attention_agrees_with_double_precision") else { return };
    let cases = [
        (heads(1, 1, 32), 16, PLAIN),
        (heads(4, 2, 64), 32, PLAIN),
        (heads(9, 3, 64), 0, PLAIN),
        (heads(6, 6, 96), 24, PLAIN),
        (heads(16, 1, 128), 64, PLAIN),
        (heads(8, 2, 128), 64, Scores { cap: Some(2.0), ..PLAIN }),
        (heads(8, 4, 256), 128, Scores { window: Some(100), ..PLAIN }),
        (heads(4, 2, 64), 32, Scores { window: Some(1), ..PLAIN }),
    ];
    for (heads, half, scores) in cases {
        let case = Case { heads, scores, half, positions: 700 };
        let mut kv = case.kv(&gpu);
        let all: Vec<(usize, usize)> = (0..2).flat_map(|s| (0..699).map(move |p| (s, p))).collect();
        // Positions at the edges of blocks and partials, each computed in a step of its own with the other sequence's.
        let mut steps: Vec<Vec<(usize, usize)>> = all.chunks(100).map(<[_]>::to_vec).collect();
        let ends = [0, 1, 15, 16, 17, 99, 100, 255, 256, 257, 511, 512, 698];
        steps.push(ends.iter().flat_map(|end| [(0, *end), (1, 698 - *end)]).collect());
        let got = case.run(&gpu, &mut kv, &steps);
        let width = heads.queries * heads.dim;
        for ((sequence, position), got) in steps.last().unwrap().iter().zip(got.chunks_exact(width)) {
            let off = error(got, &case.want(*sequence, *position));
            assert!(off < 6e-3, "{heads:?} {scores:?} at {position} of {sequence}: {off}");
        }
    }
}

#[test]
fn a_row_attends_with_the_same_bits_in_any_step() {
    let Some(gpu) = gpu("a_row_attends_with_the_same_bits_in_any_step") else { return };
    for (heads, scores) in [(heads(8, 2, 128), PLAIN), (heads(4, 4, 64), Scores { window: Some(300), ..PLAIN })] {
        let case = Case { heads, scores, half: heads.dim / 2, positions: 600 };
        let all: Vec<(usize, usize)> = (0..600).map(|p| (0, p)).collect();
        let together = case.run(&gpu, &mut case.kv(&gpu), std::slice::from_ref(&all));
        let width = heads.queries * heads.dim;
        for cut in [1, 7, 256] {
            let steps: Vec<Vec<(usize, usize)>> = all.chunks(cut).map(<[_]>::to_vec).collect();
            let last = steps.last().unwrap().len();
            let got = case.run(&gpu, &mut case.kv(&gpu), &steps);
            assert!(got == together[(600 - last) * width..], "steps of {cut}");
        }
        let mut beside = all;
        beside.extend((0..77).map(|p| (1, p)));
        let among = case.run(&gpu, &mut case.kv(&gpu), &[beside.clone()]);
        assert!(among[..600 * width] == together, "beside another sequence");
        let piecewise = case.run_with(&gpu, &mut case.kv(&gpu), &[beside.clone()], None, 17);
        assert!(piecewise == among, "in pieces, for little room");
        let padded = Padded { rows: 700, parts: 5 };
        let filled = case.run_with(&gpu, &mut case.kv(&gpu), &[beside], Some(padded), usize::MAX);
        assert!(filled[..677 * width] == among, "padded");
        assert!(filled[677 * width..].iter().all(|value| *value == 0.0), "rows that nobody has");
    }
}

#[test]
fn what_reaches_beyond_the_kv_is_refused_before_a_launch() {
    let Some(gpu) = gpu("what_reaches_beyond_the_kv_is_refused_before_a_launch") else { return };
    for bad in [heads(4, 3, 64), heads(34, 2, 64), heads(4, 2, 48), heads(4, 0, 64)] {
        assert!(matches!(Kv::new(&gpu, bad, 2), Err(Error::Shape(_))), "{bad:?}");
    }
    let case = Case { heads: heads(4, 2, 64), scores: PLAIN, half: 32, positions: 32 };
    let mut room = Rows::new(&gpu, 8, 2, 20).unwrap();
    let mut set = |stretches: &[Stretch], padded| room.set(&gpu, case.heads, stretches, padded).is_ok();
    assert!(set(&[stretch(15, &TOKENS[..1], &[0])], None));
    assert!(!set(&[stretch(16, &TOKENS[..1], &[0])], None), "blocks that do not reach the position");
    assert!(!set(&[], None) && !set(&[stretch(0, &[], &[0])], None), "no rows");
    assert!(!set(&[stretch(0, &TOKENS[..9], &[0])], None), "more rows than there is room for");
    assert!(!set(&[stretch(0, &TOKENS[..1], &[0]); 3], None), "more sequences than there is room for");
    assert!(!set(&[stretch(0, &TOKENS[..1], &[0; 21])], None), "more blocks than there is room for");
    assert!(!set(&[stretch(300, &TOKENS[..1], &[0; 20])], Some(Padded { rows: 1, parts: 1 })), "beyond the partials");
    let mut kv = Kv::new(&gpu, case.heads, 2).unwrap();
    let (rope, qkv) = (case.rope(&gpu), gpu.upload(&case.qkv(0, 0)).unwrap());
    let (mut q, mut out) = (gpu.zeroed(4 * 64).unwrap(), gpu.zeroed(4 * 64).unwrap());
    let mut partials = Partials::new(&gpu, case.heads, 1, 32).unwrap();
    let mut both = |position: usize, table: &[u32]| {
        let rows = rows(&gpu, case.heads, &[(0, position)], &[table.to_vec()], None);
        let written = kv.write(&gpu, &rows, &rope, &qkv, &mut q).is_ok();
        (written, kv.attend(&gpu, &rows, PLAIN, &q, &mut partials, &mut out).is_ok())
    };
    assert_eq!(both(17, &[0, 1]), (true, true));
    assert_eq!(both(17, &[0, 2]), (false, false), "a block that is not there");
    assert_eq!(both(33, &[0, 1, 1]), (false, true), "a position that the rope has no angles for");
    assert_eq!(both(257, &[0; 17]), (false, false), "more partials than there is room for");
    gpu.wait().unwrap();
}
