//! What each tensor of an adapter is to the base, by names and shapes alone.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;

use crate::adapter::config::{Bias, HEADS, LoraConfig, Target};
use crate::adapter::files::CONFIG;
use crate::adapter::tensors::{PREFIX, TensorInfo};
use crate::base::{LM_HEAD, MAX_NEW_TOKENS, ModelConfig, Module, NormKind, NormSite, Projection, TargetModule};
use crate::{Error, Result};

/// Most classes of a head.
const MAX_LABELS: usize = 1 << 16;

/// What a tensor is to its module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Kind {
    A,
    B,
    BiasB,
    Magnitude,
    EmbeddingA,
    EmbeddingB,
    /// Of the module itself, as `modules_to_save` has it.
    Weight,
    Bias,
    /// Of the base's module, as it was saved beside what changes it.
    BaseWeight,
    BaseBias,
    /// `Bias` again: with `bias: "all"`, PEFT writes that of a saved module twice.
    BiasCopy,
    /// Rows of the tokens in `trainable_token_indices`.
    Tokens,
}

/// How the end of a tensor's name says so. PEFT leaves out the adapter's name, `default`; exports of a raw state dict keep
/// it.
const ENDINGS: [(&str, Kind); 25] = [
    ("lora_A.weight", Kind::A),
    ("lora_A.default.weight", Kind::A),
    ("lora_B.weight", Kind::B),
    ("lora_B.default.weight", Kind::B),
    ("lora_B.bias", Kind::BiasB),
    ("lora_B.default.bias", Kind::BiasB),
    ("lora_magnitude_vector", Kind::Magnitude),
    ("lora_magnitude_vector.default", Kind::Magnitude),
    ("lora_magnitude_vector.default.weight", Kind::Magnitude),
    ("lora_embedding_A", Kind::EmbeddingA),
    ("lora_embedding_A.default", Kind::EmbeddingA),
    ("lora_embedding_B", Kind::EmbeddingB),
    ("lora_embedding_B.default", Kind::EmbeddingB),
    ("modules_to_save.default.weight", Kind::Weight),
    ("modules_to_save.default.bias", Kind::Bias),
    ("modules_to_save.bias", Kind::BiasCopy),
    ("token_adapter.trainable_tokens_delta", Kind::Tokens),
    ("token_adapter.trainable_tokens_delta.default", Kind::Tokens),
    ("token_adapter.base_layer.weight", Kind::BaseWeight),
    ("original_module.weight", Kind::BaseWeight),
    ("base_layer.weight", Kind::BaseWeight),
    ("base_layer.bias", Kind::BaseBias),
    ("original_module.bias", Kind::BaseBias),
    ("weight", Kind::Weight),
    ("bias", Kind::Bias),
];

/// The module's path in a tensor's name, and what the tensor is to it.
fn parse_name(name: &str) -> Result<(&str, Kind)> {
    let path = name.strip_prefix(PREFIX).ok_or_else(|| {
        Error::unprocessable(format!("tensor {name}: its name does not begin with \"{PREFIX}\", as PEFT's do"))
    })?;
    let module = |ending: &str| path.strip_suffix(ending)?.strip_suffix('.').filter(|module| !module.is_empty());
    ENDINGS.iter().find_map(|(ending, kind)| Some((module(ending)?, *kind))).ok_or_else(|| {
        Error::unprocessable(format!(
            "tensor {name}: expected the ending of a LoRA pair (lora_A.weight, lora_B.weight, …), of a magnitude, or \
             weight or bias of a saved module"
        ))
    })
}

/// The two matrices of a module's pair.
pub(super) fn kinds(module: Module) -> [Kind; 2] {
    if module == Module::Embedding { [Kind::EmbeddingA, Kind::EmbeddingB] } else { [Kind::A, Kind::B] }
}

/// The ending under which PEFT saves a tensor of this kind.
fn ending(kind: Kind) -> &'static str {
    let of_kind = ENDINGS.iter().filter(|(_, k)| *k == kind).map(|(ending, _)| *ending);
    of_kind.min_by_key(|ending| ending.len()).unwrap_or_default()
}

