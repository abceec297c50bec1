//! The `walmirror` binary. See [`walmirror_sink::cli`].

fn main() {
    walmirror_sink::cli::main()
}
