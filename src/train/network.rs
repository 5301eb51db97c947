//! The base with what is trained in it.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use serde::{Deserialize, Serialize};

use super::gradients::Gradients;
use super::layer::{Layer, Pass};
use super::linear::{Dora, Linear, Lora, Weight};
use super::ops::{self, Rope, Targets};
use super::stack::{self, Aim};
use crate::adapter::{Adapter, LoraPair};
use crate::base::{Architecture, Base, Family, ModelConfig, Projection, Weights};
use crate::{Error, Result};

/// The family whose layers this network has.
pub const FAMILY: Family = Family::Llama;

/// Refuses a base whose layers are others than the network's, and one that could not be written out as what it is.
pub(super) fn check(config: &ModelConfig, method: &Method) -> Result<()> {
    let refuse = |what: String| Err(Error::unprocessable(format!("the base cannot be trained: {what}")));
    if config.family != FAMILY {
        return refuse(format!("it is a {}; supported: {FAMILY}", config.family));
    }
    if config.architecture != Architecture::of(FAMILY) {
        return refuse("its layers have biases or an activation other than silu; supported: neither".into());
    }
    let writes_model = matches!(method, Method::Full | Method::LastLayers(_));
    match &config.rope {
        Some(rope) if rope.attention_factor != 1.0 => refuse("its rope scales the attention".into()),
        Some(rope) if writes_model && rope.scaled => {
            refuse("its rope is scaled, which a new model's config.json would not say; adapters can be trained".into())
        }
        _ => Ok(()),
    }
}

/// Which numbers are trained. The head of a classification is trained with each of them.
#[derive(Debug, Clone, PartialEq)]
pub enum Method {
    /// Low-rank pairs beside frozen layers (arXiv 2106.09685).
    Lora(LoraOptions),
    /// The last so many decoder layers and the final norm.
    LastLayers(usize),
    /// Nothing but the head.
    Head,
    /// Everything.
    Full,
}

#[derive(Debug, Clone, PartialEq)]
pub struct LoraOptions {
    pub rank: usize,
    pub alpha: f64,
    /// The scale is `alpha / sqrt(rank)` instead of `alpha / rank` (arXiv 2312.03732).
    pub rslora: bool,
    /// Share of a pair's input that is left out at random, each step anew.
    pub dropout: f64,
    /// Whether magnitudes are trained beside the pairs (arXiv 2402.09353).
    pub dora: bool,
    pub targets: Vec<Projection>,
}

impl LoraOptions {
    pub fn scale(&self) -> f64 {
        self.alpha / if self.rslora { (self.rank as f64).sqrt() } else { self.rank as f64 }
    }
}

/// Sequences one after the other, without padding.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    pub tokens: Vec<u32>,
    /// How many of `tokens` each sequence has; none is 0.
    pub lengths: Vec<usize>,
}

impl Batch {
    pub fn push(&mut self, tokens: &[u32]) {
        self.tokens.extend_from_slice(tokens);
        self.lengths.push(tokens.len());
    }

    /// The row of each sequence's last token.
    fn ends(&self) -> Vec<u32> {
        let mut end = 0;
        self.lengths
            .iter()
            .map(|&n| {
                end += n as u32;
                end - 1
            })
            .collect()
    }
}

pub struct Network {
    config: ModelConfig,
    held: Held,
    embedding: Weight,
    layers: Vec<Arc<Layer>>,
    /// The first layer in which something is trained, or their number.
    first_trained: usize,
    norm: Weight,
    /// `None` where it is the embedding.
    lm_head: Option<Weight>,
    /// `[labels, hidden]`, for a classification.
    score: Option<Var>,
    checkpointing: bool,
}

/// How many numbers of the decoder layers' matrices each token of a step is multiplied with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Multiplied {
    /// In the forward pass.
    pub forward: usize,
    /// Where that is done a second time, for activations that were not kept.
    pub again: usize,
    /// In the backward pass through what comes after the first trained layer's input.
    pub backward: usize,
    /// For the gradients of the matrices that are trained.
    pub gradients: usize,
}

/// What a pass over a batch gives: a tensor, and where its gradients are found.
pub struct Passed {
    pub output: Tensor,
    layers: Option<Arc<Pass>>,
}

impl From<Tensor> for Passed {
    /// Of no layer.
    fn from(output: Tensor) -> Self {
        Passed { output, layers: None }
    }
}

