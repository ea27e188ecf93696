#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| tandem_fuzz::Target::named("paths").run(data));
