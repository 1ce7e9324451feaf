//! Runs pretrained decoder models on the CPU.
//!
//! [`Model::load`] opens a model, [`Model::session`] starts a sequence, [`Session::read`] reads a prompt and [`generate`]
//! continues it:
//!
//! ```no_run
//! use std::ops::ControlFlow;
//! use std::path::Path;
//! use std::sync::Arc;
//!
//! use iceformer_engine::{GenerationSettings, Model, Sampler, SamplerSettings, SessionSettings, generate};
//! use iceformer_kernels::ThreadTeam;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let team = Arc::new(ThreadTeam::new(ThreadTeam::available()));
//! let model = Model::load(Path::new("MODEL"), team, |_, _| {})?;
//! let mut session = model.session(&SessionSettings::default())?;
//! session.read(&model.tokenizer().encode("Once upon a time", true)?, |_, _| {})?;
//! let mut sampler = Sampler::new(SamplerSettings::default())?;
//! let answer = generate(&mut session, model.tokenizer(), &mut sampler, &GenerationSettings::default(), |_| {
//!     ControlFlow::Continue(())
//! })?;
//! println!("{}", answer.text);
//! # Ok(())
//! # }
//! ```
//!
//! Below that, [`ModelFiles`] turns files (a Hugging Face folder or a GGUF file) into a checked description:
//! [`ModelConfig`], tensors by [`TensorName`], [`Tokenizer`] and [`ChatTemplate`].

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