/// What a pass over a batch is for.
pub enum Purpose<'a> {
    /// Its numbers alone.
    Evaluate,
    /// Gradients too, with random numbers for the dropout.
    Train(&'a mut ChaCha8Rng),
}

/// Where a network computes, and in what.
#[derive(Debug, Clone)]
pub struct Held {
    pub device: Device,
    /// Numbers of frozen matrices and of what passes through the layers. What is trained is f32, and so are norms, weights of
    /// attention, losses and gradients of what is trained (mixed precision, arXiv 1710.03740).
    pub dtype: DType,
}

impl Held {
    pub const CPU: Held = Held { device: Device::Cpu, dtype: DType::F32 };
}

struct Loader<'a> {
    weights: &'a Weights,
    held: &'a Held,
}

impl Loader<'_> {
    fn get(&self, name: &str, trained: bool) -> Result<Weight> {
        let raw = self.weights.get(name)?;
        let numbers = raw.to_f32().map_err(|e| e.context(name))?;
        let tensor = Tensor::from_vec(numbers, raw.shape.as_slice(), &self.held.device)?;
        let is_matrix = raw.shape.len() > 1;
        Ok(match trained {
            true => Weight::Trained(Var::from_tensor(&tensor)?),
            false => Weight::Frozen(if is_matrix { tensor.to_dtype(self.held.dtype)? } else { tensor }),
        })
    }
}

fn uniform(rng: &mut ChaCha8Rng, shape: (usize, usize), bound: f32, device: &Device) -> Result<Var> {
    let numbers: Vec<f32> = (0..shape.0 * shape.1).map(|_| rng.random_range(-bound..bound)).collect();
    Ok(Var::from_tensor(&Tensor::from_vec(numbers, shape, device)?)?)
}

pub(super) fn normal(rng: &mut ChaCha8Rng, shape: (usize, usize), deviation: f32, device: &Device) -> Result<Var> {
    let one = |_| deviation * rng.sample::<f32, _>(StandardNormal);
    let numbers: Vec<f32> = (0..shape.0 * shape.1).map(one).collect();
    Ok(Var::from_tensor(&Tensor::from_vec(numbers, shape, device)?)?)
}

