//! A model's files, opened and checked.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::chat::{ChatError, ChatTemplate, TemplateFiles};
use crate::config::{self, ConfigError, ModelConfig};
use crate::file_map::FileSource;
use crate::gguf::{self, GgufError, Metadata};
use crate::safetensors_files::{self, SafetensorsError};
use crate::side_file::SideFile;
use crate::text::printable;
use crate::tokenizer::{TokenFiles, Tokenizer, TokenizerError};
use crate::weights::{TensorError, TensorInfo, TensorName, TensorTable, TensorView};

/// Largest JSON or template file that is read whole, in bytes; the largest real `tokenizer.json` has about 40 MB.
const MAXIMUM_SMALL_FILE: u64 = 256 << 20;

/// A model's files: a Hugging Face folder, a GGUF file, or bytes in memory.
///
/// Opening reads only the descriptions; tensors are mapped when they are asked for, and unmapped when their views are
/// dropped.
#[derive(Debug)]
pub struct ModelFiles {
    name: String,
    config: ModelConfig,
    table: TensorTable,
    side: SideFiles,
}

/// What describes the tokenizer and the chat.
#[derive(Debug)]
enum SideFiles {
    Folder { path: PathBuf },
    Memory(MemoryModel),
    Gguf { version: u32, metadata: Metadata },
}

/// A model in memory, in the layout of a Hugging Face folder: the contents of its files.
#[derive(Clone, Debug)]
pub struct MemoryModel {
    /// `config.json`.
    pub config: Cow<'static, [u8]>,
    /// `tokenizer.json`.
    pub tokenizer: Cow<'static, [u8]>,
    /// `model.safetensors`.
    pub weights: Cow<'static, [u8]>,
    /// `tokenizer_config.json`, if there is one.
    pub tokenizer_config: Option<Cow<'static, [u8]>>,
}

/// What a model's files hold, in short.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSummary {
    /// `safetensors` or `GGUF v3`.
    pub format: String,
    /// Name of the model: what the file states, or the name of the file or folder.
    pub name: String,
    /// Number of weights.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Number of files with tensors.
    pub files: usize,
    /// The element types, the one with the most bytes first.
    pub types: Vec<TypeSummary>,
    /// Other statements of the file, for `inspect`: names and shortened values (GGUF metadata).
    pub metadata: Vec<(String, String)>,
}

/// The tensors of one element type.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct TypeSummary {
    /// Name of the element type, lower case.
    pub name: &'static str,
    /// The type that the engine computes with, which may be larger; `None` where it does not compute with it.
    pub computed_as: Option<&'static str>,
    /// Number of tensors.
    pub tensors: usize,
    /// Bytes in the files.
    pub bytes: u64,
}

/// Why a model cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is nothing at the path.
    #[error(
        "{path}: {error}; expected a model folder or a .gguf file on this machine (models of the Hugging Face Hub are not \
         downloaded)"
    )]
    Missing {
        /// The path.
        path: String,
        /// What the system said.
        error: std::io::Error,
    },
    /// The path is a model in the cache of the Hugging Face Hub, which has a folder for each revision.
    #[error("{path}: a cache of the Hugging Face Hub; give the folder of a revision in it, {revision}")]
    HubCache {
        /// The path.
        path: String,
        /// A folder in it, or where they are.
        revision: String,
    },
    /// It cannot be read.
    #[error("{path}: {error}")]
    Read {
        /// The path.
        path: String,
        /// What the system said.
        error: std::io::Error,
    },
    /// The path is no model.
    #[error("{path}: not a model; expected a folder with config.json and model.safetensors, or a .gguf file")]
    NotAModel {
        /// The path.
        path: String,
    },
    /// The configuration is wrong.
    #[error("{file}: {error}")]
    Config {
        /// File that holds it.
        file: String,
        /// What is wrong.
        error: ConfigError,
    },
    /// Safetensors files are wrong.
    #[error("{0}")]
    Safetensors(String),
    /// A GGUF file is wrong.
    #[error("{file}: {error}")]
    Gguf {
        /// The file.
        file: String,
        /// What is wrong.
        error: GgufError,
    },
    /// A tensor is missing, of the wrong shape or of an unknown type.
    #[error(transparent)]
    Tensor(#[from] TensorError),
}

