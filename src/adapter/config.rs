//! PEFT's `adapter_config.json`: which modules an adapter changes, with which rank and scale.
//!
//! Follows `LoraConfig` of peft 0.21, whose defaults also cover older files with fewer fields. A field that would
//! change the result in a way that is not computed here is refused by its name, never ignored.

use std::collections::HashSet;
use std::fmt;
use std::time::{Duration, Instant};

use fancy_regex::{Regex, RegexBuilder};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::adapter::files::CONFIG;
use crate::base::labels;
use crate::base::{LM_HEAD, ModelConfig, Module};
use crate::error::shorten;
use crate::{Error, Result};

/// Largest rank accepted; published adapters stay far below.
pub(super) const MAX_RANK: usize = 4096;
/// Longest regular expression, in bytes.
const MAX_PATTERN: usize = 1024;
/// Most entries of `rank_pattern` or `alpha_pattern`: one a module is what EVA writes.
const MAX_PATTERNS: usize = 4096;
/// Most entries of `layers_pattern`.
const MAX_LAYERS_PATTERNS: usize = 16;
/// Most entries of a list of module names or layers.
const MAX_NAMES: usize = 1 << 16;
/// Far more than any vocabulary has.
const MAX_VOCABULARY: usize = 1 << 22;
/// Steps of one match of a pattern with look-around or back-references.
const BACKTRACK_LIMIT: usize = 10_000;
/// How long all regular expressions of one configuration may take together. Honest ones take milliseconds.
const PATIENCE: Duration = Duration::from_secs(2);

/// The classification heads that PEFT knows (`SEQ_CLS_HEAD_NAMES`).
pub(super) const HEADS: [&str; 2] = ["score", "classifier"];

/// Fields that only matter for training, initialisation or bookkeeping.
const IGNORED: [&str; 17] = [
    "auto_mapping",
    "corda_config",
    "eva_config",
    // How the base's weights lie, which the base itself says; PEFT corrects the field by that. A and B lie alike either way.
    "fan_in_fan_out",
    "inference_mode",
    "label2id",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "num_labels",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "init_ipex",
    "merge_weights",
];

/// Fields that change the result, and what they stand for. Off is only null or false, for a list of [`LISTS`] also an
/// empty one: to PEFT an empty object is a feature with its defaults.
const UNSUPPORTED: [(&str, &str); 10] = [
    ("layer_replication", "a stack of replicated layers"),
    ("alora_invocation_tokens", "activated LoRA"),
    ("target_parameters", "LoRA on parameters outside linear layers"),
    ("use_qalora", "QALoRA"),
    ("arrow_config", "Arrow routing"),
    ("use_bdlora", "block-diagonal LoRA"),
    ("velora_config", "VeLoRA"),
    ("kasa_config", "KaSA"),
    ("monteclora_config", "Monteclora"),
    ("megatron_config", "Megatron's parallel layers"),
];

/// Of these PEFT asks whether something is in them. axolotl always writes the second.
const LISTS: [&str; 2] = ["layer_replication", "target_parameters"];

/// Initialisations that leave the base as it is. The others move a part of the base's weights into A and B, so that
/// the saved A and B only fit the changed base; PEFT writes `true` here when it has converted such an adapter.
const HARMLESS_INITS: [&str; 4] = ["gaussian", "eva", "orthogonal", "mica"];
const MUTATING_INITS: [&str; 4] = ["pissa", "olora", "corda", "lora_ga"];

/// A choice of modules by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Modules {
    /// A regular expression over the full module name, or `all-linear`.
    Pattern(String),
    /// Full names, or what follows a dot in them.
    Names(Vec<String>),
}

impl Modules {
    fn is_all_linear(&self) -> bool {
        matches!(self, Modules::Pattern(p) if p.eq_ignore_ascii_case("all-linear"))
    }

    /// Which of `names` are meant (`check_target_module_exists` of PEFT).
    fn matches(&self, field: &str, names: &[&str], effort: &Effort) -> Result<Vec<bool>> {
        match self {
            Modules::Pattern(pattern) => {
                let regex = full_match(pattern).map_err(|e| bad(format!("{field}: {e}")))?;
                names.iter().map(|name| effort.is_match(&regex, field, name)).collect()
            }
            Modules::Names(list) => Ok(names
                .iter()
                .map(|name| {
                    list.iter().any(|item| {
                        name.strip_suffix(item.as_str()).is_some_and(|head| head.is_empty() || head.ends_with('.'))
                    })
                })
                .collect()),
        }
    }

    /// Whether this exact name is in the list.
    fn lists(&self, name: &str) -> bool {
        matches!(self, Modules::Names(list) if list.iter().any(|item| item == name))
    }
}

impl fmt::Display for Modules {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Modules::Pattern(pattern) => f.write_str(&shorten(&format!("{pattern:?}"), 200)),
            Modules::Names(names) => f.write_str(&shorten(&format!("{names:?}"), 200)),
        }
    }
}

/// A checked `adapter_config.json`.
#[derive(Debug, Clone)]
pub struct LoraConfig {
    /// `base_model_name_or_path`: what the adapter was trained on.
    pub base_model: Option<String>,
    pub task_type: Option<String>,
    pub r: usize,
    pub lora_alpha: f64,
    /// The scale is `alpha / sqrt(r)` instead of `alpha / r`.
    pub use_rslora: bool,
    /// In the order of the file; the first match wins.
    pub rank_pattern: Vec<(String, usize)>,
    pub alpha_pattern: Vec<(String, f64)>,
    pub target_modules: Modules,
    pub exclude_modules: Option<Modules>,
    /// `None` means every layer.
    pub layers_to_transform: Option<Vec<u64>>,
    pub layers_pattern: Vec<String>,
    pub modules_to_save: Vec<String>,
    pub use_dora: bool,
    /// lora_B has a bias.
    pub lora_bias: bool,
    pub bias: Bias,
    /// What happens to the embedding happens to a tied `lm_head` too.
    pub ensure_weight_tying: bool,
    /// Tokens whose rows are trained, by the end of the table's name (`None` is the embedding), in the order of the saved
    /// rows.
    pub trainable_tokens: Vec<(Option<String>, Vec<u32>)>,
    /// Class names by class number.
    pub id2label: Option<Vec<String>>,
}