/// A tensor of the file and its name.
type Named<'a> = (&'a str, &'a TensorInfo);

/// What the tensors are by their names, whatever the base.
#[derive(Default)]
pub(super) struct Places<'a> {
    modules: BTreeMap<&'a str, BTreeMap<Kind, Named<'a>>>,
    /// Name of the module that is the classification head.
    head: Option<&'a str>,
}

/// What the numbers become.
pub(super) struct Plan {
    pub(super) targets: Vec<Target>,
    /// Norms with their module's path.
    pub(super) norms: Vec<(NormSite, String)>,
    /// Linear layers that bring a bias.
    pub(super) biases: Vec<(String, usize, Projection)>,
    /// Of the embedding and of `lm_head`.
    pub(super) tables: [Table; 2],
    pub(super) vocab_size: usize,
    pub(super) hidden_size: usize,
    /// Module and kind by tensor name.
    pub(super) parts: HashMap<String, (String, Kind)>,
}

/// Where the rows of a table come from: tensors by module and kind.
#[derive(Debug, Clone)]
pub(super) struct Table {
    /// The tensor with all rows.
    pub(super) whole: Option<(&'static str, Kind)>,
    /// Whose tensor has rows for which tokens, in the order of its rows.
    pub(super) tokens: Option<(&'static str, Vec<u32>)>,
}

impl Table {
    /// Whether there are rows for all these tokens.
    fn knows(&self, mut tokens: Range<usize>) -> bool {
        let listed: HashSet<u32> = self.tokens.iter().flat_map(|(_, list)| list).copied().collect();
        self.whole.is_some() || tokens.all(|token| listed.contains(&(token as u32)))
    }
}

/// The tensors that have found their part.
struct Taken<'p, 'a> {
    places: &'p Places<'a>,
    /// Module and kind by tensor name.
    parts: HashMap<String, (String, Kind)>,
}

impl Taken<'_, '_> {
    /// Takes a tensor if it is there.
    fn may(&mut self, module: &str, kind: Kind, shape: &[usize], because: &str) -> Result<bool> {
        let Some((name, info)) = self.places.get(module, kind) else { return Ok(false) };
        check_shape(name, &info.shape, shape, because)?;
        self.parts.insert(name.to_string(), (module.to_string(), kind));
        Ok(true)
    }

    /// Takes the copy of a bias if both are there.
    fn may_again(&mut self, module: &str, shape: &[usize], because: &str) -> Result<bool> {
        Ok(self.places.get(module, Kind::Bias).is_some() && self.may(module, Kind::BiasCopy, shape, because)?)
    }

    fn need(&mut self, module: &str, kind: Kind, shape: &[usize], because: &str) -> Result<()> {
        if self.may(module, kind, shape, because)? {
            return Ok(());
        }
        let ending = ending(kind);
        Err(Error::unprocessable(format!(
            "tensor {PREFIX}{module}.{ending} is missing; {CONFIG} asks for it ({because})"
        )))
    }

    fn pair(&mut self, target: &Target, config: &LoraConfig) -> Result<()> {
        let Target { name, module, out_features, in_features, rank, .. } = target;
        let because = format!("rank {rank}, the module {name} maps {in_features} to {out_features}");
        let [a, b] = kinds(*module);
        self.need(name, a, &[*rank, *in_features], &because)?;
        self.need(name, b, &[*out_features, *rank], &because)?;
        if config.use_dora {
            self.need(name, Kind::Magnitude, &[*out_features], &format!("use_dora, {because}"))?;
        }
        if config.lora_bias {
            self.need(name, Kind::BiasB, &[*out_features], &format!("lora_bias, {because}"))?;
        }
        Ok(())
    }
}

/// By what name the head's numbers are kept, whichever of its names the file uses.
pub(super) const HEAD: &str = HEADS[0];

impl<'a> Places<'a> {
    pub(super) fn assign(config: &LoraConfig, tensors: &'a [TensorInfo]) -> Result<Self> {
        let mut places = Places::default();
        for info in tensors {
            let name = info.name.as_str();
            let (module, kind) = parse_name(name)?;
            if HEADS.contains(&module) {
                if !config.saves_head(module) {
                    return Err(Error::unprocessable(format!(
                        "tensor {name} is a classification head, but {CONFIG} has neither {module:?} in modules_to_save \
                         nor task_type \"SEQ_CLS\""
                    )));
                }
                if let Some(other) = places.head.replace(module).filter(|other| *other != module) {
                    return Err(Error::unprocessable(format!(
                        "tensor {name}: there are two classification heads, {other:?} and {module:?}; expected one"
                    )));
                }
            }
            if let Some((other, _)) = places.modules.entry(module).or_default().insert(kind, (name, info)) {
                return Err(Error::unprocessable(format!(
                    "tensors {other} and {name} are the same one under two names"
                )));
            }
        }
        match places.head {
            Some(head) => match places.get(head, Kind::Weight) {
                Some(_) => Ok(places),
                None => {
                    Err(Error::unprocessable(format!("tensor {PREFIX}{head}.bias: the head has a bias but no weight")))
                }
            },
            None if config.is_sequence_classification() => Err(Error::unprocessable(format!(
                "task_type is \"SEQ_CLS\" but the file has no classification head; expected the tensor \
                 {PREFIX}{HEAD}.weight"
            ))),
            None => Ok(places),
        }
    }

    fn get(&self, module: &str, kind: Kind) -> Option<Named<'a>> {
        self.modules.get(module)?.get(&kind).copied()
    }

    /// Gives every tensor its part, by names and shapes alone.
    pub(super) fn fit(&self, config: &LoraConfig, base: &ModelConfig) -> Result<Plan> {
        let known: HashSet<String> = known_modules(base).collect();
        for (module, kinds) in self.modules.iter().filter(|(module, _)| !known.contains(**module)) {
            if let Some((kind, (name, _))) = kinds.first_key_value() {
                return Err(stray(name, module, *kind, config, base));
            }
        }
        let vocab_size = self.vocab_size(config, base)?;
        let targets = config.targets(base, vocab_size)?;
        let mut taken = Taken { places: self, parts: HashMap::new() };
        for target in &targets {
            taken.pair(target, config)?;
        }
        config.check_tokens(base)?;
        let mut norms = vec![];
        for (site, name, width) in base.norms() {
            let has_bias = base.architecture.norm == NormKind::Layer;
            let mut changed = config.saves(&name);
            if changed {
                let because = format!("modules_to_save {:?}, the norm's width", config.modules_to_save);
                taken.need(&name, Kind::Weight, &[width], &because)?;
            }
            if has_bias && (changed || config.bias == Bias::All) {
                for kind in [Kind::Bias, Kind::BaseBias] {
                    changed |= taken.may(&name, kind, &[width], "the norm's width")?;
                }
                taken.may_again(&name, &[width], "the norm's width")?;
            }
            if changed {
                norms.push((site, name));
            }
        }
        let mut biases = vec![];
        for module in base.target_modules() {
            let targeted = targets.iter().any(|target| target.name == module.name);
            if config.bias == Bias::All || config.bias == Bias::Targets && targeted {
                let has_bias = base.architecture.has_bias(module.projection);
                let (mut found, because) = (false, "the module's outputs");
                for kind in [Kind::Bias, Kind::BaseBias] {
                    found |= has_bias && taken.may(&module.name, kind, &[module.out_features], because)?;
                }
                if found {
                    biases.push((module.name, module.layer, module.projection));
                }
            }
        }
        let tables = self.tables(config, base, vocab_size, &mut taken)?;
        if let (Some(head), Some(rows)) = (self.head, self.head_rows()?) {
            let because = "classes × the base's hidden size";
            taken.need(head, Kind::Weight, &[rows, base.hidden_size], because)?;
            taken.may(head, Kind::Bias, &[rows], "one a class")?;
            if config.bias == Bias::All {
                taken.may_again(head, &[rows], "one a class")?;
                // The head of the model that was trained, which the adapter's takes the place of.
                taken.may(head, Kind::BaseBias, &[rows], "one a class")?;
            }
            for (module, _) in taken.parts.values_mut().filter(|(module, _)| module == head) {
                *module = HEAD.into();
            }
        }
        let tensors =
            self.modules.iter().flat_map(|(module, kinds)| kinds.iter().map(move |(k, (n, _))| (module, k, n)));
        if let Some((module, kind, name)) = tensors.into_iter().find(|(_, _, name)| !taken.parts.contains_key(**name)) {
            return Err(stray(name, module, *kind, config, base));
        }
        let (hidden_size, parts) = (base.hidden_size, taken.parts);
        Ok(Plan { targets, norms, biases, tables, vocab_size, hidden_size, parts })
    }

    /// Tokens that the adapter knows: as many as a whole table has rows, else the base's and those with rows of their own.
    fn vocab_size(&self, config: &LoraConfig, base: &ModelConfig) -> Result<usize> {
        let tables = [base.family.names().embedding, LM_HEAD]
            .map(|table| [Kind::Weight, Kind::BaseWeight].map(|kind| self.get(table, kind)));
        let mut found: Option<(&str, usize)> = None;
        for (name, info) in tables.into_iter().flatten().flatten() {
            let rows = info.shape.first().copied().unwrap_or(0);
            check_shape(name, &info.shape, &[rows, base.hidden_size], "tokens × the base's hidden size")?;
            let most = base.vocab_size + MAX_NEW_TOKENS;
            if !(1..=most).contains(&rows) {
                return Err(Error::unprocessable(format!("tensor {name} has {rows} rows; expected 1 to {most}")));
            }
            match found {
                Some((other, there)) if there != rows => {
                    return Err(Error::unprocessable(format!(
                        "tensor {name} has {rows} rows, {other} has {there}; expected one a token in both"
                    )));
                }
                _ => found = Some((name, rows)),
            }
        }
        let tokens = config.trainable_tokens.iter().flat_map(|(_, tokens)| tokens);
        let last = tokens.max().map_or(0, |&token| token as usize + 1);
        if last > base.vocab_size + MAX_NEW_TOKENS {
            return Err(Error::unprocessable(format!(
                "trainable_token_indices names the token {}; at most {MAX_NEW_TOKENS} tokens can follow the base's {}",
                last - 1,
                base.vocab_size
            )));
        }
        match found {
            Some((name, rows)) if last > rows => Err(Error::unprocessable(format!(
                "trainable_token_indices names the token {}, but {name} has {rows} rows",
                last - 1
            ))),
            Some((_, rows)) => Ok(rows),
            None => Ok(base.vocab_size.max(last)),
        }
    }

    /// Where the rows of both tables come from. On a base that ties them, what replaces the base's embedding replaces
    /// `lm_head` too; what is saved as a module of its own (`modules_to_save`) only where PEFT was told to tie it.
    fn tables(
        &self,
        config: &LoraConfig,
        base: &ModelConfig,
        vocab_size: usize,
        taken: &mut Taken,
    ) -> Result<[Table; 2]> {
        let (embedding, tied) = (base.family.names().embedding, base.tie_word_embeddings);
        let (shape, because) = ([vocab_size, base.hidden_size], "tokens × the base's hidden size");
        let mut found = HashSet::new();
        for table in [embedding, LM_HEAD] {
            for kind in [Kind::Weight, Kind::BaseWeight] {
                if taken.may(table, kind, &shape, because)? {
                    found.insert((table, kind));
                }
            }
            // A classifier has no lm_head, and PEFT may leave the copy of a tied one out.
            let absent = table == LM_HEAD && (config.is_sequence_classification() || tied && config.ties_saved());
            if config.saves(table) && !absent {
                taken.need(table, Kind::Weight, &shape, because)?;
            }
        }
        // What takes the place of the base's table, and so of a table tied to it.
        let replaces = |table| {
            let weight = found.contains(&(table, Kind::Weight)) && !config.saves(table);
            let base_weight = found.contains(&(table, Kind::BaseWeight));
            if weight { Some((table, Kind::Weight)) } else { base_weight.then_some((table, Kind::BaseWeight)) }
        };
        let whole = |table, other| {
            let own = found.contains(&(table, Kind::Weight)).then_some((table, Kind::Weight));
            let copied = table == LM_HEAD && tied && config.ties_saved();
            let copy = (copied && found.contains(&(other, Kind::Weight))).then_some((other, Kind::Weight));
            own.or(copy).or_else(|| replaces(table)).or_else(|| if tied { replaces(other) } else { None })
        };

        let listed = |table: &str| config.tokens_of(table, base);
        let mut rows = |table, tokens: &Vec<u32>| -> Result<Option<(&'static str, Vec<u32>)>> {
            let because = format!("the {} tokens of trainable_token_indices × the base's hidden size", tokens.len());
            taken.need(table, Kind::Tokens, &[tokens.len(), base.hidden_size], &because)?;
            Ok(Some((table, tokens.clone())))
        };
        let of_embedding = listed(embedding).map_or(Ok(None), |tokens| rows(embedding, tokens))?;
        let of_lm_head = match (listed(embedding), listed(LM_HEAD)) {
            // One for both; PEFT may write it twice.
            (Some(tokens), other) if tied && other.is_none_or(|other| other == tokens) => {
                taken.may(LM_HEAD, Kind::Tokens, &[tokens.len(), base.hidden_size], "as for the embedding")?;
                of_embedding.clone()
            }
            (_, Some(tokens)) => rows(LM_HEAD, tokens)?,
            (_, None) => None,
        };
        let input = Table { whole: whole(embedding, LM_HEAD), tokens: of_embedding };
        let mut output = Table { whole: whole(LM_HEAD, embedding), tokens: of_lm_head };
        // A classifier has no lm_head that could have rows for new tokens.
        if config.is_sequence_classification() && !output.knows(base.vocab_size..vocab_size) {
            output = input.clone();
        }
        for (name, table) in [(embedding, &input), (LM_HEAD, &output)] {
            if !table.knows(base.vocab_size..vocab_size) {
                return Err(Error::unprocessable(format!(
                    "tensor {PREFIX}{name}.weight is missing: the adapter has {vocab_size} tokens, and the base's \
                     {name} has rows for {}",
                    base.vocab_size
                )));
            }
        }
        Ok([input, output])
    }

    /// Refuses pairs that fit no base: both matrices are there, and their ranks agree.
    pub(super) fn check_pairs(&self) -> Result<()> {
        for (module, kinds) in &self.modules {
            for [a, b] in [[Kind::A, Kind::B], [Kind::EmbeddingA, Kind::EmbeddingB]] {
                let ((name_a, a), (name_b, b)) = match (kinds.get(&a), kinds.get(&b)) {
                    (None, None) => continue,
                    (Some(a), Some(b)) => (a, b),
                    (there, other) => {
                        let missing = ending(if there.is_none() { a } else { b });
                        let there = there.or(other).map_or("", |(name, _)| name);
                        return Err(Error::unprocessable(format!(
                            "tensor {PREFIX}{module}.{missing} is missing, but {there} is there"
                        )));
                    }
                };
                match (&a.shape[..], &b.shape[..]) {
                    ([rank, _], [_, other]) if rank == other => {}
                    (found, other) => {
                        return Err(Error::unprocessable(format!(
                            "tensor {name_a} has shape {found:?} and {name_b} has shape {other:?}; expected \
                             [rank, inputs] and [outputs, rank]"
                        )));
                    }
                }
            }
        }
        Ok(())
    }

    /// Classes of the head, if there is one.
    pub(super) fn head_rows(&self) -> Result<Option<usize>> {
        let Some(head) = self.head else { return Ok(None) };
        let Some((name, info)) = self.get(head, Kind::Weight) else { return Ok(None) };
        let rows = info.shape.first().copied().unwrap_or(0);
        if rows == 1 {
            return Err(Error::unprocessable(format!(
                "tensor {name} has one row: a head for regression or a reward model, which is not supported; expected \
                 a row for each of two classes or more"
            )));
        }
        if !(2..=MAX_LABELS).contains(&rows) || info.shape.len() != 2 {
            return Err(Error::unprocessable(format!(
                "tensor {name} has shape {:?}; expected [2 to {MAX_LABELS} classes, the base's hidden size]",
                info.shape
            )));
        }
        if let Some((name, info)) = self.get(head, Kind::Bias) {
            check_shape(name, &info.shape, &[rows], "one a class")?;
        }
        Ok(Some(rows))
    }
}

fn check_shape(name: &str, found: &[usize], expected: &[usize], because: &str) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::unprocessable(format!("tensor {name} has shape {found:?}; expected {expected:?} ({because})")))
}