impl ModelFiles {
    /// Opens a Hugging Face folder or a `.gguf` file (of a split model, its first file) and checks everything that can
    /// be checked without reading weights.
    ///
    /// # Errors
    /// When a file is missing, malformed, of an unknown family or type, or when tensors and configuration disagree.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let shown = path.display().to_string();
        let metadata = std::fs::metadata(path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => OpenError::Missing { path: shown.clone(), error },
            _ => OpenError::Read { path: shown.clone(), error },
        })?;
        if metadata.is_dir() {
            return Self::open_folder(path);
        }
        let source = FileSource::open(path).map_err(|error| OpenError::Read { path: shown.clone(), error })?;
        let is_gguf = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
        let magic = source.bytes(0..4).map_err(|error| OpenError::Read { path: shown.clone(), error });
        if !is_gguf && magic.is_ok_and(|magic| *magic != *b"GGUF") {
            return Err(OpenError::NotAModel { path: shown });
        }
        let name = path.file_stem().map_or_else(|| shown.clone(), |stem| stem.to_string_lossy().into());
        Self::open_gguf(name, source, Some(path))
    }

    fn open_gguf(name: String, source: FileSource, path: Option<&Path>) -> Result<Self, OpenError> {
        let file = source.name.clone();
        let opened = gguf::open(source, path).map_err(|(file, error)| OpenError::Gguf { file, error })?;
        let config = config::config_of_gguf(&opened.header.metadata, &opened.table)
            .map_err(|error| OpenError::Config { file, error })?;
        opened.table.check(&config)?;
        let side = SideFiles::Gguf { version: opened.header.version, metadata: opened.header.metadata };
        Ok(Self { name, config, table: opened.table, side })
    }

    /// Opens a GGUF file that is in memory; `name` is how messages call it.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_gguf_memory(name: &str, bytes: impl Into<Cow<'static, [u8]>>) -> Result<Self, OpenError> {
        Self::open_gguf(name.into(), FileSource::memory(name, bytes), None)
    }

    fn open_folder(path: &Path) -> Result<Self, OpenError> {
        let config_path = path.join("config.json");
        if !config_path.exists() {
            if let Some(revision) = revision_of_hub_cache(path) {
                return Err(OpenError::HubCache { path: path.display().to_string(), revision });
            }
            return Err(OpenError::NotAModel { path: path.display().to_string() });
        }
        let read =
            |path: &Path| read_small(path).map_err(|error| OpenError::Read { path: path.display().to_string(), error });
        let in_file = |path: &Path, error| OpenError::Config { file: path.display().to_string(), error };
        let mut config = config::parse_config(&read(&config_path)?).map_err(|error| in_file(&config_path, error))?;
        let generation = path.join("generation_config.json");
        if generation.exists() {
            config::merge_generation_config(&mut config, &read(&generation)?)
                .map_err(|error| in_file(&generation, error))?;
        }
        let table = safetensors_files::open_folder(path).map_err(|error| match error {
            SafetensorsError::Header { .. } | SafetensorsError::Read { .. } | SafetensorsError::NotInShard { .. } => {
                OpenError::Safetensors(error.to_string())
            }
            _ => OpenError::Safetensors(format!("{}: {error}", path.display())),
        })?;
        table.check(&config)?;
        untie(&mut config, &table)?;
        let name = std::path::absolute(path).ok().and_then(|path| Some(path.file_name()?.to_string_lossy().into()));
        let name = name.unwrap_or_else(|| path.display().to_string());
        Ok(Self { name, config, table, side: SideFiles::Folder { path: path.into() } })
    }

    /// Opens a model whose files are in memory; `name` is how messages call it.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_memory(name: &str, model: MemoryModel) -> Result<Self, OpenError> {
        let mut config = config::parse_config(&model.config)
            .map_err(|error| OpenError::Config { file: format!("{name}/config.json"), error })?;
        let source = FileSource::memory(&format!("{name}/model.safetensors"), model.weights.clone());
        let table =
            safetensors_files::open_single(source).map_err(|error| OpenError::Safetensors(error.to_string()))?;
        table.check(&config)?;
        untie(&mut config, &table)?;
        Ok(Self { name: name.into(), config, table, side: SideFiles::Memory(model) })
    }

    /// The shape of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// A tensor's rows, mapped until the view is dropped. [`TensorName::Output`] gives the token embedding where
    /// embeddings are tied.
    ///
    /// # Errors
    /// When the model has no such tensor, or the file cannot be mapped.
    pub fn tensor(&self, name: TensorName) -> Result<TensorView, TensorError> {
        let name = match name {
            TensorName::Output if self.config.tied_embeddings => TensorName::TokenEmbedding,
            name => name,
        };
        self.table.view(&self.config, name)
    }

    /// A norm's weights or a bias, as f32; queries' and keys' biases in Hugging Face's order.
    ///
    /// # Errors
    /// When the model has no such tensor or it is a matrix, or the file cannot be mapped.
    pub fn vector(&self, name: TensorName) -> Result<Vec<f32>, TensorError> {
        self.table.vector(&self.config, name)
    }

    /// All tensors of the files by name, those the engine does not use too.
    pub fn tensors(&self) -> impl Iterator<Item = TensorInfo> + '_ {
        self.table.infos()
    }

    /// What the files hold, in short.
    pub fn summary(&self) -> ModelSummary {
        let mut types: BTreeMap<&'static str, TypeSummary> = BTreeMap::new();
        let (mut parameters, mut bytes) = (0u64, 0u64);
        for tensor in self.tensors() {
            let TensorInfo { weight_type: name, computed_as, .. } = tensor;
            let entry = types.entry(name).or_insert(TypeSummary { name, computed_as, tensors: 0, bytes: 0 });
            entry.tensors += 1;
            entry.bytes += tensor.bytes;
            bytes += tensor.bytes;
            parameters += tensor.shape.iter().product::<u64>();
        }
        let mut types: Vec<_> = types.into_values().collect();
        types.sort_by_key(|kind| (std::cmp::Reverse(kind.bytes), kind.name));
        let (format, name, metadata) = match &self.side {
            SideFiles::Gguf { version, metadata } => {
                let stated = metadata.string("general.name").ok().flatten();
                let values = metadata.iter().map(|(key, value)| (printable(key), value.describe())).collect();
                (format!("GGUF v{version}"), stated.unwrap_or(&self.name), values)
            }
            _ => ("safetensors".to_owned(), self.name.as_str(), Vec::new()),
        };
        ModelSummary {
            format,
            name: printable(name),
            parameters,
            bytes,
            files: self.table.sources.len(),
            types,
            metadata,
        }
    }

    /// Reads the tokenizer.
    ///
    /// # Errors
    /// When there is none, or it is malformed or of an unknown kind.
    pub fn tokenizer(&self) -> Result<Tokenizer, TokenizerError> {
        if let SideFiles::Gguf { metadata, .. } = &self.side {
            return Tokenizer::from_gguf(metadata, &self.table.sources[0].name, &self.config);
        }
        let read = |name: &str, memory: fn(&MemoryModel) -> Option<&Cow<'static, [u8]>>| {
            self.side_file(name, memory).map_err(|(file, problem)| TokenizerError::Read { file, problem })
        };
        let (json, file) = read("tokenizer.json", |model| Some(&model.tokenizer))?;
        let Some(json) = json else { return Err(TokenizerError::Missing { file }) };
        let (config, config_file) = read("tokenizer_config.json", |model| model.tokenizer_config.as_ref())?;
        let (older, older_file) = read("special_tokens_map.json", |_| None)?;
        let (added, added_file) = read("added_tokens.json", |_| None)?;
        let beside = TokenFiles {
            config: SideFile { bytes: config.as_deref(), file: &config_file },
            special_tokens_map: SideFile { bytes: older.as_deref(), file: &older_file },
            added_tokens: SideFile { bytes: added.as_deref(), file: &added_file },
        };
        Tokenizer::from_hugging_face(&json, &file, &beside, &self.config)
    }

    /// Reads the chat template, `None` where the model has none.
    ///
    /// # Errors
    /// When a file is malformed or the template does not parse.
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>, ChatError> {
        if let SideFiles::Gguf { metadata, .. } = &self.side {
            return ChatTemplate::from_gguf(metadata, &self.table.sources[0].name);
        }
        let read = |name, memory: fn(&MemoryModel) -> Option<&Cow<'static, [u8]>>| {
            self.side_file(name, memory).map_err(|(file, problem)| ChatError::Read { file, problem })
        };
        let (config, config_file) = read("tokenizer_config.json", |model| model.tokenizer_config.as_ref())?;
        let (template, template_file) = read("chat_template.jinja", |_| None)?;
        let (older, older_file) = read("special_tokens_map.json", |_| None)?;
        ChatTemplate::from_hugging_face(&TemplateFiles {
            template: SideFile { bytes: template.as_deref(), file: &template_file },
            config: SideFile { bytes: config.as_deref(), file: &config_file },
            special_tokens_map: SideFile { bytes: older.as_deref(), file: &older_file },
        })
    }

    /// Contents of a file beside the weights, `None` where it does not exist, and how messages call it. An error tells
    /// that too, and what is wrong.
    fn side_file(
        &self,
        name: &str,
        memory: fn(&MemoryModel) -> Option<&Cow<'static, [u8]>>,
    ) -> Result<SideContents, (String, String)> {
        match &self.side {
            SideFiles::Folder { path } => {
                let path = path.join(name);
                let file = path.display().to_string();
                match path.exists().then(|| read_small(&path)).transpose() {
                    Ok(bytes) => Ok((bytes, file)),
                    Err(error) => Err((file, error.to_string())),
                }
            }
            SideFiles::Memory(model) => {
                Ok((memory(model).map(|bytes| bytes.to_vec()), format!("{}/{name}", self.name)))
            }
            SideFiles::Gguf { .. } => Ok((None, format!("{}/{name}", self.name))),
        }
    }
}

