//! Several adapters as one: their weighted sum, and the merges of PEFT's `LoraModel.add_weighted_adapter`.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

use crate::adapter::config::MAX_RANK;
use crate::adapter::generation::GenerationHasher;
use crate::adapter::{Adapter, Generation, LoraPair};
use crate::{Error, Result};

/// Adapters of a blend at most.
const MAX_PARTS: usize = 32;

/// Which adapters, how much of each, and how they are put together.
#[derive(Debug, Clone, PartialEq)]
pub struct Blend {
    /// Names and weights.
    parts: Vec<(String, f32)>,
    merge: Merge,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Merge {
    /// The sum of what the adapters add, exactly: PEFT's `cat`. Ranks may differ, and add up.
    Sum,
    /// The A and the B factors are merged by themselves, each weighted by the root of the adapter's weight and scale: as many
    /// ranks as each adapter has, which must be the same. Without pruning and election that is PEFT's `linear`.
    Factors { prune: Option<Prune>, elect: Option<Election> },
}

/// Which numbers of an adapter take part.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Prune {
    /// This share of them, the largest (TIES, arXiv 2306.01708).
    Magnitude(f64),
    /// Each with this probability, and larger by as much (DARE, arXiv 2311.03099). The same ones for the same adapter.
    Random(f64),
}

/// How the sign of a merged number is chosen, after which only numbers of that sign count, as their mean (TIES).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Election {
    /// That of the sum.
    Total,
    /// That of the most.
    Frequency,
}

impl Merge {
    /// By PEFT's and LoRAX's name. `density` is the share of the numbers that takes part.
    pub fn named(name: &str, density: Option<f64>, election: Option<&str>) -> Result<Self> {
        let density = || match density {
            Some(density) if density > 0.0 && density <= 1.0 => Ok(density),
            Some(density) => Err(Error::bad_request(format!("density is {density}; expected more than 0, at most 1"))),
            None => Err(Error::bad_request(format!("{name} needs a density, more than 0 and at most 1"))),
        };
        let elect = || match election {
            None | Some("total") => Ok(Some(Election::Total)),
            Some("frequency") => Ok(Some(Election::Frequency)),
            Some(other) => Err(Error::bad_request(format!("{other:?} elects no sign; expected total or frequency"))),
        };
        let (prune, elect) = match name {
            "cat" => return Ok(Merge::Sum),
            "linear" => (None, None),
            "magnitude_prune" => (Some(Prune::Magnitude(density()?)), None),
            "ties" => (Some(Prune::Magnitude(density()?)), elect()?),
            "dare_linear" => (Some(Prune::Random(density()?)), None),
            "dare_ties" => (Some(Prune::Random(density()?)), elect()?),
            _ => {
                return Err(Error::bad_request(format!(
                    "{name:?} is no way to merge; supported: cat, linear, ties, dare_linear, dare_ties, magnitude_prune"
                )));
            }
        };
        Ok(Merge::Factors { prune, elect })
    }
}

impl Blend {
    pub fn new(parts: Vec<(String, f32)>, merge: Merge) -> Result<Self> {
        if !(1..=MAX_PARTS).contains(&parts.len()) {
            let what = format!("{} adapters are to be blended; expected 1 to {MAX_PARTS}", parts.len());
            return Err(Error::bad_request(what));
        }
        if let Some((name, weight)) = parts.iter().find(|(_, weight)| !weight.is_finite()) {
            return Err(Error::bad_request(format!("the weight of {name:?} is {weight}; expected a finite number")));
        }
        // Of a single one there is nothing to elect or to approximate, as PEFT has it too.
        let merge = if parts.len() == 1 { Merge::Sum } else { merge };
        Ok(Blend { parts, merge })
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().map(|(name, _)| name.as_str())
    }

    /// The same of adapters by other names.
    pub fn renamed(&self, name: impl Fn(&str) -> Result<String>) -> Result<Self> {
        let parts = self.parts.iter().map(|(old, weight)| Ok((name(old)?, *weight))).collect::<Result<_>>()?;
        Ok(Blend { parts, merge: self.merge })
    }

