//! Medians, tails and lines through measurements.

use serde::Serialize;

/// A number that was measured several times.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Spread {
    /// `None` of nothing.
    pub fn of(numbers: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut all: Vec<f64> = numbers.into_iter().filter(|x| x.is_finite()).collect();
        all.sort_by(f64::total_cmp);
        let (min, max) = (*all.first()?, *all.last()?);
        let middle = all.len() / 2;
        let median = if all.len().is_multiple_of(2) { (all[middle - 1] + all[middle]) / 2.0 } else { all[middle] };
        Some(Spread { median, min, max })
    }

    /// Whether the two have values in common.
    pub fn overlaps(&self, other: &Spread) -> bool {
        self.min <= other.max && other.min <= self.max
    }
}

/// The value that a share `q` of `numbers` does not exceed (nearest rank); `None` of nothing.
pub fn quantile(numbers: &[f64], q: f64) -> Option<f64> {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (q * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied()
}

/// The same of a tail, which takes one value at least beyond it: 20 for `q` of 0.95, 100 for 0.99.
pub fn tail(numbers: &[f64], q: f64) -> Option<f64> {
    // With room for what 1 - q is off by.
    let beyond = numbers.len() as f64 * (1.0 - q) + 1e-6;
    if beyond >= 1.0 { quantile(numbers, q) } else { None }
}

/// Of how many cases the ranges of two samples of `n` from one distribution are apart by chance in one: all orders of 2n values
/// are as likely as each other, and in two of C(2n, n) kinds of them one sample's come first.
pub fn chance(n: usize) -> f64 {
    (1..=n).map(|i| (n + i) as f64 / i as f64).product::<f64>() / 2.0
}

/// How often each of so many is chosen by Zipf's law: the nth n times less often than the first.
pub fn zipf(count: usize) -> impl Iterator<Item = f64> {
    (1..=count).map(|n| 1.0 / n as f64)
}

/// A line `at_zero + slope * x`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Line {
    pub at_zero: f64,
    pub slope: f64,
}

impl Line {
    /// The one through `points` with the least squares; `None` where they do not make a line.
    pub fn through(points: &[(f64, f64)]) -> Option<Self> {
        let n = points.len() as f64;
        let mean = |f: &dyn Fn(&(f64, f64)) -> f64| points.iter().map(f).sum::<f64>() / n;
        let (x, y) = (mean(&|p| p.0), mean(&|p| p.1));
        let (xx, xy) = (mean(&|p| (p.0 - x).powi(2)), mean(&|p| (p.0 - x) * (p.1 - y)));
        (xx > 0.0).then(|| Line { at_zero: y - xy / xx * x, slope: xy / xx })
    }

    pub fn at(&self, x: f64) -> f64 {
        self.at_zero + self.slope * x
    }

    /// The largest whole `x` at which the line, which goes up, is not above `y`; `None` where there is none or no largest.
    pub fn fits(&self, y: f64) -> Option<u64> {
        let x = (y - self.at_zero) / self.slope;
        (self.slope > 0.0 && x >= 0.0).then_some(x as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads_and_quantiles() {
        assert_eq!(Spread::of([3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(Spread::of([4.0, 1.0]).unwrap().median, 2.5);
        assert_eq!(Spread::of([f64::NAN]), None);
        let all: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!([0.0, 0.5, 0.95, 0.99, 1.0].map(|q| quantile(&all, q).unwrap()), [1.0, 50.0, 95.0, 99.0, 100.0]);
        assert_eq!(quantile(&[], 0.5), None);
        assert_eq!((tail(&all[..20], 0.95), tail(&all[..19], 0.95)), (Some(99.0), None));
        assert_eq!((tail(&all, 0.99), tail(&all[..99], 0.99)), (Some(99.0), None));
        let spread = |min, max| Spread { median: min, min, max };
        assert!(spread(1.0, 2.0).overlaps(&spread(2.0, 3.0)) && !spread(1.0, 2.0).overlaps(&spread(2.1, 3.0)));
    }

    #[test]
    fn ranges_part_by_chance() {
        assert_eq!([1, 2, 3, 4].map(|n| chance(n).round()), [1.0, 3.0, 10.0, 35.0]);
    }

    #[test]
    fn the_nth_is_n_times_rarer() {
        assert_eq!(zipf(4).collect::<Vec<_>>(), [1.0, 0.5, 1.0 / 3.0, 0.25]);
        assert_eq!(zipf(0).count(), 0);
    }

    #[test]
    fn a_line_is_found_and_told_how_far_it_fits() {
        let line = Line::through(&[(1.0, 5.0), (2.0, 7.0), (4.0, 11.0)]).unwrap();
        assert!((line.at_zero - 3.0).abs() < 1e-9 && (line.slope - 2.0).abs() < 1e-9, "{line:?}");
        assert_eq!(line.fits(10.0), Some(3));
        assert_eq!(line.fits(2.0), None);
        assert_eq!(Line { at_zero: 1.0, slope: 0.0 }.fits(5.0), None);
        assert_eq!(Line::through(&[(1.0, 5.0), (1.0, 6.0)]), None);
    }
}
