//! Runs pretrained decoder models on the CPU.