/// Which of the base's biases an adapter brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bias {
    None,
    /// Those of the targeted modules.
    Targets,
    All,
}

/// A module of the base that the adapter adds a pair to.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Target {
    /// Full module path.
    pub name: String,
    pub module: Module,
    pub out_features: usize,
    pub in_features: usize,
    pub rank: usize,
    pub scale: f32,
}

impl LoraConfig {
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let value: Value = serde_json::from_slice(bytes).map_err(|e| bad(format!("not JSON: {e}")))?;
        let Value::Object(map) = value else {
            return Err(bad(format!("expected an object, found {}", describe(&value))));
        };
        let mut fields = Fields(map);
        match fields.string("peft_type")?.as_deref() {
            Some("LORA") => {}
            Some(other) => return Err(bad(format!("peft_type is {other:?}; supported: \"LORA\""))),
            None => return Err(bad("peft_type is missing; supported: \"LORA\"")),
        }
        fields.refuse_unsupported()?;
        fields.check_init()?;
        let target_modules = fields.modules("target_modules")?.ok_or_else(|| {
            bad("target_modules is missing or null; expected a list of module names, a regular expression or \
                 \"all-linear\"")
        })?;
        let config = LoraConfig {
            base_model: fields.string("base_model_name_or_path")?,
            task_type: fields.string("task_type")?,
            r: fields.take("r").map_or(Ok(8), |v| rank("r", &v))?,
            lora_alpha: fields.take("lora_alpha").map_or(Ok(8.0), |v| number("lora_alpha", &v))?,
            use_rslora: fields.boolean("use_rslora")?,
            rank_pattern: fields.patterns("rank_pattern", rank)?,
            alpha_pattern: fields.patterns("alpha_pattern", number)?,
            target_modules,
            exclude_modules: fields.modules("exclude_modules")?.filter(|m| match m {
                Modules::Pattern(p) => !p.is_empty(),
                Modules::Names(n) => !n.is_empty(),
            }),
            layers_to_transform: fields.layers()?,
            layers_pattern: match fields.take("layers_pattern") {
                Some(Value::String(one)) if !one.is_empty() => vec![one],
                Some(Value::String(_)) | None => vec![],
                Some(list) => strings("layers_pattern", list)?,
            },
            modules_to_save: fields.take("modules_to_save").map_or(Ok(vec![]), |v| strings("modules_to_save", v))?,
            use_dora: fields.boolean("use_dora")?,
            lora_bias: fields.boolean("lora_bias")?,
            bias: match fields.string("bias")?.as_deref() {
                None | Some("none") => Bias::None,
                Some("lora_only") => Bias::Targets,
                Some("all") => Bias::All,
                Some(other) => {
                    return Err(bad(format!("bias is {other:?}; expected \"none\", \"lora_only\" or \"all\"")));
                }
            },
            ensure_weight_tying: fields.boolean("ensure_weight_tying")?,
            trainable_tokens: fields.trainable_tokens()?,
            id2label: fields
                .take("id2label")
                .map(|v| labels::from_json(&v))
                .transpose()
                .map_err(|e| e.context(format!("{CONFIG}: id2label")))?,
        };
        fields.refuse_rest()?;
        config.checked()
    }

    /// What an adapter without a configuration is: plain pairs, each of its own rank, and modules saved whole. An alpha of 0
    /// stands for a scale of 1.
    pub(super) fn of_pairs(alpha: f64, pairs: Vec<(String, usize)>, saved: Vec<String>) -> Self {
        let alphas = pairs.iter().filter(|_| alpha == 0.0).map(|(name, rank)| (name.clone(), *rank as f64));
        LoraConfig {
            base_model: None,
            task_type: None,
            r: pairs.iter().map(|(_, rank)| *rank).max().unwrap_or(1),
            lora_alpha: alpha,
            use_rslora: false,
            alpha_pattern: alphas.collect(),
            target_modules: Modules::Names(pairs.iter().map(|(name, _)| name.clone()).collect()),
            rank_pattern: pairs,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: vec![],
            modules_to_save: saved,
            use_dora: false,
            lora_bias: false,
            bias: Bias::None,
            ensure_weight_tying: false,
            trainable_tokens: vec![],
            id2label: None,
        }
    }

    fn checked(self) -> Result<Self> {
        match self.task_type.as_deref() {
            None | Some("CAUSAL_LM" | "SEQ_CLS") => {}
            Some(other) => {
                return Err(bad(format!("task_type is {other:?}; supported: \"CAUSAL_LM\", \"SEQ_CLS\" or null")));
            }
        }
        if self.use_dora && self.lora_bias {
            return Err(bad("use_dora and lora_bias are both true; PEFT has no such adapters"));
        }
        let by_pattern = matches!(self.target_modules, Modules::Pattern(_));
        if by_pattern && self.layers_to_transform.is_some() {
            return Err(bad("layers_to_transform works only with a list of target_modules, not with a pattern"));
        }
        if self.layers_pattern.len() > MAX_LAYERS_PATTERNS {
            return Err(bad(format!(
                "layers_pattern has {} entries; at most {MAX_LAYERS_PATTERNS}",
                self.layers_pattern.len()
            )));
        }
        if !self.layers_pattern.is_empty() && self.layers_to_transform.is_none() {
            return Err(bad("layers_pattern is set without layers_to_transform"));
        }
        Ok(self)
    }

    pub fn is_sequence_classification(&self) -> bool {
        self.task_type.as_deref() == Some("SEQ_CLS")
    }

    /// Whether a trained head of this name may be in the file. PEFT adds the heads by itself for `SEQ_CLS`, and its
    /// older versions did not write that down.
    pub(super) fn saves_head(&self, name: &str) -> bool {
        self.is_sequence_classification() || self.modules_to_save.iter().any(|m| m == name)
    }

    /// Whether the module of this full name is saved as a whole: PEFT asks for the end of the name alone.
    pub(super) fn saves(&self, name: &str) -> bool {
        self.modules_to_save.iter().any(|end| name.ends_with(end.as_str()))
    }

    /// Tokens of a table whose rows are trained.
    pub(super) fn tokens_of(&self, table: &str, base: &ModelConfig) -> Option<&Vec<u32>> {
        let is_embedding = table == base.family.names().embedding;
        let listed = |end: &Option<String>| end.as_ref().map_or(is_embedding, |end| table.ends_with(end.as_str()));
        self.trainable_tokens.iter().find(|(end, _)| listed(end)).map(|(_, tokens)| tokens)
    }

    /// Refuses trained tokens of what is no table of the base, or is saved whole.
    pub(super) fn check_tokens(&self, base: &ModelConfig) -> Result<()> {
        let tables = [base.family.names().embedding, LM_HEAD];
        for end in self.trainable_tokens.iter().filter_map(|(end, _)| end.as_ref()) {
            if !tables.iter().any(|name| name.ends_with(end.as_str())) {
                return Err(bad(format!("trainable_token_indices names {end:?}; the base's tables are {tables:?}")));
            }
        }
        match tables.iter().find(|table| self.saves(table) && self.tokens_of(table, base).is_some()) {
            Some(table) => Err(bad(format!(
                "trainable_token_indices and modules_to_save both name {table}; a table is saved one way"
            ))),
            None => Ok(()),
        }
    }

    /// Whether `lm_head` is the embedding that is saved, on a base that ties them.
    pub(super) fn ties_saved(&self) -> bool {
        self.ensure_weight_tying && self.modules_to_save.iter().any(|m| is_table(m))
    }

    /// Whether the pair of `lm_head` is the embedding's, on a base that ties them.
    fn ties_targets(&self) -> bool {
        self.ensure_weight_tying
            && !self.ties_saved()
            && match &self.target_modules {
                Modules::Names(names) => names.iter().any(|name| is_table(name)),
                Modules::Pattern(pattern) => {
                    full_match(pattern).is_ok_and(|r| TABLES.iter().any(|name| r.is_match(name).unwrap_or(false)))
                }
            }
    }

    /// The base's modules that this adapter changes, in the order of the layers; the tables last. `vocab_size` is the
    /// adapter's.
    pub(super) fn targets(&self, base: &ModelConfig, vocab_size: usize) -> Result<Vec<Target>> {
        let effort = Effort::new();
        let linear = base.target_modules().into_iter().map(|m| {
            let shape = (m.out_features, m.in_features);
            (m.name, Module::Linear(m.layer, m.projection), shape)
        });
        let tables = [base.family.names().embedding, LM_HEAD];
        let embedding = (tables[0].to_string(), Module::Embedding, (base.hidden_size, vocab_size));
        let lm_head = (LM_HEAD.to_string(), Module::LmHead, (vocab_size, base.hidden_size));
        // `all-linear` means neither table. A sequence classifier has no lm_head for a pattern to match.
        let targets = match self.is_sequence_classification() {
            _ if self.target_modules.is_all_linear() => vec![],
            true => vec![embedding],
            false => vec![embedding, lm_head],
        };
        let all: Vec<_> = linear.chain(targets).collect();
        let names: Vec<&str> = all.iter().map(|(name, ..)| name.as_str()).collect();
        let mut chosen = self.chosen(&names, &effort)?;
        if let Some(positions) = base.family.names().positions.filter(|_| !self.target_modules.is_all_linear())
            && self.chosen(&[positions], &effort)? == [true]
        {
            return Err(bad(format!(
                "target_modules {} includes {positions}, learned positions, which is not supported",
                self.target_modules
            )));
        }
        if base.tie_word_embeddings && self.ties_targets() {
            let tables =
                all.iter().zip(&mut chosen).filter(|((_, module, _), _)| !matches!(module, Module::Linear(..)));
            tables.for_each(|(_, chosen)| *chosen = true);
        }
        if !chosen.contains(&true) {
            return Err(bad(format!(
                "target_modules {} (with layers_to_transform and exclude_modules) matches no module of the base; its \
                 modules are {} to {}, {} and {}",
                self.target_modules,
                names.first().unwrap_or(&"none"),
                names.iter().rfind(|name| !tables.contains(name)).unwrap_or(&"none"),
                tables[0],
                tables[1]
            )));
        }
        let names: Vec<&str> = names.iter().zip(&chosen).filter_map(|(name, chosen)| chosen.then_some(*name)).collect();
        let ranks = first_match("rank_pattern", &self.rank_pattern, &names, &effort)?;
        let alphas = first_match("alpha_pattern", &self.alpha_pattern, &names, &effort)?;
        let modules = all.iter().zip(&chosen).filter_map(|(module, chosen)| chosen.then_some(module));
        let scaled = modules.zip(ranks.into_iter().zip(alphas)).map(|((name, module, shape), (rank, alpha))| {
            let rank = rank.unwrap_or(self.r);
            let alpha = alpha.unwrap_or(self.lora_alpha);
            let scale = if self.use_rslora { alpha / (rank as f64).sqrt() } else { alpha / rank as f64 } as f32;
            if !scale.is_finite() {
                return Err(bad(format!("the scale of {name} (alpha {alpha}, rank {rank}) is not finite")));
            }
            if self.lora_bias && *module == Module::Embedding {
                return Err(bad(format!(
                    "lora_bias is true and target_modules includes {name}; PEFT has no such pairs"
                )));
            }
            let (name, (out_features, in_features)) = (name.clone(), *shape);
            Ok(Target { name, module: *module, out_features, in_features, rank, scale })
        });
        scaled.collect()
    }

    fn chosen(&self, names: &[&str], effort: &Effort) -> Result<Vec<bool>> {
        let mut chosen = if self.target_modules.is_all_linear() {
            vec![true; names.len()]
        } else {
            self.target_modules.matches("target_modules", names, effort)?
        };
        if let Some(layers) = &self.layers_to_transform {
            let indices = self.layer_indices(names, effort)?;
            for ((chosen, layer), name) in chosen.iter_mut().zip(indices).zip(names) {
                // PEFT asks for the layer only where a name is not given in full.
                *chosen &= layer.is_some_and(|layer| layers.contains(&layer)) || self.target_modules.lists(name);
            }
        }
        if let Some(excluded) = &self.exclude_modules {
            for (chosen, excluded) in chosen.iter_mut().zip(excluded.matches("exclude_modules", names, effort)?) {
                *chosen &= !excluded;
            }
        }
        // PEFT adds no pair to a module that is saved whole, nor in one.
        let saved: HashSet<&str> = self.modules_to_save.iter().map(String::as_str).collect();
        for (chosen, name) in chosen.iter_mut().zip(names) {
            *chosen &= !paths_in(name).any(|path| saved.contains(path));
        }
        Ok(chosen)
    }

    /// The layer number in each name: after one of `layers_pattern`, else the first number after any two parts.
    fn layer_indices(&self, names: &[&str], effort: &Effort) -> Result<Vec<Option<u64>>> {
        let field = "layers_pattern";
        let anywhere = [r".*?\.[^.]*\.(?P<idx>\d+)\.".to_string()];
        let named: Vec<String> =
            self.layers_pattern.iter().map(|p| format!(r"(?:^|.*?\.){p}\.(?P<idx>\d+)\.")).collect();
        let mut found = vec![None; names.len()];
        for pattern in if named.is_empty() { &anywhere[..] } else { &named[..] } {
            if found.iter().all(Option::is_some) {
                break;
            }
            let regex = compile(&format!(r"\A{pattern}")).map_err(|e| bad(format!("{field}: {e}")))?;
            for (name, found) in names.iter().zip(&mut found).filter(|(_, found)| found.is_none()) {
                effort.check(field)?;
                let captures = regex.captures(name).map_err(|e| bad(format!("{field} on {name}: {e}")))?;
                *found = captures.and_then(|c| c.name("idx")?.as_str().parse().ok());
            }
        }
        Ok(found)
    }
}

