//! A classification head.

use serde_json::Value;

use super::labels;
use crate::base::{ModelConfig, RawTensor, Weights};
use crate::{Error, Result};

/// A trained classification head over the hidden state of the token that stands for the sequence: a decoder's last, or what
/// the pooler makes of an encoder's first.
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
    /// The head of a base that is a classification; `None` where it is none. `json` is its `config.json`.
    pub(super) fn of_base(weights: &Weights, config: &ModelConfig, json: &Value) -> Result<Option<Self>> {
        let (name, hidden) = (format!("{}.weight", config.family.names().head), config.hidden_size);
        let Some(raw) = weights.find(&name)? else { return Ok(None) };
        // The same tensor gives each token a class there.
        if let Some(kind) = json["architectures"][0].as_str().filter(|kind| kind.ends_with("ForTokenClassification")) {
            let what = format!("config.json: architectures is {kind:?}; expected one for sequence classification");
            return Err(Error::unprocessable(what));
        }
        let wrong = |name: &str, what: String| Error::unprocessable(format!("base weights: {name} {what}"));
        let rows = match raw.shape[..] {
            [1, columns] if columns == hidden => {
                let what =
                    "has one row: a regression or a reward model, which is not supported; expected two classes or more";
                return Err(wrong(&name, what.into()));
            }
            [rows, columns] if columns == hidden && rows > 0 => rows,
            _ => return Err(wrong(&name, format!("has shape {:?}; expected [labels, {hidden}]", raw.shape))),
        };
        let problem = &json["problem_type"];
        if !problem.is_null() && problem != "single_label_classification" {
            let what = "expected single_label_classification, whose probabilities add up to 1";
            return Err(Error::unprocessable(format!("config.json: problem_type is {problem}; {what}")));
        }
        let numbers = |name: &str, raw: RawTensor| -> Result<Vec<f32>> {
            let numbers = raw.to_f32().map_err(|e| e.context(name))?;
            match numbers.iter().find(|x| !x.is_finite()) {
                Some(number) => Err(wrong(name, format!("has the number {number}"))),
                None => Ok(numbers),
            }
        };
        let weight = numbers(&name, raw)?;
        let labels = match &json["id2label"] {
            Value::Null => labels::default_names(rows),
            named => labels::from_json(named).map_err(|e| e.context("config.json: id2label"))?,
        };
        if labels.len() != rows {
            return Err(wrong(&name, format!("has {rows} rows, and id2label of config.json {} names", labels.len())));
        }
        let name = format!("{}.bias", config.family.names().head);
        let bias = match weights.find(&name)? {
            Some(raw) if raw.shape != [rows] => {
                return Err(wrong(&name, format!("has shape {:?}; expected [{rows}], one a class", raw.shape)));
            }
            bias => bias.map(|raw| numbers(&name, raw)).transpose()?,
        };
        Ok(Some(Head { weight, bias, labels }))
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
