//! The `iceformer` command line.
fn main() {}