impl Network {
    /// The base with fresh trained parts: A as `kaiming_uniform_(a=sqrt(5))` and B zero as in PEFT's
    /// `reset_lora_parameters`, a head of normal numbers of deviation 0.02 as transformers makes it. `labels` is the
    /// number of classes, for a classification.
    pub fn new(base: &Base, method: &Method, labels: Option<usize>, held: &Held, rng: &mut ChaCha8Rng) -> Result<Self> {
        let device = &held.device;
        let config = base.config.clone();
        check(&config, method)?;
        let loader = Loader { weights: &base.weights, held };
        let full = *method == Method::Full;
        let first_whole = match method {
            Method::Full => 0,
            Method::LastLayers(n) if *n == 0 || *n > config.layers => {
                let what =
                    format!("{n} last layers are to be trained; the base has {}, expected 1 to that", config.layers);
                return Err(Error::bad_request(what));
            }
            Method::LastLayers(n) => config.layers - n,
            Method::Lora(_) | Method::Head => config.layers,
        };
        let embedding = loader.get("model.embed_tokens.weight", full)?;
        let mut layers = Vec::with_capacity(config.layers);
        for l in 0..config.layers {
            let trained = l >= first_whole;
            let name = |part: &str| format!("model.layers.{l}.{part}.weight");
            let mut projections = BTreeMap::new();
            for projection in FAMILY.projections() {
                let weight = loader.get(&name(FAMILY.path(projection)), trained)?;
                let lora = match method {
                    Method::Lora(options) if options.targets.contains(&projection) => {
                        let (n, k) = config.shape(projection);
                        Some(Lora {
                            a: uniform(rng, (options.rank, k), 1.0 / (k as f32).sqrt(), device)?,
                            b: Var::zeros((n, options.rank), DType::F32, device)?,
                            scale: options.scale(),
                            dropout: options.dropout,
                            dora: options.dora.then(|| Dora::new(weight.tensor())).transpose()?,
                        })
                    }
                    _ => None,
                };
                projections.insert(projection, Linear { weight, lora });
            }
            layers.push(Arc::new(Layer {
                input_norm: loader.get(&name("input_layernorm"), trained)?,
                projections,
                post_norm: loader.get(&name("post_attention_layernorm"), trained)?,
                head_dim: config.head_dim,
                eps: config.norm_eps,
            }));
        }
        let norm = loader.get("model.norm.weight", first_whole < config.layers)?;
        let first_trained = if matches!(method, Method::Lora(_)) { 0 } else { first_whole };
        // A classification has no use for the output layer.
        let lm_head = match config.tie_word_embeddings || labels.is_some() {
            true => None,
            false => Some(loader.get("lm_head.weight", full)?),
        };
        let score = labels.map(|n| normal(rng, (n, config.hidden_size), 0.02, device)).transpose()?;
        let checkpointing = false;
        let held = held.clone();
        Ok(Network { config, held, embedding, layers, first_trained, norm, lm_head, score, checkpointing })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn device(&self) -> &Device {
        &self.held.device
    }

    /// What is trained, by the name it has in Hugging Face's and PEFT's files (without PEFT's prefix), in a fixed order.
    pub fn trained(&self) -> Vec<(String, &Var)> {
        let mut all = Vec::new();
        fn add<'a>(all: &mut Vec<(String, &'a Var)>, name: String, weight: &'a Weight) {
            if let Weight::Trained(v) = weight {
                all.push((name, v));
            }
        }
        add(&mut all, "model.embed_tokens.weight".into(), &self.embedding);
        for (l, layer) in self.layers.iter().enumerate() {
            let name = |part: &str, end: &str| format!("model.layers.{l}.{part}.{end}");
            add(&mut all, name("input_layernorm", "weight"), &layer.input_norm);
            for (&projection, linear) in &layer.projections {
                add(&mut all, name(FAMILY.path(projection), "weight"), &linear.weight);
                if let Some(lora) = &linear.lora {
                    all.push((name(FAMILY.path(projection), "lora_A.weight"), &lora.a));
                    all.push((name(FAMILY.path(projection), "lora_B.weight"), &lora.b));
                    let magnitude = lora.dora.as_ref().map(|dora| &dora.magnitude);
                    all.extend(magnitude.map(|m| (name(FAMILY.path(projection), "lora_magnitude_vector"), m)));
                }
            }
            add(&mut all, name("post_attention_layernorm", "weight"), &layer.post_norm);
        }
        add(&mut all, "model.norm.weight".into(), &self.norm);
        if let Some(lm_head) = &self.lm_head {
            add(&mut all, "lm_head.weight".into(), lm_head);
        }
        all.extend(self.score.iter().map(|v| ("score.weight".to_string(), v)));
        all
    }

    /// All weights of the model and the head, by their Hugging Face names.
    pub fn all(&self) -> Vec<(String, Tensor)> {
        let mut all = vec![("model.embed_tokens.weight".to_string(), self.embedding.tensor().clone())];
        for (l, layer) in self.layers.iter().enumerate() {
            let mut add = |part: &str, weight: &Weight| {
                all.push((format!("model.layers.{l}.{part}.weight"), weight.tensor().clone()));
            };
            add("input_layernorm", &layer.input_norm);
            layer.projections.iter().for_each(|(&projection, linear)| add(FAMILY.path(projection), &linear.weight));
            add("post_attention_layernorm", &layer.post_norm);
        }
        all.push(("model.norm.weight".into(), self.norm.tensor().clone()));
        all.extend(self.lm_head.iter().map(|w| ("lm_head.weight".to_string(), w.tensor().clone())));
        all.extend(self.score.iter().map(|v| ("score.weight".to_string(), v.as_tensor().clone())));
        all
    }

    /// Whether whole weights are trained, not only what was added to them.
    pub fn trains_weights(&self) -> bool {
        let added = |name: &str| name.contains(".lora_") || name == "score.weight";
        self.trained().iter().any(|(name, _)| !added(name))
    }

    /// Numbers of the base and of what was added to it.
    pub fn parameters(&self) -> usize {
        let added = self.trained().into_iter().filter(|(name, _)| name.contains(".lora_")).map(|(_, v)| v.elem_count());
        self.all().iter().map(|(_, t)| t.elem_count()).sum::<usize>() + added.sum::<usize>()
    }

    /// Whole layers count from the first trained one on, as if each product's gradient were needed. Where nothing but a head
    /// is trained, the layers have no part in a step.
    pub fn multiplied(&self) -> Multiplied {
        let mut sums = Multiplied { forward: 0, again: 0, backward: 0, gradients: 0 };
        for (l, layer) in self.layers.iter().enumerate() {
            for linear in layer.projections.values() {
                let whole = linear.weight.tensor().elem_count();
                let pair = linear.lora.as_ref().map_or(0, |lora| lora.a.elem_count() + lora.b.elem_count());
                sums.forward += whole + pair;
                sums.backward += if l >= self.first_trained { whole + pair } else { 0 };
                sums.gradients += pair + if let Weight::Trained(_) = linear.weight { whole } else { 0 };
            }
        }
        sums.again = if self.checkpointing { sums.backward } else { 0 };
        sums
    }

    /// Goes on from an adapter whose pairs have the shapes of these. A head is taken over where the classes are as many.
    pub fn start_from(&self, adapter: &Adapter) -> Result<()> {
        let set = |var: &Var, numbers: &[f32], what: &str| -> Result<()> {
            if var.elem_count() != numbers.len() {
                let found = numbers.len();
                return Err(Error::unprocessable(format!(
                    "the adapter to begin from has {found} numbers in {what}, expected {:?}; train with its rank and modules",
                    var.dims()
                )));
            }
            Ok(var.set(&Tensor::from_slice(numbers, var.shape(), self.device())?)?)
        };
        if let Some(what) = adapter.beyond_dora() {
            return Err(Error::unprocessable(format!(
                "the adapter to begin from has {what}, which training does not go on with; supported: LoRA and DoRA"
            )));
        }
        for (l, layer) in self.layers.iter().enumerate() {
            for (&projection, linear) in &layer.projections {
                let what = format!("layer {l}, {}", FAMILY.path(projection));
                match (&linear.lora, adapter.pairs.get(&(l, projection))) {
                    (None, None) => {}
                    (Some(lora), Some(LoraPair { scale, a, b, magnitude, .. })) => {
                        set(&lora.a, a, &what)?;
                        set(&lora.b, b, &what)?;
                        match (&lora.dora, magnitude) {
                            (None, None) => {}
                            (Some(dora), Some(magnitude)) => set(&dora.magnitude, magnitude, &what)?,
                            (found, _) => {
                                let (here, there) =
                                    if found.is_some() { ("with", "without") } else { ("without", "with") };
                                return Err(Error::unprocessable(format!(
                                    "{what}: a pair {here} DoRA is to be trained, and the adapter to begin from is {there} it"
                                )));
                            }
                        }
                        // The product is what matters: another scale here is made up for in B.
                        let ratio = *scale as f64 / lora.scale;
                        if (ratio - 1.0).abs() > 1e-6 {
                            lora.b.set(&lora.b.affine(ratio, 0.0)?)?;
                        }
                    }
                    (found, _) => {
                        let (here, there) = if found.is_some() { ("a", "no") } else { ("no", "a") };
                        return Err(Error::unprocessable(format!(
                            "{what}: {here} pair is to be trained, and the adapter to begin from has {there} pair; train with \
                             its modules"
                        )));
                    }
                }
            }
        }
        match (&self.score, &adapter.head) {
            (Some(score), Some(head)) if head.weight.len() == score.elem_count() => set(score, &head.weight, "score"),
            _ => Ok(()),
        }
    }

    /// From now on keeps only the layers' inputs for a backward pass and computes the rest again: less memory, more time.
    ///
    /// Errors: a network that does not compute in f32 on a CPU, whose graph is candle's.
    pub fn checkpoint_activations(&mut self) -> Result<()> {
        if !self.held.device.is_cpu() || self.held.dtype != DType::F32 {
            return Err(Error::bad_request("--checkpoint-activations works on a CPU only"));
        }
        self.checkpointing = true;
        Ok(())
    }

    /// Final hidden states, one row a token: `[rows, hidden]`.
    fn hidden(&self, batch: &Batch, purpose: Purpose) -> Result<Passed> {
        let c = &self.config;
        let rope = Rope::new(&batch.lengths, c.rope.as_ref().map_or(&[][..], |rope| &rope.frequencies));
        let (lengths, checkpointing) = (batch.lengths.clone(), self.checkpointing);
        let pass = Arc::new(Pass { lengths, rope, checkpointing, gradients: Gradients::default() });
        let tokens = Tensor::from_slice(&batch.tokens, batch.tokens.len(), self.device())?;
        let mut x = self.embedding.tensor().index_select(&tokens, 0)?.to_dtype(self.held.dtype)?;
        let evaluated = matches!(purpose, Purpose::Evaluate);
        if evaluated {
            x = x.detach();
        }
        let (frozen, trained) = self.layers.split_at(self.first_trained);
        x = stack::forward(frozen, &x, &pass, Aim::Output)?;
        let aim = match purpose {
            Purpose::Evaluate => Aim::Output,
            Purpose::Train(rng) => {
                let (noise, input) = (trained.iter().map(|_| rng.random()).collect(), x.track_op());
                if !input {
                    // candle's graph begins at a variable; layers hold theirs for themselves.
                    x = Var::from_tensor(&x)?.into_inner();
                }
                Aim::Gradients { noise, input }
            }
        };
        x = stack::forward(trained, &x, &pass, aim)?;
        let output = ops::rms_norm(&x, self.norm.tensor(), c.norm_eps)?;
        let output = if evaluated { output.detach() } else { output };
        Ok(Passed { output, layers: Some(pass) })
    }

    /// The final hidden state of each sequence's last token, in f32: `[sequences, hidden]`.
    pub fn pooled(&self, batch: &Batch, purpose: Purpose) -> Result<Passed> {
        let ends = Tensor::new(batch.ends(), self.device())?;
        self.hidden(batch, purpose)?.then(|x| Ok(x.index_select(&ends, 0)?.to_dtype(DType::F32)?))
    }

    /// Logits of the classes for pooled states: `[sequences, labels]`.
    pub fn logits(&self, pooled: &Tensor) -> Result<Tensor> {
        let score = self.score.as_ref().ok_or_else(|| Error::internal("the network has no head"))?;
        Ok(pooled.matmul(&score.t()?)?)
    }

    /// The weighted loss of a classification of pooled states, a scalar.
    pub fn classification_loss(&self, pooled: &Tensor, targets: &Targets) -> Result<Tensor> {
        Ok(ops::cross_entropy(&self.logits(pooled)?, targets)?)
    }

    /// The weighted loss of predicting `targets` at `rows` of the batch, a scalar.
    pub fn language_loss(&self, batch: &Batch, rows: &[u32], targets: &Targets, purpose: Purpose) -> Result<Passed> {
        let rows = Tensor::from_slice(rows, rows.len(), self.device())?;
        let evaluated = matches!(purpose, Purpose::Evaluate);
        let head = self.lm_head.as_ref().unwrap_or(&self.embedding).tensor();
        let head = if evaluated { head.detach() } else { head.clone() };
        let hidden = self.hidden(batch, purpose)?;
        hidden.then(|x| Ok(ops::linear_cross_entropy(&x.index_select(&rows, 0)?, &head, targets)?))
    }

    /// The gradients of a loss, contiguous, one a variable of [`Network::trained`]; `None` where it does not depend on the variable.
    pub fn gradients(&self, loss: &Passed) -> Result<Vec<Option<Tensor>>> {
        let mut found = loss.output.backward()?;
        let one = |(_, var): (String, &Var)| match found.remove(var) {
            Some(gradient) => Ok(Some(gradient.contiguous()?)),
            None => loss.layers.as_ref().map_or(Ok(None), |pass| pass.gradients.take(var)),
        };
        self.trained().into_iter().map(one).collect()
    }
}