/// All that a name has between two dots, or a dot and an end: of `a.b.c` also `a`, `b`, `c`, `a.b` and `b.c`.
fn paths_in(name: &str) -> impl Iterator<Item = &str> {
    let starts = std::iter::once(0).chain(name.match_indices('.').map(|(at, _)| at + 1));
    starts.flat_map(move |start| {
        let ends = name[start..].match_indices('.').map(move |(at, _)| start + at).chain([name.len()]);
        ends.map(move |end| &name[start..end])
    })
}

/// The names by which PEFT knows the tables that a model may tie (`EMBEDDING_LAYER_NAMES`).
const TABLES: [&str; 2] = ["embed_tokens", "lm_head"];

fn is_table(name: &str) -> bool {
    TABLES.contains(&name.rsplit('.').next().unwrap_or(name))
}

/// For each name the value of the first pattern that matches its end: `re.match(rf"(.*\.)?({key})$", name)`
/// (`get_pattern_key` of PEFT). One pattern is compiled at a time, so memory stays small.
fn first_match<T: Copy>(
    field: &str,
    patterns: &[(String, T)],
    names: &[&str],
    effort: &Effort,
) -> Result<Vec<Option<T>>> {
    let mut found = vec![None; names.len()];
    for (key, value) in patterns {
        if found.iter().all(Option::is_some) {
            break;
        }
        let open = names.iter().zip(&mut found).filter(|(_, found)| found.is_none());
        if key.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'.')) {
            // One entry a module is what EVA writes; a plain name needs no automaton.
            open.filter(|(name, _)| ends_with(name, key)).for_each(|(_, found)| *found = Some(*value));
            continue;
        }
        effort.check(field)?;
        let regex = compile(&format!(r"\A(.*\.)?({key})$")).map_err(|e| bad(format!("{field} {key:?}: {e}")))?;
        for (name, found) in open {
            if effort.is_match(&regex, field, name)? {
                *found = Some(*value);
            }
        }
    }
    Ok(found)
}

