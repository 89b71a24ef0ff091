//! Any bytes to the receiving half of a connection. The checks are in `praas_transport::fuzzing`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| praas_transport::fuzzing::frames(input));
