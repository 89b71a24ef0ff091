//! Any bytes to both ends of a hello. The checks are in `praas_transport::fuzzing`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| praas_transport::fuzzing::hello(input));