impl Passed {
    /// Goes on from the output.
    pub fn then(self, f: impl FnOnce(Tensor) -> Result<Tensor>) -> Result<Passed> {
        Ok(Passed { output: f(self.output)?, layers: self.layers })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::path::{Path, PathBuf};

    use serde_json::Value;

    use super::*;
    use crate::train::random;

    fn folder() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny/llama")
    }

    fn json(name: &str) -> Value {
        serde_json::from_slice(&std::fs::read(folder().join(name)).unwrap()).unwrap()
    }

    fn base() -> Base {
        Base::open(folder().join("base").to_str().unwrap()).unwrap()
    }

    /// The prompts of the reference as one batch, and what follows each of their tokens.
    fn batch() -> (Batch, Vec<u32>, Targets) {
        let prompts: Vec<Vec<u32>> = serde_json::from_value(json("expected.json")["prompts"].clone()).unwrap();
        let (mut batch, mut rows, mut classes) = (Batch::default(), vec![], vec![]);
        for prompt in &prompts {
            let start = batch.tokens.len() as u32;
            rows.extend((0..prompt.len() as u32 - 1).map(|i| start + i));
            classes.extend_from_slice(&prompt[1..]);
            batch.push(prompt);
        }
        let weights = vec![1.0 / rows.len() as f32; rows.len()];
        (batch, rows, Targets { classes, weights, smoothing: 0.0 })
    }

