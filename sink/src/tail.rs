//! `walmirror tail`: the stream, printed for people.
