//! The arithmetic of a run.

use crate::train::{Account, Multiplied};

/// What is computed here, for readers.
pub const FORMULA: &str = "\
F  numbers of the decoder layers' matrices, and of the pairs beside them (LoRA)
B  those of the layers from the first trained one on
G  those that are trained
R  B where activations are computed again for the backward pass, else 0

FLOPs = tokens x 2 x (F + R + B + G)

2F   forward: a multiplication and an addition for each number and token
2B   backward to the activations: through frozen layers too (lora: all), but not below the first trained one
     (last-layers: only those; full: all)
2G   backward to the weights
head: each example goes through the base once, whatever the epochs: FLOPs = tokens of the examples x 2F

Left out of all methods: attention's products of activations, norms, DoRA's norms, the head, the embedding's
gradient, the optimiser, and evaluations.";

/// Of a token in a step.
fn per_token(m: &Multiplied) -> f64 {
    2.0 * (m.forward as f64 + m.again as f64 + m.backward as f64 + m.gradients as f64)
}

/// Of a run that has gone over so many tokens.
pub fn flops(account: &Account, tokens: usize) -> f64 {
    let m = &account.multiplied;
    if m.backward == 0 {
        return 2.0 * m.forward as f64 * account.example_tokens as f64;
    }
    per_token(m) * tokens as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hosting::methods::run::testing::account;

    #[test]
    fn the_formula() {
        let with = |forward, again, backward, gradients| {
            let mut account = account(&[(10, 100, 1, 2)]);
            account.multiplied = Multiplied { forward, again, backward, gradients };
            account.example_tokens = 40;
            flops(&account, 100)
        };
        // Everything is trained: three products of each number.
        assert_eq!(with(1000, 0, 1000, 1000), 100.0 * 6.0 * 1000.0);
        // Pairs of 10 numbers beside 1000 frozen ones.
        assert_eq!(with(1010, 0, 1010, 10), 100.0 * 2.0 * (1010.0 + 1010.0 + 10.0));
        // The last of ten layers.
        assert_eq!(with(1000, 0, 100, 100), 100.0 * 2.0 * 1200.0);
        assert_eq!(with(1000, 1000, 1000, 1000), 100.0 * 8.0 * 1000.0);
        // The head alone: once over the examples.
        assert_eq!(with(1000, 0, 0, 0), 40.0 * 2.0 * 1000.0);
    }
}