    fn lora(rank: usize, alpha: f64, targets: &[Projection]) -> Method {
        Method::Lora(LoraOptions { rank, alpha, rslora: false, dropout: 0.0, dora: false, targets: targets.to_vec() })
    }

    /// The loss and every gradient are those of transformers and PEFT (`tests/tools/reference_gradients.py`).
    fn check(case: &str, network: &Network, loss: Passed) {
        let want = json("gradients.json")["losses"][case].as_f64().unwrap();
        let got = loss.output.to_scalar::<f32>().unwrap() as f64;
        assert!((got - want).abs() < 1e-4, "{case}: loss {got}, not {want}");
        let reference: HashMap<String, Tensor> =
            candle_core::safetensors::load(folder().join("gradients.safetensors"), &Device::Cpu).unwrap();
        let gradients = network.gradients(&loss).unwrap();
        let trained = network.trained();
        let expected = reference.keys().filter(|k| k.starts_with(&format!("{case}."))).count();
        assert_eq!(trained.len(), expected, "{case}");
        let mut worst = 0.0f32;
        for ((name, _), gradient) in trained.into_iter().zip(gradients) {
            let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let want = flat(&reference[&format!("{case}.{name}")]);
            let got = flat(&gradient.unwrap_or_else(|| panic!("{name} has no gradient")));
            let largest = want.iter().fold(0.0f32, |m, w| m.max(w.abs()));
            for (g, w) in got.iter().zip(&want) {
                assert!((g - w).abs() < 1e-3 * largest + 1e-7, "{case}: {name}: {g}, not {w}");
                worst = worst.max((g - w).abs() / largest.max(f32::MIN_POSITIVE));
            }
        }
        println!("{case}: loss {got} for {want}, gradients off by {worst:.1e} of their largest");
    }

