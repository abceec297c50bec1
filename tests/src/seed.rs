//! Random tests that can be repeated.

use rand::SeedableRng;
use rand::rngs::StdRng;

/// A random generator. The seed is printed, so that a failed run can be repeated with `SEED=…`.
pub fn rng(test: &str) -> StdRng {
    let seed = match std::env::var("SEED") {
        Ok(seed) => seed.parse().expect("SEED must be a number"),
        Err(_) => rand::random_range(0..1_000_000),
    };
    println!("{test}: SEED={seed}");
    StdRng::seed_from_u64(seed)
}
