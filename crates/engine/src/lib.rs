//! Runs pretrained decoder models on the CPU.
//!
//! [`ModelFiles`] turns files (a Hugging Face folder or a GGUF file) into a checked description: [`ModelConfig`],
//! tensors by [`TensorName`], [`Tokenizer`] and [`ChatTemplate`].

mod chat;
mod config;
mod decoder;
mod file_map;
mod first_passes;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
mod generation;
mod gguf;
mod joined_linear;
mod model;
mod model_files;
mod observer;
mod panics;
mod random_weights;
mod safetensors_files;
mod sampler;
mod session;
mod side_file;
mod stop;
mod text;
mod tokenizer;
mod weight_source;
mod weights;

pub use chat::{ChatError, ChatTemplate, Message};
pub use config::{ConfigError, Family, ModelConfig, RopeConfig, RopeScaling};
pub use decoder::{Cancelled, Decoder, DecoderState, LogitsFor, PartTimes};
pub use generation::{Finish, Generation, GenerationError, GenerationSettings, generate};
pub use gguf::GgufError;
pub use joined_linear::DecoderError;
pub use model::{LoadError, Model};
pub use model_files::{MemoryModel, ModelFiles, ModelSummary, OpenError, TypeSummary};
pub use observer::{AttentionInputs, AttentionObserver};
pub use panics::silence_caught_panics;
pub use random_weights::{RandomRows, RandomWeights};
pub use sampler::{Sampler, SamplerError, SamplerSettings};
pub use session::{Cancel, Session, SessionError, SessionSettings};
pub use stop::{StopStrings, Stopped};
pub use text::printable;
pub use tokenizer::{TextStream, Tokenizer, TokenizerError};
pub use weight_source::{WeightRows, WeightSource};
pub use weights::{LayerTensor, TensorError, TensorInfo, TensorName, TensorView};
