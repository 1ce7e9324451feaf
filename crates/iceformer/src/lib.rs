//! IceFormer: pretrained Transformers on long inputs on ordinary CPUs.
pub use iceformer_attention as attention;
pub use iceformer_engine as engine;
