//! How the learning rate goes over the steps.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    Constant,
    /// In a straight line to 0
    Linear,
    /// Half a cosine to 0
    Cosine,
}

/// The factor of the learning rate at `step` (from 0) of `steps`: up in a straight line over the first `warmup` steps, then
/// as `decay` says (transformers' `get_linear_schedule_with_warmup` and `get_cosine_schedule_with_warmup`).
pub fn factor(decay: Decay, step: usize, steps: usize, warmup: usize) -> f64 {
    if step < warmup {
        return step as f64 / warmup as f64;
    }
    let done = (step - warmup) as f64 / (steps - warmup).max(1) as f64;
    match decay {
        Decay::Constant => 1.0,
        Decay::Linear => (1.0 - done).max(0.0),
        Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn up_and_down() {
        let all = |decay| (0..6).map(|s| factor(decay, s, 6, 2)).collect::<Vec<_>>();
        assert_eq!(all(Decay::Linear), [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]);
        assert_eq!(all(Decay::Constant)[1..], [0.5, 1.0, 1.0, 1.0, 1.0]);
        assert!((all(Decay::Cosine)[4] - 0.5).abs() < 1e-12);
    }
}