/// Every module that an adapter may bring a tensor for.
fn known_modules(base: &ModelConfig) -> impl Iterator<Item = String> {
    let linear = base.target_modules().into_iter().map(|m| m.name);
    let norms = base.norms().into_iter().map(|(_, name, _)| name);
    linear.chain(norms).chain([base.family.names().embedding, LM_HEAD].into_iter().chain(HEADS).map(String::from))
}

/// A tensor that nothing in the configuration asks for.
fn stray(name: &str, module: &str, kind: Kind, config: &LoraConfig, base: &ModelConfig) -> Error {
    let layer =
        module.strip_prefix(base.family.names().layers).and_then(|rest| rest.split('.').nth(1)?.parse::<usize>().ok());
    let linear = base.target_modules().iter().any(|m| m.name == module);
    let known = linear || [base.family.names().embedding, LM_HEAD].contains(&module);
    let norm = base.norms().iter().any(|(_, name, _)| name == module);
    Error::unprocessable(match (kind, layer) {
        (_, Some(layer)) if layer >= base.layers => {
            format!("tensor {name} belongs to layer {layer}, but the base has the layers 0 to {}", base.layers - 1)
        }
        (Kind::Magnitude, _) if known => format!("tensor {name} is DoRA's, but {CONFIG} has no use_dora"),
        (Kind::BiasB, _) if known => format!("tensor {name} is a bias of lora_B, but {CONFIG} has no lora_bias"),
        (Kind::Tokens, _) if known => format!("tensor {name} is not in trainable_token_indices of {CONFIG}"),
        (Kind::Weight, _) if norm => format!(
            "tensor {name} is a norm that {CONFIG} does not save (modules_to_save {:?})",
            config.modules_to_save
        ),
        (Kind::Weight | Kind::BaseWeight, _) if linear => format!(
            "tensor {name} replaces a linear layer; supported in modules_to_save: norms, the embedding, lm_head and a \
             classification head"
        ),
        (Kind::Bias | Kind::BaseBias, _) if config.bias == Bias::None => {
            format!("tensor {name} is a bias, but {CONFIG} saves none (bias \"none\")")
        }
        (Kind::Bias | Kind::BaseBias, _) if known || norm => {
            format!("tensor {name} is a bias, and the base has none there")
        }
        _ if known => format!(
            "tensor {name} is for a module that {CONFIG} does not target (target_modules {})",
            config.target_modules
        ),
        _ => {
            let modules = base.target_modules();
            let end = |module: Option<&TargetModule>| module.map_or("none", |m| m.name.as_str()).to_string();
            format!(
                "tensor {name} is for the module {module}, which is none of the base; its linear layers are {} to {}",
                end(modules.first()),
                end(modules.last())
            )
        }
    })
}
