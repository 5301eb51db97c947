//! How long a step takes by how many tokens it computes, learned from the steps before.

/// What an observation weighs when the next one comes.
const MEMORY: f64 = 0.995;
/// Spread of the observed tokens, over their mean square, below which they tell nothing of a slope.
const SPREAD: f64 = 0.01;

/// The line `seconds = base + each * tokens` through what was observed, by weighted least squares of the relative errors, so
/// that short steps count as much as long ones. Older observations are forgotten.
#[derive(Debug, Default)]
pub struct StepCost {
    /// Weighted sums of 1, tokens, seconds, tokens² and tokens * seconds.
    sums: [f64; 5],
    /// `base` and `each`, once known.
    line: Option<(f64, f64)>,
}

impl StepCost {
    pub fn observe(&mut self, tokens: usize, seconds: f64) {
        if tokens == 0 || seconds <= 0.0 {
            return;
        }
        let (x, weight) = (tokens as f64, 1.0 / (seconds * seconds));
        for (sum, term) in self.sums.iter_mut().zip([1.0, x, seconds, x * x, x * seconds]) {
            *sum = *sum * MEMORY + weight * term;
        }
        let [n, x, y, xx, xy] = self.sums;
        let spread = n * xx - x * x;
        if spread > SPREAD * n * xx {
            let each = ((n * xy - x * y) / spread).max(0.0);
            // Through the mean, and no step takes less than nothing.
            self.line = Some((((y - each * x) / n).max(0.0), each));
        }
    }

    /// How many tokens more a step of `tokens` takes before it lasts more than `slowdown` times as long. `None` is any
    /// number, also where nothing is known yet.
    pub fn beside(&self, tokens: usize, slowdown: f64) -> Option<usize> {
        let (base, each) = self.line?;
        let more = (slowdown - 1.0) * (base + each * tokens as f64) / each;
        more.is_finite().then_some(more as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observed(steps: impl IntoIterator<Item = (usize, f64)>) -> StepCost {
        let mut cost = StepCost::default();
        steps.into_iter().for_each(|(tokens, seconds)| cost.observe(tokens, seconds));
        cost
    }

    #[test]
    fn the_room_beside_a_step_follows_from_the_line() {
        let cost = observed((1..200).map(|i| (i % 7 + 1, 6e-3 + 1e-3 * (i % 7 + 1) as f64)));
        // Alone 8 ms; half of it more are 4 ms, 4 tokens.
        let more = cost.beside(2, 1.5001).unwrap();
        assert_eq!(more, 4, "{cost:?}");
        assert_eq!(cost.beside(2, 1.0), Some(0));
        assert_eq!(cost.beside(2, f64::INFINITY), None);
    }

    #[test]
    fn equal_steps_tell_nothing_new() {
        let mut cost = observed((0..100).map(|i| (i % 2 * 9 + 1, if i % 2 == 0 { 2e-3 } else { 11e-3 })));
        assert_eq!(cost.beside(1, 2.01), Some(2));
        (0..5000).for_each(|_| cost.observe(10, 20e-3));
        // As long as steps of one token were remembered they had 2 ms, the longer ones now twice as much as before.
        assert_eq!(cost.beside(1, 2.01), Some(1));
        (0..5000).for_each(|_| cost.observe(10, 5e-3));
        assert_eq!(cost.beside(1, 2.01), Some(1));
        assert_eq!(observed((0..100).map(|_| (4, 5e-3))).beside(1, 2.0), None);
        assert_eq!(observed([(0, 1.0), (3, 0.0)]).beside(1, 2.0), None);
    }

    #[test]
    fn tokens_that_cost_nothing_have_no_bound() {
        // As on a GPU, within noise.
        let cost = observed((0..100).map(|i| (i % 30 + 1, 5e-3 - 1e-6 * (i % 30) as f64)));
        assert_eq!(cost.beside(2, 1.1), None);
    }

    #[test]
    fn what_changes_is_learned_again() {
        let line = |base: f64, each: f64| (0..2000).map(move |i| (i % 9 + 1, base + each * (i % 9 + 1) as f64));
        let cost = observed(line(1e-3, 1e-3).chain(line(9e-3, 1e-3)));
        assert!(cost.beside(1, 2.0).is_some_and(|more| (9..=10).contains(&more)), "{cost:?}");
    }
}
