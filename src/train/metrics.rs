//! How good a classification is.

use serde::{Deserialize, Serialize};

/// Counts of each true class (row) by each answer (column).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confusion(pub Vec<Vec<usize>>);

impl Confusion {
    pub fn new(classes: usize) -> Self {
        Confusion(vec![vec![0; classes]; classes])
    }

    pub fn add(&mut self, truth: usize, answer: usize) {
        self.0[truth][answer] += 1;
    }

    pub fn accuracy(&self) -> f64 {
        let right: usize = (0..self.0.len()).map(|c| self.0[c][c]).sum();
        right as f64 / self.0.iter().flatten().sum::<usize>().max(1) as f64
    }

    /// The mean of the classes' F1; a class that neither occurs nor is answered is left out, as in scikit-learn.
    pub fn macro_f1(&self) -> f64 {
        let scores = (0..self.0.len()).filter_map(|c| {
            let right = self.0[c][c];
            let (of_class, answered) =
                (self.0[c].iter().sum::<usize>(), self.0.iter().map(|row| row[c]).sum::<usize>());
            (of_class + answered > 0).then(|| 2.0 * right as f64 / (of_class + answered) as f64)
        });
        let scores: Vec<f64> = scores.collect();
        scores.iter().sum::<f64>() / scores.len().max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accuracy_and_f1() {
        let mut c = Confusion::new(3);
        for (truth, answer) in [(0, 0), (0, 0), (0, 1), (1, 1), (1, 0)] {
            c.add(truth, answer);
        }
        assert_eq!(c.accuracy(), 0.6);
        // F1 of class 0 is 2/3, of class 1 1/2; class 2 never occurs.
        assert!((c.macro_f1() - (2.0 / 3.0 + 0.5) / 2.0).abs() < 1e-12);
    }
}
