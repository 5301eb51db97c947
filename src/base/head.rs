//! A classification head.

use serde_json::Value;

use super::labels;
use crate::base::Weights;
use crate::{Error, Result};

/// What transformers calls it in the models that end in `ForSequenceClassification`.
const SCORE: &str = "score.weight";

/// A trained classification head over the last token's hidden state.
#[derive(Debug, Clone)]
pub struct Head {
    /// `[labels, hidden_size]`, row-major.
    pub weight: Vec<f32>,
    /// `[labels]`.
    pub bias: Option<Vec<f32>>,
    /// One name a row of `weight`.
    pub labels: Vec<String>,
}

impl Head {
    /// The head of a base that is a classification; `None` where it is none. `id2label` is that of its `config.json`.
    pub(super) fn of_base(weights: &Weights, hidden: usize, id2label: &Value) -> Result<Option<Self>> {
        let Some(raw) = weights.find(SCORE)? else { return Ok(None) };
        let wrong = |what: String| Err(Error::unprocessable(format!("base weights: {SCORE} {what}")));
        let rows = match raw.shape[..] {
            [rows, columns] if columns == hidden && rows > 0 => rows,
            _ => return wrong(format!("has shape {:?}; expected [labels, {hidden}]", raw.shape)),
        };
        let weight = raw.to_f32().map_err(|e| e.context(SCORE))?;
        if let Some(number) = weight.iter().find(|x| !x.is_finite()) {
            return wrong(format!("has the number {number}"));
        }
        let labels = match id2label {
            Value::Null => labels::default_names(rows),
            named => labels::from_json(named).map_err(|e| e.context("config.json: id2label"))?,
        };
        if labels.len() != rows {
            return wrong(format!("has {rows} rows, and id2label of config.json {} names", labels.len()));
        }
        Ok(Some(Head { weight, bias: None, labels }))
    }

    /// Logits `[labels]` for a final hidden state `[hidden_size]`.
    pub fn logits(&self, hidden: &[f32]) -> Vec<f32> {
        let dot = |row: &[f32]| row.iter().zip(hidden).map(|(w, x)| w * x).sum::<f32>();
        let logits = self.weight.chunks_exact(hidden.len()).map(dot);
        match &self.bias {
            None => logits.collect(),
            Some(bias) => logits.zip(bias).map(|(l, b)| l + b).collect(),
        }
    }
}
