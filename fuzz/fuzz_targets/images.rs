#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| smalti_fuzz::images(data));