/// Whether a name ends, from its beginning or a dot on, in what `key` describes; a dot in `key` stands for any character.
fn ends_with(name: &str, key: &str) -> bool {
    let Some(start) = name.len().checked_sub(key.len()) else { return false };
    let (head, tail) = name.as_bytes().split_at(start);
    head.last().is_none_or(|&c| c == b'.') && tail.iter().zip(key.as_bytes()).all(|(c, k)| c == k || *k == b'.')
}

/// Ends the matching of patterns that are made to take long.
struct Effort {
    start: Instant,
}

impl Effort {
    fn new() -> Self {
        Effort { start: Instant::now() }
    }

    fn check(&self, field: &str) -> Result<()> {
        if self.start.elapsed() > PATIENCE {
            return Err(bad(format!("{field}: its patterns take more than {} s to match", PATIENCE.as_secs())));
        }
        Ok(())
    }

    fn is_match(&self, regex: &Regex, field: &str, name: &str) -> Result<bool> {
        self.check(field)?;
        regex.is_match(name).map_err(|e| bad(format!("{field} on {name}: {e}")))
    }
}

/// `re.fullmatch`. The pattern is also compiled alone: it must not rely on the brackets put around it.
fn full_match(pattern: &str) -> Result<Regex, String> {
    compile(pattern)?;
    compile(&format!(r"\A(?:{pattern})\z"))
}

