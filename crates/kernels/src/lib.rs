//! Instruction-set kernels of IceFormer, each behind a safe interface.
//!
//! The only crate of the workspace with `unsafe` code, but for the line of the engine that maps a file. Callers pass slices; shapes are checked once at the border.
//! [`InstructionSet::current`] tells which kernels run; the environment variable `ICEFORMER_ISA` lowers it.

pub mod activation;
pub mod add;
mod aligned;
#[cfg(target_arch = "x86_64")]
mod amx;
mod arena;
pub mod attention;
pub mod ceilings;
mod elementwise;
mod instruction_set;
pub mod linear;
pub mod norm;
pub mod panels;
pub mod rope;
mod rounding;
pub mod rows;
pub mod selection;
mod simd;
pub mod softmax;
mod thread_team;

pub use aligned::AlignedBuffer;
pub use arena::HugePageArena;
pub use half;
pub use instruction_set::InstructionSet;
pub use rounding::{brain_bits, nearest_integer};
pub use thread_team::{ThreadTeam, Turn};