    /// The generation of the blend of adapters of these generations.
    pub(super) fn generation<'a>(&self, parts: impl Iterator<Item = &'a Generation>) -> Result<Generation> {
        let how = format!("blend {:?}", self.merge);
        GenerationHasher::over(self.parts.iter().zip(parts), |((_, weight), generation), hasher| {
            hasher.file(&format!("{how} {:08x} {generation}", weight.to_bits()), 0);
            Ok(())
        })
    }

    /// The blend of `adapters`, which are those of the names, in their order.
    ///
    /// Errors: `Unprocessable` where an adapter has what cannot be weighed, or ranks differ that have to be the same.
    pub(super) fn of(&self, adapters: Vec<Adapter>, generation: Generation) -> Result<Adapter> {
        let refuse = |what: String| Err(Error::unprocessable(what));
        for (name, adapter) in self.names().zip(&adapters) {
            if let Some(what) = adapter.beyond_pairs() {
                return refuse(format!("adapter {name:?} has {what}, which cannot be blended; supported: plain LoRA"));
            }
        }
        let mut heads = self.names().zip(&adapters).filter(|(_, adapter)| adapter.head.is_some());
        if let (Some((a, _)), Some((b, _))) = (heads.next(), heads.next()) {
            return refuse(format!("adapters {a:?} and {b:?} have a classification head each; a blend can have one"));
        }
        let mut blend = Adapter::new(generation);
        let sites: BTreeSet<_> = adapters.iter().flat_map(|adapter| adapter.pairs.keys().copied()).collect();
        for site in sites {
            let pairs = self.parts.iter().zip(&adapters).filter_map(|((_, weight), adapter)| {
                let (pair, origin) = (adapter.pairs.get(&site)?, adapter.generation.as_str());
                Some(Weighed { weight: *weight, pair, seed: format!("{origin} {site:?}") })
            });
            let pairs: Vec<Weighed> = pairs.collect();
            let pair = match self.merge {
                Merge::Sum => sum(&pairs),
                Merge::Factors { prune, elect } => factors(&pairs, prune, elect),
            };
            let (layer, projection) = site;
            blend.pairs.insert(site, pair.map_err(|e| e.context(format!("layer {layer}, {projection:?}")))?);
        }
        blend.head = adapters.into_iter().find_map(|adapter| adapter.head);
        Ok(blend)
    }
}

impl fmt::Display for Blend {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for (i, (name, weight)) in self.parts.iter().enumerate() {
            write!(f, "{}{weight}*{name}", if i > 0 { "+" } else { "" })?;
        }
        Ok(())
    }
}

/// A pair and how much of it.
struct Weighed<'a> {
    weight: f32,
    pair: &'a LoraPair,
    /// What its random numbers come from.
    seed: String,
}

/// `Σ weight scale B A`: the factors one beside the other.
fn sum(pairs: &[Weighed]) -> Result<LoraPair> {
    if let [Weighed { weight, pair, .. }] = pairs {
        return Ok(LoraPair { scale: weight * pair.scale, ..(*pair).clone() });
    }
    let rank = pairs.iter().map(|p| p.pair.rank).sum();
    if rank > MAX_RANK {
        return Err(Error::unprocessable(format!("the ranks add up to {rank}; the limit is {MAX_RANK}")));
    }
    let scaled = |p: &Weighed| p.pair.a.iter().map(|a| p.weight * p.pair.scale * a).collect::<Vec<f32>>();
    let outputs = pairs.first().map_or(0, |p| p.pair.b.len() / p.pair.rank);
    let row = |i: usize| pairs.iter().flat_map(move |p| &p.pair.b[i * p.pair.rank..][..p.pair.rank]);
    let (a, b) = (pairs.iter().flat_map(scaled).collect(), (0..outputs).flat_map(row).copied().collect());
    Ok(LoraPair { rank, scale: 1.0, a, b, bias: None, magnitude: None })
}

/// The factors merged number by number, as PEFT's `_generalized_task_arithmetic_weighted_adapter` does.
fn factors(pairs: &[Weighed], prune: Option<Prune>, elect: Option<Election>) -> Result<LoraPair> {
    let rank = pairs.first().map_or(0, |p| p.pair.rank);
    if let Some(other) = pairs.iter().find(|p| p.pair.rank != rank) {
        let what = format!("the ranks are {rank} and {}; this merge needs the same, cat does not", other.pair.rank);
        return Err(Error::unprocessable(what));
    }
    let merged = |numbers: fn(&LoraPair) -> &[f32], which: &str, signed: bool| {
        let weighed = pairs.iter().map(|p| {
            let amount = p.weight * p.pair.scale;
            // The sign goes to one of the factors, else it would be lost.
            let root = amount.abs().sqrt() * if signed && amount < 0.0 { -1.0 } else { 1.0 };
            (root, pruned(numbers(p.pair), prune, &format!("{} {which}", p.seed)))
        });
        merge(&weighed.collect::<Vec<_>>(), elect)
    };
    let (a, b) = (merged(|p| &p.a, "A", true), merged(|p| &p.b, "B", false));
    Ok(LoraPair { rank, scale: 1.0, a, b, bias: None, magnitude: None })
}

