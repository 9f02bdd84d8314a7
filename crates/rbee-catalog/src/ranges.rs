//! Which bytes of a file are there: sorted, disjoint, half-open ranges.

/// A set of byte positions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ranges(Vec<(u64, u64)>);

impl Ranges {
    /// Adds `start..end`.
    pub(crate) fn insert(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        // Those that overlap or touch it become one with it.
        let first = self.0.partition_point(|&(_, e)| e < start);
        let last = self.0.partition_point(|&(s, _)| s <= end);
        let joined = self.0[first..last].iter().fold((start, end), |(s, e), &(a, b)| (s.min(a), e.max(b)));
        self.0.splice(first..last, [joined]);
    }

    /// Takes `start..end` out.
    pub(crate) fn remove(&mut self, start: u64, end: u64) {
        let kept = self.0.iter().flat_map(|&(s, e)| [(s, e.min(start)), (s.max(end), e)]);
        self.0 = kept.filter(|(s, e)| s < e).collect();
    }

    /// How many positions there are.
    pub(crate) fn total(&self) -> u64 {
        self.0.iter().map(|(start, end)| end - start).sum()
    }

    /// The end of the range that has `at`, or `at` when none has it.
    pub(crate) fn end_from(&self, at: u64) -> u64 {
        let next = self.0.partition_point(|&(_, end)| end <= at);
        self.0.get(next).filter(|(start, _)| *start <= at).map_or(at, |&(_, end)| end)
    }

    /// The first gap at or after `at` and before `size`, at most `most` long.
    pub(crate) fn gap(&self, at: u64, size: u64, most: u64) -> Option<(u64, u64)> {
        let start = self.end_from(at);
        let next = self.0.partition_point(|&(s, _)| s <= start);
        let end = self.0.get(next).map_or(size, |&(s, _)| s).min(start.saturating_add(most)).min(size);
        (start < end).then_some((start, end))
    }

    /// The ranges in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.0.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_the_positions_that_were_put_in() {
        // Against a plain set, over every pair of small ranges put in one after another.
        let all: Vec<(u64, u64)> = (0..7).flat_map(|s| (s..8).map(move |e| (s, e))).collect();
        for &first in &all {
            for &second in &all {
                let mut ranges = Ranges::default();
                let mut set = std::collections::BTreeSet::new();
                for (s, e) in [first, second, (3, 4)] {
                    ranges.insert(s, e);
                    set.extend(s..e);
                }
                assert_eq!(ranges.iter().flat_map(|(s, e)| s..e).collect::<Vec<_>>(), Vec::from_iter(set.clone()));
                assert!(ranges.0.windows(2).all(|pair| pair[0].1 < pair[1].0), "{ranges:?}");
                assert_eq!(ranges.total(), set.len() as u64);
                let mut less = ranges.clone();
                less.remove(second.0, second.1);
                let want: Vec<u64> = set.iter().copied().filter(|p| *p < second.0 || *p >= second.1).collect();
                assert_eq!(less.iter().flat_map(|(s, e)| s..e).collect::<Vec<_>>(), want);
                for at in 0..9 {
                    let end = (at..).find(|p| !set.contains(p)).unwrap();
                    assert_eq!(ranges.end_from(at), end, "{ranges:?} from {at}");
                    let gap = (end < 8)
                        .then(|| (end, (end..8.min(end + 2)).find(|p| set.contains(p)).unwrap_or(8.min(end + 2))));
                    assert_eq!(ranges.gap(at, 8, 2), gap, "{ranges:?} from {at}");
                }
            }
        }
    }
}