/// Contents of a file, `None` where it does not exist, and how messages call it.
type SideContents = (Option<Vec<u8>>, String);

/// A revision in the folder of a model in the cache of the Hugging Face Hub; where they are, when there is not just one.
fn revision_of_hub_cache(path: &Path) -> Option<String> {
    let snapshots = path.join("snapshots");
    let mut revisions = std::fs::read_dir(&snapshots).ok()?.filter_map(Result::ok).map(|entry| entry.path());
    match (revisions.next(), revisions.next()) {
        (Some(revision), None) => Some(revision.display().to_string()),
        _ => Some(snapshots.join("…").display().to_string()),
    }
}

/// Files may hold an output layer although the configuration ties it to the embedding, such as those of a model that was
/// trained on without the tie. As in transformers 5 it counts where it is another matrix than the embedding.
fn untie(config: &mut ModelConfig, table: &TensorTable) -> Result<(), TensorError> {
    if !config.tied_embeddings || !table.tensors.contains_key(&table.name_of(TensorName::Output)) {
        return Ok(());
    }
    let untied = ModelConfig { tied_embeddings: false, ..config.clone() };
    let (output, embedding) =
        (table.view(&untied, TensorName::Output)?, table.view(&untied, TensorName::TokenEmbedding)?);
    let same = output.weight_type() == embedding.weight_type()
        && (0..output.rows()).all(|row| output.row_bytes(row) == embedding.row_bytes(row));
    config.tied_embeddings = same;
    Ok(())
}

/// Reads a file that is small in every real model.
pub(crate) fn read_small(path: &Path) -> std::io::Result<Vec<u8>> {
    let file = std::fs::File::open(path)?;
    let mut bytes = Vec::new();
    file.take(MAXIMUM_SMALL_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAXIMUM_SMALL_FILE {
        return Err(std::io::Error::new(
            std::io::ErrorKind::FileTooLarge,
            format!("larger than {} MB", MAXIMUM_SMALL_FILE >> 20),
        ));
    }
    Ok(bytes)
}
