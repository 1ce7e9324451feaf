//! Runs pretrained decoder models on the CPU.
//!
//! [`ModelFiles`] turns files (a Hugging Face folder or a GGUF file) into a checked description: [`ModelConfig`],
//! tensors by [`TensorName`], [`Tokenizer`] and [`ChatTemplate`].

mod chat;
mod config;
mod file_map;
mod model_files;
mod safetensors_files;
mod stop;
mod text;
mod tokenizer;
mod weights;

pub use chat::{ChatError, ChatTemplate, Message};
pub use config::{ConfigError, Family, ModelConfig, RopeConfig, RopeScaling};
pub use model_files::{MemoryModel, ModelFiles, ModelSummary, OpenError};
pub use stop::{StopStrings, Stopped};
pub use tokenizer::{TextStream, Tokenizer, TokenizerError};
pub use weights::{LayerTensor, TensorError, TensorInfo, TensorName, TensorView};