fn compile(pattern: &str) -> Result<Regex, String> {
    if pattern.len() > MAX_PATTERN {
        return Err(format!("a pattern of {} bytes; at most {MAX_PATTERN}", pattern.len()));
    }
    RegexBuilder::new(pattern)
        .backtrack_limit(BACKTRACK_LIMIT)
        .delegate_size_limit(1 << 20)
        .delegate_dfa_size_limit(1 << 20)
        .build()
        .map_err(|e| format!("not a regular expression that can be used: {e}"))
}

/// The fields of the file that have not been read yet.
struct Fields(Map<String, Value>);

impl Fields {
    /// `None` where the field is missing or null.
    fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name).filter(|v| !v.is_null())
    }

    fn string(&mut self, name: &str) -> Result<Option<String>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => Err(wrong_type(name, "a string", &other)),
        }
    }

    fn boolean(&mut self, name: &str) -> Result<bool> {
        match self.take(name) {
            None => Ok(false),
            Some(Value::Bool(b)) => Ok(b),
            Some(other) => Err(wrong_type(name, "true or false", &other)),
        }
    }

    fn modules(&mut self, name: &str) -> Result<Option<Modules>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(pattern)) => Ok(Some(Modules::Pattern(pattern))),
            Some(list @ Value::Array(_)) => Ok(Some(Modules::Names(strings(name, list)?))),
            Some(other) => Err(wrong_type(name, "a list of module names or a pattern", &other)),
        }
    }

    fn patterns<T>(&mut self, name: &str, read: impl Fn(&str, &Value) -> Result<T>) -> Result<Vec<(String, T)>> {
        match self.take(name) {
            None => Ok(vec![]),
            Some(Value::Object(map)) if map.len() > MAX_PATTERNS => {
                Err(bad(format!("{name} has {} entries; at most {MAX_PATTERNS}", map.len())))
            }
            Some(Value::Object(map)) => map
                .into_iter()
                .map(|(key, value)| read(&format!("{name}[{key:?}]"), &value).map(|value| (key, value)))
                .collect(),
            Some(other) => Err(wrong_type(name, "an object of patterns and numbers", &other)),
        }
    }

    /// A list of tokens is for the embedding.
    fn trainable_tokens(&mut self) -> Result<Vec<(Option<String>, Vec<u32>)>> {
        let name = "trainable_token_indices";
        let token = |v: &Value| {
            let token = v.as_u64().filter(|&token| token < MAX_VOCABULARY as u64);
            token.map(|t| t as u32).ok_or_else(|| wrong_type(name, &format!("tokens of 0 to {MAX_VOCABULARY}"), v))
        };
        let tokens = |list: &Value| {
            let Value::Array(items) = list else { return Err(wrong_type(name, "a list of tokens", list)) };
            let tokens = items.iter().map(token).collect::<Result<Vec<u32>>>()?;
            let mut sorted = tokens.clone();
            sorted.sort_unstable();
            match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
                Some(pair) => Err(bad(format!("{name} names the token {} twice", pair[0]))),
                None => Ok(tokens),
            }
        };
        match self.take(name) {
            None => Ok(vec![]),
            Some(Value::Object(map)) => map.iter().map(|(table, l)| Ok((Some(table.clone()), tokens(l)?))).collect(),
            Some(list) => Ok(vec![(None, tokens(&list)?)]),
        }
    }

    /// An empty list means every layer, as in PEFT.
    fn layers(&mut self) -> Result<Option<Vec<u64>>> {
        let name = "layers_to_transform";
        let index = |v: &Value| v.as_u64().ok_or_else(|| wrong_type(name, "layer numbers of 0 and more", v));
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(list)) if list.is_empty() => Ok(None),
            Some(Value::Array(list)) if list.len() > MAX_NAMES => {
                Err(bad(format!("{name} has {} entries; at most {MAX_NAMES}", list.len())))
            }
            Some(Value::Array(list)) => list.iter().map(index).collect::<Result<_>>().map(Some),
            Some(one) => Ok(Some(vec![index(&one)?])),
        }
    }

    fn refuse_unsupported(&mut self) -> Result<()> {
        for (name, meaning) in UNSUPPORTED {
            let off = |value: &Value| LISTS.contains(&name) && *value == Value::Array(vec![]);
            if let Some(value) = self.take(name).filter(|value| *value != Value::Bool(false) && !off(value)) {
                return Err(bad(format!("{name} is {}: {meaning} is not supported", describe(&value))));
            }
        }
        match self.string("problem_type")?.as_deref() {
            None | Some("single_label_classification") => Ok(()),
            Some(other) => {
                Err(bad(format!("problem_type is {other:?}; supported: \"single_label_classification\" or null")))
            }
        }
    }

    fn check_init(&mut self) -> Result<()> {
        let name = "init_lora_weights";
        let init = match self.take(name) {
            None | Some(Value::Bool(_)) => return Ok(()),
            Some(Value::String(init)) => init,
            Some(other) => return Err(wrong_type(name, "true, false or a name", &other)),
        };
        let lower = init.to_lowercase();
        if HARMLESS_INITS.contains(&lower.as_str()) {
            return Ok(());
        }
        if MUTATING_INITS.iter().any(|prefix| lower.starts_with(prefix)) {
            return Err(bad(format!(
                "{name} is {init:?}, which changes the base's weights, so the saved adapter does not fit the original \
                 base; convert it with PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
            )));
        }
        if lower.starts_with("loftq") {
            return Err(bad(format!(
                "{name} is {init:?}, which replaces the base's weights by quantised ones, so the saved adapter does not \
                 fit the original base, and PEFT cannot convert it; train with another initialisation"
            )));
        }
        Err(bad(format!(
            "{name} is {init:?}, which is not known to leave the base's weights unchanged; known: true, false, \
             {HARMLESS_INITS:?}"
        )))
    }

    /// What nobody asked for must be without effect.
    fn refuse_rest(self) -> Result<()> {
        match self.0.iter().find(|(name, value)| !IGNORED.contains(&name.as_str()) && is_set(value)) {
            Some((name, value)) => Err(bad(format!(
                "{} is {}: this field is not known, so its effect is not supported",
                shorten(name, 200),
                describe(value)
            ))),
            None => Ok(()),
        }
    }
}