fn pruned<'a>(numbers: &'a [f32], prune: Option<Prune>, seed: &str) -> Cow<'a, [f32]> {
    match prune {
        Some(Prune::Magnitude(density)) if density < 1.0 => {
            let kept = (density * numbers.len() as f64) as usize;
            let mut order: Vec<usize> = (0..numbers.len()).collect();
            let larger = |i: &usize, j: &usize| numbers[*j].abs().total_cmp(&numbers[*i].abs()).then(i.cmp(j));
            if kept > 0 {
                order.select_nth_unstable_by(kept - 1, larger);
            }
            let mut out = vec![0.0; numbers.len()];
            order[..kept].iter().for_each(|&i| out[i] = numbers[i]);
            Cow::Owned(out)
        }
        Some(Prune::Random(density)) if density < 1.0 => {
            let mut rng = ChaCha8Rng::from_seed(Sha256::digest(seed).into());
            let keep = |x: &f32| if rng.random::<f64>() < density { x / density as f32 } else { 0.0 };
            Cow::Owned(numbers.iter().map(keep).collect())
        }
        _ => Cow::Borrowed(numbers),
    }
}

/// The weighted sum, or with an election the mean of the weighted numbers of the elected sign.
fn merge(tensors: &[(f32, Cow<[f32]>)], elect: Option<Election>) -> Vec<f32> {
    let len = tensors.first().map_or(0, |(_, t)| t.len());
    let Some(election) = elect else {
        return (0..len).map(|i| tensors.iter().map(|(w, t)| w * t[i]).sum()).collect();
    };
    let sign = |x: f32| if x == 0.0 { 0.0 } else { x.signum() };
    let one = |i: usize| {
        let vote = |x: f32| if election == Election::Total { x } else { sign(x) };
        let elected = if tensors.iter().map(|(_, t)| vote(t[i])).sum::<f32>() >= 0.0 { 1.0 } else { -1.0 };
        let of_sign = tensors.iter().filter(|(_, t)| sign(t[i]) == elected);
        let (sum, count) = of_sign.fold((0.0, 0), |(sum, count), (w, t)| (sum + w * t[i], count + 1));
        sum / count.max(1) as f32
    };
    (0..len).map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Projection;

    const SITE: (usize, Projection) = (0, Projection::Q);

    fn adapter(rank: usize, scale: f32, start: i32) -> Adapter {
        let numbers = |n: usize, from: i32| (0..n as i32).map(|i| ((i + from) % 7 - 3) as f32).collect::<Vec<f32>>();
        let mut adapter = Adapter::new(Generation::new(format!("{start}")));
        let (a, b) = (numbers(rank * 4, start), numbers(3 * rank, start + 2));
        adapter.pairs.insert(SITE, LoraPair { rank, scale, a, b, bias: None, magnitude: None });
        adapter
    }

    /// `scale B A`, `[3, 4]`.
    fn delta(pair: &LoraPair) -> Vec<f32> {
        let at =
            |i: usize, j: usize| (0..pair.rank).map(|r| pair.b[i * pair.rank + r] * pair.a[r * 4 + j]).sum::<f32>();
        (0..12).map(|n| pair.scale * at(n / 4, n % 4)).collect()
    }

    fn blend(parts: &[(f32, Adapter)], merge: Merge) -> Result<Adapter> {
        let names = parts.iter().enumerate().map(|(i, (weight, _))| (format!("a{i}"), *weight)).collect();
        let blend = Blend::new(names, merge)?;
        let generation = blend.generation(parts.iter().map(|(_, a)| &a.generation))?;
        blend.of(parts.iter().map(|(_, a)| a.clone()).collect(), generation)
    }

    #[test]
    fn a_sum_is_the_sum_of_what_is_added() {
        let parts = [(0.7, adapter(2, 2.0, 0)), (-1.5, adapter(5, 0.5, 3)), (1.0, adapter(1, 1.0, 5))];
        let sum = blend(&parts, Merge::Sum).unwrap();
        assert_eq!(sum.pairs[&SITE].rank, 8);
        for (i, got) in delta(&sum.pairs[&SITE]).into_iter().enumerate() {
            let want: f32 = parts.iter().map(|(weight, a)| weight * delta(&a.pairs[&SITE])[i]).sum();
            assert!((got - want).abs() < 1e-4, "{got}, not {want}");
        }
        // One alone keeps its numbers, which may fit half precision.
        let one = blend(&[(0.5, adapter(2, 2.0, 0))], Merge::named("ties", Some(0.5), None).unwrap()).unwrap();
        assert_eq!((one.pairs[&SITE].scale, &one.pairs[&SITE].a), (1.0, &adapter(2, 2.0, 0).pairs[&SITE].a));
    }

    #[test]
    fn what_an_adapter_does_not_change_takes_no_part() {
        let mut second = adapter(2, 1.0, 1);
        let pair = second.pairs.remove(&SITE).unwrap();
        second.pairs.insert((1, Projection::V), pair.clone());
        for merge in [Merge::Sum, Merge::named("linear", None, None).unwrap()] {
            let blend = blend(&[(1.0, adapter(2, 1.0, 0)), (4.0, second.clone())], merge).unwrap();
            assert_eq!(blend.pairs.len(), 2);
            let (got, want) = (delta(&blend.pairs[&(1, Projection::V)]), delta(&pair));
            got.iter().zip(want).for_each(|(g, w)| assert!((g - 4.0 * w).abs() < 1e-4));
        }
    }

    #[test]
    fn pruning_keeps_the_largest_or_a_fair_share() {
        let numbers = [0.5, -3.0, 2.0, 0.0, -2.0];
        assert_eq!(*pruned(&numbers, Some(Prune::Magnitude(0.4)), ""), [0.0, -3.0, 2.0, 0.0, 0.0]);
        assert_eq!(*pruned(&numbers, Some(Prune::Magnitude(0.1)), ""), [0.0; 5]);
        let ones = [1.0; 4000];
        let some = pruned(&ones, Some(Prune::Random(0.25)), "a");
        assert!(some.iter().all(|&x| x == 0.0 || x == 4.0));
        let mean = some.iter().sum::<f32>() / 4000.0;
        assert!((mean - 1.0).abs() < 0.15, "{mean}");
        assert_eq!(some, pruned(&ones, Some(Prune::Random(0.25)), "a"));
        assert_ne!(some, pruned(&ones, Some(Prune::Random(0.25)), "b"));
    }

    #[test]
    fn an_election_is_by_sum_or_by_number() {
        let tensors = [
            (1.0, Cow::Borrowed(&[-5.0, 1.0, 0.0][..])),
            (2.0, (&[1.0, 2.0, 0.0]).into()),
            (1.0, (&[1.0, -1.0, -1.0]).into()),
        ];
        assert_eq!(merge(&tensors, Some(Election::Total)), [-5.0, 2.5, -1.0]);
        assert_eq!(merge(&tensors, Some(Election::Frequency)), [1.5, 2.5, -1.0]);
        assert_eq!(merge(&tensors, None), [-2.0, 4.0, -1.0]);
    }

    #[test]
    fn what_cannot_be_blended_is_told() {
        let error = |parts: &[(f32, Adapter)], merge| blend(parts, merge).unwrap_err().message;
        let linear = Merge::named("linear", None, None).unwrap();
        assert!(error(&[(1.0, adapter(2, 1.0, 0)), (1.0, adapter(3, 1.0, 0))], linear).contains("ranks are 2 and 3"));
        let mut dora = adapter(2, 1.0, 0);
        dora.pairs.get_mut(&SITE).unwrap().magnitude = Some(vec![1.0; 3]);
        assert!(error(&[(1.0, dora)], Merge::Sum).contains("\"a0\" has DoRA's magnitudes"));
        assert!(error(&[(f32::NAN, adapter(1, 1.0, 0))], Merge::Sum).contains("NaN"));
        assert!(error(&[], Merge::Sum).contains("0 adapters"));
        for (name, density, election) in
            [("svd", None, None), ("ties", None, None), ("ties", Some(1.5), None), ("ties", Some(0.5), Some("x"))]
        {
            assert!(Merge::named(name, density, election).is_err(), "{name}");
        }
    }

    #[test]
    fn equal_blends_have_equal_generations() {
        let blend = |weight: f32, merge| Blend::new(vec![("a".into(), weight), ("b".into(), 1.0)], merge).unwrap();
        let [x, y] = ["x", "y"].map(|g| Generation::new(g.to_string()));
        let first = blend(0.5, Merge::Sum).generation([&x, &y].into_iter()).unwrap();
        assert_eq!(blend(0.5, Merge::Sum).generation([&x, &y].into_iter()).unwrap(), first);
        let linear = Merge::named("linear", None, None).unwrap();
        for other in [
            blend(0.25, Merge::Sum).generation([&x, &y].into_iter()).unwrap(),
            blend(0.5, linear).generation([&x, &y].into_iter()).unwrap(),
            blend(0.5, Merge::Sum).generation([&y, &x].into_iter()).unwrap(),
        ] {
            assert_ne!(other, first);
        }
    }
}
