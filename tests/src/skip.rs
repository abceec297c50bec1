//! Tests that need what not every machine has.

/// Says that a test cannot be run here, and why. With `WALMIRROR_NO_SKIP=1` that fails it, so that nothing that a machine should
/// test is left out without a word. What a version of Postgres does not have is no reason to call this.
#[track_caller]
pub fn skipped(why: &str) {
    let forbidden = std::env::var("WALMIRROR_NO_SKIP").is_ok_and(|value| value == "1");
    assert!(
        !forbidden,
        "WALMIRROR_NO_SKIP=1, and this test cannot be run: {why}"
    );
    println!("skipped: {why}");
}