    #[test]
    fn a_step_of_lora_is_pefts() {
        let base = base();
        let adapter = crate::adapter::load(&folder().join("adapter_all_r8"), &base.config, "").unwrap().adapter;
        let method = lora(8, 16.0, &FAMILY.projections().collect::<Vec<_>>());
        let mut network = Network::new(&base, &method, None, &Held::CPU, &mut random(0, "test", 0)).unwrap();
        network.start_from(&adapter).unwrap();
        let (batch, rows, targets) = batch();
        for _ in 0..2 {
            let mut rng = random(0, "test", 1);
            let loss = network.language_loss(&batch, &rows, &targets, Purpose::Train(&mut rng)).unwrap();
            check("generate", &network, loss);
            network.checkpoint_activations().unwrap();
        }
    }

    #[test]
    fn a_step_of_dora_is_pefts() {
        let base = base();
        let adapter = crate::adapter::load(&folder().join("adapter_dora_r4"), &base.config, "").unwrap().adapter;
        let mut targets: Vec<Projection> = adapter.pairs.keys().map(|(_, projection)| *projection).collect();
        targets.sort();
        targets.dedup();
        let pair = adapter.pairs.values().next().unwrap();
        let alpha = pair.rank as f64 * pair.scale as f64;
        let options = LoraOptions { rank: pair.rank, alpha, rslora: false, dropout: 0.0, dora: true, targets };
        let plain = Method::Lora(LoraOptions { dora: false, ..options.clone() });
        let new = |method: &Method| Network::new(&base, method, None, &Held::CPU, &mut random(0, "test", 0)).unwrap();
        assert!(new(&plain).start_from(&adapter).unwrap_err().message.contains("without DoRA"));
        let network = new(&Method::Lora(options));
        let (batch, rows, targets) = batch();
        let evaluate = |network: &Network| {
            let loss = network.language_loss(&batch, &rows, &targets, Purpose::Evaluate).unwrap();
            loss.output.to_scalar::<f32>().unwrap()
        };
        let fresh = (evaluate(&network), evaluate(&new(&plain)));
        assert!((fresh.0 - fresh.1).abs() < 1e-5, "fresh magnitudes change something: {fresh:?}");
        network.start_from(&adapter).unwrap();
        let mut rng = random(0, "test", 1);
        check("dora", &network, network.language_loss(&batch, &rows, &targets, Purpose::Train(&mut rng)).unwrap());
    }

