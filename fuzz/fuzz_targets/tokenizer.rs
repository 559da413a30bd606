#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| polylora::fuzzing::tokenizer(data));
