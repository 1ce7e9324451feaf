#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| iceformer_engine::fuzzing::chat_template(data));