/// Python's truth: null, false, 0 and empty things mean a feature is off; but an empty object may be a feature with its
/// defaults.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(b) => *b,
        Value::Number(n) => n.as_f64() != Some(0.0),
        Value::String(s) => !s.is_empty(),
        Value::Array(a) => !a.is_empty(),
        Value::Object(_) => true,
    }
}

fn rank(name: &str, value: &Value) -> Result<usize> {
    match value.as_u64() {
        Some(r) if (1..=MAX_RANK as u64).contains(&r) => Ok(r as usize),
        _ => Err(wrong_type(name, &format!("a whole number from 1 to {MAX_RANK}"), value)),
    }
}

fn number(name: &str, value: &Value) -> Result<f64> {
    value.as_f64().filter(|n| n.is_finite()).ok_or_else(|| wrong_type(name, "a finite number", value))
}

fn strings(name: &str, value: Value) -> Result<Vec<String>> {
    let Value::Array(items) = value else { return Err(wrong_type(name, "a list of strings", &value)) };
    if items.len() > MAX_NAMES {
        return Err(bad(format!("{name} has {} entries; at most {MAX_NAMES}", items.len())));
    }
    items
        .into_iter()
        .map(|item| match item {
            Value::String(s) => Ok(s),
            other => Err(wrong_type(name, "a list of strings", &other)),
        })
        .collect()
}

fn bad(what: impl fmt::Display) -> Error {
    Error::unprocessable(shorten(&format!("{CONFIG}: {what}"), 1000))
}

fn wrong_type(name: &str, expected: &str, found: &Value) -> Error {
    bad(format!("{} is {}; expected {expected}", shorten(name, 200), describe(found)))
}

