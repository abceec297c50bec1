//! Generates the prost types of walmirror.proto (protox parses it, so no protoc is needed) and the tables of powers of
//! five that the float printer multiplies with.

#[path = "build/powers.rs"]
mod powers;

use std::error::Error;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=walmirror.proto");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build/powers.rs");

    let descriptors = protox::compile(["walmirror.proto"], ["."])?;
    prost_build::Config::new().compile_fds(descriptors)?;

    let out_dir = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out_dir.join("powers_of_five.rs"), powers::source())?;
    Ok(())
}
