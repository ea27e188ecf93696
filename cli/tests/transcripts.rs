//! Holds what the command prints against the transcripts in `tests/cmd`.

#[test]
fn the_command_prints_what_the_transcripts_say() {
    trycmd::TestCases::new()
        .case("tests/cmd/*.trycmd")
        .env("TANDEM_RUNTIME_DIR", "/nonexistent/tandem")
        .insert_var("[VERSION]", env!("CARGO_PKG_VERSION"))
        .expect("a variable");
}