fn describe(value: &Value) -> String {
    match value {
        Value::Array(items) if items.len() > 16 => format!("a list of {} items", items.len()),
        Value::Object(map) if map.len() > 16 => format!("an object of {} fields", map.len()),
        other => shorten(&other.to_string(), 200),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::ErrorKind;
    use crate::adapter::testing::tiny;

    fn parse(changes: Value) -> Result<LoraConfig> {
        let mut config = json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]});
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        LoraConfig::parse(config.to_string().as_bytes())
    }

    fn targets(changes: Value) -> Result<Vec<String>> {
        let config = parse(changes)?;
        config.check_tokens(&tiny())?;
        let targets = config.targets(&tiny(), 32)?;
        Ok(targets.into_iter().map(|t| t.name.strip_prefix("model.layers.").unwrap_or(&t.name).to_string()).collect())
    }

    #[test]
    fn target_modules_match_as_in_peft() {
        let q = ["0.self_attn.q_proj", "1.self_attn.q_proj"];
        assert_eq!(targets(json!({})).unwrap(), q);
        assert_eq!(targets(json!({"target_modules": ["self_attn.q_proj", "c_attn"]})).unwrap(), q);
        assert_eq!(targets(json!({"target_modules": ["model.layers.1.self_attn.q_proj"]})).unwrap(), q[1..]);
        // A name must begin at a dot.
        assert_eq!(
            targets(json!({"target_modules": ["_proj", "up_proj"]})).unwrap(),
            ["0.mlp.up_proj", "1.mlp.up_proj"]
        );
        assert_eq!(targets(json!({"target_modules": "all-linear"})).unwrap().len(), 14);
        assert_eq!(
            targets(json!({"target_modules": "All-Linear", "exclude_modules": ["mlp.down_proj"]})).unwrap().len(),
            12
        );
        assert_eq!(targets(json!({"target_modules": r".*\.q_proj"})).unwrap(), q);
        // A pattern has to match the whole name.
        assert!(targets(json!({"target_modules": "q_proj"})).unwrap_err().message.contains("matches no module"));
        assert_eq!(targets(json!({"target_modules": r"model\.layers\.\d+\.(?!mlp).*q_proj"})).unwrap(), q);
        assert_eq!(targets(json!({"target_modules": "all-linear", "exclude_modules": r".*(?<!q_proj)"})).unwrap(), q);
    }

    #[test]
    fn tables_are_targets_and_may_be_tied() {
        let (embedding, head) = ("model.embed_tokens", "lm_head");
        let tied = |names: Value| targets(json!({"target_modules": names, "ensure_weight_tying": true})).unwrap();
        assert_eq!(targets(json!({"target_modules": ["embed_tokens"]})).unwrap(), [embedding]);
        assert_eq!(targets(json!({"target_modules": ["lm_head", "embed_tokens"]})).unwrap(), [embedding, head]);
        assert_eq!(targets(json!({"target_modules": ".*embed_tokens|lm_head"})).unwrap(), [embedding, head]);
        assert_eq!(tied(json!(["lm_head"])), [embedding, head]);
        assert_eq!(tied(json!(["model.embed_tokens"])), [embedding, head]);
        assert_eq!(tied(json!("(.*\\.)?embed_tokens")), [embedding, head]);
        assert_eq!(tied(json!(["q_proj"])).len(), 2);
        // What is saved as a whole has no pair.
        let saved = json!({"target_modules": ["q_proj", "embed_tokens", "lm_head"], "modules_to_save": ["lm_head"]});
        assert_eq!(targets(saved).unwrap(), ["0.self_attn.q_proj", "1.self_attn.q_proj", embedding]);
        let saved = json!({"target_modules": "all-linear", "modules_to_save": ["mlp"]});
        assert_eq!(targets(saved).unwrap().len(), 8);
        for (config, word) in [
            (json!({"use_dora": true, "lora_bias": true}), "lora_bias"),
            (json!({"target_modules": ["embed_tokens"], "lora_bias": true}), "model.embed_tokens"),
            (json!({"trainable_token_indices": [3], "modules_to_save": ["embed_tokens"]}), "both name"),
        ] {
            let message = targets(config.clone()).unwrap_err().message;
            assert!(message.contains(word), "{config}: {message}");
        }
    }

    #[test]
    fn layers_can_be_chosen() {
        let second = ["1.self_attn.q_proj"];
        assert_eq!(targets(json!({"layers_to_transform": 1})).unwrap(), second);
        assert_eq!(targets(json!({"layers_to_transform": [1, 9]})).unwrap(), second);
        assert_eq!(targets(json!({"layers_to_transform": [1], "layers_pattern": "layers"})).unwrap(), second);
        assert_eq!(targets(json!({"layers_to_transform": [1], "layers_pattern": ["h", "layers"]})).unwrap(), second);
        assert_eq!(targets(json!({"layers_to_transform": []})).unwrap().len(), 2);
        // A name in full is targeted whatever its layer.
        let full = json!(["model.layers.0.self_attn.q_proj", "v_proj"]);
        assert_eq!(
            targets(json!({"layers_to_transform": [1], "target_modules": full})).unwrap(),
            ["0.self_attn.q_proj", "1.self_attn.v_proj"]
        );
        for (config, expected) in [
            (json!({"layers_to_transform": [1], "layers_pattern": "h"}), "matches no module"),
            (json!({"layers_to_transform": [2]}), "matches no module"),
            (json!({"layers_to_transform": -1}), "layers_to_transform is -1"),
            (json!({"layers_to_transform": "1"}), "layers_to_transform is \"1\""),
            (json!({"layers_pattern": "layers"}), "without layers_to_transform"),
            (json!({"layers_to_transform": 1, "layers_pattern": vec!["h"; 17]}), "layers_pattern has 17 entries"),
            (json!({"layers_to_transform": 1, "target_modules": "all-linear"}), "layers_to_transform"),
        ] {
            let message = targets(config.clone()).unwrap_err().message;
            assert!(message.contains(expected), "{config}: {message}");
        }
    }

    #[test]
    fn the_first_pattern_that_matches_gives_rank_and_alpha() {
        let config = parse(json!({
            "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
            "rank_pattern": {"layers.1.*.q_proj": 2, "q_proj": 16, "^model.layers.0.mlp.down_proj": 3, "roj": 1},
            "alpha_pattern": {"(q|k)_proj": 2.5},
        }))
        .unwrap();
        let found: Vec<(usize, f32)> =
            config.targets(&tiny(), 32).unwrap().iter().map(|t| (t.rank, t.scale * t.rank as f32)).collect();
        // "^…" cannot match after the optional prefix took something, but matches with none; "roj" begins at no dot.
        let expected = [(16, 2.5), (4, 2.5), (4, 8.0), (3, 8.0), (2, 2.5), (4, 2.5), (4, 8.0), (4, 8.0)];
        assert_eq!(found, expected);
    }

    #[test]
    fn rslora_divides_by_the_root_of_the_rank() {
        let scale = |v| parse(v).unwrap().targets(&tiny(), 32).unwrap()[0].scale;
        assert_eq!(scale(json!({})), 2.0);
        assert_eq!(scale(json!({"use_rslora": true})), 4.0);
        assert_eq!(scale(json!({"r": null, "lora_alpha": null})), 1.0);
    }

    #[test]
    fn what_changes_the_result_is_refused_by_name() {
        for (name, value) in [
            ("layer_replication", json!([[0, 2], [1, 2]])),
            ("alora_invocation_tokens", json!([1])),
            ("target_parameters", json!(["experts.down_proj"])),
            ("use_qalora", json!(true)),
            ("arrow_config", json!({"top_k": 3})),
            ("use_bdlora", json!({"nblocks": 2})),
            ("velora_config", json!({"scale": 1.0})),
            ("kasa_config", json!({"beta": 1})),
            ("monteclora_config", json!({"num_samples": 8})),
            ("megatron_config", json!({"x": 1})),
            ("arrow_config", json!({})),
            ("use_bdlora", json!({})),
            ("kasa_config", json!({})),
            ("alora_invocation_tokens", json!([])),
            ("some_new_config", json!({})),
            ("init_lora_weights", json!("pissa_niter_16")),
            ("init_lora_weights", json!("OLoRA")),
            ("init_lora_weights", json!("loftq")),
            ("init_lora_weights", json!("brand_new")),
            ("init_lora_weights", json!(3)),
            ("task_type", json!("TOKEN_CLS")),
            ("problem_type", json!("regression")),
            ("peft_type", json!("LOHA")),
            ("some_new_field", json!(1)),
        ] {
            let error = targets(json!({name: value.clone()})).unwrap_err();
            assert!(error.message.contains(name), "{name} {value}: {}", error.message);
            assert_eq!(error.kind, ErrorKind::Unprocessable);
        }
    }

    #[test]
    fn what_is_off_or_only_for_training_is_accepted() {
        parse(json!({
            "use_dora": false, "lora_bias": null, "arrow_config": null, "some_new_field": 0, "fan_in_fan_out": true,
            "bias": "none", "lora_dropout": 0.1, "init_lora_weights": "gaussian", "loftq_config": {"loftq_bits": 4},
            "eva_config": {"rho": 2.0}, "inference_mode": true, "peft_version": "0.21.2", "revision": "main",
            "auto_mapping": {"base_model_class": "LlamaForCausalLM"}, "qalora_group_size": 16,
            "megatron_core": "megatron.core", "ensure_weight_tying": true, "runtime_config": {"x": 1},
            "modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS", "label2id": {"bad": 0},
            "id2label": {"0": "bad", "1": "good"}, "rank_pattern": null, "alpha_pattern": {},
            "layer_replication": [], "target_parameters": [],
        }))
        .unwrap();
        let q = ["0.self_attn.q_proj", "1.self_attn.q_proj"];
        let with_head = json!({"target_modules": ["q_proj", "lm_head"], "task_type": "SEQ_CLS"});
        assert_eq!(targets(with_head).unwrap(), q, "a classifier has no lm_head");
    }

    #[test]
    fn wrong_values_are_named_with_what_was_expected() {
        let long = "a".repeat(2000);
        for (name, value) in [
            ("r", json!(0)),
            ("r", json!(-1)),
            ("r", json!(5000)),
            ("r", json!(4.5)),
            ("r", json!("4")),
            ("lora_alpha", json!("x")),
            ("lora_alpha", json!(true)),
            ("use_rslora", json!("yes")),
            ("use_rslora", json!(1)),
            ("rank_pattern", json!({"q_proj": 0})),
            ("rank_pattern", json!(["q_proj"])),
            ("rank_pattern", json!({"(": 2})),
            ("alpha_pattern", json!({"q_proj": "x"})),
            ("target_modules", Value::Null),
            ("target_modules", json!([])),
            ("target_modules", json!([1])),
            ("target_modules", json!({"q_proj": 1})),
            ("target_modules", json!("(")),
            ("target_modules", json!("a)|(b")),
            ("target_modules", json!(long)),
            ("exclude_modules", json!(3)),
            ("modules_to_save", json!("score")),
            ("base_model_name_or_path", json!(3)),
            ("id2label", json!({"0": 1})),
            ("bias", json!("some")),
            ("lora_bias", json!(1)),
            ("trainable_token_indices", json!([-1])),
            ("trainable_token_indices", json!([3, 4, 3])),
            ("trainable_token_indices", json!({"embed_tokens": 3})),
            ("trainable_token_indices", json!({"positions": [3]})),
            ("ensure_weight_tying", json!("yes")),
        ] {
            let error = targets(json!({name: value.clone()})).unwrap_err();
            assert!(error.message.contains(name), "{name} {value}: {}", error.message);
            assert!(error.message.len() < 1100);
        }
        for bytes in [&b""[..], b"[]", b"{", b"{\"r\": NaN}", b"\xff", "[".repeat(100_000).as_bytes()] {
            assert_eq!(LoraConfig::parse(bytes).unwrap_err().kind, ErrorKind::Unprocessable);
        }
    }

    #[test]
    fn advice_on_conversion_is_given_where_peft_converts() {
        let message = |init: &str| targets(json!({"init_lora_weights": init})).unwrap_err().message;
        assert!(message("pissa").contains("path_initial_model_for_weight_conversion"));
        assert!(message("loftq").contains("cannot convert"));
    }

    #[test]
    fn one_plain_pattern_a_module_costs_nothing() {
        let base = ModelConfig { layers: 128, ..tiny() };
        let modules = base.target_modules();
        let patterns: Map<String, Value> =
            modules.iter().enumerate().map(|(i, m)| (m.name.clone(), json!(1 + i))).collect();
        let config = parse(json!({"target_modules": "all-linear", "rank_pattern": patterns})).unwrap();
        let start = Instant::now();
        let ranks: Vec<usize> = config.targets(&base, 32).unwrap().iter().map(|t| t.rank).collect();
        assert_eq!(ranks, (1..=modules.len()).collect::<Vec<_>>());
        assert!(start.elapsed() < PATIENCE);
    }

    #[test]
    fn many_slow_patterns_are_refused_soon() {
        let base = ModelConfig { layers: 128, ..tiny() };
        // Large automata, and back-references that stay just below the limit of one match.
        for slow in [r"([a-z._0-9]{0,40}){0,9}!", r"(?=([a-z._]*)*x)(\w{0,20}){0,9}\1!"] {
            let patterns: Map<String, Value> = (0..4000).map(|i| (format!("{slow}{i}"), json!(2))).collect();
            let start = Instant::now();
            let error = parse(json!({"target_modules": "all-linear", "rank_pattern": patterns}))
                .and_then(|config| config.targets(&base, 32));
            let message = error.unwrap_err().message;
            assert!(message.contains("rank_pattern: its patterns take more than 2 s"), "{message}");
            assert!(start.elapsed() < 5 * PATIENCE, "{slow}: {:?}", start.elapsed());
        }
    }

    #[test]
    fn catastrophic_patterns_end() {
        // The back-reference rules out an automaton, and the "!" never comes.
        let message = targets(json!({"target_modules": r"(([a-z._0-9]+)+)+\2!"})).unwrap_err().message;
        assert!(message.contains("target_modules") && message.contains("backtracking"), "{message}");
    }
}
