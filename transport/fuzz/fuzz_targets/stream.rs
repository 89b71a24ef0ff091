//! Frames from the sending half to the receiving half, and with one change on their way. The checks are in `praas_transport::fuzzing`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| praas_transport::fuzzing::stream(input));
