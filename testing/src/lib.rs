//! What the tests of IceFormer share: an f64 reference, tolerances and deterministic random data.