    #[test]
    fn a_step_of_a_classification_is_pefts() {
        let base = base();
        let adapter = crate::adapter::load(&folder().join("adapter_seqcls"), &base.config, "").unwrap().adapter;
        let pair = adapter.pairs.values().next().unwrap();
        let method = lora(pair.rank, pair.rank as f64 * pair.scale as f64, &[Projection::Q, Projection::V]);
        let labels = adapter.head.as_ref().map(|h| h.labels.len());
        let network = Network::new(&base, &method, labels, &Held::CPU, &mut random(0, "test", 0)).unwrap();
        network.start_from(&adapter).unwrap();
        let classes: Vec<u32> = serde_json::from_value(json("gradients.json")["classes"].clone()).unwrap();
        let weights = vec![1.0 / classes.len() as f32; classes.len()];
        let mut rng = random(0, "test", 1);
        let pooled = network.pooled(&batch().0, Purpose::Train(&mut rng)).unwrap();
        let targets = Targets { classes, weights, smoothing: 0.0 };
        check("classify", &network, pooled.then(|p| network.classification_loss(&p, &targets)).unwrap());
    }

    #[test]
    fn a_step_of_everything_is_that_of_transformers() {
        let network = Network::new(&base(), &Method::Full, None, &Held::CPU, &mut random(0, "test", 0)).unwrap();
        let (batch, rows, targets) = batch();
        let mut rng = random(0, "test", 1);
        check("full", &network, network.language_loss(&batch, &rows, &targets, Purpose::Train(&mut rng)).unwrap());
    }

    /// On a CPU f16 takes the way that bf16 takes on a GPU: candle's operations, what is trained in f32.
    #[test]
    fn mixed_precision_is_close_to_f32() {
        let (base, (batch, rows, targets)) = (base(), batch());
        let half = Held { dtype: DType::F16, ..Held::CPU };
        let adapter = crate::adapter::load(&folder().join("adapter_dora_r4"), &base.config, "").unwrap().adapter;
        let pair = adapter.pairs.values().next().unwrap();
        let mut of_adapter: Vec<Projection> = adapter.pairs.keys().map(|(_, projection)| *projection).collect();
        of_adapter.sort();
        of_adapter.dedup();
        let dora = Method::Lora(LoraOptions {
            rank: pair.rank,
            alpha: pair.rank as f64 * pair.scale as f64,
            rslora: false,
            dropout: 0.0,
            dora: true,
            targets: of_adapter,
        });
        for (method, labels) in
            [(dora, None), (Method::Full, None), (Method::LastLayers(1), Some(3)), (Method::Head, Some(3))]
        {
            let run = |held: &Held| {
                let network = Network::new(&base, &method, labels, held, &mut random(0, "test", 0)).unwrap();
                if let Method::Lora(_) = method {
                    network.start_from(&adapter).unwrap();
                }
                assert!(network.trained().iter().all(|(_, v)| v.dtype() == DType::F32));
                let loss = match labels {
                    None => network.language_loss(&batch, &rows, &targets, Purpose::Train(&mut random(0, "test", 1))),
                    Some(_) => {
                        let pooled = network.pooled(&batch, Purpose::Train(&mut random(0, "test", 1))).unwrap();
                        let n = batch.lengths.len();
                        let targets = Targets {
                            classes: (0..n as u32).map(|i| i % 3).collect(),
                            weights: vec![1.0 / n as f32; n],
                            smoothing: 0.1,
                        };
                        pooled.then(|p| network.classification_loss(&p, &targets))
                    }
                };
                let loss = loss.unwrap();
                let value = loss.output.to_scalar::<f32>().unwrap();
                let flat = |t: Option<Tensor>| t.unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                (value, network.gradients(&loss).unwrap().into_iter().map(flat).collect::<Vec<_>>())
            };
            let (exact, mixed) = (run(&Held::CPU), run(&half));
            assert!((exact.0 - mixed.0).abs() < 1e-2 && exact.0 != mixed.0, "{method:?}: {} {}", exact.0, mixed.0);
            for (exact, mixed) in exact.1.iter().zip(&mixed.1) {
                let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
                let error = norm(&mut exact.iter().zip(mixed).map(|(a, b)| a - b));
                let size = norm(&mut exact.iter().copied());
                assert!(error < 2e-2 * size + 1e-6, "{method:?}: {error} of {size}");
            }
        }
    }

