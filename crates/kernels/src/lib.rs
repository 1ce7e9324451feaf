//! Instruction-set kernels of IceFormer, each behind a safe interface.
//!
//! The only crate of the workspace with `unsafe` code. Callers pass slices; shapes are checked once at the border.
//! [`InstructionSet::current`] tells which kernels run; the environment variable `ICEFORMER_ISA` lowers it.

mod instruction_set;
pub mod linear;
mod thread_team;

pub use instruction_set::InstructionSet;
pub use thread_team::ThreadTeam;
