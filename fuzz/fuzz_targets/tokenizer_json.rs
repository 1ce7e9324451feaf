#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| iceformer_engine::fuzzing::tokenizer_json(data));
