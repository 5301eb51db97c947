//! The small files of an adapter: its configuration, labels and tokenizer.

use std::path::Path;

use crate::adapter::Generation;
use crate::adapter::config::LoraConfig;
use crate::adapter::files::{
    CHAT_TEMPLATE, CONFIG, GGUF, INDEX, PICKLE, TOKENIZER, TOKENIZER_CONFIG, adapter_files, read_optional,
};
use crate::adapter::generation::GenerationHasher;
use crate::base::OwnLanguage;
use crate::base::labels::{self, LABELS_JSON, LABELS_TEXT};
use crate::{Error, Result};

/// The small files of an adapter.
pub(super) struct Texts {
    /// `None` where a GGUF file takes its place.
    pub(super) config: Option<Vec<u8>>,
    labels_json: Option<Vec<u8>>,
    labels_text: Option<Vec<u8>>,
    index: Option<Vec<u8>>,
    tokenizer: Option<Vec<u8>>,
    tokenizer_config: Option<Vec<u8>>,
    chat_template: Option<Vec<u8>>,
    /// All files of the adapter, in order.
    names: Vec<String>,
}

impl Texts {
    pub(super) fn read(directory: &Path) -> Result<Self> {
        let names: Vec<String> = adapter_files(directory)?.into_keys().collect();
        let read = |name: &str| if names.iter().any(|n| n == name) { read_optional(directory, name) } else { Ok(None) };
        let texts = Texts {
            config: read(CONFIG)?,
            labels_json: read(LABELS_JSON)?,
            labels_text: read(LABELS_TEXT)?,
            index: read(INDEX)?,
            tokenizer: read(TOKENIZER)?,
            tokenizer_config: read(TOKENIZER_CONFIG)?,
            chat_template: read(CHAT_TEMPLATE)?,
            names,
        };
        match texts.config.is_none() && !texts.names.iter().any(|name| name == GGUF) {
            true => Err(no_config(directory)),
            false => Ok(texts),
        }
    }

    fn get(&self, name: &str) -> Option<&Vec<u8>> {
        let text = match name {
            CONFIG => &self.config,
            LABELS_JSON => &self.labels_json,
            LABELS_TEXT => &self.labels_text,
            INDEX => &self.index,
            TOKENIZER => &self.tokenizer,
            TOKENIZER_CONFIG => &self.tokenizer_config,
            CHAT_TEMPLATE => &self.chat_template,
            _ => &None,
        };
        text.as_ref()
    }

    pub(super) fn language(&self) -> Result<Option<OwnLanguage>> {
        let text = |name: &str| self.get(name).map(Vec::as_slice);
        OwnLanguage::read(text(TOKENIZER), text(TOKENIZER_CONFIG), text(CHAT_TEMPLATE))
    }

    pub(super) fn len(&self) -> u64 {
        self.names.iter().filter_map(|name| self.get(name)).map(|text| text.len() as u64).sum()
    }

    /// The generation of these texts with the weights that `weights` hands over, whose files are neighbours by name.
    pub(super) fn generation(&self, weights: impl FnOnce(&mut GenerationHasher) -> Result<()>) -> Result<Generation> {
        let mut weights = Some(weights);
        GenerationHasher::over(&self.names, |name, hasher| match self.get(name) {
            Some(text) => {
                hasher.file(name, text.len() as u64);
                hasher.update(text);
                Ok(())
            }
            None => weights.take().map_or(Ok(()), |weights| weights(hasher)),
        })
    }

    /// The class names of a head of `rows` classes: from a labels file, else `id2label`, else made up.
    pub(super) fn labels(&self, config: &LoraConfig, rows: usize) -> Result<Vec<String>> {
        let (source, names) = match (&self.labels_json, &self.labels_text) {
            (Some(_), Some(_)) => {
                return Err(Error::unprocessable(format!("both {LABELS_JSON} and {LABELS_TEXT} name the classes")));
            }
            (Some(json), None) => (LABELS_JSON, labels::from_json_file(json)?),
            (None, Some(text)) => (LABELS_TEXT, labels::from_text_file(text)?),
            (None, None) => match &config.id2label {
                Some(names) => ("id2label in adapter_config.json", names.clone()),
                None => return Ok(labels::default_names(rows)),
            },
        };
        if names.len() != rows {
            return Err(Error::unprocessable(format!(
                "{source} names {} classes but the head has {rows} rows",
                names.len()
            )));
        }
        Ok(names)
    }

    pub(super) fn refuse_labels(&self) -> Result<()> {
        for (name, content) in [(LABELS_JSON, &self.labels_json), (LABELS_TEXT, &self.labels_text)] {
            if content.is_some() {
                return Err(Error::unprocessable(format!(
                    "{name} names classes but the adapter has no classification head (score.weight)"
                )));
            }
        }
        Ok(())
    }
}

pub(super) fn no_config(directory: &Path) -> Error {
    let pickle = if directory.join(PICKLE).exists() { " (a pickle alone is not enough)" } else { "" };
    Error::unprocessable(format!("{CONFIG} is missing{pickle}"))
}