    #[test]
    fn a_fresh_pair_changes_nothing_and_the_last_layers_train_no_others() {
        let (base, (batch, rows, targets)) = (base(), batch());
        let loss = |method: &Method| {
            let network = Network::new(&base, method, None, &Held::CPU, &mut random(0, "test", 0)).unwrap();
            let names: Vec<String> = network.trained().into_iter().map(|(name, _)| name).collect();
            let loss = network.language_loss(&batch, &rows, &targets, Purpose::Evaluate).unwrap();
            (loss.output.to_scalar::<f32>().unwrap(), names)
        };
        let (full, _) = loss(&Method::Full);
        assert_eq!(loss(&lora(4, 8.0, &[Projection::Q])).0, full);
        let (last, names) = loss(&Method::LastLayers(1));
        assert_eq!(last, full);
        assert!(names.iter().all(|n| n.starts_with("model.layers.1.") || n == "model.norm.weight"), "{names:?}");
        assert_eq!(names.len(), 10);
        for n in [0, 3] {
            assert!(Network::new(&base, &Method::LastLayers(n), None, &Held::CPU, &mut random(0, "test", 0)).is_err());
        }
    }

    #[test]
    fn an_adapter_of_other_modules_or_rank_is_refused() {
        let base = base();
        let adapter = crate::adapter::load(&folder().join("adapter_all_r8"), &base.config, "").unwrap().adapter;
        for (method, part) in [
            (lora(4, 8.0, &FAMILY.projections().collect::<Vec<_>>()), "numbers"),
            (lora(8, 8.0, &[Projection::Q]), "modules"),
        ] {
            let network = Network::new(&base, &method, None, &Held::CPU, &mut random(0, "test", 0)).unwrap();
            let error = network.start_from(&adapter).unwrap_err();
            assert!(error.message.contains(part), "{error}");
        }
    }

    #[test]
    fn matrices_are_counted_from_the_first_that_is_trained() {
        let base = base();
        let count = |method: &Method| {
            let network = Network::new(&base, method, Some(2), &Held::CPU, &mut random(0, "test", 0)).unwrap();
            let Multiplied { forward, again, backward, gradients } = network.multiplied();
            [forward, again, backward, gradients]
        };
        let shapes = FAMILY.projections().map(|p| base.config.shape(p));
        let layer: usize = shapes.map(|(n, k)| n * k).sum();
        let all = layer * base.config.layers;
        assert!(base.config.layers > 1);
        assert_eq!(count(&Method::Full), [all, 0, all, all]);
        assert_eq!(count(&Method::LastLayers(1)), [all, 0, layer, layer]);
        assert_eq!(count(&Method::Head), [all, 0, 0, 0]);
        let (n, k) = base.config.shape(Projection::Q);
        let pairs = 4 * (n + k) * base.config.layers;
        assert_eq!(count(&lora(4, 8.0, &[Projection::Q])), [all + pairs, 0, all + pairs, pairs]);
        let mut network =
            Network::new(&base, &Method::LastLayers(1), Some(2), &Held::CPU, &mut random(0, "test", 0)).unwrap();
        network.checkpoint_activations().unwrap();
        assert_eq!(network.multiplied().again, layer);
    }

    #[test]
    fn a_base_that_the_network_does_not_compute_is_refused() {
        let tiny = folder().parent().unwrap().to_path_buf();
        let refusal = |model: &str, method: &Method| {
            let base = Base::open(tiny.join(model).join("base").to_str().unwrap()).unwrap();
            let network = Network::new(&base, method, None, &Held::CPU, &mut random(0, "test", 0));
            network.err().map(|e| e.message)
        };
        for model in ["mistral_window", "qwen2", "qwen3", "gemma2", "phi3", "gpt2"] {
            let error = refusal(model, &Method::Head).unwrap();
            let family = model.split('_').next().unwrap();
            assert!(error.contains(family) && error.contains("supported: llama"), "{error}");
        }
        assert_eq!(refusal("llama3_rope_untied", &lora(4, 8.0, &[Projection::Q])), None);
        assert!(refusal("llama3_rope_untied", &Method::Full).unwrap().contains("rope is scaled"));
        let mut base = base();
        base.config.architecture.qkv_bias = true;
        let network = Network::new(&base, &Method::Head, None, &Held::CPU, &mut random(0, "test", 0));
        assert!(network.err().unwrap().message.contains("biases"));
    }
}
